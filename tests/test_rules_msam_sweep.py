"""Each rule of 04 at every edge of its outcome, on made-up frames; the arms it is bound to."""

import math

import pandas as pd
import pytest

from samlib import published
from samlib import spec as specs_of
from samlib.experiments import digits, msam_sweep
from samlib.rules import msam_sweep as rules_of
from samlib.rules.conventions import (
    CONTRADICTS,
    INCONCLUSIVE,
    INFORMATION,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    RULES,
    SUPPORTS,
)
from samlib.store import Store

ORDER, SWEEP, LAMBDA, HYBRID = msam_sweep.DECIDES
FULL, MINIATURE = False, True
HALF, TWICE = "msam half the shards", "msam twice the shards"
SHARDS = {"sgd": 1, "sgd_double": 1, "sam": 1, HALF: 2, "msam": 4, TWICE: 8}
UP = (1.0, 2.0, 3.0, 2.0)  # interval (0.70, 3.30)
DOWN = tuple(-gain for gain in UP)
OPEN = (3.0, -1.0, 2.0, -2.0)
SLIGHT = (0.1, 0.2, 0.1, 0.2)  # interval (0.06, 0.24)
NEITHER = "neither the condition"


def arm(role, values, cell="clean", first_seed=0):
    """Rows of one arm; a string among the values is a status."""
    rows = []
    for seed, value in enumerate(values, start=first_seed):
        row = {"cell": cell, "role": role, "seed": seed, "status": "done", "optim.num_shards": SHARDS.get(role, 4)}
        numbers = {"test_accuracy_pct": value, "lambda_max": value}
        rows.append(row | ({"status": value} if isinstance(value, str) else numbers))
    return rows


def steps(roles, gains, cell="clean", start=50.0):
    """Arms of which each is ahead of the one before by its gains, seed by seed; the first one is at `start`."""
    values = [start] * len(gains[0])
    rows = arm(roles[0], values, cell)
    for role, gain in zip(roles[1:], gains, strict=True):
        values = [value + one for value, one in zip(values, gain, strict=True)]
        rows += arm(role, values, cell)
    return rows


def judge(claim, rows, miniature=MINIATURE):
    return RULES[claim](pd.DataFrame(rows), miniature)


def outcomes(found):
    return [part.outcome for part in found[1]]


# ---------------------------------------------------------------------------------------------- SGD, SAM, mSAM


def order(sam_gain, msam_gain, cell="clean", double=UP):
    rows = steps(("sgd", "sam", "msam"), (sam_gain, msam_gain), cell)
    return rows + arm("sgd_double", [50.0 + gain for gain in double], cell)


@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
@pytest.mark.parametrize(
    ("sam_gain", "msam_gain", "expected"),
    [
        (UP, UP, REPRODUCED),
        (UP, SLIGHT, REPRODUCED),  # the sign alone, at any scale: the claim names no threshold
        (DOWN, UP, NOT_REPRODUCED),
        (UP, DOWN, NOT_REPRODUCED),
        (OPEN, DOWN, NOT_REPRODUCED),
        (OPEN, UP, INCONCLUSIVE),
        (UP, OPEN, INCONCLUSIVE),
    ],
)
def test_both_steps_of_the_order_decide(sam_gain, msam_gain, expected, miniature):
    assert judge(ORDER, order(sam_gain, msam_gain), miniature)[0] == expected


def test_sgd_at_twice_the_epochs_is_shown_and_decides_nothing():
    for double in (UP, tuple(50.0 + gain for gain in UP), OPEN):
        found = judge(ORDER, order(UP, UP, double=double))
        assert found[0] == REPRODUCED
        assert outcomes(found) == [SUPPORTS, SUPPORTS, INFORMATION, INFORMATION]
    assert [part.estimate for part in judge(ORDER, order(UP, UP))[1]] == [2.0, 2.0, 0.0, 2.0]


def test_both_cells_have_to_show_the_order_and_one_can_refuse_it():
    assert judge(ORDER, order(UP, UP) + order(UP, UP, "other"))[0] == REPRODUCED
    assert judge(ORDER, order(UP, UP) + order(UP, OPEN, "other"))[0] == INCONCLUSIVE
    assert judge(ORDER, order(UP, UP) + order(UP, DOWN, "other"))[0] == NOT_REPRODUCED


def test_the_paper_s_figures_stand_beside_the_gains_in_its_own_cells():
    figures = published.claim(ORDER).published
    assert figures["order"] == ["vanilla", "SAM", "mSAM"]
    parts = judge(ORDER, order(UP, UP, "cifar100_wrn"), FULL)[1]
    assert [part.published for part in parts] == [1.92, 1.14, None, None]
    assert {part.published for part in judge(ORDER, order(UP, UP))[1]} == {None}


# ---------------------------------------------------------------------------------------------- the number of shards


def sweep(first, second, last, cell="clean"):
    return steps(("sam", HALF, "msam", TWICE), (first, second, last), cell)


