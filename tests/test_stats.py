"""Intervals against SciPy's own, closed forms and simulated coverage; the edges give NaN or a clear error."""

import math

import numpy as np
import pandas
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from samlib import stats
from samlib.errors import InputError

finite = st.floats(-1e3, 1e3, allow_nan=False)


def sample(n: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, n)


def by_seed(values, first: int = 0) -> dict[int, float]:
    return dict(enumerate(np.asarray(values).tolist(), start=first))


def bounds(interval: stats.Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high


# ---------------------------------------------------------------------------------------------- against SciPy


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_mean_agrees_with_scipy(n, confidence):
    values = 3 + sample(n)
    found = stats.mean(values, confidence=confidence)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert bounds(found) == pytest.approx((values.mean(), expected.low, expected.high), rel=1e-12)
    assert (found.n, found.confidence, found.method) == (n, confidence, "t")


def test_paired_difference_agrees_with_scipy():
    a, b = 5 + sample(8, 1), sample(8, 2)
    found = stats.paired_difference(by_seed(a), by_seed(b))
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert bounds(found) == pytest.approx(((a - b).mean(), expected.low, expected.high), rel=1e-12)


def test_unpaired_difference_agrees_with_scipy():
    a, b = sample(5, 1, 3.0), sample(9, 2)
    found = stats.unpaired_difference(a, b)
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert bounds(found) == pytest.approx((a.mean() - b.mean(), expected.low, expected.high), rel=1e-12)
    assert (found.n, found.method) == (5, "Welch t")


def test_geometric_mean_ratio_agrees_with_scipy():
    a, b = np.exp(sample(6, 1)), np.exp(sample(6, 2))
    found = stats.geometric_mean_ratio(by_seed(a), by_seed(b))
    expected = scipy.stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(0.95)
    assert bounds(found) == pytest.approx((scipy.stats.gmean(a / b), *np.exp(expected)), rel=1e-12)


def test_geometric_mean_ratio_of_the_published_losses():
    sam, asam = [8.72e-5, 7.17e-5, 9.50e-5], [27.45e-5, 24.96e-5, 24.72e-5]
    found = stats.geometric_mean_ratio(by_seed(asam), by_seed(sam))
    assert found.estimate == pytest.approx(3.06, abs=0.005)


def test_slopes_agree_with_linregress():
    x, y = [16, 64, 128], np.stack([sample(3, seed) for seed in range(4)])
    slopes = [scipy.stats.linregress(np.log2(x), row).slope for row in y]
    found = stats.slope_over_log2(x, y)
    assert bounds(found) == pytest.approx(bounds(stats.mean(slopes)), rel=1e-12)
    assert (found.n, found.method) == (4, "t of per-seed slopes")


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_brown_forsythe_has_nothing_to_say_without_spread(a, b):
    assert math.isnan(stats.brown_forsythe(a, b))


def test_brown_forsythe_agrees_with_its_definition():
    a, b = sample(10, 1, 3.0), sample(12, 2)
    deviations = [abs(a - np.median(a)), abs(b - np.median(b))]
    assert stats.brown_forsythe(a, b) == pytest.approx(scipy.stats.f_oneway(*deviations).pvalue, rel=1e-12)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_correlation_estimate_agrees_with_scipy(kind):
    x = sample(12, 1)
    y = x + sample(12, 2)
    reference = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}[kind]
    found = stats.correlation(x, y, kind=kind)
    assert found.estimate == pytest.approx(reference(x, y).statistic, rel=1e-12)
    assert found.low < found.estimate < found.high
    assert (found.n, found.method) == (12, f"{kind}, BCa bootstrap over settings")


def test_spread_interval_agrees_with_scipy_on_the_log_ratio():
    a, b = sample(10, 1, 2.0), sample(10, 2)
    for paired in (True, False):
        found = stats.sd_ratio(a, b, paired=paired)
        expected = scipy.stats.bootstrap(
            (a, b),
            lambda p, q, axis: np.log(p.var(axis=axis) / q.var(axis=axis)) / 2,
            paired=paired,
            rng=np.random.default_rng(5),  # other draws: the two agree up to Monte Carlo error
        ).confidence_interval
        assert (found.low, found.high) == pytest.approx(tuple(np.exp(expected)), rel=0.05)
        assert (found.estimate, found.method) == (pytest.approx(a.std() / b.std()), "BCa bootstrap")


def test_the_spread_of_curves_agrees_with_scipy_on_whole_curves():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 10, 6)) * np.linspace(1, 3, 6) + rng.normal(size=(2, 10, 1))
    found = stats.curve_sd_ratio(a, b)

    def log_ratio(*points, axis):  # every point of the two curves as a sample of its own, drawn together
        spreads = [point.std(axis=axis, ddof=1) for point in points]
        return np.log(sum(spreads[:6]) / sum(spreads[6:]))

    expected = scipy.stats.bootstrap(
        (*a.T, *b.T), log_ratio, paired=True, rng=np.random.default_rng(5)
    ).confidence_interval
    assert found.estimate == pytest.approx(a.std(axis=0, ddof=1).mean() / b.std(axis=0, ddof=1).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(expected)), rel=0.05)
    assert (found.n, found.method) == (10, "BCa bootstrap")


