"""Real training code on the fake CUDA runtime of `fake_cuda.c`, which has to be there before torch is loaded.

    LD_PRELOAD=fake_cuda.so python fake_cuda_worker.py FOLDER

prints, as JSON, what came of every case of `cases`: name -> counters of its parts. A failure is a string. FOLDER takes
data, records and checkpoints.
"""

import ctypes
import dataclasses
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from samlib import experiments, probe, sweep, train
from samlib import spec as specs_of
from samlib.graph import GraphedStep, in_parallel, make_static
from samlib.measures import connectivity
from samlib.optim import SAM
from samlib.spec import (
    AugmentSpec,
    ConnectSpec,
    DataSpec,
    MeasureSpec,
    ModelSpec,
    OptimSpec,
    PathSpec,
    RunSpec,
    TrainSpec,
)
from samlib.store import Store

CUDA = torch.device("cuda")
COUNTERS = ("launches", "captured", "beside", "waits", "to_device", "to_host", "graphs", "replays")
IMAGES, BATCH = 260, 32  # eight mini-batches and a smaller one
EVERYTHING = AugmentSpec(autoaugment=True, flip=True, crop="reflect", cutout=8, mixup=0.2)
KEPT = ("resnet18", "mobilenet_v2")
FIELDS = (
    *("model.norm", "train.precision", "optim.method", "optim.nesterov", "optim.clip", "optim.weight_decay_in"),
    *("optim.second_pass", "optim.second_pass_batchnorm"),
)

runtime = ctypes.CDLL(None)
runtime.fake_cuda_count.restype = ctypes.c_long
runtime.fake_cuda_refused.restype = ctypes.c_char_p


def counts() -> dict[str, int]:
    return {name: runtime.fake_cuda_count(index) for index, name in enumerate(COUNTERS)}


def refused() -> str:
    return runtime.fake_cuda_refused().decode()


def counted(call: Callable[[], object]) -> dict[str, int]:
    runtime.fake_cuda_reset()
    call()
    return counts() | {"refused": refused()}


# ---------------------------------------------------------------------------------------------- trainings


def arms_of_the_study() -> dict[str, RunSpec]:
    """A training of every kind that the profiles gpu and paper have, with fewer images and shards and a small network
    in place of a large one, but for one of each of `KEPT`."""
    found: dict[tuple, tuple[str, RunSpec]] = {}
    networks = set(KEPT)
    for profile in ("gpu", "paper"):
        for stem in experiments.STEMS:
            for arm in experiments.arms(stem, profile):
                for spec in experiments.specs([arm]):
                    if isinstance(spec, RunSpec) and kind(spec) not in found:
                        found[kind(spec)] = (f"{profile}, {stem}, {arm.role}", reduced(spec, networks))
    return dict(found.values())


def kind(spec: RunSpec) -> tuple:
    cut = specs_of.num_shards(spec) > 1, spec.optim.is_hybrid, spec.train.drop_last, spec.train.label_smoothing > 0
    return *(specs_of.flat(spec)[name] for name in FIELDS), *cut, spec.augment


def reduced(spec: RunSpec, networks: set) -> RunSpec:
    shards = specs_of.num_shards(spec) > 1
    fields = {"train_size": IMAGES, "validation_size": 10, "batch_size": BATCH, "epochs": 3, "updates": None}
    fields |= {"shard_size": None, "num_shards": 4 if shards else 1}
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, name="cifar10"))
    if spec.model.name in networks:
        networks.remove(spec.model.name)
    else:
        fields |= {"model.name": "cnn", "stem": "cifar", "num_outputs": None}
    return specs_of.override(spec, fields)


def a_training(spec: RunSpec, graph: bool) -> dict[str, dict]:
    """Three steps, by then eager; the fourth, which captures; two more."""
    training = train.Training.start(spec, CUDA, graph)
    steps = training.batches_left()
    parts = {"first": counted(lambda: take(training, steps, 3))}
    parts["capture"] = counted(lambda: take(training, steps, 1))
    parts["steps"] = counted(lambda: take(training, steps, 2))
    shards = specs_of.num_shards(spec) if spec.optim.method != "sgd" else 0
    return parts | {"setting": {"graph": training.graph, "shards": shards, "precision": spec.train.precision}}


