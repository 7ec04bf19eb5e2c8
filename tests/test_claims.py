"""Each rule at every edge of its outcome, on made-up frames; the conventions as properties; digests and their age."""

import ast
import dataclasses
import functools
import hashlib
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samlib import claims, experiments, published, rules, spec, store
from samlib.errors import InputError
from samlib.rules import RULES
from samlib.rules.conventions import (
    CONTRADICTS,
    INCONCLUSIVE,
    INFORMATION,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    SUPPORTS,
    rule,
)

FULL, MINIATURE = False, True
PER_SEED = "coldenhoff-a-sam-beats-sgd-per-seed"
BUDGET = "coldenhoff-a-equal-gradient-budget"
TABLE_1 = "foret-t1-sam-beats-sgd-cifar"
LONGER = "foret-long-sgd-does-not-help"
SVHN = "foret-svhn"
FASHION = "foret-fashion-mnist"
DUAL, ONE_SHARD = "foret-eq2-dual-norm", "behdin-msam-m1-is-sam"
JACOBIAN, TOY = "behdin-lemma34-effective-jacobian", "behdin-theorem32-toy"

# claim -> the arm that should win, the arms it is compared with
TRAINED = {
    PER_SEED: ("sam", ("sgd",)),
    BUDGET: ("sam_half", ("sgd",)),
    TABLE_1: ("sam", ("sgd", "sgd_double")),
    LONGER: ("sam", ("sgd_double", "sgd")),
    SVHN: ("sam", ("sgd",)),
    FASHION: ("sam", ("sgd",)),
}
CELL = "wrn_basic"
WIN = (1.0, 2.0, 3.0, 2.0)  # interval (0.70, 3.30)
LOSS = tuple(-gain for gain in WIN)
OPEN = (3.0, -1.0, 2.0, -2.0)
TINY = (0.25, -0.25, 0.125, -0.125)


def row(cell, role, seed, status="done", **values):
    return {"cell": cell, "role": role, "seed": seed, "status": status, **values}


def accuracies(role, values, cell=CELL, first_seed=0):
    """Rows of one arm; a string among the values is a status."""
    return [
        row(cell, role, seed, status=value)
        if isinstance(value, str)
        else row(cell, role, seed, test_accuracy_pct=value, **{"test_accuracy_pct@best_test": value + 1})
        for seed, value in enumerate(values, start=first_seed)
    ]


def compared(claim, gains, cell=CELL, base=50.0):
    """Rows in which the winner of the claim is ahead of each of its rivals by these points, seed by seed."""
    winner, rivals = TRAINED[claim]
    rows = accuracies(winner, [base + gain for gain in gains], cell)
    for rival in rivals:
        rows += accuracies(rival, [base] * len(gains), cell)
    return rows


def judge(claim, rows, miniature=FULL):
    return RULES[claim](pd.DataFrame(rows), miniature)


def outcome(claim, rows, miniature=FULL):
    return judge(claim, rows, miniature)[0]


# ---------------------------------------------------------------------------------------------- trained claims


@pytest.mark.parametrize("claim", TRAINED)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
@pytest.mark.parametrize(
    ("gains", "expected"),
    [(WIN, REPRODUCED), (LOSS, NOT_REPRODUCED), (OPEN, INCONCLUSIVE), (WIN[:3], INCONCLUSIVE)],
)
def test_the_interval_decides(claim, gains, miniature, expected):
    assert outcome(claim, compared(claim, gains), miniature) == expected


@pytest.mark.parametrize("claim", TRAINED)
def test_three_seeds_are_enough_and_two_are_not(claim):
    assert outcome(claim, compared(claim, (2.0, 2.25, 2.5))) == REPRODUCED
    found, parts, reason = judge(claim, compared(claim, (2.0, 2.25)))
    assert found == INCONCLUSIVE
    assert "n = 2, at least 3 are needed" in reason
    assert parts[0].n == 2
    assert math.isnan(parts[0].low)


@pytest.mark.parametrize("claim", TRAINED)
@pytest.mark.parametrize("status", ["missing", "failed", "stale"])
def test_an_arm_without_a_finished_record_is_not_run(claim, status):
    winner, rivals = TRAINED[claim]
    for role in (winner, *rivals):
        rows = [{**r, "status": status} if r["role"] == role else r for r in compared(claim, WIN)]
        found, parts, reason = judge(claim, rows)
        assert (found, parts) == (NOT_RUN, ())
        assert reason == f"{CELL}: {role} has no finished record (4 {status})"


@pytest.mark.parametrize("claim", TRAINED)
def test_a_role_that_was_never_declared_is_not_run(claim):
    role = TRAINED[claim][1][-1]
    rows = [r for r in compared(claim, WIN) if r["role"] != role]
    assert judge(claim, rows)[::2] == (NOT_RUN, f"{CELL}: {role} has no finished record (no arm of this role)")
    assert judge(claim, [row(CELL, "other", 0)])[::2] == (NOT_RUN, "no arm of the comparison is there")


@pytest.mark.parametrize("claim", TRAINED)
def test_one_cell_that_is_not_run_leaves_the_claim_not_run(claim):
    rows = compared(claim, WIN) + [{**r, "status": "missing"} for r in compared(claim, WIN, cell="wrn_cutout")]
    assert outcome(claim, rows) == NOT_RUN


@pytest.mark.parametrize("claim", TRAINED)
def test_a_seed_without_partner_is_left_out_and_said(claim):
    winner, _ = TRAINED[claim]
    rows = compared(claim, (2.0, 2.25, 2.5, -90.0))
    lost = [{**r, "status": "failed"} if r["role"] == winner and r["seed"] == 3 else r for r in rows]
    found, parts, reason = judge(claim, lost)
    assert (found, parts[0].n) == (REPRODUCED, 3)
    assert f"{CELL}: of 4 seeds of {winner}, 1 failed" in reason
    assert outcome(claim, [r for r in lost if r["seed"] != 0]) == INCONCLUSIVE  # two pairs are left


@pytest.mark.parametrize("claim", TRAINED)
@pytest.mark.parametrize("gains", [WIN, LOSS])
def test_a_diverged_run_leaves_no_conclusion_whichever_arm_it_hits(claim, gains):
    deciding = {LONGER: ("sam", "sgd_double")}.get(claim, (TRAINED[claim][0], *TRAINED[claim][1]))
    for role in deciding:
        rows = [
            row(CELL, role, 3, "diverged") if (r["role"], r["seed"]) == (role, 3) else r
            for r in compared(claim, (*gains[:3], gains[0]))
        ]
        found, parts, reason = judge(claim, rows)
        assert found == INCONCLUSIVE
        assert f"{CELL}: {role} diverged for 1 of 4 seeds (3)" in reason
        assert (parts[0].outcome, parts[0].n) == (INCONCLUSIVE, 3)
        assert math.isnan(parts[0].low)
        assert math.isnan(parts[0].high)


