"""The rule of 06 at every edge of its outcome, on made-up frames; the arms it is bound to."""

import dataclasses
import math

import pandas as pd
import pytest

from samlib import spec as specs_of
from samlib.experiments import Pair, digits, mode_connectivity, optimizer_table
from samlib.rules import mode_connectivity as rules_of
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
from samlib.rules.mode_connectivity import CONTROLS, NAMED
from samlib.spec import RunSpec

(CLAIM,) = mode_connectivity.DECIDES
FULL, MINIATURE = False, True
NEITHER = "neither the condition"
SPREAD = (-0.1, 0.0, 0.1, 0.0)  # over four seeds: an interval of +- 0.13 around the mean
CLEAR = {"sam_to_sgd": 5.0, "sam_to_large": 5.0, "sgd_to_sgd": 1.0, "sam_to_sam": 1.0}


def arm(cell, role, *, test, train):
    """Rows of one pair: mean barriers with the spread, the training barrier spread a tenth as widely."""
    rows = []
    for seed, offset in enumerate(SPREAD):
        shift = offset * (-1) ** (role in CONTROLS)  # so that differences of roles have a spread too
        row = {"cell": cell, "role": role, "seed": seed, "status": "done", "train_loss_barrier": train + shift / 10}
        rows.append(row | {"test_error_barrier_pct": test + shift, "test_loss_barrier": (test + shift) / 100})
    return rows


def frame(test=CLEAR, train=0.05, line=0.5):
    """Rows of all pairs, chains first."""
    chains = [row for role in (*NAMED, *CONTROLS) for row in arm("chain", role, test=test[role], train=train)]
    return chains + [row for role in (*NAMED, *CONTROLS) for row in arm("line", role, test=test[role] + 5, train=line)]


def judge(rows, miniature=MINIATURE):
    return RULES[CLAIM](pd.DataFrame(rows), miniature)


def outcome(rows, miniature=MINIATURE):
    return judge(rows, miniature)[0]


def named(value, controls=0.0):
    return dict.fromkeys(NAMED, value) | dict.fromkeys(CONTROLS, controls)


# ---------------------------------------------------------------------------------------------- what decides


@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_a_low_chain_with_a_high_test_error_above_the_controls_reproduces(miniature):
    found, parts, reason = judge(frame(), miniature)
    assert found == REPRODUCED
    assert [part.outcome for part in parts] == [SUPPORTS] * 8 + [INFORMATION] * 2
    assert {part.n for part in parts} == {4}
    assert parts[2].estimate == pytest.approx(5.0)
    assert parts[4].estimate == pytest.approx(4.0)
    assert "matched: epochs" in reason


@pytest.mark.parametrize(
    ("test", "full", "miniature"),
    [
        (named(5.0, 1.0), REPRODUCED, REPRODUCED),
        (named(2.2, 1.0), REPRODUCED, REPRODUCED),  # interval (2.07, 2.33)
        (named(2.1, 1.0), INCONCLUSIVE, REPRODUCED),  # interval (1.97, 2.23)
        (named(1.1, 0.0), INCONCLUSIVE, REPRODUCED),
        (named(0.8, 0.0), NOT_REPRODUCED, REPRODUCED),  # above 0 and below one point: only the sign holds here
        (named(0.0, -1.0), NOT_REPRODUCED, INCONCLUSIVE),
        (named(-0.2, -1.0), NOT_REPRODUCED, NOT_REPRODUCED),
        (named(5.0, 5.0), INCONCLUSIVE, INCONCLUSIVE),  # as high as the controls
        (named(5.0, 6.0), INCONCLUSIVE, INCONCLUSIVE),
        (named(5.0, 1.0) | {"sgd_to_sgd": 5.0}, INCONCLUSIVE, INCONCLUSIVE),  # one control is enough
        (named(5.0, 1.0) | {"sam_to_large": 0.0}, INCONCLUSIVE, INCONCLUSIVE),  # both named pairs are asked for
        (named(-5.0, -6.0) | {"sam_to_large": 5.0}, INCONCLUSIVE, INCONCLUSIVE),
        (named(-5.0, 1.0), NOT_REPRODUCED, NOT_REPRODUCED),
    ],
)
def test_the_test_error_barrier_decides(test, full, miniature):
    assert outcome(frame(test), FULL) == full
    assert outcome(frame(test), MINIATURE) == miniature


