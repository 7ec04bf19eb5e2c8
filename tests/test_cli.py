"""The command line: what it prints, its exit codes, and that bad input writes nothing."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from samlib import __main__ as cli
from samlib import experiments, pack, published, sweep
from samlib import spec as specs_of
from samlib.experiments import Arm
from samlib.spec import CheckSpec, DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.store import Record, Store

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
    monkeypatch.chdir(tmp_path)
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


def test_a_variation_of_ones_own_has_its_own_keys(study, capsys):
    chosen = ["--seeds", "5", "6", "--override", "train.epochs=1", "--override", "schedule=constant"]
    assert cli.main(["run", "--workers", "1", "--device", "cpu", "--experiment", "sam_vs_sgd", *chosen]) == 0
    store = cli.open_store("quick", "runs")
    trained = [record.spec for record in store.records() if record.spec["kind"] == "train"]
    assert {spec["seed"] for spec in trained} == {5, 6}
    assert {(spec["train"]["epochs"], spec["optim"]["schedule"]) for spec in trained} == {(1, "constant")}
    assert not {record.key for record in store.records()} & {specs_of.key(arm.specs[0]) for arm in ARMS[:2]}


def test_tuning_runs_come_along_unless_their_records_are_committed(monkeypatch, tmp_path):
    def of_tuning(tuning):
        return {arm.cell for _, arm in cli.chosen_arms("quick", None, tuning) if arm.tuning}

    assert of_tuning(False) == set()
    assert of_tuning(True)
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    assert of_tuning(False) == of_tuning(True)


def test_a_graph_is_asked_for_by_name(study, monkeypatch):
    monkeypatch.setenv("SAMLIB_GRAPH", "0")
    assert cli.main(["run", "--workers", "1", "--device", "cpu", "--graph"]) == 0
    store = cli.open_store("quick", "runs")
    made = {record.spec["kind"]: record.environment.get("graph") for record in store.records()}
    assert made == {"train": True, "measure": None, "check": None}


def test_runs_side_by_side_are_asked_for_by_name(study, capsys):
    assert cli.main(["run", "--device", "cpu", "--side-by-side", "2", "--probe"]) == 0
    store = cli.open_store("quick", "runs")
    made = {record.spec["kind"]: record.environment.get("side_by_side") for record in store.records()}
    assert made == {"train": 2, "measure": None, "check": None}
    assert all(probe["images_per_second"] > 0 for probe in store.probes())
    assert cli.main(["run", "--device", "cpu", "--side-by-side", "0", "--probe"]) == cli.INPUT_ERROR
    assert "side_by_side = 0: use 1 to 4" in capsys.readouterr().err


def test_compiled_passes_are_asked_for_by_name(study, monkeypatch):
    monkeypatch.setenv("SAMLIB_COMPILE", "0")
    assert cli.main(["run", "--compile", "--dry-run"]) == 0
    assert os.environ["SAMLIB_COMPILE"] == "1"


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
    assert len(json.loads(capsys.readouterr().out)) == len(published.claims())
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
        (["run", "--time-limit", "soon"], ["time-limit", "soon", "1h30m"]),
        (["run", "--time-limit", "9m", "--workers", "2"], ["workers", "2", "one process"]),
        (["run", "--override", "epochs"], ["override", "epochs", "FIELD=VALUE"]),
        (["run", "--override", "epoch=2"], ["epoch", "epochs"]),
        (["run", "--seeds", "-1"], ["seed", "-1"]),
        (["run", "--known", "./nowhere"], ["known", "./nowhere"]),
        (["run", "--known", "results/gpu"], ["known", "results/gpu", "quick"]),
        (["run", "--with-weights"], ["with-weights", "--export"]),
        (["import", "."], ["import", "records.zip"]),
        (["import", "./nowhere"], ["import", "nowhere"]),
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


# ------------------------------------------------------------------------------------------------ on a rented GPU

HERE = ["--workers", "1", "--device", "cpu"]
RUN = ["run", "--device", "cpu"]
MEASURED = ARMS[0].measures_of(ARMS[0].specs[0])[0]


def test_a_dry_run_prints_the_plan_and_writes_nothing(study, capsys):
    assert cli.main([*RUN, "--dry-run", "--time-limit", "1h", "--known", "runs"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "sam_vs_sgd / clean / sgd (priority 1): 4 runs, 4 of them in the time",
        "min by the cost model, complete after",
        "decides foret-t1-sam-beats-sgd-cifar, foret-long-sgd-does-not-help",
        "7 runs pending",
        "7 of them fit into 60.00 min",
    ):
        assert words in shown
    assert files(study) == []


def test_a_dry_run_goes_by_what_was_measured(ran, capsys):
    (ran / "runs" / "quick" / "records" / f"{specs_of.key(ARMS[1].specs[1])}.json").unlink()
    before = files(ran)
    assert cli.main([*RUN, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "sam_vs_sgd / clean / sam (priority 1): 1 runs" in shown
    assert "min by records, complete after" in shown
    assert "1 runs pending" in shown
    assert files(ran) == before


def test_a_plan_for_a_gpu_needs_none(study, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("samlib.experiments.sam_vs_sgd.arms", lambda profile: ARMS)
    assert cli.main(["run", "--profile", "gpu", "--dry-run"]) == 0
    assert "gpu on a GPU of assumed speed, 7 runs in all" in capsys.readouterr().out


def test_a_probe_is_kept_and_the_plan_goes_by_it(study, capsys, monkeypatch):
    monkeypatch.setattr("samlib.probe.SETTING_SECONDS", 0.05)
    assert cli.main([*RUN, "--dry-run", "--probe"]) == 0
    shown = capsys.readouterr().out
    assert "cnn, sgd, fp32, batches of 16: " in shown
    assert "min by a probe" in shown
    assert [path.name for path in files(study)] == ["probe.json"]


def test_what_is_known_is_not_run_and_not_exported(ran, study, capsys):
    """The run whose weights lie in the other store is not trained again for its measure."""
    for path in files(ran / "runs" / "quick" / "records"):
        if path.stem != specs_of.key(ARMS[0].specs[0]):
            path.unlink()
    out = study / "out"
    arguments = ["--store", "./mine", "--known", "runs/quick", "--export", str(out), "--with-weights"]
    assert cli.main([*RUN, *HERE, "--only", specs_of.key(MEASURED), *arguments]) == 0
    assert "1 runs in" in capsys.readouterr().out
    assert cli.main(["import", str(out), "--store", str(study / "elsewhere")]) == 0
    assert [path.stem for path in files(study / "elsewhere" / "quick" / "records")] == [specs_of.key(MEASURED)]


def test_export_and_import_make_the_round_trip(study, capsys):
    out = study / "out"
    assert cli.main([*RUN, "--time-limit", "1h", "--export", str(out), "--with-weights", "--with-checkpoints"]) == 0
    assert f"{out}: 7 records and 4 checkpoints and weights" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"records.zip", "tensors.zip"}
    for expected in ("7 records new, 0 there already, 4 ", "0 records new, 7 there already, 0 "):
        assert cli.main(["import", str(out), "--profile", "quick", "--store", "./copy"]) == 0
        assert expected in capsys.readouterr().out
    for kind in ("records", "weights"):
        one, two = (study / folder / "quick" / kind for folder in ("runs", "copy"))
        assert {path.name: path.read_bytes() for path in files(one)} == {
            path.name: path.read_bytes() for path in files(two)
        }
    assert cli.main([*RUN, *HERE, "--store", "./copy"]) == 0
    assert "7 were there already" in capsys.readouterr().out


def test_weights_in_half_precision_are_measured_elsewhere_and_the_records_say_so(study, capsys):
    assert cli.main([*RUN, *HERE, "--export", "out", "--with-weights", "half"]) == 0
    assert cli.main(["import", "out", "--store", "./copy"]) == 0
    store = cli.open_store("quick", "./copy")
    assert all(store.half_weights_path(key).exists() for key in store.trained())
    exact = [store.load(specs_of.key(ARMS[0].measures_of(member)[0])) for member in ARMS[0].specs]
    for record in exact:
        store.record_path(record.key).unlink()
    assert cli.main([*RUN, "--time-limit", "1h", "--store", "./copy"]) == 0  # and nothing is trained again for them
    assert "2 runs in" in capsys.readouterr().out
    assert not any(store.weights_path(key).exists() for key in store.trained())
    for record in exact:
        again = store.load(record.key)
        assert again.of_half_weights
        assert again.measures["lambda_max"] == pytest.approx(record.measures["lambda_max"], rel=0.02)
        assert again.measures["lambda_max"] != record.measures["lambda_max"]
    assert cli.main(["verify", exact[0].key, "--store", "./copy", "--device", "cpu"]) == 0
    assert "stored: of weights rounded to half precision; now of the exact ones" in capsys.readouterr().out
    assert cli.main(["export", "csv", "--store", "./copy"]) == 0
    table = pd.read_csv(study / "csv" / "runs.csv").set_index("role")
    assert (table.loc["sgd", "half_weights"].tolist(), table.loc["sam", "half_weights"].tolist()) == ([1, 1], [0, 0])


def test_publishing_counts_the_measures_of_half_precision_weights(study, capsys):
    store = cli.open_store("quick", "runs")
    for spec in experiments.specs(ARMS):
        environment = {"dirty": False} | ({"weights": "half"} if isinstance(spec, specs_of.MeasureSpec) else {})
        store.save(Record(specs_of.key(spec), specs_of.canonical(spec), "done", environment=environment))
    assert cli.main(["publish"]) == 0
    shown = capsys.readouterr().out
    assert "7 records in" in shown
    assert "2 of them were measured on weights in half precision" in shown


def test_an_interrupted_sweep_leaves_an_export_of_what_is_finished(study, capsys, monkeypatch):
    start, started = sweep.Here.start, []

    def interrupted_at_the_third(self, spec):
        started.append(spec)
        if len(started) == 3:
            raise KeyboardInterrupt
        return start(self, spec)

    monkeypatch.setattr(sweep.Here, "start", interrupted_at_the_third)
    assert cli.main([*RUN, *HERE, "--export", "out"]) == 130
    assert cli.main(["import", "out", "--store", "./copy"]) == 0
    assert "2 records new" in capsys.readouterr().out


def test_a_record_that_cannot_be_used_is_run_again_and_exported(ran, capsys):
    path = ran / "runs" / "quick" / "records" / f"{specs_of.key(ARMS[1].specs[0])}.json"
    path.write_text("{")
    assert cli.main([*RUN, *HERE, "--export", "out"]) == 0
    assert "out: 7 records" in capsys.readouterr().out


def test_an_export_grows_with_the_sweep(study, monkeypatch):
    """One that is killed leaves what was exported last."""
    monkeypatch.setattr(cli, "EXPORT_SECONDS", 0.0)
    export, sizes = pack.export, []

    def export_and_note(*arguments, **wanted):
        packed = export(*arguments, **wanted)
        sizes.append((packed.records, packed.tensors))
        return packed

    monkeypatch.setattr("samlib.pack.export", export_and_note)
    assert cli.main([*RUN, *HERE, "--export", "out", "--with-weights"]) == 0
    order = experiments.in_order_of_worth(ARMS)
    trained = [sum(isinstance(spec, RunSpec) for spec in order[:done]) for done in range(8)]
    assert sizes == [*enumerate(trained), (7, 4)]


def test_a_sweep_goes_on_where_an_export_fails(study, monkeypatch, capsys):
    """The folder is gone for a while, and a file lies in its place."""
    monkeypatch.setattr(cli, "EXPORT_SECONDS", 0.0)
    save, saved, out = Store.save, [], study / "out"

    def save_and_spoil(store, record):
        saved.append(record.key)
        if len(saved) == 3:
            shutil.rmtree(out)
            out.write_text("")
        if len(saved) == 5:
            out.unlink()
        return save(store, record)

    monkeypatch.setattr(Store, "save", save_and_spoil)
    assert cli.main([*RUN, *HERE, "--export", "out"]) == 0
    shown = capsys.readouterr()
    assert "out: 7 records" in shown.out
    assert "'out' cannot be written" in shown.err


def test_a_sweep_stops_at_its_limit_and_exports_the_run_it_cut(study, capsys, monkeypatch):
    endless = Arm("endless", "clean", specs_of.override(TINY, {"epochs": 10**6, "eval_every": 10**6}), (0, 1))
    monkeypatch.setattr("samlib.experiments.sam_vs_sgd.arms", lambda profile: (endless,))
    assert cli.main([*RUN, "--time-limit", "2s", "--export", "out", "--with-checkpoints"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs are left: the same command goes on" in shown
    assert "out: 0 records and 1 checkpoints and weights" in shown
    assert cli.main(["import", "out", "--store", "./copy"]) == 0
    assert [path.name for path in files(study / "copy")] == [f"{specs_of.key(endless.specs[0])}.pt"]


def test_what_takes_longer_than_any_such_limit_is_pointed_out(ran, capsys):
    path = ran / "runs" / "quick" / "records" / f"{specs_of.key(MEASURED)}.json"
    other = path.with_name(f"{specs_of.key(ARMS[0].measures_of(ARMS[0].specs[1])[0])}.json")
    data = json.loads(other.read_text())
    other.write_text(json.dumps(data | {"wall_seconds": 1e6}))
    path.unlink()
    assert cli.main([*RUN, "--time-limit", "1h"]) == 0
    shown = capsys.readouterr().out
    assert "1 runs are left" in shown
    assert "1 of them are expected to take longer than the time limit" in shown


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "samlib", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sam_vs_sgd: " in done.stdout
    assert subprocess.run([sys.executable, "-m", "samlib"], capture_output=True, check=False).returncode == 2