@pytest.mark.parametrize("claim", TRAINED)
def test_an_arm_that_diverged_throughout_did_run(claim):
    winner, _ = TRAINED[claim]
    rows = [row(CELL, winner, r["seed"], "diverged") if r["role"] == winner else r for r in compared(claim, WIN)]
    found, parts, _ = judge(claim, rows)
    assert found == INCONCLUSIVE
    assert parts[0].n == 0


def test_records_that_all_diverged_need_no_metric_columns():
    rows = [row(CELL, role, seed, "diverged") for role in ("sam", "sgd") for seed in range(3)]
    assert outcome(FASHION, rows) == INCONCLUSIVE


@pytest.mark.parametrize("claim", [FASHION, BUDGET])
def test_arms_with_seeds_of_their_own_are_compared_by_welch(claim):
    winner, (rival,) = TRAINED[claim]
    rows = accuracies(winner, (52.0, 53.0, 54.0)) + accuracies(rival, (50.0, 50.5, 50.25), first_seed=10)
    found, parts, _ = judge(claim, rows)
    assert found == REPRODUCED
    assert parts[0].statistic.endswith("unpaired")
    assert outcome(claim, [r for r in rows if r["seed"] != 12]) == INCONCLUSIVE  # two seeds in one arm


def test_a_run_that_is_done_without_a_score_is_left_out_and_said():
    rows = compared(FASHION, (2.0, 2.25, 2.5, 2.0))
    rows[3]["test_accuracy_pct"] = math.nan
    found, parts, reason = judge(FASHION, rows)
    assert (found, parts[0].n) == (REPRODUCED, 3)
    assert f"{CELL}: sam has no test_error_pct for seeds 3" in reason


def test_a_frame_that_breaks_the_contract_is_refused():
    with pytest.raises(InputError, match="no column 'test_accuracy_pct': the rule needs it for sam_half"):
        judge(BUDGET, [row(CELL, role, seed) for role in ("sam_half", "sgd") for seed in range(3)])
    with pytest.raises(InputError, match=r"role 'sgd', seed 0 twice"):
        judge(FASHION, compared(FASHION, WIN) + accuracies("sgd", (50.0,)))


def test_what_is_matched_is_said():
    assert "matched: epochs" in judge(PER_SEED, compared(PER_SEED, WIN))[2]
    assert "matched: gradient evaluations" in judge(BUDGET, compared(BUDGET, WIN))[2]


# ---------------------------------------------------------------------------------------------- coldenhoff A


