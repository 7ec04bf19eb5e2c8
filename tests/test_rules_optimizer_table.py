"""The rules of 07 optimizer_table at every edge of their outcomes, on made-up frames."""

import dataclasses
import math

import pandas as pd
import pytest

from samlib import experiments, published, report, stats
from samlib import spec as specs_of
from samlib.experiments import digits, optimizer_table
from samlib.rules import optimizer_table as table_rules
from samlib.rules.conventions import INCONCLUSIVE, INFORMATION, NOT_REPRODUCED, NOT_RUN, REPRODUCED, RULES, SUPPORTS

FULL, MINIATURE = False, True
BEATS, BEST_RHO, LONGER, AVERAGE, LARGE, FITS, SHORT = (
    "boca-t1-128sam-beats-sgd",
    "boca-t1-best-rho",
    "boca-sgd400-not-better",
    "boca-avg-sam-not-better-than-sgd",
    "boca-5000-sam-not-better",
    "boca-5000-avg-lowest-train-loss",
    "boca-short-training-mobilenetv3-sam-worse",
)
CLAIMS = (BEATS, BEST_RHO, LONGER, AVERAGE, LARGE, FITS, SHORT)
LOSS, ACCURACY, TRAIN = METRICS = ("test_loss", "test_accuracy_pct", "train_loss")
SAM = ("sam rho=0.05", "sam rho=0.1", "sam rho=0.2")
AVERAGE_SAM = ("average_sam rho=0.5", "average_sam rho=1")
AVERAGE_LARGE = ("average_sam_large rho=0.5", "average_sam_large rho=1")

# What boca2023 prints in Table 1 (loss, accuracy, training loss), its artefact's 400 epochs, and a made-up baseline.
PAPER = {
    "sgd": (0.2197, 92.16, 0.1435),
    "sam rho=0.05": (0.1879, 93.39, 0.1147),
    "sam rho=0.1": (0.1741, 93.98, 0.1105),
    "sam rho=0.2": (0.1829, 94.19, 0.1292),
    "average_sam rho=0.5": (0.2196, 92.14, 0.1414),
    "average_sam rho=1": (0.2301, 92.38, 0.1453),
    "sgd_large": (0.24, 91.0, 0.10),
    "sam_large rho=0.05": (0.2288, 92.08, 0.0821),
    "sam_large rho=0.1": (0.2289, 92.02, 0.1143),
    "average_sam_large rho=0.5": (0.2250, 92.75, 0.0461),
    "average_sam_large rho=1": (0.2209, 93.01, 0.0459),
    "sgd_double": (0.2492, 91.53, 0.1729),
}
# Early, SAM is behind at every radius.
EARLY = {role: (0.3, 90.0 - place, 0.3) for place, role in enumerate(("sgd", *SAM))}
WIGGLE = (0.98, 1.0, 1.02, 1.0)  # any two levels differ by an interval of the sign of their difference
OPEN = (3.0, -1.0, 2.0, -2.0)  # an interval around 0


def levels(claim):
    return EARLY if claim == SHORT else PAPER


def frame(claim, changes=(), cell="table", seeds=4):
    """`changes`: (role, metric) -> a level, or one value per seed to add to the level the role would have."""
    changes = dict(changes)
    rows = []
    for role, figures in levels(claim).items():
        for seed in range(seeds):
            row = {"cell": cell, "role": role, "seed": seed, "status": "done"}
            for metric, level in zip(METRICS, figures, strict=True):
                change = changes.get((role, metric), level)
                shift = 0.0 if isinstance(change, float) else change[seed % 4]
                row[metric] = (change if isinstance(change, float) else level) * WIGGLE[seed % 4] + shift
            rows.append(row)
    return pd.DataFrame(rows)


def outcome(claim, changes=(), miniature=FULL, **where):
    return RULES[claim](frame(claim, changes, **where), miniature)[0]


