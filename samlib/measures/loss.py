"""The loss of a model on fixed data as a function of its weights: the one object that every measure sees."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlib.errors import InputError

# every layer whose output in training depends on the other examples of the batch
_NORMALISATION = nn.modules.batchnorm._NormBase


class WeightLoss:
    """Mean cross entropy of `model` on fixed data, as a function L(w) of the trainable weights w.

    L(w) = 1/N sum_i CE(model_w(x_i), y_i) + weight_decay/2 ||w||^2

    The weights are the parameters with `requires_grad`, in the order of `model.parameters()`. Their `.grad` is left
    alone. Modes and buffers of the model are the same, bit for bit, after each call and after each error.

    Args:
        model: network from inputs (N, ...) to logits (N, K), on the device and in the precision of the inputs.
        inputs: (N, ...), what the network is fed; normalise before, nothing is augmented here.
        targets: (N,) class indices.
        batch_size: examples per forward pass, to bound memory; the last batch may be smaller and weighs by its size,
            so in eval mode the result does not depend on it. None: all at once.
        weight_decay: the coefficient added to the gradient (errata E-X4), so L gains half of it times ||w||^2.
        label_smoothing: share of the target spread over all K classes (eps / K each).
        train_mode: batch norm uses the statistics of each batch, and its running ones are neither read nor written
            (the protocol of boca2023, errata E-B12). L then depends on the batches. Dropout stays off: L is a function.

    Attributes:
        parameters: the trainable parameters themselves, for measures that differentiate; `weights()` for all others.

    Raises:
        InputError: sizes that do not fit, or a model without trainable weights.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int | None = None,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        train_mode: bool = False,
    ):
        _check_data(inputs, targets)
        self.model, self.inputs, self.targets = model, inputs, targets
        self.batch_size = len(targets) if batch_size is None else check_count("batch_size", batch_size)
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.train_mode = train_mode
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("model: no parameter has requires_grad; unfreeze at least one")

    def __len__(self) -> int:
        """Number of examples N."""
        return len(self.targets)

    def weights(self) -> list[Tensor]:
        """The weights w, detached but sharing memory with the model: clone what has to outlive a change of w."""
        return [p.detach() for p in self.parameters]

    def value(self) -> float:
        """L(w), summed over the batches in double precision."""
        with torch.no_grad(), self.measuring():
            return sum(term.double() for term in self.terms()).item()

    def gradient(self) -> list[Tensor]:
        """dL/dw, one tensor per weight; zeros where a weight has no influence."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, list[Tensor]]:
        """(L(w), dL/dw) from one pass over the data."""
        value, total = 0.0, [torch.zeros_like(w) for w in self.weights()]
        with torch.enable_grad(), self.measuring():
            for term in self.terms():
                torch._foreach_add_(total, torch.autograd.grad(term, self.parameters, materialize_grads=True))
                value = value + term.detach().double()
        return value.item(), total

    def terms(self) -> Iterator[Tensor]:
        """Scalars that sum to L(w), one per batch and weighted by its size; to be read inside `measuring()`."""
        for x, y in zip(self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True):
            loss = F.cross_entropy(self.model(x), y, reduction="sum", label_smoothing=self.label_smoothing)
            yield loss / len(self)
        if self.weight_decay:
            yield 0.5 * self.weight_decay * sum(p.square().sum() for p in self.parameters)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Put every module in the mode of this measure; afterwards the modes and buffers are as they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        batch_norms = [m for m, _ in modes if isinstance(m, _NORMALISATION)] if self.train_mode else []
        tracked = [m.track_running_stats for m in batch_norms]
        buffers = list(self.model.buffers())
        saved = [b.clone() for b in buffers]
        try:
            self.model.eval()
            for module in batch_norms:
                module.training, module.track_running_stats = True, False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, flag in zip(batch_norms, tracked, strict=True):
                module.track_running_stats = flag
            _restore(buffers, saved)

    def shards(self, shard_size: int) -> list["WeightLoss"]:
        """The losses of consecutive disjoint shards of `shard_size` examples; the last one may be smaller."""
        check_count("shard_size", shard_size)
        parts = zip(self.inputs.split(shard_size), self.targets.split(shard_size), strict=True)
        return [
            WeightLoss(
                self.model,
                x,
                y,
                batch_size=min(self.batch_size, len(y)),
                weight_decay=self.weight_decay,
                label_smoothing=self.label_smoothing,
                train_mode=self.train_mode,
            )
            for x, y in parts
        ]

    @contextmanager
    def at(self, eps: Sequence[Tensor]) -> Iterator["WeightLoss"]:
        """Within the block the model's weights are w + eps; afterwards w and the buffers are back, bit for bit."""
        self._check_shapes(eps)
        held = [*self.weights(), *self.model.buffers()]
        saved = [t.clone() for t in held]
        try:
            with torch.no_grad():
                torch._foreach_add_(self.weights(), list(eps))
            yield self
        finally:
            _restore(held, saved)

    def _check_shapes(self, eps: Sequence[Tensor]) -> None:
        wanted, found = [tuple(w.shape) for w in self.parameters], [tuple(e.shape) for e in eps]
        if wanted != found:
            raise InputError(f"eps: shapes {found}, the weights have {wanted}; give one tensor per weight, in order")


def check_count(name: str, value: int) -> int:
    """`value` if it is a whole number of at least 1; an InputError that names it if not."""
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: {value!r} is not a positive whole number; give at least 1")
    return value


def _check_data(inputs: Tensor, targets: Tensor) -> None:
    if len(inputs) != len(targets) or not len(targets):
        raise InputError(f"targets: {len(targets)} for {len(inputs)} inputs; give one per input, and at least one")


def _restore(held: list[Tensor], saved: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, copy in zip(held, saved, strict=True):
            tensor.copy_(copy)
