"""What is left of a perturbation when the weights are rounded to a lower precision.

A SAM perturbation of norm rho is about rho / sqrt(n) per weight, often less than half the spacing of bf16 or fp16
numbers at that weight. What acts on the loss is round(w + eps) - round(w).
"""

import math
import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from samlib.errors import InputError
from samlib.optim import SAM

LEAST_COSINE = 0.9  # below it `acting_perturbation` warns
_WARNED: WeakSet[SAM] = WeakSet()  # the optimisers it has warned of


class LowPrecisionWarning(UserWarning):
    """Rounding has turned the perturbation away from eps."""


def acting_perturbation(opt: SAM, precision: str) -> dict[str, float]:
    r"""What of an optimiser's perturbation acts on a forward pass that rounds the weights to `precision`.

    .. math:: \delta = \operatorname{round}(w + \epsilon) - \operatorname{round}(w), \qquad
        \text{norm\_ratio} = \|\delta\| / \|\epsilon\|, \quad \text{cosine} = \cos(\delta, \epsilon)

    Call it after a backward pass, with eps from the present gradients (`opt.perturbation()`: for AverageSAM the next
    draw, with `inner_steps` the first of them), or inside a closure at the perturbed point, with eps as it is (the
    weights less `opt.unperturbed()`). It changes no gradient, weight or generator. It waits for the device: it is
    for now and then, not for every step.

    Only the rounding of weights is emulated, so any device will do; that of activations and gradients is not. All
    perturbed tensors are rounded, although autocast leaves the few numbers of norm layers in float32.
    Weights stored in bf16 or fp16 round w + eps when it is stored, which is counted, whatever `precision` says. A loss
    scale cancels in eps; where it does not (`normalize=False`, `norm_eps`), call at the perturbed point.

    Args:
        opt: the optimiser.
        precision: "fp32", "tf32", "fp16" or "bf16", the one that convolutions and matrix products take weights in:
            under autocast its dtype, without it "tf32" where PyTorch allows that, else "fp32".

    Returns:
        norm_ratio, cosine and unmoved_fraction, as `effective_perturbation`, over the tensors that are perturbed: those
        with an entry of eps that is not 0. NaN, all three, if there is none.

    Raises:
        InputError: unknown precision; or called at the perturbed point with weights stored in 16 bits, where eps as it
            was before rounding is gone.

    Warns:
        LowPrecisionWarning: the cosine is below 0.9; once for each optimiser.
    """
    pairs = [(w, eps) for w, eps in _weights_and_eps(opt) if eps.any()]
    if not pairs:
        _check_precision(precision)
        return dict.fromkeys(("norm_ratio", "cosine", "unmoved_fraction"), math.nan)
    found = effective_perturbation(*zip(*pairs, strict=True), precision)
    if found["cosine"] < LEAST_COSINE and opt not in _WARNED:
        _WARNED.add(opt)
        warnings.warn(_warning(found, precision), LowPrecisionWarning, stacklevel=2)
    return found


def _weights_and_eps(opt: SAM) -> list[tuple[Tensor, Tensor]]:
    if not opt.at_perturbed_point:
        weights = [w.detach() for group in opt.param_groups for w in group["params"]]
        return list(zip(weights, opt.perturbation(), strict=True))
    at_w = opt.unperturbed()
    narrow = {str(w.dtype) for w in at_w if w.dtype.itemsize < 4}
    if narrow:
        raise InputError(
            f"opt is at the perturbed point and its weights are stored in {', '.join(sorted(narrow))}, which has "
            "rounded eps already: call acting_perturbation after the first backward pass, before the step"
        )
    # in double precision the difference is exact, and w + eps the perturbed weight again
    return [(w, perturbed.detach().double() - w) for perturbed, w in at_w.items()]


def _warning(found: dict[str, float], precision: str) -> str:
    return (
        f"in {precision} the perturbation that acts, round(w + eps) - round(w), has cosine {found['cosine']:.2f} with "
        f"eps and {found['norm_ratio']:.2f} times its norm; {found['unmoved_fraction']:.0%} of the weights do not "
        "move. SAM then perturbs in a direction that is partly rounding noise. Remedies: fp16 or TF32 in place of "
        "bf16, a larger rho, or fp32 (samlib.two_products lets all of eps act, but w stays rounded: it gains little)"
    )


def effective_perturbation(weights: Sequence[Tensor], eps: Sequence[Tensor], precision: str) -> dict[str, float]:
    """Compare eps with what acts of it, round(w + eps) - round(w), over all tensors jointly.

    The sum w + eps is stored in the dtype of `weights`, as an optimiser stores it, and then rounded to nearest.

    Args:
        weights: the weights w before the perturbation.
        eps: the intended perturbation, tensors of the shapes of the weights.
        precision: "fp32", "tf32" (8-bit exponent, 10-bit mantissa), "fp16" or "bf16".

    Returns:
        norm_ratio = ||acting|| / ||eps||; cosine of the angle between the two, 0 if nothing acts; unmoved_fraction, the
        share of weights whose rounded value does not change. norm_ratio and cosine are NaN for eps = 0 and for one that
        is not finite, unmoved_fraction where the tensors have no entries.

    Raises:
        InputError: an unknown precision, or shapes that differ.
    """
    _check_precision(precision)
    if [w.shape for w in weights] != [e.shape for e in eps] or not weights:
        raise InputError("eps: its shapes are not those of the weights; give one tensor per weight, in order")
    rounded = _ROUND[precision]
    sums = torch.zeros(4, dtype=torch.float64, device=weights[0].device)
    with torch.no_grad():
        for w, e in zip(weights, eps, strict=True):
            acting, intended = rounded((w + e).to(w.dtype)).double() - rounded(w).double(), e.double()
            sums += torch.stack(
                [acting.square().sum(), intended.square().sum(), (acting * intended).sum(), (acting == 0).sum()]
            )
    acting, intended, inner, unmoved = sums.tolist()
    if intended == 0:
        norm_ratio = cosine = math.nan
    else:
        norm_ratio = math.sqrt(acting / intended)
        cosine = inner / math.sqrt(acting * intended) if acting else 0.0
    size = sum(w.numel() for w in weights)
    return {"norm_ratio": norm_ratio, "cosine": cosine, "unmoved_fraction": unmoved / size if size else math.nan}


def round_to_tf32(x: Tensor) -> Tensor:
    """x in float32 with its mantissa rounded to 10 bits, to nearest and ties away from zero (PTX cvt.rna.tf32)."""
    bits = x.float().contiguous().view(torch.int32)
    # half a unit of the last kept bit, then the 13 dropped bits cleared; a carry moves the exponent up as it should
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x.float())  # CUDA's NaN has all bits set: the sum would overflow to -0


def _check_precision(precision: str) -> None:
    if precision not in _ROUND:
        raise InputError(f"precision: {precision!r} is unknown; choose one of {', '.join(_ROUND)}")


_ROUND = {
    "fp32": Tensor.float,
    "tf32": round_to_tf32,
    "fp16": Tensor.half,
    "bf16": Tensor.bfloat16,
}
