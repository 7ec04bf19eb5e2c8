"""Each rule of 05 at every edge of its outcome, on made-up frames; the columns it reads; the choice of mu."""

import dataclasses
import math

import pandas as pd
import pytest

import samlib.rules.asymmetry as rules
from samlib import data, experiments, published, train
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import asymmetry, optimizer_table, tuning
from samlib.measures import WeightLoss, asymmetry_factors
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

FULL, MINIATURE = False, True
CORRELATION, MOST_ASYMMETRIC = "boca-asymmetry-correlation", "boca-128sam-most-asymmetric"
FLAT, GROUPS = "boca-avg-sam-flat-test-loss", "boca-fig6-two-groups-by-batch"
CLAIMS = (CORRELATION, MOST_ASYMMETRIC, FLAT, GROUPS)
ROLES = (*rules.SMALL, *rules.LARGE)
CELL = "table"
MAIN, NORMAL, TEST, NORMAL_TEST = (
    asymmetry.factor(law, split).column for split in asymmetry.SPLITS for law in asymmetry.LAWS
)
MATCHED = asymmetry.MATCHED.column
SEEDS = range(4)


def row(role, seed, status="done", **values):
    return {"cell": CELL, "role": role, "seed": seed, "status": status, **values}


def values_of(**settings):
    """Every column that a rule reads, with values that decide nothing where none are given."""
    found = {"test_loss": 0.5}
    for column in (MAIN, NORMAL, TEST, NORMAL_TEST, MATCHED):
        found |= {column: 0.1, f"{column}:no_minimum": 0.25, f"{column}:weight_norm": 10.0}
        found |= {f"{column}:rise_plus": 1.0, f"{column}:rise_minus": 1.0}
    return found | settings


def frame(value_of, seeds=SEEDS):
    """`value_of(role, seed)` gives the columns that matter."""
    return [row(role, seed, **values_of(**value_of(role, seed))) for role in ROLES for seed in seeds]


def judge(claim, rows, miniature=FULL):
    return RULES[claim](pd.DataFrame(rows), miniature)


def outcome(claim, rows, miniature=FULL):
    return judge(claim, rows, miniature)[0]


def part_named(parts, name):
    (found,) = [part for part in parts if part.name == name]
    return found


# ---------------------------------------------------------------------------------------------- correlation

RISING = [0.01 * place for place in range(12)]
# made uncorrelated by hand, and the same with a slope of its own
HALF = [place % 2 for place in range(12)]


def correlated(losses, factors=RISING, seeds=SEEDS):
    def value_of(role, seed):
        place = ROLES.index(role)
        return {MAIN: factors[place] + 0.001 * (seed % 2), "test_loss": losses[place] + 0.01 * seed}

    return frame(value_of, seeds)


UP = [0.3 + 2 * x + 0.002 * (place % 3) for place, x in enumerate(RISING)]
DOWN = [-x for x in UP]
OPEN = [0.3, 0.9, 0.1, 0.4, 0.8, 0.2, 0.9, 0.3, 0.8, 0.9, 0.1, 0.9]


@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
@pytest.mark.parametrize(("losses", "expected"), [(UP, REPRODUCED), (DOWN, NOT_REPRODUCED), (OPEN, INCONCLUSIVE)])
def test_the_interval_of_the_correlation_decides(losses, expected, miniature):
    found, (deciding, *beside), _ = judge(CORRELATION, correlated(losses), miniature)
    assert found == expected
    assert {part.outcome for part in beside} == {INFORMATION}
    assert deciding.n == 12  # settings


def test_a_small_correlation_contradicts_at_the_published_scale_only(monkeypatch):
    """r has no unit, but it depends on how far apart the settings lie, which a miniature does not share."""
    for r, low, high, full in (
        (0.1, -0.3, 0.39, NOT_REPRODUCED),
        (0.1, -0.41, 0.3, INCONCLUSIVE),
        (0.1, -0.3, 0.41, INCONCLUSIVE),
        (0.2, -0.1, 0.39, INCONCLUSIVE),
        (-0.2, -0.39, 0.1, INCONCLUSIVE),
        (-0.19, -0.39, 0.1, NOT_REPRODUCED),
    ):
        interval = rules.stats.Interval(r, low, high, 12, 0.95, "made up")
        monkeypatch.setattr(rules.stats, "correlation", lambda *_, interval=interval, **__: interval)
        rows = correlated(OPEN, seeds=range(3))
        assert outcome(CORRELATION, rows, FULL) == full
        assert outcome(CORRELATION, rows, MINIATURE) == INCONCLUSIVE


