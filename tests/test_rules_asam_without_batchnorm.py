"""Each rule of 03 at every edge of its outcome, on made-up frames; its settings against the choices they rest on."""

import math
from statistics import linear_regression

import pandas as pd
import pytest

from samlib import experiments, published, stats
from samlib.experiments import asam_without_batchnorm as experiment
from samlib.rules import RULES, asam_without_batchnorm
from samlib.rules.conventions import (
    CONTRADICTS,
    INCONCLUSIVE,
    INFORMATION,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    SUPPORTS,
)

ACCURACY, LOSS_GAP = "coldenhoff-c-asam-vs-sam-accuracy", "coldenhoff-c-train-loss-gap"
TAILS, VARIANCE = "coldenhoff-c-heavier-tails", "coldenhoff-c-asam-lower-variance"
LATE = "coldenhoff-c-late-descent"
CLAIMS = (ACCURACY, LOSS_GAP, TAILS, VARIANCE, LATE)
FULL, MINIATURE = False, True
KURTOSIS = "first_layer_kurtosis"
EPOCHS = (5, 70, 75, 80, 85, 90, 95, 100)
SEEDS = range(10)
WIGGLE = (0.9, -1.1, 0.4, -0.2, 1.3, -0.7, 0.1, -0.5, 0.6, -0.8)  # over seeds; no two alike


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """A tenth of the bootstrap: these spreads are far from 1, and it is most of the time."""
    monkeypatch.setattr(stats, "RESAMPLES", 999)


def run(cell, role, seed, status="done", **values):
    found = {"cell": cell, "role": role, "seed": seed, "status": status}
    return found | (values if status == "done" else {})


def arm(role, cell="published", seeds=SEEDS, **columns):
    """Rows of one arm; each column is a function of the seed."""
    return [run(cell, role, seed, **{name: of(seed) for name, of in columns.items()}) for seed in seeds]


def curves(slope, accuracy, seed):
    """Training loss falls by exp(slope) per epoch from epoch 75 on, and twenty times as fast before."""
    fall = {epoch: slope * (epoch - 75) * (1 if epoch >= 75 else 20) for epoch in EPOCHS}
    losses = {f"train_loss@epoch={epoch}": math.exp(fall[epoch] + 0.1 * WIGGLE[seed]) for epoch in EPOCHS}
    return losses | {f"test_accuracy_pct@epoch={epoch}": accuracy + 0.1 * WIGGLE[seed] for epoch in EPOCHS}


def late(sam=-0.05, asam=-0.01, gap=1.0, cell="published", seeds=SEEDS):
    """Slopes of log training loss per epoch in the last quarter; gap is ASAM - SAM in accuracy."""
    slopes = {"sam": sam, "asam": asam}
    return [
        run(cell, role, seed, **curves(slopes[role] + 0.001 * WIGGLE[seed], 80 + gap * (role == "asam"), seed))
        for role in slopes
        for seed in seeds
    ]


def gain(size=2.0, noise=0.5, cell="published", seeds=SEEDS):
    """ASAM - SAM in accuracy."""
    asam = arm("asam", cell, seeds, test_accuracy_pct=lambda seed: 80 + size + noise * WIGGLE[seed])
    return asam + arm("sam", cell, seeds, test_accuracy_pct=lambda seed: 80.0)


def ratio(size=3.0, noise=0.2, cell="published", seeds=SEEDS):
    """ASAM / SAM of the training loss."""
    asam = arm("asam", cell, seeds, train_loss=lambda seed: size * 1e-4 * math.exp(noise * WIGGLE[seed]))
    return asam + arm("sam", cell, seeds, train_loss=lambda seed: 1e-4)


def kurtosis(sam=1.0, asam=1.0, noise=0.2, cell="published", seeds=SEEDS):
    """Without batch norm minus with it, for each optimiser."""
    names = (KURTOSIS, f"{KURTOSIS}:quantile_ratio", f"{KURTOSIS}:range")
    rows = []
    for role, size in (("sam", sam), ("asam", asam)):
        rows += arm(role, cell, seeds, **{name: lambda seed, s=size: s + noise * WIGGLE[seed] for name in names})
        rows += arm(f"{role}_batchnorm", cell, seeds, **{name: lambda seed: 0.0 for name in names})
    return rows