@pytest.mark.parametrize(
    ("first", "second", "last", "in_miniature", "in_full"),
    [
        (UP, UP, DOWN, REPRODUCED, REPRODUCED),
        (UP, UP, SLIGHT, NOT_REPRODUCED, REPRODUCED),  # a rise, of less than 0.3 points
        (UP, UP, UP, NOT_REPRODUCED, NOT_REPRODUCED),
        (UP, UP, OPEN, INCONCLUSIVE, INCONCLUSIVE),
        (UP, UP, (0.25, -0.25, 0.125, -0.125), INCONCLUSIVE, INCONCLUSIVE),  # up to 0.36
        (UP, UP, (0.1, -0.1, 0.1, -0.1), INCONCLUSIVE, REPRODUCED),  # flat, which a miniature cannot say
        (DOWN, DOWN, DOWN, NOT_REPRODUCED, NOT_REPRODUCED),
        (OPEN, OPEN, DOWN, INCONCLUSIVE, INCONCLUSIVE),
        (OPEN, OPEN, UP, NOT_REPRODUCED, NOT_REPRODUCED),
        (DOWN, (6.0,) * 4, DOWN, REPRODUCED, REPRODUCED),  # the slope is that of the line through the three
    ],
)
def test_the_slope_and_the_last_step_decide(first, second, last, in_miniature, in_full):
    rows = sweep(first, second, last)
    assert judge(SWEEP, rows, MINIATURE)[0] == in_miniature
    assert judge(SWEEP, rows, FULL)[0] == in_full


def test_the_slope_is_per_doubling_of_the_shards_that_were_run():
    slope, last = judge(SWEEP, sweep((1.0,) * 4, (3.0,) * 4, (-1.0,) * 4))[1]
    assert (slope.estimate, last.estimate) == (2.0, -1.0)
    published_shards = {"sam": 1, HALF: 16, "msam": 32, TWICE: 64}
    rows = [{**row, "optim.num_shards": published_shards[row["role"]]} for row in sweep(UP, UP, DOWN)]
    x, y = [0.0, 4.0, 5.0], [50.0, 52.0, 54.0]
    centred = [value - 3.0 for value in x]
    expected = sum(a * b for a, b in zip(centred, y, strict=True)) / sum(a * a for a in centred)
    assert judge(SWEEP, rows, FULL)[1][0].estimate == pytest.approx(expected, rel=1e-12)


def test_what_a_part_says_of_the_last_step_follows_its_margin():
    rows = sweep(UP, UP, SLIGHT)
    assert outcomes(judge(SWEEP, rows, MINIATURE)) == [SUPPORTS, CONTRADICTS]
    assert outcomes(judge(SWEEP, rows, FULL)) == [SUPPORTS, SUPPORTS]


# ---------------------------------------------------------------------------------------------- lambda_max

FLATTER, SHARPER, EITHER = (0.5, 0.6, 0.5, 0.6), (2.0, 1.8, 2.0, 1.8), (2.0, 0.5, 2.0, 0.5)


def eigenvalues(sam_ratio, msam_ratio):
    sam = [20.0 * ratio for ratio in sam_ratio]
    msam = [one * ratio for one, ratio in zip(sam, msam_ratio, strict=True)]
    return arm("sgd", [20.0] * len(sam)) + arm("sam", sam) + arm("msam", msam)


@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
@pytest.mark.parametrize(
    ("sam_ratio", "msam_ratio", "expected"),
    [
        (FLATTER, FLATTER, REPRODUCED),
        (FLATTER, SHARPER, NOT_REPRODUCED),
        (SHARPER, FLATTER, NOT_REPRODUCED),
        (EITHER, SHARPER, NOT_REPRODUCED),
        (FLATTER, EITHER, INCONCLUSIVE),
        (EITHER, FLATTER, INCONCLUSIVE),
    ],
)
def test_both_ratios_of_lambda_max_decide(sam_ratio, msam_ratio, expected, miniature):
    found = judge(LAMBDA, eigenvalues(sam_ratio, msam_ratio), miniature)
    assert found[0] == expected
    assert found[1][0].estimate == pytest.approx(math.prod(sam_ratio) ** (1 / 4))


def test_an_eigenvalue_that_is_not_above_0_allows_no_conclusion():
    rows = eigenvalues(FLATTER, FLATTER)
    rows[-1]["lambda_max"] = -0.01
    found = judge(LAMBDA, rows)
    assert (found[0], outcomes(found)) == (INCONCLUSIVE, [SUPPORTS, INCONCLUSIVE])
    assert "lambda_max is not above 0 for seeds 3" in found[2]


# ---------------------------------------------------------------------------------------------- hybrids


def hybrids(*gains):
    rows = arm("sgd", [50.0] * 4)
    for role, gain in zip(rules_of.HYBRIDS, gains, strict=True):
        rows += arm(role, [50.0 + one for one in gain])
    return rows


