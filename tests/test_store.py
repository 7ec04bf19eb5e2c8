"""Records: atomic writes, round trips, frames, and a clear error for every file that cannot be used."""

import dataclasses
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from samlib import __main__ as cli
from samlib import spec as specs_of
from samlib import study, sweep
from samlib.errors import InputError
from samlib.experiments import Arm, measure
from samlib.spec import ConnectSpec, OptimSpec, RunSpec
from samlib.store import (
    NUMERICS,
    Record,
    RecordError,
    Store,
    known_store,
    open_store,
    parent_spec,
    pending,
    project_root,
    publish,
)

SPEC = RunSpec(optim=OptimSpec("sam", rho=0.1))


def record(spec=SPEC, status="done", **fields):
    return Record(specs_of.key(spec), specs_of.canonical(spec), status, **fields)


def with_spec(spec):
    """A spoiler: the text of a record with another spec in it."""
    return lambda text: text.replace(json.dumps(specs_of.canonical(SPEC), separators=(",", ":")), spec)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "quick", writable=True)


def test_round_trip(store):
    saved = record(
        history={"epoch": [1, 2], "test_loss": [0.5, math.nan]},
        final={"last": {"test_loss": 0.123456789}},
        measures={"lambda_max": math.inf},
    )
    store.save(saved)
    found = store.load(saved.key)
    assert found.history == {"epoch": [1, 2], "test_loss": [0.5, None]}
    assert found.final["last"]["test_loss"] == pytest.approx(0.1234568, abs=1e-12)
    assert found.measures == {"lambda_max": None}
    assert found.spec == specs_of.canonical(SPEC)


def test_the_tables_of_runs_and_of_their_measures_in_one_frame(store):
    """Only of those that are done, the same whose numbers count."""
    arm = Arm("sgd", "cell", SPEC, (0, 1, 2), (measure("lambda_max"), measure("lambda_max", split="test")))
    first, second, _ = arm.specs
    tested = [arm.measures_of(member)[1] for member in arm.specs]
    store.save(record(first, table={"t": [0.0, 1.0], "loss": [2.0, 3.0]}))
    store.save(record(second, "diverged", table={"t": [0.0], "loss": [9.0]}))
    store.save(record(tested[1], table={"t": [0.5], "loss": [4.0]}))
    store.save(record(tested[2], numerics=NUMERICS - 1, table={"t": [0.5], "loss": [9.0]}))
    own = store.tables([arm])
    assert own.to_dict("list") == {
        "t": [0.0, 1.0],
        "loss": [2.0, 3.0],
        "cell": ["cell", "cell"],
        "role": ["sgd", "sgd"],
        "seed": [0, 0],
    }
    measured = store.tables([arm], "lambda_max@split=test")
    assert measured[["seed", "t", "loss"]].to_dict("list") == {"seed": [1], "t": [0.5], "loss": [4.0]}
    assert store.tables([arm], "lambda_max").empty
    assert list(store.tables([arm], "no such measure")) == ["cell", "role", "seed"]


def test_an_absent_record_is_none(store):
    assert store.load(specs_of.key(SPEC)) is None
    assert store.recorded() == []


