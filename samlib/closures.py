"""The closures of one training step: what an optimiser is given for a mini-batch, at the settings of a run."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import pairwise
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samlib import batchnorm
from samlib.arithmetic import arithmetic
from samlib.graph import ParallelShards
from samlib.spec import RunSpec
from samlib.two_products import two_products


class Mixed(NamedTuple):
    """What mixup adds to a mini-batch: the labels of the images mixed in, (n,), and the shares the images themselves
    have, (n,)."""

    labels: Tensor
    share: Tensor


class Closures:
    """The closures of one step: one per shard of the mini-batch, each called first at w and then at w + eps.

    Args:
        spec: of the run.
        model: in training mode.
        optimizer: the one that will step.
        inputs: (n, ...), images of one mini-batch.
        labels: (n,).
        mixed: what mixup adds.
        whole: one closure, of the whole mini-batch.
        in_place: gradients stay where they are, as a graph needs.
        forward: `model`, or the same function compiled.
    """

    def __init__(
        self,
        spec: RunSpec,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Tensor,
        labels: Tensor,
        mixed: Mixed | None = None,
        whole: bool = False,
        in_place: bool = False,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.spec, self.model, self.optimizer = spec, model, optimizer
        self.inputs, self.labels, self.mixed, self.in_place = in_layout(inputs), labels, mixed, in_place
        self.forward = model if forward is None else forward
        self.parts = [slice(0, len(labels))] if whole else self._split(len(labels))
        sizes = [part.stop - part.start for part in self.parts]
        self.weights = None if len(set(sizes)) == 1 else [size / len(labels) for size in sizes]
        self._perturbed: list[Tensor] = []

    @property
    def one_by_one(self) -> list[Callable[[], Tensor]]:
        """Made when asked for: kept here they would keep the images alive until a garbage collection."""
        return [partial(self.loss_and_gradient, part) for part in self.parts]

    def loss_and_gradient(self, part: slice) -> Tensor:
        """What every optimiser of samlib calls: clears the gradients, computes the loss, calls backward."""
        self._clear_gradients()
        with self._batch_norm(part), self.arithmetic():
            with self._products():
                loss = self._loss(part)
            if self.spec.train.precision == "fp16":
                self._backward_scaled(loss)
            else:
                loss.backward()
        if getattr(self.optimizer, "at_perturbed_point", False):
            self._perturbed.append(loss.detach())
        elif self.spec.optim.clip == "both":
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.optim.clip_norm)
        return loss

    def _clear_gradients(self) -> None:
        if self.in_place:
            self.optimizer.zero_grad(set_to_none=False)
            return
        for group in self.optimizer.param_groups:  # zero_grad takes a tenth of a small network's step
            for parameter in group["params"]:
                parameter.grad = None

    def arithmetic(self) -> AbstractContextManager:
        name, device = self.spec.train.precision, self.inputs.device
        return nullcontext() if name == "fp32" and device.type == "cpu" else arithmetic(name, device)

    def _products(self) -> AbstractContextManager:
        """Two of each layer at w + eps, where the run asks for that; it does nothing at w."""
        return two_products(self.optimizer) if self.spec.optim.second_pass == "two_products" else nullcontext()

    def perturbed_loss(self) -> Tensor:
        """The mean over shards of the loss at w + eps in the step just made; NaN if the step was skipped on the way."""
        if len(self._perturbed) < len(self.parts):
            return torch.full((), math.nan, device=self.labels.device)
        weights = self.weights or [1 / len(self.parts)] * len(self.parts)
        return torch.stack([weight * loss for weight, loss in zip(weights, self._perturbed, strict=True)]).sum()

    def _split(self, size: int) -> list[slice]:
        wanted = self.spec.optim.shard_size
        if wanted is None:
            count = min(self.spec.optim.num_shards, size)  # the last batch of an epoch may be smaller
            edges = [round(index * size / count) for index in range(count + 1)]
        else:
            edges = [*range(0, size, wanted), size]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def _loss(self, part: slice) -> Tensor:
        if self.spec.optim.shard_batchnorm == "batch":  # statistics of the whole mini-batch, loss of the shard
            logits = self.forward(self.inputs)[part]
        else:
            logits = self.forward(self.inputs[part])
        loss = self.cross_entropy(logits, part)
        if self.spec.optim.weight_decay_in == "loss":
            squares = torch.stack([p.square().sum() for p in self.model.parameters()]).sum()
            loss = loss + 0.5 * self.spec.optim.weight_decay * squares
        return loss

    def cross_entropy(self, logits: Tensor, part: slice | Tensor) -> Tensor:
        """The mean over the images of `part`, a slice of the mini-batch or indices into it."""
        logits = logits.float()
        loss_of = partial(functional.cross_entropy, label_smoothing=torch_smoothing(self.spec, logits.shape[1]))
        if self.mixed is None:
            return loss_of(logits, self.labels[part])
        own, other = (loss_of(logits, labels[part], reduction="none") for labels in (self.labels, self.mixed.labels))
        share = self.mixed.share[part]
        return (share * own + (1 - share) * other).mean()

    def _backward_scaled(self, loss: Tensor) -> None:
        """Small gradients are zero in float16 unless they are scaled up; the optimiser sees them as they are. One that
        overflows is not finite, and the optimiser skips its step."""
        scale = self.spec.train.loss_scale
        (loss * scale).backward()
        torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], 1 / scale)

    def _batch_norm(self, part: slice) -> AbstractContextManager:
        if getattr(self.optimizer, "in_second_pass", False):
            return batchnorm.second_pass(self.model, self.spec.optim.second_pass_batchnorm)
        if self.spec.optim.shard_batchnorm == "batch" and part.start:
            return batchnorm.second_pass(self.model, "frozen")  # the first shard's pass has counted the whole batch
        return nullcontext()


def torch_smoothing(spec: RunSpec, num_classes: int) -> float:
    """PyTorch spreads epsilon over all K classes; spread over the K-1 wrong ones it is K/(K-1) times as much."""
    epsilon = spec.train.label_smoothing
    return epsilon if spec.train.smoothing_convention == "K" else epsilon * num_classes / (num_classes - 1)


def in_layout(inputs: Tensor) -> Tensor:
    """Images as the convolutions of a GPU like them: channels last. On a CPU as they are."""
    images_on_gpu = inputs.is_cuda and inputs.ndim == 4
    return inputs.contiguous(memory_format=torch.channels_last) if images_on_gpu else inputs


# ---------------------------------------------------------------------------------------------- other ways to the same


class StreamedClosures(ParallelShards):
    """The closures of a step, each with weights and gradients of its own, on a few streams of a GPU.

    Args:
        closures: those of the step, for which `can_stream` holds.
        streams: as for `ParallelShards`.
    """

    def __init__(self, closures: Closures, streams: "Sequence[torch.cuda.Stream]" = ()) -> None:
        settings, size = closures.spec.optim, len(closures.labels)
        cut = {"shard_size": settings.shard_size} if settings.shard_size else {"num_shards": settings.num_shards}
        images = torch.arange(size, device=closures.labels.device)
        batch = closures.optimizer, closures.model, closures.cross_entropy, closures.inputs, images
        super().__init__(*batch, streams=streams, statistics=settings.second_pass_batchnorm, **cut)
        self.arithmetic = closures.arithmetic

    def _differentiate(self, *args: Any) -> tuple[Tensor, list[Tensor | None]]:
        with self.arithmetic():
            return super()._differentiate(*args)


def can_stream(spec: RunSpec, size: int) -> bool:
    """Whether the shards of a mini-batch of `size` images can have weights of their own: they are of one size, and
    nothing else is asked for in between."""
    settings, train = spec.optim, spec.train
    shards = settings.num_shards if settings.shard_size is None else size / settings.shard_size
    between = [
        settings.clip == "both",
        settings.weight_decay_in == "loss",
        settings.second_pass == "two_products",
        settings.shard_batchnorm == "batch",
        spec.model.dropout > 0,  # it would draw other masks
        train.logged_loss == "w+eps",
        train.precision == "fp16",
    ]
    return settings.method in ("sam", "asam") and shards > 1 and size % shards == 0 and not any(between)


def compiled(model: nn.Module, spec: RunSpec) -> Callable[[Tensor], Tensor]:
    """`model(inputs)` in kernels that torch.compile makes, without graph trees. Runs of the same network on batches and
    shards of the same sizes, at the same precision, share them: with another seed nothing is compiled anew."""
    settings, train = spec.optim, spec.train
    sizes = train.batch_size, settings.num_shards, settings.shard_size, settings.shard_batchnorm
    return partial(_compiled_call(spec.model, *sizes, train.precision), model)


@cache
def _compiled_call(*_: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    """torch compiles every shape and every state of batch norm for itself, and counts them, against a limit of 8, with
    a function's code: so each setting has a copy of it."""
    copied = FunctionType(_call.__code__.replace(), _call.__globals__)
    return torch.compile(copied, fullgraph=True, dynamic=False)


def _call(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)