def test_the_means_of_the_settings_are_the_units():
    """Within each setting the models correlate the other way: only the r over models sees that."""

    def value_of(role, seed):
        place = ROLES.index(role)
        return {MAIN: RISING[place] + 0.2 * seed, "test_loss": UP[place] - 2 * seed}

    found, parts, _ = judge(CORRELATION, frame(value_of))
    assert found == REPRODUCED
    over_models = [part for part in parts if part.name == f"{CELL}, models"]
    assert [part.estimate < 0 for part in over_models] == [True, True]
    assert all(math.isnan(part.low) for part in over_models)
    assert part_named(parts, f"{CELL}, seed by seed").estimate > 0.99
    assert part_named(parts, f"{CELL}, seed by seed").n == len(SEEDS)


def test_a_seed_that_one_setting_lacks_is_left_out_of_all():
    """A seed draws the images: kept in the others, it would make a difference between settings."""
    rows = correlated(UP)
    lost = [{**r, "status": "failed"} if (r["role"], r["seed"]) == ("sgd_large", 3) else r for r in rows]
    assert (
        judge(CORRELATION, lost)[1][0].estimate
        == judge(CORRELATION, [r for r in rows if r["seed"] != 3])[1][0].estimate
    )
    assert "of 4 seeds of sgd_large, 1 failed" in judge(CORRELATION, lost)[2]


def test_fewer_than_twenty_models_or_three_seeds_decide_nothing():
    found, parts, reason = judge(CORRELATION, correlated(UP, seeds=range(1)))
    assert found == INCONCLUSIVE
    assert math.isnan(parts[0].low)
    assert "models: n = 12, at least 20 are needed" in reason
    found, _, reason = judge(CORRELATION, correlated(UP, seeds=range(2)))
    assert found == INCONCLUSIVE
    assert "12 settings over 2 seeds: models" not in reason
    assert "seeds: n = 2, at least 3 are needed" in reason
    assert outcome(CORRELATION, correlated(UP, seeds=range(3))) == REPRODUCED


def test_other_directions_and_the_test_loss_decide_nothing():
    def value_of(role, seed):
        place = ROLES.index(role)
        against = dict.fromkeys((NORMAL, TEST, NORMAL_TEST), -RISING[place])
        return {MAIN: RISING[place], "test_loss": UP[place], **against}

    found, parts, _ = judge(CORRELATION, frame(value_of))
    assert found == REPRODUCED
    for name in ("normal directions", "on the test loss", "normal directions, on the test loss"):
        part = part_named(parts, f"{CELL}, {name}")
        assert (part.outcome, part.estimate < -0.9) == (INFORMATION, True)


def test_each_batch_size_alone_is_shown():
    """Two clusters may correlate one way, and the settings within each the other way (E-B11)."""

    def value_of(role, seed):
        place = ROLES.index(role)
        return {MAIN: (place >= 6) + 0.01 * place, "test_loss": (place >= 6) - 0.01 * place}

    found, parts, _ = judge(CORRELATION, frame(value_of))
    assert found == REPRODUCED
    for name in ("small batch alone", "large batch alone"):
        part = part_named(parts, f"{CELL}, {name}")
        assert (part.outcome, part.n, part.estimate) == (INFORMATION, 6, pytest.approx(-1))


def test_the_share_of_directions_along_no_minimum_is_said():
    assert "25 % of the directions are along no minimum" in judge(CORRELATION, correlated(UP))[2]
    assert "25 % of the directions are along no minimum" in judge(MOST_ASYMMETRIC, correlated(UP))[2]