def test_a_reader_never_sees_a_part_of_a_record(store, monkeypatch):
    store.save(record(wall_seconds=1.0))

    def fail(self, target):
        raise OSError("power cut")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="power cut"):
        store.save(record(wall_seconds=2.0))
    assert store.load(specs_of.key(SPEC)).wall_seconds == 1.0
    assert store.recorded() == [specs_of.key(SPEC)]  # the unfinished file does not count


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[: len(text) // 2], ["truncated"]),
        (lambda text: "[]", ["truncated or no record"]),
        (lambda text: text.replace('"schema":1', '"schema":99'), ["schema = 99"]),
        (lambda text: text.replace('"rho":0.1', '"rho":0.2'), ["holds the spec of"]),
        (lambda text: text.replace('"rho":0.1', '"rhoo":0.1'), ["does not fit", "rhoo"]),
        (lambda text: text.replace('"status":"done"', '"status":"good"'), ["status = 'good'"]),
        (lambda text: text.replace('"key":', '"extra":1,"key":'), ["does not fit", "extra"]),
        (lambda text: "[" * 100_000, ["truncated or no record"]),
        (with_spec("5"), ["does not fit"]),
        (with_spec("null"), ["does not fit"]),
        (with_spec('["train"]'), ["does not fit"]),
        (with_spec('{"kind":["train"]}'), ["does not fit"]),
        (with_spec('{"kind":"train","data":5}'), ["does not fit"]),
        (with_spec('{"kind":"train","optim":[]}'), ["does not fit"]),
        (with_spec('{"kind":"train","optim":{"rho":1' + "0" * 400 + "}}"), ["does not fit"]),
        (with_spec('{"kind":"train","seed":NaN}'), ["does not fit", "seed"]),
        (with_spec('{"kind":"check","check":"dual_norm","settings":5}'), ["does not fit"]),
        (with_spec('{"kind":"check","check":"dual_norm","settings":{"p":NaN}}'), ["does not fit"]),
        (lambda text: text.replace('"history":{}', '"history":5'), ["no numbers", "history"]),
        (lambda text: text.replace('"history":{}', '"history":{"epoch":[1,2],"step":[1]}'), ["no numbers", "history"]),
        (lambda text: text.replace('"table":{}', '"table":{"t":[0,1],"loss":[1]}'), ["no numbers", "table"]),
        (lambda text: text.replace('"table":{}', '"table":{"t":["0"]}'), ["no numbers", "table"]),
        (lambda text: text.replace('"final":{}', '"final":{"last":5}'), ["no numbers", "final"]),
        (lambda text: text.replace('"measures":{}', '"measures":{"lambda_max":"7"}'), ["no numbers", "measures"]),
        (lambda text: text.replace('"perturbation":{}', '"perturbation":[]'), ["no numbers", "perturbation"]),
        (lambda text: text.replace('"wall_seconds":0.0', '"wall_seconds":"1 s"'), ["no numbers", "wall_seconds"]),
        (lambda text: text.replace('"environment":{}', '"environment":"cpu"'), ["no numbers", "environment"]),
    ],
)
def test_a_record_that_cannot_be_used_is_named_and_can_be_put_aside(store, spoil, words):
    path = store.save(record())
    text = path.read_text()
    path.write_text(spoil(text))
    assert path.read_text() != text
    with pytest.raises(RecordError) as error:
        store.load(specs_of.key(SPEC))
    for word in [str(path), "run", *words]:
        assert word in str(error.value)
    aside = store.put_aside(specs_of.key(SPEC))
    assert aside.exists()
    assert store.load(specs_of.key(SPEC)) is None