def a_life(spec: RunSpec, graph: bool, folder: Path) -> dict[str, dict]:
    """An epoch with its evaluation, and two steps; a checkpoint; the rest of the second epoch from it; a record."""
    training, again = (train.Training.start(spec, CUDA, graph) for _ in range(2))
    parts = {"epoch": counted(lambda: take(training, training.batches_left(), training.steps_per_epoch + 2))}
    path = folder / "checkpoint"
    parts["checkpoint"] = counted(lambda: (training.save(path), again.restore(train.read_checkpoint(path))))
    again.status, again.seconds = "running", 1.0
    parts["resumed"] = counted(lambda: take(again, again.batches_left(), training.steps_per_epoch - 2))
    assert (training.epoch, again.epoch) == (1, 2)
    again.status = "done"
    parts["record"] = counted(lambda: (again.effective_perturbation(), again.record()))
    return parts


def take(training: train.Training, steps: Iterator, number: int) -> None:
    for _, indices in zip(range(number), steps, strict=False):
        training.take(indices)


# ---------------------------------------------------------------------------------------------- measures and others

SMALL = RunSpec(
    DataSpec("cifar10", train_size=IMAGES, validation_size=10),
    ModelSpec("cnn"),
    OptimSpec("asam", weight_decay_in="loss", clip="both", clip_norm=1.0, num_shards=2),
    TrainSpec(epochs=1, batch_size=BATCH, label_smoothing=0.1, logged_loss="w+eps"),
    EVERYTHING,
)


MEASURES = {
    "lambda_max": {},
    "adversarial_sharpness": {"rho": 0.05, "shard_size": 20, "mode": "train"},
    "asymmetry_factor": {"directions": 2},
    "first_layer_kurtosis": {},
}


def measures(folder: Path) -> None:
    store = Store(folder / "runs", writable=True)
    start, end = SMALL, specs_of.second_run(SMALL)
    for spec in (start, end):
        assert train.run(spec, store, "cuda").status == "done"
    key = specs_of.key(start)
    for name, settings in MEASURES.items():
        train.run(MeasureSpec(key, name, images=50, **settings), store, "cuda")
    for settings in ({"shape": "line"}, {"shape": "bend", "steps": 3, "batch_size": BATCH}):
        train.run(ConnectSpec(key, specs_of.key(end), PathSpec(points=3, **settings)), store, "cuda")


def grid(folder: Path) -> None:
    """The lengths of a plane's axes are computed on the device, so one is given here."""
    splits = train.load_splits(SMALL, CUDA)
    model = train.build_model(SMALL, splits, CUDA)
    origin = connectivity.weights_of(model)
    plane = connectivity.Plane(origin, (origin, origin), (1.0, 0.0), (0.5, 0.5))
    both = [(split.inputs, split.labels) for split in (splits.train, splits.test)]
    connectivity.on_grid(model, plane, 2, *both)


def side_by_side(folder: Path) -> None:
    """Three trainings as graphs, two at a time, the shards of each on streams of their own."""
    changes = {"num_shards": 4, "clip": "none", "weight_decay_in": "update", "logged_loss": "w"}
    spec, store = specs_of.override(SMALL, changes), Store(folder / "lanes", writable=True)
    os.environ["SAMLIB_GRAPH"] = "1"
    try:
        found = sweep.run_all([dataclasses.replace(spec, seed=seed) for seed in range(3)], store, side_by_side=2)
    finally:
        del os.environ["SAMLIB_GRAPH"]
    assert (found.done, found.failed) == (3, []), [record.error for record in store.records()]
    assert counts()["graphs"] == 3


def a_probe(folder: Path) -> None:
    lines = list(probe.probe([SMALL], Store(folder / "probed", writable=True), "cuda", seconds=0.2))
    assert len(lines) == 1
    assert "images per second" in lines[0], lines


# ---------------------------------------------------------------------------------------------- what must be refused


