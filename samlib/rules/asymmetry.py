"""Rules of 05 asymmetry: the asymmetry factor of boca2023, and the loss along a random direction.

A role without a word on the batch has the small one (published: 128), `large` the near-full one (published: 5000).
The published directions, uniform on [0, 1], on the training loss decide; normal directions and the test loss stand
beside them, for information.

A miniature judges the sign alone, and here that says: of a correlation, whether it is positive or negative. That it is
small (|r| < 0.2) counts at the published scale only: r has no unit, but it depends on how far apart the settings lie.
Of two groups, whether they lie apart at all, not five times. A range has no sign, so that its claim stays open.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from samlib import stats
from samlib.rules.conventions import (
    ABOVE,
    BELOW,
    CONTRADICTS,
    INCONCLUSIVE,
    INFORMATION,
    MIN_SEEDS,
    SUPPORTS,
    Decision,
    Evidence,
    Part,
    can_conclude,
    decide,
    every,
    for_information,
    judged_part,
    mean_ratio,
    note,
    rule,
    scores,
    some,
    within,
)

SAM = ("sam rho=0.05", "sam rho=0.1", "sam rho=0.2")
AVERAGE_SAM = ("average_sam rho=0.5", "average_sam rho=1")
SAM_LARGE = ("sam_large rho=0.05", "sam_large rho=0.1", "sam_large rho=0.2")
AVERAGE_SAM_LARGE = ("average_sam_large rho=0.5", "average_sam_large rho=1")
SMALL = ("sgd", *SAM, *AVERAGE_SAM)
LARGE = ("sgd_large", *SAM_LARGE, *AVERAGE_SAM_LARGE)
MIN_MODELS = 20
TWO_SIDES = {"plus": "rise_plus", "minus": "rise_minus"}
NORMAL = {"direction_law": "gaussian"}
MATCHED = {"direction_scale": "filter"}


@rule("boca-asymmetry-correlation", roles=(*SMALL, *LARGE), matched="epochs")
def asymmetric_minima_generalise_better(evidence: Evidence) -> Decision:
    deciding, beside = [], []
    for cell in evidence.cells:
        published = metric(evidence)
        deciding.append(over_settings(evidence, cell, published, "pearson"))
        beside.append(over_settings(evidence, cell, published, "spearman"))
        for name, how in (
            ("normal directions", NORMAL),
            ("on the test loss", {"split": "test"}),
            ("normal directions, on the test loss", NORMAL | {"split": "test"}),
        ):
            beside.append(over_settings(evidence, cell, metric(evidence, **how), "pearson", f"{cell}, {name}"))
        for name, roles in (("small batch alone", SMALL), ("large batch alone", LARGE)):
            beside.append(over_settings(evidence, cell, published, "pearson", f"{cell}, {name}", roles))
        beside += [over_models(evidence, cell, published, kind) for kind in ("pearson", "spearman")]
        beside.append(within_seeds(evidence, cell, published))
        share_without_minimum(evidence, cell)
    return decide(
        evidence,
        [*deciding, *map(for_information, beside)],
        reproduced=every(deciding, SUPPORTS),
        not_reproduced=all(part.outcome == CONTRADICTS or uncorrelated(evidence, part) for part in deciding),
    )


@rule("boca-128sam-most-asymmetric", roles=(*SMALL, *LARGE), matched="epochs")
def small_batch_sam_is_most_asymmetric(evidence: Evidence) -> Decision:
    rivals = {
        "sgd": ("sgd",),
        "average_sam": AVERAGE_SAM,
        "sam_large": SAM_LARGE,
        "average_sam_large": AVERAGE_SAM_LARGE,
    }
    parts, beside = [], []
    for cell in evidence.cells:
        for group, roles in rivals.items():
            parts.append(lower_factor(evidence, cell, group, roles, {}))
            beside.append(lower_factor(evidence, cell, group, roles, NORMAL))
        beside.append(lower_factor(evidence, cell, "sgd_large", ("sgd_large",), {}))  # the group the paper lacks
        share_without_minimum(evidence, cell)
    return decide(
        evidence,
        [*parts, *map(for_information, beside)],
        reproduced=every(parts, SUPPORTS),
        not_reproduced=some(parts, CONTRADICTS),
    )


@rule("boca-avg-sam-flat-test-loss", roles=(*AVERAGE_SAM, *AVERAGE_SAM_LARGE), matched="epochs")
def test_loss_is_constant_where_the_factor_is_not(evidence: Evidence) -> Decision:
    if evidence.miniature:
        note(evidence, "a range has no sign, and thresholds in loss and in the factor do not bind in a miniature")
    losses, factors = [], []
    for cell in evidence.cells:
        losses.append(range_of_means(evidence, cell, "test_loss", evidence.published["test_loss_range"]))
        factors.append(range_of_means(evidence, cell, metric(evidence), evidence.published["factor_range"]))
    if evidence.miniature:
        losses, factors = ([for_information(part) for part in parts] for parts in (losses, factors))
    else:
        losses = [weighed(part, supports=part.high < 0.015, contradicts=part.low > 0.03) for part in losses]
        factors = [weighed(part, supports=part.low > 0.1, contradicts=False) for part in factors]
    return decide(
        evidence,
        [*losses, *factors],
        reproduced=every(losses + factors, SUPPORTS),
        not_reproduced=every(losses, CONTRADICTS),
    )


@rule("boca-fig6-two-groups-by-batch", roles=(*SMALL, *LARGE), matched="epochs")
def large_batch_models_are_sharper(evidence: Evidence) -> Decision:
    note(evidence, "confound: the large batch makes fewer updates, and the length of its weights differs (E-B11)")
    apart, together, beside = [], [], []
    for cell in evidence.cells:
        times = 1 if evidence.miniature else 5
        apart += [gap_of_groups(evidence, cell, side, times, {}) for side in TWO_SIDES]
        together += [gap_of_groups(evidence, cell, side, 1, {}) for side in TWO_SIDES]
        beside += [gap_of_groups(evidence, cell, side, 1, how) for how in (NORMAL, MATCHED) for side in TWO_SIDES]
        beside += [ratio_of_groups(evidence, cell, side) for side in TWO_SIDES]
        beside.append(mean_ratio(evidence, cell, metric(evidence, "weight_norm"), "sgd_large", "sgd"))
    shown = apart if evidence.miniature else [*apart, *together]
    return decide(
        evidence,
        [*shown, *map(for_information, beside)],
        reproduced=every(apart, SUPPORTS),
        not_reproduced=every(together, CONTRADICTS),
    )


# ---------------------------------------------------------------------------------------------- which column


def metric(evidence: Evidence, companion: str = "", **how: str) -> str:
    """The column of the factor, or of a value beside it, by how it was taken and at whatever mu and directions."""
    end = f":{companion}" if companion else ""
    for name in evidence.rows.columns:
        settings, _, found = name.partition(":")
        head, *fields = settings.split("@")
        taken = dict(field.split("=") for field in fields) if head == "asymmetry_factor" else {"": ""}
        if found == companion and {key: taken[key] for key in taken.keys() - {"mu", "directions"}} == how:
            return name
    return f"asymmetry_factor{end}"  # which `scores` then misses by name


def words(how: dict[str, str]) -> str:
    return {"": "", "gaussian": ", normal directions", "filter": ", filter-normalised"}["".join(how.values())]


# ---------------------------------------------------------------------------------------------- correlation


def per_setting(
    evidence: Evidence, cell: str, factor: str, roles: Sequence[str] = (*SMALL, *LARGE)
) -> tuple[list[list[float]], list[list[float]]]:
    """Factors and test losses, one row per setting, over the seeds that all settings have both of.

    A seed draws the training images, so that settings with other seeds would differ by more than the setting.
    """
    arms = [(scores(evidence, cell, role, factor), scores(evidence, cell, role, "test_loss")) for role in roles]
    shared = sorted(set.intersection(*(set(values) for arm in arms for values in arm)))
    factors = [[arm[0][seed] for seed in shared] for arm in arms]
    return factors, [[arm[1][seed] for seed in shared] for arm in arms]


def over_settings(
    evidence: Evidence, cell: str, factor: str, kind: str, name: str = "", roles: Sequence[str] = (*SMALL, *LARGE)
) -> Part:
    """Correlation of the means of the settings, with a bootstrap that draws whole settings: they are the units."""
    factors, losses = per_setting(evidence, cell, factor, roles)
    seeds = len(factors[0])
    means = [[stats.mean(row).estimate for row in rows] if seeds else [] for rows in (factors, losses)]
    interval = stats.correlation(*means, kind=kind)
    statistic = f"{kind} r of {factor} and test_loss, means of {len(roles)} settings over {seeds} seeds"
    trusted = can_conclude(evidence, [cell], roles, len(roles) * seeds, f"{statistic}: models", MIN_MODELS)
    trusted = can_conclude(evidence, [cell], roles, seeds, f"{statistic}: seeds", MIN_SEEDS) and trusted
    printed = evidence.published["r_all"] if kind == "pearson" and not name else None
    return judged_part(name or cell, statistic, interval, trusted, ABOVE, printed)


def over_models(evidence: Evidence, cell: str, factor: str, kind: str) -> Part:
    """The same over single models, as the paper has it; without an interval, as models of a setting are no units."""
    factors, losses = ([value for row in rows for value in row] for rows in per_setting(evidence, cell, factor))
    statistic = f"{kind} r of {factor} and test_loss over models"
    printed = evidence.published["r_all"] if kind == "pearson" else None
    r = coefficient(factors, losses, kind)
    return Part(f"{cell}, models", statistic, r, math.nan, math.nan, len(factors), INFORMATION, printed)


def within_seeds(evidence: Evidence, cell: str, factor: str) -> Part:
    """The r that each seed alone would have printed, and its mean: what other seeds would say."""
    factors, losses = per_setting(evidence, cell, factor)
    seeds = zip(zip(*factors, strict=True), zip(*losses, strict=True), strict=True)
    found = [coefficient(*pair, "pearson") for pair in seeds]
    interval = stats.mean([r for r in found if math.isfinite(r)])
    statistic = f"pearson r of {factor} and test_loss over the settings of one seed, mean over seeds"
    return judged_part(f"{cell}, seed by seed", statistic, interval, interval.n >= MIN_SEEDS, ABOVE, None)


def coefficient(x: Sequence[float], y: Sequence[float], kind: str) -> float:
    """r alone; NaN where either does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    if kind == "spearman":
        x, y = (pd.Series(values).rank().tolist() for values in (x, y))
    return statistics.correlation(x, y)