def with_status(rows, role, seed, status):
    hit = (rows["role"] == role) & (rows["seed"] == seed)
    return rows.assign(status=rows["status"].mask(hit, status), **{m: rows[m].mask(hit) for m in METRICS})


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_papers_own_figures_with_little_spread_reproduce_each_claim(claim):
    assert outcome(claim) == REPRODUCED


@pytest.mark.parametrize("claim", CLAIMS)
def test_where_the_sign_alone_is_judged_a_margin_supports_nothing(claim):
    """Average SAM at rho = 1 has the higher accuracy by 0.22 points, within the margin that only CIFAR can grant."""
    assert outcome(claim, miniature=MINIATURE) == (INCONCLUSIVE if claim == AVERAGE else REPRODUCED)


@pytest.mark.parametrize(
    ("claim", "changes", "expected"),
    [
        # six intervals, all on the claimed side or most of them on the other
        (BEATS, {("sam rho=0.05", ACCURACY): 92.16}, INCONCLUSIVE),
        (BEATS, {("sam rho=0.05", LOSS): OPEN}, INCONCLUSIVE),
        (BEATS, {("sgd", LOSS): 0.15}, INCONCLUSIVE),  # three of six against
        (BEATS, {("sgd", LOSS): 0.15, ("sgd", ACCURACY): 93.5}, NOT_REPRODUCED),  # four of six
        (BEATS, {("sgd", ACCURACY): 95.0}, INCONCLUSIVE),
        (BEATS, {("sgd", LOSS): 0.15, ("sgd", ACCURACY): 95.0}, NOT_REPRODUCED),
        # the best radius by loss and by accuracy
        (BEST_RHO, {("sam rho=0.1", LOSS): 0.2}, NOT_REPRODUCED),
        (BEST_RHO, {("sam rho=0.05", ACCURACY): 94.5}, NOT_REPRODUCED),
        (BEST_RHO, {("sam rho=0.2", ACCURACY): 93.98}, INCONCLUSIVE),  # a tie at the top
        (BEST_RHO, {("sam rho=0.2", LOSS): 0.1741}, INCONCLUSIVE),
        (BEST_RHO, {("sam rho=0.1", LOSS): (-0.3, 0.3, -0.3, 0.2)}, INCONCLUSIVE),  # ahead, and not clearly
        (BEST_RHO, {("sam rho=0.05", LOSS): (-0.3, 0.3, -0.3, 0.2)}, INCONCLUSIVE),  # another ahead, not clearly
        (BEST_RHO, {("sam rho=0.05", ACCURACY): 50.0}, REPRODUCED),  # who comes third does not matter
        # twice the epochs
        (LONGER, {("sgd_double", ACCURACY): 92.16}, INCONCLUSIVE),
        (LONGER, {("sgd_double", ACCURACY): OPEN}, INCONCLUSIVE),
        (LONGER, {("sgd_double", LOSS): OPEN}, INCONCLUSIVE),
        (LONGER, {("sgd_double", ACCURACY): 93.0}, INCONCLUSIVE),
        (LONGER, {("sgd_double", LOSS): 0.2}, INCONCLUSIVE),
        (LONGER, {("sgd_double", LOSS): 0.2, ("sgd_double", ACCURACY): 93.0}, NOT_REPRODUCED),
        (LONGER, {("sgd_double", TRAIN): 0.01}, REPRODUCED),  # the training loss is for information
        # the large batch
        (LARGE, {("sam_large rho=0.1", LOSS): 0.1741}, INCONCLUSIVE),
        (LARGE, {("sam_large rho=0.1", ACCURACY): OPEN}, INCONCLUSIVE),
        (LARGE, {("sam_large rho=0.1", ACCURACY): 93.0}, INCONCLUSIVE),  # better than SGD on one measure
        (LARGE, {("sam_large rho=0.1", ACCURACY): 93.0, ("sam_large rho=0.05", LOSS): 0.2}, INCONCLUSIVE),
        (LARGE, {("sam_large rho=0.1", ACCURACY): 93.0, ("sam_large rho=0.1", LOSS): 0.2}, NOT_REPRODUCED),
        (LARGE, {("sgd_large", ACCURACY): 95.0, ("sgd_large", LOSS): 0.1}, REPRODUCED),  # for information
        (LARGE, {("sam rho=0.2", ACCURACY): 0.0}, REPRODUCED),  # the paper has no 5000-SAM at this radius
        # training loss and generalisation of average SAM at the large batch
        (FITS, {("average_sam_large rho=0.5", TRAIN): 0.0821}, INCONCLUSIVE),
        (FITS, {("average_sam_large rho=0.5", TRAIN): 0.09}, INCONCLUSIVE),  # its other radius is still the lowest
        (FITS, {(role, TRAIN): 0.09 for role in AVERAGE_LARGE}, NOT_REPRODUCED),
        (FITS, {("sgd", TRAIN): 0.01}, NOT_REPRODUCED),
        (FITS, {("sgd", TRAIN): (-0.3, 0.3, -0.3, 0.0)}, INCONCLUSIVE),  # the runner-up is SGD, and not clearly
        (FITS, {("sgd_large", TRAIN): 0.01}, REPRODUCED),  # the paper lacks it: for information
        (FITS, {("average_sam_large rho=1", LOSS): 0.18}, INCONCLUSIVE),
        (FITS, {(role, LOSS): 0.18 for role in AVERAGE_LARGE}, INCONCLUSIVE),  # below two of three radii
        (FITS, {(role, LOSS): 0.17 for role in AVERAGE_LARGE}, NOT_REPRODUCED),
        (FITS, {(role, ACCURACY): 99.0 for role in AVERAGE_LARGE}, REPRODUCED),  # for information
        # early
        (SHORT, {("sam rho=0.05", ACCURACY): 90.0}, REPRODUCED),  # at 0
        (SHORT, {(role, ACCURACY): 90.0 for role in SAM}, REPRODUCED),
        (SHORT, {("sam rho=0.05", ACCURACY): OPEN}, INCONCLUSIVE),
        (SHORT, {("sam rho=0.2", ACCURACY): 90.5}, NOT_REPRODUCED),  # never means at no radius
        (SHORT, {(role, LOSS): 0.1 for role in SAM}, REPRODUCED),  # a claim on accuracy
    ],
)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_edges_that_need_no_margin(claim, changes, expected, miniature):
    assert outcome(claim, changes, miniature) == expected


