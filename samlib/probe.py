"""Measures how fast this machine trains: some timed steps of every network, method and precision that is pending, of as
many trainings side by side as there will be.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import torch

from samlib import provenance, train
from samlib import spec as specs_of
from samlib.estimate import ONE_CORE, ONE_GPU, Speed, setting
from samlib.lanes import on, own_stream
from samlib.spec import RunSpec, Spec
from samlib.store import Store

SECONDS = 60.0  # for all settings together
SETTING_SECONDS = 3.0  # for one of them, but for its first step
WARM_UP = 5  # further steps that are not timed
# The steps of a training that is far from its end, evaluates nothing and ascends from the first step on.
ENDLESS = {"epochs": 10**6, "eval_every": 10**6, "updates": None, "ascent_from": 0.0, "ascent_until": 1.0}


def probe(
    specs: Sequence[Spec], store: Store, device: str | None = None, seconds: float = SECONDS, side_by_side: int = 1
) -> Iterator[str]:
    """Times each setting of the training runs among `specs` and keeps what it finds in the store; yields a line on
    each. What does not fit into the time or the memory is left out, and said to be.

    Raises:
        InputError: a spec asks for what this machine does not have.
    """
    chosen, ends = train.choose_device(device), time.monotonic() + seconds
    settings: dict[str, RunSpec] = {}
    for spec in specs:
        if isinstance(spec, RunSpec):
            settings.setdefault(setting(spec), spec)
    waiting = list(settings.values())
    while waiting:
        spec = waiting.pop(0)
        left = ends - time.monotonic()
        name = title(spec)
        if left <= 0:
            yield f"{name}: not measured, the time is over"
            continue
        try:
            found = images_per_second(spec, chosen, min(SETTING_SECONDS, left / (len(waiting) + 1)), side_by_side)
        except RuntimeError as error:  # out of memory, or a network that this device cannot run
            yield f"{name}: not measured, {str(error).splitlines()[0]}"
            continue
        keep(spec, found, store, chosen)
        yield f"{name}: {found:,.0f} images per second"


def images_per_second(spec: RunSpec, device: torch.device, seconds: float, side_by_side: int = 1) -> float:
    """Of all trainings together, of at least one step of each, and of as many as the time allows after the first ones,
    which are not timed (the very first one, which may compile, does not count at all)."""
    endless = specs_of.override(spec, ENDLESS)
    with torch.random.fork_rng():
        slots = range(1, side_by_side + 1) if side_by_side > 1 else [0]
        trainings = [train.Training.start(endless, device, side_by_side=side_by_side, slot=slot) for slot in slots]
        rounds = _rounds(trainings)
        synchronize(device)  # the streams do not wait for the images
        next(rounds)
        ends = time.monotonic() + seconds
        for _ in islice(rounds, WARM_UP):
            if time.monotonic() > ends - seconds / 2:
                break
        synchronize(device)
        begun, first = time.monotonic(), trainings[0].step
        for _ in rounds:
            if time.monotonic() > ends:
                break
        synchronize(device)
    steps = side_by_side * (trainings[0].step - first)
    return steps * spec.train.batch_size / (time.monotonic() - begun)


def _rounds(trainings: "Sequence[train.Training]") -> Iterator[None]:
    """A step of each training in turn, without end."""
    lanes = [(training, training.batches_left()) for training in trainings]
    while True:
        for training, batches in lanes:
            with on(own_stream(training.device, training.slot)):
                training.take(next(batches))
        yield


def keep(spec: RunSpec, found: float, store: Store, device: torch.device) -> None:
    """Adds what was found to the store, in place of what was found before of this setting on this device."""
    entry = {
        "device": provenance.environment(device.type)["device"],
        "spec": specs_of.canonical(specs_of.override(spec, {"ascent_from": 0.0, "ascent_until": 1.0})),
        "images_per_second": round(found, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.save_probes([old for old in store.probes() if not _same(old, entry)] + [entry])


def speed(device: str | None, stores: Sequence[Store]) -> Speed:
    """How fast this machine is, by what these stores hold."""
    kind = train.choose_device(device).type
    found = Speed(provenance.environment(kind)["device"], ONE_GPU if kind == "cuda" else ONE_CORE)
    found.learn_stores(stores)
    return found


def title(spec: RunSpec) -> str:
    shards = specs_of.num_shards(spec)
    method = f"{spec.optim.method} in {shards} shards" if shards > 1 else spec.optim.method
    return f"{spec.model.name}, {method}, {spec.train.precision}, batches of {spec.train.batch_size}"


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    settings = (setting(specs_of.from_canonical(entry["spec"])) for entry in (old, new))
    return old["device"] == new["device"] and len(set(settings)) == 1


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