def planted(fault: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, str]:
    """What a step says that does this while it is captured; it has run twice before, eagerly."""
    model = nn.Linear(4, 1).to(CUDA)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, fused=True, flat=True)
    make_static(opt)

    def closure(inputs):
        opt.zero_grad(set_to_none=False)
        loss = fault(model(inputs))
        loss.backward()
        return loss

    inputs = torch.ones(3, 4, device=CUDA)
    step = GraphedStep(lambda x: opt.step(partial(closure, x)), opt, [inputs], warmup=2)
    runtime.fake_cuda_reset()
    try:
        for _ in range(3):
            step(inputs)
    except RuntimeError as error:
        return {"refused": refused(), "raised": str(error).splitlines()[0]}
    return {"refused": refused(), "raised": ""} | counts()


def on_a_stream_that_does_not_come_back(y: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y.detach() + 1
    return y.sum()


def beside_the_capture(y: torch.Tensor) -> torch.Tensor:
    stream, numbers = ASIDE
    with torch.cuda.stream(stream):
        numbers.add_(1)
    return y.sum()


def two_streams() -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream() for _ in range(2)]


FAULTS = {
    "nothing": lambda y: y.sum(),
    "branches": lambda y: y.sum() + torch.stack(in_parallel([y.detach().sum, y.detach().mean], two_streams())).sum(),
    "item": lambda y: y.sum() * y.detach().max().item(),
    "truth": lambda y: y.sum() if y.detach().max() > 0 else y.mean(),
    "mask": lambda y: y[y.detach() > 0].sum(),
    "nonzero": lambda y: y.sum() + y.detach().nonzero().sum(),
    "a tensor of numbers": lambda y: (y * torch.tensor([2.0], device=CUDA)).sum(),
    "a tensor of the host": lambda y: (y * torch.ones(3, 1).to(CUDA)).sum(),
    "to the host": lambda y: y.sum() + y.detach().cpu().sum().item(),
    "two devices": lambda y: (y + torch.ones(3, 1)).sum(),
    "waiting": lambda y: (torch.cuda.synchronize(), y.sum())[1],
    "a loose branch": on_a_stream_that_does_not_come_back,
    "beside": beside_the_capture,
}


# ---------------------------------------------------------------------------------------------- all of it


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    everything = specs_of.override(SMALL, {"epochs": 3, "drop_last": False})
    lives = {"everything": everything}
    for precision, method in (("fp16", "sgd"), ("bf16", "sam"), ("tf32", "average_sam")):
        changes = {"precision": precision, "method": method, "num_shards": 1, "logged_loss": "w", "clip": "none"}
        lives[f"{method}, {precision}"] = specs_of.override(everything, changes)
    eager: dict[tuple, tuple[str, RunSpec]] = {}
    for name, spec in arms_of_the_study().items():
        yield f"graph: {name}", partial(a_training, spec, True)
        kinds = spec.optim.method, spec.train.precision, specs_of.num_shards(spec), spec.optim.second_pass
        eager.setdefault(kinds, (name, spec))
    for name, spec in eager.values():
        yield f"eager: {name}", partial(a_training, spec, False)
    for name, spec in lives.items():
        for graph in (False, True):
            yield f"life: {name}, graph {graph}", partial(a_life, spec, graph, folder)
    for case in (measures, grid, side_by_side, a_probe):
        yield case.__name__, lambda case=case: {"all": counted(partial(case, folder))}
    for name, fault in FAULTS.items():
        yield f"planted: {name}", lambda fault=fault: {"all": planted(fault)}


def described(case: Callable[[], dict]) -> dict | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return case()
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-6:])}"


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": rng.integers(high, size=(size, *shape), dtype=np.uint8)
        for split, size in (("train", IMAGES + 10), ("test", 20))
        for what, high, shape in (("images", 256, (32, 32, 3)), ("labels", 10, ()))
    }
    np.savez(folder / "cifar10.npz", **arrays, classes=np.array(list("0123456789")))


def main(folder: Path) -> None:
    torch.backends.cudnn.enabled = False  # it asks the driver itself; torch's own kernels take its place
    torch.set_num_threads(1)
    gc.freeze()  # each capture collects garbage, among all that was imported too
    write_images(folder)
    os.environ["SAMLIB_DATA"] = str(folder)
    json.dump({name: described(case) for name, case in cases(folder)}, sys.stdout)


if __name__ == "__main__":
    ASIDE = torch.cuda.Stream(), torch.zeros(3, device=CUDA)
    main(Path(sys.argv[1]))
