"""Adversarial sharpness: how far the loss rises within a ball around the weights."""

import math

import numpy as np
import torch
from torch import Tensor

from samlib.errors import InputError
from samlib.measures.loss import WeightLoss, check_count
from samlib.perturbation import dual_vector, project, scales, stretch


def adversarial(
    loss: WeightLoss,
    rho: float,
    *,
    steps: int = 1,
    p: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.0,
    shard_size: int | None = None,
) -> dict[str, float]:
    r"""Rise of the loss from w to w + eps, where eps climbs within the ball ||T^-1 eps||_p <= rho.

    One step is the ascent of SAM (foret2021, equation 2). Each further step moves by another rho T u along the gradient
    at the point reached, projected back on the ball, and the highest point met counts: more steps bound the maximum
    over the ball more closely, from below. eps has length rho; it is not multiplied by rho again (errata E-B13).

    With `shard_size` the m-sharpness of foret2021, section 4.1: each shard of that many examples has its own ascent and
    its own loss, and the results are averaged with the weights of the shard sizes. The shards are consecutive: shuffle
    the data for random ones.

    Args:
        loss: the loss as a function of the weights.
        rho: radius, >= 0, in units of the weights, or relative to them if `adaptive`.
        steps: gradient evaluations per ascent.
        p: norm of the ball, 1 < p <= inf.
        adaptive: T = |w| + eta instead of 1 (ASAM).
        eta: added to |w|, >= 0; needs `adaptive`.
        shard_size: examples per ascent; None: one ascent over all the data.

    Returns:
        sharpness = perturbed_loss - loss; perturbed_loss = L(w + eps); loss = L(w). The first two order models
        differently (errata E-B1). A zero gradient gives eps = 0 and the sharpness 0; a loss that is not finite gives
        NaN or infinity. The sharpness is negative where the loss falls along its own gradient at distance rho.

    Raises:
        InputError: a setting outside its range.
    """
    _check_settings(rho, steps, p, adaptive, eta)
    shards = [loss] if shard_size is None else loss.shards(shard_size)
    scale = scales(loss.weights(), eta) if adaptive else [None] * len(loss.weights())
    losses = [_climb(shard, rho, steps, p, scale) for shard in shards]
    base, perturbed = np.average(losses, axis=0, weights=[len(shard) for shard in shards]).tolist()
    return {"sharpness": perturbed - base, "perturbed_loss": perturbed, "loss": base}


def _climb(loss: WeightLoss, rho: float, steps: int, p: float, scale: list[Tensor | None]) -> tuple[float, float]:
    """L(w), and the highest loss among the points that the ascent meets after w."""
    base, gradient = loss.value_and_gradient()
    u = _direction(gradient, scale, p)
    met = []
    for _ in range(steps - 1):
        with loss.at(stretch(u, scale, rho)):
            value, gradient = loss.value_and_gradient()
        met.append(value)
        u = project(torch._foreach_add(u, _direction(gradient, scale, p)), p)
    with loss.at(stretch(u, scale, rho)):
        met.append(loss.value())
    return base, float(np.max(met))  # NaN if one is NaN


def _direction(gradient: list[Tensor], scale: list[Tensor | None], p: float) -> list[Tensor]:
    """The u in the unit ball that maximises <T g, u>."""
    h = [g if t is None else g * t for g, t in zip(gradient, scale, strict=True)]
    return dual_vector(h, p)[0]


def _check_settings(rho: float, steps: int, p: float, adaptive: bool, eta: float) -> None:
    check_count("steps", steps)
    if not 0 <= rho < math.inf:
        raise InputError(f"rho: {rho!r} is not a radius; give a finite number of at least 0")
    if not p > 1:
        raise InputError(f"p: {p!r} is not a norm of this measure; give 1 < p <= inf")
    if not eta >= 0 or (eta and not adaptive):
        raise InputError(f"eta: {eta!r} needs adaptive=True and has to be at least 0; leave it at 0 otherwise")