@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([UP] * 6, REPRODUCED),
        ([UP] * 5 + [OPEN], INCONCLUSIVE),
        ([UP] * 5 + [DOWN], INCONCLUSIVE),
        ([UP] * 3 + [DOWN] * 3, INCONCLUSIVE),  # half is no majority
        ([UP] * 2 + [DOWN] * 4, NOT_REPRODUCED),
        ([DOWN] * 6, NOT_REPRODUCED),
        ([OPEN] * 3 + [DOWN] * 3, INCONCLUSIVE),
    ],
)
def test_every_hybrid_counts(gains, expected, miniature):
    found = judge(HYBRID, hybrids(*gains), miniature)
    assert found[0] == expected
    assert len(found[1]) == 6


# ---------------------------------------------------------------------------------------------- gaps, and the arms

STEADY = (2.0, 2.25, 2.5, 2.25)  # its first three leave 0 out, too
CASES = {
    ORDER: order(STEADY, STEADY),
    SWEEP: sweep(STEADY, STEADY, tuple(-gain for gain in STEADY)),
    LAMBDA: eigenvalues(FLATTER, FLATTER),
    HYBRID: hybrids(*[STEADY] * 6),
}


@pytest.mark.parametrize("claim", CASES)
def test_three_seeds_are_enough_and_two_are_not(claim):
    assert judge(claim, [row for row in CASES[claim] if row["seed"] < 3])[0] == REPRODUCED
    two = [row for row in CASES[claim] if row["seed"] < 2]
    found = judge(claim, two)
    assert found[0] == INCONCLUSIVE
    assert "n = 2, at least 3 are needed" in found[2]


@pytest.mark.parametrize("claim", CASES)
def test_a_diverged_run_allows_no_conclusion(claim):
    last_role = "msam" if claim in (ORDER, LAMBDA) else CASES[claim][-1]["role"]
    rows = [
        {**row, "status": "diverged"} if (row["role"], row["seed"]) == (last_role, 1) else row for row in CASES[claim]
    ]
    found = judge(claim, rows)
    assert found[0] == INCONCLUSIVE
    assert "diverged for 1 of 4 seeds (1)" in found[2]
    assert NEITHER in found[2]


@pytest.mark.parametrize("claim", CASES)
def test_an_arm_without_a_finished_run_is_not_run(claim):
    for role in {row["role"] for row in CASES[claim]}:
        rows = [{**row, "status": "missing"} if row["role"] == role else row for row in CASES[claim]]
        assert judge(claim, rows)[::2] == (NOT_RUN, f"clean: {role} has no finished record (4 missing)")


@pytest.mark.parametrize("claim", CASES)
def test_the_rule_finds_all_its_arms_in_the_experiment(claim, tmp_path):
    bound = [one for one in msam_sweep.arms("quick") if one.cell in msam_sweep.DECIDES[claim]["quick"]]
    found = RULES[claim](Store(tmp_path).frame(bound), MINIATURE)
    assert found[0] == NOT_RUN
    assert "10 missing" in found[2]
    assert "no arm of this role" not in found[2]


def specs(cell="clean"):
    return {one.role: one.specs[0] for one in msam_sweep.arms("quick") if one.cell == cell}


@pytest.mark.parametrize("cell", msam_sweep.CELLS)
def test_sam_and_msam_differ_in_the_number_of_shards_alone(cell):
    """Erratum E-M3: the same rho; erratum E-M8: the same schedule and momentum."""
    sam, found = specs_of.flat(digits.sam(cell)), specs(cell)
    assert found["sgd"] == digits.sgd(cell)
    for role, spec in found.items():
        changed = {name for name, value in specs_of.flat(spec).items() if value != sam[name]}
        expected = {
            "sgd": {"optim.method", "optim.rho"},
            "sgd_double": {"optim.method", "optim.rho", "train.epochs"},
            "sam": set(),
            "sgd ghost batch norm": {"optim.num_shards", "optim.rho"},
            "msam whole-batch norm": {"optim.num_shards", "optim.shard_batchnorm"},
        }
        window = "optim.ascent_until" if "first" in role else "optim.ascent_from"
        hybrid = {"optim.num_shards", window} if role in rules_of.HYBRIDS else {"optim.num_shards"}
        assert changed == expected.get(role, hybrid), role


def test_a_hybrid_uses_msam_for_the_share_its_name_says():
    found = specs()
    for role in rules_of.HYBRIDS:
        side, share = role.split()[1:]
        optim, share = found[role].optim, float(share.rstrip("%")) / 100
        assert optim.num_shards == found["msam"].optim.num_shards
        window = (0.0, share) if side == "first" else (pytest.approx(1 - share), 1.0)
        assert (optim.ascent_from, optim.ascent_until) == window


def test_the_shards_hold_half_the_images_of_the_published_ones():
    found = specs()
    images = {role: found[role].train.batch_size // found[role].optim.num_shards for role in ("msam", TWICE)}
    assert images == {"msam": 16 // 2, TWICE: 8 // 2}
