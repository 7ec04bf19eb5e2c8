"""Runs many specs: in this process, trainings side by side if wanted, or in a bounded pool of worker processes with one
torch thread each.

What is finished is on disk at once, so a sweep can be stopped anywhere (Ctrl-C, kill, power) and the same command goes
on. In one process each measure follows the runs it needs, and there may be a deadline. PyTorch is imported only when
something has to run.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from multiprocessing.connection import wait as wait_for
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.estimate import Speed, setting
from samlib.spec import RunSpec, Spec
from samlib.store import NUMERICS, Record, RecordError, Store, parent_run, pending

if TYPE_CHECKING:
    from samlib.lanes import Lane

POLL_SECONDS = 0.2  # between two looks at whether Ctrl-C was pressed
POOL_RESTARTS = 2  # a worker may be killed from outside; the same sweep starts a new pool this often
SAFETY = 1.2  # times its estimate must be left before anything is begun that cannot be gone on with
LINE_SECONDS = 15.0  # between two lines of progress where standard error is no terminal
LOOK_SECONDS = 1.0  # between two looks at a training
MAX_SIDE_BY_SIDE = 4  # torch has no streams for more (samlib.graph.streams)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True)
class Summary:
    """What a sweep did: how many runs ended in which status, the keys of those that failed, how many were left for want
    of time, and how many of these cannot go on and are expected to take longer than there was from the start."""

    done: int = 0
    diverged: int = 0
    failed: list[str] = field(default_factory=list)
    left: int = 0
    too_long: int = 0
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
    *,
    deadline: float = math.inf,
    speed: Speed | None = None,
    titles: Mapping[str, str] | None = None,
    after: Callable[[Record], None] | None = None,
    side_by_side: int = 1,
) -> Summary:
    """Runs every spec that has no usable record in `store` or in the stores `known`.

    Args:
        workers: processes, by default one per core on a CPU and one on a GPU; 1 runs in this process.
        deadline: the value of `time.monotonic()` at which to stop, in one process. A training that is cut goes on in
            the next sweep; what cannot go on is begun only if it is expected to end in time.
        speed: what is known of this machine, for these estimates.
        titles: what to call a run while it runs, by key.
        after: called with each record.
        side_by_side: trainings that this process makes a step of in turn; more than 1 pays on a GPU that one of them
            does not fill. No number depends on it, but for runs with dropout that would have a graph alone.

    Raises:
        InputError: the store cannot be written, or a spec asks for what this machine does not have. Records finished
            by then are kept.
        KeyboardInterrupt: after the workers have been stopped; finished records are kept.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers = {workers}: use 1 or more")
    check_side_by_side(side_by_side)
    if deadline < math.inf and workers not in (None, 1):
        raise InputError(f"workers = {workers}: a sweep under a time limit runs in one process; leave it out")
    if side_by_side > 1 and workers not in (None, 1):
        raise InputError(f"workers = {workers}: trainings are side by side in one process; leave it out")
    store.check_writable()
    put_aside_unusable(store)
    summary, started = Summary(), time.perf_counter()
    todo = pending(specs, store, known)
    if todo:
        for spec in todo:  # their weights are trained again where they are gone
            for key in specs_of.parents(spec):
                store.adopt(key, known)
        clock = Clock(deadline, speed or Speed())
        clock.speed.know(specs)
        summary.too_long = sum(not isinstance(spec, RunSpec) and not clock.allows(spec) for spec in todo)
        in_one = deadline < math.inf or side_by_side > 1
        workers = 1 if in_one else workers or default_workers(device, len(todo))
        with Progress(todo, clock, titles or {}) as progress:
            here = workers == 1
            for record in (
                Here(todo, store, device, clock, progress, side_by_side).records()
                if here
                else _run(todo, store, workers, device)
            ):
                summary.add(record)
                progress.end(record)
                if after is not None:
                    after(record)
        summary.left = len(todo) - progress.ended
    summary.seconds = time.perf_counter() - started
    return summary


