"""Each rule of 14 at every edge of its outcome, on made-up frames; the arms it is bound to."""

import dataclasses
import math

import pandas as pd
import pytest

from samlib import experiments, published
from samlib import spec as specs_of
from samlib.experiments import precision
from samlib.rules import precision as rules_of
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
from samlib.rules.precision import REMEDY, SAM, SGD
from samlib.store import Store

TURNS, SHRINKS, FLATTENS, RESTORES, KEEPS = precision.DECIDES
FULL, MINIATURE = False, True
NEITHER = "neither the condition"
ROLES = {
    TURNS: (SAM["bf16"], SAM["fp16"]),
    SHRINKS: (SAM["bf16"], SGD["bf16"], SAM["fp32"], SGD["fp32"]),
    FLATTENS: (SAM["bf16"], SGD["bf16"], SAM["fp32"], SGD["fp32"]),
    RESTORES: (REMEDY, SAM["bf16"]),
    KEEPS: (SAM["fp16"], SGD["fp16"], SAM["tf32"], SGD["tf32"], SAM["fp32"], SGD["fp32"]),
}
ABOVE, BELOW = (1.0, 2.0, 3.0, 2.0), (-1.0, -2.0, -3.0, -2.0)  # interval (0.70, 3.30)
OPEN = (3.0, -1.0, 2.0, -2.0)
NONE = (0.1, -0.1, 0.1, -0.1)  # interval (-0.18, 0.18)
SLIGHT = (0.1, 0.2, 0.1, 0.2)  # interval (0.06, 0.24)
SLIGHT_LOSS = tuple(-value for value in SLIGHT)


def arm(role, values, column="test_accuracy_pct", cell="resnet18"):
    """Rows of one arm; a string among the values is a status."""
    rows = []
    for seed, value in enumerate(values):
        row = {"cell": cell, "role": role, "seed": seed, "status": "done", "perturbation_cosine": 0.9}
        rows.append(row | ({"status": value} if isinstance(value, str) else {column: value}))
    return rows


def judge(claim, rows, miniature=FULL):
    return RULES[claim](pd.DataFrame(rows), miniature)


def outcomes(found):
    return [part.outcome for part in found[1]]


# ---------------------------------------------------------------------------------------------- the perturbation


def cosines(bf16, fp16, cell="resnet18"):
    """Of arms with these means, seed by seed a little apart."""
    spread = (-0.001, 0.001, 0.0, 0.0)
    return [
        row
        for role, mean in ((SAM["bf16"], bf16), (SAM["fp16"], fp16))
        for row in arm(role, [mean + one for one in spread], "perturbation_cosine", cell)
    ]


@pytest.mark.parametrize(
    ("bf16", "fp16", "full", "miniature"),
    [
        (0.6, 0.98, REPRODUCED, REPRODUCED),
        (0.97, 0.98, NOT_REPRODUCED, REPRODUCED),  # bf16 is good enough, and yet turns it further
        (0.6, 0.9, NOT_REPRODUCED, REPRODUCED),
        (0.9503, 0.98, INCONCLUSIVE, REPRODUCED),
        (0.6, 0.9497, INCONCLUSIVE, REPRODUCED),
        (0.9503, 0.9, NOT_REPRODUCED, NOT_REPRODUCED),
        (0.98, 0.6, NOT_REPRODUCED, NOT_REPRODUCED),
    ],
)
def test_the_cosines_decide_at_full_scale_and_their_order_in_a_miniature(bf16, fp16, full, miniature):
    rows = cosines(bf16, fp16)
    assert judge(TURNS, rows, FULL)[0] == full
    assert judge(TURNS, rows, MINIATURE)[0] == miniature


def test_what_does_not_decide_is_shown_beside():
    rows = cosines(0.6, 0.98)
    full, miniature = judge(TURNS, rows, FULL), judge(TURNS, rows, MINIATURE)
    assert outcomes(full) == [SUPPORTS, SUPPORTS, INFORMATION]
    assert outcomes(miniature) == [SUPPORTS, INFORMATION, INFORMATION]
    assert [round(part.estimate, 12) for part in full[1]] == [0.6, 0.98, -0.38]


def test_equal_cosines_leave_a_miniature_open():
    rows = cosines(0.9, 0.9)
    rows[0]["perturbation_cosine"] += 0.01
    rows[1]["perturbation_cosine"] -= 0.01
    assert judge(TURNS, rows, MINIATURE)[0] == INCONCLUSIVE


