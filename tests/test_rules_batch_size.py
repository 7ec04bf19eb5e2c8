"""The rules of 02 at every edge of their outcomes, on made-up frames, and what its arms are."""

import math

import numpy as np
import pandas as pd
import pytest

from samlib import spec as specs_of
from samlib import stats
from samlib.errors import InputError
from samlib.experiments import batch_size
from samlib.rules import batch_size as rules_of_02
from samlib.rules.conventions import (
    INCONCLUSIVE,
    INFORMATION,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    RULES,
    SUPPORTS,
)

FULL, MINIATURE = False, True
FALLS = "coldenhoff-b-small-batch-better"
GAIN = "coldenhoff-b-sam-gain-5-to-10"
SPREAD = "coldenhoff-b-sam-lower-variance"
MITIGATES = "coldenhoff-b-sam-mitigates-large-batch"
LOW_LOSS = "coldenhoff-b-low-train-loss-not-better"
CURVES = "coldenhoff-b-loss-curve-variance"
CLAIMS = (FALLS, GAIN, SPREAD, MITIGATES, LOW_LOSS, CURVES)
SIZES = (16, 64, 128)
EPOCHS = 8

MADE_UP = np.random.default_rng(4).normal(size=(2, 3, 12, EPOCHS))  # method, batch size, seed, epoch


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """No outcome here is near its threshold."""
    monkeypatch.setattr(stats, "RESAMPLES", 999)


def runs(sgd=(80.0,) * 3, sam=(80.0,) * 3, *, seeds=10, spread=((1, 1, 1), (1, 1, 1)), loss=((1, 1, 1), (1, 1, 1))):
    """Rows of both methods at three batch sizes: mean accuracies, their spreads, and factors of the training loss.

    `spread` and `loss` are (sgd, sam), one value per batch size. The log10 of the loss spreads as the accuracy does.
    """
    rows = []
    for method, (role, levels) in enumerate((("sgd", sgd), ("sam", sam))):
        for place, size in enumerate(SIZES):
            luck = spread[method][place] * MADE_UP[method, place, :seeds]
            for seed, logs in enumerate(luck):
                curve = loss[method][place] * 10 ** (0.1 * logs - 1)
                rows.append(
                    {"cell": f"batch={size}", "role": role, "seed": seed, "status": "done"}
                    | {"train.batch_size": size, "train.epochs": 2 * EPOCHS, "running_loss": curve[-1]}
                    | {"test_accuracy_pct": levels[place] + 0.5 * logs[0]}
                    | {f"running_loss@epoch={2 * at + 2}": value for at, value in enumerate(curve)}
                )
    return rows


FALLING, RISING, FLAT = (84.0, 80.0, 76.0), (76.0, 80.0, 84.0), (80.0, 80.0, 80.0)
# rows in which each claim holds, and in which it is contradicted, in a miniature
HOLDS = {
    FALLS: runs(FALLING, FALLING),
    GAIN: runs(sam=(86.0,) * 3),
    SPREAD: runs(spread=((1, 1, 1), (1, 0.1, 0.1))),
    MITIGATES: runs(FALLING, FLAT),
    LOW_LOSS: runs(sam=(86.0,) * 3, loss=((1, 1, 1), (4, 4, 4))),
    CURVES: runs(spread=((1, 1, 1), (0.1, 0.1, 0.1))),
}
FAILS = {
    FALLS: runs(RISING, RISING),
    GAIN: runs(sam=(74.0,) * 3),
    SPREAD: runs(spread=((1, 0.1, 0.1), (1, 1, 1))),
    MITIGATES: runs(FLAT, FALLING),
    LOW_LOSS: runs(sam=(86.0,) * 3, loss=((4, 4, 4), (1, 1, 1))),
    CURVES: runs(spread=((0.1, 0.1, 0.1), (1, 1, 1))),
}


def judge(claim, rows, miniature=MINIATURE):
    return RULES[claim](pd.DataFrame(rows), miniature)


def outcome(claim, rows, miniature=MINIATURE):
    return judge(claim, rows, miniature)[0]


def without(rows, role, size=64, seeds=range(12)):
    return [r for r in rows if not (r["role"] == role and r["train.batch_size"] == size and r["seed"] in seeds)]