@pytest.mark.parametrize(
    ("train", "line", "full", "miniature"),
    [
        (0.05, 0.5, REPRODUCED, REPRODUCED),
        (0.12, 0.5, INCONCLUSIVE, REPRODUCED),  # not below 0.1, and far below the straight line
        (0.05, 0.05, REPRODUCED, INCONCLUSIVE),  # no lower than the straight line
        (0.05, 0.01, REPRODUCED, INCONCLUSIVE),  # higher
        (0.095, 0.5, INCONCLUSIVE, REPRODUCED),  # interval (0.082, 0.108)
        (0.085, 0.5, REPRODUCED, REPRODUCED),
    ],
)
def test_the_chain_has_to_be_low_on_the_training_images(train, line, full, miniature):
    rows = frame(train=train, line=line)
    for row in rows:  # without a spread of its own the paired difference would have none
        row["train_loss_barrier"] += 0.01 * (row["cell"] == "line") * (-1) ** row["seed"]
    assert outcome(rows, FULL) == full
    assert outcome(rows, MINIATURE) == miniature


def test_a_high_chain_is_no_obstacle_to_a_claim_that_fails_on_the_test_images():
    assert outcome(frame(named(-5.0), train=0.9, line=0.1)) == NOT_REPRODUCED


def test_each_part_names_its_pair():
    names = [part.name for part in judge(frame())[1]]
    beside = [f"{role}, beside {control}" for role in NAMED for control in CONTROLS]
    assert names == [*NAMED, *NAMED, *beside, *NAMED]


def test_a_contradicting_part_says_so():
    parts = judge(frame(named(-5.0, 1.0), line=0.01))[1]
    assert [part.outcome for part in parts[:8]] == [CONTRADICTS] * 8


# ---------------------------------------------------------------------------------------------- what is in the way


@pytest.mark.parametrize("role", [*NAMED, *CONTROLS])
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_missing_runs(role, miniature):
    rows = [row | ({"status": "missing"} if row["role"] == role else {}) for row in frame()]
    found, parts, reason = judge(rows, miniature)
    assert (found, parts) == (NOT_RUN, ())
    assert f"chain: {role} has no finished record" in reason
    assert outcome([row for row in frame() if (row["cell"], row["role"]) != ("line", role)], miniature) == NOT_RUN


@pytest.mark.parametrize("role", [*NAMED, *CONTROLS])
def test_a_missing_seed_is_left_out_and_two_seeds_decide_nothing(role):
    one = [row for row in frame() if row["role"] != role or row["seed"] != 3]
    assert outcome(one) == REPRODUCED
    two = [row for row in frame() if row["role"] != role or row["seed"] < 2]
    found, _, reason = judge(two)
    assert found == INCONCLUSIVE
    assert "n = 2, at least 3 are needed" in reason
    assert outcome([row for row in frame() if row["seed"] < 2]) == INCONCLUSIVE


@pytest.mark.parametrize("role", [*NAMED, *CONTROLS])
@pytest.mark.parametrize("test", [CLEAR, named(-5.0, 1.0)])
def test_a_diverged_chain_leaves_no_conclusion(role, test):
    rows = frame(test)
    expected = outcome(rows)
    for row in rows:
        if (row["cell"], row["role"], row["seed"]) == ("chain", role, 3):
            row["status"] = "diverged"
    found, _, reason = judge(rows)
    controls_do_not_count = expected == NOT_REPRODUCED and role in CONTROLS
    assert found == (NOT_REPRODUCED if controls_do_not_count else INCONCLUSIVE)
    assert f"chain: {role} diverged for 1 of 4 seeds (3)" in reason