@pytest.mark.parametrize(
    ("gains", "full", "miniature"),
    [
        # a small difference contradicts at the published scale only: 0.5 points mean nothing on other data
        (TINY, NOT_REPRODUCED, INCONCLUSIVE),
        ((0.0,) * 4, NOT_REPRODUCED, INCONCLUSIVE),
        # interval above 0, every seed positive, and wholly inside [-0.5, 0.5]: both sides
        ((0.25, 0.375, 0.25), INCONCLUSIVE, REPRODUCED),
        # exactly at the threshold, and just past it
        ((0.5,) * 3, INCONCLUSIVE, REPRODUCED),
        ((0.5 + 2**-40,) * 3, REPRODUCED, REPRODUCED),
        ((-0.5,) * 3, NOT_REPRODUCED, NOT_REPRODUCED),
        # interval above 0 but one seed lost, or tied
        ((2.0,) * 9 + (-0.125,), INCONCLUSIVE, INCONCLUSIVE),
        ((2.0,) * 9 + (0.0,), INCONCLUSIVE, INCONCLUSIVE),
        # every seed won, interval open
        ((0.125, 3.0, 0.25), INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_sam_beats_sgd_for_each_seed(gains, full, miniature):
    rows = compared(PER_SEED, gains)
    assert (outcome(PER_SEED, rows, FULL), outcome(PER_SEED, rows, MINIATURE)) == (full, miniature)


def test_both_sides_are_named():
    assert "both hold" in judge(PER_SEED, compared(PER_SEED, (0.5,) * 3))[2]
    assert "neither" in judge(PER_SEED, compared(PER_SEED, OPEN))[2]


def test_parts_of_the_per_seed_claim():
    _, (gain, wins, best), _ = judge(PER_SEED, compared(PER_SEED, WIN))
    assert (gain.estimate, gain.n, gain.outcome, gain.published) == (2.0, 4, SUPPORTS, None)
    assert (gain.low, gain.high) == pytest.approx((0.7008, 3.2992), abs=1e-4)
    assert (wins.estimate, wins.n, wins.outcome) == (4, 4, SUPPORTS)
    assert (best.name, best.outcome, best.published) == (f"{CELL}, best test epoch", INFORMATION, 6.54)
    lost = judge(PER_SEED, compared(PER_SEED, LOSS))[1][1]
    assert (lost.estimate, lost.outcome) == (0, CONTRADICTS)


def test_the_published_table_supports_the_claim():
    figures = published.claim(PER_SEED).published
    rows = accuracies("sam", figures["sam"]) + accuracies("sgd", figures["sgd"])
    found, (gain, *_), _ = judge(PER_SEED, rows)
    assert found == REPRODUCED
    assert gain.estimate == pytest.approx(figures["mean_difference"], abs=0.005)


def test_half_the_epochs_shows_the_published_difference_for_information():
    _, (gain, best), _ = judge(BUDGET, compared(BUDGET, WIN))
    assert (gain.outcome, gain.published) == (SUPPORTS, None)
    assert (best.outcome, best.published) == (INFORMATION, pytest.approx(5.3, abs=1e-9))


@pytest.mark.parametrize("claim", [PER_SEED, BUDGET, LONGER, FASHION])
def test_several_cells_have_to_agree(claim):
    def both(first, second):
        return compared(claim, first, cell="a") + compared(claim, second, cell="b")

    assert outcome(claim, both(WIN, WIN)) == REPRODUCED
    assert outcome(claim, both(LOSS, LOSS)) == NOT_REPRODUCED
    for mixed in (both(WIN, LOSS), both(WIN, OPEN), both(OPEN, LOSS)):
        assert outcome(claim, mixed) == INCONCLUSIVE


# ---------------------------------------------------------------------------------------------- foret


def table_1(sam, sgd, sgd_double, cell=CELL):
    return accuracies("sam", sam, cell) + accuracies("sgd", sgd, cell) + accuracies("sgd_double", sgd_double, cell)


def test_sam_has_to_beat_the_better_of_the_two_baselines():
    sam, weak, strong = (52.0, 52.5, 52.25), (50.0,) * 3, (53.0,) * 3
    assert outcome(TABLE_1, table_1(sam, weak, weak)) == REPRODUCED
    for rows in (table_1(sam, weak, strong), table_1(sam, strong, weak)):
        found, (pooled, gap), _ = judge(TABLE_1, rows)
        assert found == NOT_REPRODUCED
        assert pooled.estimate == gap.estimate == pytest.approx(0.75)
        assert gap.outcome == INFORMATION
    assert "sgd_double" in judge(TABLE_1, table_1(sam, weak, strong))[1][0].statistic


def test_a_baseline_that_may_be_the_better_one_is_not_passed_over():
    rows = table_1((52.0, 52.5, 52.25), (50.0,) * 3, (49.0, 49.0, "diverged"))
    assert outcome(TABLE_1, rows) == INCONCLUSIVE
    rows = table_1((52.0, 52.5, 52.25), (50.0,) * 3, (49.0, 49.0, "missing"))
    assert outcome(TABLE_1, rows) == INCONCLUSIVE


def test_every_cell_of_table_1_has_to_point_the_claimed_way():
    def cells(first, second):
        return compared(TABLE_1, first, cell="a") + compared(TABLE_1, second, cell="b")

    assert outcome(TABLE_1, cells(WIN, (0.5, 0.25, -0.25, 0.5))) == REPRODUCED  # open alone, but pooled and in mean
    assert outcome(TABLE_1, cells((8.0,) * 4, (-1.0,) * 4)) == INCONCLUSIVE  # pooled above, one cell against
    assert outcome(TABLE_1, cells((8.0,) * 4, (0.0,) * 4)) == INCONCLUSIVE  # a tie is not the claimed direction
    assert outcome(TABLE_1, cells((1.0,) * 4, (-8.0,) * 4)) == NOT_REPRODUCED  # the pooled interval alone


def test_pooling_averages_within_each_seed():
    rows = compared(TABLE_1, (1.0, 2.0, 3.0), cell="a") + compared(TABLE_1, (3.0, 2.0, 1.0), cell="b")
    pooled = judge(TABLE_1, rows)[1][0]
    assert (pooled.estimate, pooled.low, pooled.high, pooled.n) == (-2, -2, -2, 3)
    only_a = [r for r in rows if (r["cell"], r["seed"]) != ("b", 0)]
    assert judge(TABLE_1, only_a)[1][0].n == 2


def test_doubling_the_epochs_is_shown_beside_the_claim():
    rows = table_1((54.0, 54.5, 54.25), (50.0,) * 3, (51.0,) * 3)
    found, (gap, doubling), _ = judge(LONGER, rows)
    assert (found, gap.estimate) == (REPRODUCED, pytest.approx(-3.25))
    assert (doubling.name, doubling.estimate, doubling.outcome) == (f"{CELL}, doubling", -1, INFORMATION)


def test_shake_shake_is_shown_and_does_not_decide_svhn():
    rows = compared(SVHN, WIN) + compared(SVHN, LOSS, cell="ss_aa")
    found, (wide_resnet, shake_shake), _ = judge(SVHN, rows)
    assert found == REPRODUCED
    assert (wide_resnet.name, wide_resnet.published) == (CELL, -0.16)
    assert (shake_shake.outcome, shake_shake.published) == (INFORMATION, 0.04)
    assert outcome(SVHN, compared(SVHN, WIN) + compared(SVHN, OPEN, cell="wrn_aa")) == INCONCLUSIVE
    assert outcome(SVHN, compared(SVHN, LOSS) + compared(SVHN, LOSS, cell="wrn_aa")) == NOT_REPRODUCED
    assert outcome(SVHN, compared(SVHN, WIN, cell="ss_aa")) == INCONCLUSIVE  # nothing of what the rule is about


def test_fashion_mnist_prints_the_difference_of_each_published_cell():
    (part,) = judge(FASHION, compared(FASHION, WIN))[1]
    assert (part.published, part.estimate, part.outcome) == (-0.59, -2.0, SUPPORTS)
    (elsewhere,) = judge(FASHION, compared(FASHION, WIN, cell="small net"))[1]
    assert elsewhere.published is None


# ---------------------------------------------------------------------------------------------- identities


def checks(cells, role, good, bad=None, seeds=5):
    """Rows of exact checks: the good values for every seed, with `bad` put into the last row."""
    rows = [row(cell, role, seed, **good) for cell in cells for seed in range(seeds)]
    rows[-1] |= bad or {}
    return rows


DUAL_ROWS = (("p=1.5", "p=2", "p=4", "p=inf"), "closed_form", {"relative_gap": 1e-12, "norm_ratio": 1.0})
SHARD_ROWS = (("one_shard",), "msam", {"max_relative_difference": 0.0, "mean_of_ascents_difference": 1e-15})
JACOBIAN_ROWS = (
    ("quadratic",),
    "jacobian",
    {"min_eigenvalue_sam_minus_sgd": 1e-3, "min_eigenvalue_msam_minus_sam": -1e-12, "formula_error": 1e-14},
)
below_1e5, at_1e6, below_1e8 = 1e-5 * (1 - 1e-9), 1e-6, 1e-8 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("claim", "rows", "bad", "expected"),
    [
        (DUAL, DUAL_ROWS, {}, REPRODUCED),
        (DUAL, DUAL_ROWS, {"relative_gap": below_1e5}, REPRODUCED),
        (DUAL, DUAL_ROWS, {"relative_gap": 1e-5}, NOT_REPRODUCED),
        (DUAL, DUAL_ROWS, {"relative_gap": -1.0}, REPRODUCED),  # the closed form found more than the solver
        (DUAL, DUAL_ROWS, {"norm_ratio": 1 + 1e-5}, REPRODUCED),
        (DUAL, DUAL_ROWS, {"norm_ratio": 1 + 1.01e-5}, NOT_REPRODUCED),
        (DUAL, DUAL_ROWS, {"norm_ratio": 1 - 1e-5}, REPRODUCED),
        (DUAL, DUAL_ROWS, {"norm_ratio": 1 - 1.01e-5}, NOT_REPRODUCED),
        (ONE_SHARD, SHARD_ROWS, {}, REPRODUCED),
        (ONE_SHARD, SHARD_ROWS, {"max_relative_difference": at_1e6 * (1 - 1e-9)}, REPRODUCED),
        (ONE_SHARD, SHARD_ROWS, {"max_relative_difference": at_1e6}, NOT_REPRODUCED),
        (ONE_SHARD, SHARD_ROWS, {"mean_of_ascents_difference": at_1e6}, NOT_REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {}, REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {"min_eigenvalue_sam_minus_sgd": -1e-10}, REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {"min_eigenvalue_sam_minus_sgd": -1.01e-10}, NOT_REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {"min_eigenvalue_msam_minus_sam": -1.01e-10}, NOT_REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {"formula_error": below_1e8}, REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {"formula_error": 1e-8}, NOT_REPRODUCED),
        (JACOBIAN, JACOBIAN_ROWS, {"formula_error": math.nan}, NOT_REPRODUCED),
        (DUAL, DUAL_ROWS, {"status": "diverged", "relative_gap": math.nan}, NOT_REPRODUCED),
        (DUAL, DUAL_ROWS, {"status": "failed", "relative_gap": math.nan}, REPRODUCED),  # noted, four seeds hold
    ],
)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_an_identity_holds_or_does_not(claim, rows, bad, expected, miniature):
    assert outcome(claim, checks(*rows, bad), miniature) == expected


@pytest.mark.parametrize(("claim", "rows"), [(DUAL, DUAL_ROWS), (ONE_SHARD, SHARD_ROWS), (JACOBIAN, JACOBIAN_ROWS)])
def test_an_identity_needs_one_seed_in_every_cell(claim, rows):
    assert outcome(claim, checks(*rows, seeds=1)) == REPRODUCED
    found, parts, reason = judge(claim, checks(*rows, {"status": "missing"}, seeds=1))
    assert (found, parts) == (NOT_RUN, ())
    assert reason == f"{rows[0][-1]}: {rows[1]} has no finished record (1 missing)"


def test_the_worst_seed_is_shown():
    parts = judge(DUAL, checks(*DUAL_ROWS, {"relative_gap": 3e-6, "norm_ratio": 1 - 2e-6}))[1]
    assert [part.name for part in parts] == ["p=1.5", "p=1.5", "p=2", "p=2", "p=4", "p=4", "p=inf", "p=inf"]
    assert [part.estimate for part in parts[-2:]] == [3e-6, 1 - 2e-6]
    assert all(part.n == 5 for part in parts)
    parts = judge(JACOBIAN, checks(*JACOBIAN_ROWS, {"min_eigenvalue_sam_minus_sgd": 0.0}))[1]
    assert [part.estimate for part in parts] == [0.0, -1e-12, 1e-14]


# ---------------------------------------------------------------------------------------------- the toy theorem


def toy(sgd=10.0, sam=8.0, msam=6.0, seeds=20, edge=1.0, **last):
    """Every seed shifts all three alike and each a little on its own; `last` replaces values of the last row."""
    levels = {"sgd": sgd, "sam": sam, "msam": msam}
    rows = [
        row("toy", role, seed, lambda_max=level + seed + 0.25 * ((seed * 7 + shift) % 5), edge_ratio=edge)
        for shift, (role, level) in enumerate(levels.items())
        for seed in range(seeds)
    ]
    rows[-1] |= last
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (toy(), REPRODUCED),
        (toy(seeds=10), REPRODUCED),
        (toy(seeds=9), INCONCLUSIVE),
        (toy(msam=9.0), NOT_REPRODUCED),  # either pair is enough
        (toy(sam=12.0), NOT_REPRODUCED),
        (toy(msam=8.0), INCONCLUSIVE),
        (toy(edge=0.9), REPRODUCED),
        (toy(edge=1.1), REPRODUCED),
        (toy(edge=0.8999), INCONCLUSIVE),
        (toy(edge=1.1001), INCONCLUSIVE),
        (toy(edge=math.nan), INCONCLUSIVE),
        (toy(edge_ratio=0.8999), INCONCLUSIVE),  # one run is enough
        (toy(edge_ratio=1.1001), INCONCLUSIVE),
        (toy(edge_ratio=math.nan), INCONCLUSIVE),
        (toy(msam=9.0, edge_ratio=0.5), INCONCLUSIVE),
        (toy(status="diverged"), INCONCLUSIVE),
        (toy(status="missing"), REPRODUCED),
    ],
)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_the_toy_theorem(rows, expected, miniature):
    assert outcome(TOY, rows, miniature) == expected


