"""The conventions that hold for every rule, as functions that the rules call.

`results/published/claims.yaml` words them at its top; each stands here once. A rule reads a part by its `outcome`, or
by `low` and `high`; where the conventions forbid a conclusion those are NaN, and no comparison with NaN holds. That is
how "inconclusive" comes about by itself.

A diverged run is a finished record without a score. The part it belongs to is shown with the seeds that survived and
with the number that did not, and decides nothing: an average over survivors flatters the arm that diverged, and chance
accuracy in its place would be a number that no run produced.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from samlib import published, stats
from samlib.errors import InputError

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_RUN = OUTCOMES = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "not run",
)
SUPPORTS, CONTRADICTS, INFORMATION = "supports", "contradicts", "for information"  # and INCONCLUSIVE, for a part


@dataclass(frozen=True, slots=True)
class Part:
    """One compared statistic and what it says alone.

    `low` and `high` are NaN where the conventions allow no interval; `published` is the same statistic in the paper,
    None where it prints none.
    """

    name: str
    statistic: str
    estimate: float
    low: float
    high: float
    n: int
    outcome: str
    published: float | None = None


MIN_SEEDS = 3
SPREAD_SEEDS = 10
FINISHED = ("done", "diverged")
ABOVE, BELOW = "above", "below"

Decision = tuple[str, tuple[Part, ...], str]
RULES: dict[str, Callable[[pd.DataFrame, bool], Decision]] = {}


@dataclass(frozen=True, slots=True)
class Evidence:
    """The rows one claim is judged by, the paper's figures, and what a reader of the verdict has to know."""

    rows: pd.DataFrame
    roles: tuple[str, ...]
    published: dict[str, Any]
    miniature: bool
    notes: list[str]
    obstacles: list[str] = field(default_factory=list)  # each alone makes the outcome inconclusive

    @property
    def cells(self) -> list[str]:
        return sorted(self.rows["cell"].unique())


def rule(claim_id: str, roles: tuple[str, ...], matched: str = "") -> Callable:
    """Registers the rule of a claim.

    Args:
        roles: the arms it compares; each has to be there in every cell.
        matched: equal_budget: what the arms have in common, epochs or gradient evaluations. Goes into the reason.
    """

    def register(body: Callable[[Evidence], Decision]) -> Callable[[pd.DataFrame, bool], Decision]:
        def judged(frame: pd.DataFrame, miniature: bool) -> Decision:
            notes = [f"matched: {matched}"] if matched else []
            figures = published.claim(claim_id).published
            evidence = Evidence(checked_rows(frame, roles), roles, figures, miniature, notes)
            absent = unfinished(evidence)
            return (NOT_RUN, (), absent) if absent else body(evidence)

        if claim_id in RULES:
            raise InputError(f"rule = {claim_id!r} is registered twice: keep one")
        RULES[claim_id] = judged
        return judged

    return register


def checked_rows(frame: pd.DataFrame, roles: tuple[str, ...]) -> pd.DataFrame:
    """The rows of these roles, one per cell, role and seed; errors are 100 minus accuracies."""
    rows = frame[frame["role"].isin(roles)]
    repeated = rows[rows.duplicated(["cell", "role", "seed"])]
    if len(repeated):
        cell, role, seed = repeated.iloc[0][["cell", "role", "seed"]]
        raise InputError(f"frame holds cell {cell!r}, role {role!r}, seed {seed} twice: give every run one row")
    if "test_accuracy_pct" in rows:
        rows = rows.assign(test_error_pct=100 - rows["test_accuracy_pct"].astype(float))
    return rows


def unfinished(evidence: Evidence) -> str:
    """not_run: an arm of the comparison has no finished record. Other gaps in an arm are noted."""
    empty = [] if evidence.cells else ["no arm of the comparison is there"]
    for cell in evidence.cells:
        for role in evidence.roles:
            arm = arm_rows(evidence, cell, role)
            open_runs = arm[~arm["status"].isin(FINISHED)]
            counts = ", ".join(
                f"{count} {status}" for status, count in sorted(open_runs["status"].value_counts().items())
            )
            if len(open_runs) == len(arm):
                empty.append(f"{cell}: {role} has no finished record ({counts or 'no arm of this role'})")
            elif counts:
                note(evidence, f"{cell}: of {len(arm)} seeds of {role}, {counts}")
    return "; ".join(empty)


