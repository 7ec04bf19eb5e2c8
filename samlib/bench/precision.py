"""SAM in low precision: what acts of its perturbation, and what layers as two products gain and cost.

Networks a few steps old, on scikit-learn's digits, each number the median over some mini-batches. The perturbation is
always the one of the float32 gradient, so a row compares passes at the same w and w + eps. Convolutions and matrix
products in bf16 are those of autocast on the CPU; for fp16 and TF32 the rounding of the weights alone is emulated.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlib import data, models
from samlib.batchnorm import second_pass
from samlib.bench.protocol import paired_ratio
from samlib.measures.precision import LowPrecisionWarning, acting_perturbation, round_to_tf32
from samlib.optim import SAM
from samlib.two_products import two_products

RHOS = (0.05, 0.1, 0.2)
PRECISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": Tensor.bfloat16,
    "fp16": Tensor.half,
    "tf32": round_to_tf32,
}
BATCH, STEPS, BATCHES, ROUNDS = 64, 10, 3, 12
# network, and the pixels that a digit of 8 x 8 is enlarged to on each side
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small CNN": (lambda: models.small_cnn(3, 10), 8),
    "MLP": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 512), nn.ReLU(), nn.Linear(512, 10)), 8),
    "ResNet-20": (models.resnet20, 32),
    "ResNet-18": (models.resnet18, 16),
}
Row = dict[str, Any]


def rows(networks: tuple[str, ...] = tuple(NETWORKS), rhos: tuple[float, ...] = RHOS) -> list[Row]:
    """One row for each network, rho and precision; 80 s of CPU time on one core.

    Returns:
        Rows of plain values: network, weights (their number), pixels, batch, rho, precision; rounding_norm, the
        distance ||round(w) - w|| in units of rho; and norm_ratio, cosine, unmoved_fraction of the perturbation that
        acts (`acting_perturbation`). For bf16 also the following, None for the others, where g is the gradient and an
        error is ||found - expected|| / ||expected||, expected in float32:

        * rise, the loss at w + eps less that at w, in float32; rise_error, that difference taken in bf16, relative to
          it, less 1; rise_error_two_products;
        * gradient_error_at_w, of g(w): what bf16 does without any perturbation;
        * gradient_error, of g(w + eps); gradient_error_two_products;
        * change_error, of g(w + eps) - g(w), in which the errors of the two passes partly cancel;
          change_error_two_products;
        * time_ratio, time_low, time_high: CPU time of a second pass, forward and backward, with two products over that
          without: median of paired ratios and its 95 % interval. Once for each network.
    """
    found = []
    for name in networks:
        with _seeded():
            build, pixels = NETWORKS[name]
            batches = _digits(pixels)
            model = _trained(build(), batches)
            times = _time_ratio(model, batches[0])
            size = sum(w.numel() for w in model.parameters())
            row = {"network": name, "weights": size, "pixels": pixels, "batch": BATCH}
            found += [{**row, **columns, **times[columns["precision"]]} for columns in _errors(model, batches, rhos)]
    return found


def _errors(model: nn.Module, batches: list["Batch"], rhos: tuple[float, ...]) -> Iterator[Row]:
    measured = [_of_batch(model, batch, rhos) for batch in batches[:BATCHES]]
    for rho in rhos:
        for precision in PRECISIONS:
            of_batches = [one[rho][precision] for one in measured]
            columns = {key: _median([one[key] for one in of_batches]) for key in of_batches[0]}
            yield {
                "rho": rho,
                "precision": precision,
                "rounding_norm": _rounding_norm(model, precision) / rho,
                **columns,
            }


def _of_batch(model: nn.Module, batch: "Batch", rhos: tuple[float, ...]) -> dict[float, dict[str, Row]]:
    """rho -> precision -> columns, for the perturbations of one mini-batch."""
    exact_at_w, rounded_at_w = _passed(model, batch), _passed(model, batch, _bf16())
    found = {}
    for rho in rhos:
        with _perturbed(model, exact_at_w.gradients, rho) as opt:
            exact, rounded = _passed(model, batch), _passed(model, batch, _bf16())
            split = _passed(model, batch, _bf16(), two_products(opt))
            acting = {precision: _acting(opt, precision) for precision in PRECISIONS}
        columns = _columns(exact_at_w, rounded_at_w, exact, {"": rounded, "_two_products": split})
        empty = dict.fromkeys(columns)
        found[rho] = {name: {**row, **(columns if name == "bf16" else empty)} for name, row in acting.items()}
    return found


def _columns(exact_at_w: "_Passed", rounded_at_w: "_Passed", exact: "_Passed", rounded: dict[str, "_Passed"]) -> Row:
    rise, change = exact.loss - exact_at_w.loss, exact.flat - exact_at_w.flat
    columns = {"rise": rise, "gradient_error_at_w": _error(rounded_at_w.flat, exact_at_w.flat)}
    for end, one in rounded.items():
        columns["rise_error" + end] = (one.loss - rounded_at_w.loss) / rise - 1
        columns["gradient_error" + end] = _error(one.flat, exact.flat)
        columns["change_error" + end] = _error(one.flat - rounded_at_w.flat, change)
    return columns


def _time_ratio(model: nn.Module, batch: "Batch", rho: float = 0.1) -> dict[str, Row]:
    """precision -> columns: the second pass with two products over that without, in CPU time."""
    spent: dict[str, list[float]] = {"split": [], "plain": []}
    with _perturbed(model, _passed(model, batch).gradients, rho) as opt:
        for index in range(ROUNDS + 1):
            for name in sorted(spent, reverse=index % 2 == 0):  # each goes first in every second round
                context = two_products(opt) if name == "split" else nullcontext()
                start = time.process_time()
                _passed(model, batch, _bf16(), context)
                spent[name].append(time.process_time() - start)
    ratio = paired_ratio(spent["split"][1:], spent["plain"][1:])  # the first round warms up
    columns = dict(zip(("time_ratio", "time_low", "time_high"), ratio, strict=True))
    return {precision: columns if precision == "bf16" else dict.fromkeys(columns) for precision in PRECISIONS}


# ------------------------------------------------------------------------------------------------------------- passes

Batch = tuple[Tensor, Tensor]


class _Passed(NamedTuple):
    loss: float
    gradients: tuple[Tensor, ...]

    @property
    def flat(self) -> Tensor:
        """The gradients as one double-precision vector."""
        return torch.cat([grad.flatten() for grad in self.gradients]).double()


def _passed(model: nn.Module, batch: Batch, *contexts: AbstractContextManager) -> _Passed:
    """A forward pass in the contexts, and its backward pass."""
    first, second = (*contexts, nullcontext(), nullcontext())[:2]
    with second_pass(model), first, second:
        loss = F.cross_entropy(model(batch[0]), batch[1])
    return _Passed(loss.item(), torch.autograd.grad(loss, list(model.parameters())))


@contextmanager
def _perturbed(model: nn.Module, gradients: tuple[Tensor, ...], rho: float) -> Iterator[SAM]:
    """The model at w + eps, stored in float32; at w again afterwards."""
    opt = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.0)
    for w, grad in zip(model.parameters(), gradients, strict=True):
        w.grad = grad.clone()
    opt.first_step(zero_grad=True)
    try:
        yield opt
    finally:
        opt.second_step()


def _bf16() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


def _acting(opt: SAM, precision: str) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowPrecisionWarning)  # the rows say it
        return acting_perturbation(opt, precision)


def _rounding_norm(model: nn.Module, precision: str) -> float:
    rounded = PRECISIONS[precision]
    squares = [(rounded(w.detach()).double() - w.detach()).square().sum() for w in model.parameters()]
    return torch.stack(squares).sum().sqrt().item()


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _median(values: list[float | None]) -> float | None:
    return None if None in values else statistics.median(values)


# -------------------------------------------------------------------------------------------------- networks and data


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _digits(pixels: int) -> list[Batch]:
    """Mini-batches in three channels, enlarged to pixels x pixels, of mean 0 and variance 1."""
    images = data.read("digits")
    inputs = torch.from_numpy(images.train_images).permute(0, 3, 1, 2).float()
    inputs = F.interpolate((inputs - inputs.mean()) / inputs.std(), (pixels, pixels)).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(inputs))
    labels = torch.from_numpy(images.train_labels).long()
    return list(zip(inputs[order].split(BATCH), labels[order].split(BATCH), strict=True))


def _trained(model: nn.Module, batches: list[Batch]) -> nn.Module:
    """A few steps of SGD, on other mini-batches than those that are measured."""
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for inputs, labels in batches[BATCHES : BATCHES + STEPS]:
        opt.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        opt.step()
    return model