def test_runs_away_from_the_edge_are_named():
    found, parts, reason = judge(TOY, toy(edge_ratio=0.5))
    assert found == INCONCLUSIVE
    assert reason.startswith("toy: msam is not at the edge of stability for seeds 19")
    assert [part.outcome for part in parts] == [SUPPORTS] * 2 + [INFORMATION] * 3  # the pairs alone stay visible
    assert [part.estimate for part in parts[2:]] == [1, 1, pytest.approx(0.975)]
    assert "n = 9, at least 10 are needed" in judge(TOY, toy(seeds=9))[2]


def test_the_toy_theorem_says_what_is_averaged_and_what_is_shared():
    reason = judge(TOY, toy())[2]
    assert "matched: batches and the schedule of step sizes" in reason
    assert "lambda_max and edge_ratio are means over the second half of each run" in reason


def test_an_arm_of_the_toy_theorem_that_is_absent_is_not_run():
    assert outcome(TOY, [r for r in toy() if r["role"] != "msam"]) == NOT_RUN


# ---------------------------------------------------------------------------------------------- properties

points = st.integers(-64, 64).map(lambda sixteenths: sixteenths / 16)
gains_of = st.lists(points, min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(claim=st.sampled_from(list(TRAINED)), gains=gains_of, miniature=st.booleans(), random=st.randoms())
def test_neither_the_order_of_rows_nor_the_names_of_seeds_matter(claim, gains, miniature, random):
    rows = compared(claim, gains)
    names = random.sample(range(100), len(gains))
    other = [{**r, "seed": names[r["seed"]]} for r in random.sample(rows, len(rows))]
    # as text: a part without an interval holds NaN, which from Python 3.13 on equals nothing in a dataclass either
    assert repr(judge(claim, other, miniature)) == repr(judge(claim, rows, miniature))


@settings(max_examples=25, deadline=None)
@given(claim=st.sampled_from([BUDGET, TABLE_1, LONGER, SVHN, FASHION]), gains=gains_of)
def test_swapped_arms_swap_the_outcome(claim, gains):
    swapped = {REPRODUCED: NOT_REPRODUCED, NOT_REPRODUCED: REPRODUCED, INCONCLUSIVE: INCONCLUSIVE}
    assert outcome(claim, compared(claim, [-gain for gain in gains])) == swapped[outcome(claim, compared(claim, gains))]


@settings(max_examples=25, deadline=None)
@given(claim=st.sampled_from(list(TRAINED)), gains=gains_of, base=points)
def test_a_shift_common_to_both_arms_changes_nothing(claim, gains, base):
    assert outcome(claim, compared(claim, gains)) == outcome(claim, compared(claim, gains, base=50 + base))


@settings(max_examples=25, deadline=None)
@given(gains=gains_of)
def test_a_miniature_never_claims_more_against_than_the_full_scale(gains):
    rows = compared(PER_SEED, gains)
    if outcome(PER_SEED, rows, MINIATURE) == NOT_REPRODUCED:
        assert outcome(PER_SEED, rows, FULL) == NOT_REPRODUCED


# ---------------------------------------------------------------------------------------------- verdicts from a store


(BOUND,) = experiments.decides(PER_SEED, "quick")[1]
CLEAN_CELLS = tuple({experiments.decides(claim, "quick")[1][0] for claim in (PER_SEED, BUDGET, TABLE_1, LONGER)})


def save_arms(place, gains, roles=("sgd", "sam", "sgd_double", "sam_half"), cells=CLEAN_CELLS):
    """Records of the quick comparison: every role but plain SGD gains these points."""
    for arm in experiments.arms("sam_vs_sgd", "quick"):
        if arm.cell not in cells or arm.role not in roles:
            continue
        for member, gain in zip(arm.specs, gains, strict=False):
            accuracy = 80.0 + (0.0 if arm.role.startswith("sgd") else gain)
            final = {name: {"test_accuracy_pct": accuracy} for name in ("last", "best_test")}
            key = spec.key(member)
            place.save(store.Record(key, spec.canonical(member), "done", final=final))


@pytest.fixture
def place(tmp_path):
    return store.Store(tmp_path, writable=True)


def test_a_verdict_from_records(place):
    save_arms(place, WIN)
    found = claims.verdict(PER_SEED, "quick", place)
    assert (found.claim, found.outcome, found.profile, found.varied) == (PER_SEED, REPRODUCED, "quick", False)
    assert found.miniature is not experiments.published_scale("sam_vs_sgd", "quick")
    assert found.published == published.claim(PER_SEED).published
    assert found.rule_digest == claims.rule_digest(PER_SEED)
    assert found.reason.startswith("positive for every seed (at least 3) and interval above 0; matched: epochs")
    assert f"{BOUND}: of 10 seeds of sam, 6 missing" in found.reason


def test_a_threshold_in_points_is_not_used_in_the_miniature(place):
    save_arms(place, TINY)
    assert claims.verdict(PER_SEED, "quick", place).outcome == INCONCLUSIVE


def test_the_noisy_cells_do_not_decide_the_clean_claims(place):
    save_arms(place, WIN)
    save_arms(place, LOSS, cells=("noise40",))
    assert claims.verdict(PER_SEED, "quick", place).outcome == REPRODUCED


def test_every_claim_has_a_verdict_and_every_verdict_a_reason(place):
    save_arms(place, WIN)
    found = {verdict.claim: verdict for verdict in claims.verdicts("quick", place)}
    assert list(found) == list(published.claims())
    ran = {claim for claim, verdict in found.items() if verdict.outcome != NOT_RUN}
    assert ran == {PER_SEED, BUDGET, TABLE_1, LONGER}
    assert all(verdict.reason for verdict in found.values())
    assert not any(verdict.miniature for verdict in found.values() if verdict.outcome == NOT_RUN)
    assert found["foret-imagenet"].reason.startswith("needs many accelerators")
    assert found[SVHN].reason == "sam_vs_sgd has no setting for this claim on the profile quick"


def test_a_claim_of_an_experiment_to_come_is_not_run(place, monkeypatch):
    monkeypatch.setattr(experiments, "STEMS", ("sam_by_hand",))
    found = claims.verdict(PER_SEED, "quick", place)
    assert (found.outcome, found.reason) == (NOT_RUN, "experiment sam_vs_sgd does not exist yet")


def test_a_cell_that_no_arm_has_is_not_run(place):
    arms = [arm for arm in experiments.arms("sam_vs_sgd", "quick") if arm.cell != BOUND]
    found = claims.judge(PER_SEED, "quick", place, arms)
    assert (found.outcome, found.reason) == (
        NOT_RUN,
        f"sam_vs_sgd has no arm in the cells {BOUND} on the profile quick",
    )


def test_checks_are_never_a_miniature(place):
    for arm in experiments.arms("sam_by_hand", "quick"):
        for member in arm.specs:
            values = {"max_relative_difference": 0.0, "mean_of_ascents_difference": 0.0}
            if arm.role == "msam" and arm.cell == "one_shard":
                place.save(store.Record(spec.key(member), spec.canonical(member), "done", measures=values))
    found = claims.verdict(ONE_SHARD, "quick", place)
    assert (found.outcome, found.miniature) == (REPRODUCED, False)


def test_a_variation_is_marked(place):
    arms = [arm for arm in experiments.arms("sam_vs_sgd", "quick", seeds=[3, 4, 5]) if arm.cell == BOUND]
    for arm in arms:
        for member, accuracy in zip(arm.specs, (81.0, 81.5, 82.0), strict=True):
            accuracy -= 0.0 if arm.role == "sam" else 2.0 + member.seed / 8
            final = {name: {"test_accuracy_pct": accuracy} for name in ("last", "best_test")}
            place.save(store.Record(spec.key(member), spec.canonical(member), "done", final=final))
    found = claims.judge(PER_SEED, "quick", place, arms, varied=True)
    assert (found.outcome, found.varied, found.parts[0].n) == (REPRODUCED, True, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda place: claims.verdict("foret-t2", "quick", place), "claim = 'foret-t2' is unknown"),
        (lambda place: claims.verdict(PER_SEED, "fast", place), "profile = 'fast' is unknown"),
        (lambda place: claims.verdicts("fast", place), "profile = 'fast' is unknown"),
        (lambda place: claims.rule_digest("foret-rho-sweep"), "claim = 'foret-rho-sweep' has no rule"),
        (lambda place: rule(PER_SEED, roles=("sam",))(lambda evidence: None), "registered twice"),
    ],
)
def test_bad_input_is_named(call, message, place):
    with pytest.raises(InputError, match=message):
        call(place)