def uncorrelated(evidence: Evidence, part: Part) -> bool:
    return abs(part.estimate) < 0.2 and within(evidence, part, -0.4, 0.4)


def share_without_minimum(evidence: Evidence, cell: str) -> None:
    """E-B8: says of how many directions the factor is not of a minimum; none is left out or clipped."""
    column = metric(evidence, "no_minimum")
    shares = [share for role in (*SMALL, *LARGE) for share in scores(evidence, cell, role, column).values()]
    note(evidence, f"{cell}: {100 * stats.mean(shares).estimate:.3g} % of the directions are along no minimum")


# ---------------------------------------------------------------------------------------------- groups


def mean_of(evidence: Evidence, cell: str, roles: Sequence[str], column: str) -> dict[int, float]:
    """seed -> mean over the settings of a group."""
    return by_seed(evidence, cell, roles, column, lambda values: stats.mean(values).estimate)


def by_seed(
    evidence: Evidence, cell: str, roles: Sequence[str], column: str, of: Callable[[list[float]], float]
) -> dict[int, float]:
    """seed -> a function of the values of several settings, over the seeds that all of them have."""
    arms = [scores(evidence, cell, role, column) for role in roles]
    shared = sorted(set.intersection(*map(set, arms)))
    return {seed: of([arm[seed] for arm in arms]) for seed in shared}