def arm_rows(evidence: Evidence, cell: str, role: str) -> pd.DataFrame:
    rows = evidence.rows
    return rows[(rows["cell"] == cell) & (rows["role"] == role)].sort_values("seed")


def column(evidence: Evidence, cell: str, role: str, metric: str, statuses: tuple[str, ...]) -> dict[int, float]:
    """seed -> value, NaN where a record holds none, over the runs of these statuses."""
    arm = arm_rows(evidence, cell, role)
    arm = arm[arm["status"].isin(statuses)]
    if metric in arm:
        return arm.set_index("seed")[metric].astype(float).to_dict()
    if (arm["status"] == "done").any():
        raise InputError(f"frame has no column {metric!r}: the rule needs it for {role} in {cell}")
    return dict.fromkeys(arm["seed"].tolist(), math.nan)


def scores(evidence: Evidence, cell: str, role: str, metric: str) -> dict[int, float]:
    """seed -> value, over the runs that are done and hold one."""
    values = column(evidence, cell, role, metric, ("done",))
    absent = [seed for seed, value in values.items() if not math.isfinite(value)]
    if absent:
        note(evidence, f"{cell}: {role} has no {metric} for seeds {listed(absent)}")
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def note(evidence: Evidence, text: str) -> None:
    if text not in evidence.notes:
        evidence.notes.append(text)


def listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def difference(
    evidence: Evidence,
    cell: str,
    metric: str,
    a: str,
    b: str,
    *,
    claimed: str = ABOVE,
    name: str = "",
    at_least: int = MIN_SEEDS,
    printed: float | None = None,
) -> Part:
    """Mean of a - b in one cell: paired by seed where the arms were given the same seeds, else Welch."""
    first, second = scores(evidence, cell, a, metric), scores(evidence, cell, b, metric)
    shared = set(arm_rows(evidence, cell, a)["seed"]) & set(arm_rows(evidence, cell, b)["seed"])
    if shared:
        interval, form = stats.paired_difference(first, second), "paired by seed"
    else:
        interval, form = stats.unpaired_difference(list(first.values()), list(second.values())), "unpaired"
    statistic = f"{a} - {b} of {metric}, {form}"
    trusted = can_conclude(evidence, [cell], (a, b), interval.n, statistic, at_least)
    return judged_part(name or cell, statistic, interval, trusted, claimed, printed)


def pooled_difference(
    evidence: Evidence, metric: str, a: str, rivals: Mapping[str, str], *, claimed: str = ABOVE
) -> Part:
    """Mean over cells of a - rival of that cell, averaged within each seed first; seeds that every cell holds.

    Cells count as fixed and seeds as the units, so runs that share a seed may be as alike as they please.
    """
    per_cell = [
        stats.differences(scores(evidence, cell, a, metric), scores(evidence, cell, rival, metric))
        for cell, rival in rivals.items()
    ]
    shared = sorted(set.intersection(*map(set, per_cell)))
    interval = stats.mean([math.fsum(cell[seed] for cell in per_cell) / len(per_cell) for seed in shared])
    statistic = f"{a} - {' or '.join(sorted(set(rivals.values())))} of {metric}, mean over cells, paired by seed"
    trusted = can_conclude(evidence, list(rivals), (a, *sorted(set(rivals.values()))), interval.n, statistic, MIN_SEEDS)
    return judged_part("pooled", statistic, interval, trusted, claimed, None)


