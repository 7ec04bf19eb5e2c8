"""The bench: its statistics, that it times nothing that is not equal, its record and table. No time is asserted."""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

from samlib import __main__ as cli
from samlib.augment import Augmentation
from samlib.bench import engine, plan, precision, protocol, run, speed, table, variants
from samlib.bench.networks import NETWORKS, Workload
from samlib.bench.protocol import Built, NotEqualError, Times
from samlib.errors import InputError

CPU = torch.device("cpu")
STEP_CASE = plan.Case("mlp", "MLP-404", 4, plan.STEP, rounds=2)
BOOKKEEPING_CASE = replace(plan.sections("cpu")["bookkeeping"][0], rounds=2)
ENGINE_CASE = plan.Case("engine", "small CNN", 16, plan.ENGINE_STEP, rounds=2, kind="engine")


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
    rounds = [tuple(calls[start : start + 4]) for start in range(4 * protocol.WARM_UP, len(calls), 4)]
    assert len(rounds) == 20
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 10
    assert {name: len(series) for name, series in times.items()} == dict.fromkeys("abcd", 20)
    assert not any(collecting[4 * protocol.WARM_UP :])
    assert gc.isenabled()


def test_an_interrupt_keeps_the_rounds_so_far():
    calls = []

    def interrupt():
        if len(calls) == 10:  # two variants: 4 calls to warm up, this is the third round
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
    monkeypatch.setattr(protocol, "time_rounds", None)
    found = {"rows": [], "equality": []}
    case = replace(case, comparisons=(plan.Comparison(plan.FLAT, plan.PLAIN),))
    with pytest.raises(NotEqualError, match=rf"{case.section}, {case.network}, SAM flat: .* off in float64"):
        speed.measure(case, CPU, 0, found)
    assert found["rows"] == []


def test_a_floor_that_moves_the_weights_is_not_timed(monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, plan.FLOOR, replace(variants.VARIANTS[plan.SGD], like=None))
    with pytest.raises(NotEqualError, match="2 x forward-backward"):
        speed.measure(STEP_CASE, CPU, 0, {"rows": [], "equality": []})


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
        if case.kind == "engine":
            assert set(case.timed) <= set(engine.VARIANTS)
            assert {engine.VARIANTS[name].like for name in case.timed} - {None} <= set(engine.VARIANTS)
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
        "mSAM, 4 shards, sequential compiled": 1.10,
        "mSAM, 8 shards": 1.5,
        "mSAM, 16 shards": 1.5,
        "mSAM, 16 shards, vmap compiled": 1.15,
    }


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
    found = updates(replace(ENGINE_CASE, network=network), engine.VARIANTS)
    for name, variant in engine.VARIANTS.items():
        expected = found[variant.like] if variant.like else None
        assert protocol.difference(found[name], expected) <= variant.tolerance, name
        assert variant.like is None or found[name].norm() > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"rho": 0.06}, {"nesterov": False}, {"weight_decay": 0.0}, {"momentum": 0.8}], ids=str
)
def test_an_engine_is_not_timed_beside_a_peer_with_another_setting(monkeypatch, wrong):
    def peer(params, **settings):
        settings = {"rho": variants.RHO, "foreach": True, **settings, **wrong}
        return variants.PeerSAM(params, base_optimizer=torch.optim.SGD, **settings)

    other = replace(engine.VARIANTS[plan.LOOP_PEER], make=partial(engine.loop, make=peer))
    monkeypatch.setitem(engine.VARIANTS, plan.LOOP_PEER, other)
    monkeypatch.setattr(protocol, "time_rounds", None)
    found = {"rows": [], "equality": [], "engine": []}
    with pytest.raises(NotEqualError, match=f"engine, small CNN, {plan.LOOP_PEER}: .* off in float64"):
        speed.measure(ENGINE_CASE, CPU, 0, found)
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
    built = engine._built([training], training.take, setting, 7)
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
    assert list(sections) == ["engine", "engine-tf32", "engine-fp16", "engine-bf16"]
    goals = {}
    for cases in sections.values():
        assert [case.network for case in cases] == list(plan.ENGINE_GPU)
        goals |= {(c.network, one.variant, one.reference): one.goal for c in cases for one in c.comparisons if one.goal}
    of_graph = dict.fromkeys([(name, plan.GRAPH, plan.GRAPH_SGD) for name in plan.ENGINE_GPU], 2.03)
    of_input = dict.fromkeys([(name, plan.INPUT_GRAPH, plan.GRAPH) for name in plan.ENGINE_GPU], 0.01)
    peers = {"ResNet-20": 0.25, "MobileNetV2": 0.45, "ResNet-18": 0.75, "WRN-28-10": 0.97}
    shards = {("ResNet-18", 4): 1.2, ("ResNet-18", 8): 1.4, ("WRN-28-10", 8): 1.15}
    assert goals == {
        **of_graph,
        **of_input,
        **{(name, plan.GRAPH, plan.LOOP_FAIR_PEER): goal for name, goal in peers.items()},
        **{
            (name, plan.engine_msam(count, way), plan.GRAPH): goal
            for (name, count), goal in shards.items()
            for way in (("graph",) if name == "WRN-28-10" else ("graph", "streams"))
        },
        ("ResNet-20", plan.SIDE_BY_SIDE, plan.GRAPH): 2.0,
    }
    assert not any("streams" in name for case in sections["engine-fp16"] for name in case.timed)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", plan.ENGINE_PRECISIONS)