def test_a_known_store_is_named_by_its_root_or_by_the_folder_of_its_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    for folder in ("results", "mine/gpu", "odd/gpu/gpu", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for name, expected in [
        ("results", "results/gpu"),
        ("results/gpu", "results/gpu"),  # which is not there yet
        ("runs", "runs/gpu"),
        (f"{tmp_path}/mine", "mine/gpu"),
        (f"{tmp_path}/mine/gpu", "mine/gpu"),
        (f"{tmp_path}/odd/gpu/gpu", "odd/gpu/gpu"),
        (f"{tmp_path}/empty", "empty/gpu"),
    ]:
        assert known_store("gpu", name) == Store(tmp_path / expected, writable=name == "runs")
    for name, words in [
        ("results/quick", "of the profile quick, not of gpu"),
        (f"{tmp_path}/odd/gpu", "holds a folder gpu"),
        (f"{tmp_path}/nowhere", "is no folder"),
        (f"{tmp_path}/nowhere/gpu", "is no folder"),
        ("result", "is no folder"),
    ]:
        with pytest.raises(InputError, match=f"known = '{name}' .*{words}"):
            known_store("gpu", name)


def test_a_store_adopts_a_finished_run_with_its_weights_but_none_in_place_of_its_own(store, tmp_path):
    first, second = (Store(tmp_path / name, writable=True) for name in ("first", "second"))
    first.save(record(status="failed"))
    second.save(record(wall_seconds=2.0))
    key = specs_of.key(SPEC)
    second.weights_path(key).parent.mkdir()
    second.weights_path(key).write_bytes(b"weights")
    store.adopt(key, [first])
    assert store.recorded() == []
    store.adopt(key, [first, second])
    assert (store.load(key).wall_seconds, store.trained()) == (2.0, [key])
    assert store.weights_path(key).read_bytes() == b"weights"
    second.save(record(wall_seconds=3.0))
    store.adopt(key, [second])
    assert store.load(key).wall_seconds == 2.0


def test_of_the_weights_there_are_the_exact_ones_are_taken(store, tmp_path):
    first, second, third = (Store(tmp_path / name, writable=True) for name in ("first", "second", "third"))
    key = specs_of.key(SPEC)
    for place in (first, second, third):
        place.save(record())
        path = place.weights_path(key) if place is third else place.half_weights_path(key)
        path.parent.mkdir()
        path.write_bytes(place.folder.name.encode())
    store.adopt(key, [first, second])
    assert (store.trained(), store.trained_path(key)) == ([key], store.half_weights_path(key))
    assert store.trained_path(key).read_bytes() == b"first"
    store.record_path(key).unlink()
    store.adopt(key, [first, third])
    assert (store.trained(), store.trained_path(key)) == ([key], store.weights_path(key))
    assert store.trained_path(key).read_bytes() == b"third"
    store.weights_path(key).unlink()
    store.half_weights_path(key).unlink()
    assert (store.trained(), store.trained_path(key)) == ([], None)


def test_bytes_that_are_no_text_and_folders_are_named_too(store):
    path = store.save(record())
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    with pytest.raises(RecordError, match=f"{path} cannot be read"):
        store.load(path.stem)
    store.put_aside(path.stem)
    path.mkdir()
    with pytest.raises(RecordError, match=f"{path} cannot be read"):
        store.load(path.stem)
    assert store.put_aside(path.stem).is_dir()


def test_the_sweep_moves_every_unusable_record_aside_and_says_so(store, capsys):
    specs = [RunSpec(seed=seed) for seed in range(3)]
    paths = [store.save(record(spec)) for spec in specs]
    paths[0].write_bytes(b"\xff\xfe")
    paths[1].write_text(paths[1].read_text().replace('"spec":{', '"spec":5,"was":{'))
    sweep.put_aside_unusable(store)
    assert store.recorded() == [paths[2].stem]
    assert pending(specs, store) == specs[:2]
    error = capsys.readouterr().err
    assert str(paths[0]) in error
    assert str(paths[1]) in error


def test_putting_aside_twice_keeps_both(store):
    for _ in range(2):
        store.save(record())
        store.put_aside(specs_of.key(SPEC))
    assert len(list((store.folder / "aside").iterdir())) == 2


def test_pending_takes_failed_and_stale_records_as_absent(store, tmp_path):
    specs = [RunSpec(seed=seed) for seed in range(5)]
    store.save(record(specs[0]))
    store.save(record(specs[1], "diverged"))
    store.save(record(specs[2], "failed"))
    store.save(record(specs[3], numerics=NUMERICS - 1))
    assert pending(specs, store) == specs[2:]
    elsewhere = Store(tmp_path / "known")
    elsewhere.save(record(specs[4]))
    assert pending(specs, store, [elsewhere]) == specs[2:4]


def test_frame_shows_each_state_and_measures_beside_their_model(store):
    arm = Arm("sam", "cell", SPEC, (0, 1, 2, 3), (measure("lambda_max"), measure("adversarial_sharpness", rho=0.1)))
    members = arm.specs
    final = {"last": {"epoch": 9, "test_loss": 0.5}, "best_validation": {"epoch": 4, "test_loss": 0.4}}
    store.save(record(members[0], final=final, perturbation={"cosine": 1.0}))
    store.save(record(arm.measures_of(members[0])[0], measures={"lambda_max": 7.0, "iterations": 12}))
    store.save(record(members[1], "diverged"))
    store.save(record(members[2], numerics=NUMERICS + 1))
    frame = store.frame([arm]).set_index("seed")
    assert list(frame["status"]) == ["done", "diverged", "stale", "missing"]
    assert frame.loc[0, ["test_loss", "test_loss@best_validation", "epoch@best_validation"]].tolist() == [0.5, 0.4, 4]
    assert frame.loc[0, "lambda_max"] == 7.0
    assert frame.loc[0, "lambda_max:iterations"] == 12
    assert math.isnan(frame.loc[0, "adversarial_sharpness@rho=0.1"])
    assert frame.loc[0, "perturbation_cosine"] == 1.0
    assert frame["optim.rho"].tolist() == [0.1] * 4
    assert frame["cell"].unique().tolist() == ["cell"]


def test_a_frame_counts_the_measures_of_half_precision_weights(store):
    arm = Arm("sam", "cell", SPEC, (0, 1), (measure("lambda_max"), measure("adversarial_sharpness")))
    for member in arm.specs:
        store.save(record(member))
        for spec, environment in zip(arm.measures_of(member), ({"weights": "half"}, {}), strict=True):
            store.save(record(spec, environment=environment if member.seed else {}))
    path = ConnectSpec(*map(specs_of.key, arm.specs))
    store.save(record(path, environment={"weights": "half"}))
    assert store.frame([arm])["half_weights"].tolist() == [0, 1]
    assert store.frame([Arm("path", "cell", path, (0,))])["half_weights"].tolist() == [1]
    store.save(record(arm.measures_of(arm.specs[1])[0], numerics=NUMERICS - 1, environment={"weights": "half"}))
    assert store.frame([arm])["half_weights"].tolist() == [0, 0]  # not a number that counts


def test_curves_that_an_arm_asks_for_are_columns_of_its_frame(store):
    arm = Arm("sam", "cell", SPEC, (0, 1, 2), curves=("running_loss", "test_loss"))
    history = {"epoch": [10, 20.0], "running_loss": [1.0, 0.5], "train_loss": [2.0, 1.5]}  # no test_loss in it
    for member in arm.specs[:2]:
        store.save(record(member, history=history))
    frame = store.frame([arm]).set_index("seed")
    assert [name for name in frame if "@epoch=" in name] == ["running_loss@epoch=10", "running_loss@epoch=20"]
    assert frame["running_loss@epoch=20"].tolist() == [0.5, 0.5, pytest.approx(math.nan, nan_ok=True)]
    assert not [name for name in store.frame([dataclasses.replace(arm, curves=())]) if "@epoch=" in name]
    assert "running_loss@epoch=20" not in store.frame([dataclasses.replace(arm, seeds=(2,))])  # nothing has run


def test_frames_of_nothing_have_their_columns(store):
    assert {"cell", "role", "seed", "status"} <= set(store.frame([]).columns)
    assert {"cell", "role", "seed", "epoch"} <= set(store.history([]).columns)


def test_history_is_long(store):
    arm = Arm("sam", "cell", SPEC, (0, 1, 2))
    for member in arm.specs[:2]:
        store.save(record(member, history={"epoch": [1, 2], "test_loss": [1.0, 0.5]}))
    history = store.history([arm])
    assert len(history) == 4
    assert history["seed"].tolist() == [0, 0, 1, 1]


def test_history_holds_only_runs_that_are_done_and_not_stale(store):
    arm = Arm("sam", "cell", SPEC, (0, 1, 2, 3))
    history = {"epoch": [1, 2], "test_loss": [1.0, 0.5]}
    store.save(record(arm.specs[0], "diverged", history=history))
    store.save(record(arm.specs[1], "failed", history=history))
    store.save(record(arm.specs[2], numerics=NUMERICS - 1, history=history))
    assert store.history([arm]).empty
    store.save(record(arm.specs[3], history=history))
    assert store.history([arm])["seed"].tolist() == [3, 3]
    frame = store.frame([arm])
    assert set(store.history([arm])["seed"]) == set(frame.loc[frame["status"] == "done", "seed"])


def test_parent_of_a_measure(store):
    found = Arm("sam", "cell", SPEC, (0,), (measure("lambda_max"),))
    spec = found.measures_of(found.specs[0])[0]
    with pytest.raises(InputError, match="has no record"):
        parent_spec(store, spec)
    store.save(record())
    assert parent_spec(store, spec) == SPEC


@pytest.mark.parametrize("name", ["./results", "results/", str(project_root() / "results")])
def test_committed_records_are_read_only_under_any_name(name, monkeypatch):
    monkeypatch.chdir(project_root())
    assert not open_store("quick", name).writable


def test_committed_records_are_read_only():
    with pytest.raises(InputError, match="read-only"):
        open_store("quick", "results").check_writable()


def test_a_store_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*name another folder"):
        Store(tmp_path / "file" / "quick", writable=True).check_writable()


@pytest.mark.parametrize("profile", ["fast", "", "Quick"])
def test_unknown_profile(profile):
    with pytest.raises(InputError, match="quick, gpu, paper"):
        open_store(profile)


@pytest.mark.parametrize("store", ["resuls", "result", "run", "Results", "mine", ".", "", Path("mine"), Path("./mine")])
def test_a_word_that_is_no_store_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        open_store("quick", store)
    for word in (f"store = {str(store)!r}", "results, runs, or a folder written with a separator such as ./mine"):
        assert word in str(error.value)
    assert ("as text" in str(error.value)) == isinstance(store, Path)


def test_a_mistyped_store_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="store = 'result'"):
        study.open_study("sam_by_hand", store_name="result")
    assert cli.main(["verdicts", "--store", "resuls"]) == 2
    assert "store = 'resuls'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("./mine", "mine/", "~/mine", Path("~/mine"), tmp_path / "mine", str(tmp_path / "mine")):
        store = open_store("quick", folder)
        assert store.writable
        assert store.folder.resolve() == tmp_path / "mine" / "quick"
    assert open_store("quick", Path("a/b")).folder == Path("a/b/quick")


