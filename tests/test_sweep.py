"""Sweeps: the same records in any number of processes, nothing lost on a kill, a limit or a bad record."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from samlib import graph, sweep, train
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.estimate import Speed
from samlib.spec import (
    CheckSpec,
    ConnectSpec,
    DataSpec,
    MeasureSpec,
    ModelSpec,
    OptimSpec,
    PathSpec,
    RunSpec,
    TrainSpec,
)
from samlib.store import Record, Store

TINY = RunSpec(DataSpec(train_size=48), ModelSpec(width=4), OptimSpec("sam"), TrainSpec(epochs=1, batch_size=16))
RUNS = [specs_of.override(TINY, {"seed": seed}) for seed in range(3)]
ALL = [MeasureSpec(specs_of.key(RUNS[0])), *RUNS, CheckSpec("dual_norm", (("p", "2"),))]


def numbers(store, specs=ALL):
    return {
        specs_of.key(spec): (record.history, record.final, record.measures)
        for spec in specs
        if (record := store.load(specs_of.key(spec)))
    }


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "one", writable=True)


def test_worker_processes_give_the_numbers_of_this_process(store, tmp_path):
    summary = sweep.run_all(ALL, store, workers=1, device="cpu")
    assert (summary.done, summary.diverged, summary.failed) == (len(ALL), 0, [])
    pool = Store(tmp_path / "two", writable=True)
    sweep.run_all(ALL, pool, workers=2, device="cpu")
    assert numbers(pool) == numbers(store)
    assert {pool.load(key).environment["threads"] for key in pool.recorded()} == {1}


def test_what_is_there_is_not_run_again(store, tmp_path):
    sweep.run_all(RUNS[:2], store, workers=1, device="cpu")
    again = sweep.run_all(RUNS, Store(tmp_path / "two", writable=True), [store], workers=1, device="cpu")
    assert again.done == 1
    assert sweep.run_all(RUNS[:2], store, workers=1, device="cpu").done == 0


def test_a_record_that_cannot_be_used_is_named_moved_aside_and_run_again(store, capsys):
    sweep.run_all(RUNS[:1], store, workers=1, device="cpu")
    expected = numbers(store)
    path = store.record_path(specs_of.key(RUNS[0]))
    path.write_text(path.read_text()[:100])
    assert sweep.run_all(RUNS[:1], store, workers=1, device="cpu").done == 1
    assert numbers(store) == expected
    assert str(path) in capsys.readouterr().err
    assert (store.folder / "aside" / path.name).exists()


def test_a_run_that_fails_is_a_record_with_its_error_and_is_tried_again(store, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("samlib.train.Training.start", fail)
        summary = sweep.run_all(RUNS[:2], store, workers=1, device="cpu")
    assert summary.failed == [specs_of.key(spec) for spec in RUNS[:2]]
    assert "out of memory" in store.load(summary.failed[0]).error
    assert sweep.run_all(RUNS[:2], store, workers=1, device="cpu").done == 2


def test_bad_input_stops_a_sweep_and_keeps_what_is_finished(store, monkeypatch, tmp_path):
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/no.tar.gz")
    cifar = RunSpec(DataSpec("cifar10", train_size=64), train=TrainSpec(epochs=1, batch_size=16))
    with pytest.raises(InputError, match=r"cifar10\.npz"):
        sweep.run_all([RUNS[0], cifar, RUNS[1]], store, workers=1, device="cpu")
    assert store.recorded() == [specs_of.key(RUNS[0])]


@pytest.mark.parametrize("workers", [0, -1])
def test_a_bad_number_of_workers(store, workers):
    with pytest.raises(InputError, match="workers"):
        sweep.run_all(RUNS, store, workers=workers)
    assert not store.folder.exists()


SCRIPT = """
import dataclasses
from pathlib import Path
from samlib import spec as specs_of, sweep
from samlib.spec import *
from samlib.store import Store

if __name__ == "__main__":
    base = RunSpec(DataSpec(train_size=480), ModelSpec(width=4), OptimSpec("sam"), TrainSpec(epochs=6, batch_size=16))
    specs = [dataclasses.replace(base, seed=seed) for seed in range(200)]
    try:
        sweep.run_all(specs, Store(Path({folder!r}), writable=True), workers=2, device="cpu")
    except KeyboardInterrupt:
        raise SystemExit(130)
