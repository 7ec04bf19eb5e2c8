"""Whole steps of a training: those of `samlib.train.Training`, and those of loops around other optimisers.

All of them start from the same weights and draw the same images, in the same order, from one kind of training: uint8
images of random pixels on the device, flipped, cropped after reflection and cut out; SAM, Nesterov SGD, weight decay
and clipping. A loop is what one writes with torch: the weights of a `Training`, its images on the device and its
augmentation, around `first_step` and `second_step`. So what is compared is the step, not a way of loading images. Where
the model is compiled, everyone's is, by inductor in its default mode and with one set of kernels for all.

The comparison of updates is in float64, but for the loss, which the engine takes of logits in float32, and the norm of
pytorch_optimizer: hence `TOLERANCE`.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from pytorch_optimizer import SAM as PeerSAM
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samlib import models
from samlib.arithmetic import DTYPES, arithmetic
from samlib.bench import plan
from samlib.bench.protocol import Built, Stopwatch, Times, paired_ratio
from samlib.bench.variants import BLOCK, RHO, FusedSGD, PlainSAM
from samlib.closures import in_layout
from samlib.data import generator
from samlib.graph import GraphedStep, in_parallel
from samlib.spec import AugmentSpec, DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.train import Training, learning_rate

TOLERANCE = 1e-6
COPY, MATMUL = "copy", "matmul"  # beside the variants in every round
CLASSES = 10
IMAGES = {"cpu": 2048, "cuda": 12_800}
ENDLESS = 10**6  # epochs, and epochs between two evaluations: no step evaluates anything
GRAPH_STEPS = 5  # after three eager steps a capture with its replay, and one replay more
REPEATED = 10  # times that a graph of images alone makes them: the launch of a step's graph is none of their doing
COPIED = {"cpu": 2**24, "cuda": 2**26}  # numbers in float32 of a copy
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices of a product

# The model, and the pixels on each side of its images.
NETWORKS: dict[str, tuple[ModelSpec, int]] = {
    "MLP": (ModelSpec("mlp", width=64), 8),
    "small CNN": (ModelSpec("cnn"), 8),
    "ResNet-20": (ModelSpec("resnet20"), 32),
    "WRN-40-2": (ModelSpec("wrn40_2"), 32),
    "MobileNetV2": (ModelSpec("mobilenet_v2"), 32),
    "ResNet-18": (ModelSpec("resnet18"), 32),
    "ResNet-50": (ModelSpec("resnet50"), 32),
    "WRN-28-10": (ModelSpec("wrn28_10"), 32),
}
# MB that forward and backward of one image move with 16 bits a number, by a model that counts what each layer reads and
# writes and fuses nothing.
MEGABYTES = {
    "ResNet-20": 8.0,
    "WRN-40-2": 30.9,
    "MobileNetV2": 64.8,
    "ResNet-18": 25.5,
    "ResNet-50": 144.0,
    "WRN-28-10": 102.0,
}
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and on what a variant runs."""

    case: plan.Case
    device: torch.device
    dtype: torch.dtype

    def spec(self, method: str = "sam", num_shards: int = 1, seed: int = 0) -> RunSpec:
        """The clip norm is one that gradients of an untrained network exceed."""
        model, pixels = NETWORKS[self.case.network]
        return RunSpec(
            DataSpec("cifar10"),
            model,
            OptimSpec(method, rho=RHO, num_shards=num_shards, lr=0.01, nesterov=True, clip="descent", clip_norm=0.5),
            TrainSpec(ENDLESS, batch_size=self.case.batch, precision=self.case.precision, eval_every=ENDLESS),
            AugmentSpec(flip=True, crop="reflect", cutout=pixels // 2),
            seed,
        )

    def training(
        self,
        method: str = "sam",
        num_shards: int = 1,
        seed: int = 0,
        graph: bool = False,
        compiled: bool = False,
        one_by_one: bool = False,
    ) -> "BenchTraining":
        """A training at its start."""
        kind, spec = OneByOne if one_by_one else BenchTraining, self.spec(method, num_shards, seed)
        with on_random_images(self, IMAGES[self.device.type], NETWORKS[self.case.network][1]):
            return kind.start(spec, self.device, graph, compiled)


class BenchTraining(Training):
    """A training whose inputs have the dtype of its weights."""

    def step_on(self, inputs: Tensor, *batch: Any, **settings: Any) -> Tensor:
        return super().step_on(inputs.to(next(self.model.parameters()).dtype), *batch, **settings)


class OneByOne(BenchTraining):
    """One whose graph has the shards of a mini-batch one after the other, not on streams of their own."""

    def step_on(self, inputs: Tensor, labels: Tensor, *_: Any) -> Tensor:
        closures = self.closures(inputs.to(next(self.model.parameters()).dtype), labels)
        return self.optimizer.step(closures.one_by_one).detach()


@contextmanager
def on_random_images(setting: Setting, count: int, pixels: int) -> Iterator[None]:
    """What starts inside does so on `count` images of random pixels, with weights of the setting's dtype."""
    folder = _images(count, pixels).name
    with torch.random.fork_rng(), _variable("SAMLIB_DATA", folder), _default_dtype(setting.dtype):
        yield


@cache
def _images(count: int, pixels: int) -> TemporaryDirectory:
    """A folder with a data set of random pixels and labels in the form of CIFAR-10, gone when the process ends."""
    folder, rng = TemporaryDirectory(prefix="samlib-bench-"), np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", count), ("test", CLASSES)):
        arrays[f"{split}_images"] = rng.integers(256, size=(size, pixels, pixels, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(CLASSES, size=size, dtype=np.uint8)
    np.savez(Path(folder.name, "cifar10.npz"), **arrays, classes=np.array(list("0123456789")))
    return folder


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------------------------------- loops beside it


class Loop:
    """A training loop around an optimiser, on the weights, the images and the settings of a training."""

    def __init__(self, training: Training, make: Callable[..., Any]) -> None:
        self.training, self.model, self.spec = training, training.model, training.spec
        self.params = list(self.model.parameters())
        self.norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        names = ("lr", "momentum", "nesterov", "weight_decay")
        self.optimizer = make(self.params, **{name: getattr(self.spec.optim, name) for name in names})
        self.base = getattr(self.optimizer, "base", self.optimizer)
        self.steps = 0

    def take(self, indices: Tensor) -> Tensor:
        training, chosen = self.training, indices.to(self.training.device)
        for group in self.base.param_groups:
            group["lr"] = learning_rate(self.spec.optim, self.steps, training.steps)
        self.steps += 1
        labels = training.splits.train.labels[chosen]
        inputs, _ = training.augmented(chosen, labels)
        batch = in_layout(inputs.to(self.params[0].dtype)), labels
        loss = self.backward(*batch)
        if hasattr(self.optimizer, "first_step"):
            self.optimizer.first_step()
            self.optimizer.zero_grad()
            with self.frozen():
                self.backward(*batch)
        nn.utils.clip_grad_norm_(self.params, self.spec.optim.clip_norm)
        (getattr(self.optimizer, "second_step", None) or self.optimizer.step)()
        self.optimizer.zero_grad()
        return loss.detach()

    def backward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward; in fp16 with the engine's loss scale, by which nothing is lost here."""
        scaled = self.spec.train.precision == "fp16"
        with self.arithmetic():
            loss = cross_entropy(self.training.forward(inputs), labels)
            (loss * self.spec.train.loss_scale if scaled else loss).backward()
        if scaled:
            torch._foreach_mul_([p.grad for p in self.params], 1 / self.spec.train.loss_scale)
        return loss

    def arithmetic(self) -> AbstractContextManager:
        precision, device = self.spec.train.precision, self.training.device
        return nullcontext() if (precision, device.type) == ("fp32", "cpu") else arithmetic(precision, device)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Running statistics stay as they are; the layers are looked up once."""
        for norm in self.norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self.norms:
                norm.track_running_stats = True


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels)


# ---------------------------------------------------------------------------------------------- who is compared


def engine(setting: Setting, block: int, **settings: Any) -> Built:
    training = setting.training(**settings)
    return built([training], training.take, setting, block)


def loop(setting: Setting, block: int, make: Callable[..., Any], method: str = "sam", compiled: bool = False) -> Built:
    training = setting.training(method, compiled=compiled)
    return built([training], Loop(training, make).take, setting, block)


def input_pipeline(setting: Setting, block: int, graph: bool = False) -> Built:
    """Images and labels of a step: drawn, augmented, in the layout of the model."""
    training, repeated = setting.training(graph=graph), REPEATED if graph else 1

    def prepare(chosen: Tensor) -> Tensor:
        for _ in range(repeated):
            inputs, _ = training.augmented(chosen, training.splits.train.labels[chosen])
            images = in_layout(inputs)
        return images[0, 0, 0, 0]

    if graph:
        example = torch.zeros(setting.case.batch, dtype=torch.int64, device=setting.device)
        prepare = GraphedStep(prepare, training.optimizer, [example], generators=[training.draws])
    one = built([training], lambda indices: prepare(indices.to(training.device)), setting, block)
    return one._replace(steps=repeated * block)


def seeds(setting: Setting, block: int, graph: bool) -> Built:
    """A step of each of some trainings: one after the other, or as graphs on streams of their own."""
    trainings = [setting.training(seed=seed, graph=graph) for seed in range(plan.SEEDS)]
    batches = [training.batches_left() for training in trainings]
    for training, left in zip(trainings, batches, strict=True):  # graphs are captured one after the other
        for _ in range(GRAPH_STEPS):
            training.take(next(left))
    streams = [training.graphed.stream for training in trainings] if graph else []

    def step(_: Tensor) -> None:
        pairs = zip(trainings, batches, strict=True)
        in_parallel([partial(training.take, next(left)) for training, left in pairs], streams)

    return built(trainings, step, setting, block)


def built(trainings: Sequence[Training], take: Callable[[Tensor], Any], setting: Setting, block: int) -> Built:
    batches = trainings[0].batches_left()
    params = [p for training in trainings for p in training.model.parameters()]

    def run(stopwatch: Stopwatch) -> None:
        with arithmetic("fp32", setting.device), stopwatch:
            for _ in range(block):
                take(next(batches))

    return Built(params, run, block)


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to make one training step.

    Attributes:
        make: sets it up: make(setting, block).
        like: the variant whose update it must make in float64, to `tolerance`; None: it leaves the weights alone.
        passes: forward and backward passes over a batch.
        trainings: how many make their step.
    """

    make: Callable[[Setting, int], Built]
    like: str | None
    passes: int
    trainings: int = 1
    tolerance: float = TOLERANCE


def _msam_variants(num_shards: int) -> dict[str, Variant]:
    makes = {
        "eager": partial(engine, num_shards=num_shards),
        "graph": partial(engine, num_shards=num_shards, graph=True, one_by_one=True),
        "streams": partial(engine, num_shards=num_shards, graph=True),
    }
    eager = plan.engine_msam(num_shards, "eager")
    return {plan.engine_msam(num_shards, way): Variant(make, eager, 2) for way, make in makes.items()}


ONE_BY_ONE = f"{plan.ENGINE}, {plan.SEEDS} seeds one by one"
_peer = partial(PeerSAM, rho=RHO, foreach=True)
VARIANTS: dict[str, Variant] = {
    plan.LOOP_PLAIN: Variant(partial(loop, make=partial(PlainSAM, rho=RHO)), plan.LOOP_PLAIN, 2),
    plan.LOOP_PEER: Variant(partial(loop, make=partial(_peer, base_optimizer=torch.optim.SGD)), plan.LOOP_PLAIN, 2),
    plan.LOOP_FAIR_PEER: Variant(partial(loop, make=partial(_peer, base_optimizer=FusedSGD)), plan.LOOP_PLAIN, 2),
    plan.LOOP_SGD: Variant(partial(loop, make=torch.optim.SGD, method="sgd"), plan.LOOP_SGD, 1),
    **{name: Variant(engine, plan.LOOP_PLAIN, 2) for name in (plan.ENGINE, plan.ENGINE_AGAIN)},
    **{name: Variant(partial(engine, graph=True), plan.LOOP_PLAIN, 2) for name in (plan.GRAPH, plan.GRAPH_AGAIN)},
    plan.ENGINE_SGD: Variant(partial(engine, method="sgd"), plan.LOOP_SGD, 1),
    plan.GRAPH_SGD: Variant(partial(engine, method="sgd", graph=True), plan.LOOP_SGD, 1),
    plan.INPUT: Variant(input_pipeline, None, 0, tolerance=0.0),
    plan.INPUT_GRAPH: Variant(partial(input_pipeline, graph=True), None, 0, tolerance=0.0),
    ONE_BY_ONE: Variant(partial(seeds, graph=False), ONE_BY_ONE, 2, plan.SEEDS),
    plan.SIDE_BY_SIDE: Variant(partial(seeds, graph=True), ONE_BY_ONE, 2, plan.SEEDS),
    **{name: variant for shards in plan.ENGINE_SHARDS for name, variant in _msam_variants(shards).items()},
}
COMPILED = (plan.LOOP_PLAIN, plan.LOOP_FAIR_PEER, plan.ENGINE, plan.GRAPH, plan.GRAPH_SGD)
VARIANTS |= {
    name + plan.COMPILED: replace(VARIANTS[name], make=partial(VARIANTS[name].make, compiled=True)) for name in COMPILED
}


def build(name: str, case: plan.Case, device: torch.device, dtype: torch.dtype, block: int = 1) -> Built:
    """A variant on the network of a case, to be run `block` steps at a time."""
    return VARIANTS[name].make(Setting(case, device, dtype), block)


# ---------------------------------------------------------------------------------------------- what it comes to


def first_step(case: plan.Case, device: torch.device, compiled: bool = False) -> None:
    """A training from its data to its first step; on a GPU to the first replay of its graph."""
    graph = device.type == "cuda"
    steps = GRAPH_STEPS - 1 if graph else 1
    engine(Setting(case, device, torch.float32), steps, graph=graph, compiled=compiled).run(Stopwatch(device))


def ceilings(case: plan.Case, device: torch.device) -> dict[str, Built]:
    """What this machine can do at most: a copy of memory, and a product of matrices at the precision of the case."""
    block = BLOCK if device.type == "cuda" else 1
    source = torch.rand(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    side = MATRIX[device.type]
    left, right = torch.randn(2, side, side, device=device).to(DTYPES.get(case.precision, torch.float32))
    product = torch.empty_like(left)

    def copies(stopwatch: Stopwatch) -> None:
        with stopwatch:
            for _ in range(block):
                target.copy_(source)

    def products(stopwatch: Stopwatch) -> None:
        with arithmetic(case.precision, device), stopwatch:
            for _ in range(block):
                torch.mm(left, right, out=product)

    return {COPY: Built([source], copies, block), MATMUL: Built([left], products, block)}


def throughput(
    case: plan.Case,
    times: Mapping[str, Sequence[Times]],
    device: torch.device,
    waited: float | None,
    variants: Mapping[str, Variant] = MappingProxyType(VARIANTS),
    operations: int | None = None,
) -> Iterator[Row]:
    """A row for each variant that trains, as this process saw it; `waited` are the seconds to the engine's first step.

    Seconds are processor time on a CPU and time between events on a GPU. An epoch is extrapolated from the images per
    second. Shares of the ceilings are medians of paired ratios with 95 % intervals: operations are those of
    convolutions and linear layers (of one image; by default of the case's network), bytes those of `MEGABYTES`.
    """
    seconds = {name: [one.device for one in series] for name, series in times.items()}
    of_copy, of_product = 8 * COPIED[device.type], 2 * MATRIX[device.type] ** 3
    moved = megabytes(case) * 1e6
    operations = operations_per_image(case.network) if operations is None else operations
    for name in case.timed:
        passes, images = variants[name].passes, case.batch * variants[name].trainings
        if not passes:
            continue
        per_second = images / statistics.median(seconds[name])
        computed = operations * passes * images / of_product  # in products of matrices
        copied = moved * passes * images / of_copy
        yield {
            "section": case.section,
            "network": case.network,
            "batch": case.batch,
            "precision": case.precision,
            "variant": name,
            "images_per_second": per_second,
            "epoch_seconds": plan.EPOCH / per_second,
            "epoch_goal": epoch_goal(case, name),
            "of_matmul": [computed * end for end in paired_ratio(seconds[MATMUL], seconds[name])],
            "of_copy": [copied * end for end in paired_ratio(seconds[COPY], seconds[name])] if moved else None,
            "matmul_tflops": of_product / statistics.median(seconds[MATMUL]) / 1e12,
            "copy_gb_per_second": of_copy / statistics.median(seconds[COPY]) / 1e9,
            "first_step_seconds": waited if name == engine_of(device) else None,
        }


def engine_of(device: torch.device) -> str:
    """The engine as it is fastest here."""
    return plan.GRAPH if device.type == "cuda" else plan.ENGINE


def epoch_goal(case: plan.Case, name: str) -> float | None:
    """Goals are for a graph in 16 bits."""
    graphs = (plan.GRAPH, plan.GRAPH + plan.COMPILED)
    return plan.EPOCH_GOALS.get(case.network) if name in graphs and case.precision in DTYPES else None


def megabytes(case: plan.Case) -> float:
    """Of forward and backward of one image at the precision of the case; 0 where the model does not know."""
    return MEGABYTES.get(case.network, 0.0) * (1 if case.precision in DTYPES else 2)


@cache
def operations_per_image(network: str) -> int:
    """Of forward and backward."""
    spec, pixels = NETWORKS[network]
    with torch.device("meta"):
        return operations(models.build(spec, (3, pixels, pixels), CLASSES, generator(0, "init")), pixels)


def operations(model: nn.Module, pixels: int) -> int:
    """Of forward and backward of one image: two a product, three products a weight and place of its output; but the
    gradient by the images is not taken."""
    counted: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        products = layer.weight.numel() * output[0].numel() // layer.weight.shape[0]
        counted.append(2 * products * (3 if counted else 2))

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.zeros(2, 3, pixels, pixels))
    return sum(counted)
