"""pyproject.toml is the source; the conda file, the lock, the wheel, make and the CI script keep in step with it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
SEVEN = {"torch", "torchvision", "jupyter-book", "papermill", "nbval", "seaborn", "pandas"}


def declared() -> dict[str, Requirement]:
    """Every requirement of pyproject.toml by its name, extras included."""
    texts = PROJECT["dependencies"] + [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if line and line[0] not in "# "]


def run(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    outside_make = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"
    }
    return subprocess.run(command, capture_output=True, text=True, env=outside_make | (env or {}), cwd=cwd)


# ---------------------------------------------------------------------------------------------- conda and lock


def test_the_pip_section_of_environment_yml_names_the_seven_packages_and_the_project():
    pip = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    assert pip[-1] == "-e .[book,test]"
    conda = {requirement.name: requirement.specifier for requirement in map(Requirement, pip[:-1])}
    assert conda.keys() == SEVEN
    assert conda == {name: declared()[name].specifier for name in SEVEN}


def test_environment_yml_takes_the_python_of_pyproject():
    python = next(entry for entry in CONDA["dependencies"] if str(entry).startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("requirement", declared().values(), ids=str)
def test_the_lock_satisfies_each_requirement(requirement):
    pins = [pin for pin in locked() if pin.name == requirement.name]
    versions = [specifier.version for pin in pins for specifier in pin.specifier]
    assert versions
    assert all(requirement.specifier.contains(version) for version in versions)


def test_the_lock_pins_exactly():
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in locked())


def test_what_runs_here_is_supported():
    assert SpecifierSet(PROJECT["requires-python"]).contains("{}.{}.{}".format(*sys.version_info))


# ---------------------------------------------------------------------------------------------- make env


def requirements(torch: str) -> set[str]:
    done = run("bash", "scripts/make_env.sh", "requirements", env={"TORCH": torch})
    assert done.returncode == 0, done.stderr
    return {Requirement(line).name for line in done.stdout.splitlines()}


def test_torch_comes_from_its_own_step_and_the_rest_from_the_lock():
    assert requirements("default") == {pin.name for pin in locked()} - {"torch", "torchvision"}


def test_the_cpu_build_needs_nothing_of_cuda():
    left_out = requirements("default") - requirements("cpu")
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "cuda-toolkit"} <= left_out
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in left_out)


def with_tools(folder: Path, *tools: str, **scripts: str) -> dict[str, str]:
    """An environment whose PATH holds a few real tools and some scripts."""
    for tool in ("bash", "cat", "dirname", "awk", "grep", "uname", *tools):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def refused(env: dict[str, str], venv: Path) -> str:
    """What make_env.sh says when it refuses, before it has written anything."""
    existed = venv.exists()
    done = run(shutil.which("bash"), "scripts/make_env.sh", env=env | {"VENV": str(venv)})
    assert done.returncode == 2, done.stderr
    assert venv.exists() == existed
    return done.stderr


def test_make_env_refuses_an_unknown_build_of_torch(tmp_path):
    assert "TORCH=gpu is unknown: use TORCH=default" in refused({"TORCH": "gpu"}, tmp_path / "venv")


def test_make_env_refuses_a_full_disk_and_says_what_to_do(tmp_path):
    (tmp_path / "bin").mkdir()
    full = "echo header; echo disk 9000000 8000000 1500000 90% /"
    message = refused(with_tools(tmp_path / "bin", df=full) | {"TORCH": "default"}, tmp_path / "venv")
    assert "1 GB are free" in message
    assert "make env TORCH=cpu" in message


def test_make_env_refuses_an_interpreter_out_of_range(tmp_path):
    message = refused({"PYTHON": "/bin/false"}, tmp_path / "venv")
    assert "PYTHON=/bin/false is not a Python 3.11, 3.12 or 3.13" in message


def test_make_env_says_when_there_is_no_python(tmp_path):
    (tmp_path / "bin").mkdir()
    message = refused(with_tools(tmp_path / "bin", "df") | {"PYTHON": ""}, tmp_path / "venv")
    assert "no Python 3.11, 3.12 or 3.13 on the PATH" in message


def test_make_env_does_not_install_into_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").touch()
    assert "is not a virtual environment" in refused({}, tmp_path / "venv")


# ---------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("samlib", "results/published"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=source)
    assert done.returncode == 0, done.stderr
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_the_wheel_is_typed_and_carries_every_published_file(wheel):
    assert (wheel / "samlib" / "py.typed").is_file()
    carried = {path.name: path.read_bytes() for path in (wheel / "samlib" / "_published").iterdir()}
    assert carried == {path.name: path.read_bytes() for path in (ROOT / "results" / "published").iterdir()}


def test_the_wheel_works_outside_a_checkout(wheel, tmp_path):
    code = "from samlib import published as p; print(p.folder(), len(p.claims()), len(p.errata()))"
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": str(wheel)}, cwd=tmp_path)
    assert done.stdout.split() == [str(wheel / "samlib" / "_published"), "69", "67"]


# ---------------------------------------------------------------------------------------------- make and CI


def test_make_help_lists_every_target():
    targets = set(re.findall(r"^\.PHONY: ([a-z-]+)$", MAKEFILE, flags=re.MULTILINE)) - {"another-torch"}
    listed = {line.split()[0] for line in run("make", "help").stdout.splitlines()[1:]}
    assert listed == targets
    assert {"env", "reproduce", "test", "test-notebooks", "book", "refresh", "lock", "lint", "clean"} <= targets


@pytest.mark.parametrize("profile", ["", "../elsewhere", "quick gpu", "."])
def test_make_clean_refuses_what_is_no_profile(tmp_path, profile):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = tmp_path / "runs" / "gpu" / "records"
    kept.mkdir(parents=True)
    done = run("make", "clean", f"PROFILE={profile}", cwd=tmp_path)
    assert done.returncode == 2
    assert "names no profile" in done.stderr
    assert kept.is_dir()


def test_make_clean_forgets_one_profile(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for profile in ("quick", "gpu"):
        (tmp_path / "runs" / profile).mkdir(parents=True)
    assert run("make", "clean", cwd=tmp_path).returncode == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["gpu"]


def ci_run(folder: Path, makefile: str) -> subprocess.CompletedProcess:
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    (folder / "Makefile").write_text(makefile)
    return run("bash", ".ci/run", cwd=folder)


@pytest.mark.parametrize(
    ("recipe", "code"),
    [
        ("mkdir -p runs/quick; echo 0 > runs/quick/exit_code", 0),
        ("mkdir -p runs/quick; echo 3 > runs/quick/exit_code; exit 3", 3),
        ("exit 1", 2),  # make's own code, where the driver has not left one
    ],
)
def test_the_ci_script_ends_with_the_outcome_of_reproduce(tmp_path, recipe, code):
    done = ci_run(tmp_path, f"test:\n\t@echo '== 7 passed in 1.00s =='\nreproduce:\n\t@{recipe}\n")
    assert done.returncode == code
    assert ("tests: == 7 passed" in done.stdout.splitlines()[-1]) == (code == 0)


def test_the_ci_script_stops_at_a_failed_test(tmp_path):
    done = ci_run(tmp_path, "test:\n\t@exit 1\nreproduce:\n\t@touch reached\n")
    assert done.returncode == 2
    assert not (tmp_path / "reached").exists()


@pytest.mark.parametrize("name", ["test", "book"])
def test_workflows_call_targets_that_exist(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        assert command == "bash .ci/run" or re.search(rf"^{command.removeprefix('make ')}:", MAKEFILE, re.MULTILINE)