def spreads(loss=0.2, accuracy=0.2, cell="published", seeds=SEEDS):
    """Standard deviation of ASAM over that of SAM, whose seeds lie in another order: log training loss and accuracy."""
    shuffled = [WIGGLE[(3 * seed) % 10] for seed in SEEDS]
    values = {
        "sam": {"train_loss": lambda s: 1e-4 * math.exp(WIGGLE[s]), "test_accuracy_pct": lambda s: 80 + WIGGLE[s]},
        "asam": {
            "train_loss": lambda s: 3e-4 * math.exp(loss * shuffled[s]),
            "test_accuracy_pct": lambda s: 80 + accuracy * shuffled[s],
        },
    }
    return [row for role, columns in values.items() for row in arm(role, cell, seeds, **columns)]


# claim -> frames that support it, contradict it, and leave it open
FRAMES = {
    ACCURACY: (gain(), gain(-2.0), gain(0.1, 2.0)),
    LOSS_GAP: (ratio(), ratio(1 / 3), ratio(1.05, 1.0)),
    TAILS: (kurtosis(), kurtosis(-1.0, -1.0), kurtosis(0.1, 0.1, 2.0)),
    VARIANCE: (spreads(), spreads(5.0, 5.0), spreads(1.0, 1.0)),
    LATE: (late(), late(-0.01, -0.05), late(-0.05, -0.05)),
}
MAKERS = {ACCURACY: gain, LOSS_GAP: ratio, TAILS: kurtosis, VARIANCE: spreads, LATE: late}


def judge(claim, rows, miniature=FULL):
    return RULES[claim](pd.DataFrame(rows), miniature)


def outcome(claim, rows, miniature=FULL):
    return judge(claim, rows, miniature)[0]


def deciding(parts):
    return [part.outcome for part in parts if part.outcome != INFORMATION]


# ---------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_the_interval_decides(claim, miniature):
    for rows, expected in zip(FRAMES[claim], (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE), strict=True):
        assert outcome(claim, rows, miniature) == expected


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_cell_has_to_meet_the_rule(claim):
    first = FRAMES[claim]
    second = [[{**row, "cell": "tuned"} for row in rows] for rows in first]
    assert outcome(claim, first[0] + second[0]) == REPRODUCED
    assert outcome(claim, first[1] + second[1]) == NOT_REPRODUCED
    for other in (1, 2):
        assert outcome(claim, first[0] + second[other]) == INCONCLUSIVE
    assert outcome(claim, first[1] + second[2]) == INCONCLUSIVE
    absent = [{**row, "status": "missing"} for row in second[0]]
    assert outcome(claim, first[0] + absent) == NOT_RUN


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("status", ["missing", "failed", "stale"])
def test_an_arm_without_a_finished_record_is_not_run(claim, status):
    roles = {row["role"] for row in FRAMES[claim][0]}
    assert len(roles) == (4 if claim == TAILS else 2)
    for role in roles:
        rows = [{**row, "status": status} if row["role"] == role else row for row in FRAMES[claim][0]]
        found, parts, reason = judge(claim, rows)
        assert (found, parts) == (NOT_RUN, ())
        assert reason == f"published: {role} has no finished record (10 {status})"
        assert outcome(claim, [row for row in rows if row["role"] != role]) == NOT_RUN


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("support", [0, 1])
def test_a_diverged_run_leaves_no_conclusion_whichever_arm_it_hits(claim, support):
    rows = FRAMES[claim][support]
    for role in {row["role"] for row in rows}:
        hit = [run("published", role, 3, "diverged") if (r["role"], r["seed"]) == (role, 3) else r for r in rows]
        found, parts, reason = judge(claim, hit)
        if claim == TAILS and support == 1:  # "below 0 for either": the other optimiser still says so
            assert found == NOT_REPRODUCED
            assert deciding(parts).count(INCONCLUSIVE) == 1
        else:
            assert found == INCONCLUSIVE
        assert f"published: {role} diverged for 1 of 10 seeds (3)" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_records_that_all_diverged_need_no_metric_columns(claim):
    rows = [run(row["cell"], row["role"], row["seed"], "diverged") for row in FRAMES[claim][0]]
    assert outcome(claim, rows) == INCONCLUSIVE