def can_conclude(
    evidence: Evidence, cells: Sequence[str], roles: Sequence[str], n: int, statistic: str, at_least: int
) -> bool:
    """inconclusive: fewer seeds than the rule asks for, or a diverged run among them; the reason is noted."""
    diverged = [text for cell in cells for role in roles if (text := diverged_seeds(evidence, cell, role))]
    for text in diverged:
        note(evidence, text)
    if n < at_least:
        note(evidence, f"{', '.join(cells)}: {statistic}: n = {n}, at least {at_least} are needed")
    return n >= at_least and not diverged


def diverged_seeds(evidence: Evidence, cell: str, role: str) -> str:
    arm = arm_rows(evidence, cell, role)
    seeds = arm[arm["status"] == "diverged"]["seed"].tolist()
    return f"{cell}: {role} diverged for {len(seeds)} of {len(arm)} seeds ({listed(seeds)})" if seeds else ""


def judged_part(
    name: str, statistic: str, interval: stats.Interval, trusted: bool, claimed: str, printed: float | None
) -> Part:
    """supports: the interval lies wholly on the claimed side of 0. contradicts: wholly on the other side."""
    low, high = (interval.low, interval.high) if trusted else (math.nan, math.nan)
    outcome = INCONCLUSIVE
    if low > 0 or high < 0:
        outcome = SUPPORTS if (low > 0) == (claimed == ABOVE) else CONTRADICTS
    return Part(name, statistic, interval.estimate, low, high, interval.n, outcome, printed)


def judged_at(threshold: float, part: Part, claimed: str) -> Part:
    """The same part judged against another threshold than 0: 1 for a ratio. It has bounds only where they are trusted,
    so that a part without them stays inconclusive."""
    outcome = INCONCLUSIVE
    if part.low > threshold or part.high < threshold:
        outcome = SUPPORTS if (part.low > threshold) == (claimed == ABOVE) else CONTRADICTS
    return replace(part, outcome=outcome)


def mean_ratio(
    evidence: Evidence,
    cell: str,
    metric: str,
    a: str,
    b: str,
    *,
    claimed: str = ABOVE,
    name: str = "",
    printed: float | None = None,
) -> Part:
    """Geometric mean over seeds of a / b in one cell, paired by seed, judged against 1."""
    first, second = (scores(evidence, cell, role, metric) for role in (a, b))
    unfit = sorted({seed for arm in (first, second) for seed, value in arm.items() if value <= 0})
    if unfit:  # a ratio of such values says nothing: the part is shown without them, and decides nothing
        note(evidence, f"{cell}: {metric} is not above 0 for seeds {listed(unfit)}")
        first, second = ({s: v for s, v in arm.items() if s not in unfit} for arm in (first, second))
    interval = stats.geometric_mean_ratio(first, second)
    statistic = f"{a} / {b} of {metric}, geometric mean, paired by seed"
    trusted = can_conclude(evidence, [cell], (a, b), interval.n, statistic, MIN_SEEDS) and not unfit
    return judged_at(1, judged_part(name or cell, statistic, interval, trusted, claimed, printed), claimed)


def spread_ratio(
    evidence: Evidence,
    cell: str,
    metric: str,
    a: str,
    b: str,
    *,
    claimed: str = BELOW,
    name: str = "",
    printed: float | None = None,
) -> Part:
    """variances: standard deviation over seeds of a divided by that of b, bootstrap over pairs, judged against 1."""
    first, second = (scores(evidence, cell, role, metric) for role in (a, b))
    shared = [seed for seed in first if seed in second]
    interval = stats.sd_ratio([first[seed] for seed in shared], [second[seed] for seed in shared], paired=True)
    statistic = f"sd of {a} / sd of {b} of {metric} over seeds"
    trusted = can_conclude(evidence, [cell], (a, b), interval.n, statistic, SPREAD_SEEDS)
    return judged_at(1, judged_part(name or cell, statistic, interval, trusted, claimed, printed), claimed)


