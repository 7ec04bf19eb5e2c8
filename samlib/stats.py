"""Intervals for the numbers of this study. Plain values in, one frozen `Interval` out; SciPy only.

Seeds are the units of replication: a run contributes one value. Arms that share seeds are compared pair by pair, which
takes the luck of initialisation and data order out of the comparison. Fewer than two units give an interval of NaN,
which no comparison can satisfy; a NaN among the values is refused, because leaving it out is a decision of the caller.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from samlib.errors import InputError

RESAMPLES = 9999
BOOTSTRAP_SEED = 0  # the same data give the same interval, on every machine


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided interval; `n` counts the units (seeds, pairs or settings) behind it."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float
    method: str


# ---------------------------------------------------------------------------------------------- means and differences


def mean(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean with Student's t interval, mean +- t(n-1) * s / sqrt(n).

    Raises:
        InputError: a value is not finite, or `confidence` is not between 0 and 1.
    """
    values = _finite("values", values)
    return _t_interval(values, confidence, "t")


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, confidence: float = 0.95
) -> Interval:
    """Mean of a - b over the seeds both hold, with the t interval of the differences.

    Args:
        a, b: seed -> value. Seeds that only one of them holds are left out; `n` is the number of pairs.

    Raises:
        InputError: a value is not finite, or `confidence` is not between 0 and 1.
    """
    return _t_interval(np.array(list(differences(a, b).values())), confidence, "paired t")