def test_the_engine_is_measured_on_a_gpu(precision):
    comparisons = plan.engine_gpu("ResNet-20", precision)
    case = plan.Case("engine", "ResNet-20", 16, comparisons, 2, kind="engine", precision=precision)
    found = {"rows": [], "equality": [], "engine": []}
    speed.measure(case, torch.device("cuda"), 0, found)
    assert len(found["rows"]) == len(comparisons)
    assert {row["clock"] for row in found["rows"]} == {"cuda"}


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
    assert record["error"] is None
    sections = list(dict.fromkeys(row["section"] for row in record["rows"]))
    assert sections == ["mlp", "bookkeeping", "conv", "msam", "engine"]
    assert {row["network"] for row in record["precision"]} == {"small CNN"}
    assert len(record["rows"]) == len(plan.STEP) + 3 + len(plan.ENGINE_STEP)
    rows = [row for row in record["rows"] if row["section"] == "engine"]
    assert [(row["variant"], row["reference"]) for row in rows] == [
        (one.variant, one.reference) for one in plan.ENGINE_STEP
    ]
    trained = {row["variant"] for row in rows} | {row["reference"] for row in rows}
    assert {row["variant"] for row in record["engine"]} == trained - {plan.INPUT}


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
        "environment": {}, "cores": 2, "load": [0.5, 1.5], "equality": [], "error": None, "complete": False,
        "pytorch_optimizer": "4.1.0", "started": "2026-11-21T12:00:00+00:00", "seconds": 61.4,
    }  # fmt: skip
    lines = table.markdown(record).splitlines()
    end = "1.044 | 1.000 to 1.100 | 1.200 | 12.3 / 0.5 | 180 in 3 |"
    assert lines[2] == f"| mlp | MLP-404, batch 16 | a / b | {end} 1.05 met |"
    assert lines[3] == f"| mlp | MLP-404 | a / b | {end} 0.70 missed |"
    assert lines[4] == f"| mlp | MLP-404, batch 16 | a / b | {end}  |"
    assert lines[6:9] == [
        "| network | rho | cosine | time ratio |",
        "| --- | --- | --- | ---: |",
        "| MLP | 0.05 | 0.988 |  |",
    ]
    assert "load 0.5 to 1.5" in lines[10]
    assert lines[-1].startswith("Not complete")
    assert "Stopped: ours: off." in table.text({**record, "error": "ours: off"})


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


def test_a_process_that_finds_a_difference_ends_the_bench(monkeypatch):
    part = {"rows": [], "equality": [], "engine": [], "precision": [], "environment": {}}
    part["error"] = "ours: its update is off"
    monkeypatch.setattr(run, "_process", lambda order, threads: (part, False))
    kept = []
    record = run.run("cpu", ["mlp"], keep=lambda record: kept.append(record["complete"]))
    assert record["error"] == part["error"]
    assert kept == [False, False]  # at the start and after the first of three processes