"""


def start_sweep(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "runs")))
    return subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.DEVNULL)


def wait_for_records(store, process, count=1, seconds=90):
    for _ in range(seconds * 10):
        if len(store.recorded()) >= count:
            return
        assert process.poll() is None
        time.sleep(0.1)
    pytest.fail("no record in time")


def workers(process):
    """The worker processes of a sweep, by the command line that multiprocessing gives them."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def assert_ends_with_whole_records(process, store, cut, code):
    """The sweep, cut in the middle, ends with this code and leaves no process and no record in part."""
    running = workers(process)
    assert len(running) == 2
    cut()
    assert process.wait(30) == code
    assert psutil.wait_procs(running, timeout=30)[1] == []
    found = store.recorded()
    assert 1 <= len(found) < 200
    assert all(store.load(key).status == "done" for key in found)


def test_killed_in_the_middle_every_record_is_whole_and_no_process_stays(tmp_path):
    process = start_sweep(tmp_path)
    store = Store(tmp_path / "runs", writable=True)
    wait_for_records(store, process)
    assert_ends_with_whole_records(process, store, process.kill, -signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_an_interrupt_then_loses_no_record(tmp_path):
    process = start_sweep(tmp_path)
    store = Store(tmp_path / "runs", writable=True)
    wait_for_records(store, process)
    workers(process)[0].kill()
    before = len(store.recorded())
    wait_for_records(store, process, count=before + 4)
    ctrl_c = functools.partial(os.killpg, process.pid, signal.SIGINT)  # reaches the whole group
    assert_ends_with_whole_records(process, store, ctrl_c, 130)
    assert len(store.recorded()) >= before + 4


def test_an_interrupt_is_raised_at_a_safe_point_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGINT)
    with sweep._interrupts_noted() as raise_if_interrupted:
        raise_if_interrupted()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------------ order, known stores

MEASURES = [MeasureSpec(specs_of.key(run)) for run in RUNS]
SHARPNESS = [MeasureSpec(specs_of.key(run), "adversarial_sharpness") for run in RUNS]
LINE = ConnectSpec(specs_of.key(RUNS[0]), specs_of.key(RUNS[1]), PathSpec(shape="line", points=3))


def in_order(specs, store, **settings):
    """What a sweep in this process ran, in its order."""
    found = []
    summary = sweep.run_all(
        specs, store, workers=1, device="cpu", after=lambda record: found.append(record.key), **settings
    )
    return summary, found


def keys(*specs):
    return [specs_of.key(spec) for spec in specs]


def test_in_one_process_the_order_is_kept_and_runs_come_before_what_is_measured_of_them(store):
    line = dataclasses.replace(LINE, start=specs_of.key(SAME_IMAGES[0]), end=specs_of.key(SAME_IMAGES[1]))
    specs = [MEASURES[1], RUNS[0], MEASURES[0], line, RUNS[2], ALL[-1], *SAME_IMAGES, RUNS[1]]
    summary, found = in_order(specs, store)
    assert found == keys(RUNS[1], MEASURES[1], RUNS[0], MEASURES[0], *SAME_IMAGES, line, RUNS[2], ALL[-1])
    assert (summary.done, summary.left) == (9, 0)


SAME_IMAGES = [dataclasses.replace(RUNS[0], seed=seed, split_seed=0) for seed in (10, 11)]


@pytest.mark.parametrize("weights", [True, False])
def test_what_is_measured_of_a_run_known_elsewhere(store, tmp_path, weights):
    """Its weights are taken from there, or trained again."""
    known = Store(tmp_path / "known")
    sweep.run_all([RUNS[0], MEASURES[0]], known_to_write(known), workers=1, device="cpu")
    record = known.record_path(specs_of.key(RUNS[0])).read_bytes()
    if not weights:
        known.weights_path(specs_of.key(RUNS[0])).unlink()
    known.record_path(specs_of.key(MEASURES[0])).unlink()
    summary = sweep.run_all([RUNS[0], MEASURES[0], SHARPNESS[0]], store, [known], workers=1, device="cpu")
    assert (summary.done, summary.failed) == (2, [])
    assert store.record_path(specs_of.key(RUNS[0])).read_bytes() == record
    whole = Store(tmp_path / "whole", writable=True)
    sweep.run_all([RUNS[0], MEASURES[0], SHARPNESS[0]], whole, workers=1, device="cpu")
    assert numbers(store, [MEASURES[0], SHARPNESS[0]]) == numbers(whole, [MEASURES[0], SHARPNESS[0]])


def known_to_write(store):
    return dataclasses.replace(store, writable=True)


