"""Backward passes on a second thread of the CPU, while the forward passes of others run on the first.

An operation on a small batch cannot keep two cores busy; two operations can. Forward passes stay on the calling thread,
one after the other, since a module is one object with one state; a backward pass is torch's alone.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from functools import cache
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Made = TypeVar("Made")
Result = TypeVar("Result")

MAX_WAITING = 2  # forwards without their backward: their graphs and activations are alive. With 1 a thread may be idle


def overlapped(
    forwards: Iterable[Callable[[], Made]], backward: Callable[[Made], Result], *, at_half: bool = False
) -> list[Result]:
    """`backward(forward())` of each, in their order, where there is no `obstacle`.

    The forwards run here. The backwards run in a second thread and, when several wait or no forward is left, here as
    well, each with half of torch's threads: what they compute does not depend on where they run. While it lasts, a
    Python thread that calls torch for the first time finds half of torch's threads, too, and keeps them.

    Args:
        forwards: the first has all of torch's threads, since no backward runs beside it yet, the others half of them.
        backward: of what a forward has returned.
        at_half: the first has half as well: code of torch.compile keeps the number that it was compiled with.

    Raises:
        Exception: one that a forward or a backward has raised; nothing runs any longer then.
    """
    threads = torch.get_num_threads()
    helper = _helper(os.getpid(), threads // 2)
    waiting: deque[tuple[int, Made]] = deque()
    done: dict[int, Result] = {}

    def work() -> None:
        try:
            index, made = waiting.popleft()
        except IndexError:  # the other thread was here before
            return
        # the second thread has no autocast, and so neither has this one; to leave it there would clear the cache of all
        autocasts = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if autocasts else nullcontext():
            done[index] = backward(made)

    calls: list[Future[None]] = []
    try:
        if at_half:
            torch.set_num_threads(threads // 2)
        for index, forward in enumerate(forwards):
            waiting.append((index, forward()))
            with suppress(RuntimeError):  # the interpreter ends and takes no calls: all is done here
                calls.append(helper.submit(work))
            if index == 0:
                torch.set_num_threads(threads // 2)
            if len(waiting) > MAX_WAITING:
                work()
        while waiting:
            work()
        for call in calls:
            if not call.cancel():
                call.result()
    finally:
        waiting.clear()
        try:
            for call in calls:
                call.cancel()
            wait(calls)
        finally:
            torch.set_num_threads(threads)
            call = calls = None  # an exception that a call holds would hold this frame and so the call
    return [done[index] for index in range(len(done))]


def obstacle() -> str | None:
    """Why two threads cannot share the work here, and what to do; None if they can."""
    threads = torch.get_num_threads()
    if threads % 2:
        return f"torch's number of threads, {threads}, has no half: choose another with torch.set_num_threads"
    if not _has_openmp():
        return "this build of torch has one number of threads for all of Python's: take one with OpenMP"
    mode = _get_current_dispatch_mode()
    if mode is not None:
        return f"{type(mode).__name__} would see the calling thread alone: take it off"
    return None


@cache
def _has_openmp() -> bool:
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@cache
def _helper(process: int, threads: int) -> ThreadPoolExecutor:
    """A thread with `threads` of torch's, in this process: a fork has none of its parent's threads."""
    before = torch.get_num_threads()
    helper = ThreadPoolExecutor(1, "samlib-overlap", torch.set_num_threads, (threads,))
    helper.submit(int).result()
    torch.set_num_threads(before)  # that call also said how many threads made from now on are to have
    return helper
