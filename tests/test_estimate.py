"""How long runs take: the counting, what is believed before what, the plan, and a probe of this machine."""

import math
import statistics
from collections import defaultdict
from dataclasses import replace

import pytest

from samlib import estimate, experiments, probe
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.estimate import ONE_CORE, ONE_GPU, Speed, modelled
from samlib.experiments import Arm, measure
from samlib.spec import CheckSpec, DataSpec, MeasureSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.store import NUMERICS, Record, Store, open_store

SGD = RunSpec(DataSpec(train_size=48), ModelSpec(width=4), OptimSpec("sgd"), TrainSpec(epochs=2, batch_size=16))
SAM = specs_of.override(SGD, {"method": "sam"})


def record(spec, seconds, device="this one", status="done", **fields):
    return Record(
        specs_of.key(spec),
        specs_of.canonical(spec),
        status,
        wall_seconds=seconds,
        environment={"device": device},
        **fields,
    )


def a_probe(spec, images_per_second, device="this one"):
    return {
        "device": device,
        "spec": specs_of.canonical(spec),
        "images_per_second": images_per_second,
        "finished": "2026-01-01",
    }


# ------------------------------------------------------------------------------------------------ the cost model


def test_steps_are_those_of_the_data_the_batches_and_the_updates():
    assert estimate.steps(SGD) == 6
    assert estimate.steps(specs_of.override(SGD, {"batch_size": 20})) == 4
    assert estimate.steps(specs_of.override(SGD, {"batch_size": 20, "drop_last": False})) == 6
    assert estimate.steps(specs_of.override(SGD, {"updates": 5})) == 5
    cifar = RunSpec(DataSpec("cifar10", validation_size=5000), ModelSpec("resnet20"), train=TrainSpec(epochs=1))
    assert estimate.steps(cifar) == 45_000 // 128


def test_an_ascent_is_a_second_pass_and_a_shard_two_more():
    """On a machine on which images cost nothing passes are counted, on one without latency images are."""
    passes = estimate.Machine(latency=1.0, speed=math.inf)
    images = estimate.Machine(latency=0.0, speed=3e6 * estimate.MEGAMACS["cnn"])
    for method, changes, expected in [
        ("sgd", {}, (6, 96)),
        ("average_sam", {}, (6, 96)),
        ("sam", {}, (12, 192)),
        ("asam", {"num_shards": 4}, (48, 192)),
        ("sam", {"shard_size": 4}, (48, 192)),
        ("sam", {"ascent_from": 0.25}, (10.5, 168)),
        ("sam", {"ascent_until": 0.5, "num_shards": 2}, (15, 144)),
    ]:
        run = specs_of.override(SGD, {"method": method, **changes})
        assert (estimate.training(run, passes), estimate.training(run, images)) == pytest.approx(expected)


def test_evaluations_are_counted_as_often_as_they_are_made():
    images = estimate.Machine(latency=0.0, speed=3e6 * estimate.MEGAMACS["cnn"] * estimate.FORWARD)
    run = specs_of.override(SGD, {"epochs": 7, "validation_size": 10})
    for changes, expected in [
        ({}, 7 * (797 + 10 + 48)),
        ({"eval_every": 7}, 797 + 10 + 48),
        ({"eval_every": 2}, 4 * (797 + 10 + 48)),
        ({"eval_every": 2, "eval_train_every": 3}, 4 * (797 + 10) + 2 * 48),
    ]:
        assert estimate.evaluations(specs_of.override(run, changes), images) == pytest.approx(expected)


def test_the_model_is_near_what_the_committed_records_took_on_one_core():
    """Kind by kind the median within a factor of four, and the sum of all within one of two, whatever core it was."""
    records = [record for record in open_store("quick").records() if record.spec["kind"] != "check"]
    speed, ratios, sums = Speed(), defaultdict(list), [0.0, 0.0]
    speed.know(specs_of.from_canonical(record.spec) for record in records)
    for found in records:
        spec = specs_of.from_canonical(found.spec)
        run = speed.run_of(spec) or spec
        seconds = modelled(spec, run)
        kind = spec.optim.method if isinstance(spec, RunSpec) else getattr(spec, "measure", "path")
        ratios[kind, run.model.name].append(found.wall_seconds / seconds)
        sums = [sums[0] + seconds, sums[1] + found.wall_seconds]
    medians = {kind: statistics.median(found) for kind, found in ratios.items()}
    assert len(medians) >= 10
    assert {kind: ratio for kind, ratio in medians.items() if not 0.25 < ratio < 4} == {}
    assert 0.5 < sums[0] / sums[1] < 2


def test_every_network_has_a_cost():
    options = specs_of.ModelSpec.__dataclass_fields__["name"].metadata["options"]
    assert set(estimate.MEGAMACS) == set(options)


# ------------------------------------------------------------------------------------------------ what was measured