def test_a_curve_of_one_point_is_a_value():
    a, b = sample(10, 1, 2.0), sample(10, 2)
    expected = stats.sd_ratio(a, b, paired=True)
    assert bounds(stats.curve_sd_ratio(a[:, None], b[:, None])) == pytest.approx(bounds(expected), rel=1e-12)
    repeated = stats.curve_sd_ratio(np.tile(a[:, None], 7), b[:, None])  # rounding may break a tie among resamples
    assert bounds(repeated) == pytest.approx(bounds(expected), rel=1e-3)


# ---------------------------------------------------------------------------------------------- closed forms


def test_two_pairs_in_closed_form():
    found = stats.paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    t = math.tan(math.pi * 0.475)  # the 97.5 % quantile of Cauchy's law, which is t with one degree of freedom
    assert bounds(found) == pytest.approx((2.0, 2 - t, 2 + t), rel=1e-12)


def test_seeds_without_partner_are_left_out():
    found = stats.paired_difference({7: 99.0, 1: 2.0, 2: 3.0, 3: 5.0}, {3: 1.0, 2: 1.0, 1: 1.0, 9: -99.0})
    assert (found.estimate, found.n) == (pytest.approx(7 / 3), 3)
    assert stats.differences({7: 99.0, 1: 2.0, 3: 5.0}, {3: 1.0, 1: 1.0}) == {1: 1.0, 3: 4.0}


def test_exact_slope_and_exact_correlation():
    assert bounds(stats.slope_over_log2([1, 4, 8], [[0, 4, 6], [1, 5, 7]])) == pytest.approx((2.0, 2.0, 2.0))
    x = np.arange(8.0)
    assert bounds(stats.correlation(x, -3 * x)) == pytest.approx((-1, -1, -1))
    assert stats.correlation(x, np.exp(x), kind="spearman").estimate == pytest.approx(1)


def test_a_scale_is_found_again():
    a = sample(10)
    found = stats.sd_ratio(3 * a, a, paired=True)
    assert bounds(found) == pytest.approx((3, 3, 3))


@given(st.lists(finite, min_size=2, max_size=12), finite)
def test_shift_moves_the_mean_and_keeps_the_width(values, shift):
    plain, moved = stats.mean(values), stats.mean([value + shift for value in values])
    assert moved.estimate == pytest.approx(plain.estimate + shift, abs=1e-9)
    assert moved.high - moved.low == pytest.approx(plain.high - plain.low, abs=1e-6)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=8), st.randoms())
def test_swapped_arms_mirror_and_the_order_of_seeds_is_nothing(pairs, random):
    a, b = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    found, mirrored = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert bounds(found) == (-mirrored.estimate, -mirrored.high, -mirrored.low)
    shuffled = random.sample(list(a), len(a))
    assert stats.paired_difference({seed: a[seed] for seed in shuffled}, b) == found


# ---------------------------------------------------------------------------------------------- coverage


def coverage(interval_of, truth: float, repeats: int) -> float:
    hits = [found.low <= truth <= found.high for found in map(interval_of, range(repeats))]
    return sum(hits) / repeats


@pytest.mark.parametrize("n", [3, 10])
def test_paired_interval_covers_the_truth(n):
    def interval(seed):
        luck, noise = sample(n, seed, 5.0), sample(n, 10_000 + seed)
        return stats.paired_difference(by_seed(1 + luck + noise), by_seed(luck))

    assert coverage(interval, 1.0, 2000) == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_welch_interval_covers_the_truth():
    def interval(seed):
        return stats.unpaired_difference(sample(4, seed, 3.0), sample(9, 10_000 + seed))

    assert coverage(interval, 0.0, 2000) == pytest.approx(0.95, abs=0.02)  # Welch is an approximation


def test_bootstrap_intervals_cover_nearly_what_they_say(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 999)

    def spread(seed):
        return stats.sd_ratio(sample(10, seed), sample(10, 10_000 + seed), paired=False)

    def association(seed):
        x = sample(15, seed)
        return stats.correlation(x, 0.5 * x + math.sqrt(0.75) * sample(15, 10_000 + seed))

    assert 0.89 < coverage(spread, 1.0, 400) < 0.97
    assert 0.88 < coverage(association, 0.5, 400) < 0.97


# ---------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("values", [[], [4.0]])
def test_fewer_than_two_units_have_no_interval(values):
    empty_or_four = pytest.approx(values[0] if values else math.nan, nan_ok=True)
    for found in (
        stats.mean(values),
        stats.paired_difference(by_seed(values), by_seed([0.0] * len(values))),
        stats.slope_over_log2([1, 2], np.array([[0.0, value] for value in values]).reshape(-1, 2)),
    ):
        assert found.estimate == empty_or_four
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert found.n == len(values)
    assert math.isnan(stats.unpaired_difference(values, [1.0, 2.0, 3.0]).low)
    assert math.isnan(stats.sd_ratio(values, [1.0, 2.0], paired=False).low)
    assert math.isnan(stats.geometric_mean_ratio({0: 1.0}, {1: 1.0}).estimate)
    for curves in ([[value, 2.0] for value in values], [[1.0, 2.0], [3.0, 5.0]]):  # of curves, fewer than three
        assert math.isnan(stats.curve_sd_ratio(curves, curves).estimate)
        assert stats.curve_sd_ratio(curves, curves).n == len(curves)