@pytest.mark.parametrize("role", NAMED)
def test_a_diverged_line_leaves_nothing_to_compare_its_chain_with(role):
    """At the published scale the line decides nothing."""
    rows = [
        row | ({"status": "diverged"} if (row["cell"], row["role"], row["seed"]) == ("line", role, 3) else {})
        for row in frame()
    ]
    assert outcome(rows) == INCONCLUSIVE
    assert f"line: {role} diverged for 1 of 4 seeds (3)" in judge(rows)[2]
    assert outcome(rows, FULL) == REPRODUCED


def test_a_record_without_the_number_is_left_out_and_said():
    rows = frame()
    rows[3]["test_error_barrier_pct"] = math.nan
    found, parts, reason = judge(rows)
    assert (found, parts[2].n) == (REPRODUCED, 3)
    assert "sam_to_sgd has no test_error_barrier_pct for seeds 3" in reason


def test_neither_condition():
    assert NEITHER in judge(frame(named(0.0, 0.0)))[2]


# ---------------------------------------------------------------------------------------------- the arms


def by_name():
    return {(arm.cell, arm.role): arm for arm in mode_connectivity.arms("quick")}


def test_the_rule_is_bound_to_the_cells_it_names():
    assert mode_connectivity.DECIDES[CLAIM]["quick"] == (rules_of.CHAIN, rules_of.LINE)
    assert (rules_of.CHAIN, rules_of.LINE) == (mode_connectivity.CHAIN, mode_connectivity.LINE)
    assert (*NAMED, *CONTROLS) == tuple(mode_connectivity.PAIRS)
    for cell in (rules_of.CHAIN, rules_of.LINE):
        assert {role for where, role in by_name() if where == cell} == {*NAMED, *CONTROLS}


def test_the_models_are_those_of_the_optimiser_table():
    """The same key is trained once; second runs are of the same settings, on the same images."""
    settings = {specs_of.group(spec) for arm in optimizer_table.arms("quick") for spec in arm.specs}
    trained = {specs_of.key(spec) for arm in optimizer_table.arms("quick") for spec in arm.specs}
    for arm in mode_connectivity.arms("quick"):
        for start, end in arm.ends if isinstance(arm, Pair) else []:
            assert specs_of.key(start) in trained
            assert specs_of.group(dataclasses.replace(end, split_seed=None)) in settings
            assert specs_of.split_seed(start) == specs_of.split_seed(end)
            assert start.seed != end.seed


def test_the_pairs_are_those_of_the_claim():
    (sam, sgd), (start, large) = (by_name()["chain", role].ends[0] for role in NAMED)
    assert sam == start
    assert (sam.optim.method, sam.optim.rho, sam.train.batch_size) == ("sam", 0.2, digits.TABLE.train.batch_size)
    assert (sgd.optim.method, sgd.train.epochs) == ("sgd", 2 * sam.train.epochs)
    assert (large.optim.method, large.optim.rho) == ("sam", 0.1)
    assert large.train.batch_size == digits.TABLE.data.train_size
    for role, arms in mode_connectivity.CONTROLS.items():
        assert arms[0] == arms[1], role


def test_cells_differ_in_what_their_name_says_alone():
    chain = specs_of.flat(by_name()["chain", "sam_to_sgd"].specs[0])
    for cell, fields in (
        ("line", {"path.shape"}),
        ("as published", {"path.test_labels", "path.end"}),
        ("plane", {"path.grid"}),
        ("plane as published", {"path.grid", "path.test_labels", "path.end"}),
    ):
        other = specs_of.flat(by_name()[cell, "sam_to_sgd"].specs[0])
        assert {name for name in chain if chain[name] != other[name]} == fields
    short, long = (by_name()[cell, "sam_to_large"] for cell in ("equal epochs", "chain"))
    assert short.base == long.base
    for (start, end), (same, longer) in zip(short.ends, long.ends[:5], strict=True):
        assert start == same
        steps = [run.train.epochs * (300 // run.train.batch_size) for run in (start, longer)]
        assert steps[0] == steps[1]
        assert end.train.epochs < longer.train.epochs


def test_there_is_nothing_on_other_profiles():
    assert mode_connectivity.arms("gpu") == mode_connectivity.arms("paper") == ()
    assert all(isinstance(spec, RunSpec) for arm in by_name().values() for spec in arm.parents)