def changed(rows, role, size, seed, **values):
    return [r | values if (r["role"], r["train.batch_size"], r["seed"]) == (role, size, seed) else r for r in rows]


# ---------------------------------------------------------------------------------------------- every claim


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
def test_each_side_is_reached(claim, miniature):
    assert outcome(claim, HOLDS[claim], miniature) == REPRODUCED
    assert outcome(claim, FAILS[claim], miniature) == NOT_REPRODUCED
    assert outcome(claim, runs(), miniature) == (NOT_REPRODUCED if (claim, miniature) == (GAIN, FULL) else INCONCLUSIVE)


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("role", ["sgd", "sam"])
def test_an_arm_without_a_finished_record_is_not_run(claim, role):
    missing = [r | {"status": "missing"} if r["role"] == role else r for r in HOLDS[claim]]
    found, parts, reason = judge(claim, missing)
    assert (found, parts) == (NOT_RUN, ())
    assert f"batch=64: {role} has no finished record (10 missing)" in reason
    assert outcome(claim, without(HOLDS[claim], role)) == NOT_RUN
    assert outcome(claim, [{"cell": "batch=16", "role": "other", "seed": 0, "status": "done"}]) == NOT_RUN


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("role", ["sgd", "sam"])
@pytest.mark.parametrize("size", SIZES)
def test_a_diverged_run_decides_nothing_where_it_is_needed(claim, role, size):
    """Two of three batch sizes are a majority, and the smallest or the middle one is not always needed."""
    rows = changed(HOLDS[claim], role, size, 3, status="diverged")
    needed = {SPREAD: (64, 128), MITIGATES: (16, 128), LOW_LOSS: (), CURVES: ()}.get(claim, SIZES)
    found, _, reason = judge(claim, rows)
    assert found == (INCONCLUSIVE if size in needed else REPRODUCED)
    if size in needed:
        assert f"batch={size}: {role} diverged for 1 of 10 seeds (3)" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_runs_that_all_diverged_need_no_columns(claim):
    names = ("cell", "role", "seed", "train.batch_size", "train.epochs")
    rows = [{name: r[name] for name in names} | {"status": "diverged"} for r in runs()]
    assert outcome(claim, rows) == INCONCLUSIVE


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_number_of_seeds_that_is_needed(claim):
    enough = 10 if claim in (SPREAD, CURVES) else 3
    assert outcome(claim, [r for r in HOLDS[claim] if r["seed"] < enough]) == REPRODUCED
    found, _, reason = judge(claim, [r for r in HOLDS[claim] if r["seed"] < enough - 1])
    assert found == INCONCLUSIVE
    assert f"n = {enough - 1}, at least {enough} are needed" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_order_of_rows_is_nothing(claim):
    rows = HOLDS[claim]
    assert repr(judge(claim, rows[::-1])) == repr(judge(claim, rows))


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_matched_is_said(claim):
    rows = HOLDS[claim]
    longer = [r | {"train.epochs": 8} if r["train.batch_size"] == 16 else r for r in rows]
    if claim in (FALLS, MITIGATES):
        assert "matched over the batch sizes: learning rate and epochs, not updates" in judge(claim, rows)[2]
        assert "matched over the batch sizes: learning rate, not epochs" in judge(claim, longer)[2]
    else:
        assert "matched: epochs, at each batch size" in judge(claim, rows)[2]


@pytest.mark.parametrize("claim", CLAIMS)
def test_batch_sizes_have_to_differ(claim):
    with pytest.raises(InputError, match="each with another batch size"):
        judge(claim, [r | {"train.batch_size": 16} for r in runs()])
    with pytest.raises(InputError, match="batch_size = batch=16: 16: use at least two cells"):
        judge(claim, [r for r in runs() if r["train.batch_size"] == 16])


# ---------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize(
    ("sgd", "sam", "expected"),
    [
        (FALLING, FLAT, INCONCLUSIVE),  # both optimisers are needed
        (FLAT, FALLING, INCONCLUSIVE),
        (RISING, FALLING, NOT_REPRODUCED),  # either is enough
        (FALLING, RISING, NOT_REPRODUCED),
        ((84.0, 76.0, 78.0), FALLING, REPRODUCED),  # the slope counts, not each step
    ],
)
def test_the_slopes_of_both_optimisers(sgd, sam, expected):
    found, parts, _ = judge(FALLS, runs(sgd, sam))
    assert found == expected
    assert [part.outcome for part in parts[2:]] == [INFORMATION] * 4


