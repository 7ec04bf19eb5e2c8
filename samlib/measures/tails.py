"""How heavy the tails of a layer's weights are: what a histogram on a log scale shows, as numbers."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from samlib.errors import InputError

FEWEST = 4  # weights: the correction of the kurtosis needs as many
BIN_WIDTH, OUTERMOST = 0.5, 8.0  # of the histogram, in standard deviations


def first_layer(weights: Sequence[Tensor]) -> Tensor:
    """The weights of a network's first layer, without its bias: the first tensor of two axes or more.

    Args:
        weights: the tensors of a network in the order of its layers.

    Raises:
        InputError: none of them has two axes.
    """
    for tensor in weights:
        if tensor.dim() >= 2:
            return tensor
    raise InputError("weights: no tensor has two axes or more, as a convolution or a linear layer has")


def weight_tails(weights: Tensor) -> dict[str, float]:
    """Excess kurtosis, spread of the quantiles, and range of some weights; none of them depends on the scale.

    Args:
        weights: of any shape, at least 4 of them.

    Returns:
        kurtosis: excess kurtosis G2, corrected for bias: 0 for normal weights, -1.2 for uniform ones, above 0 for
            heavier tails. quantile_ratio: the 99.5 % quantile of |w| over the 75 % one: 2.44 for normal weights;
            quantiles between two weights are interpolated. range: largest minus smallest, in standard deviations.
            sd: the standard deviation itself. weights: how many there are. The first three are NaN where all weights
            are equal or one is not finite.

    Raises:
        InputError: fewer than 4 weights.

    Source: coldenhoff2022, section III.C and Figure 3, which show the histogram and no number.
    """
    w = _flat(weights)
    found = {"kurtosis": math.nan, "quantile_ratio": math.nan, "range": math.nan}
    if np.isfinite(w).all() and np.ptp(w):
        upper, middle = np.quantile(np.abs(w), (0.995, 0.75))
        found["kurtosis"] = float(scipy.stats.kurtosis(w, bias=False))
        found["quantile_ratio"] = float(upper / middle) if middle else math.nan
        found["range"] = float(np.ptp(w) / w.std(ddof=1))
    return found | {"sd": float(w.std(ddof=1)), "weights": float(len(w))}


def weight_histogram(weights: Tensor) -> dict[str, list[float]]:
    """How many weights, divided by their standard deviation, lie in each bin, over the same bins for every network.

    Returns:
        left, right: edges of the bins, from -8 to 8 standard deviations in steps of a half. count: weights in each;
        those beyond the outermost edges are in the first and the last bin, and all are 0 where the weights have no
        spread or one is not finite.
    """
    w = _flat(weights)
    edges = np.arange(-OUTERMOST, OUTERMOST + BIN_WIDTH, BIN_WIDTH)
    spread = w.std(ddof=1)
    z = w / spread if np.isfinite(spread) and spread else w[:0]
    counts, _ = np.histogram(z.clip(edges[0], edges[-1]), edges)
    return {"left": edges[:-1].tolist(), "right": edges[1:].tolist(), "count": counts.tolist()}


def _flat(weights: Tensor) -> np.ndarray:
    if weights.numel() < FEWEST:
        raise InputError(f"weights: {weights.numel()} are too few to have tails, use at least {FEWEST}")
    return weights.detach().flatten().to("cpu", torch.float64).numpy()
