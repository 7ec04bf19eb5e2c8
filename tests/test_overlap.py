"""Backward passes on a second thread: order, threads, what is left behind when something fails."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samlib.overlap import MAX_WAITING, obstacle, overlapped

WAIT = 60  # seconds, after which a test fails instead of hanging


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_forwards():
    assert overlapped([partial(int, index) for index in range(20)], lambda made: 10 * made) == list(range(0, 200, 10))
    assert overlapped([], int) == []


def test_a_backward_runs_while_the_next_forward_does():
    both = threading.Barrier(2)

    def forward(index):
        if index == 1:
            both.wait(WAIT)
        return index

    def backward(index):
        if index == 0:
            both.wait(WAIT)
        return index

    assert overlapped([partial(forward, index) for index in range(2)], backward) == [0, 1]


def test_few_forwards_wait_for_their_backward():
    alive, most = set(), []

    def forward(index):
        alive.add(index)
        most.append(len(alive))
        return index

    def backward(index):
        time.sleep(0.005)
        alive.remove(index)

    overlapped([partial(forward, index) for index in range(20)], backward)
    assert max(most) <= MAX_WAITING + 2  # those that wait, the new one and one that a thread works on


def test_forwards_stay_in_the_calling_thread_and_backwards_are_in_both():
    both = threading.Barrier(2)  # passed only by two threads at once

    def backward(made):
        both.wait(WAIT)
        return made, threading.get_ident()

    found = overlapped([threading.get_ident] * 4, backward)
    assert {forward for forward, _ in found} == {threading.get_ident()}
    assert len({backward for _, backward in found}) == 2


@pytest.mark.parametrize("at_half, first", [(False, 2), (True, 1)])
def test_each_has_half_of_the_threads_and_the_first_forward_all_of_them(at_half, first):
    found = overlapped([torch.get_num_threads] * 4, lambda made: (made, torch.get_num_threads()), at_half=at_half)
    assert found == [(first, 1), (1, 1), (1, 1), (1, 1)]


def test_autocast_acts_in_no_backward():
    with torch.autocast("cpu"):
        both = threading.Barrier(2)
        found = overlapped([int] * 4, lambda _: (both.wait(WAIT), torch.is_autocast_enabled("cpu")))
    assert [enabled for _, enabled in found] == [False] * 4


def test_a_thread_made_later_has_the_number_of_threads_it_always_had():
    overlapped([int], int)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_reaches_the_caller_and_nothing_runs_on(where, error):
    finished = []

    def fail(index, *, here):
        if here and index == 2:
            raise error("of the third")
        return index

    def backward(index):
        fail(index, here=where == "backward")
        time.sleep(0.01)
        finished.append(index)

    with pytest.raises(error, match="of the third"):
        overlapped([partial(fail, index, here=where == "forward") for index in range(6)], backward)
    then = list(finished)
    time.sleep(0.05)
    assert finished == then
    assert 2 not in finished
    assert overlapped([int], lambda _: 1) == [1]


def test_an_exception_of_a_backward_keeps_nothing_alive():
    class Graph:
        pass

    graphs = []

    def forward():
        graph = Graph()
        graphs.append(weakref.ref(graph))
        return graph

    def backward(graph):
        raise ZeroDivisionError

    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            overlapped([forward] * 4, backward)
        assert not any(graph() for graph in graphs)
    finally:
        gc.enable()


def test_a_key_error_and_an_index_error_of_a_backward_are_raised():
    for error in (IndexError, KeyError, RuntimeError):
        with pytest.raises(error):
            overlapped([int] * 3, partial(raises, error))


def raises(error, _):
    raise error


def test_two_callers_at_once():
    found, both = {}, threading.Barrier(2)

    def call(name):
        torch.get_num_threads()  # before it is half
        both.wait(WAIT)
        found[name] = overlapped([partial(int, index) for index in range(30)], lambda made: (name, made))

    callers = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT)
    assert found == {name: [(name, index) for index in range(30)] for name in "ab"}


def test_without_a_second_thread_all_is_done_in_the_calling_one(monkeypatch):
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr("samlib.overlap._helper", lambda *_: ended)
    found = overlapped([int] * 4, lambda _: threading.get_ident())
    assert found == [threading.get_ident()] * 4


def test_what_stands_against_it():
    assert obstacle() is None
    for odd in (1, 3):
        torch.set_num_threads(odd)
        assert obstacle() == f"torch's number of threads, {odd}, has no half: choose another with torch.set_num_threads"
    torch.set_num_threads(2)
    with FlopCounterMode(display=False):
        assert "FlopCounterMode would see the calling thread alone" in obstacle()
    assert obstacle() is None


def test_a_torch_without_openmp(monkeypatch):
    monkeypatch.setattr("samlib.overlap._has_openmp", lambda: False)
    assert "this build of torch" in obstacle()
