"""The perturbation of SAM, as functions of lists of tensors that stand for one long vector.

Top: `perturbation`, the whole of it. Below: its parts, which the optimisers and the measures put together. Those whose
names end with an underscore change their arguments in place.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TensorFilter = Callable[[Tensor], bool]
Radius = float | Tensor  # a tensor without axes where a captured graph shall see it change


def perturbation(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: float | Sequence[float],
    *,
    p: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.0,
    normalize: bool = True,
    scale_filter: TensorFilter | None = None,
    norm_eps: float = 0.0,
) -> list[Tensor]:
    """The perturbation of SAM: eps = rho T u, where u maximises <T g, u> over ||u||_p <= 1.

    Args:
        weights: w, a list of tensors; read only if `adaptive`.
        grads: g, tensors of the same shapes.
        rho: radius, one for all or one per tensor.
        p, adaptive, eta, normalize, scale_filter, norm_eps: as for `SAM`.

    Returns:
        eps, tensors of the shapes of `grads`, float32 where those are float16 or bfloat16. Differentiable in `weights`
        and `grads` where the gradient is not zero.

    Source: foret2021, equation 2; Kwon et al. 2021, section 4.
    """
    scale = scales(weights, eta, scale_filter) if adaptive else [None] * len(grads)
    u, _ = dual_vector(times(grads, scale), p, normalize=normalize, norm_eps=norm_eps)
    return stretch(u, scale, rho)


def scales(weights: Sequence[Tensor], eta: float, scale_filter: TensorFilter | None = None) -> list[Tensor | None]:
    """ASAM's T as a list of diagonals: |w| + eta, or None, for 1, where `scale_filter` declines the tensor."""
    return [w.to(wide_dtype(w)).abs().add_(eta) if scale_filter is None or scale_filter(w) else None for w in weights]


def dual_vector(
    h: Sequence[Tensor], p: float = 2.0, *, normalize: bool = True, norm_eps: float = 0.0
) -> tuple[list[Tensor], Tensor]:
    r"""The u that maximises <h, u> over ||u||_p <= 1, all tensors taken together, and the dual norm ||h||_q.

    .. math:: u = \operatorname{sign}(h) (|h| / \|h\|_q)^{q-1}, \qquad 1/p + 1/q = 1

    u = 0 for h = 0. Without `normalize` the division is left out; `norm_eps` is added to the norm.

    Source: foret2021, equation 2, with sign(0) = 0 for p = inf.
    """
    h = [t.to(wide_dtype(t)) for t in h]
    q = 1.0 if p == math.inf else p / (p - 1)
    norm = global_norm(h, q)
    if q == 1:
        return list(torch._foreach_sign(h)), norm
    u = multiplied(h, inverse(norm, norm_eps)) if normalize else h
    if q != 2:
        u = list(torch._foreach_mul(torch._foreach_sign(u), torch._foreach_pow(torch._foreach_abs(u), q - 1)))
    return u, norm


def project(u: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
    """Brings u into the ball ||u||_p <= 1: to the nearest point for p = 2 and p = inf, radially for other p."""
    if p == math.inf:
        return list(torch._foreach_clamp_max(torch._foreach_clamp_min(u, -1.0), 1.0))
    return multiplied(u, global_norm(u, p).clamp(min=1.0).reciprocal())


def stretch(u: Sequence[Tensor], scale: Sequence[Tensor | None], rho: Radius | Sequence[Radius]) -> list[Tensor]:
    """rho T u, with one rho for all or one per tensor."""
    if isinstance(rho, Sequence) and any(isinstance(one, Tensor) for one in rho):
        return times([t * one for t, one in zip(u, rho, strict=True)], scale)
    return times(torch._foreach_mul(u, rho), scale)


def add_quotient_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], divisor: Tensor | float, rho: Sequence[Radius]
) -> None:
    """weights += rho * grads / divisor, in place. The gradients are used up where one of the factors is a tensor."""
    for radius, chosen in _by_radius(rho):
        w, g = [weights[index] for index in chosen], [grads[index] for index in chosen]
        if isinstance(radius, Tensor):
            torch._foreach_mul_(g, radius / divisor)
            torch._foreach_add_(w, g)
        elif isinstance(divisor, Tensor):
            torch._foreach_div_(g, divisor)
            torch._foreach_add_(w, g, alpha=radius)
        else:
            torch._foreach_add_(w, g, alpha=_representable(radius / divisor, w))


def _representable(factor: float, tensors: Sequence[Tensor]) -> float:
    """The factor, no larger than the dtypes of the tensors know."""
    if factor < torch.finfo(torch.float32).max:
        return factor
    return min(factor, *(torch.finfo(t.dtype).max for t in tensors))


def global_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all tensors as one vector, a tensor without axes; not finite if an entry is not finite."""
    if order not in (1, 2):  # an empty tensor has no largest entry
        tensors = [t for t in tensors if t.numel()] or [torch.zeros_like(tensors[0].sum())]
    if order in (1, 2, math.inf):
        return _norm_of_norms(tensors, order)
    # high powers of small entries underflow, so the largest entry is taken out first
    largest = _norm_of_norms(tensors, math.inf)
    return largest * _norm_of_norms(multiplied(tensors, inverse(largest)), order)


def _norm_of_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    norms = torch._foreach_norm(tensors, order)
    dtypes = {norm.dtype for norm in norms}
    if len(dtypes) > 1:
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        norms = [norm.to(widest) for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def inverse(norm: Tensor, norm_eps: float = 0.0) -> Tensor:
    """1 / (norm + norm_eps); 0 for a norm of 0 or too small to invert, so that a zero gradient perturbs nothing."""
    return torch.where(norm >= torch.finfo(norm.dtype).tiny, (norm + norm_eps).reciprocal(), 0.0)


def multiplied(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    if factor.requires_grad:  # torch 2.15 cannot differentiate the foreach form in the factor for more than one tensor
        return [t * factor for t in tensors]
    return list(torch._foreach_mul(tensors, factor))


def times(tensors: Sequence[Tensor], scale: Sequence[Tensor | None]) -> list[Tensor]:
    """Entry by entry; None stands for 1."""
    products = list(tensors)
    at = [index for index, one in enumerate(scale) if one is not None]
    if at:
        scaled = torch._foreach_mul([tensors[index] for index in at], [scale[index] for index in at])
        for index, product in zip(at, scaled, strict=True):
            products[index] = product
    return products


def multiply_(tensors: Sequence[Tensor], scale: Sequence[Tensor | None]) -> None:
    at = [index for index, one in enumerate(scale) if one is not None]
    if at:
        torch._foreach_mul_([tensors[index] for index in at], [scale[index] for index in at])


def _by_radius(rho: Sequence[Radius]) -> list[tuple[Radius, Sequence[int]]]:
    """Each radius with the indices of the tensors that have it."""
    indices: dict[int | float, list[int]] = {}
    radii: dict[int | float, Radius] = {}
    for index, radius in enumerate(rho):
        name = id(radius) if isinstance(radius, Tensor) else radius
        radii[name] = radius
        indices.setdefault(name, []).append(index)
    return [(radii[name], indices[name]) for name in radii]


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for what is narrower: in half precision the squares of small entries and 1 / ||g|| are lost."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
