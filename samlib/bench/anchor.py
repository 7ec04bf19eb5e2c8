"""An anchor: the engine's step of SGD on one network beside a loop that was written for that network and nothing else.

Network and loop are in the style of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"), after
its description: images on the device in half precision, channels last, flipped in every other epoch and cropped for a
whole epoch at once; a first layer that whitens patches and is not trained; blocks of convolutions, batch norm and GELU;
logits divided by 9, label smoothing 0.2, Nesterov SGD, batches of 1024; weights in half precision but for batch norm.
Lookahead, a learning rate of its own for biases and several views of a test image are left out. The engine does the
same work its own way: images augmented batch by batch, weights in float32, autocast.

`python -m samlib.bench.anchor [EPOCHS]` trains the loop on CIFAR-10 (SAMLIB_DATA) and prints seconds and accuracy.
Updates are compared without augmentation, whose random numbers are not the same.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from samlib.bench import engine, plan
from samlib.bench.engine import BenchTraining, Row, Setting, Variant
from samlib.bench.protocol import Built
from samlib.closures import in_layout
from samlib.graph import make_static
from samlib.spec import AugmentSpec, DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.train import Training, build_optimizer, choose_device, evaluate, learning_rate

PIXELS, PAD, SMOOTHING = 32, 2, 0.2
SIZES = {"cpu": (256, 8), "cuda": (plan.EPOCH, 64)}  # images, and channels of the first block
PATCHED = 1000  # images whose patches are whitened
SGD = OptimSpec("sgd", lr=1.5, momentum=0.85, nesterov=True, weight_decay=0.00133, schedule="one_cycle", warmup=0.23)
AUGMENT, NO_AUGMENT = AugmentSpec(flip=True, crop="reflect"), AugmentSpec()


# ---------------------------------------------------------------------------------------------- the network


def network(images: Tensor, width: int) -> nn.Module:
    """(n, 3, 32, 32) -> (n, 10); its first layer whitens the patches of `images`."""
    first = nn.Conv2d(3, 24, 2)
    _freeze(first, whitening(images))
    blocks = [_block(before, after) for before, after in pairwise((24, width, 4 * width, 4 * width))]
    head = [nn.MaxPool2d(3), nn.Flatten(), nn.Linear(4 * width, engine.CLASSES, bias=False), _Ninth()]
    return nn.Sequential(first, nn.GELU(), *blocks, *head)


def whitening(images: Tensor) -> Tensor:
    """Filters (24, 3, 2, 2): the twelve that make patches of 2 x 2 pixels uncorrelated and of variance 1, and their
    negatives, of which GELU would pass only one half."""
    patches = functional.unfold(images.cpu().float(), 2).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters])


def _block(before: int, after: int) -> nn.Module:
    """At first its convolutions hand on what they are given, in as many channels as there are."""
    layers = [nn.Conv2d(channels, after, 3, padding=1, bias=False) for channels in (before, after)]
    norms = [nn.BatchNorm2d(after, momentum=0.4) for _ in layers]
    for layer, norm in zip(layers, norms, strict=True):
        nn.init.dirac_(layer.weight.data[: layer.in_channels])
        _freeze(norm, torch.ones(after))
    return nn.Sequential(layers[0], nn.MaxPool2d(2), norms[0], nn.GELU(), layers[1], norms[1], nn.GELU())


def _freeze(layer: nn.Module, weight: Tensor) -> None:
    """A weight that no optimiser sees; its bias is trained."""
    del layer.weight
    layer.register_buffer("weight", weight)


class _Ninth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 9


# ---------------------------------------------------------------------------------------------- the loop


class Loop:
    """A loop of SGD for this network, on the weights and the images of a training that is at its start; where that is
    in fp16, with weights and images in half precision."""

    def __init__(self, training: Training, compiled: bool = False) -> None:
        self.training, self.model, self.steps = training, training.model, 0
        self.forward = _compiled(self.model) if compiled else self.model
        dtype = next(self.model.parameters()).dtype
        if (training.spec.train.precision, dtype) == ("fp16", torch.float32):
            dtype = torch.float16
            for layer in self.model.modules():
                if not isinstance(layer, (nn.Sequential, nn.BatchNorm2d)):
                    layer.half()
        images = functional.pad(training.splits.train.inputs, [PAD] * 4, "reflect")
        self.padded, self.labels = in_layout(images.to(dtype)), training.splits.train.labels
        self.flipped = torch.rand(len(images), device=images.device) < 0.5  # in every other epoch
        spec, batch = training.spec.optim, training.spec.train.batch_size
        rates = {"lr": spec.lr / batch, "weight_decay": spec.weight_decay * batch}  # the loss is a sum over the batch
        settings = {"momentum": spec.momentum, "nesterov": True, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **rates, **settings)

    def take(self, indices: Tensor) -> Tensor:
        if self.steps % self.training.steps_per_epoch == 0:
            self.images = self.epoch()
            self.training.epoch_order = self.training.order.get_state()  # the next epoch has another order
        self.steps += 1
        inputs, labels = in_layout(self.images[indices]), self.labels[indices]
        logits = self.forward(inputs).float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="sum")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self) -> Tensor:
        """All images, flipped and cropped anew."""
        if not self.training.augmentation.active:
            return self.padded[:, :, PAD:-PAD, PAD:-PAD]
        count, device = len(self.padded), self.padded.device
        self.flipped = ~self.flipped
        rows, columns = torch.randint(2 * PAD + 1, (2, count, 1), device=device) + torch.arange(PIXELS, device=device)
        columns = torch.where(self.flipped[:, None], columns.flip(1), columns)
        images = torch.arange(count, device=device)[:, None, None]
        cropped = self.padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return cropped if cropped.is_cuda else cropped.contiguous()  # in the engine's layout


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, dynamic=False)


# ---------------------------------------------------------------------------------------------- who is compared


def training(setting: Setting, graph: bool = False, compiled: bool = False) -> BenchTraining:
    """A training of the engine on this network; without augmentation where updates are compared, in float64."""
    case, (count, width) = setting.case, SIZES[setting.device.type]
    augment = NO_AUGMENT if setting.dtype == torch.float64 else AUGMENT
    spec = _spec(engine.ENDLESS, case.batch, case.precision, augment)
    constant = dataclasses.replace(SGD, lr=0.1, schedule="constant", warmup=0.05)
    with engine.on_random_images(setting, count, PIXELS):
        started = BenchTraining.start(dataclasses.replace(spec, optim=constant), setting.device, graph)
        return _on_network(started, width, setting.dtype, graph, compiled)


def _spec(epochs: int, batch: int, precision: str, augment: AugmentSpec) -> RunSpec:
    train = TrainSpec(epochs, batch_size=batch, precision=precision, label_smoothing=SMOOTHING, eval_every=epochs)
    return RunSpec(DataSpec("cifar10"), ModelSpec("cnn"), SGD, train, augment)


def _on_network(
    started: BenchTraining, width: int, dtype: torch.dtype, graph: bool = False, compiled: bool = False
) -> BenchTraining:
    """The same training with this network in place of its own."""
    torch.manual_seed(0)
    layout = torch.channels_last if started.device.type == "cuda" else torch.contiguous_format
    model = network(started.splits.train.inputs[:PATCHED], width).to(started.device, dtype, memory_format=layout)
    optimizer = build_optimizer(started.spec, model, graph)
    if graph:
        make_static(optimizer)
    forward = _compiled(model) if compiled else model
    return dataclasses.replace(started, model=model, optimizer=optimizer, forward=forward)


def sgd(setting: Setting, block: int, graph: bool = False, compiled: bool = False) -> Built:
    one = training(setting, graph, compiled)
    return engine.built([one], one.take, setting, block)


def by_hand(setting: Setting, block: int, compiled: bool = False) -> Built:
    one = training(setting)
    return engine.built([one], Loop(one, compiled).take, setting, block)


MAKES = {plan.ANCHOR: by_hand, plan.ENGINE_SGD: sgd, plan.GRAPH_SGD: partial(sgd, graph=True)}
MAKES |= {name + plan.COMPILED: partial(make, compiled=True) for name, make in MAKES.items()}
VARIANTS = {name: Variant(make, plan.ANCHOR, passes=1) for name, make in MAKES.items()}


def build(name: str, case: plan.Case, device: torch.device, dtype: torch.dtype, block: int = 1) -> Built:
    """A variant on this network, to be run `block` steps at a time."""
    return VARIANTS[name].make(Setting(case, device, dtype), block)


def throughput(case: plan.Case, times: dict, device: torch.device, waited: float | None) -> Iterator[Row]:
    """As `engine.throughput`."""
    with torch.random.fork_rng():
        model = network(torch.rand(2, 3, PIXELS, PIXELS), SIZES[device.type][1])
    operations = engine.operations(model, PIXELS)
    return engine.throughput(case, times, device, waited, VARIANTS, operations)


# ---------------------------------------------------------------------------------------------- is it a fair one?


def train(epochs: int, device: torch.device, width: int = 64, batch: int = 1024) -> tuple[float, float]:
    """Trains the loop on CIFAR-10 as it lies on disk.

    Returns:
        Seconds, and its accuracy in percent on the test images, each looked at once.
    """
    precision = "fp16" if device.type == "cuda" else "fp32"
    started = BenchTraining.start(_spec(epochs, batch, precision, AUGMENT), device)
    loop = Loop(_on_network(started, width, torch.float32))
    begun = time.perf_counter()
    for step, indices in enumerate(islice(loop.training.batches_left(), loop.training.steps)):
        loop.optimizer.param_groups[0]["lr"] = learning_rate(SGD, step, loop.training.steps) / batch
        loop.take(indices)
    loop.model.float()
    accuracy = evaluate(loop.model, started.splits.test, "test")["test_accuracy_pct"]  # it waits for the device
    return time.perf_counter() - begun, accuracy


if __name__ == "__main__":
    print("{:.2f} s, {:.2f} % of the test images".format(*train(int([*sys.argv, "10"][1]), choose_device(None))))