def check_side_by_side(number: int) -> None:
    """
    Raises:
        InputError: none, or more than there are streams for.
    """
    if not 1 <= number <= MAX_SIDE_BY_SIDE:
        raise InputError(f"side_by_side = {number}: use 1 to {MAX_SIDE_BY_SIDE}")


def put_aside_unusable(store: Store) -> None:
    """Records that cannot be used are named, moved aside and run again."""
    for key in store.recorded():
        try:
            store.load(key)
        except RecordError as error:
            print(f"{error}\n  moved to {store.put_aside(key)}", file=sys.stderr)


def waves(specs: Sequence[Spec]) -> list[list[Spec]]:
    """Runs and checks first, then the measures and paths: each needs the models of one run or two. Of one wave any
    number can run at a time."""
    first = [spec for spec in specs if not specs_of.parents(spec)]
    then = [spec for spec in specs if specs_of.parents(spec)]
    return [wave for wave in (first, then) if wave]


def default_workers(device: str | None, runs: int) -> int:
    """One process per core, or one process where a GPU does the work."""
    import torch

    on_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if on_gpu else max(1, min(cores, runs))


def parents_first(specs: Sequence[Spec]) -> list[Spec]:
    """The same order but for runs that measures and paths need: these come before."""
    by_key = {specs_of.key(spec): spec for spec in specs}
    found: dict[str, Spec] = {}
    for key, spec in by_key.items():
        for needed in (*specs_of.parents(spec), key):
            if needed in by_key:
                found.setdefault(needed, by_key[needed])
    return list(found.values())


# ---------------------------------------------------------------------------------------------- in this process


@dataclass(slots=True)
class Clock:
    """When a sweep has to end, and what is known of how long runs take."""

    deadline: float = math.inf
    speed: Speed = field(default_factory=Speed)
    setups: dict[str, float] = field(default_factory=dict)  # seconds of a beginning and a first step, by setting

    @property
    def runs_out(self) -> bool:
        return self.deadline < math.inf

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def allows(self, spec: Spec) -> bool:
        """Whether a run may be begun: a training for as long as it can take a step, since it goes on where it was cut;
        anything else if it is expected to end in time."""
        if not self.runs_out:
            return True
        if isinstance(spec, RunSpec):
            return self.left > self.setups.get(setting(spec), self.longest_setup)
        return self.left > self.longest_setup + SAFETY * self.speed.estimate(spec).seconds

    @property
    def longest_setup(self) -> float:
        return max(self.setups.values(), default=0.0)

    def note_setup(self, spec: RunSpec, seconds: float) -> None:
        """The last one of a setting counts: the first may have compiled, or waited for the GPU itself to begin."""
        self.setups[setting(spec)] = seconds


