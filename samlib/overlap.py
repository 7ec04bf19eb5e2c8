"""Backward passes on a second thread of the CPU, while the forward passes of others run on the first.

An operation on a small batch cannot keep two cores busy; two operations can. Forward passes stay on the calling thread,
one after the other, since a module is one object with one state; a backward pass is torch's alone.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Made = TypeVar("Made")
Result = TypeVar("Result")


def overlapped(
    forwards: Iterable[Callable[[], Made]], backward: Callable[[Made], Result], *, at_half: bool = False
) -> list[Result]:
    """`backward(forward())` of each, in their order.

    The forwards run here. The backwards run in a second thread and, once no forward is left, here as well, each with
    half of torch's threads: what they compute does not depend on where they run.

    Args:
        forwards: the first has all of torch's threads, since no backward runs beside it yet, the others half of them.
        backward: of what a forward has returned.
        at_half: the first has half as well: code of torch.compile keeps the number that it was compiled with.

    Raises:
        Exception: the first that a forward or a backward has raised; nothing runs any longer then.
    """
    threads = torch.get_num_threads()
    helper = _helper(os.getpid(), threads // 2)
    waiting: deque[tuple[int, Made]] = deque()
    done: dict[int, Result] = {}

    def work() -> None:
        while True:
            try:
                index, made = waiting.popleft()
            except IndexError:
                return
            with torch.autocast("cpu", enabled=False):  # which a new thread has not, and so neither has this one
                done[index] = backward(made)

    calls = []
    try:
        if at_half:
            torch.set_num_threads(threads // 2)
        for index, forward in enumerate(forwards):
            waiting.append((index, forward()))
            calls.append(helper.submit(work))
            torch.set_num_threads(threads // 2)
        work()
        for call in calls:
            call.result()
    finally:
        waiting.clear()
        wait(calls)
        torch.set_num_threads(threads)
    return [done[index] for index in range(len(done))]


def obstacle() -> str | None:
    """Why two threads cannot share the work here, and what to do; None if they can."""
    threads = torch.get_num_threads()
    if threads % 2:
        return f"torch's number of threads, {threads}, has no half: choose another with torch.set_num_threads"
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return "this build of torch has one number of threads for all of Python's: take one with OpenMP"
    mode = _get_current_dispatch_mode()
    if mode is not None:
        return f"{type(mode).__name__} would see the calling thread alone: take it off"
    return None


@cache
def _helper(process: int, threads: int) -> ThreadPoolExecutor:
    """A thread with `threads` of torch's, in this process: a fork has none of its parent's threads."""
    before = torch.get_num_threads()
    helper = ThreadPoolExecutor(1, "samlib-overlap", torch.set_num_threads, (threads,))
    helper.submit(int).result()
    torch.set_num_threads(before)  # that call also said how many threads made from now on are to have
    return helper