def test_slope_and_steps_are_those_of_the_accuracies():
    rows = runs(FALLING, RISING)
    slope, _, step, *_ = judge(FALLS, rows)[1]
    sgd = pd.DataFrame(rows).query("role == 'sgd'").pivot(index="seed", columns="train.batch_size")["test_accuracy_pct"]
    fits = [np.polyfit(np.log2(SIZES), sgd.loc[seed], 1)[0] for seed in sgd.index]
    assert slope.estimate == pytest.approx(np.mean(fits))
    assert (slope.outcome, slope.n) == (SUPPORTS, 10)
    assert step.estimate == pytest.approx((sgd[64] - sgd[16]).mean())
    assert (step.name, step.statistic) == ("sgd", "batch=64 - batch=16 of test_accuracy_pct, paired by seed")


EXACT = ((0, 0, 0), (0, 0, 0))  # no luck at all: each interval is a point


@pytest.mark.parametrize(
    ("gains", "full", "miniature"),
    [
        ((4.0, 8.0, 11.0), REPRODUCED, REPRODUCED),
        ((3.875, 8.0, 11.0), INCONCLUSIVE, REPRODUCED),  # neither in the range nor outside the wider one
        ((4.0, 8.0, 11.125), INCONCLUSIVE, REPRODUCED),
        ((3.0, 8.0, 12.0), INCONCLUSIVE, REPRODUCED),
        ((2.875, 8.0, 8.0), NOT_REPRODUCED, REPRODUCED),  # one batch size is enough
        ((8.0, 12.125, 8.0), NOT_REPRODUCED, REPRODUCED),
        ((8.0, 8.0, 0.0), NOT_REPRODUCED, INCONCLUSIVE),
        ((8.0, 8.0, -0.125), NOT_REPRODUCED, NOT_REPRODUCED),
    ],
)
def test_the_gain_at_every_batch_size(gains, full, miniature):
    rows = runs(sam=[80 + gain for gain in gains], spread=EXACT)
    assert (outcome(GAIN, rows, FULL), outcome(GAIN, rows, MINIATURE)) == (full, miniature)


def test_a_mean_in_range_with_an_interval_that_holds_zero_is_open():
    rows = runs(sam=(86.0,) * 3, spread=((1, 1, 40), (1, 1, 40)), seeds=4)
    parts = judge(GAIN, rows, FULL)[1]
    assert parts[2].low < 0 < parts[2].high
    assert outcome(GAIN, rows, FULL) == outcome(GAIN, rows, MINIATURE) == INCONCLUSIVE


def test_the_paper_prints_the_largest_batch_alone():
    assert [part.published for part in judge(GAIN, HOLDS[GAIN])[1]] == [None, None, 6.54]
    spreads = [part for part in judge(SPREAD, HOLDS[SPREAD])[1] if part.statistic.startswith("sd of sam")]
    assert {part.name: part.published for part in spreads} == {
        "batch=16": None,
        "batch=64": None,
        "batch=128": pytest.approx(0.225 / 0.610, abs=1e-4),
    }


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        (((0.1, 1, 1), (1, 0.1, 0.1)), REPRODUCED),  # the smallest batch decides nothing
        (((1, 1, 1), (1, 1, 0.1)), INCONCLUSIVE),  # both are needed
        (((1, 1, 0.1), (1, 0.1, 1)), NOT_REPRODUCED),  # either is enough
        (((1, 0, 1), (1, 0, 0.1)), INCONCLUSIVE),  # no spread, no ratio
    ],
)
def test_the_spread_at_the_two_larger_batches(spread, expected):
    assert outcome(SPREAD, runs(spread=spread)) == expected