def test_a_record_of_the_same_setting_comes_first_then_a_probe_then_the_network_then_the_model():
    speed = Speed("this one")
    other_seed = replace(SAM, seed=5)
    assert speed.estimate(SAM) == estimate.Estimate(modelled(SAM), "the cost model")
    speed.learn(record(SGD, 4 * modelled(SGD)))
    assert speed.estimate(SAM).source == "records of the network"
    assert speed.estimate(SAM).seconds == pytest.approx(4 * modelled(SAM))
    speed.learn_probe(a_probe(other_seed, 96 / (10 * estimate.training(SAM, ONE_CORE))))
    assert speed.estimate(SAM).source == "a probe"
    assert speed.estimate(SAM).seconds == pytest.approx(10 * modelled(SAM))
    speed.learn(record(other_seed, 7.0))
    assert speed.estimate(SAM) == estimate.Estimate(pytest.approx(7.0), "records")
    speed.learn(record(replace(SAM, seed=6), 8.0))
    speed.learn(record(replace(SAM, seed=7), 100.0))  # one run beside which the machine did something else
    assert speed.estimate(SAM).seconds == pytest.approx(8.0)
    longer = specs_of.override(
        SAM, {"epochs": 20, "lr": 0.3, "shard_size": 16}
    )  # the same setting at ten times the length
    assert speed.estimate(longer).seconds == pytest.approx(80.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"batch_size": 24},
        {"num_shards": 2},
        {"method": "asam"},
        {"logged_loss": "w+eps"},
        {"model.width": 8},
    ],
)
def test_runs_at_another_speed_are_another_setting(changes):
    speed = Speed("this one")
    speed.learn(record(SAM, 7.0))
    expected = "the cost model" if "model.width" in changes else "records of the network"
    assert speed.estimate(specs_of.override(SAM, changes)).source == expected


def test_every_field_that_leaves_the_speed_as_it_is_is_one_of_a_spec():
    assert set(specs_of.flat(RunSpec())) >= estimate.SAME_SPEED


def test_what_is_measured_is_known_by_its_kind_and_the_network_of_its_run():
    speed = Speed("this one")
    speed.know([SGD, SAM])
    taken, expected = (measure("lambda_max", split="test"), 3.0)
    first, second = (replace(taken, parent=specs_of.key(run)) for run in (SGD, SAM))
    assert speed.estimate(second).source == "the cost model"
    speed.learn(record(SGD, 5 * modelled(SGD)))
    assert speed.estimate(second).seconds == pytest.approx(5 * modelled(second, SAM))
    speed.learn(record(first, expected))
    assert speed.estimate(second) == estimate.Estimate(pytest.approx(expected), "records")
    assert speed.estimate(replace(second, split="train")).source == "records of the network"


def test_other_devices_older_code_and_runs_that_did_not_end_say_nothing():
    speed = Speed("this one")
    speed.learn(record(SAM, 7.0, device="another"))
    speed.learn(record(SAM, 7.0, status="diverged"))
    speed.learn(record(SAM, 7.0, status="failed"))
    speed.learn(record(SAM, 7.0, numerics=NUMERICS - 1))
    speed.learn_probe(a_probe(SAM, 1.0, device="another"))
    assert speed.estimate(SAM).source == "the cost model"


def test_stores_are_read_as_far_as_they_can_be(tmp_path):
    store = Store(tmp_path, writable=True)
    store.save(record(SAM, 7.0))
    store.save(record(SGD, 7.0)).write_text("{")
    store.probe_path.write_text("[")
    speed = Speed("this one")
    speed.learn_stores([store])
    assert speed.estimate(SAM).source == "records"


def test_without_a_gpu_a_plan_is_for_the_one_used_last(tmp_path):
    store = Store(tmp_path, writable=True)
    assert estimate.elsewhere([store]).device is None
    store.save(record(SAM, 7.0, device="older", finished="2026-01-01T00:00:00+00:00"))
    store.save(record(SGD, 3.0, device="newer", finished="2026-01-02T00:00:00+00:00"))
    speed = estimate.elsewhere([store])
    assert (speed.device, speed.machine) == ("newer", ONE_GPU)
    assert (speed.estimate(SGD).source, speed.estimate(SAM).source) == ("records", "records of the network")


@pytest.mark.parametrize(("text", "seconds"), [("9m", 540), ("90s", 90), ("1h30m", 5400), ("1h0m5s", 3605)])
def test_a_time_limit(text, seconds):
    assert estimate.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "0m", "-9m", "9 m", "9m1h", "1.5h", "nine", "9m9m", "inf"])
def test_a_bad_time_limit(text):
    with pytest.raises(InputError, match=f"time-limit = {text!r}.*1h30m"):
        estimate.duration(text)


# ------------------------------------------------------------------------------------------------ the plan

ARMS = [
    ("sam_vs_sgd", Arm("sgd", "plain", SGD, (0, 1), (measure("lambda_max"),))),
    ("sam_vs_sgd", Arm("sam", "clean", SAM, (0, 1), priority=2)),
]


