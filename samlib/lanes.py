"""Trainings side by side: several in one process, a step of each in turn.

Each has its own random numbers, and on a GPU a stream of its own: a small network does not fill one, and the kernels of
several overlap. The numbers are those of a training alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from samlib import train
from samlib.graph import streams
from samlib.spec import RunSpec
from samlib.store import Record, Store


class Lane:
    """One of the trainings.

    Args:
        spec, store, device, deadline, report: as for `train.run`.
        side_by_side: how many trainings there may be. One alone has no stream.
        slot: from 1 to side_by_side, no other training's.

    Attributes:
        begun: whether a step has been made.
        ended: whether there is nothing more to do.
        record: of the run, once it has ended; None if the deadline cut it.
    """

    def __init__(
        self,
        spec: RunSpec,
        store: Store,
        device: str | None = None,
        deadline: float = math.inf,
        report: Callable[[Any], None] | None = None,
        side_by_side: int = 1,
        slot: int = 1,
    ) -> None:
        self.spec, self.store, self.device = spec, store, train.choose_device(device)
        self.slot = slot if side_by_side > 1 else 0
        self.stream = own_stream(self.device, self.slot)
        lane = {"side_by_side": side_by_side, "slot": self.slot}
        self.turns = train.turns(spec, store, self.device, deadline, report, **lane)
        self.states = _states(self.device)
        self.begun = self.ended = False
        self.record: Record | None = None

    def turn(self) -> None:
        """Makes a step, the first one after what begins a training; after the last one the run has ended."""
        with self._random_numbers(), on(self.stream):
            try:
                next(self.turns)
            except StopIteration as end:
                self.ended = True
                self.record = None if end.value is None else train.finish(end.value, self.store)
            if not self.begun and self.stream is not None:  # others may use what it has brought to the GPU for all
                torch.cuda.synchronize(self.device)
            self.begun = True

    def _random_numbers(self) -> AbstractContextManager:
        """torch's global generators as this training left them. Only dropout draws from them once it has begun."""
        return self._own_states() if self.spec.model.dropout or not self.begun else nullcontext()

    @contextmanager
    def _own_states(self) -> Iterator[None]:
        others = _states(self.device)
        _set_states(self.device, self.states)
        try:
            yield
        finally:
            self.states = _states(self.device)
            _set_states(self.device, others)


def own_stream(device: torch.device, slot: int) -> "torch.cuda.Stream | None":
    """For one of several trainings on a GPU; None for one alone, in slot 0, or on a CPU."""
    return streams(device, slot).work if device.type == "cuda" and slot else None


def on(stream: "torch.cuda.Stream | None") -> AbstractContextManager:
    """Gives work to this stream, or to the one it would go to without."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