def slope_per_doubling(
    evidence: Evidence, points: Mapping[float, tuple[str, str]], metric: str, *, claimed: str = ABOVE, name: str = ""
) -> Part:
    """Mean over seeds of the slope of a metric per doubling of x. `points`: x -> (cell, role) of the arm there."""
    arms = [scores(evidence, cell, role, metric) for cell, role in points.values()]
    shared = sorted(set.intersection(*map(set, arms)))
    interval = stats.slope_over_log2(list(points), [[arm[seed] for arm in arms] for seed in shared])
    cells, roles = zip(*points.values(), strict=True)
    statistic = f"slope of {metric} per doubling, {', '.join(dict.fromkeys(roles))}"
    trusted = can_conclude(
        evidence, list(dict.fromkeys(cells)), list(dict.fromkeys(roles)), interval.n, statistic, MIN_SEEDS
    )
    return judged_part(name or ", ".join(dict.fromkeys(cells)), statistic, interval, trusted, claimed, None)


def seeds_in_favour(evidence: Evidence, cell: str, metric: str, a: str, b: str) -> Part:
    """Number of seeds with a - b above 0: all of them support a claim about every seed, none of them contradict it."""
    gaps = stats.differences(scores(evidence, cell, a, metric), scores(evidence, cell, b, metric))
    won, n = sum(gap > 0 for gap in gaps.values()), len(gaps)
    decided = {n: SUPPORTS, 0: CONTRADICTS} if n >= MIN_SEEDS else {}
    statistic = f"seeds with {a} above {b} in {metric}"
    return Part(cell, statistic, won, math.nan, math.nan, n, decided.get(won, INCONCLUSIVE))


def identity(
    evidence: Evidence, cell: str, role: str, metric: str, worst: Callable, holds: Callable[[float], bool]
) -> Part:
    """checks: an identity is true or false: true if it holds for every seed, and a value of NaN does not hold."""
    values = list(column(evidence, cell, role, metric, FINISHED).values())
    estimate = math.nan if any(map(math.isnan, values)) else worst(values)
    outcome = SUPPORTS if all(map(holds, values)) else CONTRADICTS
    return Part(cell, f"{metric}, worst seed", estimate, math.nan, math.nan, len(values), outcome)


def farthest_from_one(values: Sequence[float]) -> float:
    return max(values, key=lambda value: abs(value - 1))


def within(evidence: Evidence, part: Part, low: float, high: float) -> bool:
    """The whole interval in [low, high]. miniature: such thresholds hold at the published scale only."""
    return not evidence.miniature and low <= part.low and part.high <= high


def every(parts: Sequence[Part], outcome: str) -> bool:
    """A rule that names one interval, bound to several cells, is met when every cell meets it."""
    return bool(parts) and all(part.outcome == outcome for part in parts)


def some(parts: Sequence[Part], outcome: str) -> bool:
    """What a rule words as 'either' or 'any'."""
    return any(part.outcome == outcome for part in parts)


def for_information(part: Part) -> Part:
    """Shown beside the deciding parts, and decides nothing."""
    return replace(part, outcome=INFORMATION)


def most(parts: Sequence[Part], outcome: str) -> bool:
    """What a rule words as 'a majority': more than half."""
    return 2 * sum(part.outcome == outcome for part in parts) > len(parts)


def printed_gap(evidence: Evidence, cell: str) -> float | None:
    """First minus second of the two figures the paper prints for a cell."""
    pair = evidence.published.get(cell, ())
    figures = tuple(pair.values()) if isinstance(pair, dict) else tuple(pair)
    return round(figures[0] - figures[1], 6) if len(figures) == 2 else None


def decide(evidence: Evidence, parts: Sequence[Part], *, reproduced: bool, not_reproduced: bool) -> Decision:
    """both_sides: inconclusive if both conditions hold. So it is if neither does, or if there is an obstacle."""
    why = list(evidence.obstacles)
    if reproduced and not_reproduced:
        why.append("the conditions for reproduced and for not reproduced both hold")
    elif not reproduced and not not_reproduced:
        why.append("neither the condition for reproduced nor that for not reproduced holds")
    outcome = INCONCLUSIVE if why else REPRODUCED if reproduced else NOT_REPRODUCED
    return outcome, tuple(parts), "; ".join(why + evidence.notes)