def planned(limit=math.inf, trained=(), only=None):
    """The plan where every training takes 10 seconds, and a measure 3."""
    todo = experiments.in_order_of_worth([arm for _, arm in ARMS])
    speed = Speed("this one")
    speed.know(todo)
    for spec in (SGD, SAM):
        speed.learn(record(spec, 10.0))
    speed.learn(record(ARMS[0][1].measures_of(SGD)[0], 3.0))
    chosen = todo if only is None else [spec for spec in todo if isinstance(spec, only)]
    return estimate.plan(ARMS, chosen, speed, trained, limit)


def test_the_plan_counts_and_adds_up_what_is_pending_of_each_arm():
    first, second = planned()
    assert (first.arm.role, first.runs, first.sources) == ("sgd", 4, ("records",))
    assert (first.seconds, first.ends, second.seconds, second.ends) == pytest.approx((26, 26, 20, 46))


def test_a_row_knows_which_claims_its_arm_decides(monkeypatch):
    bound = {"one": {"quick": ("plain",)}, "two": {"quick": ("clean", "plain")}, "three": {"gpu": ("plain",)}}
    monkeypatch.setattr("samlib.experiments.sam_vs_sgd.DECIDES", bound)
    row = estimate.Row(*ARMS[0])
    assert (row.claims("quick"), row.claims("gpu"), row.claims("paper")) == (["one", "two"], ["three"], [])
    assert replace(row, arm=replace(row.arm, tuning=True)).claims("quick") == []


@pytest.mark.parametrize(
    ("limit", "fit"), [(46.5, [4, 2]), (45.9, [4, 1]), (13.5, [2, 0]), (12.9, [1, 0]), (5, [0, 0]), (27, [4, 0])]
)
def test_the_plan_ends_with_the_training_that_the_limit_cuts(limit, fit):
    assert [row.fit for row in planned(limit)] == fit


def test_what_is_measured_of_a_run_without_weights_trains_it_again():
    (row,) = planned(only=MeasureSpec)
    assert row.seconds == pytest.approx(26)
    (row,) = planned(only=MeasureSpec, trained=[specs_of.key(SGD)])
    assert row.seconds == pytest.approx(16)


def test_the_report_of_a_plan():
    text = estimate.report(planned(27), "quick", 27)
    for words in (
        "sam_vs_sgd / plain / sgd (priority 1): 4 runs, 4 of them in the time",
        "0.43 min by records, complete after 0.43 min",
        "decides coldenhoff-a-sam-beats-sgd-per-seed, coldenhoff-a-equal-gradient-budget",
        "6 runs pending, 0.77 min in all; 4 of them fit into 0.45 min",
    ):
        assert words in text
    assert "time" not in estimate.report(planned(), "quick")


# ------------------------------------------------------------------------------------------------ the probe


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "quick", writable=True)


HYBRID = specs_of.override(SGD, {"method": "sam", "num_shards": 2, "ascent_from": 0.5, "updates": 5})
PROBED = [SGD, SAM, replace(SAM, seed=3), HYBRID, MeasureSpec(specs_of.key(SGD)), CheckSpec("dual_norm")]


def test_a_probe_measures_each_setting_once_and_estimates_believe_it(store, monkeypatch):
    monkeypatch.setattr(probe, "SETTING_SECONDS", 0.1)
    lines = list(probe.probe(PROBED, store, "cpu"))
    assert [line.split(",")[:2] for line in lines] == [["cnn", " sgd"], ["cnn", " sam"], ["cnn", " sam in 2 shards"]]
    assert all(line.endswith("images per second") for line in lines)
    speed = probe.speed("cpu", [store])
    assert {speed.estimate(spec).source for spec in PROBED[:4]} == {"a probe"}
    found = {specs_of.from_canonical(entry["spec"]).optim.method: entry for entry in store.probes()[:2]}
    trained = speed.estimate(SGD).seconds / modelled(SGD) * estimate.training(SGD, ONE_CORE)
    assert found["sgd"]["images_per_second"] * trained == pytest.approx(96)
    assert store.recorded() == []


def test_a_second_probe_takes_the_place_of_the_first_but_not_of_another_machines(store):
    store.save_probes([a_probe(SGD, 1e-3, "another"), a_probe(HYBRID, 1.0)])
    for _ in range(2):
        list(probe.probe([SGD], store, "cpu", 0.1))
    devices = [entry["device"] for entry in store.probes()]
    assert len(devices) == 3
    assert devices[:2] == ["another", "this one"]


def test_a_probe_stops_in_time_and_says_what_it_left_out(store):
    lines = list(probe.probe([SGD, SAM], store, "cpu", 0.0))
    assert all("not measured, the time is over" in line for line in lines)
    assert store.probes() == []


def test_a_network_that_does_not_fit_is_left_out_and_the_others_are_measured(store, monkeypatch):
    take = probe.train.Training.take

    def fail(self, indices):
        if self.spec.optim.method == "sgd":
            raise RuntimeError("CUDA out of memory.\nTried to allocate")
        take(self, indices)

    monkeypatch.setattr(probe.train.Training, "take", fail)
    monkeypatch.setattr(probe, "SETTING_SECONDS", 0.1)
    lines = list(probe.probe([SGD, SAM], store, "cpu"))
    assert lines[0].endswith("not measured, CUDA out of memory.")
    assert len(store.probes()) == 1
