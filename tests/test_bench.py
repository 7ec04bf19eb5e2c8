"""The bench: its statistics, that it times nothing that is not equal, its record and table. No time is asserted."""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import test_fake_cuda as fake_gpu
import torch

from samlib import __main__ as cli
from samlib import closures
from samlib.augment import Augmentation
from samlib.bench import anchor, engine, plan, precision, protocol, run, speed, table, variants
from samlib.bench.networks import NETWORKS, Workload
from samlib.bench.protocol import Built, NotEqualError, Times
from samlib.errors import InputError

CPU = torch.device("cpu")
STEP_CASE = plan.Case("mlp", "MLP-404", 4, plan.STEP, rounds=2)
BOOKKEEPING_CASE = replace(plan.sections("cpu")["bookkeeping"][0], rounds=2)
ENGINE_CASE = plan.Case("engine", "small CNN", 16, plan.ENGINE_STEP, rounds=2, kind="engine")
ANCHOR_CASE = plan.Case("anchor", plan.ANCHOR_NETWORK, 4, plan.ANCHOR_CPU, rounds=2, kind="anchor")


def nothing():
    return {name: [] for name in plan.PARTS}


# ------------------------------------------------------------------------------------------------------- ratios


def test_the_ratio_of_a_known_series():
    reference = np.random.default_rng(0).uniform(1, 50, size=15)  # the load of the machine
    assert protocol.paired_ratio(2 * reference, reference) == (2.0, 2.0, 2.0)