def test_rules_and_claims_fit_together(monkeypatch):
    claims.check_rules()
    monkeypatch.setitem(RULES, "foret-t99", RULES[FASHION])
    with pytest.raises(InputError, match=r"rules \['foret-t99'\] have no claim"):
        claims.check_rules()


def test_a_claim_whose_experiment_exists_needs_a_rule(monkeypatch):
    monkeypatch.delitem(RULES, FASHION)
    with pytest.raises(InputError, match=r"claims \['foret-fashion-mnist'\] have no rule"):
        claims.check_rules()


def test_every_rule_is_bound_by_the_experiment_its_claim_names():
    for claim_id in RULES:
        bound = [stem for stem in experiments.STEMS if claim_id in experiments.load(stem).DECIDES]
        assert bound == [published.claim(claim_id).experiment]


# ---------------------------------------------------------------------------------------------- rows of the scoreboard


def test_a_row_of_the_scoreboard(place):
    save_arms(place, WIN)
    found = claims.row(claims.verdict(PER_SEED, "quick", place))
    assert found["statistic"] == (
        f"{BOUND}: sam - sgd of test_accuracy_pct, paired by seed: 2 [0.7008, 3.299], n = 4; "
        f"{BOUND}: seeds with sam above sgd in test_accuracy_pct: 4, n = 4"
    )
    assert found["published"].startswith("sam 71.22, 70.77, 70.98; sgd 65.15")
    assert (found["outcome"], found["miniature"], found["paper"]) == (REPRODUCED, True, "coldenhoff2022")
    assert not any(isinstance(value, (list, dict)) for value in found.values())


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({}, ""),
        ({"mean_difference": 6.54, "sam": [1, 2.5]}, "mean difference 6.54; sam 1, 2.5"),
        ({"c10": {"sam": 2.7, "sgd": 3.5}, "cells": 30}, "c10 (sam 2.7; sgd 3.5); cells 30"),
    ],
)
def test_published_figures_on_one_line(figures, text):
    assert claims.published_text(figures) == text