def test_settings_that_are_all_alike_have_no_correlation():
    found, parts, _ = judge(CORRELATION, frame(lambda role, seed: {}))
    assert found == INCONCLUSIVE
    assert math.isnan(parts[0].estimate)


# ---------------------------------------------------------------------------------------------- most asymmetric

RIVALS = {
    "sgd": ("sgd",),
    "average_sam": rules.AVERAGE_SAM,
    "sam_large": rules.SAM_LARGE,
    "average_sam_large": rules.AVERAGE_SAM_LARGE,
}
CLEAR = (0.1, 0.11, 0.12, 0.1)
FAR = tuple(5 * gap for gap in CLEAR)  # beyond the spread of the settings within a group
UNCLEAR = (0.3, -0.1, 0.2, -0.2)


def factors(gaps, seeds=SEEDS):
    """Each group this far above small-batch SAM, seed by seed; within a group the settings lie around that."""
    group_of = {role: group for group, roles in RIVALS.items() for role in roles}

    def value_of(role, seed):
        spread = 0.05 * (len(role) % 3)
        return {MAIN: 0.5 + spread + (gaps[group_of[role]][seed] if role in group_of else 0)}

    return frame(value_of, seeds)


@pytest.mark.parametrize("miniature", [FULL, MINIATURE])
@pytest.mark.parametrize("group", RIVALS)
def test_small_batch_sam_is_to_be_below_every_group(group, miniature):
    below = dict.fromkeys(RIVALS, FAR)
    assert outcome(MOST_ASYMMETRIC, factors(below), miniature) == REPRODUCED
    assert outcome(MOST_ASYMMETRIC, factors(below | {group: UNCLEAR}), miniature) == INCONCLUSIVE
    above = below | {group: [-gap for gap in FAR]}
    found, parts, _ = judge(MOST_ASYMMETRIC, factors(above), miniature)
    assert found == NOT_REPRODUCED
    assert part_named(parts, f"{CELL}, {group}").outcome == CONTRADICTS


def test_a_group_is_the_mean_over_its_settings():
    def value_of(role, seed):
        return {MAIN: {"sam rho=0.05": 0.1, "sam rho=0.1": 0.2, "sam rho=0.2": 0.6, "sgd": 0.35}.get(role, 0.5) + seed}

    parts = judge(MOST_ASYMMETRIC, frame(value_of))[1]
    assert part_named(parts, f"{CELL}, sgd").estimate == pytest.approx(0.3 - 0.35)
    assert part_named(parts, f"{CELL}, sgd_large").outcome == INFORMATION
    assert part_named(parts, f"{CELL}, sgd, normal directions").estimate == pytest.approx(0)


def test_the_published_differences_are_those_of_table_1():
    parts = judge(MOST_ASYMMETRIC, factors(dict.fromkeys(RIVALS, CLEAR)))[1]
    printed = {part.name: part.published for part in parts if part.published is not None}
    table = published.results().query("paper == 'boca2023' and table == 'T1' and metric == 'asymmetry_factor'")
    means = table.groupby(["method", "batch_size"])["value"].mean()
    sam = means["SAM", 128]
    names = {"sgd": ("SGD", 128), "average_sam": ("average SAM", 128), "sam_large": ("SAM", 5000)}
    for group, where in (names | {"average_sam_large": ("average SAM", 5000)}).items():
        assert printed.pop(f"{CELL}, {group}") == pytest.approx(sam - means[where], abs=1e-6)
    assert not printed


# ---------------------------------------------------------------------------------------------- flat test loss

AVERAGE = (*rules.AVERAGE_SAM, *rules.AVERAGE_SAM_LARGE)


def ranges(loss_range, factor_range, wiggle=0.0, seeds=SEEDS):
    """The last of the average-SAM settings is that far above the first; the others lie between."""

    def value_of(role, seed):
        if role not in AVERAGE:
            return {}
        share = AVERAGE.index(role) / 3
        luck = wiggle * (-1) ** seed if share == 1 else 0
        return {"test_loss": 0.2 + loss_range * share + luck, MAIN: 0.1 + factor_range * share + luck}

    return frame(value_of, seeds)


