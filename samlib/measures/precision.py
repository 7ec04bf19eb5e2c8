"""What is left of a perturbation when the weights are rounded to a lower precision.

A SAM perturbation of norm rho is about rho / sqrt(n) per weight, often less than half the spacing of bf16 or fp16
numbers at that weight. What acts on the loss is round(w + eps) - round(w).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samlib.errors import InputError


def effective_perturbation(weights: Sequence[Tensor], eps: Sequence[Tensor], precision: str) -> dict[str, float]:
    """Compare eps with what acts of it, round(w + eps) - round(w), over all tensors jointly.

    The sum w + eps is taken in the precision of `weights`, as an optimiser takes it, and then rounded to nearest.

    Args:
        weights: the weights w before the perturbation.
        eps: the intended perturbation, tensors of the shapes of the weights.
        precision: "fp32", "tf32" (8-bit exponent, 10-bit mantissa), "fp16" or "bf16".

    Returns:
        norm_ratio = ||acting|| / ||eps||; cosine of the angle between the two, 0 if nothing acts; unmoved_fraction, the
        share of weights whose rounded value does not change. norm_ratio and cosine are NaN for eps = 0.

    Raises:
        InputError: an unknown precision, or shapes that differ.
    """
    if precision not in _ROUND:
        raise InputError(f"precision: {precision!r} is unknown; choose one of {', '.join(_ROUND)}")
    if [w.shape for w in weights] != [e.shape for e in eps] or not weights:
        raise InputError("eps: its shapes are not those of the weights; give one tensor per weight, in order")
    rounded = _ROUND[precision]
    sums = torch.zeros(4, dtype=torch.float64, device=weights[0].device)
    with torch.no_grad():
        for w, e in zip(weights, eps, strict=True):
            acting, intended = rounded(w + e).double() - rounded(w).double(), e.double()
            sums += torch.stack(
                [acting.square().sum(), intended.square().sum(), (acting * intended).sum(), (acting == 0).sum()]
            )
    acting, intended, inner, unmoved = sums.tolist()
    if intended == 0:
        norm_ratio = cosine = math.nan
    else:
        norm_ratio = math.sqrt(acting / intended)
        cosine = inner / math.sqrt(acting * intended) if acting else 0.0
    unmoved_fraction = unmoved / sum(w.numel() for w in weights)
    return {"norm_ratio": norm_ratio, "cosine": cosine, "unmoved_fraction": unmoved_fraction}


def round_to_tf32(x: Tensor) -> Tensor:
    """x in float32 with its mantissa rounded to 10 bits, to nearest and ties away from zero (PTX cvt.rna.tf32)."""
    bits = x.float().contiguous().view(torch.int32)
    # half a unit of the last kept bit, then the 13 dropped bits cleared; a carry moves the exponent up as it should
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


_ROUND = {
    "fp32": Tensor.float,
    "tf32": round_to_tf32,
    "fp16": Tensor.half,
    "bf16": Tensor.bfloat16,
}