# ---------------------------------------------------------------------------------------------- gains


def gains(gap, which="bf16", sgd=1.0):
    """SAM gains 1 point in fp32 and so much more or less in a precision in which SGD is `sgd` points off."""
    rows = arm(SGD["fp32"], [90.0] * 4) + arm(SAM["fp32"], [91.0] * 4)
    rows += arm(SGD[which], [90.0 + sgd] * 4)
    return rows + arm(SAM[which], [91.0 + sgd + one for one in gap])


@pytest.mark.parametrize(
    ("gap", "full", "miniature"),
    [
        (BELOW, REPRODUCED, REPRODUCED),
        (ABOVE, NOT_REPRODUCED, NOT_REPRODUCED),
        (OPEN, INCONCLUSIVE, INCONCLUSIVE),
        (NONE, NOT_REPRODUCED, INCONCLUSIVE),  # about equal, which a miniature cannot say
        (SLIGHT, NOT_REPRODUCED, NOT_REPRODUCED),
        (SLIGHT_LOSS, INCONCLUSIVE, REPRODUCED),  # both conditions hold
        ((-0.3,) * 4, INCONCLUSIVE, REPRODUCED),
        ((-0.3 - 2**-20,) * 4, REPRODUCED, REPRODUCED),
    ],
)
def test_the_gain_in_bf16_less_that_in_fp32_decides(gap, full, miniature):
    for sgd in (0.0, 1.0, -2.0):  # what rounding does to SGD is not put down to the perturbation
        rows = gains(gap, sgd=sgd)
        assert judge(SHRINKS, rows, FULL)[0] == full
        found = judge(SHRINKS, rows, MINIATURE)
        assert found[0] == miniature
        assert found[1][0].estimate == pytest.approx(sum(gap) / 4, abs=1e-9)
        assert [part.estimate for part in found[1][1:]] == pytest.approx([sgd + sum(gap) / 4, sgd], abs=1e-9)
        assert outcomes(found)[1:] == [INFORMATION, INFORMATION]


@pytest.mark.parametrize(
    ("gap", "full", "miniature"),
    [
        (ABOVE, REPRODUCED, REPRODUCED),
        (BELOW, NOT_REPRODUCED, NOT_REPRODUCED),
        (OPEN, INCONCLUSIVE, INCONCLUSIVE),
        (NONE, NOT_REPRODUCED, INCONCLUSIVE),
        (SLIGHT, INCONCLUSIVE, REPRODUCED),
        (SLIGHT_LOSS, NOT_REPRODUCED, NOT_REPRODUCED),
    ],
)
def test_the_remedy_less_plain_bf16_decides(gap, full, miniature):
    rows = arm(SAM["bf16"], [90.0] * 4) + arm(REMEDY, [90.0 + one for one in gap])
    assert judge(RESTORES, rows, FULL)[0] == full
    found = judge(RESTORES, rows, MINIATURE)
    assert found[0] == miniature
    assert found[1][1].outcome == INFORMATION
    assert found[1][1].estimate == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("fp16", "tf32", "full"),
    [
        (NONE, NONE, REPRODUCED),
        (SLIGHT, SLIGHT_LOSS, REPRODUCED),
        (NONE, OPEN, INCONCLUSIVE),
        (OPEN, NONE, INCONCLUSIVE),
        (ABOVE, NONE, NOT_REPRODUCED),
        (NONE, BELOW, NOT_REPRODUCED),
        (OPEN, BELOW, NOT_REPRODUCED),
        ((0.25, 0.5, 0.25, 0.5), NONE, INCONCLUSIVE),  # interval (0.15, 0.60)
    ],
)
def test_both_gains_have_to_be_about_those_of_fp32(fp16, tf32, full):
    rows = gains(fp16, "fp16") + gains(tf32, "tf32")[8:]
    found = judge(KEEPS, rows, FULL)
    assert found[0] == full
    said = {REPRODUCED: SUPPORTS, NOT_REPRODUCED: CONTRADICTS, INCONCLUSIVE: INCONCLUSIVE}[full]
    assert said in outcomes(found)
    miniature = judge(KEEPS, rows, MINIATURE)
    assert (miniature[0], set(outcomes(miniature))) == (INCONCLUSIVE, {INFORMATION})
    assert "has no sign" in miniature[2]


# ---------------------------------------------------------------------------------------------- lambda_max