class Here:
    """A sweep in this process: trainings side by side, a step of each in turn, and all else between their steps."""

    def __init__(
        self,
        specs: Sequence[Spec],
        store: Store,
        device: str | None,
        clock: Clock,
        progress: "Progress",
        side_by_side: int,
    ) -> None:
        self.waiting = {specs_of.key(spec): spec for spec in parents_first(specs)}
        self.store, self.device, self.clock, self.progress = store, device, clock, progress
        self.side_by_side = side_by_side
        self.lanes: dict[str, Lane] = {}  # by the key of the run

    def records(self) -> Iterator[Record]:
        with one_thread(), plain_arithmetic(self.device):
            while self.waiting or self.lanes:
                while (key := self.startable()) is not None:
                    yield from self.learnt(self.start(self.waiting.pop(key)))
                yield from self.until_one_ends()

    def startable(self) -> str | None:
        """The key of the first that waits for no training, if there is room."""
        if len(self.lanes) == self.side_by_side:
            return None
        to_come = self.lanes.keys() | self.waiting.keys()
        return next((key for key, spec in self.waiting.items() if to_come.isdisjoint(specs_of.parents(spec))), None)

    def start(self, spec: Spec) -> Record | None:
        """Begins a training, or does all else at once, if there is time for it."""
        if not self.clock.allows(spec):
            return None
        self.progress.begin(spec)
        if not isinstance(spec, RunSpec):
            return run_one(spec, self.store, self.device, self.clock, self.progress.during)
        from samlib.lanes import Lane

        free = next(slot for slot in range(1, 1 + self.side_by_side) if slot not in self.slots())
        how = self.clock.deadline, self.progress.during, self.side_by_side, free
        self.lanes[specs_of.key(spec)] = Lane(spec, self.store, self.device, *how)
        return None

    def slots(self) -> set[int]:
        """Those that trainings are in."""
        return {lane.slot for lane in self.lanes.values()}

    def until_one_ends(self) -> Iterator[Record]:
        """Steps of all trainings in turn."""
        count = len(self.lanes)
        while count and len(self.lanes) == count:
            for key, lane in list(self.lanes.items()):
                record = self.step(lane)
                if lane.ended:
                    self.lanes.pop(key)
                yield from self.learnt(record)

    def step(self, lane: "Lane") -> Record | None:
        """A step of one training, and its record if it was the last one."""
        begun, began = lane.begun, time.monotonic()
        try:
            lane.turn()
        except Exception as error:
            lane.ended, lane.record = True, failed(lane.spec, self.store, error)
        if not begun:
            self.clock.note_setup(lane.spec, time.monotonic() - began)
        return lane.record

    def learnt(self, record: Record | None) -> Iterator[Record]:
        if record is not None:
            self.clock.speed.learn(record)
            yield record


def run_one(
    spec: Spec,
    store: Store,
    device: str | None,
    clock: Clock | None = None,
    report: Callable[[Any], None] | None = None,
) -> Record | None:
    """One run in this process; None where the time ended before it did. An exception becomes a record of status
    'failed', which the next sweep runs again."""
    from samlib import train

    try:
        deadline = math.inf if clock is None else clock.deadline
        if deadline < math.inf and not _has_models(spec, store, device, clock, report):
            return None
        return train.run(spec, store, device, deadline, report)
    except Exception as error:
        return failed(spec, store, error)


def failed(spec: Spec, store: Store, error: Exception) -> Record:
    """The record of a run that an exception ended.

    Raises:
        InputError, torch.AcceleratorError: the error itself. Every other run would end with it too: what is missing is
            missing on this machine, and after an error of its kernels a GPU is lost to a process.
    """
    import torch

    if isinstance(error, InputError | torch.AcceleratorError):
        raise error
    record = Record(specs_of.key(spec), specs_of.canonical(spec), "failed", numerics=NUMERICS)
    record.error = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    store.save(record)
    return record


def _has_models(
    spec: Spec, store: Store, device: str | None, clock: Clock, report: Callable[[Any], None] | None
) -> bool:
    """Whether the models that a spec needs are there while there is still time for it. Those whose records are there
    but not their weights are trained again, in as many calls as it takes."""
    from samlib import train

    for key in specs_of.parents(spec):
        record = store.load(key)
        if record is None:  # its training was cut
            return False
        if record.status == "done" and store.trained_path(key) is None:
            parent = parent_run(store, key, "parent")
            if train.train(parent, store, train.choose_device(device), clock.deadline, report) is None:
                return False
            store.checkpoint_path(key).unlink(missing_ok=True)
    return clock.allows(spec)


# ---------------------------------------------------------------------------------------------- in worker processes


def _run(specs: Sequence[Spec], store: Store, workers: int, device: str | None) -> Iterator[Record]:
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
                waiting: set[Future[Record | None]] = {pool.submit(run_one, spec, store, device) for spec in wave}
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
def plain_arithmetic(device: str | None) -> Iterator[None]:
    """float32 inside, as in `train.run`."""
    from samlib import train
    from samlib.arithmetic import arithmetic

    with arithmetic("fp32", train.choose_device(device)):
        yield


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