@pytest.mark.parametrize("claim", CLAIMS)
def test_how_many_seeds_are_enough(claim):
    """Three, and ten where the claim is about spread."""
    least = 10 if claim == VARIANCE else 3
    rows = MAKERS[claim]() if claim == VARIANCE else MAKERS[claim](seeds=range(least))
    assert outcome(claim, rows) == REPRODUCED
    found, parts, reason = judge(claim, [row for row in rows if row["seed"] != least - 1])
    assert found == INCONCLUSIVE
    assert {part.n for part in parts} == {least - 1}
    assert f"n = {least - 1}, at least {least} are needed" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_missing_seed_is_left_out_and_said(claim):
    rows = [
        {**row, "status": "missing"} if (row["role"], row["seed"]) == ("asam", 9) else row for row in FRAMES[claim][0]
    ]
    found, parts, reason = judge(claim, rows)
    assert found == (INCONCLUSIVE if claim == VARIANCE else REPRODUCED)
    assert min(part.n for part in parts) == 9
    assert "published: of 10 seeds of asam, 1 missing" in reason


# ---------------------------------------------------------------------------------------------- one by one


def test_similar_is_said_and_decides_nothing():
    for size, similar in ((2.0, "yes"), (0.1, "yes"), (-2.0, "no")):
        _, parts, reason = judge(ACCURACY, gain(size))
        assert f"published: 'similar', an interval above -0.5 points: {similar}" in reason
        assert parts[0].published == -0.11
    assert outcome(ACCURACY, gain(0.1)) == INCONCLUSIVE
    assert "(does not bind here)" in judge(ACCURACY, gain(), MINIATURE)[2]
    assert "bind" not in judge(ACCURACY, gain())[2]


def test_an_order_of_magnitude_is_said_and_decides_nothing():
    for size, reached in ((3.0, "no"), (9.5, "yes"), (30.0, "yes")):
        found, parts, reason = judge(LOSS_GAP, ratio(size))
        assert found == REPRODUCED
        assert f"published: 'order of magnitude', an interval that reaches 10: {reached}" in reason
    assert judge(LOSS_GAP, ratio(3.0, noise=0.0))[1][0].estimate == pytest.approx(3.0)
    assert parts[0].published == 3.06


def test_a_training_loss_of_zero_has_no_ratio():
    rows = ratio()
    rows[4]["train_loss"] = 0.0
    found, parts, reason = judge(LOSS_GAP, rows)
    assert (found, parts[0].n) == (INCONCLUSIVE, 9)
    assert "train_loss is not above 0 for seeds 4" in reason


@pytest.mark.parametrize(
    ("sam", "asam", "expected"),
    [(1.0, 0.1, INCONCLUSIVE), (0.1, 1.0, INCONCLUSIVE), (1.0, -1.0, NOT_REPRODUCED), (-1.0, 1.0, NOT_REPRODUCED)],
)
def test_tails_have_to_be_heavier_for_both_optimisers(sam, asam, expected):
    assert outcome(TAILS, kurtosis(sam, asam)) == expected


