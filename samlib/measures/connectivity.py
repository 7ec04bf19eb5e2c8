"""Paths between two sets of weights: a polygonal chain with one trained bend, and the plane it lies in.

A path is given by its nodes, each a list of tensors as `[p for p in model.parameters()]`: two nodes are a straight
line, three a chain with one bend. Weights are interpolated; batch-norm statistics are not, because those of a mixture
of two networks are not a mixture of theirs. They are estimated anew on the training images wherever a loss is taken.

Source: Garipov et al. 2018 (arXiv:1802.10026), sections 3.2 to 3.4 and appendix A.2.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from samlib import batchnorm
from samlib.errors import InputError
from samlib.measures.loss import check_count

Weights = Sequence[Tensor]
Labelled = tuple[Tensor, Tensor]  # inputs (n, ...) and class indices (n,)

BATCH = 1024  # images per forward pass of an evaluation
COLLINEAR = 1e-6  # of the distance of the ends: a bend nearer to their line than this spans no plane with them

# ---------------------------------------------------------------------------------------------- the path


def point(nodes: Sequence[Weights], t: float) -> list[Tensor]:
    """The weights at t of the polygonal chain through `nodes`: node k of K + 1 lies at t = k / K, exactly.

    Raises:
        InputError: fewer than two nodes, nodes of unequal shapes, or t outside [0, 1].
    """
    _check_nodes(nodes)
    if not 0 <= t <= 1:
        raise InputError(f"t = {t!r} is outside the path: use a number from 0 to 1")
    segments = len(nodes) - 1
    before = min(int(t * segments), segments - 1)
    share = t * segments - before
    return [torch.lerp(a, b, share) for a, b in zip(nodes[before], nodes[before + 1], strict=True)]


def train_bend(
    model: nn.Module,
    start: Weights,
    end: Weights,
    batches: Iterable[Labelled],
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bend: Weights | None = None,
    rng: torch.Generator,
) -> list[Tensor]:
    r"""The bend that lowers the mean of the loss along the chain start - bend - end; the ends stay where they are.

    Each step draws t uniformly from [0, 1], takes the gradient g of L(phi(t)) on a mini-batch, batch norm with the
    statistics of that batch, and moves the bend by SGD along its own gradient d phi / d bend * g, with
    d phi / d bend = 1 - |2t - 1|. The learning rate falls to 0 along half a cosine.

    Args:
        model: the network; its own weights, buffers and modes are left alone.
        start, end: the two ends, one tensor per parameter of the model.
        batches: at least `steps` mini-batches of inputs and class indices.
        weight_decay: adds weight_decay / 2 * ||phi(t)||^2 to the loss, as Garipov et al. do.
        bend: where the bend begins; by default halfway between the ends, where the chain is the straight line.
        rng: generator of t, on the CPU.

    Returns:
        The bend, one tensor per parameter. Weights that are not finite if the training diverged.

    Raises:
        InputError: shapes that do not fit, a setting outside its range, or too few batches.
    """
    check_count("steps", steps)
    _check_fit(model, start, end)
    bend = [w.detach().clone() for w in (point([start, end], 0.5) if bend is None else bend)]
    _check_fit(model, bend)
    scratch = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(bend, lr=lr, momentum=momentum)
    done = 0
    for done, batch in enumerate(islice(batches, steps), start=1):
        optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * (done - 1) / steps))
        t = torch.rand((), generator=rng).item()
        gradient = _gradient(scratch, point([start, bend, end], t), batch, weight_decay)
        torch._foreach_mul_(gradient, 1 - abs(2 * t - 1))
        for w, g in zip(bend, gradient, strict=True):
            w.grad = g
        optimizer.step()
    if done < steps:
        raise InputError(f"batches holds {done} mini-batches: give at least steps = {steps}")
    return [w.detach() for w in bend]


def _gradient(model: nn.Module, weights: Weights, batch: Labelled, weight_decay: float) -> list[Tensor]:
    """Gradient of the mini-batch loss at `weights`, the l2 term among it."""
    place(model, weights)
    inputs, labels = batch
    loss = functional.cross_entropy(model(inputs), labels)
    gradient = list(torch.autograd.grad(loss, list(model.parameters())))
    if weight_decay:
        torch._foreach_add_(gradient, list(weights), alpha=weight_decay)
    return gradient


# ---------------------------------------------------------------------------------------------- what lies along it


def along(
    model: nn.Module, nodes: Sequence[Weights], ts: Sequence[float], train: Labelled, test: Labelled
) -> dict[str, list[float]]:
    """Loss and error on the training and the test images at each t of a path.

    At every t the batch-norm statistics are estimated anew on the training images, at the ends too.

    Args:
        model: the network; its own weights, buffers and modes are left alone.
        nodes: two or more sets of weights; see `point`.

    Returns:
        Columns of equal length: t, train_loss, train_error_pct, test_loss, test_error_pct. Losses are mean cross
        entropies in nats, errors in per cent.

    Raises:
        InputError: shapes that do not fit, or a t outside [0, 1].
    """
    scratch = copy.deepcopy(model)
    rows = [{"t": float(t)} | losses(scratch, point(nodes, t), train, test) for t in ts]
    return _columns(rows)


def losses(model: nn.Module, weights: Weights, train: Labelled, test: Labelled) -> dict[str, float]:
    """Loss and error at `weights`, with batch-norm statistics of the training images. Changes the model."""
    _check_fit(model, weights)
    place(model, weights)
    batchnorm.recalibrate(model, train[0].split(BATCH))
    model.eval()
    found = {}
    for name, (inputs, labels) in (("train", train), ("test", test)):
        loss, wrong = _loss_and_wrong(model, inputs, labels)
        found |= {f"{name}_loss": loss / len(labels), f"{name}_error_pct": 100 * wrong / len(labels)}
    return found


def barrier(values: Sequence[float]) -> float:
    """The highest value inside a path minus the higher of its two ends.

    Below 0 where every point inside lies below the higher end. With the ends themselves in the maximum it could not
    be, and its sign would say nothing.

    Raises:
        InputError: fewer than three values, so that none lies inside.
    """
    if len(values) < 3:
        raise InputError(f"values has {len(values)} points: a barrier needs the two ends and at least one point inside")
    if not all(map(math.isfinite, values)):
        return math.nan
    return max(values[1:-1]) - max(values[0], values[-1])


@torch.no_grad()
def _loss_and_wrong(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, int]:
    """Summed cross entropy and number of wrong answers."""
    loss, wrong = 0.0, 0
    for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(x)
        loss += functional.cross_entropy(logits, y, reduction="sum").item()
        wrong += int((logits.argmax(1) != y).sum())
    return loss, wrong


# ---------------------------------------------------------------------------------------------- the plane of a chain


@dataclass(frozen=True, slots=True)
class Plane:
    """The plane through three sets of weights: the start is its origin, the first axis points to the end, and the
    bend lies on the positive side of the second.

    Attributes:
        origin: the start.
        axes: two orthonormal directions, in the Euclidean norm over all weights together.
        end, bend: coordinates (x, y) of the two, in units of the weights; end = (distance, 0).
    """

    origin: list[Tensor]
    axes: tuple[list[Tensor], list[Tensor]]
    end: tuple[float, float]
    bend: tuple[float, float]

    def at(self, x: float, y: float) -> list[Tensor]:
        """The weights at a point of the plane."""
        return [o + x * u + y * v for o, u, v in zip(self.origin, *self.axes, strict=True)]


def plane(start: Weights, bend: Weights, end: Weights) -> Plane:
    """The plane a chain lies in, by Gram and Schmidt.

    Raises:
        InputError: unequal shapes, equal ends, or a bend on the line through them.
    """
    _check_nodes([start, bend, end])
    to_end, to_bend = _minus(end, start), _minus(bend, start)
    distance = _norm(to_end)
    if distance == 0:
        raise InputError("end is the start: two different ends are needed for a plane")
    first = [d / distance for d in to_end]
    x = _dot(to_bend, first)
    across = [d - x * u for d, u in zip(to_bend, first, strict=True)]
    y = _norm(across)
    if not y > COLLINEAR * distance:
        raise InputError("bend lies on the line through the ends: the three span no plane")
    return Plane([w.detach().clone() for w in start], (first, [d / y for d in across]), (distance, 0.0), (x, y))


def on_grid(
    model: nn.Module, of: Plane, points: int, train: Labelled, test: Labelled, margin: float = 0.2
) -> dict[str, list[float]]:
    """Losses on points x points places of a plane, over the box of the chain and a margin around it.

    Args:
        points: places per side, 2 or more.
        margin: how far the grid goes on beyond the chain, as a share of the distance of the ends.

    Returns:
        Columns of equal length, x running fastest: x, y, train_loss, test_loss; statistics as in `along`.
    """
    if check_count("points", points) < 2:
        raise InputError("points = 1 is no grid: give at least 2")
    scratch, rest = copy.deepcopy(model), margin * of.end[0]
    xs, ys = ([0.0, a, b] for a, b in zip(of.end, of.bend, strict=True))
    rows = [
        {"x": x, "y": y} | losses(scratch, of.at(x, y), train, test)
        for y in torch.linspace(min(ys) - rest, max(ys) + rest, points).tolist()
        for x in torch.linspace(min(xs) - rest, max(xs) + rest, points).tolist()
    ]
    return _columns([{name: row[name] for name in ("x", "y", "train_loss", "test_loss")} for row in rows])


# ---------------------------------------------------------------------------------------------- weights as one vector


def weights_of(model: nn.Module) -> list[Tensor]:
    """A copy of the parameters of a model, as a node of a path."""
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def place(model: nn.Module, weights: Weights) -> None:
    """Puts `weights` into the model."""
    torch._foreach_copy_(list(model.parameters()), list(weights))


def distance(a: Weights, b: Weights) -> float:
    """Euclidean distance over all weights together."""
    return _norm(_minus(a, b))


def _minus(a: Weights, b: Weights) -> list[Tensor]:
    return [x.detach() - y.detach() for x, y in zip(a, b, strict=True)]


def _dot(a: Weights, b: Weights) -> float:
    return math.fsum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def _norm(a: Weights) -> float:
    return math.sqrt(_dot(a, a))


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _check_nodes(nodes: Sequence[Weights]) -> None:
    if len(nodes) < 2:
        raise InputError(f"nodes has {len(nodes)} sets of weights: a path needs at least 2")
    shapes = [[tuple(w.shape) for w in node] for node in nodes]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(f"nodes: shapes {shapes} differ; give one tensor per parameter, in order")


def _check_fit(model: nn.Module, *nodes: Weights) -> None:
    _check_nodes([list(model.parameters()), *nodes])
