"""Sweeps: the same records in any number of processes, nothing lost on a kill, an interrupt or a bad record."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from samlib import spec as specs_of
from samlib import sweep
from samlib.errors import InputError
from samlib.spec import CheckSpec, DataSpec, MeasureSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.store import Store

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
    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("samlib.train.train", fail)
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


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_cut_in_the_middle_every_record_is_whole_and_no_process_stays(tmp_path, sign, code):
    process = start_sweep(tmp_path)
    store = Store(tmp_path / "runs", writable=True)
    wait_for_records(store, process)
    running = workers(process)
    assert len(running) == 2
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # Ctrl-C reaches the whole group
    else:
        process.kill()
    assert process.wait(30) == code
    assert psutil.wait_procs(running, timeout=30)[1] == []
    found = store.recorded()
    assert 1 <= len(found) < 200
    assert all(store.load(key).status == "done" for key in found)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path):
    process = start_sweep(tmp_path)
    store = Store(tmp_path / "runs", writable=True)
    wait_for_records(store, process)
    workers(process)[0].kill()
    before = len(store.recorded())
    wait_for_records(store, process, count=before + 4)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130


def test_an_interrupt_is_raised_at_a_safe_point_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGINT)
    with sweep._interrupts_noted() as raise_if_interrupted:
        raise_if_interrupted()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is before
