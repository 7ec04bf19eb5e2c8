"""notebooks/execute.py on small notebooks of the tests' own: real kernels, real failures, a real interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import execute
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

SCRIPT = Path(__file__).resolve().parent.parent / "notebooks" / "execute.py"
PARAMETERS = 'profile = "quick"\nstore = "results"\nseeds = None\noverrides = None'
KERNEL_END_S = 20


def write(folder: Path, name: str, *cells: str) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write(folder, "99_last", "import os\nprint(profile, store, seeds, overrides, os.getcwd())")
    write(folder, "01_sam_vs_sgd", "x = 1", "raise ValueError('rho = -1')", "print('never')")
    write(folder, "00_first", "print('first')")
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """One call on three notebooks, of which the second fails; its output of an earlier run lies there."""
    out = tmp_path_factory.mktemp("out")
    (out / "01_sam_vs_sgd.ipynb").write_text("{}")
    arguments = ["--source", str(source), "--out", str(out), "--profile", "gpu", "--store", "runs"]
    arguments += ["-p", "seeds", "[0, 1]", "-p", "overrides", "{epochs: 3}"]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    return done, out


def test_a_failed_notebook_is_kept_aside_and_the_others_still_run(run):
    done, out = run
    assert done.returncode == 1
    assert {path.name for path in out.iterdir()} == {"00_first.ipynb", "01_sam_vs_sgd.failed.ipynb", "99_last.ipynb"}
    assert "1 of 3 notebooks failed: 01_sam_vs_sgd" in done.stderr


def test_the_failed_cell_and_its_error_are_shown(run):
    done, _ = run
    assert "01_sam_vs_sgd.failed.ipynb, In [4]: ValueError: rho = -1" in done.stderr
    assert "\x1b[" not in done.stderr


def test_notebooks_run_in_the_order_of_their_numbers_with_progress(run):
    started = [line for line in run[0].stdout.splitlines() if line.endswith("...")]
    assert started == ["[1/3] 00_first ...", "[2/3] 01_sam_vs_sgd ...", "[3/3] 99_last ..."]


def test_parameters_reach_the_notebook_with_their_types_and_its_folder_is_the_working_one(run, source):
    assert printed(run[1] / "99_last.ipynb") == f"gpu runs [0, 1] {{'epochs': 3}} {source}\n"


def test_what_a_cell_printed_in_pieces_is_joined(tmp_path):
    out, err, shown = new_output("stream", text="a\n"), new_output("stream", name="stderr"), new_output("display_data")
    more = new_output("stream", text="b\n")
    cell = new_code_cell(outputs=[out, more, err, shown, more])
    nbformat.write(new_notebook(cells=[new_markdown_cell("text"), cell]), tmp_path / "x.ipynb")
    execute.join_streams(tmp_path / "x.ipynb")
    outputs = nbformat.read(tmp_path / "x.ipynb", as_version=4).cells[1].outputs
    assert [(output.get("name"), output.get("text")) for output in outputs] == [
        ("stdout", "a\nb\n"),
        ("stderr", ""),
        (None, None),
        ("stdout", "b\n"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "sedes", "3"], "-p sedes 3: notebook 00_first has no parameter 'sedes': use one of profile, store"),
        (["--profile", "qick"], "profile = 'qick' is unknown: use one of quick"),
        (["-p", "overrides", "{epochz: 3}"], "'epochz' is no field of a train spec: did you mean 'epochs'?"),
        (["-p", "seeds", "[0, 0]"], "seeds = [0, 0]: use at least one seed, each once"),
        (["-p", "seeds", "[0"], "-p seeds '[0' cannot be read"),
        (["02_none"], "notebook = '02_none' does not exist: use one of 00_first, 01_sam_vs_sgd, 99_last"),
        (["--source", "/nowhere"], "source = '/nowhere' holds no notebook"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(source, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert execute.main(["--source", str(source), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("quick", "quick"),
        ("3", 3),
        ("1e-3", 0.001),
        ("None", None),
        ("true", True),
        ("[0, 1]", [0, 1]),
        ("{epochs: 20, model.width: 32}", {"epochs": 20, "model.width": 32}),
        ('{"epochs": 20}', {"epochs": 20}),
    ],
)
def test_parameter_values_are_read_as_python_or_yaml(text, value):
    assert execute.read_parameter("x", text) == ("x", value)


def test_named_notebooks_run_in_the_order_of_their_numbers(source):
    chosen = execute.chosen(source, ["notebooks/99_last.ipynb", "00_first"])
    assert [path.stem for path in chosen] == ["00_first", "99_last"]


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z" if Path("/proc").is_dir() else False


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_two_workers_run_two_notebooks_at_a_time(tmp_path):
    """Each waits for the other's file, and the third for theirs."""
    waits = "import os, time\nend = time.time() + 60\nwhile not os.path.exists({!r}):\n    assert time.time() < end"
    files = [str(tmp_path / name) for name in "ab"]
    for name, own, other in (("00_a", *files), ("01_b", *reversed(files))):
        write(tmp_path, name, f"open({own!r}, 'w')", waits.format(other))
    write(tmp_path, "02_c", "print('third')")
    arguments = ["--source", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00_a.ipynb", "01_b.ipynb", "02_c.ipynb"}
    assert done.stdout.splitlines()[:2] == ["[1/3] 00_a ...", "[2/3] 01_b ..."]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_kernels_and_leaves_no_half_notebook(tmp_path, number):
    markers, out = [tmp_path / "pid 0", tmp_path / "pid 1"], tmp_path / "out"
    for index, marker in enumerate(markers):
        waits = f"import os, time\nopen({str(marker)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
        write(tmp_path, f"0{index}_long", waits)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--source", str(tmp_path), "--out", str(out), "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: all(marker.exists() and marker.read_text() for marker in markers), 60)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command starts the unfinished notebook again" in errors
    assert list(out.iterdir()) == []
    for marker in markers:
        assert wait_until(lambda marker=marker: gone(int(marker.read_text())), KERNEL_END_S)