# ---------------------------------------------------------------------------------------------- digests

SOURCE = claims.sources(PER_SEED).rules
TEXT = published.claims_text()
COMPARISON, BY_HAND = claims.sources(PER_SEED).experiment, claims.sources(DUAL).experiment
STATISTICS = claims.sources(PER_SEED).statistics


def digest(claim=PER_SEED, source=None, text=TEXT, **others):
    at = claims.sources(claim)
    return claims.rule_digest(
        claim, dataclasses.replace(at, rules=at.rules if source is None else source, wording=text, **others)
    )


def moved(of, **texts):
    """Those of the claims whose digest is another one with these texts."""
    return {claim for claim in of if digest(claim, **texts) != digest(claim)}


def bound_by(stem):
    return [claim for claim in RULES if published.claim(claim).experiment == stem]


def edited(text, old, new):
    assert old in text
    return text.replace(old, new)


def test_the_digest_ignores_what_decides_nothing():
    layout = edited(SOURCE, "MIN_SEEDS = 3\n", "MIN_SEEDS = (  # three\n    3\n)\n")
    wording = edited(SOURCE, '"""Number of seeds with a - b above 0', '"""How often')
    unused = SOURCE + "\n\ndef unused(evidence):\n    return 1\n"
    addition = SOURCE + "\n\n@rule('foret-rho-sweep', roles=('sam',))\ndef later(evidence):\n    return 1\n"
    story = edited(TEXT, "With plain SGD (no momentum,", "With SGD (no momentum,")
    assert digest() == claims.rule_digest(PER_SEED)
    assert {digest(source=source) for source in (layout, wording, unused, addition)} | {digest(text=story)} == {
        digest()
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("MIN_SEEDS = 3", "MIN_SEEDS = 2"),
        ("within(evidence, gain, -0.5, 0.5)", "within(evidence, gain, -0.5, 0.6)"),
        ("not evidence.miniature and low <= part.low", "low <= part.low"),
        ("if low > 0 or high < 0:", "if low >= 0 or high < 0:"),
        ('per-seed", roles=("sam", "sgd")', 'per-seed", roles=("sam", "sgd_double")'),
        ('FINISHED = ("done", "diverged")', 'FINISHED = ("done",)'),
    ],
)
def test_the_digest_follows_the_rule_and_its_conventions(old, new):
    assert digest(source=edited(SOURCE, old, new)) != digest()


@pytest.mark.parametrize("field", ["statistic", "reproduced_if", "not_reproduced_if", "inconclusive_if"])
def test_the_digest_follows_the_wording_of_the_rule(field):
    assert digest(text=edited(TEXT, getattr(published.claim(PER_SEED), field), "something else")) != digest()


def test_a_digest_belongs_to_one_rule():
    assert len({digest(claim) for claim in RULES}) == len(RULES)
    looser = edited(claims.sources(JACOBIAN).rules, "lambda error: error < 1e-8", "lambda error: error < 1e-7")
    assert moved(source=looser, of=bound_by("sam_by_hand")) == {JACOBIAN}


def rebound(text: str, claim: str) -> str:
    """An experiment that binds other cells to a claim on the quick profile."""
    entry = f'"{claim}": {{'
    if f'{entry}"quick": ' in text:
        return edited(text, f'{entry}"quick": ', f'{entry}"quick": ("other",) or ')
    return edited(text, entry, f'{entry}"quick": ("other",)')


@pytest.mark.parametrize("claim", RULES)
def test_the_digest_follows_the_cells_bound_to_its_claim_and_to_no_other(claim):
    stem = published.claim(claim).experiment
    text = claims.sources(claim).experiment
    assert moved(experiment=rebound(text, claim), of=bound_by(stem)) == {claim}


def test_the_digest_follows_what_the_bound_cells_are_computed_from():
    fewer = edited(BY_HAND, '"1.5", "2", "4", "inf"', '"1.5", "2", "4"')
    assert moved(experiment=fewer, of=bound_by("sam_by_hand")) == {DUAL}
    looped = BY_HAND + "\nBOUND = {p: p for p in DECIDES}\n"  # a loop variable elsewhere is not what p means in DECIDES
    assert moved(experiment=looped, of=bound_by("sam_by_hand")) == set()
    reached = edited(looped, '{"quick": ("toy",)}', '{"quick": tuple(BOUND)}')
    rebound = edited(reached, '("one_shard",)', '("two_shards",)')
    assert digest(TOY, experiment=rebound) != digest(TOY, experiment=reached)