def test_spreads_come_with_the_test_that_they_are_equal():
    rows = HOLDS[SPREAD]
    parts = judge(SPREAD, rows)[1]
    assert [part.outcome for part in parts] == [SUPPORTS] * 2 + [INFORMATION] * 4
    table = pd.DataFrame(rows).query("`train.batch_size` == 128")
    sam, sgd = (table.loc[table["role"] == role, "test_accuracy_pct"].tolist() for role in ("sam", "sgd"))
    assert parts[-1].estimate == pytest.approx(stats.brown_forsythe(sam, sgd))
    assert parts[1].estimate == pytest.approx(np.std(sam) / np.std(sgd))
    assert parts[-1].n == 10


def test_two_seeds_have_no_test_of_equal_spread():
    parts = judge(SPREAD, [r for r in HOLDS[SPREAD] if r["seed"] < 3])[1]
    assert 0 < parts[-1].estimate < 1
    ties = runs(seeds=2, spread=((1, 1, 0), (1, 1, 1)))  # sd_ratio itself warns of two seeds that differ
    assert math.isnan(
        judge(SPREAD, [r for r in ties if r["train.batch_size"] == 128 or r["seed"] == 0])[1][-1].estimate
    )


def test_the_difference_of_the_drops():
    rows = runs((84.0, 0.0, 78.0), (85.0, 0.0, 83.0), spread=EXACT)
    found, parts, _ = judge(MITIGATES, rows)
    assert found == REPRODUCED
    assert [part.estimate for part in parts] == [4.0, 6.0, 2.0]
    assert [part.outcome for part in parts] == [SUPPORTS, INFORMATION, INFORMATION]
    assert parts[0].statistic == "drop of sgd - drop of sam in test_accuracy_pct, paired by seed"
    assert parts[0].name == "batch=16 to batch=128"


LOW, HIGH = ((1, 1, 1), (4, 4, 4)), ((4, 4, 4), (1, 1, 1))  # the training loss of SGD


@pytest.mark.parametrize(
    ("sam", "loss", "expected"),
    [
        ((86.0, 86.0, 74.0), LOW, REPRODUCED),  # two of three are a majority
        ((86.0, 80.0, 80.0), LOW, INCONCLUSIVE),
        ((86.0, 86.0, 80.0), ((4, 1, 1), (1, 4, 4)), INCONCLUSIVE),  # both at once in one size of three
        ((74.0, 74.0, 80.0), LOW, NOT_REPRODUCED),
        ((74.0, 80.0, 80.0), LOW, INCONCLUSIVE),
        ((86.0, 86.0, 86.0), ((4, 4, 1), (1, 1, 4)), NOT_REPRODUCED),
        ((86.0, 86.0, 86.0), ((4, 1, 1), (1, 1, 1)), INCONCLUSIVE),
    ],
)
def test_loss_and_accuracy_together(sam, loss, expected):
    assert outcome(LOW_LOSS, runs(sam=sam, loss=loss)) == expected


def test_the_loss_is_the_running_one_as_a_ratio():
    parts = judge(LOW_LOSS, runs(sam=(86.0,) * 3, loss=LOW, spread=EXACT))[1]
    assert [part.estimate for part in parts] == pytest.approx([0.25] * 3 + [-6.0] * 3)
    assert parts[0].statistic == "sgd / sam of running_loss, geometric mean, paired by seed"


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        (((1, 1, 0.1), (0.1, 0.1, 1)), REPRODUCED),
        (((1, 1, 1), (0.1, 1, 1)), INCONCLUSIVE),
        (((0.1, 0.1, 1), (1, 1, 0.1)), NOT_REPRODUCED),
        (((0, 0, 1), (0.1, 0.1, 1)), INCONCLUSIVE),
    ],
)
def test_the_spread_of_curves_at_a_majority_of_sizes(spread, expected):
    assert outcome(CURVES, runs(spread=spread)) == expected


def test_the_last_half_of_the_curve_counts():
    rows = runs()
    part = judge(CURVES, rows)[1][0]
    names = [f"running_loss@epoch={epoch}" for epoch in (10, 12, 14, 16)]
    table = pd.DataFrame(rows).query("`train.batch_size` == 16")
    sam, sgd = (np.log10(table.loc[table["role"] == role, names]) for role in ("sam", "sgd"))
    assert part.estimate == pytest.approx(sam.std(ddof=1).mean() / sgd.std(ddof=1).mean())
    early = [r | {"running_loss@epoch=8": 10.0 ** r["seed"]} for r in rows]
    assert judge(CURVES, early)[1][0] == part
    late = [r | {"running_loss@epoch=10": 10.0 ** r["seed"]} if r["role"] == "sam" else r for r in rows]
    assert judge(CURVES, late)[1][0].estimate > 2 * part.estimate