class Progress:
    """Runs done, the current run and the time left, on standard error: a bar on a terminal, else a line now and then.

    Where the runs lie in worker processes only finished ones are known of.
    """

    def __init__(self, specs: Sequence[Spec], clock: Clock, titles: Mapping[str, str]) -> None:
        self.clock, self.titles = clock, titles
        self.costs = {specs_of.key(spec): clock.speed.estimate(spec).seconds for spec in specs}
        self.ended, self.cost, self.current, self.pace = 0, 0.0, "", ""
        self.trainings: dict[int, Any] = {}  # those that go on, by their id
        self.looked: tuple[float, int] | None = None  # when, and how many images they had seen
        self.on_terminal, self.said, self.shown = sys.stderr.isatty(), -math.inf, False
        self.bar = tqdm(
            total=sum(self.costs.values()),
            bar_format=f"{{percentage:3.0f}}%{' |{bar:20}|' if self.on_terminal else ''} "
            "{elapsed} elapsed, {remaining} left, {desc}",
            smoothing=0,
            file=sys.stderr if self.on_terminal else StringIO(),
        )
        self.show()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.show(at_once=not self.shown)
        self.bar.close()

    def begin(self, spec: Spec) -> None:
        key, estimate = specs_of.key(spec), self.clock.speed.estimate(spec)
        self.current = f"{self.titles.get(key, key)} (about {duration(estimate.seconds)} by {estimate.source})"
        self.pace, self.looked = "", None
        self.show(at_once=estimate.seconds > LINE_SECONDS)

    def during(self, training: Any) -> None:
        """Called before each step of a training; looks at the first one and then once a second at all that go on."""
        now = time.monotonic()
        if id(training) not in self.trainings:
            self.trainings[id(training)], self.looked = training, None
            self.bar.initial += self.done(training)  # in an earlier sweep: it says nothing of the time left
        elif self.looked is not None and now - self.looked[0] < LOOK_SECONDS:
            return
        images = sum(one.step * one.spec.train.batch_size for one in self.trainings.values())
        if self.looked is not None:
            others = f"{len(self.trainings)} side by side, " if len(self.trainings) > 1 else ""
            epoch = f"epoch {training.epoch + 1}/{training.spec.train.epochs}"
            self.pace = f", {others}{epoch}, {(images - self.looked[1]) / (now - self.looked[0]):,.0f} images/s"
        self.looked, self.bar.n = (now, images), self.cost + sum(map(self.done, self.trainings.values()))
        self.show()

    def done(self, training: Any) -> float:
        """What of the cost of a training that goes on has been done."""
        return self.costs.get(specs_of.key(training.spec), 0.0) * training.step / training.steps

    def end(self, record: Record) -> None:
        self.ended += 1
        left = {i: one for i, one in self.trainings.items() if one.status == "running"}
        self.trainings = {i: one for i, one in left.items() if specs_of.key(one.spec) != record.key}
        self.looked = None
        self.cost += self.costs[record.key]
        self.current = f"{self.titles.get(record.key, record.key)}: {record.status}"
        self.pace = f", {record.images_per_second:,.0f} images/s" if record.images_per_second else ""
        self.bar.n = self.cost + sum(map(self.done, self.trainings.values()))
        self.show()

    def show(self, at_once: bool = False) -> None:
        limit = f", {max(0, self.clock.left):.0f} s to the limit" if self.clock.runs_out else ""
        run = f": {self.current}{self.pace}" if self.current else ""
        self.bar.set_description_str(f"{self.ended}/{len(self.costs)} runs{limit}{run}")
        self.shown = self.on_terminal or at_once or time.monotonic() - self.said > LINE_SECONDS
        if self.shown and not self.on_terminal:
            print(self.bar, file=sys.stderr, flush=True)
            self.said = time.monotonic()


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.1f} s"