def test_kurtosis_decides_and_quantiles_and_range_are_shown():
    rows = [{**row, f"{KURTOSIS}:range": -9.0 * row.get(f"{KURTOSIS}:range", 0)} for row in kurtosis()]
    found, parts, _ = judge(TAILS, rows)
    assert (found, deciding(parts)) == (REPRODUCED, [SUPPORTS] * 2)
    assert len(parts) == 6
    assert parts[0].statistic == f"sam - sam_batchnorm of {KURTOSIS}, paired by seed"
    assert [part.estimate < 0 for part in parts] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("loss", "accuracy", "expected"),
    [(0.2, 1.0, INCONCLUSIVE), (1.0, 0.2, INCONCLUSIVE), (0.2, 5.0, NOT_REPRODUCED), (5.0, 0.2, NOT_REPRODUCED)],
)
def test_both_spreads_have_to_be_smaller(loss, accuracy, expected):
    assert outcome(VARIANCE, spreads(loss, accuracy)) == expected


def test_the_spread_is_that_of_the_logarithm_and_the_absolute_one_is_shown():
    """In absolute units ASAM, at three times the loss, varies as SAM does where it varies a third as much in logs."""
    _, parts, _ = judge(VARIANCE, spreads(0.3, 0.2))
    log, accuracy, absolute = parts
    assert log.estimate == pytest.approx(0.3)
    assert accuracy.estimate == pytest.approx(0.2)
    assert (absolute.outcome, absolute.estimate > 2 * log.estimate) == (INFORMATION, True)
    assert [round(part.published, 2) for part in parts] == [0.41, 0.58, 1.31]
    assert "log_train_loss" in log.statistic


@pytest.mark.parametrize("claim", [VARIANCE, LATE])
@pytest.mark.parametrize("support", [0, 1])
def test_a_training_loss_of_zero_leaves_no_conclusion(claim, support):
    """Without the run that went down farthest, the rest would say too little of its arm."""
    rows = [dict(row) for row in FRAMES[claim][support]]
    rows[4]["train_loss" if claim == VARIANCE else "train_loss@epoch=95"] = 0.0
    found, _, reason = judge(claim, rows)
    assert found == INCONCLUSIVE
    assert f"published: {rows[4]['role']} has a training loss that is not above 0 for seed 4" in reason


def test_a_loss_of_zero_in_a_run_that_does_not_count_is_no_obstacle():
    rows = late()
    rows[0] |= {"status": "stale", "train_loss@epoch=95": 0.0}
    assert outcome(LATE, rows) == REPRODUCED


def test_the_slope_is_that_of_the_last_quarter():
    """Epoch 70 and before, where the loss falls twenty times as fast, are no part of it."""
    rows = late(-0.05, -0.01)
    _, parts, _ = judge(LATE, rows)
    x = [epoch for epoch in EPOCHS if epoch >= 75]
    by_hand = [linear_regression(x, [math.log(r[f"train_loss@epoch={e}"]) for e in x]).slope for r in rows]
    assert parts[0].estimate == pytest.approx(sum(by_hand[:10]) / 10 - sum(by_hand[10:]) / 10)
    assert parts[0].estimate == pytest.approx(-0.04)
    assert parts[1].estimate == pytest.approx(1.0)
    assert parts[1].outcome == INFORMATION


def test_the_accuracy_gap_is_the_mean_of_the_window():
    rows = late(gap=0.0)
    for row in rows:
        row["test_accuracy_pct@epoch=70"] = 0.0
        row["test_accuracy_pct@epoch=80"] += 6.0 * (row["role"] == "asam")
    assert judge(LATE, rows)[1][1].estimate == pytest.approx(1.0)


@pytest.mark.parametrize("gap", [5.0, -5.0])
def test_accuracies_that_are_far_apart_are_not_close_at_the_published_scale(gap):
    assert outcome(LATE, late(gap=gap)) == INCONCLUSIVE
    assert outcome(LATE, late(gap=gap), MINIATURE) == REPRODUCED  # two points bind on CIFAR-10 alone
    assert outcome(LATE, late(-0.01, -0.05, gap=gap)) == NOT_REPRODUCED
    for size, close in ((gap, "no"), (1.0, "yes")):
        reason = judge(LATE, late(gap=size), MINIATURE)[2]
        assert f"published: 'close', an interval within 2 points: {close} (does not bind here)" in reason