@pytest.mark.parametrize("stem", experiments.STEMS)
def test_the_digest_follows_the_published_scale(stem):
    text = claims.sources(bound_by(stem)[0]).experiment
    changed = edited(text, "\nPUBLISHED_SCALE = frozenset(", "\nPUBLISHED_SCALE = {'gpu'} | frozenset(")
    assert moved(experiment=changed, of=bound_by(stem)) == set(bound_by(stem))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("(1 + confidence) / 2, freedom", "confidence, freedom", {*TRAINED, TOY}),
        (
            'confidence: float = 0.95) -> Interval:\n    """Mean with',
            'confidence: float = 0.9) -> Interval:\n    """Mean with',
            {TOY, TABLE_1, BUDGET},
        ),
        ("a[seed] - b[seed] for seed in a", "b[seed] - a[seed] for seed in a", {*TRAINED, TOY}),
        ("RESAMPLES = 9999", "RESAMPLES = 99", set()),  # none of these rules uses a bootstrap
        ("# an exact sum: the order of seeds is nothing", "# exact", set()),
        ('"""Mean with Student\'s t interval', '"""The mean with its interval', set()),
    ],
)
def test_the_digest_follows_the_intervals_its_rule_uses(old, new, expected):
    first_two = [*bound_by("sam_by_hand"), *bound_by("sam_vs_sgd")]
    assert moved(statistics=edited(STATISTICS, old, new), of=first_two) == expected


def test_the_digest_ignores_what_binds_no_claim():
    comments = edited(COMPARISON, "\nDECIDES = {", "\n# What decides what.\nDECIDES = {  # here")
    comments = edited(comments, '"""01: SAM against SGD', '"""SAM and SGD')
    assert moved(experiment=comments, of=bound_by("sam_vs_sgd")) == set()
    seeds = edited(BY_HAND, "EXACT_SEEDS = tuple(range(5))", "EXACT_SEEDS = tuple(range(6))")
    assert moved(experiment=seeds, of=bound_by("sam_by_hand")) == set()


@pytest.mark.parametrize("name", ["DECIDES", "PUBLISHED_SCALE"])
def test_an_experiment_without_a_binding_is_refused(name):
    with pytest.raises(InputError, match="no entry in DECIDES, or its experiment no PUBLISHED_SCALE"):
        digest(experiment=edited(COMPARISON, f"\n{name} = ", f"\n{name.title()} = "))
    with pytest.raises(InputError, match="no entry in DECIDES"):
        digest(experiment=BY_HAND)
    with pytest.raises(InputError, match="DECIDES as one dict literal"):
        digest(experiment=edited(COMPARISON, "\nDECIDES = {", "\nDECIDES = {} | {"))


def test_a_rule_may_come_before_its_experiment():
    assert digest(experiment="") != digest()