@pytest.mark.parametrize(
    ("loss_range", "factor_range", "wiggle", "expected"),
    [
        (0.0105, 0.229, 0, REPRODUCED),  # the published ranges
        (0.0149, 0.101, 0, REPRODUCED),
        (0.0151, 0.229, 0, INCONCLUSIVE),
        (0.0105, 0.099, 0, INCONCLUSIVE),
        (0.0299, 0.229, 0, INCONCLUSIVE),
        (0.0301, 0.229, 0, NOT_REPRODUCED),
        (0.0301, 0.05, 0, NOT_REPRODUCED),  # whatever the factor does
        (0.0105, 0.229, 0.01, INCONCLUSIVE),  # an interval across the threshold
        (0.04, 0.229, 0.02, INCONCLUSIVE),
    ],
)
def test_ranges_against_their_thresholds(loss_range, factor_range, wiggle, expected):
    rows = ranges(loss_range, factor_range, wiggle)
    assert outcome(FLAT, rows) == expected
    found, parts, reason = judge(FLAT, rows, MINIATURE)
    assert found == INCONCLUSIVE
    assert "a range has no sign" in reason
    assert {part.outcome for part in parts} == {INFORMATION}


def test_parts_of_the_ranges():
    loss, factor = judge(FLAT, ranges(0.0105, 0.229))[1]
    assert (loss.estimate, loss.published) == (pytest.approx(0.0105), 0.0105)
    assert (factor.estimate, factor.published) == (pytest.approx(0.229), 0.229)
    assert (loss.outcome, factor.outcome) == (SUPPORTS, SUPPORTS)
    assert loss.statistic.endswith("average_sam_large rho=1 - average_sam rho=0.5")


# ---------------------------------------------------------------------------------------------- two groups


def rises(small, large, column=MAIN, seeds=SEEDS, other=None):
    """Rises (plus, minus) of the two groups; one setting of each is at the edge, the others well inside."""

    def value_of(role, seed):
        group, inside = (large, 1.5) if role in rules.LARGE else (small, 0.5)
        factor = 1 if role in ("sam rho=0.1", "sgd_large") else inside
        luck = 1 + 0.01 * seed
        plus, minus = (factor * luck * value for value in group)
        return {f"{column}:rise_plus": plus, f"{column}:rise_minus": minus} | (other or {})

    return frame(value_of, seeds)


@pytest.mark.parametrize(
    ("small", "large", "full", "miniature"),
    [
        ((0.178, 0.178), (6.93, 6.93), REPRODUCED, REPRODUCED),  # the artefact
        ((1.0, 1.0), (5.1, 5.1), REPRODUCED, REPRODUCED),
        ((1.0, 1.0), (4.9, 5.1), INCONCLUSIVE, REPRODUCED),
        ((1.0, 1.0), (5.1, 4.9), INCONCLUSIVE, REPRODUCED),
        ((1.0, 1.0), (1.1, 1.1), INCONCLUSIVE, REPRODUCED),
        ((1.0, 1.0), (0.9, 0.9), NOT_REPRODUCED, NOT_REPRODUCED),
        ((1.0, 1.0), (0.9, 9.0), INCONCLUSIVE, INCONCLUSIVE),  # apart on one side only
        ((1.0, 1.0), (-0.1, -0.1), NOT_REPRODUCED, NOT_REPRODUCED),  # the loss falls: no ratio, and yet a sign
        ((-1.0, -1.0), (0.1, 0.1), REPRODUCED, REPRODUCED),
        ((0.0, 0.0), (0.1, 0.1), REPRODUCED, REPRODUCED),
    ],
)
def test_the_extremes_of_the_groups_decide(small, large, full, miniature):
    rows = rises(small, large)
    assert (outcome(GROUPS, rows, FULL), outcome(GROUPS, rows, MINIATURE)) == (full, miniature)


def test_one_setting_among_the_others_brings_the_groups_together():
    for role in ("sgd", "average_sam rho=1", "sam_large rho=0.1", "average_sam_large rho=1"):
        value = 0.5 if role in rules.LARGE else 2.0
        rows = rises((1.0, 1.0), (1.2, 1.2))
        rows = [r | {f"{MAIN}:rise_plus": value, f"{MAIN}:rise_minus": value} if r["role"] == role else r for r in rows]
        assert outcome(GROUPS, rows, MINIATURE) == NOT_REPRODUCED