def test_the_interval_is_that_of_the_resampled_median():
    """The median of n draws from x(1) .. x(n) is at most x(k) if (n + 1) / 2 of them are: a binomial tail."""
    n = 21
    at_most = [scipy.stats.binom.sf(n // 2, n, k / n) for k in range(1, n + 1)]
    low, high = (1 + next(k for k, p in enumerate(at_most) if p >= level) for level in (0.025, 0.975))
    ratio = protocol.paired_ratio(np.random.default_rng(1).permutation(np.arange(1, n + 1)), np.ones(n))
    assert ratio == (11, low, high)


def test_the_interval_covers():
    rng = np.random.default_rng(2)
    found = [protocol.paired_ratio(1.3 * rng.lognormal(sigma=0.1, size=15), np.ones(15)) for _ in range(300)]
    assert 0.9 < np.mean([one.low <= 1.3 <= one.high for one in found]) < 0.99


def test_processes_are_merged_by_their_median_and_the_goal_by_their_majority():
    def row(ratio, low, high, **fields):
        base = {"section": "mlp", "network": "MLP-404", "variant": "a", "reference": "b", "rounds": 5, "goal": 1.0}
        return {
            **base,
            "ratio": ratio,
            "low": low,
            "high": high,
            "wall_ratio": ratio,
            "ms": 1,
            "reference_ms": 2,
        } | fields

    one, two, three = row(1.1, 1.05, 1.2), row(0.9, 0.85, 0.95), row(1.3, 1.2, 1.4)
    (merged,) = run.merged([one, two, three])
    assert (merged["ratio"], merged["low"], merged["high"], merged["rounds"]) == (1.1, 0.85, 1.4, 15)
    assert merged["processes"] == [[1.1, 1.05, 1.2], [0.9, 0.85, 0.95], [1.3, 1.2, 1.4]]
    assert merged["met"] is False
    assert run.merged([one, two, row(1.05, 0.99, 1.2)])[0]["met"] is True
    assert run.merged([row(1.05, 0.99, 1.2)])[0]["met"] is True  # the near end of the interval decides
    assert run.merged([row(9, 9, 9, goal=None)])[0]["met"] is None
    assert len(run.merged([one, {**one, "reference": "c"}])) == 2


# ------------------------------------------------------------------------------------------------------- rounds


def recorded(names, calls, on_call=lambda: None):
    """Variants that note their name, and leave a tensor finite."""

    def call(name, stopwatch):
        with stopwatch:
            calls.append(name)
            on_call()

    return {name: Built([torch.zeros(1)], partial(call, name), steps=1) for name in names}


def test_each_round_runs_every_variant_once_in_an_order_of_its_own():
    calls = []
    collecting = []
    built = recorded("abcd", calls, lambda: collecting.append(gc.isenabled()))
    times = protocol.time_rounds(built, 20, seed=0)
    rounds = [tuple(calls[start : start + 4]) for start in range(0, len(calls), 4)]
    assert len(rounds) == 20
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 10
    assert {name: len(series) for name, series in times.items()} == dict.fromkeys("abcd", 20)
    assert not any(collecting)
    assert gc.isenabled()


def test_an_interrupt_keeps_the_rounds_so_far():
    calls = []

    def interrupt():
        if len(calls) == 6:  # two variants: this is the third round
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    times = protocol.time_rounds(recorded("ab", calls, interrupt), 1000, seed=0)
    assert [len(series) for series in times.values()] == [3, 3]
    assert signal.getsignal(signal.SIGINT) is before


def test_weights_that_are_no_longer_finite_are_no_result():
    broken = Built([torch.full((2,), torch.nan)], lambda stopwatch: None, steps=1)
    with pytest.raises(NotEqualError, match=r"ours: .*finite"):
        protocol.time_rounds({"ours": broken}, 2, seed=0)


def test_the_stopwatch_counts_what_is_inside_and_the_time_is_that_of_one_step(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.process_time", lambda: next(now))
    monkeypatch.setattr("time.perf_counter", lambda: 0)

    def twice(stopwatch):
        with stopwatch:
            pass
        next(now)  # outside
        with stopwatch:
            pass

    assert protocol.timed(Built([torch.zeros(1)], twice, steps=1)) == Times(20, 0)
    assert protocol.timed(Built([torch.zeros(1)], twice, steps=4)) == Times(5, 0)


# ------------------------------------------------------------------------------------------------------- equality


class WithoutRestore(variants.PlainSAM):
    """Steps from the perturbed point."""

    def restore(self):
        self.at_w.clear()


class WithoutAscent(variants.PlainSAM):
    """SGD at twice the price."""

    def first_step(self):
        super().first_step()
        self.restore()

    def second_step(self):
        self.base.step()


class WithoutMomentum(variants.PlainSAM):
    def __init__(self, params, rho=variants.RHO, **settings):
        super().__init__(params, rho, **{**settings, "momentum": 0.0})


@pytest.mark.parametrize("case", [STEP_CASE, BOOKKEEPING_CASE], ids=["step", "bookkeeping"])
@pytest.mark.parametrize("broken", [WithoutRestore, WithoutAscent, WithoutMomentum])
def test_a_variant_with_another_update_is_not_timed(monkeypatch, broken, case):
    monkeypatch.setitem(variants.OPTIMIZERS, plan.FLAT, partial(broken, **variants.SETTINGS))
    wrong = variants.Variant(partial(variants.two_step, name=plan.FLAT), plan.PLAIN)
    monkeypatch.setitem(variants.VARIANTS, plan.FLAT, wrong)
    found = nothing()
    speed.measure(replace(case, comparisons=(plan.Comparison(plan.FLAT, plan.PLAIN),)), CPU, 0, found)
    (said,) = found["failures"]
    assert said["variant"] == plan.FLAT
    assert said["error"].startswith(f"NotEqualError: {case.section}, {case.network}, SAM flat: its update is ")
    assert found["rows"] == []


def test_a_floor_that_moves_the_weights_is_not_timed(monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, plan.FLOOR, replace(variants.VARIANTS[plan.SGD], like=None))
    found, case = nothing(), replace(STEP_CASE, comparisons=(plan.Comparison(plan.SGD, plan.FLOOR),))
    speed.measure(case, CPU, 0, found)
    assert [row["variant"] for row in found["failures"]] == [plan.FLOOR]
    assert found["rows"] == []


def test_a_variant_that_does_not_run_is_said_to_and_the_others_are_timed(monkeypatch, capsys):
    """In float64 it does, as a step that only fails when it is captured."""

    def sgd(workload):
        if workload.params[0].dtype == torch.float32:
            raise RuntimeError("out of memory\nand more")
        return variants.sgd(workload)

    monkeypatch.setitem(variants.VARIANTS, plan.FUSED_SGD, replace(variants.VARIANTS[plan.FUSED_SGD], make=sgd))
    found = nothing()
    names = plan.Comparison(plan.FUSED_SGD, plan.FLOOR), plan.Comparison(plan.SGD, plan.FLOOR)
    speed.measure(replace(STEP_CASE, comparisons=names), CPU, 0, found)
    where = {"section": "mlp", "network": "MLP-404", "variant": plan.FUSED_SGD}
    assert found["failures"] == [{**where, "error": "RuntimeError: out of memory"}]
    assert [row["variant"] for row in found["rows"]] == [plan.SGD]
    assert "in sgd" in capsys.readouterr().err  # where it was


def test_what_fails_in_the_rounds_leaves_a_record(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise NotEqualError("ours: its weights are no longer finite")

    monkeypatch.setattr(speed, "time_rounds", broken)
    options = {"device": "cpu", "only": ["bookkeeping"], "rounds": 2, "quick": True}
    out = tmp_path / "part.json"
    threads = torch.get_num_threads()
    assert speed.main({"options": options, "indices": [0], "process": 0, "started": 0.0, "out": str(out)}) == 0
    torch.set_num_threads(threads)
    part = json.loads(out.read_text())
    assert part["equality"]
    (said,) = part["failures"]
    assert (said["variant"], said["error"]) == (None, "NotEqualError: ours: its weights are no longer finite")


def test_a_difference_that_is_not_a_number_is_not_equal():
    with pytest.raises(NotEqualError):
        protocol.require_equal("ours", float("nan"), 1.0)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_baselines_agree_with_the_closed_form(monkeypatch, shards):
    """L = sum_i (a_i w_i)^2 / 2 with a shard's own a: g = a^2 w, and SAM's gradient is a^2 (w + rho g / |g|)."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    a = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 2.0], [1.5, 1.0, 0.2]], dtype=torch.float64)[:shards]

    class Quadratic:
        def __init__(self):
            self.params, self.batch = [w], (a, a)

        def loss(self, a, _):
            return ((a * w) ** 2).sum() / 2

        def backward(self):
            self.loss(*self.batch).backward()

        def shards(self, num_shards):
            return list(zip(a.chunk(num_shards), a.chunk(num_shards), strict=True))

    def sam_gradient(w, a):
        g = a**2 * w
        return a**2 * (w + variants.RHO * g / g.norm())

    expected, momentum = w.detach().clone(), torch.zeros(3, dtype=torch.float64)
    make = (
        partial(variants.plain_msam, num_shards=shards) if shards > 1 else partial(variants.two_step, name=plan.PLAIN)
    )
    step = make(Quadratic())
    for _ in range(3):
        step()
        momentum = 0.9 * momentum + sum(sam_gradient(expected, row) for row in a) / shards
        expected = expected - variants.SETTINGS["lr"] * momentum
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=0)


def test_the_fair_peer_steps_with_the_fused_kernel_and_keeps_its_own_switch():
    fair, stock = (
        variants.OPTIMIZERS[name]([torch.nn.Parameter(torch.ones(3))]) for name in (plan.FAIR_PEER, plan.PEER)
    )
    kernels = []
    for optimizer in (fair, stock):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.first_step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.second_step()
        kernels.append({event.key for event in profile.key_averages()})
        assert optimizer.param_groups[0]["foreach"] is True
    assert "aten::_fused_sgd_" in kernels[0]
    assert "aten::_fused_sgd_" not in kernels[1]


def test_gradients_are_placed_as_autograd_does():
    p, g = torch.nn.Parameter(torch.tensor([2.0])), torch.tensor([3.0])
    variants.place([p], [g])
    first = p.grad
    assert first.item() == 5
    variants.place([p], [g])
    assert p.grad is first
    assert first.item() == 10


# ------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_name_of_the_plan_is_known(device):
    for case in plan.cases(device):
        if case.kind == "precision":
            assert case.network in precision.NETWORKS
            continue
        if case.kind in speed.MODULES:
            known = speed.MODULES[case.kind].VARIANTS
            assert set(case.timed) <= set(known)
            assert {known[name].like for name in case.timed} - {None} <= set(known)
            assert case.network in [*engine.NETWORKS, plan.ANCHOR_NETWORK]
            continue
        if case.kind == "start":
            assert (case.comparisons, case.processes) == ((), 2)
            assert case.network in engine.NETWORKS
            continue
        assert set(case.timed) <= set(variants.VARIANTS)
        assert {variants.VARIANTS[name].like for name in case.timed} - {None} <= set(variants.VARIANTS)
        assert case.network in NETWORKS
        if case.kind == "bookkeeping":
            assert set(case.timed) <= set(variants.OPTIMIZERS)


def test_the_goals_are_those_of_the_issue():
    goals = {
        (case.section, case.network, one.reference, one.goal)
        for case in plan.cases("cpu")
        for one in case.comparisons
        if one.goal is not None and not one.variant.startswith("mSAM")
    }
    networks = ("ResNet-20", "MobileNetV2", "ResNet-18", "WRN-28-10")
    peers = (plan.PEER, plan.FAIR_PEER)
    assert goals == {
        ("mlp", "MLP-404", plan.FLOOR, 1.05),
        ("mlp", "MLP-404", plan.SGD, 1.55),
        *(("mlp", "MLP-404", peer, 0.70) for peer in peers),
        ("mlp-compiled", "MLP-404", plan.SGD, 1.30),
        *(
            (section, network, peer, 0.45)
            for section in ("bookkeeping", "bookkeeping-compiled")
            for network in networks
            for peer in peers
        ),
    }
    msam = [
        one
        for section in ("msam", "msam-compiled")
        for case in plan.cases("cpu", [section])
        for one in case.comparisons
    ]
    assert {one.variant: one.goal for one in msam if one.goal} == {
        "mSAM, 4 shards": 1.10,
        "mSAM, 4 shards, compiled": 1.10,
        "mSAM, 8 shards": 1.5,
        "mSAM, 16 shards": 1.5,
        "mSAM, 16 shards, compiled": 1.15,
    }


def test_one_network_of_a_section_can_be_asked_for():
    assert plan.cases("cuda", ["engine-fp16/ResNet-18"]) == [plan.sections("cuda")["engine-fp16"][3]]
    assert len(plan.cases("cuda", ["engine-fp16/ResNet-18", "anchor"])) == 2
    with pytest.raises(InputError, match=r"network = 'ResNet-19' .*WRN-40-2"):
        plan.cases("cuda", ["engine-fp16/ResNet-19"])


def test_the_mlp_has_404_tensors_and_a_signal():
    workload = Workload("MLP-404", 16, CPU, torch.float32)
    assert len(workload.params) == 404
    assert sum(p.numel() for p in workload.params) == 212_586
    workload.backward()
    assert all(1e-6 < p.grad.norm() < 10 for p in workload.params)


def test_all_variants_start_from_the_same_weights_and_see_the_same_batches():
    one, other = (Workload("MLP-404", 4, CPU, torch.float32) for _ in range(2))
    assert all(map(torch.equal, one.params, other.params))
    seen = []
    for _ in range(4):
        assert all(map(torch.equal, one.batch, other.batch))
        seen.append(one.batch[0])
        one.next_batch()
        other.next_batch()
    assert seen[3] is seen[0]
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("case", [STEP_CASE, BOOKKEEPING_CASE], ids=["step", "bookkeeping"])
def test_what_is_called_flat_is_flat(case):
    """The optimiser falls back by itself where it must; here it must not."""
    for name, storages in ((plan.FLAT, 1), (plan.AGAIN, 1), (plan.FOREACH, None)):
        built = variants.build(name, case, CPU, torch.float32)
        protocol.update(built)
        assert len({p.untyped_storage().data_ptr() for p in built.params}) == (storages or len(built.params))


@pytest.mark.parametrize("name", [plan.COMPILED_OURS, plan.COMPILED_PEER])
def test_what_is_called_compiled_is_compiled_after_the_first_step(monkeypatch, name):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda half, **_: lambda: compiled.append(half) or half())
    built, plain = (variants.build(one, BOOKKEEPING_CASE, CPU, torch.float64) for one in (name, plan.PLAIN))
    protocol.update(built, 1)
    assert not compiled
    protocol.update(plain, 1)
    found, expected = (protocol.update(one, 3) for one in (built, plain))
    assert len(compiled) == 2 * 3
    assert protocol.difference(found, expected) <= variants.VARIANTS[name].tolerance


def test_on_a_gpu_a_reading_is_of_a_block_of_steps():
    built = variants.build(plan.SGD, STEP_CASE, CPU, torch.float64, block=3)
    once = variants.build(plan.SGD, STEP_CASE, CPU, torch.float64)
    assert torch.equal(protocol.update(built, 1), protocol.update(once, 3))
    assert built.steps == 3


# ------------------------------------------------------------------------------------------------------- the engine


def updates(case, names, steps=2):
    return {name: protocol.update(engine.build(name, case, CPU, torch.float64), steps) for name in names}


@pytest.mark.parametrize("network", ["MLP", "small CNN"])
def test_every_variant_of_an_engine_makes_the_update_it_is_timed_for(network):
    """Also those that are timed on a GPU alone: without one, a graph is the same step made eagerly."""
    known = {name: variant for name, variant in engine.VARIANTS.items() if not name.endswith(plan.COMPILED)}
    found = updates(replace(ENGINE_CASE, network=network), known)
    for name, variant in known.items():
        expected = found[variant.like] if variant.like else None
        assert protocol.difference(found[name], expected) <= variant.tolerance, name
        assert variant.like is None or found[name].norm() > 1e-3


@pytest.fixture
def dynamo_alone(monkeypatch):
    """torch.compile without a compiler, which takes minutes. Yields the number of graphs it has made."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile, backend="eager"))
    torch.compiler.reset()
    closures._compiled_call.cache_clear()
    before = protocol.counters["stats"]["unique_graphs"]
    yield lambda: protocol.counters["stats"]["unique_graphs"] - before
    closures._compiled_call.cache_clear()


@pytest.mark.parametrize("name", engine.COMPILED)
def test_what_is_called_model_compiled_is_compiled(dynamo_alone, name):
    updates(replace(ENGINE_CASE, network="MLP"), [name + plan.COMPILED])
    assert dynamo_alone() == engine.VARIANTS[name].passes  # with running statistics and, in a second pass, without


def test_with_a_compiled_model_everyone_makes_the_same_update_by_the_same_kernels(dynamo_alone):
    names = [name + plan.COMPILED for name in engine.COMPILED if name != plan.GRAPH_SGD]
    found = updates(ENGINE_CASE, [plan.LOOP_PLAIN, *names])
    for name in names:
        assert protocol.difference(found[name], found[plan.LOOP_PLAIN]) <= engine.VARIANTS[name].tolerance, name
    assert dynamo_alone() == 2


@pytest.mark.parametrize("name", [plan.ANCHOR, plan.GRAPH_SGD])
def test_the_anchor_compiles_what_it_says(dynamo_alone, name):
    built = anchor.build(name + plan.COMPILED, ANCHOR_CASE, CPU, torch.float32)
    protocol.warm_up(built)
    assert dynamo_alone() == 1


def test_a_compiled_model_that_computes_something_else_is_not_timed(monkeypatch, dynamo_alone):
    def call(model, inputs):
        return 1.01 * model(inputs)

    monkeypatch.setattr(closures, "_call", call)
    names = plan.Comparison(plan.ENGINE + plan.COMPILED, plan.ENGINE), plan.Comparison(plan.LOOP_PEER, plan.ENGINE)
    found = nothing()
    speed.measure(replace(ENGINE_CASE, comparisons=names), CPU, 0, found)
    assert [row["variant"] for row in found["failures"]] == [plan.ENGINE + plan.COMPILED]
    assert [row["variant"] for row in found["rows"]] == [plan.LOOP_PEER]


def test_warm_up_ends_when_nothing_is_compiled_any_more(dynamo_alone):
    case = replace(ENGINE_CASE, network="MLP")
    protocol.warm_up(engine.build(plan.ENGINE + plan.COMPILED, case, CPU, torch.float32))
    made = dynamo_alone()
    protocol.timed(engine.build(plan.LOOP_PLAIN + plan.COMPILED, case, CPU, torch.float32))
    assert dynamo_alone() == made == 2


@pytest.mark.parametrize(("way", "streamed"), [("graph", 0), ("streams", 2), ("eager", 0)])
def test_shards_of_an_engine_s_graph_run_one_by_one_or_on_streams(monkeypatch, way, streamed):
    made = []
    streams = "samlib.train.StreamedClosures"
    monkeypatch.setattr(streams, lambda *settings: made.append(settings) or closures.StreamedClosures(*settings))
    updates(ENGINE_CASE, [plan.engine_msam(4, way)])
    assert len(made) == streamed


def test_images_alone_are_made_often_in_one_graph():
    """As they are in the graph of a step, where no launch is theirs."""
    built = [engine.build(name, ENGINE_CASE, CPU, torch.float32, 3) for name in (plan.INPUT, plan.INPUT_GRAPH)]
    assert [one.steps for one in built] == [3, 3 * engine.REPEATED]


@pytest.mark.parametrize(
    "wrong", [{"rho": 0.06}, {"nesterov": False}, {"weight_decay": 0.0}, {"momentum": 0.8}], ids=str
)
def test_an_engine_is_not_timed_beside_a_peer_with_another_setting(monkeypatch, wrong):
    def peer(params, **settings):
        settings = {"rho": variants.RHO, "foreach": True, **settings, **wrong}
        return variants.PeerSAM(params, base_optimizer=torch.optim.SGD, **settings)

    other = replace(engine.VARIANTS[plan.LOOP_PEER], make=partial(engine.loop, make=peer))
    monkeypatch.setitem(engine.VARIANTS, plan.LOOP_PEER, other)
    found = nothing()
    speed.measure(replace(ENGINE_CASE, comparisons=(plan.Comparison(plan.ENGINE, plan.LOOP_PEER),)), CPU, 0, found)
    (said,) = found["failures"]
    assert f"engine, small CNN, {plan.LOOP_PEER}: its update is " in said["error"]
    assert found["rows"] == found["engine"] == []


def test_a_loop_does_what_the_engine_does_to_running_statistics_and_to_a_long_gradient():
    setting = engine.Setting(ENGINE_CASE, CPU, torch.float64)
    trained, other = setting.training(), setting.training()
    loop = engine.Loop(other, variants.PlainSAM)
    indices = torch.arange(ENGINE_CASE.batch)
    loop.backward(trained.splits.pixels.images[indices].double() / 255, trained.splits.train.labels[indices])
    assert torch.cat([p.grad.flatten() for p in loop.params]).norm() > setting.spec().optim.clip_norm
    loop.optimizer.zero_grad()
    other.model.load_state_dict(trained.model.state_dict())
    for start in (0, 16, 32):
        trained.take(start + indices)
        loop.take(start + indices)
    found, expected = other.model.state_dict(), trained.model.state_dict()
    assert expected["1.num_batches_tracked"] == 3
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_a_training_of_the_bench_leaves_no_trace(monkeypatch):
    monkeypatch.delenv("SAMLIB_DATA", raising=False)
    drawn = torch.get_rng_state()
    training = engine.Setting(ENGINE_CASE, CPU, torch.float64).training()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.get_default_dtype() == torch.float32
    assert "SAMLIB_DATA" not in os.environ
    assert training.splits.pixels.images.shape == (engine.IMAGES["cpu"], 3, 8, 8)
    assert next(training.model.parameters()).dtype == torch.float64
    assert training.augmentation == Augmentation(flip=True, crop="reflect", cutout=4)


def test_the_steps_of_an_engine_go_on_over_the_end_of_an_epoch(monkeypatch):
    monkeypatch.setitem(engine.IMAGES, "cpu", 48)
    setting = engine.Setting(ENGINE_CASE, CPU, torch.float32)
    training = setting.training()
    built = engine.built([training], training.take, setting, 7)
    built.run(protocol.Stopwatch(CPU))
    assert (training.epoch, training.step, training.history) == (2, 7, [])


@pytest.mark.parametrize("network", plan.ENGINE_GPU)
def test_operations_are_those_of_the_papers(network):
    published = {
        "ResNet-20": 0.242, "WRN-40-2": 1.965, "MobileNetV2": 0.545, "ResNet-18": 3.329, "ResNet-50": 7.783,
        "WRN-28-10": 31.46,
    }  # fmt: skip
    assert engine.operations_per_image(network) / 1e9 == pytest.approx(published[network], rel=0.003)


def test_throughput_of_known_times():
    case = replace(ENGINE_CASE, network="ResNet-20", batch=16, precision="fp16")
    times = {name: [Times(seconds, 9.0)] * 3 for name, seconds in {
        plan.ENGINE: 0.5, plan.ENGINE_SGD: 0.25, engine.COPY: 0.01, engine.MATMUL: 0.1,
    }.items()}  # fmt: skip
    times = {name: times.get(name, times[plan.ENGINE]) for name in [*case.timed, *times]}
    rows = {row["variant"]: row for row in engine.throughput(case, times, CPU, 3.5)}
    assert list(rows) == [name for name in case.timed if name != plan.INPUT]
    row = rows[plan.ENGINE]
    assert (row["images_per_second"], row["epoch_seconds"], row["first_step_seconds"]) == (32, 50_000 / 32, 3.5)
    assert row["matmul_tflops"] == pytest.approx(2 * 1024**3 / 0.1 / 1e12)
    assert row["copy_gb_per_second"] == pytest.approx(2**24 * 4 * 2 / 0.01 / 1e9)
    per_second = 2 * engine.operations_per_image("ResNet-20") * 32
    assert row["of_matmul"] == pytest.approx([per_second / (2 * 1024**3 / 0.1)] * 3)
    assert row["of_copy"] == pytest.approx([2 * 8e6 * 32 / (2**27 / 0.01)] * 3)
    assert rows[plan.ENGINE_SGD]["of_matmul"] == pytest.approx(row["of_matmul"])  # half the work in half the time
    assert rows[plan.ENGINE_SGD]["first_step_seconds"] is None
    (of_seeds,) = engine.throughput(
        replace(case, comparisons=(plan.Comparison(plan.SIDE_BY_SIDE, plan.INPUT),)),
        {**times, plan.SIDE_BY_SIDE: times[plan.ENGINE]},
        CPU,
        None,
    )
    assert of_seeds["images_per_second"] == plan.SEEDS * 32


def test_a_ceiling_does_its_work(monkeypatch):
    monkeypatch.setitem(engine.MATRIX, "cpu", 64)
    built = engine.ceilings(replace(ENGINE_CASE, precision="bf16"), CPU)
    for one in built.values():
        one.run(watch := protocol.Stopwatch(CPU))
        assert watch.total.device > 0
    assert built[engine.MATMUL].params[0].dtype == torch.bfloat16


def test_the_goals_of_the_engine_on_a_gpu():
    sections = {name: cases for name, cases in plan.sections("cuda").items() if name.startswith("engine")}
    plain = ["engine", "engine-tf32", "engine-fp16", "engine-bf16"]
    assert list(sections) == [*plain, *(f"{name}-compiled" for name in plain)]
    goals = {}
    for name, cases in sections.items():
        assert [c.network for c in cases] == list(plan.COMPILED_GPU if "compiled" in name else plan.ENGINE_GPU)
        goals |= {(c.network, one.variant, one.reference): one.goal for c in cases for one in c.comparisons if one.goal}
    of_graph = dict.fromkeys([(name, plan.GRAPH, plan.GRAPH_SGD) for name in plan.ENGINE_GPU], 2.03)
    of_compiled = [(n, plan.GRAPH + plan.COMPILED, plan.GRAPH_SGD + plan.COMPILED) for n in plan.COMPILED_GPU]
    strongest = [plan.LOOP_PLAIN + plan.COMPILED, plan.LOOP_FAIR_PEER + plan.COMPILED]
    of_input = dict.fromkeys([(name, plan.INPUT_GRAPH, plan.GRAPH) for name in plan.ENGINE_GPU], 0.01)
    peers = {"ResNet-20": 0.25, "MobileNetV2": 0.45, "ResNet-18": 0.75, "WRN-28-10": 0.97}
    shards = {("ResNet-18", 4): 1.2, ("ResNet-18", 8): 1.4, ("WRN-28-10", 8): 1.15}
    assert goals == {
        **of_graph,
        **dict.fromkeys(of_compiled, 2.03),
        **{("ResNet-18", plan.GRAPH + plan.COMPILED, other): 0.85 for other in strongest},
        **of_input,
        **{(name, plan.GRAPH, plan.LOOP_FAIR_PEER): goal for name, goal in peers.items()},
        **{
            (name, plan.engine_msam(count, way), plan.GRAPH): goal
            for (name, count), goal in shards.items()
            for way in ("graph", "streams")
        },
        ("ResNet-20", plan.SIDE_BY_SIDE, plan.GRAPH): 2.0,
    }
    assert not any("streams" in name for case in sections["engine-fp16"] for name in case.timed)


def test_the_goals_of_anchor_and_start_on_a_gpu():
    (case,), (compiled,) = plan.sections("cuda")["anchor"], plan.sections("cuda")["anchor-compiled"]
    assert (case.batch, case.block, case.precision) == (1024, 48, "fp16")
    assert case.comparisons[0] == plan.Comparison(plan.GRAPH_SGD, plan.ANCHOR, 1.3)
    names = plan.GRAPH_SGD + plan.COMPILED, plan.ANCHOR + plan.COMPILED
    assert compiled.comparisons[0] == plan.Comparison(*names, 1.3)
    assert plan.START_GOALS == {"empty": 90, "filled": 20}


def test_the_epoch_goals_are_of_graphs_in_16_bits():
    case = replace(ENGINE_CASE, network="ResNet-18", precision="fp16")
    goals = {name: engine.epoch_goal(case, name) for name in engine.VARIANTS}
    assert {name for name, goal in goals.items() if goal} == {plan.GRAPH, plan.GRAPH + plan.COMPILED}
    assert goals[plan.GRAPH] == 1.25
    assert engine.epoch_goal(replace(case, precision="tf32"), plan.GRAPH) is None


# ------------------------------------------------------------------------------------------------------- the anchor


def anchored(dtype=torch.float32, **changes):
    return anchor.training(engine.Setting(replace(ANCHOR_CASE, **changes), CPU, dtype))


def test_the_first_layer_of_the_anchor_whitens():
    images = anchored().splits.train.inputs[:50]
    filters = anchor.whitening(images)
    found = torch.nn.functional.conv2d(images, filters).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found[:12].cov(), torch.eye(12), rtol=0, atol=0.01)
    torch.testing.assert_close(found[12:], -found[:12])


def test_what_the_anchor_trains():
    model = anchored().model
    trained = {name.rpartition(".")[2]: p for name, p in model.named_parameters()}
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) and layer.weight.requires_grad for layer in model.modules())
    assert not model[0].weight.requires_grad
    assert set(trained) == {"bias", "weight"}
    full = anchor.network(torch.rand(2, 3, 32, 32), 64)
    weights = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 10 * 256
    assert sum(p.numel() for p in full.parameters()) == weights + 24 + 2 * (64 + 256 + 256)
    assert model(torch.rand(5, 3, 32, 32)).shape == (5, 10)


def test_engine_and_loop_of_the_anchor_make_the_same_update(monkeypatch):
    monkeypatch.setattr(anchor, "SIZES", {"cpu": (32, 4)})
    case = replace(ANCHOR_CASE, batch=8)  # an epoch of four steps: the fifth is in another order
    names = [plan.ANCHOR, plan.ENGINE_SGD, plan.GRAPH_SGD]
    found = {name: protocol.update(anchor.build(name, case, CPU, torch.float64), 5) for name in names}
    assert found[plan.ANCHOR].norm() > 0.01
    for name in names[1:]:
        assert protocol.difference(found[name], found[plan.ANCHOR]) <= anchor.VARIANTS[name].tolerance


@pytest.mark.parametrize("wrong", [{"SMOOTHING": 0.1}, {"PAD": 1}, {"SIZES": {"cpu": (256, 9)}}], ids=str)
def test_an_anchor_that_does_something_else_is_not_equal(monkeypatch, wrong):
    """Padding is none of the update's business."""
    expected = protocol.update(anchor.build(plan.ENGINE_SGD, ANCHOR_CASE, CPU, torch.float64))
    for name, value in wrong.items():
        monkeypatch.setattr(anchor, name, value)
    found = protocol.update(anchor.build(plan.ANCHOR, ANCHOR_CASE, CPU, torch.float64))
    equal = len(found) == len(expected) and protocol.difference(found, expected) <= engine.TOLERANCE
    assert equal == ("PAD" in wrong)


def test_every_image_of_an_epoch_of_the_anchor_is_a_crop_and_every_other_epoch_flips_it():
    loop = anchor.Loop(anchored())
    epochs = [loop.epoch() for _ in range(3)]
    flipped = []
    for images in epochs:
        of_epoch = []
        for padded, image in zip(loop.padded[:20], images[:20], strict=True):
            crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
            plain, mirrored = ((crops == one).all((1, 2, 3)).any() for one in (image, image.flip(2)))
            assert plain != mirrored
            of_epoch.append(bool(mirrored))
        flipped.append(of_epoch)
    assert 0 < sum(flipped[0]) < 20
    assert flipped[0] == flipped[2] == [not one for one in flipped[1]]
    assert not torch.equal(epochs[0], epochs[2])  # cropped anew


def test_the_loop_of_the_anchor_in_fp16_has_half_weights_but_for_batch_norm():
    loop = anchor.Loop(anchored(precision="fp16"))
    kinds = {(type(layer).__name__, t.dtype) for layer in loop.model.modules() for t in layer.parameters(recurse=False)}
    assert kinds == {("Conv2d", torch.half), ("Linear", torch.half), ("BatchNorm2d", torch.float)}
    assert loop.padded.dtype == torch.half
    assert next(iter(anchor.Loop(anchored()).model.parameters())).dtype == torch.float


def test_the_loop_of_the_anchor_learns(monkeypatch, tmp_path):
    """Images of one colour a class, in noise."""
    rng, colours = np.random.default_rng(0), np.random.default_rng(1).integers(40, 216, size=(10, 1, 1, 3))
    arrays = {}
    for split, size in (("train", 192), ("test", 60)):
        labels = rng.integers(10, size=size, dtype=np.uint8)
        images = colours[labels] + rng.normal(0, 20, size=(size, 32, 32, 3))
        arrays |= {f"{split}_labels": labels, f"{split}_images": images.clip(0, 255).astype(np.uint8)}
    np.savez(tmp_path / "cifar10.npz", **arrays, classes=np.array(list("0123456789")))
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    with torch.random.fork_rng():
        seconds, accuracy = anchor.train(6, CPU, width=8, batch=16)
    assert seconds > 0
    assert accuracy > 40  # of one class: 10


# ------------------------------------------------------------------------------------------------------- the start


def test_the_second_process_of_a_start_finds_the_cache_of_the_first_and_no_other_does(monkeypatch):
    caches = []

    def process(order, variables):
        assert not os.path.exists(variables.get("TORCHINDUCTOR_CACHE_DIR", "")) or order["process"] == 1
        caches.append([variables.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")])
        os.makedirs(caches[-1][1] or "/", exist_ok=True)
        return nothing() | {"environment": {}}, False

    monkeypatch.setattr(run, "_process", process)
    run.run("cuda", ["start-compiled", "anchor"])
    first, second = caches[0], caches[2]
    assert caches == [first, first, second, second, [None, None]]
    assert first != second
    assert all(triton.startswith(inductor) for inductor, triton in (first, second))


@pytest.mark.parametrize(("process", "cache", "goal"), [(0, "empty", 90), (1, "filled", 20)])
def test_a_start_counts_from_the_start_of_the_process_to_a_step_of_a_compiled_model(monkeypatch, process, cache, goal):
    steps = []
    monkeypatch.setattr(engine, "first_step", lambda case, device, compiled: steps.append((case.network, compiled)))
    monkeypatch.setattr("time.time", lambda: 112.5)
    found, case = nothing(), plan.cases("cuda", ["start-compiled"])[0]
    speed.measure(case, torch.device("cuda"), process, found, started=100.0)
    speed.measure(case, CPU, process, found, started=100.0)
    on_gpu, on_cpu = found["start"]
    assert steps == [("ResNet-18", True)] * 2
    assert (on_gpu["cache"], on_gpu["seconds"], on_gpu["goal"]) == (cache, 12.5, goal)
    assert on_gpu["variant"] == plan.GRAPH + plan.COMPILED
    assert (on_cpu["variant"], on_cpu["goal"]) == (plan.ENGINE + plan.COMPILED, None)


def test_the_first_step_of_a_compiled_model_is_one(dynamo_alone):
    engine.first_step(replace(ENGINE_CASE, network="MLP"), CPU, compiled=True)
    assert dynamo_alone() == 2


def test_engine_rows_of_processes_are_merged_by_their_median():
    base = {"section": "engine", "network": "MLP", "variant": plan.ENGINE, "epoch_goal": None, "of_copy": None}
    rows = [
        {**base, "images_per_second": speed, "of_matmul": [share, share - 0.1, share + 0.2]}
        for speed, share in ((10.0, 0.5), (30.0, 0.3), (20.0, 0.7))
    ]
    assert run.merged_engine([*rows, {**rows[0], "variant": plan.INPUT}]) == [
        {**base, "images_per_second": 20.0, "of_matmul": [0.5, pytest.approx(0.2), pytest.approx(0.9)]},
        {**rows[0], "variant": plan.INPUT},
    ]


def test_cells_of_the_engine_s_table():
    row = {
        "section": "engine-fp16", "network": "ResNet-18", "batch": 128, "precision": "fp16", "variant": plan.GRAPH,
        "images_per_second": 43_859.6, "epoch_seconds": 1.14, "epoch_goal": 1.25, "of_matmul": [0.37, 0.361, 0.384],
        "of_copy": None, "matmul_tflops": 790.4, "copy_gb_per_second": 4300.0, "first_step_seconds": 12.34,
    }  # fmt: skip
    found = table._engine_cells(row)
    assert found[:3] == ("engine-fp16", "ResNet-18, fp16, batch 128", plan.GRAPH)
    assert found[3:] == ("43,860", "1.14", "1.25 met", "0.37 [0.36, 0.38]", "790", "", "4.3e+03", "12.3")
    missed = table._engine_cells({**row, "epoch_seconds": 1.26, "first_step_seconds": None})
    assert (missed[5], missed[-1]) == ("1.25 missed", "")


ON_THE_FAKE_GPU = """
import json, sys, torch
from functools import partial
torch.compile = partial(torch.compile, backend="aot_eager")
torch.backends.cudnn.enabled = False
import fake_cuda_worker as fake
from samlib.bench import anchor, engine, plan
from samlib.bench.protocol import Stopwatch, counters
engine.IMAGES["cuda"], anchor.SIZES["cuda"] = 64, (64, 4)
anchor.whitening = lambda images: torch.ones(24, 3, 2, 2)  # of images that no kernel has made
found = {}
for module, section in ((engine, "engine"), (anchor, plan.ANCHOR_NETWORK)):
    case = plan.Case(section, {"engine": "MLP"}.get(section, section), 16, (), 2, kind=section, precision="fp16")
    graphs = [name for name in module.VARIANTS if "graph" in name or "streams" in name]
    for name in set(graphs) - {plan.GRAPH_SGD + plan.COMPILED}:  # one that is compiled is enough
        built = module.build(name, case, fake.CUDA, torch.float32, engine.GRAPH_STEPS)
        built.run(Stopwatch(fake.CUDA))
        made = counters["stats"]["unique_graphs"]
        parts = fake.counted(lambda: built.run(Stopwatch(fake.CUDA)))
        parts["compiled"] = counters["stats"]["unique_graphs"] - made
        found[f"{section}: {name}"] = parts
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(any(mark.args[0] for mark in fake_gpu.pytestmark), reason="needs what test_fake_cuda.py needs")
def test_what_is_to_be_timed_on_a_gpu_is_captured_once_and_then_replayed(tmp_path):
    """On the runtime of `fake_cuda.c`, which runs no kernel and refuses what CUDA refuses."""
    folder, library = Path(__file__).parent, tmp_path / "fake_cuda.so"
    names = ["-Wl,-soname,libcuda.so.1", f"-I{fake_gpu.HEADERS}", "-o", library, folder / "fake_cuda.c"]
    subprocess.run(["cc", "-O1", "-w", "-shared", "-fPIC", *names], check=True, timeout=60)
    paths = os.pathsep.join([str(folder), str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "0"}
    call = [sys.executable, "-c", ON_THE_FAKE_GPU]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {f"engine: {plan.GRAPH}{plan.COMPILED}", f"{plan.ANCHOR_NETWORK}: {plan.GRAPH_SGD}"} <= set(found)
    for name, parts in found.items():
        assert parts["refused"] == "", name
        assert parts["compiled"] == 0, name
        assert parts["replays"] == engine.GRAPH_STEPS * (plan.SEEDS if "side by side" in name else 1), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", plan.ENGINE_PRECISIONS)
def test_the_engine_is_measured_on_a_gpu(precision):
    comparisons = plan.engine_gpu("ResNet-20", precision)
    case = plan.Case("engine", "ResNet-20", 16, comparisons, 2, kind="engine", precision=precision)
    found = nothing()
    speed.measure(case, torch.device("cuda"), 0, found)
    assert found["failures"] == []
    assert len(found["rows"]) == len(comparisons)
    assert {row["clock"] for row in found["rows"]} == {"cuda"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("section", ["engine-fp16-compiled/ResNet-20", "anchor", "anchor-compiled"])
def test_compiled_models_and_the_anchor_are_measured_on_a_gpu(section):
    (case,) = plan.cases("cuda", [section], rounds=2)
    found = nothing()
    speed.measure(case, torch.device("cuda"), 0, found)
    assert found["failures"] == []
    assert len(found["rows"]) == len(case.comparisons)


# ------------------------------------------------------------------------------------------------------- as a program

FIELDS = {
    "section": str, "network": str, "batch": int | None, "variant": str, "reference": str, "clock": str, "ratio": float,
    "low": float, "high": float, "wall_ratio": float, "ms": float, "reference_ms": float, "rounds": int, "threads": int,
    "goal": float | None, "processes": list, "met": bool | None,
}  # fmt: skip


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "samlib", "bench", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A whole quick run: its record, its file and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "here" / "bench.json"
    done = bench("--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), path, done.stdout


def test_quick_measures_a_case_of_every_section_that_compiles_nothing(quick):
    record, _, _ = quick
    assert record["complete"]
    assert record["failures"] == []
    sections = list(dict.fromkeys(row["section"] for row in record["rows"]))
    assert sections == ["mlp", "bookkeeping", "conv", "msam", "engine", "anchor"]
    assert {row["network"] for row in record["precision"]} == {"small CNN"}
    assert len(record["rows"]) == len(plan.STEP) + 3 + len(plan.ENGINE_STEP) + 1
    rows = [row for row in record["rows"] if row["section"] == "engine"]
    assert [(row["variant"], row["reference"]) for row in rows] == [
        (one.variant, one.reference) for one in plan.ENGINE_STEP
    ]
    trained = {row["variant"] for row in rows} | {row["reference"] for row in rows}
    assert {row["variant"] for row in record["engine"]} == trained - {plan.INPUT} | {plan.ANCHOR}


def test_a_record_says_what_it_needs_to(quick):
    record, _, _ = quick
    for row in record["rows"]:
        assert set(row) == set(FIELDS)
        assert all(isinstance(row[name], kind) for name, kind in FIELDS.items())
        assert row["low"] <= row["ratio"] <= row["high"]
    assert {"device", "torch", "python", "commit", "omp_wait_policy"} <= set(record["environment"])
    assert record["environment"]["omp_wait_policy"] == "PASSIVE"
    assert record["pytorch_optimizer"].startswith("4.")
    assert all(check["difference"] <= check["tolerance"] for check in record["equality"])
    checked = {check["variant"] for check in record["equality"]}
    assert {row["variant"] for row in record["rows"]} - checked == {plan.SGD, plan.PLAIN}  # what others must equal
    assert plan.ENGINE_SGD in {check["variant"] for check in record["equality"] if check["section"] == "anchor"}


def test_the_table_has_a_line_for_each_row(quick, capsys):
    record, path, printed = quick
    assert printed.rstrip() == table.text(record).rstrip()
    assert cli.main(["bench", "--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == sum(2 + len(record[part]) for part in ("rows", "engine", "precision"))
    widths = {len(table.HEADINGS) + 1, len(table.ENGINE_HEADINGS) + 1, len(record["precision"][0]) + 1}
    assert {line.count("|") for line in rows} == widths
    assert any("PyTorch" in line for line in lines)


def test_cells_of_the_table():
    row = {
        "section": "mlp", "network": "MLP-404", "batch": 16, "variant": "a", "reference": "b", "ratio": 1.0444,
        "low": 1.0, "high": 1.1, "wall_ratio": 1.2, "ms": 12.345, "reference_ms": 0.5, "rounds": 180, "threads": 1,
        "goal": 1.05,
        "processes": [[1, 1, 1]] * 3, "met": True,
    }  # fmt: skip
    record = {
        "rows": [row, {**row, "batch": None, "goal": 0.7, "met": False}, {**row, "goal": None, "met": None}],
        "precision": [{"network": "MLP", "rho": 0.05, "cosine": 0.98765, "time_ratio": None}],
        "environment": {}, "cores": 2, "load": [0.5, 1.5], "equality": [], "complete": False,
        "failures": [{"section": "mlp", "network": "MLP", "variant": None, "error": "no result"}],
        "start": [{"section": "start-compiled", "network": "ResNet-18", "batch": 128, "precision": "fp16",
                   "variant": "a", "cache": "empty", "seconds": 91.04, "goal": 90.0}],
        "pytorch_optimizer": "4.1.0", "started": "2026-11-21T12:00:00+00:00", "seconds": 61.4,
    }  # fmt: skip
    lines = table.markdown(record).splitlines()
    end = "1.044 | 1.000 to 1.100 | 1.200 | 12.3 / 0.5 | 180 in 3 |"
    assert lines[2] == f"| mlp | MLP-404, batch 16 | a / b | {end} 1.05 met |"
    assert lines[3] == f"| mlp | MLP-404 | a / b | {end} 0.70 missed |"
    assert lines[4] == f"| mlp | MLP-404, batch 16 | a / b | {end}  |"
    assert lines[8] == "| start-compiled | ResNet-18, fp16, batch 128 | a | empty | 91.0 | 90 missed |"
    assert lines[10:13] == [
        "| network | rho | cosine | time ratio |",
        "| --- | --- | --- | ---: |",
        "| MLP | 0.05 | 0.988 |  |",
    ]
    assert "load 0.5 to 1.5" in lines[14]
    assert lines[-2] == "Not timed: mlp, MLP: no result."
    assert lines[-1].startswith("Not complete")


def test_an_interrupt_keeps_what_is_measured(tmp_path):
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "samlib", "bench", "--device", "cpu", "--only", "bookkeeping"]
    child = subprocess.Popen(
        [*command, "--rounds", "100000", "--json", str(path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    said = b""
    while b"/100000" not in said or said.rsplit(b"/100000", 1)[0].split()[-1] in (b"0", b"1", b"2"):
        said += os.read(child.stderr.fileno(), 4096)
    child.send_signal(signal.SIGINT)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == cli.INTERRUPTED
    record = json.loads(path.read_text())
    assert (record["complete"], record["interrupted"]) == (False, True)
    assert {row["network"] for row in record["rows"]} == {"ResNet-20"}  # the first of five
    assert 2 < record["rows"][0]["rounds"] < 100000
    assert b"Not complete" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "mlp", "nosuch"], ["section", "nosuch", "bookkeeping"]),
        (["--only", "mlp/nosuch"], ["network", "nosuch", "MLP-404"]),
        (["--rounds", "1"], ["rounds", "1", "2 or more"]),
        (["--device", "tpu"], ["device", "tpu", "cpu"]),
        (["--table", "nowhere.json"], ["table", "nowhere.json", "--json"]),
        (["--json", "pyproject.toml/bench.json"], ["json", "pyproject.toml/bench.json"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_exit_code_2(capsys, arguments, words):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1]", '{"schema": 2, "rows": []}', '{"schema": 1}'])
def test_a_file_without_a_record(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"some\.json"):
        table.load(path)


def test_without_the_peer_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "--device", "cpu"]) == 2
    assert "samlib[bench]" in capsys.readouterr().err


def test_a_process_that_finds_a_difference_or_ends_without_a_word_is_said_to_and_the_others_go_on(monkeypatch):
    said = {"section": "mlp", "network": "MLP-404", "variant": "ours", "error": "its update is off"}
    parts = [{**nothing(), "environment": {"torch": "2"}, "failures": [said]}, None, nothing() | {"environment": {}}]
    monkeypatch.setattr(run, "_process", lambda order, variables: (parts[order["process"]], False))
    kept = []
    record = run.run("cpu", ["mlp"], keep=lambda record: kept.append(record["complete"]))
    assert record["failures"] == [said, {**said, "variant": None, "error": "no result"}]
    assert record["environment"] == {"torch": "2"}
    assert kept == [False] * 4  # at the start and after each of three processes
