"""The command line: what it prints, its exit codes, and that bad input writes nothing."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from samlib import __main__ as cli
from samlib import experiments
from samlib import spec as specs_of
from samlib.experiments import Arm
from samlib.spec import CheckSpec, DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec

TINY = RunSpec(DataSpec(train_size=48), ModelSpec(width=4), OptimSpec("sam"), TrainSpec(epochs=2, batch_size=16))
ARMS = (
    Arm("sgd", "clean", specs_of.override(TINY, {"method": "sgd"}), (0, 1), (experiments.measure("lambda_max"),)),
    Arm("sam", "clean", TINY, (0, 1)),
    Arm("closed_form", "p=2", CheckSpec("dual_norm", (("p", "2"),)), (0,)),
)


@pytest.fixture
def study(monkeypatch, tmp_path):
    """A study of seven runs in a folder of its own."""
    for stem in experiments.STEMS:
        monkeypatch.setattr(f"samlib.experiments.{stem}.arms", lambda profile: ())
    monkeypatch.setattr("samlib.experiments.sam_vs_sgd.arms", lambda profile: ARMS if profile == "quick" else ())
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    return tmp_path


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def ran(study, capsys):
    assert cli.main(["run", "--workers", "1", "--device", "cpu"]) == 0
    capsys.readouterr()
    return study


def test_run_then_nothing_is_pending(study, capsys):
    assert cli.main(["run", "--workers", "1", "--device", "cpu"]) == 0
    assert "7 runs in" in capsys.readouterr().out
    assert cli.main(["run", "--workers", "1", "--device", "cpu"]) == 0
    assert "7 were there already" in capsys.readouterr().out
    assert cli.main(["list", "--store", "runs"]) == 0
    assert "7 runs on quick, 0 of them pending" in capsys.readouterr().out


def test_list_keys_names_every_run_with_its_status(ran, capsys):
    assert cli.main(["list", "--store", "runs", "--keys"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: words[1] for words in lines if specs_of.is_key(words[0])}
    assert shown == {specs_of.key(spec): "done" for arm in ARMS for spec in arm.specs}


def test_run_only_brings_along_the_run_of_a_measure(study, capsys):
    measure = next(spec for spec in experiments.specs(ARMS) if isinstance(spec, specs_of.MeasureSpec))
    assert cli.main(["run", "--only", specs_of.key(measure), "--workers", "1"]) == 0
    assert "2 runs in" in capsys.readouterr().out


def test_show_prints_the_record(ran, capsys):
    key = specs_of.key(ARMS[1].specs[0])
    assert cli.main(["show", key, "--store", "runs"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == key


def test_verify_repeats_a_run_exactly_and_notices_a_changed_number(ran, capsys):
    measure = ARMS[0].measures_of(ARMS[0].specs[0])[0]
    for spec in (ARMS[1].specs[0], measure, ARMS[2].specs[0]):
        assert cli.main(["verify", specs_of.key(spec), "--store", "runs", "--device", "cpu"]) == 0
        assert "identical" in capsys.readouterr().out
    path = ran / "runs" / "quick" / "records" / f"{specs_of.key(measure)}.json"
    data = json.loads(path.read_text())
    data["measures"]["lambda_max"] *= 2
    path.write_text(json.dumps(data))
    assert cli.main(["verify", specs_of.key(measure), "--store", "runs", "--device", "cpu"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_export_writes_tables_and_explains_every_column(ran, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "csv"), "--store", "runs"]) == 0
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "csv").glob("*.csv")}
    assert set(tables) == {"runs", "checks", "history", "columns"}
    assert len(tables["runs"]) == 4
    assert len(tables["history"]) == 8
    assert tables["runs"]["lambda_max"].notna().sum() == 2
    explained = set(tables["columns"]["column"])
    assert explained == {column for name in ("runs", "checks", "history") for column in tables[name].columns}
    assert tables["columns"]["meaning"].str.len().min() > 3


def test_verdicts_as_text_and_as_json(ran, capsys):
    assert cli.main(["verdicts", "--store", "runs"]) == 0
    assert "further claims: not run" in capsys.readouterr().out
    assert cli.main(["verdicts", "--store", "runs", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 64
    assert cli.main(["verdicts", "--claim", "foret-svhn", "--store", "runs"]) == 0
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--profile", "fast"], ["profile", "fast", "quick"]),
        (["run", "--experiment", "sam_vs_adam"], ["experiment", "sam_vs_adam", "sam_vs_sgd"]),
        (["run", "--only", "0" * 16], ["key", "0" * 16]),
        (["run", "--workers", "0"], ["workers", "0"]),
        (["run", "--store", "results"], ["store", "read-only", "runs"]),
        (["run", "--device", "tpu", "--workers", "1"], ["device", "tpu"]),
        (["list", "--profile", "fast"], ["profile", "fast"]),
        (["show", "nonsense"], ["key", "nonsense"]),
        (["verify", "0" * 16], ["key", "0" * 16]),
        (["verdicts", "--claim", "foret-everything"], ["claim", "foret-everything"]),
        (["export", "somewhere", "--store", "runs"], ["no records"]),
        (["compare", "--profile", "fast"], ["profile", "fast"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_exit_code_2_and_writes_nothing(study, capsys, arguments, words):
    before = files(study)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert files(study) == before


def test_gpu_profile_without_a_gpu(study, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["run", "--profile", "gpu"]) == 2
    error = capsys.readouterr().err
    for word in ("'gpu'", "GPU", "--profile quick", "--device cpu"):
        assert word in error
    assert files(study) == []


def test_a_store_that_cannot_be_written(study, capsys):
    (study / "runs").write_text("a file where the folder should be")
    assert cli.main(["run", "--workers", "1"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "samlib", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sam_vs_sgd: " in done.stdout
    assert subprocess.run([sys.executable, "-m", "samlib"], capture_output=True, check=False).returncode == 2