def gains(loss, accuracy, role="average_sam rho=1"):
    """Average SAM at both radii is SGD, plus these at one of them in every seed."""
    other = next(name for name in AVERAGE_SAM if name != role)
    same = {(role, LOSS): (0.0,) * 4, (role, ACCURACY): (0.0,) * 4, (other, LOSS): 0.2197, (other, ACCURACY): 92.16}
    sgd = {("sgd", LOSS): 0.2197, ("sgd", ACCURACY): 92.16}
    level = {(role, LOSS): PAPER[role][0], (role, ACCURACY): PAPER[role][1]}
    rows = frame(AVERAGE, sgd | same)
    for (name, metric), base in level.items():
        hit = rows["role"] == name
        change = loss if metric == LOSS else accuracy
        shift = pd.Series(change if isinstance(change, tuple) else [change] * 4, index=rows.index[hit])
        target = PAPER["sgd"][METRICS.index(metric)]
        rows.loc[hit, metric] = rows.loc[hit, metric] * target / base + shift
    return rows


@pytest.mark.parametrize("role", AVERAGE_SAM)
@pytest.mark.parametrize(
    ("loss", "accuracy", "full", "miniature"),
    [
        (0.01, -0.5, REPRODUCED, INCONCLUSIVE),  # the other radius equals SGD, which shows no sign
        (0.0, 0.299, REPRODUCED, INCONCLUSIVE),
        (0.0, 0.301, INCONCLUSIVE, INCONCLUSIVE),
        (-0.0049, 0.0, REPRODUCED, INCONCLUSIVE),
        (-0.0051, 0.0, INCONCLUSIVE, INCONCLUSIVE),
        (0.0, OPEN, INCONCLUSIVE, INCONCLUSIVE),  # a wide interval is no support
        (OPEN, 0.0, INCONCLUSIVE, INCONCLUSIVE),
        (-0.02, 0.5, NOT_REPRODUCED, NOT_REPRODUCED),
        (-0.02, 0.1, NOT_REPRODUCED, NOT_REPRODUCED),
        (-0.001, 0.1, INCONCLUSIVE, NOT_REPRODUCED),  # better on both, and by less than the margins
        (-0.02, -0.5, INCONCLUSIVE, INCONCLUSIVE),
        (0.02, 0.5, INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_average_sam_has_margins_at_the_published_scale_only(role, loss, accuracy, full, miniature):
    rows = gains(loss, accuracy, role)
    assert RULES[AVERAGE](rows, FULL)[0] == full
    assert RULES[AVERAGE](rows, MINIATURE)[0] == miniature


def test_average_sam_that_is_worse_at_both_radii_supports_the_claim_by_its_sign():
    worse = {(role, LOSS): 0.25 for role in AVERAGE_SAM} | {(role, ACCURACY): 91.0 for role in AVERAGE_SAM}
    assert outcome(AVERAGE, worse, MINIATURE) == REPRODUCED
    assert outcome(AVERAGE, worse | {("average_sam rho=1", ACCURACY): 92.16}, MINIATURE) == INCONCLUSIVE


def test_both_conditions_at_once_are_named():
    reason = RULES[AVERAGE](gains(-0.001, 0.1), FULL)[2]
    assert reason.startswith("the conditions for reproduced and for not reproduced both hold")


# ---------------------------------------------------------------------------------------------- the conventions

ROLES = {
    BEATS: ("sgd", *SAM),
    BEST_RHO: SAM,
    LONGER: ("sgd_double", "sgd", *SAM),
    AVERAGE: ("sgd", *AVERAGE_SAM),
    LARGE: ("sgd", *SAM[:2], "sam_large rho=0.05", "sam_large rho=0.1", "sgd_large"),
    FITS: tuple(role for role in PAPER if role != "sgd_double"),
    SHORT: ("sgd", *SAM),
}
INFORMS = {LONGER: SAM, LARGE: ("sgd_large",), FITS: ("sgd_large",)}  # arms that are shown and decide nothing
EACH_ROLE = [(claim, role) for claim, roles in ROLES.items() for role in roles]


@pytest.mark.parametrize(("claim", "role"), EACH_ROLE)
def test_an_arm_without_a_finished_record_is_not_run(claim, role):
    rows = frame(claim)
    missing = rows.assign(status=rows["status"].mask(rows["role"] == role, "missing"))
    expected = (NOT_RUN, (), f"table: {role} has no finished record (4 missing)")
    assert RULES[claim](missing, FULL) == expected
    assert RULES[claim](rows[rows["role"] != role], FULL)[0] == NOT_RUN


@pytest.mark.parametrize(("claim", "role"), EACH_ROLE)
def test_a_diverged_run_of_a_deciding_arm_leaves_no_conclusion(claim, role):
    found, _, reason = RULES[claim](with_status(frame(claim), role, 2, "diverged"), FULL)
    assert found == (REPRODUCED if role in INFORMS.get(claim, ()) else INCONCLUSIVE)
    assert f"table: {role} diverged for 1 of 4 seeds (2)" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_three_seeds_are_enough_and_two_are_not(claim):
    assert outcome(claim, seeds=3) == REPRODUCED
    found, parts, reason = RULES[claim](frame(claim, seeds=2), FULL)
    assert found == INCONCLUSIVE
    assert "n = 2, at least 3 are needed" in reason
    assert {part.n for part in parts} == {2}
    assert all(math.isnan(part.low) for part in parts)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_seed_without_partner_is_left_out_and_said(claim):
    found, parts, reason = RULES[claim](with_status(frame(claim), SAM[1], 3, "failed"), FULL)
    if SAM[1] in ROLES[claim]:
        assert f"table: of 4 seeds of {SAM[1]}, 1 failed" in reason
        assert 3 in {part.n for part in parts}
    assert found == REPRODUCED


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_cell_has_to_support(claim):
    both = pd.concat([frame(claim), frame(claim, cell="another")])
    assert RULES[claim](both, FULL)[0] == REPRODUCED
    other = frame(claim, {(role, metric): 0.3 for role in levels(claim) for metric in METRICS}, cell="another")
    expected = REPRODUCED if claim in (AVERAGE, SHORT) else INCONCLUSIVE  # equal arms: no gain, and no loss
    assert RULES[claim](pd.concat([frame(claim), other]), FULL)[0] == expected


@pytest.mark.parametrize("claim", CLAIMS)
def test_neither_the_order_of_rows_nor_of_seeds_matters(claim):
    rows = frame(claim)
    other = rows.assign(seed=17 - rows["seed"]).sample(frac=1, random_state=0)
    assert RULES[claim](other, FULL) == RULES[claim](rows, FULL)


def test_a_rank_needs_seeds_that_every_arm_has_finished():
    """Each pair has three seeds in common, all three arms only two."""
    rows = frame(BEST_RHO)
    for role, seed in ((SAM[0], 0), (SAM[1], 1)):
        rows = with_status(rows, role, seed, "failed")
    found, _, reason = RULES[BEST_RHO](rows, FULL)
    assert found == INCONCLUSIVE
    assert "table: no rank in test_loss: n = 2, at least 3 are needed" in reason


def test_a_rank_among_arms_that_share_no_seed_at_all_is_none():
    rows = frame(BEST_RHO)
    rows = rows.assign(seed=rows["seed"] + 10 * rows["role"].map({role: place for place, role in enumerate(SAM)}))
    assert RULES[BEST_RHO](rows.dropna(subset="seed"), FULL)[0] == INCONCLUSIVE


# ---------------------------------------------------------------------------------------------- what is shown


def test_parts_name_the_pair_and_what_the_paper_prints_for_it():
    loss, accuracy = RULES[BEST_RHO](frame(BEST_RHO), FULL)[1]
    figures = published.claim(BEST_RHO).published
    assert loss.name == "table, lowest test_loss with sam rho=0.1"
    assert accuracy.name == "table, highest test_accuracy_pct with sam rho=0.2"
    assert -loss.published == pytest.approx(figures["loss_gap_to_next_rho"])
    assert accuracy.published == pytest.approx(figures["accuracy_gap_to_next_rho"])
    assert loss.estimate == pytest.approx(loss.published)

    parts = RULES[LONGER](frame(LONGER), FULL)[1]
    assert [part.published for part in parts[:3]] == pytest.approx([0.0295, -0.63, 0.0294])
    assert [part.outcome for part in parts] == [SUPPORTS] * 2 + [INFORMATION] * 7


def test_a_short_training_is_not_shown_beside_figures_of_a_long_one():
    assert {part.published for part in RULES[SHORT](frame(SHORT), FULL)[1]} == {None}


def test_deciding_and_informing_parts():
    counts = {BEATS: (6, 0), BEST_RHO: (2, 0), LONGER: (2, 7), AVERAGE: (4, 0), LARGE: (8, 4), FITS: (8, 8)}
    for claim, (deciding, informing) in (counts | {SHORT: (3, 0)}).items():
        outcomes = [part.outcome for part in RULES[claim](frame(claim), FULL)[1]]
        assert outcomes.count(INFORMATION) == informing
        assert len(outcomes) - informing == deciding


def test_the_confound_of_the_large_batch_is_said_with_its_verdicts():
    for claim in CLAIMS:
        assert ("fewer updates" in RULES[claim](frame(claim), FULL)[2]) == (claim in (LARGE, FITS))


def test_the_claims_and_the_table_of_the_paper_agree_on_its_figures():
    for role, figures in PAPER.items():
        found = [table_rules.printed_figure(metric, role) for metric in METRICS]
        assert found == ([None] * 3 if role in ("sgd_large", "sgd_double") else list(figures))
    stated = published.claim(BEATS).published
    assert {name: (figures["loss"], figures["acc"]) for name, figures in stated.items()} == {
        name: PAPER[role][:2] for name, role in zip(stated, ("sgd", *SAM), strict=True)
    }


def test_the_paper_beside_our_means():
    rows = with_status(frame(FITS), "sgd", 3, "failed")
    rows = rows.assign(status=rows["status"].mask(rows["role"] == "sgd_double", "missing"))
    table = report.beside_the_paper(rows, {LOSS: {"sgd": 0.2197}, TRAIN: {"sgd": 0.1435, "sam rho=0.1": 0.1105}})
    assert list(table.columns) == [f"{metric}, {who}" for metric in (LOSS, TRAIN) for who in ("the paper", "ours")] + [
        "n"
    ]
    ours = stats.mean([0.2197 * wiggle for wiggle in WIGGLE[:3]])
    assert table.loc["SGD"].tolist()[:2] == ["0.2197", report.bounds_text(ours)]
    assert table.loc["SAM, rho=0.1", f"{LOSS}, the paper"] == ""
    assert table.loc["SAM, rho=0.1", f"{TRAIN}, the paper"] == "0.1105"
    assert table["n"].value_counts().to_dict() == {"4": len(PAPER) - 2, "3": 1, "0": 1}
    assert table.loc["SGD, twice the epochs", f"{LOSS}, ours"] == "pending"


# ---------------------------------------------------------------------------------------------- what is run


def test_every_role_of_a_rule_is_an_arm_of_the_cells_bound_to_its_claim():
    arms = {(arm.cell, arm.role) for arm in optimizer_table.arms("quick")}
    for claim, profiles in optimizer_table.DECIDES.items():
        assert {(cell, role) for cell in profiles["quick"] for role in ROLES[claim]} <= arms


def test_rows_differ_in_method_radius_and_batch_alone():
    base = specs_of.flat(optimizer_table.SPECS["sgd"])
    for role in optimizer_table.ROLES:
        (arm,) = (arm for arm in optimizer_table.arms("quick") if (arm.cell, arm.role) == ("table", role))
        assert arm == optimizer_table.table_arm(role)
        changed = {name for name, value in specs_of.flat(arm.specs[0]).items() if value != base[name]}
        assert changed <= {"optim.method", "optim.rho", "train.batch_size"}
        assert ("train.batch_size" in changed) == ("_large" in role)
    assert base["optim.lr"] == digits.LR["table"]
    assert (base["optim.nesterov"], base["optim.clip"], base["optim.clip_norm"]) == (True, "descent", 5.0)


def test_the_large_batch_is_one_step_an_epoch_and_its_longer_runs_make_as_many_updates():
    def updates(arm):
        settings = arm.specs[0].train
        return settings.epochs * (arm.base.data.train_size // settings.batch_size)

    by_name = {(arm.cell, arm.role): updates(arm) for arm in optimizer_table.arms("quick")}
    assert by_name["table", "sgd_large"] == 40
    assert by_name["table", "sgd_double"] == 2 * by_name["table", "sgd"] == 8 * by_name["short training", "sgd"]
    equal = optimizer_table.equal_updates()
    assert {by_name[arm.cell, arm.role] for arm in equal} == {by_name["table", "sgd"]}


def test_whoever_measures_the_models_of_the_table_trains_nothing_again():
    measured = optimizer_table.table_arm("sam rho=0.1", (experiments.measure("lambda_max"),), cell="another")
    (row,) = (arm for arm in optimizer_table.arms("quick") if (arm.cell, arm.role) == ("table", "sam rho=0.1"))
    assert list(map(specs_of.key, measured.specs)) == list(map(specs_of.key, row.specs))
    assert dataclasses.replace(measured, cell="table", measures=()) == row
    (doubled,) = (arm for arm in optimizer_table.arms("quick") if arm.role == "sgd_double")
    assert doubled == optimizer_table.sgd_double()
