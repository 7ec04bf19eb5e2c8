"""Conventions that no claim of experiments 00 and 01 needs: ratios, spread, slopes, and majorities of parts."""

import math

import numpy as np
import pandas as pd
import pytest

from samlib import stats
from samlib.rules import conventions
from samlib.rules.conventions import ABOVE, BELOW, CONTRADICTS, INCONCLUSIVE, SUPPORTS, Evidence, Part

CELL = "cell"


def evidence(**arms):
    """role -> values by seed, or (cell, values); a string among the values is a status."""
    rows = []
    for role, given in arms.items():
        cell, values = given if isinstance(given, tuple) else (CELL, given)
        for seed, value in enumerate(values):
            status = value if isinstance(value, str) else "done"
            found = math.nan if isinstance(value, str) else value
            rows.append({"cell": cell, "role": role, "seed": seed, "status": status, "metric": found})
    return Evidence(pd.DataFrame(rows), tuple(arms), {}, False, [])


# ---------------------------------------------------------------------------------------------- ratios


def test_a_mean_ratio_is_the_geometric_one_paired_by_seed():
    a, b = [2.0, 4.0, 9.0], [1.0, 2.0, 3.0]
    part = conventions.mean_ratio(evidence(a=a, b=b), CELL, "metric", "a", "b")
    expected = stats.geometric_mean_ratio(dict(enumerate(a)), dict(enumerate(b)))
    assert (part.estimate, part.low, part.high, part.n) == (expected.estimate, expected.low, expected.high, 3)
    assert part.estimate == pytest.approx(12 ** (1 / 3))


@pytest.mark.parametrize(
    ("a", "claimed", "outcome"),
    [
        ([2.0, 2.1, 1.9], ABOVE, SUPPORTS),
        ([2.0, 2.1, 1.9], BELOW, CONTRADICTS),
        ([0.5, 0.6, 0.4], BELOW, SUPPORTS),
        ([0.5, 0.6, 0.4], ABOVE, CONTRADICTS),
        ([0.5, 1.0, 2.0], ABOVE, INCONCLUSIVE),
        ([2.0, 2.1], ABOVE, INCONCLUSIVE),
        ([2.0, 2.1, 1.9, "diverged"], ABOVE, INCONCLUSIVE),
    ],
)
def test_a_mean_ratio_is_judged_against_one(a, claimed, outcome):
    rows = evidence(a=a, b=[1.0] * len(a))
    assert conventions.mean_ratio(rows, CELL, "metric", "a", "b", claimed=claimed).outcome == outcome


@pytest.mark.parametrize("zero", [0.0, -1.0])
def test_a_ratio_of_values_that_are_not_positive_decides_nothing_and_says_so(zero):
    rows = evidence(a=[2.0, 2.1, 1.9, 2.0], b=[1.0, 1.0, 1.0, zero])
    part = conventions.mean_ratio(rows, CELL, "metric", "a", "b")
    assert (part.outcome, part.n) == (INCONCLUSIVE, 3)
    assert math.isnan(part.low)
    assert "not above 0 for seeds 3" in rows.notes[0]


# ---------------------------------------------------------------------------------------------- spread


def normal(scale, seed, n=10):
    return (np.random.default_rng(seed).standard_normal(n) * scale).tolist()


@pytest.mark.parametrize(
    ("scale", "claimed", "outcome"),
    [(0.1, BELOW, SUPPORTS), (10.0, BELOW, CONTRADICTS), (10.0, ABOVE, SUPPORTS), (1.7, BELOW, INCONCLUSIVE)],
)
def test_a_spread_ratio_is_judged_against_one(scale, claimed, outcome):
    rows = evidence(a=normal(scale, 1), b=normal(1.0, 2))
    assert conventions.spread_ratio(rows, CELL, "metric", "a", "b", claimed=claimed).outcome == outcome


def test_nine_seeds_say_nothing_about_spread():
    rows = evidence(a=normal(0.1, 1, 9), b=normal(1.0, 2, 9))
    part = conventions.spread_ratio(rows, CELL, "metric", "a", "b")
    assert (part.outcome, part.n) == (INCONCLUSIVE, 9)
    assert "at least 10 are needed" in rows.notes[0]


def test_a_spread_ratio_draws_the_pairs_both_arms_hold():
    a, b = normal(0.1, 1, 11), normal(1.0, 2, 11)
    part = conventions.spread_ratio(evidence(a=[*a[:10], "missing"], b=b), CELL, "metric", "a", "b")
    expected = stats.sd_ratio(a[:10], b[:10], paired=True)
    assert (part.estimate, part.low, part.high, part.n) == (expected.estimate, expected.low, expected.high, 10)


# ---------------------------------------------------------------------------------------------- slopes


def test_a_slope_is_per_doubling_and_per_seed():
    rows = evidence(small=("x=1", [1.0, 2.0, 3.0]), large=("x=4", [3.0, 4.0, 7.0]))
    part = conventions.slope_per_doubling(rows, {1: ("x=1", "small"), 4: ("x=4", "large")}, "metric")
    expected = stats.mean([1.0, 1.0, 2.0])
    assert (part.estimate, part.low, part.high) == pytest.approx((expected.estimate, expected.low, expected.high))
    assert (part.outcome, part.n) == (INCONCLUSIVE, 3)


@pytest.mark.parametrize(("claimed", "outcome"), [(ABOVE, SUPPORTS), (BELOW, CONTRADICTS)])
def test_a_slope_has_a_sign(claimed, outcome):
    rows = evidence(small=[1.0, 2.0, 3.0], large=[3.0, 4.1, 4.9])
    points = {1: (CELL, "small"), 2: (CELL, "large")}
    assert conventions.slope_per_doubling(rows, points, "metric", claimed=claimed).outcome == outcome


@pytest.mark.parametrize("large", [[3.0, 4.0], [3.0, 4.1, 4.9, "diverged"], ["missing"] * 3])
def test_a_slope_over_too_few_or_diverged_seeds_decides_nothing(large):
    rows = evidence(small=[1.0, 2.0, 3.0, 4.0], large=large)
    points = {1: (CELL, "small"), 2: (CELL, "large")}
    assert conventions.slope_per_doubling(rows, points, "metric").outcome == INCONCLUSIVE


# ---------------------------------------------------------------------------------------------- several parts


def parts(*outcomes):
    return [Part("", "", 0.0, 0.0, 0.0, 3, outcome) for outcome in outcomes]


@pytest.mark.parametrize(
    ("outcomes", "majority"),
    [
        ((), False),
        ((SUPPORTS,), True),
        ((SUPPORTS, INCONCLUSIVE), False),
        ((SUPPORTS, SUPPORTS, CONTRADICTS), True),
        ((SUPPORTS, SUPPORTS, CONTRADICTS, INCONCLUSIVE), False),
    ],
)
def test_a_majority_is_more_than_half(outcomes, majority):
    assert conventions.most(parts(*outcomes), SUPPORTS) is majority


def test_an_untrusted_part_stays_inconclusive_at_any_threshold():
    interval = stats.mean([5.0, 6.0, 7.0])
    part = conventions.judged_part("", "", interval, False, ABOVE, None)
    assert conventions.judged_at(1, part, ABOVE).outcome == INCONCLUSIVE
    trusted = conventions.judged_part("", "", interval, True, ABOVE, None)
    assert [conventions.judged_at(at, trusted, ABOVE).outcome for at in (1, 6, 20)] == [
        SUPPORTS,
        INCONCLUSIVE,
        CONTRADICTS,
    ]