def test_the_root_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    assert project_root() == tmp_path
    assert open_store("quick", "runs").folder == tmp_path / "runs" / "quick"


def test_publishing_takes_a_complete_run_of_committed_code_and_nothing_else(store, tmp_path):
    target = Store(tmp_path / "results")
    specs = [RunSpec(seed=seed) for seed in range(3)]
    target.save(record(RunSpec(seed=9)))
    for spec in specs[:2]:
        store.save(record(spec, environment={"dirty": False}))
    with pytest.raises(InputError, match="lacks 1 finished runs of 3"):
        publish(specs, store, target)
    store.save(record(specs[2], environment={"dirty": True}))
    with pytest.raises(InputError, match="differs from its commit"):
        publish(specs, store, target)
    assert target.recorded() == [specs_of.key(RunSpec(seed=9))]
    store.save(record(specs[2], environment={"dirty": False}))
    assert publish(specs, store, target) == 3
    assert target.recorded() == sorted(specs_of.key(spec) for spec in specs)


def test_publishing_keeps_what_may_be_absent_and_is_there_already(store, tmp_path):
    target, specs = Store(tmp_path / "results"), [RunSpec(seed=seed) for seed in range(3)]
    store.save(record(specs[0], environment={"dirty": False}))
    kept = [specs_of.key(spec) for spec in specs[1:]]
    target.save(record(specs[1], environment={"dirty": False}))
    with pytest.raises(InputError, match="lacks 1 finished runs of 3"):
        publish(specs, store, target, kept)
    target.save(record(specs[2], environment={"dirty": False}))
    assert publish(specs, store, target, kept) == 3


def test_files_are_readable_by_others(store):
    mode = stat.S_IMODE(os.stat(store.save(record())).st_mode)
    assert mode & stat.S_IRUSR
    assert json.loads(store.record_path(specs_of.key(SPEC)).read_text())["key"] == specs_of.key(SPEC)


def test_reading_records_needs_no_torch():
    modules = "samlib.store, samlib.stats, samlib.claims, samlib.plots, samlib.published, samlib.study, samlib.sweep"
    code = f"import sys, {modules}, samlib.export, samlib.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