def differences(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """seed -> a - b, over the seeds both hold, in the order of a.

    Raises:
        InputError: a value is not finite.
    """
    a, b = _by_seed("a", a), _by_seed("b", b)
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def unpaired_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """mean(a) - mean(b) with Welch's interval: unequal variances, Satterthwaite's degrees of freedom.

    `n` is the size of the smaller arm.

    Raises:
        InputError: a value is not finite, or `confidence` is not between 0 and 1.
    """
    a, b = _finite("a", a), _finite("b", b)
    n = min(len(a), len(b))
    estimate = _mean(a) - _mean(b)
    if n < 2:
        return _undefined(estimate, n, confidence, "Welch t")
    shares = np.array([_variance(a) / len(a), _variance(b) / len(b)])
    variance = shares.sum()
    if variance == 0:
        return _interval(estimate, 0.0, n, confidence, "Welch t")
    freedom = variance**2 / (shares**2 / [len(a) - 1, len(b) - 1]).sum()
    return _interval(estimate, _quantile(confidence, freedom) * math.sqrt(variance), n, confidence, "Welch t")


def geometric_mean_ratio(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, confidence: float = 0.95
) -> Interval:
    """Geometric mean of a / b over the seeds both hold; the t interval of the log ratios, taken back by exp.

    Raises:
        InputError: a value is not finite or not above 0, or `confidence` is not between 0 and 1.
    """
    logs = differences(_logs("a", a), _logs("b", b))
    log_ratio = _t_interval(np.array(list(logs.values())), confidence, "paired t of the logarithm")
    bounds = (math.exp(log_ratio.estimate), math.exp(log_ratio.low), math.exp(log_ratio.high))
    return Interval(*bounds, log_ratio.n, confidence, log_ratio.method)


def slope_over_log2(x: Sequence[float], y: Sequence[Sequence[float]], *, confidence: float = 0.95) -> Interval:
    """Mean slope of y per doubling of x: a least-squares slope for each seed, then the t interval of the slopes.

    Args:
        x: the settings, above 0, shape (settings,).
        y: one row per seed, shape (seeds, settings).

    Raises:
        InputError: a value is not finite, x not above 0 or constant, or the shapes do not fit.
    """
    x, y = _finite("x", x), _finite("y", y)
    y = y if y.size else y.reshape(0, len(x))  # no seed at all
    if y.ndim != 2 or y.shape[1] != len(x):
        raise InputError(f"y has shape {y.shape}: use one row per seed and one column for each of the {len(x)} x")
    if (x <= 0).any() or len(np.unique(x)) < 2:
        raise InputError(f"x = {x.tolist()}: use at least two different values above 0")
    centred = np.log2(x) - np.log2(x).mean()
    return _t_interval(y @ centred / (centred @ centred), confidence, "t of per-seed slopes")


# ---------------------------------------------------------------------------------------------- spread and correlation


def sd_ratio(a: Sequence[float], b: Sequence[float], *, paired: bool, confidence: float = 0.95) -> Interval:
    """Standard deviation of a divided by that of b, with a bias-corrected accelerated bootstrap interval.

    With `paired`, a[i] and b[i] share a seed and are drawn together. The bootstrap works on the log ratio. For normal
    data its 95 % interval holds the truth in 91 to 94 % of samples of 8 to 20 (simulated), a little less than it says.
    A sample without spread gives an interval of NaN.

    Raises:
        InputError: a value is not finite, or `paired` and the lengths differ.
    """
    a, b = _finite("a", a), _finite("b", b)
    if paired and len(a) != len(b):
        raise InputError(f"a and b hold {len(a)} and {len(b)} values: pairs need as many of each")
    n = min(len(a), len(b))
    if n < 2 or not (np.ptp(a) and np.ptp(b)):
        return _undefined(math.nan, n, confidence, "bootstrap")
    estimate, low, high, method = _bootstrap((a, b), _log_sd_ratio, paired, confidence)
    return Interval(math.exp(estimate), math.exp(low), math.exp(high), n, confidence, method)


def curve_sd_ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, confidence: float = 0.95) -> Interval:
    """Mean over the points of a curve of the standard deviation over seeds, that of a divided by that of b.

    Seeds are drawn whole, with their curve and its partner: neighbouring points of a curve are no new evidence. The
    bootstrap works on the log ratio, and with one point per curve it is that of `sd_ratio`.

    Args:
        a, b: one row per seed, a[i] and b[i] of the same one, shape (seeds, points).

    Raises:
        InputError: a value is not finite, or the shapes do not fit.
    """
    a, b = _finite("a", a), _finite("b", b)
    n = len(a)
    if len(b) != n or (n and not (a.ndim == b.ndim == 2 and a.shape[1] and b.shape[1])):
        raise InputError(
            f"a and b have shapes {a.shape} and {b.shape}: use one row of points per seed, as many in each"
        )
    if n < 3 or not (np.ptp(a, axis=0).any() and np.ptp(b, axis=0).any()):  # without one of two, no spread is left
        return _undefined(math.nan, n, confidence, "bootstrap")

    def log_ratio(i: np.ndarray, j: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.log(_mean_sd(a, i)) - np.log(_mean_sd(b, j))

    estimate, low, high, method = _bootstrap((np.arange(n), np.arange(n)), log_ratio, True, confidence)
    return Interval(math.exp(estimate), math.exp(low), math.exp(high), n, confidence, method)


def _mean_sd(curves: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Of the curves of these seeds, shape (..., seeds): the standard deviation over them, mean over the points."""
    return curves[seeds.astype(int)].std(axis=-2, ddof=1).mean(axis=-1)


def brown_forsythe(a: Sequence[float], b: Sequence[float]) -> float:
    """p value of the Brown-Forsythe test that a and b have the same spread.

    NaN where an arm has fewer than two values, or where neither deviates from its median.

    Raises:
        InputError: a value is not finite.
    """
    a, b = _finite("a", a), _finite("b", b)
    if min(len(a), len(b)) < 2 or not (np.ptp(a) or np.ptp(b)):
        return math.nan
    return float(scipy.stats.levene(a, b, center="median").pvalue)


def correlation(x: Sequence[float], y: Sequence[float], *, kind: str = "pearson", confidence: float = 0.95) -> Interval:
    """Correlation of two values over settings, with a bootstrap interval that draws whole settings.

    Args:
        x, y: one mean per setting; seeds of one setting are not independent settings.
        kind: "pearson" or "spearman".

    Raises:
        InputError: unknown kind, a value that is not finite, or unequal lengths.
    """
    if kind not in _CORRELATIONS:
        raise InputError(f"kind = {kind!r} is unknown: use one of {', '.join(_CORRELATIONS)}")
    x, y = _finite("x", x), _finite("y", y)
    if len(x) != len(y):
        raise InputError(f"x and y hold {len(x)} and {len(y)} values: use one of each per setting")
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return _undefined(math.nan, len(x), confidence, f"{kind}, bootstrap over settings")
    estimate, low, high, method = _bootstrap((x, y), _CORRELATIONS[kind], True, confidence)
    return Interval(estimate, low, high, len(x), confidence, f"{kind}, {method} over settings")


def _log_sd_ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.log(a.std(axis=axis, ddof=1)) - np.log(b.std(axis=axis, ddof=1))


def _pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    x, y = x - x.mean(axis=axis, keepdims=True), y - y.mean(axis=axis, keepdims=True)
    r = (x * y).sum(axis=axis) / np.sqrt((x * x).sum(axis=axis) * (y * y).sum(axis=axis))
    return np.clip(r, -1, 1)  # rounding may pass 1


def _spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    return _pearson(scipy.stats.rankdata(x, axis=axis), scipy.stats.rankdata(y, axis=axis), axis)


_CORRELATIONS: dict[str, Callable[..., np.ndarray]] = {"pearson": _pearson, "spearman": _spearman}


def _bootstrap(
    samples: tuple[np.ndarray, np.ndarray], statistic: Callable[..., np.ndarray], paired: bool, confidence: float
) -> tuple[float, float, float, str]:
    """Estimate, low, high and method. Percentiles stand in where the BCa interval does not exist.

    It does not in very small samples: some resamples repeat one unit throughout, and their statistic is undefined.
    Those are then left out of the percentiles.
    """
    _check_confidence(confidence)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap(
            samples,
            statistic,
            n_resamples=RESAMPLES,
            paired=paired,
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(BOOTSTRAP_SEED),
        )
        estimate = float(statistic(*samples))
    low, high = map(float, found.confidence_interval)
    if math.isfinite(low) and math.isfinite(high):
        return estimate, low, high, "BCa bootstrap"
    drawn = found.bootstrap_distribution[~np.isnan(found.bootstrap_distribution)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")  # no arithmetic on infinite values
    return estimate, float(low), float(high), "percentile bootstrap"


# ---------------------------------------------------------------------------------------------- shared parts


def _t_interval(values: np.ndarray, confidence: float, method: str) -> Interval:
    n = len(values)
    if n < 2:
        return _undefined(_mean(values), n, confidence, method)
    half_width = _quantile(confidence, n - 1) * math.sqrt(_variance(values) / n)
    return _interval(_mean(values), half_width, n, confidence, method)


def _interval(estimate: float, half_width: float, n: int, confidence: float, method: str) -> Interval:
    _check_confidence(confidence)
    return Interval(estimate, estimate - half_width, estimate + half_width, n, confidence, method)


def _undefined(estimate: float, n: int, confidence: float, method: str) -> Interval:
    _check_confidence(confidence)
    return Interval(estimate, math.nan, math.nan, n, confidence, method)


def _quantile(confidence: float, freedom: float) -> float:
    _check_confidence(confidence)
    return float(scipy.stats.t.ppf((1 + confidence) / 2, freedom))


def _mean(values: np.ndarray) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan  # an exact sum: the order of seeds is nothing


def _variance(values: np.ndarray) -> float:
    return math.fsum((values - _mean(values)) ** 2) / (len(values) - 1)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence!r}: use a number between 0 and 1")


def _finite(name: str, values: Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{name} = {array.tolist()} holds a value that is not finite: leave unfinished runs out first")
    return array


def _by_seed(name: str, values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    by_seed = {seed: float(value) for seed, value in values.items()}
    if len(by_seed) != len(values):
        raise InputError(f"{name} holds a seed twice: give one value per seed")
    for seed, value in by_seed.items():
        if not math.isfinite(value):
            raise InputError(f"{name}[{seed!r}] = {value} is not finite: leave unfinished runs out first")
    return by_seed


def _logs(name: str, values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    by_seed = _by_seed(name, values)
    for seed, value in by_seed.items():
        if value <= 0:
            raise InputError(f"{name}[{seed!r}] = {value} has no logarithm: a ratio needs values above 0")
    return {seed: math.log(value) for seed, value in by_seed.items()}