@pytest.mark.parametrize(
    "text",
    [*(claims.sources(bound_by(stem)[0]).rules for stem in experiments.STEMS), STATISTICS, COMPARISON, BY_HAND],
    ids=[*(f"rules {stem}" for stem in experiments.STEMS), "stats", "sam_vs_sgd", "sam_by_hand"],
)
def test_nothing_at_the_top_of_these_modules_escapes_the_digest(text):
    """Each name is defined once: no `DECIDES[...] = ...`, no update, no branch that the digest would miss."""
    rest = [node for node in ast.parse(text).body if not claims._is_docstring(node)]
    imports = [node for node in rest if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = []
    for node in rest:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif node not in imports:
            assert isinstance(node, (ast.Assign, ast.AnnAssign)), ast.unparse(node)
            names += claims._assigned(node)
    assert len(set(names)) == len(names)
    assert set(names) == set(claims._definitions(text))
    assert not any(getattr(node, "module", "") == "samlib.stats" for node in imports)  # it is used as `stats.X`
    assert not any(alias.asname for node in imports for alias in node.names if alias.name == "stats")


@pytest.mark.parametrize("stem", experiments.STEMS)
def test_the_bindings_are_a_literal_with_each_claim_once(stem):
    literal = claims._definitions(claims.sources(bound_by(stem)[0]).experiment)["DECIDES"].value
    assert [key.value for key in literal.keys] == list(experiments.load(stem).DECIDES)


def test_a_revision_without_the_rule_has_no_digest():
    with pytest.raises(InputError, match="at this revision"):
        digest(source="X = 1")
    with pytest.raises(InputError, match="at this revision"):
        digest(text=edited(TEXT, f"id: {PER_SEED}", "id: renamed"))


def test_the_normal_form_is_the_same_on_every_python():
    """Pinned: the committed digests have to mean the same in CI, whichever version runs it."""
    snippet = '''
def f(x: int, *rest, key: str = "a", **more) -> list[int]:
    """Docstring."""
    text = f"{x:.{key}} and {x!r}"  # comment
    return [-1.5e-10 if a else None for a, (b, *c) in rest if not a <= b < 2] + more["k"][1:, ...] if text else f
'''
    form = claims._normal_form(ast.parse(snippet).body[0])
    assert hashlib.sha256(form.encode()).hexdigest()[:16] == "870e392081287675"


# ---------------------------------------------------------------------------------------------- rules before records


def test_another_profile_may_be_bound_later():
    claim = "foret-long-sgd-does-not-help"
    bound = f'"{claim}": {{"quick": ("clean",), '
    later = edited(COMPARISON, bound, f'{bound}"gpu": ("wrn40",), ')
    at = dataclasses.replace(claims.sources(claim), experiment=later)
    assert claims.rule_digest(claim, at) == claims.rule_digest(claim)
    assert claims.rule_digest(claim, at, "gpu") != claims.rule_digest(claim, profile="gpu")


def test_cells_of_the_published_scale_are_marked_in_their_binding():
    """The mark is part of the digest of its profile, and of no other's."""
    assert experiments.published_scale("sam_vs_sgd", "gpu", PER_SEED)
    assert not experiments.published_scale("sam_vs_sgd", "quick", PER_SEED)
    assert not experiments.published_scale("sam_vs_sgd", "gpu")
    unmarked = edited(COMPARISON, 'AtPublishedScale(("plain",))', '("plain",)')
    at = dataclasses.replace(claims.sources(PER_SEED), experiment=unmarked)
    assert claims.rule_digest(PER_SEED, at) == claims.rule_digest(PER_SEED)
    assert claims.rule_digest(PER_SEED, at, "gpu") != claims.rule_digest(PER_SEED, profile="gpu")


def git(root: Path, *arguments: str) -> str:
    named = ("-c", "user.name=A Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *named, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def last_commits(log: str) -> dict[str, str]:
    """path -> the last commit that touched it, from `git log --format=commit:%H --name-only`, newest first."""
    found: dict[str, str] = {}
    commit = ""
    for line in filter(None, log.splitlines()):
        if line.startswith("commit:"):
            commit = line.removeprefix("commit:")
        else:
            found.setdefault(line, commit)
    return found


def sources_of(claim: str, read: Callable[[str], str]) -> claims.Sources:
    """The texts behind a rule; the wording says which experiment decides it."""
    wording = read("results/published/claims.yaml")
    named = parsed(wording)
    if claim not in named:
        raise InputError(f"claim = {claim!r} is not in claims.yaml at this revision")
    stem = named[claim].experiment
    return claims.Sources(
        rules_text(stem, read), wording, read(f"samlib/experiments/{stem}.py"), read("samlib/stats.py")
    )


parsed = functools.cache(published.parse_claims)  # a wording holds for many claims and commits


def rules_text(stem: str, read: Callable[[str], str]) -> str:
    """The conventions and the rules of an experiment; records of the first two are older than the package of rules."""
    try:
        return read("samlib/rules/conventions.py") + read(f"samlib/rules/{stem}.py")
    except subprocess.CalledProcessError:
        return read("samlib/claims.py")


def digest_at(root: Path, commit: str, claim: str, profile: str) -> str:
    """The digest of a rule at a commit; empty where there was none."""
    try:
        at = sources_of(claim, lambda path: git(root, "show", f"{commit}:{path}"))
        return claims.rule_digest(claim, at, profile)
    except (subprocess.CalledProcessError, InputError):
        return ""


def records_older_than_their_rule(root: Path, judged: Mapping[str, Iterable[str]]) -> list[str]:
    """Records whose rule was another one, or none, when they were last committed. `judged`: claim -> record paths."""
    commits = last_commits(git(root, "log", "--format=commit:%H", "--name-only", "--", "results"))
    found = []
    for claim, paths in judged.items():
        now = sources_of(claim, lambda path: (root / path).read_text(encoding="utf-8"))
        committed = {path: (commits[path], Path(path).parts[1]) for path in paths if path in commits}  # and its profile
        changed = {
            (commit, profile)
            for commit, profile in set(committed.values())
            if digest_at(root, commit, claim, profile) != claims.rule_digest(claim, now, profile)
        }
        found += [f"{claim}: {path} of {made[0][:8]}" for path, made in committed.items() if made in changed]
    return found


CONVENTIONS, RULES_OF_01 = (
    (Path(rules.__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in ("conventions", "sam_vs_sgd")
)

# path -> the text a repository of the tests holds there
FILES = {
    "results/published/claims.yaml": TEXT,
    "samlib/rules/conventions.py": CONVENTIONS,
    "samlib/rules/sam_vs_sgd.py": RULES_OF_01,
    "samlib/experiments/sam_vs_sgd.py": COMPARISON,
    "samlib/stats.py": STATISTICS,
}


@pytest.fixture
def project(tmp_path):
    """A repository in which the rules were committed first and one record after them."""
    git(tmp_path, "init", "--quiet")

    def commit(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        git(tmp_path, "add", path)
        git(tmp_path, "commit", "--quiet", "-m", f"change {path}")

    for path, text in FILES.items():
        commit(path, text)
    commit("results/quick/records/aa.json", "{}")
    return tmp_path, commit


JUDGED = {PER_SEED: ["results/quick/records/aa.json", "results/quick/records/never-committed.json"]}
LOOSER = ("within(evidence, gain, -0.5, 0.5)", "within(evidence, gain, -0.5, 0.1)")


def test_a_rule_that_came_first_is_accepted(project):
    root, commit = project
    assert records_older_than_their_rule(root, JUDGED) == []
    commit("samlib/rules/conventions.py", edited(CONVENTIONS, "MIN_SEEDS = 3\n", "MIN_SEEDS = 3  # as before\n"))
    assert records_older_than_their_rule(root, JUDGED) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("samlib/rules/sam_vs_sgd.py", RULES_OF_01.replace(*LOOSER)),
        ("samlib/rules/conventions.py", CONVENTIONS.replace("MIN_SEEDS = 3", "MIN_SEEDS = 2")),
        (
            "results/published/claims.yaml",
            TEXT.replace("wholly inside [-0.5, 0.5] points", "wholly inside [-0.5, 0.1]"),
        ),
        (
            "samlib/experiments/sam_vs_sgd.py",
            rebound(COMPARISON, PER_SEED),
        ),
        ("samlib/stats.py", STATISTICS.replace("(1 + confidence) / 2", "confidence")),
    ],
)
def test_a_rule_changed_after_its_records_is_caught_until_they_are_made_anew(project, path, text):
    root, commit = project
    commit(path, text)
    assert text != FILES[path]
    (older,) = records_older_than_their_rule(root, JUDGED)
    assert older.startswith(f"{PER_SEED}: results/quick/records/aa.json of ")
    (root / path).write_text(FILES[path], encoding="utf-8")
    assert records_older_than_their_rule(root, JUDGED) == []  # the old rule, not yet committed, is the right one
    (root / path).write_text(text, encoding="utf-8")
    commit("results/quick/records/aa.json", '{"anew": 1}')
    assert records_older_than_their_rule(root, JUDGED) == []


def test_a_record_committed_before_any_rule_is_caught(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "aa.json").write_text("{}")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "a record")
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert len(records_older_than_their_rule(tmp_path, {PER_SEED: ["results/aa.json"]})) == 1


def judged_records() -> dict[str, list[str]]:
    """Every record a rule looks at, on every profile."""
    found: dict[str, list[str]] = {}
    for claim in RULES:
        for profile in experiments.PROFILES:
            stem, cells = experiments.decides(claim, profile)
            arms = [arm for arm in experiments.arms(stem, profile) if arm.cell in cells]
            keys = [spec.key(member) for member in experiments.specs(arms)]
            found.setdefault(claim, []).extend(f"results/{profile}/records/{key}.json" for key in keys)
    return found


def test_no_rule_of_this_project_is_younger_than_its_records():
    root = Path(claims.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        pytest.skip("no git checkout: the age of a rule is read from the history")
    if git(root, "rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("a shallow clone: the age of a rule is read from the whole history (git fetch --unshallow)")
    judged = judged_records()
    assert sum(map(len, judged.values())) > 100
    assert records_older_than_their_rule(root, judged) == []