def lower_factor(evidence: Evidence, cell: str, group: str, roles: Sequence[str], how: dict[str, str]) -> Part:
    """Small-batch SAM minus another group, each a mean over its settings, paired by seed."""
    column = metric(evidence, **how)
    sam, rival = mean_of(evidence, cell, SAM, column), mean_of(evidence, cell, roles, column)
    interval = stats.paired_difference(sam, rival)
    statistic = f"sam - {group} of {column}, means over rho, paired by seed"
    trusted = can_conclude(evidence, [cell], (*SAM, *roles), interval.n, statistic, MIN_SEEDS)
    printed = None if how else printed_gap_of_factors(evidence, group)
    return judged_part(f"{cell}, {group}{words(how)}", statistic, interval, trusted, BELOW, printed)


def printed_gap_of_factors(evidence: Evidence, group: str) -> float | None:
    names = {"sgd": "sgd128", "average_sam": "avg128", "sam_large": "sam5000", "average_sam_large": "avg5000"}
    if group not in names:
        return None
    figures = [evidence.published[name] for name in ("sam128", names[group])]
    sam, rival = (stats.mean(figure if isinstance(figure, list) else [figure]).estimate for figure in figures)
    return round(sam - rival, 6)


def range_of_means(evidence: Evidence, cell: str, column: str, printed: float) -> Part:
    """Largest less smallest mean over seeds of the average-SAM settings, with the paired interval of those two.

    The interval does not know that the pair was picked by its means, and is a little narrow for that.
    """
    roles = (*AVERAGE_SAM, *AVERAGE_SAM_LARGE)
    arms = {role: scores(evidence, cell, role, column) for role in roles}
    shared = sorted(set.intersection(*map(set, arms.values())))
    ranked = sorted(roles, key=lambda role: stats.mean([arms[role][seed] for seed in shared]).estimate)
    low, high = ({seed: arms[role][seed] for seed in shared} for role in (ranked[0], ranked[-1]))
    interval = stats.paired_difference(high, low)
    statistic = f"range of {column} over the average-SAM settings, means over seeds: {ranked[-1]} - {ranked[0]}"
    trusted = can_conclude(evidence, [cell], roles, interval.n, statistic, MIN_SEEDS)
    return judged_part(f"{cell}, {column.partition('@')[0]}", statistic, interval, trusted, ABOVE, printed)