@pytest.mark.parametrize("kept", [(100,), ()])
def test_a_curve_of_less_than_two_points_has_no_slope(kept):
    rows = [
        {name: value for name, value in row.items() if "@" not in name or int(name.partition("=")[2]) in kept}
        for row in late()
    ]
    assert outcome(LATE, rows) == INCONCLUSIVE


def test_a_curve_with_a_gap_is_left_out():
    rows = late()
    rows[2]["train_loss@epoch=90"] = None
    found, parts, reason = judge(LATE, rows)
    assert (found, parts[0].n) == (REPRODUCED, 9)
    assert "sam has no log_train_loss_slope_per_epoch@last_quarter for seeds 2" in reason
    rows[3]["test_accuracy_pct@epoch=90"] = None
    _, parts, reason = judge(LATE, rows)
    assert [part.n for part in parts] == [9, 9]
    assert "sam has no test_accuracy_pct@last_quarter for seeds 3" in reason


# ---------------------------------------------------------------------------------------------- what is run


def test_the_last_quarter_of_the_quick_profile():
    train = experiment.WITHOUT.train
    evaluated = range(train.eval_every, train.epochs + 1, train.eval_every)
    columns = ["status", "train_loss@best_test", *(f"train_loss@epoch={epoch}" for epoch in evaluated)]
    assert asam_without_batchnorm.last_quarter(columns) == [75, 80, 85, 90, 95, 100]


def test_arms_differ_in_the_method_or_in_the_norm_alone():
    arms = {(arm.cell, arm.role): arm.base for arm in experiment.arms("quick") if not arm.tuning}
    for cell in ("published", "tuned"):
        sgd, sam, asam = (arms[cell, role] for role in ("sgd", "sam", "asam"))
        assert (
            (sam.data, sam.model, sam.train) == (asam.data, asam.model, asam.train) == (sgd.data, sgd.model, sgd.train)
        )
        assert sgd == arms["published", "sgd"]
        for base in (sam, asam):
            assert {"method", "rho"} >= {
                name for name in base.optim.__slots__ if getattr(base.optim, name) != getattr(sgd.optim, name)
            }
    for role in ("sam", "asam"):
        without, batch = arms["published", role], arms["published", f"{role}_batchnorm"]
        assert (without.model.norm, batch.model.norm) == ("none", "batch")
        assert (without.data, without.optim, without.train) == (batch.data, batch.optim, batch.train)


def test_the_published_settings_are_those_of_the_table():
    printed = published.settings().set_index("setting_id").loc["coldenhoff-c"]
    arms = {arm.role: arm.base for arm in experiment.arms("quick") if arm.cell == "published"}
    assert printed["rho"] == f"SAM {arms['sam'].optim.rho:g}; ASAM {arms['asam'].optim.rho:g}"
    assert "no eta" in printed["artefact_says"] or "no eta" in printed["unstated"]
    for base in arms.values():
        assert (base.optim.momentum, base.optim.weight_decay) == (printed["momentum"], printed["weight_decay"])
        assert (base.optim.nesterov, base.optim.schedule) == (False, "cosine")
        assert (base.optim.eta, base.optim.perturbed, base.optim.scaled) == (0, "all", "all")
        assert (base.data.scaling, base.train.label_smoothing) == ("unit", 0)


def test_rules_read_only_what_their_arms_have():
    for claim in CLAIMS:
        cells = experiments.decides(claim, "quick")[1] if "asam_without_batchnorm" in experiments.STEMS else ()
        for cell in cells:
            roles = {arm.role for arm in experiment.arms("quick") if arm.cell == cell}
            assert {row["role"] for row in FRAMES[claim][0]} <= roles
    for arm_ in experiment.arms("quick"):
        if arm_.role in ("sam", "asam") and not arm_.tuning:
            assert arm_.curves == ("train_loss", "test_accuracy_pct")
            assert [spec.measure for spec in arm_.measures] == [KURTOSIS]


def test_outcomes_of_parts_are_words_of_the_conventions():
    assert deciding(judge(VARIANCE, spreads(0.2, 5.0))[1]) == [SUPPORTS, CONTRADICTS]