def test_groups_that_an_interval_does_not_part_are_open():
    rows = rises((1.0, 1.0), (1.2, 1.2))
    rows = [r | {f"{MAIN}:rise_plus": r["seed"] % 2 * 3.0} if r["role"] == "sgd" else r for r in rows]
    assert outcome(GROUPS, rows, MINIATURE) == INCONCLUSIVE


def test_other_directions_and_the_ratio_are_shown_and_decide_nothing():
    other = {f"{column}:{rise}": -5.0 for column in (NORMAL, MATCHED) for rise in ("rise_plus", "rise_minus")}
    found, parts, reason = judge(GROUPS, rises((0.2, 0.4), (8.0, 4.0), other=other))
    assert found == REPRODUCED
    assert [part.outcome for part in parts[:4]] == [SUPPORTS] * 4
    assert {part.outcome for part in parts[4:]} == {INFORMATION}
    assert {part.name for part in parts} >= {f"{CELL}, plus, normal directions", f"{CELL}, minus, filter-normalised"}
    ratios = [part for part in parts if "/ max" in part.statistic]
    assert [part.estimate for part in ratios] == pytest.approx([40, 10])
    assert {part.published for part in ratios} == {39}
    assert "fewer updates" in reason


def test_a_ratio_that_does_not_exist_is_shown_as_none():
    parts = judge(GROUPS, rises((1.0, 1.0), (-1.0, 2.0)))[1]
    plus, minus = [part for part in parts if "/ max" in part.statistic]
    assert (plus.n, math.isnan(plus.estimate)) == (0, True)
    assert minus.estimate == pytest.approx(2)


# ---------------------------------------------------------------------------------------------- every rule


def good(claim, seeds=SEEDS):
    """Rows on which a claim is reproduced."""
    return {
        CORRELATION: lambda: correlated(UP, seeds=seeds),
        MOST_ASYMMETRIC: lambda: factors(dict.fromkeys(RIVALS, FAR), seeds),
        FLAT: lambda: ranges(0.0105, 0.229, seeds=seeds),
        GROUPS: lambda: rises((1.0, 1.0), (8.0, 8.0), seeds=seeds),
    }[claim]()


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_setting_without_a_finished_record_is_not_run(claim):
    rows = good(claim)
    assert outcome(claim, rows) == REPRODUCED
    lost = [{**r, "status": "missing"} if r["role"] == "average_sam_large rho=1" else r for r in rows]
    assert judge(claim, lost)[::2] == (NOT_RUN, f"{CELL}: average_sam_large rho=1 has no finished record (4 missing)")
    assert outcome(claim, [r for r in rows if r["role"] != "average_sam_large rho=1"]) == NOT_RUN


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("role", ["average_sam rho=1", "average_sam_large rho=1"])
def test_a_diverged_run_leaves_no_conclusion(claim, role):
    rows = [row(role, 3, "diverged") if (r["role"], r["seed"]) == (role, 3) else r for r in good(claim)]
    found, parts, reason = judge(claim, rows)
    assert found == INCONCLUSIVE
    assert f"{CELL}: {role} diverged for 1 of 4 seeds (3)" in reason
    assert any(math.isnan(part.low) and part.outcome == INCONCLUSIVE for part in parts)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_setting_that_diverged_throughout_decides_nothing(claim):
    rows = [row(r["role"], r["seed"], "diverged") if r["role"] == "average_sam rho=1" else r for r in good(claim)]
    assert outcome(claim, rows) == INCONCLUSIVE


