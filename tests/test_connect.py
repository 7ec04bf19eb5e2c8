"""Specs of paths between two runs: identity, the run that makes their record, and the arms that declare them."""

import dataclasses
import json
import math

import pytest
import torch

from samlib import __main__ as cli
from samlib import compare, data, estimate, experiments, sweep, train
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import Arm, Pair, path
from samlib.measures import connectivity
from samlib.spec import BARRIERS, ConnectSpec, DataSpec, ModelSpec, OptimSpec, PathSpec, RunSpec, TrainSpec
from samlib.store import Store

SGD = RunSpec(DataSpec(train_size=64), ModelSpec("mlp", width=16), OptimSpec(), TrainSpec(epochs=4, batch_size=16))
SAM = specs_of.override(SGD, {"method": "sam", "rho": 0.1})
CPU = torch.device("cpu")
SETTINGS = {"steps": 20, "batch_size": 16, "lr": 0.1, "points": 5}
BEND = Pair("sam_to_sgd", "bend", path(**SETTINGS), (0, 1), start=Arm("sam", "", SAM, ()), end=Arm("sgd", "", SGD, ()))


def other(**settings):
    return dataclasses.replace(BEND, base=path(**SETTINGS | settings))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The records of two bends with the four runs they join."""
    found = Store(tmp_path_factory.mktemp("store") / "quick", writable=True)
    assert sweep.run_all(experiments.specs([BEND]), found, workers=1, device="cpu").failed == []
    return found


def run(store, pair):
    return train.run(pair.specs[0], store, "cpu")


def model(store, spec):
    splits = data.load(spec.data, specs_of.split_seed(spec))
    return train.trained_model(spec, store, splits, CPU)


# ---------------------------------------------------------------------------------------------- identity


def test_defaults_and_keys_are_pinned():
    spec = ConnectSpec("0" * 16, "1" * 16)
    assert specs_of.flat(spec) == {
        "start": "0" * 16,
        "end": "1" * 16,
        "path.shape": "bend",
        "path.steps": 400,
        "path.batch_size": 64,
        "path.lr": 0.02,
        "path.momentum": 0.9,
        "path.weight_decay": 0.0005,
        "path.points": 13,
        "path.grid": None,
        "path.test_labels": "true",
        "path.end": "trained",
        "seed": 0,
    }
    assert specs_of.canonical(spec) == {"kind": "connect", "start": "0" * 16, "end": "1" * 16}
    assert specs_of.key(spec) == "1cdf02fdc5c3cbfd"
    assert specs_of.parents(spec) == ("0" * 16, "1" * 16)
    assert set(specs_of.documentation(ConnectSpec)) == set(specs_of.flat(spec))


def test_canonical_round_trip():
    spec = ConnectSpec("0" * 16, "1" * 16, PathSpec(grid=5, end="random", test_labels="shifted"), 3)
    assert specs_of.from_canonical(json.loads(json.dumps(specs_of.canonical(spec)))) == spec


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConnectSpec("abc", "0" * 16), ["connect.start", "abc", "16 hex"]),
        (lambda: ConnectSpec("0" * 16, "abc"), ["connect.end", "abc"]),
        (lambda: ConnectSpec("0" * 16, "0" * 16, seed=-1), ["seed", "-1"]),
        (lambda: PathSpec("curve"), ["path.shape", "curve", "bend, line"]),
        (lambda: PathSpec(points=2), ["path.points", "2", "3 or more"]),
        (lambda: PathSpec("line", grid=5), ["path.grid", "5", "bend"]),
        (lambda: PathSpec(end="none"), ["path.end", "none", "random"]),
        (lambda: RunSpec(split_seed=-1), ["split_seed", "-1"]),
    ],
)
def test_bad_values_name_the_field_the_value_and_the_remedy(make, words):
    with pytest.raises(InputError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_a_second_run_has_the_images_of_the_first_and_nothing_else_of_it():
    first = dataclasses.replace(SGD, seed=3)
    second = specs_of.second_run(first)
    assert (second.seed, second.split_seed) == (1003, 3)
    noisy = [dataclasses.replace(run, data=DataSpec(train_size=64, label_noise=0.4)) for run in (first, second)]
    one, two = (train.load_splits(run, CPU) for run in noisy)
    assert torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(one.train.labels, two.train.labels)
    unlike = train.load_splits(dataclasses.replace(noisy[1], split_seed=None), CPU)
    assert not torch.equal(one.train.inputs, unlike.train.inputs)
    weights = [connectivity.weights_of(train.build_model(run, one, CPU)) for run in (first, second)]
    assert not any(torch.equal(a, b) for a, b in zip(*weights, strict=True) if a.ndim > 1)


def test_a_split_seed_that_is_the_seed_gives_the_numbers_of_none(tmp_path):
    store = Store(tmp_path, writable=True)
    one, two = (train.run(spec, store, "cpu") for spec in (SGD, dataclasses.replace(SGD, split_seed=0)))
    assert one.key != two.key
    assert (one.history, one.final) == (two.history, two.final)


# ---------------------------------------------------------------------------------------------- records


def test_the_ends_of_a_path_are_the_two_models(store):
    """Loss and error at t = 0 and t = 1 are those of the trained models with statistics of all training images."""
    for member, runs in zip(BEND.specs, BEND.ends, strict=True):
        record = store.load(specs_of.key(member))
        splits = train.load_splits(runs[0], CPU)
        for index, spec in ((0, runs[0]), (-1, runs[1])):
            net = model(store, spec)
            found = connectivity.losses(
                net, connectivity.weights_of(net), *(train._tensors(s) for s in (splits.train, splits.test))
            )
            for name, value in found.items():
                assert record.table[name][index] == pytest.approx(value, rel=1e-6)


def test_a_record_holds_the_path_and_its_barriers(store):
    record = store.load(specs_of.key(BEND.specs[0]))
    assert record.status == "done"
    assert list(record.table) == ["t", "train_loss", "train_error_pct", "test_loss", "test_error_pct"]
    assert record.table["t"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert list(record.measures) == list(BARRIERS) == list(BEND.base.values)
    for name in BARRIERS:
        column = record.table[name.replace("_barrier", "")]
        assert record.measures[name] == pytest.approx(max(column[1:-1]) - max(column[0], column[-1]), abs=1e-5)


def test_the_straight_line_shares_the_ends_and_lies_higher(store):
    bend, line = store.load(specs_of.key(BEND.specs[0])), run(store, other(shape="line"))
    for name in bend.table:
        assert [line.table[name][i] for i in (0, -1)] == pytest.approx([bend.table[name][i] for i in (0, -1)], rel=1e-6)
    assert line.measures["train_loss_barrier"] > bend.measures["train_loss_barrier"]


def test_shifted_labels_move_the_test_columns_alone_and_to_chance(store):
    true, shifted = store.load(specs_of.key(BEND.specs[0])), run(store, other(test_labels="shifted"))
    for name in ("t", "train_loss", "train_error_pct"):
        assert shifted.table[name] == pytest.approx(true.table[name], rel=1e-6)
    assert max(true.table["test_error_pct"]) < 70
    assert all(85 < error < 95 for error in shifted.table["test_error_pct"])


def test_a_random_end_is_an_untrained_network(store):
    found = run(store, other(end="random", weight_decay=0.0))
    true = store.load(specs_of.key(BEND.specs[0]))
    assert found.table["train_loss"][0] == pytest.approx(true.table["train_loss"][0], rel=1e-6)
    assert abs(found.table["train_loss"][-1] - math.log(10)) < 0.5
    assert found.table["train_error_pct"][-1] > 75


def test_the_bend_of_a_random_end_begins_at_the_second_model(store):
    """With a step of no length it is still there, halfway."""
    found = run(store, other(end="random", lr=1e-12, steps=1, points=3))
    true = store.load(specs_of.key(BEND.specs[0]))
    for name in ("train_loss", "test_error_pct"):
        assert found.table[name][1] == pytest.approx(true.table[name][-1], rel=1e-5)


def test_a_grid_is_the_plane_of_the_same_chain(store):
    spec = other(grid=7).specs[0]
    found = train.run(spec, store, "cpu")
    assert list(found.measures) == ["end_x", "bend_x", "bend_y"] == list(spec.values)
    assert list(found.table) == ["x", "y", "train_loss", "test_loss"]
    assert {len(column) for column in found.table.values()} == {49}
    ends = [connectivity.weights_of(model(store, runs)) for runs in BEND.ends[0]]
    assert found.measures["end_x"] == pytest.approx(connectivity.distance(*ends), rel=1e-6)
    assert len(store.record_path(found.key).read_text()) < 30_000


def test_a_bend_that_diverges_is_a_diverged_record(store):
    for settings in ({}, {"grid": 3}):
        found = run(store, other(lr=1e30, weight_decay=1e30, **settings))
        assert found.status == "diverged"


def test_a_path_to_a_run_that_diverged_is_a_diverged_record(tmp_path):
    wild = specs_of.override(SGD, {"lr": 1e6, "norm": "none", "momentum": 0.99, "schedule": "constant"})
    pair = dataclasses.replace(BEND, start=Arm("", "", wild, ()), end=Arm("", "", wild, ()), seeds=(0,))
    store = Store(tmp_path, writable=True)
    sweep.run_all(experiments.specs([pair]), store, workers=1, device="cpu")
    assert store.load(specs_of.key(pair.ends[0][0])).status == "diverged"
    assert store.load(specs_of.key(pair.specs[0])).status == "diverged"


def test_a_path_is_trained_again_to_the_same_numbers_where_weights_are_gone(store):
    spec = BEND.specs[1]
    before = store.load(specs_of.key(spec))
    for parent in specs_of.parents(spec):
        store.weights_path(parent).unlink()
    again = train.run(spec, store, "cpu")
    assert again.table == {name: pytest.approx(column, rel=1e-6) for name, column in before.table.items()}


def test_unlike_ends_are_refused(store, tmp_path):
    first, second = BEND.ends[0][0], BEND.ends[1][1]
    with pytest.raises(InputError, match="other images than"):
        train.run(ConnectSpec(specs_of.key(first), specs_of.key(second)), store, "cpu")
    wide = dataclasses.replace(SGD, model=ModelSpec("mlp", width=8))
    train.run(wide, store, "cpu")
    with pytest.raises(InputError, match="other networks than"):
        train.run(ConnectSpec(specs_of.key(first), specs_of.key(wide)), store, "cpu")
    with pytest.raises(InputError, match=r"connect.start = .* has no record"):
        train.run(BEND.specs[0], Store(tmp_path, writable=True), "cpu")
    with pytest.raises(InputError, match=r"connect.end = .* is no training run"):
        train.run(ConnectSpec(specs_of.key(first), specs_of.key(BEND.specs[0])), store, "cpu")


# ---------------------------------------------------------------------------------------------- sweeps and the store


def test_worker_processes_give_the_numbers_of_this_process(store, tmp_path):
    """Handed over paths first: they wait for their runs."""
    pool = Store(tmp_path, writable=True)
    found = sweep.run_all([*BEND.specs, *BEND.parents], pool, workers=2, device="cpu")
    assert (found.done, found.failed) == (6, [])
    for spec in BEND.specs:
        one, two = (place.load(specs_of.key(spec)) for place in (store, pool))
        assert (one.measures, one.table) == (two.measures, two.table)
    paths = (BEND.specs[0], other(shape="line").specs[0], other(grid=3).specs[0])
    assert all(estimate.modelled(spec, BEND.parents[0]) > 0 for spec in paths)


def test_a_frame_has_a_row_and_a_table_for_each_member(store):
    frame = store.frame([BEND, dataclasses.replace(BEND, cell="absent", seeds=(7,))])
    assert frame["status"].tolist() == ["done", "done", "missing"]
    assert frame["seed"].tolist() == [0, 1, 7]
    assert frame["path.shape"].tolist() == ["bend"] * 3
    assert frame[list(BARRIERS)].isna().all(axis=1).tolist() == [False, False, True]
    table = store.tables([BEND])
    assert len(table) == 10
    assert set(table["seed"]) == {0, 1}


def test_verify_and_show_know_paths(store, monkeypatch, capsys):
    folder = str(store.folder.parent) + "/"
    key = specs_of.key(BEND.specs[0])
    assert cli.main(["show", key, "--store", folder]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["kind"] == "connect"
    assert cli.main(["verify", key, "--store", folder, "--device", "cpu"]) == 0
    assert f"{key}: identical" in capsys.readouterr().out


def test_run_only_brings_along_both_runs_of_a_path(monkeypatch):
    monkeypatch.setattr("samlib.experiments.sam_vs_sgd.arms", lambda profile: (BEND,))
    key = specs_of.key(BEND.specs[0])
    assert set(cli.chosen_specs("quick", ["sam_vs_sgd"], [key])) == {BEND.specs[0], *BEND.ends[0]}


def test_barriers_are_compared_and_planes_are_not(store):
    compared = {setting.metric: setting for setting in compare.compare_arm("stem", BEND, store, store)}
    assert list(compared) == list(BARRIERS)
    assert all(setting.agrees and setting.tolerance > 0.01 for setting in compared.values())
    assert compare.compared_metrics(other(grid=3)) == ()


# ---------------------------------------------------------------------------------------------- the arms


def test_a_pair_joins_seed_by_seed_and_brings_its_runs_along():
    for seed, spec, (start, end) in zip((0, 1), BEND.specs, BEND.ends, strict=True):
        assert (start, end) == (
            dataclasses.replace(SAM, seed=seed),
            dataclasses.replace(SGD, seed=1000 + seed, split_seed=seed),
        )
        assert specs_of.parents(spec) == (specs_of.key(start), specs_of.key(end))
        assert spec.seed == seed
    found = experiments.specs([BEND])
    assert len(found) == 6
    for spec in BEND.specs:
        assert all(found.index(run) < found.index(spec) for runs in BEND.ends[:1] for run in runs)


def test_a_variation_reaches_the_runs_of_a_pair_and_leaves_its_path_alone():
    double = dataclasses.replace(BEND, end=dataclasses.replace(BEND.end, epochs_factor=2.0))
    varied = double.varied((5, 6, 7), {"epochs": 3, "width": 8})
    assert [spec.seed for spec in varied.specs] == [5, 6, 7]
    assert {(s.train.epochs, e.train.epochs, s.model.width, e.model.width) for s, e in varied.ends} == {(3, 6, 8, 8)}
    assert varied.base.path == BEND.base.path
    assert not {specs_of.key(spec) for spec in varied.specs} & {specs_of.key(spec) for spec in double.specs}
    assert double.varied(None, {}) == double
    assert double.varied((0,), {}).specs == double.specs[:1]  # keys of a seed do not depend on the other seeds