SHARPER, FLATTER, EITHER = (2.0, 1.8, 2.0, 1.8), (0.5, 0.6, 0.5, 0.6), (2.0, 0.5, 2.0, 0.5)


def eigenvalues(ratios, column="lambda_max", sgd=3.0):
    """SAM halves lambda_max in fp32, and leaves so many times that of it in bf16."""
    rows = arm(SGD["fp32"], [20.0] * 4, column) + arm(SAM["fp32"], [10.0] * 4, column)
    rows += arm(SGD["bf16"], [20.0 * sgd] * 4, column)
    return rows + arm(SAM["bf16"], [10.0 * sgd * ratio for ratio in ratios], column)


@pytest.mark.parametrize(
    ("ratios", "full", "miniature"),
    [
        (SHARPER, REPRODUCED, REPRODUCED),
        (FLATTER, NOT_REPRODUCED, NOT_REPRODUCED),
        (EITHER, INCONCLUSIVE, INCONCLUSIVE),
        ((1.01, 0.99, 1.01, 0.99), NOT_REPRODUCED, INCONCLUSIVE),
        ((1.04, 1.06, 1.04, 1.06), INCONCLUSIVE, REPRODUCED),
    ],
)
def test_the_ratio_of_the_two_ratios_decides(ratios, full, miniature):
    for column in ("lambda_max", "lambda_max@images=1000"):
        rows = eigenvalues(ratios, column)
        assert judge(FLATTENS, rows, FULL)[0] == full
        found = judge(FLATTENS, rows, MINIATURE)
        assert found[0] == miniature
        mean = math.prod(ratios) ** (1 / 4)
        assert [part.estimate for part in found[1]] == pytest.approx([mean, 3 * mean, 3.0])
        assert outcomes(found)[1:] == [INFORMATION, INFORMATION]


def test_companions_of_the_eigenvalue_are_not_taken_for_it():
    rows = [{"lambda_max:residual": 1.0, **row} for row in eigenvalues(SHARPER)]
    assert judge(FLATTENS, rows)[1][0].estimate == pytest.approx(math.sqrt(2.0 * 1.8))


@pytest.mark.parametrize("role", ROLES[FLATTENS])
def test_an_eigenvalue_that_is_not_above_0_allows_no_conclusion(role):
    rows = eigenvalues(SHARPER)
    next(row for row in rows if row["role"] == role)["lambda_max"] = -0.01
    found = judge(FLATTENS, rows)
    assert (found[0], found[1][0].outcome, found[1][0].n) == (INCONCLUSIVE, INCONCLUSIVE, 3)
    assert "lambda_max is not above 0 for seeds 0" in found[2]


# ---------------------------------------------------------------------------------------------- conventions

SETTLED = {
    TURNS: cosines(0.6, 0.98),
    SHRINKS: gains(BELOW),
    FLATTENS: eigenvalues(SHARPER),
    RESTORES: arm(SAM["bf16"], [90.0] * 4) + arm(REMEDY, [90.0 + one for one in ABOVE]),
    KEEPS: gains(NONE, "fp16") + gains(NONE, "tf32")[8:],
}
EVERY_ROLE = [(claim, role) for claim, roles in ROLES.items() for role in roles]


@pytest.mark.parametrize(("claim", "role"), EVERY_ROLE)
def test_an_arm_without_a_finished_record_is_not_run(claim, role):
    rows = [{**row, "status": "missing"} if row["role"] == role else row for row in SETTLED[claim]]
    found = judge(claim, rows)
    assert (found[0], found[1]) == (NOT_RUN, ())
    assert found[2] == f"resnet18: {role} has no finished record (4 missing)"


@pytest.mark.parametrize(("claim", "role"), EVERY_ROLE)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_a_diverged_run_allows_no_conclusion(claim, role, miniature):
    rows = [{**row, "status": "diverged"} if (row["role"], row["seed"]) == (role, 3) else row for row in SETTLED[claim]]
    found = judge(claim, rows, miniature)
    assert found[0] == INCONCLUSIVE
    assert f"resnet18: {role} diverged for 1 of 4 seeds (3)" in found[2]


@pytest.mark.parametrize("claim", ROLES)
def test_three_seeds_are_enough_and_two_are_not(claim):
    assert judge(claim, [row for row in SETTLED[claim] if row["seed"] < 3])[0] in (REPRODUCED, INCONCLUSIVE)
    found = judge(claim, [row for row in SETTLED[claim] if row["seed"] < 2])
    assert found[0] == INCONCLUSIVE
    assert "n = 2, at least 3 are needed" in found[2]
    assert math.isnan(found[1][0].low)