def weighed(part: Part, *, supports: bool, contradicts: bool) -> Part:
    return replace(part, outcome=SUPPORTS if supports else CONTRADICTS if contradicts else INCONCLUSIVE)


# ---------------------------------------------------------------------------------------------- along a direction


def gap_of_groups(evidence: Evidence, cell: str, side: str, times: int, how: dict[str, str]) -> Part:
    """Least rise of the large-batch settings less so many times the greatest of the small-batch ones, within a seed.

    Above 0 where the ratio of the two is above `times`. A rise may be negative, so that the ratio may not exist.
    """
    least, greatest = extremes(evidence, cell, side, how)
    interval = stats.paired_difference(least, {seed: times * value for seed, value in greatest.items()})
    word = "" if times == 1 else f"{times} x "
    statistic = f"min of large batch - {word}max of small batch of {TWO_SIDES[side]}, within a seed"
    trusted = can_conclude(evidence, [cell], (*SMALL, *LARGE), interval.n, statistic, MIN_SEEDS)
    return judged_part(f"{cell}, {side}{words(how)}", statistic, interval, trusted, ABOVE, None)


def ratio_of_groups(evidence: Evidence, cell: str, side: str) -> Part:
    """The ratio itself, over the seeds in which both rises are positive."""
    least, greatest = extremes(evidence, cell, side, {})
    least, greatest = ({s: value for s, value in rises.items() if value > 0} for rises in (least, greatest))
    interval = stats.geometric_mean_ratio(least, greatest)
    statistic = f"min of large batch / max of small batch of {TWO_SIDES[side]}, geometric mean over seeds"
    printed = evidence.published["ratio"]
    return judged_part(f"{cell}, {side}", statistic, interval, interval.n >= MIN_SEEDS, ABOVE, printed)


def extremes(
    evidence: Evidence, cell: str, side: str, how: dict[str, str]
) -> tuple[dict[int, float], dict[int, float]]:
    """seed -> least rise among large-batch settings, and seed -> greatest among small-batch ones."""
    column = metric(evidence, TWO_SIDES[side], **how)
    return by_seed(evidence, cell, LARGE, column, min), by_seed(evidence, cell, SMALL, column, max)
