"""How unevenly the loss rises to the two sides of a minimum, along random directions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samlib.errors import InputError
from samlib.measures.loss import WeightLoss, check_count

Direction = list[Tensor]  # one tensor per weight

# The study takes the factor at these multiples of its mu, since what it says turns with mu (errata E-B8); SLICE is
# where the rise along one direction is read: the paper has mu = 5 for the factor and looks at +-2 in Figure 6.
MULTIPLES = (0.04, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0)
SLICE = 0.4


def asymmetry_factors(
    loss: WeightLoss,
    mus: Sequence[float],
    *,
    directions: int = 30,
    law: str = "uniform01",
    scale: str = "unit",
    seed: int = 0,
) -> list[dict[str, float]]:
    r"""The asymmetry factor of boca2023, section 4.4, and the loss along the first direction (Figure 6), at each mu.

    .. math:: \Omega = \frac1n \sum_{i=1}^n \frac{\min(l_i^+, l_i^-)}{\max(l_i^+, l_i^-)}, \qquad
        l_i^\pm = L(w \pm \mu u_i) - L(w)

    All weights move, those of batch norm too. Omega is in [0, 1], and 1 for a symmetric loss, only where both changes
    are positive; where L falls along u_i the share of the direction is negative, or above 1 (errata E-B8). Nothing is
    clipped: `no_minimum` says how many directions are of that kind.

    Args:
        loss: the loss as a function of the weights.
        mus: distances, > 0: lengths of the step with the scale "unit", shares of the weights with "filter".
        directions: number of directions n; all models are given the same ones (errata E-B21).
        law: see `random_directions`.
        scale: "unit": u_i has length 1. "filter": each filter of u_i has the length of that filter of w (Li et al.
            2018), so that models with weights of different size are moved alike; tensors of one axis stay.
        seed: of the directions.

    Returns:
        For each mu: mu; asymmetry_factor; no_minimum, the share of directions with a change of 0 or less; rise_plus and
        rise_minus, the two changes along the first direction. The factor is NaN where L is the same at all three points
        of a direction, or not finite.

    Raises:
        InputError: a setting outside its range.
    """
    _check_settings(mus, scale)
    found = random_directions(loss.weights(), directions, law=law, seed=seed)
    scaled = [_SCALES[scale](u, loss.weights()) for u in found]
    base = loss.value()
    return [_at_distance(loss, base, scaled, mu) for mu in mus]


def random_directions(
    weights: Sequence[Tensor], directions: int, *, law: str = "uniform01", seed: int = 0
) -> list[Direction]:
    """Random directions of the shapes of `weights`, the same ones on every device and for every model of those shapes.

    Args:
        law: of each entry. "uniform01": uniform on [0, 1], as published; its mean is not 0, so any two directions have
            a cosine of about 3/4, and each moves nearly all the weights up alike (errata E-B7). "gaussian": standard
            normal; at unit length, a direction is then uniform on the sphere.

    Raises:
        InputError: an unknown law, or no direction.
    """
    if law not in _LAWS:
        raise InputError(f"law: {law!r} is unknown; choose one of {', '.join(_LAWS)}")
    check_count("directions", directions)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: a device has random numbers of its own
    return [
        [_LAWS[law](w.shape, generator=generator).to(w) for w in weights]  # drawn in float32, whatever the weights are
        for _ in range(directions)
    ]


def _at_distance(loss: WeightLoss, base: float, directions: list[Direction], mu: float) -> dict[str, float]:
    changes = [[_value_at(loss, u, sign * mu) - base for sign in (1, -1)] for u in directions]
    return {
        "mu": mu,
        "asymmetry_factor": math.fsum(_share(*pair) for pair in changes) / len(changes),
        "no_minimum": sum(min(pair) <= 0 for pair in changes) / len(changes),
        "rise_plus": changes[0][0],
        "rise_minus": changes[0][1],
    }


def _value_at(loss: WeightLoss, u: Direction, distance: float) -> float:
    with loss.at(torch._foreach_mul(u, distance)):
        return loss.value()


def _share(plus: float, minus: float) -> float:
    """min / max of the two changes; NaN where the loss is flat to both sides, or not finite."""
    low, high = min(plus, minus), max(plus, minus)
    return low / high if high and math.isfinite(high - low) else math.nan


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def _unit(u: Direction, weights: Sequence[Tensor]) -> Direction:
    return torch._foreach_div(u, norm(u))


def _filter_normalised(u: Direction, weights: Sequence[Tensor]) -> Direction:
    return [_with_filters_of(e, w) if w.ndim > 1 else torch.zeros_like(w) for e, w in zip(u, weights, strict=True)]


def _with_filters_of(e: Tensor, w: Tensor) -> Tensor:
    axes = tuple(range(1, w.ndim))
    ours, theirs = (torch.linalg.vector_norm(t, dim=axes, keepdim=True) for t in (e, w))
    return e * (theirs / ours)


def _check_settings(mus: Sequence[float], scale: str) -> None:
    if not len(mus) or not all(0 < mu < math.inf for mu in mus):
        raise InputError(f"mus: {mus!r} are no distances; give at least one, each finite and above 0")
    if scale not in _SCALES:
        raise InputError(f"scale: {scale!r} is unknown; choose one of {', '.join(_SCALES)}")


_LAWS = {"uniform01": torch.rand, "gaussian": torch.randn}
_SCALES = {"unit": _unit, "filter": _filter_normalised}