def test_a_run_that_diverged_is_not_trained_again_for_what_is_measured_of_it(store, monkeypatch):
    store.save(Record(specs_of.key(RUNS[0]), specs_of.canonical(RUNS[0]), "diverged"))
    monkeypatch.setattr("samlib.train.train", lambda *_: pytest.fail("trained"))
    for deadline in (math.inf, time.monotonic() + 60):
        assert sweep.run_all([MEASURES[0]], store, workers=1, device="cpu", deadline=deadline).diverged == 1
        store.record_path(specs_of.key(MEASURES[0])).unlink()


# ------------------------------------------------------------------------------------------------ side by side

DROPPING = [specs_of.override(TINY, {"dropout": 0.5, "epochs": 3 - seed, "seed": seed}) for seed in range(2)]


@pytest.mark.parametrize("side_by_side", [2, 4])
def test_side_by_side_runs_have_the_numbers_of_runs_alone(store, tmp_path, side_by_side):
    """Also where they draw dropout masks in turn, and where one ends before the other."""
    specs, alone = [*RUNS, *DROPPING, *MEASURES], Store(tmp_path / "alone", writable=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    summary = sweep.run_all(specs, store, device="cpu", side_by_side=side_by_side)
    assert torch.equal(torch.get_rng_state(), before)
    assert summary.done == len(specs)
    with sweep.one_thread():
        for spec in specs:
            train.run(spec, alone, "cpu")
    assert numbers(store, specs) == numbers(alone, specs)
    assert all(same(weights(store, spec), weights(alone, spec)) for spec in (*RUNS, *DROPPING))
    made = [store.load(specs_of.key(spec)).environment.get("side_by_side") for spec in (RUNS[0], MEASURES[0])]
    assert made == [side_by_side, None]
    assert "side_by_side" not in alone.load(specs_of.key(RUNS[0])).environment


def test_side_by_side_what_is_measured_waits_for_its_runs(store):
    longest = specs_of.override(TINY, {"epochs": 9, "seed": 5})
    line = dataclasses.replace(LINE, start=specs_of.key(SAME_IMAGES[0]), end=specs_of.key(SAME_IMAGES[1]))
    specs = [longest, RUNS[0], MEASURES[0], *SAME_IMAGES, line]
    _, found = in_order(specs, store, side_by_side=2)
    assert found == keys(RUNS[0], MEASURES[0], *SAME_IMAGES, line, longest)


def test_side_by_side_a_run_that_fails_is_one_of_them(store, monkeypatch):
    def take(self, chosen):
        if self.spec == RUNS[1] and self.step == 2:
            raise RuntimeError("out of memory")
        return whole(self, chosen)

    whole = train.Training.take
    monkeypatch.setattr(train.Training, "take", take)
    summary = sweep.run_all(RUNS[:3], store, device="cpu", side_by_side=3)
    assert (summary.done, summary.failed) == (2, keys(RUNS[1]))


def test_side_by_side_each_has_its_share_of_the_time(store):
    began = time.monotonic()
    sweep.run_all(RUNS, store, device="cpu", side_by_side=3)
    shares = [store.load(key).wall_seconds for key in keys(*RUNS)]
    assert 0 < sum(shares) < time.monotonic() - began


def test_progress_forgets_what_was_trained_again_for_a_measure(store, tmp_path):
    sweep.run_all([RUNS[0]], store, workers=1, device="cpu")
    store.weights_path(specs_of.key(RUNS[0])).unlink()
    clock = sweep.Clock(time.monotonic() + 60, Speed())
    with sweep.Progress(MEASURES[:1], clock, {}) as progress:
        (record,) = sweep.Here(MEASURES[:1], store, "cpu", clock, progress, 1).records()
        assert len(progress.trainings) == 1
        progress.end(record)
        assert progress.trainings == {}
    assert not any(store.folder.glob("checkpoints/*"))


def test_side_by_side_is_one_process_and_at_least_one_run(store):
    with pytest.raises(InputError, match="workers = 2"):
        sweep.run_all(RUNS, store, workers=2, side_by_side=2)
    for bad in (0, 5):
        with pytest.raises(InputError, match=f"side_by_side = {bad}: use 1 to 4"):
            sweep.run_all(RUNS, store, side_by_side=bad)
    assert not store.folder.exists()


def test_there_are_streams_for_as_many_and_for_one_that_is_trained_again_beside_them():
    torch_has = 32
    assert torch_has >= (sweep.MAX_SIDE_BY_SIDE + 1) * (2 + graph.SHARD_STREAMS)


def test_an_error_that_every_run_would_end_with_ends_the_sweep(store, monkeypatch):
    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("samlib.train.Training.start", fail)
    with pytest.raises(torch.AcceleratorError):
        sweep.run_all(RUNS[:2], store, workers=1, device="cpu")
    assert store.recorded() == []


def test_with_dropout_a_run_among_others_has_no_graph(store, monkeypatch):
    monkeypatch.setenv("SAMLIB_GRAPH", "1")
    specs = [DROPPING[0], RUNS[1]]
    sweep.run_all(specs, store, device="cpu", side_by_side=2)
    made = [store.load(key).environment.get("graph") for key in keys(*specs)]
    assert made == [None, True]


# ------------------------------------------------------------------------------------------------ under a clock

LONGER = [specs_of.override(TINY, {"train_size": 480, "epochs": 6, "seed": seed}) for seed in range(2)]
ITS_MEASURE = MeasureSpec(specs_of.key(LONGER[0]), "adversarial_sharpness")


def in_slices(specs, store, known=(), seconds=0.4, side_by_side=1):
    """Sweeps until nothing is left; how many it took, and how many left a checkpoint behind."""
    sweep.run_all(RUNS[:1], dataclasses.replace(store, folder=store.folder / "warm"), workers=1, device="cpu")
    checkpoints = 0
    for count in range(1, 100):
        limit = {"deadline": time.monotonic() + seconds, "side_by_side": side_by_side}
        summary = sweep.run_all(specs, store, known, device="cpu", **limit)
        checkpoints += any((store.folder / "checkpoints").glob("*.pt"))
        if not summary.left:
            return count, checkpoints
    pytest.fail("it does not end")


def weights(store, spec):
    return torch.load(store.weights_path(specs_of.key(spec)), weights_only=True)


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_cut_by_the_limit_and_gone_on_with_a_sweep_ends_as_one_without(store, tmp_path, side_by_side):
    specs = [*LONGER, ITS_MEASURE]
    count, checkpoints = in_slices(specs, store, side_by_side=side_by_side)
    assert count >= 2
    assert checkpoints >= 1
    whole = Store(tmp_path / "whole", writable=True)
    assert sweep.run_all(specs, whole, workers=1, device="cpu").left == 0
    assert numbers(store, specs) == numbers(whole, specs)
    assert all(same(weights(store, spec), weights(whole, spec)) for spec in LONGER)
    assert list((store.folder / "checkpoints").iterdir()) == []


def test_cut_by_the_limit_a_run_is_trained_again_for_its_measure(store, tmp_path):
    known = Store(tmp_path / "known", writable=True)
    sweep.run_all([LONGER[0], ITS_MEASURE], known, workers=1, device="cpu")
    expected = numbers(known, [ITS_MEASURE])
    known.weights_path(specs_of.key(LONGER[0])).unlink()
    known.record_path(specs_of.key(ITS_MEASURE)).unlink()
    count, checkpoints = in_slices([LONGER[0], ITS_MEASURE], store, [known])
    assert count >= 2
    assert checkpoints >= 1
    assert numbers(store, [ITS_MEASURE]) == expected
    assert list((store.folder / "checkpoints").iterdir()) == []


def slow(spec, seconds):
    """What a sweep is told of this machine: that `spec` takes so long."""
    speed = Speed()
    speed.know(RUNS)
    speed.learn(Record(specs_of.key(spec), specs_of.canonical(spec), "done", wall_seconds=seconds))
    return speed


def test_what_cannot_go_on_is_begun_only_if_it_is_expected_to_end(store):
    """The measure that takes too long is left, the one after it and a training of any length are not."""
    specs = [RUNS[0], MEASURES[0], SHARPNESS[0], RUNS[1]]
    limit = time.monotonic() + 60
    summary, found = in_order(specs, store, deadline=limit, speed=slow(MEASURES[0], 51))
    assert (found, summary.left) == (keys(RUNS[0], SHARPNESS[0], RUNS[1]), 1)
    assert store.load(specs_of.key(MEASURES[0])) is None
    assert summary.too_long == 1
    _, found = in_order([RUNS[2]], store, deadline=limit, speed=slow(RUNS[2], 1e6))
    assert found == keys(RUNS[2])
    _, found = in_order([MEASURES[0]], store, deadline=time.monotonic() + 60, speed=slow(MEASURES[0], 20))
    assert found == keys(MEASURES[0])


def test_without_time_nothing_is_begun_and_what_needs_a_run_waits_for_it(store):
    summary, found = in_order(ALL, store, deadline=time.monotonic())
    assert (found, summary.left) == ([], len(ALL))
    assert not (store.folder / "checkpoints").exists()
    summary, found = in_order([MEASURES[0]], store, deadline=time.monotonic() + 60)
    assert (found, summary.left) == ([], 1)


def test_a_training_is_not_begun_in_less_time_than_others_took_to_their_first_step(store):
    clock = sweep.Clock(time.monotonic() + 60, Speed())
    other = specs_of.override(RUNS[0], {"method": "sgd"})
    clock.note_setup(RUNS[0], 61.0)
    assert not any(map(clock.allows, (RUNS[1], other, MEASURES[0])))
    clock.note_setup(RUNS[0], 50.0)  # what it compiled is there now
    assert all(map(clock.allows, (RUNS[1], other, MEASURES[0])))
    clock.note_setup(other, 61.0)
    assert clock.allows(RUNS[1])
    assert sweep.Clock().allows(RUNS[0])


def test_a_limit_is_for_one_process(store):
    with pytest.raises(InputError, match="workers = 2"):
        sweep.run_all(RUNS, store, workers=2, deadline=time.monotonic() + 60)
    assert not store.folder.exists()


KILLER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from samlib import spec as specs_of, sweep, train
from samlib.store import Store

train.CHECKPOINT_SECONDS = 0.0
spec = specs_of.from_canonical({spec!r})
store = Store(Path({folder!r}), writable=True)
warm = specs_of.override(spec, {{"updates": 1}})  # what it loads lies in memory after the fork
sweep.run_all([warm], store, workers=1, device="cpu")
checkpoint = store.checkpoint_path(specs_of.key(spec))

def start():
    if pid := os.fork():
        return pid
    sweep.run_all([spec], store, workers=1, device="cpu")
    os._exit(0)

def step():
    return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0

def written():
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

steps = [0]
for moment in {moments}:
    pid = start()
    for _ in range(3):  # the first may be of the step at which the run went on
        before = written()
        while written() == before:
            time.sleep(0.002)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    steps.append(step())
assert os.waitpid(start(), 0)[1] == 0
print(json.dumps(steps))
"""


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(store, tmp_path):
    """Bit for bit, with dropout and a partial last batch; a checkpoint follows every step, so that a kill may fall into
    the writing of one."""
    spec = specs_of.override(LONGER[0], {"train_size": 470, "drop_last": False, "dropout": 0.3, "epochs": 4})
    sweep.run_all([spec], store, workers=1, device="cpu")
    killed, key = Store(tmp_path / "killed", writable=True), specs_of.key(spec)
    script = KILLER.format(spec=specs_of.canonical(spec), folder=str(killed.folder), moments=(0.003, 0.037, 0.111))
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300)
    steps = json.loads(done.stdout)
    assert steps == sorted(set(steps))
    assert any(step % 30 for step in steps)  # one of them in mid-epoch
    assert numbers(killed, [spec]) == numbers(store, [spec])
    assert killed.load(key).perturbation == store.load(key).perturbation
    assert same(weights(killed, spec), weights(store, spec))
    assert not killed.checkpoint_path(key).exists()


# ------------------------------------------------------------------------------------------------ progress


def test_progress_is_said_in_plain_lines_where_there_is_no_terminal(store, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.0)
    titles = {specs_of.key(RUNS[0]): "an experiment / a cell / sam, seed 0"}
    specs = [specs_of.override(RUNS[0], {"epochs": 1}), MEASURES[0]]
    sweep.run_all(specs, store, device="cpu", deadline=time.monotonic() + 1000, titles=titles)
    lines = capsys.readouterr().err.splitlines()
    assert all("\r" not in line and "|" not in line for line in lines)
    assert "0/2 runs" in lines[0]
    begun = next(line for line in lines if "an experiment / a cell / sam, seed 0 (about " in line)
    assert "by the cost model" in begun
    assert "s to the limit" in begun
    assert any("epoch 1/1, " in line and "images/s" in line for line in lines)
    assert any("1/2 runs" in line and "sam, seed 0: done, " in line for line in lines)
    assert any(specs_of.key(MEASURES[0]) in line for line in lines)
    assert lines[-1].startswith("100%")
    assert "2/2 runs" in lines[-1]


def test_lines_are_few_and_the_last_one_is_always_said(store, capsys):
    sweep.run_all(RUNS, store, workers=1, device="cpu")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "3/3 runs" in lines[-1]
