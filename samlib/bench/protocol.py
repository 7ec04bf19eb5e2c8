"""How it is measured: equality first, then rounds in random order, then ratios within each round.

On a shared machine the load changes by the second. Variants that run within the same round see nearly the same load, so
the ratio of their times is far steadier than the times; the order within a round is drawn anew each time, so none has a
fixed predecessor. Each ratio is the median over rounds with a 95 % bootstrap interval of that median.
"""

import gc
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

RESAMPLES = 2000
WARM_UP = 2  # runs at least
MAX_WARM_UP = 10  # a model that still compiles after so many runs compiles in every run


class NotEqualError(Exception):
    """A variant does not make the update that it is timed for."""


class Times(NamedTuple):
    """Seconds a step. `device` is the process's CPU time on a CPU, time between events on a GPU."""

    device: float
    wall: float


class Stopwatch:
    """Adds up the time spent inside it: with stopwatch: ..."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = Times(0.0, 0.0)

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start = Times(time.process_time(), time.perf_counter())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._events[1].record()
            torch.cuda.synchronize(self.device)
        spent, wall = time.process_time() - self._start.device, time.perf_counter() - self._start.wall
        if self.device.type == "cuda":
            spent = self._events[0].elapsed_time(self._events[1]) / 1000
        self.total = Times(self.total.device + spent, self.total.wall + wall)


Run = Callable[[Stopwatch], None]  # one step, or on a GPU a block of them; starts the watch where the timed part starts


class Built(NamedTuple):
    """A variant set up on one network."""

    params: list[Tensor]
    run: Run
    steps: int  # in one run


class Ratio(NamedTuple):
    """An estimate with its 95 % interval."""

    ratio: float
    low: float
    high: float


# -------------------------------------------------------------------------------------------------- equality


def update(built: Built, steps: int = 2) -> Tensor:
    """What some steps change, all tensors in one. Momentum acts from the second step on, so there are two at least."""
    before = _flat(built.params)
    for _ in range(steps):
        built.run(Stopwatch(before.device))
    return _flat(built.params) - before


def difference(found: Tensor, expected: Tensor | None) -> float:
    """||found - expected|| / ||expected||; ||found|| where no update is expected (None)."""
    if expected is None:
        return float(found.norm())
    return float((found - expected).norm() / expected.norm())


def require_equal(name: str, found: float, tolerance: float) -> None:
    """Raises:
    NotEqualError: the difference is above the tolerance.
    """
    if not found <= tolerance:  # also NaN
        raise NotEqualError(f"{name}: its update is {found:.1e} off in float64, more than {tolerance:.0e}: not timed")


def _flat(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


# -------------------------------------------------------------------------------------------------- rounds


def time_rounds(
    variants: Mapping[str, Built],
    rounds: int,
    *,
    seed: int,
    progress: Callable[[Iterator[int]], Iterator[int]] = iter,
) -> dict[str, list[Times]]:
    """Times of each variant, round by round; they have been warmed up.

    An interrupt (SIGINT) ends the rounds after the present one, and what is measured is returned.

    Raises:
        NotEqualError: a weight is not finite afterwards: that variant did not do the work it was timed for.
    """
    order, rng = list(variants), random.Random(seed)
    times: dict[str, list[Times]] = {name: [] for name in order}
    with _no_collection(), interrupt_asked_for() as asked:
        for _ in progress(range(rounds)):
            rng.shuffle(order)
            for name in order:
                times[name].append(timed(variants[name]))
            if asked:
                break
    for name, built in variants.items():
        if not all(p.isfinite().all() for p in built.params):
            raise NotEqualError(f"{name}: its weights are no longer finite")
    return times


def timed(built: Built) -> Times:
    """Seconds a step in one run of a variant."""
    stopwatch = Stopwatch(built.params[0].device)
    built.run(stopwatch)
    return Times(*(seconds / built.steps for seconds in stopwatch.total))


def warm_up(built: Built) -> None:
    """Runs until torch.compile makes no new graph, and twice at least."""
    for index in range(MAX_WARM_UP):
        graphs = counters["stats"]["unique_graphs"]
        timed(built)
        if index + 1 >= WARM_UP and counters["stats"]["unique_graphs"] == graphs:
            return


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def interrupt_asked_for() -> Iterator[list[bool]]:
    """A list that an interrupt makes true, in place of the exception."""
    asked: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------------------------------------------------------------------------------------- ratios


def paired_ratio(times: Sequence[float], reference: Sequence[float], seed: int = 0) -> Ratio:
    """The median of times / reference, round by round, with the 95 % percentile interval of its bootstrap."""
    ratios = np.asarray(times) / np.asarray(reference)
    draws = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