@pytest.mark.parametrize("claim", ROLES)
def test_every_cell_has_to_say_so(claim):
    rows = SETTLED[claim]
    assert judge(claim, rows)[0] == REPRODUCED
    assert judge(claim, rows + [{**row, "cell": "other"} for row in rows])[0] == REPRODUCED
    level = {
        TURNS: cosines(0.9503, 0.98, "other"),
        SHRINKS: [{**row, "cell": "other"} for row in gains(OPEN)],
        FLATTENS: [{**row, "cell": "other"} for row in eigenvalues(EITHER)],
        RESTORES: arm(SAM["bf16"], [90.0] * 4, cell="other") + arm(REMEDY, [90.0 + one for one in OPEN], cell="other"),
        KEEPS: [{**row, "cell": "other"} for row in gains(OPEN, "fp16") + gains(NONE, "tf32")[8:]],
    }
    found = judge(claim, rows + level[claim])
    assert found[0] == INCONCLUSIVE
    assert NEITHER in found[2]


# ---------------------------------------------------------------------------------------------- what is bound


def test_the_rules_name_arms_that_are_there():
    for profile in ("quick", "gpu"):
        for cell in {arm.cell for arm in precision.arms(profile)}:
            roles = {arm.role for arm in precision.arms(profile) if arm.cell == cell}
            assert {role for roles in ROLES.values() for role in roles} <= roles
            assert roles - {REMEDY} == {
                *SGD.values(),
                *(f"sam rho={rho:g} {p}" for rho in precision.RHOS for p in precision.PRECISIONS),
            }
    assert precision.arms("paper") == ()
    assert precision.RHOS[0] == rules_of.RHO


@pytest.mark.parametrize("profile", ["quick", "gpu"])
def test_arms_differ_in_precision_method_radius_and_second_pass_alone(profile):
    for cell in {arm.cell for arm in precision.arms(profile)}:
        flats = {arm.role: specs_of.flat(arm.base) for arm in precision.arms(profile) if arm.cell == cell}
        varied = {name for name in flats[SGD["fp32"]] if len({str(flat[name]) for flat in flats.values()}) > 1}
        assert varied == {"optim.method", "optim.rho", "optim.second_pass", "train.precision"}
        for role, flat in flats.items():
            method, *words = role.split()
            assert flat["optim.method"] == method
            assert flat["train.precision"] == next(word for word in words if word in precision.PRECISIONS)
            assert method == "sgd" or f"rho={flat['optim.rho']:g}" in words
            assert (flat["optim.second_pass"] == "two_products") == role.endswith("two products")


def test_thresholds_bind_on_the_gpu_and_nowhere_else():
    assert [experiments.published_scale("precision", profile) for profile in ("quick", "gpu")] == [False, True]
    assert all(claim.paper == published.OWN for claim in map(published.claim, ROLES))


def test_what_fits_ten_minutes_comes_first_and_the_second_network_last():
    arms = precision.arms("gpu")
    first = {arm.role for arm in arms if arm.priority == precision.FIRST}
    assert first == {SGD["bf16"], SGD["fp16"], SAM["bf16"], SAM["fp16"]}
    assert {arm.cell for arm in arms if arm.priority == precision.BESIDE} == {"mobilenet_v2"}
    assert {arm.cell for arm in arms if arm.priority < precision.BESIDE} == {"resnet18"}
    decided_by = {
        claim: max(a.priority for a in arms if a.role in roles and a.cell == "resnet18")
        for claim, roles in ROLES.items()
    }
    assert decided_by == {
        TURNS: precision.FIRST,
        SHRINKS: precision.REFERENCE,
        FLATTENS: precision.REFERENCE,
        RESTORES: precision.REFERENCE,
        KEEPS: precision.AS_BY_DEFAULT,
    }


@pytest.mark.parametrize("profile", ["quick", "gpu"])
def test_a_frame_has_the_columns_of_the_rules_before_there_are_records(profile, tmp_path):
    frame = Store(tmp_path).frame(precision.arms(profile))
    for claim in ROLES:
        assert RULES[claim](frame, True)[0] == NOT_RUN
    assert rules_of.COSINE in frame
    assert rules_of.lambda_max(dataclasses.make_dataclass("E", ["rows"])(frame)) in frame