@pytest.mark.parametrize("claim", CLAIMS)
def test_two_seeds_are_too_few(claim):
    found, _, reason = judge(claim, good(claim, range(2)))
    assert found == INCONCLUSIVE
    assert "n = 2, at least 3 are needed" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_model_without_a_measure_is_left_out_and_said(claim):
    rows = good(claim)
    absent = {name: math.nan for name in rows[0] if name.startswith("asymmetry_factor")}
    rows = [r | absent if (r["role"], r["seed"]) == ("average_sam rho=1", 3) else r for r in rows]
    found, _, reason = judge(claim, rows)
    assert found == REPRODUCED
    assert "average_sam rho=1 has no asymmetry_factor" in reason


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_frame_without_the_measure_is_refused(claim):
    bare = [{name: value for name, value in r.items() if "asymmetry" not in name} for r in good(claim)]
    with pytest.raises(InputError, match="no column 'asymmetry_factor"):
        judge(claim, bare)


def test_the_columns_a_rule_reads_do_not_depend_on_mu_or_the_number_of_directions():
    rows = [
        {name.replace(f"mu={asymmetry.MU}", "mu=5.0").replace("@directions=8", ""): v for name, v in r.items()}
        for r in good(GROUPS)
    ]
    assert any(name.startswith("asymmetry_factor@mu=5.0:") for name in rows[0])
    assert outcome(GROUPS, rows) == REPRODUCED


# ---------------------------------------------------------------------------------------------- the experiment


def test_twelve_settings_of_which_eleven_are_those_of_the_table():
    arms = {arm.role: arm for arm in asymmetry.arms("quick")}
    assert tuple(arms) == tuple(asymmetry.SPECS)
    assert set(arms) == set(ROLES)
    for role in optimizer_table.ROLES:
        assert [specs_of.key(s) for s in arms[role].specs] == [
            specs_of.key(s) for s in optimizer_table.table_arm(role).specs
        ]
    small, large = (specs_of.flat(arms[f"sam{word} rho=0.2"].base) for word in ("", "_large"))
    assert {name for name in small if small[name] != large[name]} == {"train.batch_size"}


def test_a_factor_of_each_law_on_each_loss_set_and_matched_slices():
    columns = [measure.column for measure in asymmetry.MEASURES]
    assert len(set(columns)) == 5
    assert {MAIN, NORMAL, TEST, NORMAL_TEST, MATCHED} == set(columns)
    assert all(measure.mode == "eval" for measure in asymmetry.MEASURES)  # E-B9


def test_mu_is_the_smallest_that_lifts_three_in_four_above_a_guess():
    low, high = 2.0, 3.0
    assert asymmetry.choose_mu({1.0: [high, low, low, low], 2.0: [high, high, high, low], 4.0: [high] * 4}) == 2.0
    assert asymmetry.choose_mu({4.0: [high] * 4, 1.0: [asymmetry.GUESS] * 4}) == 4.0


def test_mu_follows_its_rule_on_models_of_the_dev_seeds(tmp_path):
    store, losses, lengths = Store(tmp_path, writable=True), {mu: [] for mu in asymmetry.MU_GRID}, []
    for role in ("sgd", "sgd_large"):
        for seed in tuning.DEV_SEEDS:
            spec = dataclasses.replace(asymmetry.SPECS[role], seed=seed)
            splits = data.load(spec.data, seed)
            model = train.trained_model(spec, store, splits, train.choose_device("cpu"))
            loss = WeightLoss(model, splits.train.inputs, splits.train.labels)
            for found in asymmetry_factors(loss, asymmetry.MU_GRID, directions=1):
                losses[found["mu"]].append(loss.value() + found["rise_plus"])
            lengths.append(sum(w.square().sum().item() for w in loss.weights()) ** 0.5)
    assert asymmetry.choose_mu(losses) == asymmetry.MU
    assert min(asymmetry.MU_GRID) < asymmetry.MU < max(asymmetry.MU_GRID)
    shares = [asymmetry.MU / length for length in lengths]
    assert pytest.approx(sum(shares) / len(shares), abs=0.05) == asymmetry.FILTER_MU


def test_the_experiment_is_declared():
    assert set(asymmetry.DECIDES) == set(CLAIMS)
    assert {arm.cell for arm in asymmetry.arms("quick")} == {CELL}
    assert asymmetry.arms("gpu") == ()
    assert len(experiments.specs(asymmetry.arms("quick"))) == 12 * 10 * (1 + len(asymmetry.MEASURES))