def test_without_variance_the_interval_is_a_point():
    assert bounds(stats.mean([2.0, 2.0, 2.0])) == (2, 2, 2)
    assert bounds(stats.unpaired_difference([2.0, 2.0], [1.0, 1.0, 1.0])) == (1, 1, 1)


def test_without_variance_spread_and_correlation_are_undefined():
    varied = [1.0, 2.0, 4.0]
    for constant_side in ((varied, [3.0] * 3), ([3.0] * 3, varied)):
        assert all(map(math.isnan, bounds(stats.sd_ratio(*constant_side, paired=True))))
        assert all(map(math.isnan, bounds(stats.correlation(*constant_side))))
        curves = (np.array(side)[:, None] for side in constant_side)
        assert all(map(math.isnan, bounds(stats.curve_sd_ratio(*curves))))
    assert math.isnan(stats.brown_forsythe([1.0, 1.0], [3.0, 3.0]))


def test_percentiles_stand_in_where_resamples_are_degenerate():
    found = stats.correlation([1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert found.method == "pearson, percentile bootstrap over settings"
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    assert stats.sd_ratio([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], paired=True).method == "percentile bootstrap"


def test_the_bootstrap_repeats_itself():
    a, b = sample(9, 1), sample(9, 2)
    assert stats.sd_ratio(a, b, paired=False) == stats.sd_ratio(a, b, paired=False)
    assert stats.correlation(a, b) == stats.correlation(a, b)
    assert stats.curve_sd_ratio(a[:, None], b[:, None]) == stats.curve_sd_ratio(a[:, None], b[:, None])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: stats.mean([1.0, bad]),
        lambda bad: stats.paired_difference({0: 1.0}, {1: bad}),
        lambda bad: stats.unpaired_difference([1.0, 2.0], [bad]),
        lambda bad: stats.geometric_mean_ratio({0: bad}, {0: 1.0}),
        lambda bad: stats.sd_ratio([1.0, bad], [1.0, 2.0], paired=True),
        lambda bad: stats.brown_forsythe([bad], [1.0]),
        lambda bad: stats.curve_sd_ratio([[1.0], [bad]], [[1.0], [2.0]]),
        lambda bad: stats.slope_over_log2([1, 2], [[1.0, bad]]),
        lambda bad: stats.correlation([1.0, 2.0, bad], [1.0, 2.0, 3.0]),
    ],
)
def test_a_value_that_is_not_finite_is_refused(call, bad):
    with pytest.raises(InputError, match=r"(not finite|no logarithm)"):
        call(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.mean([1.0, 2.0], confidence=95), "confidence = 95"),
        (lambda: stats.mean([1.0], confidence=0.0), "confidence = 0.0"),
        (lambda: stats.correlation([1.0] * 3, [1.0] * 3, kind="kendall"), "use one of pearson, spearman"),
        (lambda: stats.correlation([1.0] * 3, [1.0] * 4), "3 and 4 values"),
        (lambda: stats.sd_ratio([1.0, 2.0], [1.0, 2.0, 3.0], paired=True), "2 and 3 values"),
        (lambda: stats.curve_sd_ratio([[1.0], [2.0]], [[1.0]]), r"shapes \(2, 1\) and \(1, 1\)"),
        (lambda: stats.curve_sd_ratio([1.0, 2.0], [1.0, 2.0]), "one row of points per seed"),
        (lambda: stats.curve_sd_ratio([[], []], [[], []]), "one row of points per seed"),
        (lambda: stats.geometric_mean_ratio({3: 0.0}, {3: 1.0}), r"a\[3\] = 0.0 has no logarithm"),
        (lambda: stats.slope_over_log2([1, 2], [1.0, 2.0]), "one row per seed"),
        (lambda: stats.slope_over_log2([1, 2, 3], [[1.0, 2.0]]), "one row per seed"),
        (lambda: stats.slope_over_log2([0, 2], [[1.0, 2.0]]), "different values above 0"),
        (lambda: stats.slope_over_log2([2, 2], [[1.0, 2.0]]), "different values above 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_frame_column_indexed_by_seed_can_be_used_as_it_is():
    a, b = pandas.Series([1.0, 2.0, 4.0], index=[5, 6, 7]), pandas.Series([1.0, 1.0], index=[7, 5])
    assert stats.differences(a, b) == {5: 0.0, 7: 3.0}
    with pytest.raises(InputError, match="a seed twice"):
        stats.differences(pandas.Series([1.0, 2.0], index=[5, 5]), b)
