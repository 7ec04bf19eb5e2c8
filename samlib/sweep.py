"""Runs many specs: in this process, or in a bounded pool of worker processes with one torch thread each.

What is finished is on disk at once, so a sweep can be stopped anywhere (Ctrl-C, kill, power) and the same command goes
on. PyTorch is imported only when something has to run.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for

from tqdm import tqdm

from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.spec import CheckSpec, ConnectSpec, MeasureSpec, RunSpec, Spec
from samlib.store import NUMERICS, Record, RecordError, Store, pending

POLL_SECONDS = 0.2  # between two looks at whether Ctrl-C was pressed
POOL_RESTARTS = 2  # a worker may be killed from outside; the same sweep starts a new pool this often
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True)
class Summary:
    """What a sweep did: how many runs ended in which status, and the keys of those that failed."""

    done: int = 0
    diverged: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, record: Record) -> None:
        match record.status:
            case "done":
                self.done += 1
            case "diverged":
                self.diverged += 1
            case _:
                self.failed.append(record.key)


def run_all(
    specs: Sequence[Spec],
    store: Store,
    known: Sequence[Store] = (),
    workers: int | None = None,
    device: str | None = None,
) -> Summary:
    """Runs every spec that has no usable record in `store` or in the stores `known`.

    Args:
        workers: processes, by default one per core on a CPU and one on a GPU; 1 runs in this process.

    Raises:
        InputError: the store cannot be written, or a spec asks for what this machine does not have. Records finished
            by then are kept.
        KeyboardInterrupt: after the workers have been stopped; finished records are kept.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers = {workers}: use 1 or more")
    store.check_writable()
    put_aside_unusable(store)
    summary, started = Summary(), time.perf_counter()
    todo = pending(specs, store, known)
    if todo:
        with progress(todo) as bar:
            for record in _run(todo, store, workers or default_workers(device, len(todo)), device):
                summary.add(record)
                bar(record)
    summary.seconds = time.perf_counter() - started
    return summary


def put_aside_unusable(store: Store) -> None:
    """Records that cannot be used are named, moved aside and run again."""
    for key in store.recorded():
        try:
            store.load(key)
        except RecordError as error:
            print(f"{error}\n  moved to {store.put_aside(key)}", file=sys.stderr)


def waves(specs: Sequence[Spec]) -> list[list[Spec]]:
    """Runs and checks first, then the measures and paths: each needs the models of one run or two."""
    first = [spec for spec in specs if not specs_of.parents(spec)]
    then = [spec for spec in specs if specs_of.parents(spec)]
    return [wave for wave in (first, then) if wave]


def default_workers(device: str | None, runs: int) -> int:
    """One process per core, or one process where a GPU does the work."""
    import torch

    on_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if on_gpu else max(1, min(cores, runs))


# ---------------------------------------------------------------------------------------------- one or more processes


def _run(specs: Sequence[Spec], store: Store, workers: int, device: str | None) -> Iterator[Record]:
    if workers == 1:
        with one_thread():
            yield from (run_one(spec, store, device) for wave in waves(specs) for spec in wave)
        return
    left = {specs_of.key(spec): spec for spec in specs}
    for attempt in range(POOL_RESTARTS + 1):
        try:
            for record in _run_pool(list(left.values()), store, workers, device):
                left.pop(record.key)
                yield record
            return
        except BrokenProcessPool:
            if attempt == POOL_RESTARTS:
                raise
            print("A worker process was killed: starting a new pool for what is left.", file=sys.stderr)


def _run_pool(specs: Sequence[Spec], store: Store, workers: int, device: str | None) -> Iterator[Record]:
    with _single_threaded_children(), _interrupts_noted() as raise_if_interrupted:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        try:
            for wave in waves(specs):
                waiting: set[Future[Record]] = {pool.submit(run_one, spec, store, device) for spec in wave}
                while waiting:
                    finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
                    raise_if_interrupted()
        except BaseException:
            stop(pool)
            raise
        pool.shutdown()


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], None]]:
    """Ctrl-C while the pool holds a lock would leave it locked, and the process would never end. So an interrupt is
    only noted when it comes; the function that is handed out raises it where no lock is held."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield lambda: None
        return
    noted: list[int] = []

    def raise_if_interrupted() -> None:
        if noted:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def stop(pool: ProcessPoolExecutor) -> None:
    """Ends the workers now. What they were running is lost but for its checkpoint; finished records are on disk."""
    processes = list((pool._processes or {}).values())  # the standard library has no public way before Python 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)


def run_one(spec: Spec, store: Store, device: str | None) -> Record:
    """One run in this process. An exception becomes a record of status 'failed', which the next sweep runs again."""
    from samlib import train

    try:
        return train.run(spec, store, device)
    except InputError:
        raise  # the same for every run of this machine: say so once and stop
    except Exception as error:
        record = Record(specs_of.key(spec), specs_of.canonical(spec), "failed", numerics=NUMERICS)
        record.error = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
        store.save(record)
        return record


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides what ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, and they would wait for the next run for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, so that a run in this process gives the numbers of a run in a worker."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Worker processes read these variables when they load their numerical libraries."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---------------------------------------------------------------------------------------------- progress


def work(spec: Spec) -> float:
    """Rough cost of a run in images that the small CNN passes forward and backward, for the estimate of the time left.

    A pass of a shard costs as much as 30 images before it sees any; a tenth of an image is one to the MLP.
    """
    match spec:
        case RunSpec():
            small = spec.model.name == "mlp"
            passes = 1 if spec.optim.method in ("sgd", "average_sam") else 2
            images = spec.data.train_size or 50_000
            shards = specs_of.num_shards(spec) * spec.train.epochs * math.ceil(images / spec.train.batch_size)
            evaluations = spec.train.epochs / spec.train.eval_every
            trained = 30 * shards + spec.train.epochs * images * (0.1 if small else 1)
            return passes * trained + evaluations * (100 if small else 400)
        case MeasureSpec():
            return 3_000
        case ConnectSpec():
            trained = 50 * spec.path.steps if spec.path.shape == "bend" else 0
            return trained + 150 * (spec.path.grid**2 if spec.path.grid else spec.path.points)
        case CheckSpec():
            return 15_000


@contextmanager
def progress(specs: Sequence[Spec]) -> Iterator[Callable[[Record], None]]:
    """A bar of work done and time left on standard error; quarter-minute lines where that is no terminal."""
    cost = {specs_of.key(spec): work(spec) for spec in specs}
    counts = {"runs": 0}
    with tqdm(
        total=sum(cost.values()),
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| {elapsed} elapsed, {remaining} left",
        mininterval=0.2 if sys.stderr.isatty() else 15,
        file=sys.stderr,
    ) as bar:

        def advance(record: Record) -> None:
            counts["runs"] += 1
            bar.set_description_str(f"{counts['runs']}/{len(cost)} runs", refresh=False)
            bar.update(cost[record.key])

        bar.set_description_str(f"0/{len(cost)} runs")
        yield advance