def test_epochs_that_only_another_cell_has_are_not_those_of_this_one():
    rows = [r | {"running_loss@epoch=40": 5.0} if r["train.batch_size"] == 128 else r for r in HOLDS[CURVES]]
    assert judge(CURVES, rows)[1][0] == judge(CURVES, HOLDS[CURVES])[1][0]


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_loss_without_a_logarithm_is_said_and_decides_nothing(value):
    rows = changed(HOLDS[CURVES], "sam", 64, 3, **{"running_loss@epoch=12": value})
    found, parts, reason = judge(CURVES, rows)
    assert (found, parts[1].n) == (INCONCLUSIVE, 9)
    assert "batch=64: sam has no running_loss above 0 at every epoch for seeds 3" in reason


def test_a_frame_without_curves_is_refused():
    rows = [{name: value for name, value in r.items() if "@" not in name} for r in runs()]
    with pytest.raises(InputError, match=r"no column 'running_loss@epoch=...': put running_loss among the curves of s"):
        judge(CURVES, rows)


# ---------------------------------------------------------------------------------------------- the arms


def arms(cells):
    return [arm for arm in batch_size.arms("quick") if arm.cell in cells]


@pytest.mark.parametrize("cells", ["EQUAL_EPOCHS", "EQUAL_UPDATES", "SMALL_LR_CELLS", "NOISY_EPOCHS", "NOISY_UPDATES"])
def test_a_cell_is_a_batch_size_and_nothing_else_differs(cells):
    sizes = getattr(batch_size, cells)
    flats = [specs_of.flat(arm.specs[0]) | {"cell": arm.cell} for arm in arms(sizes)]
    assert {(flat["cell"], flat["train.batch_size"]) for flat in flats} == set(sizes.items())
    apart = {name for flat in flats for name in flat if flat[name] != flats[0][name]}
    told = {"cell", "train.epochs", "train.eval_every"}
    assert apart - told - {"optim.rho"} == {"train.batch_size", "optim.method"}  # SGD has no radius


def updates_of(arm):
    spec = arm.specs[0]
    return spec.train.epochs * (spec.data.train_size // spec.train.batch_size)


def test_epochs_or_updates_are_equal():
    assert {arm.specs[0].train.epochs for arm in arms(batch_size.EQUAL_EPOCHS)} == {100}
    assert {arm.specs[0].train.epochs for arm in arms(batch_size.NOISY_EPOCHS)} == {40}
    assert {updates_of(arm) for arm in arms(batch_size.EQUAL_UPDATES)} == {1000}
    assert {updates_of(arm) for arm in arms(batch_size.NOISY_UPDATES)} == {148, 160}  # 4 epochs of 37 updates


def test_the_claims_are_decided_on_clean_images_with_ten_seeds_and_a_dense_curve():
    for claim in CLAIMS:
        assert batch_size.DECIDES[claim]["quick"] == tuple(batch_size.EQUAL_EPOCHS)
    for arm in arms(batch_size.EQUAL_EPOCHS):
        assert (len(arm.seeds), arm.base.data.label_noise) == (10, 0.0)
        assert arm.base.train.epochs // arm.base.train.eval_every == 50
        assert arm.curves == (rules_of_02.LOSS,)


@pytest.mark.parametrize("profile", ["gpu", "paper"])
def test_on_cifar_the_same_claims_are_decided_at_the_sizes_of_the_paper(profile):
    for claim in CLAIMS:
        assert batch_size.DECIDES[claim][profile] == ("batch=16", "batch=64", "batch=128")
    deciding = [arm for arm in batch_size.arms(profile) if arm.cell in batch_size.CIFAR_SIZES]
    assert {(arm.base.train.batch_size, arm.role) for arm in deciding} == {
        (size, role) for size in (16, 64, 128) for role in ("sgd", "sam")
    }
    assert all(arm.curves == (rules_of_02.LOSS,) and arm.base.train.eval_every == 1 for arm in deciding)
