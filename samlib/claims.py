"""What the records say about each claim of the four papers.

    claim -> its rule -> Verdict(outcome, parts, published, rule_digest, miniature, ...)

`results/published/claims.yaml` words the claims, their rules and the conventions that hold for every rule. The
conventions stand below once, as functions that the rules call; a rule is then the wording of its claim, line for line.
A rule is committed before the records it judges: `rule_digest` changes with the rule, with every convention and every
interval it reaches, with its wording and with the cells it is bound to, and a test compares it with the digest at the
commit of each record.
"""

import ast
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from samlib import experiments, published, stats
from samlib.errors import InputError
from samlib.experiments import Arm
from samlib.published import Claim
from samlib.store import Store

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one claim on one profile.

    `miniature` marks a verdict on other data or networks than the published ones, by the sign alone; `varied` one on a
    reader's own variation of the settings; `reason` says what the outcome rests on or what is in its way.
    """

    claim: str
    outcome: str
    parts: tuple[Part, ...]
    published: dict[str, Any]
    rule_digest: str
    miniature: bool
    profile: str
    reason: str
    varied: bool = False


# ---------------------------------------------------------------------------------------------- conventions
# One meaning for every rule. A rule reads a part by its `outcome`, or by `low` and `high`; where the conventions forbid
# a conclusion those are NaN, and no comparison with NaN holds. That is how "inconclusive" comes about by itself.
#
# A diverged run is a finished record without a score. The part it belongs to is shown with the seeds that survived and
# with the number that did not, and decides nothing: an average over survivors flatters the arm that diverged, and
# chance accuracy in its place would be a number that no run produced.

MIN_SEEDS = 3
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


# ---------------------------------------------------------------------------------------------- rules
# Each is the `reproduced_if` and `not_reproduced_if` of its claim. Wording comes first: see claims.yaml.


@rule("foret-eq2-dual-norm", roles=("closed_form",))
def dual_norm(evidence: Evidence) -> Decision:
    parts = []
    for cell in evidence.cells:
        parts += [
            identity(evidence, cell, "closed_form", "relative_gap", max, lambda gap: gap < 1e-5),
            identity(
                evidence, cell, "closed_form", "norm_ratio", farthest_from_one, lambda r: 1 - 1e-5 <= r <= 1 + 1e-5
            ),
        ]
    return decide(evidence, parts, reproduced=every(parts, SUPPORTS), not_reproduced=some(parts, CONTRADICTS))


@rule("behdin-msam-m1-is-sam", roles=("msam",))
def one_shard_is_sam(evidence: Evidence) -> Decision:
    metrics = ("max_relative_difference", "mean_of_ascents_difference")
    parts = [
        identity(evidence, cell, "msam", metric, max, lambda gap: gap < 1e-6)
        for cell in evidence.cells
        for metric in metrics
    ]
    return decide(evidence, parts, reproduced=every(parts, SUPPORTS), not_reproduced=some(parts, CONTRADICTS))


@rule("behdin-lemma34-effective-jacobian", roles=("jacobian",))
def effective_jacobian(evidence: Evidence) -> Decision:
    parts = []
    for cell in evidence.cells:
        parts += [
            identity(evidence, cell, "jacobian", metric, min, lambda eigenvalue: eigenvalue >= -1e-10)
            for metric in ("min_eigenvalue_sam_minus_sgd", "min_eigenvalue_msam_minus_sam")
        ]
        parts.append(identity(evidence, cell, "jacobian", "formula_error", max, lambda error: error < 1e-8))
    return decide(evidence, parts, reproduced=every(parts, SUPPORTS), not_reproduced=some(parts, CONTRADICTS))


TOY_SEEDS = 10
# A run is just stable at an edge_ratio of 1. The tolerance was fixed before any run of the study; on seeds 1000 to
# 1029, which belong to no verdict, the check ends between 0.957 and 1.018.
AT_THE_EDGE = (0.9, 1.1)


@rule("behdin-theorem32-toy", roles=("sgd", "sam", "msam"), matched="batches and the schedule of step sizes")
def edge_of_stability(evidence: Evidence) -> Decision:
    note(evidence, "lambda_max and edge_ratio are means over the second half of each run")
    pairs, edges = [], []
    for cell in evidence.cells:
        pairs += [
            difference(evidence, cell, "lambda_max", a, b, claimed=BELOW, at_least=TOY_SEEDS)
            for a, b in (("sam", "sgd"), ("msam", "sam"))
        ]
        edges += [distance_from_the_edge(evidence, cell, role) for role in evidence.roles]
    return decide(evidence, pairs + edges, reproduced=every(pairs, SUPPORTS), not_reproduced=some(pairs, CONTRADICTS))


def distance_from_the_edge(evidence: Evidence, cell: str, role: str) -> Part:
    """Mean edge_ratio of an arm. The theorem is about the edge of stability: one run elsewhere, and nothing follows."""
    ratios = column(evidence, cell, role, "edge_ratio", ("done",))
    away = [seed for seed, ratio in ratios.items() if not AT_THE_EDGE[0] <= ratio <= AT_THE_EDGE[1]]
    if away:
        evidence.obstacles.append(f"{cell}: {role} is not at the edge of stability for seeds {listed(away)}")
    found = stats.mean(list(scores(evidence, cell, role, "edge_ratio").values()))
    return Part(cell, f"edge_ratio of {role}", found.estimate, found.low, found.high, found.n, INFORMATION)


@rule("coldenhoff-a-sam-beats-sgd-per-seed", roles=("sam", "sgd"), matched="epochs")
def sam_beats_sgd_for_each_seed(evidence: Evidence) -> Decision:
    gains = [difference(evidence, cell, "test_accuracy_pct", "sam", "sgd") for cell in evidence.cells]
    wins = [seeds_in_favour(evidence, cell, "test_accuracy_pct", "sam", "sgd") for cell in evidence.cells]
    return decide(
        evidence,
        [*gains, *wins, *best_epoch(evidence, "sam", "sgd", evidence.published["mean_difference"])],
        reproduced=every(gains + wins, SUPPORTS),
        not_reproduced=all(gain.outcome == CONTRADICTS or within(evidence, gain, -0.5, 0.5) for gain in gains),
    )


@rule("coldenhoff-a-equal-gradient-budget", roles=("sam_half", "sgd"), matched="gradient evaluations")
def sam_wins_with_half_the_epochs(evidence: Evidence) -> Decision:
    gains = [difference(evidence, cell, "test_accuracy_pct", "sam_half", "sgd") for cell in evidence.cells]
    sam, sgd = (evidence.published[key] for key in ("sam_best_at_or_before_epoch_50", "sgd_best_over_100"))
    return decide(
        evidence,
        [*gains, *best_epoch(evidence, "sam_half", "sgd", stats.mean(sam).estimate - stats.mean(sgd).estimate)],
        reproduced=every(gains, SUPPORTS),
        not_reproduced=every(gains, CONTRADICTS),
    )


def best_epoch(evidence: Evidence, a: str, b: str, printed: float) -> list[Part]:
    """coldenhoff2022 prints the best test epoch (E-C1), which chooses the epoch by the test set: for information."""
    metric, name = "test_accuracy_pct@best_test", "best test epoch"
    return [
        for_information(difference(evidence, cell, metric, a, b, name=f"{cell}, {name}", printed=printed))
        for cell in evidence.cells
    ]


@rule(
    "foret-t1-sam-beats-sgd-cifar",
    roles=("sam", "sgd", "sgd_double"),
    matched="epochs (sgd) and gradient evaluations (sgd_double), the better of the two against SAM",
)
def sam_beats_the_better_sgd(evidence: Evidence) -> Decision:
    gaps, rivals = [], {}
    for cell in evidence.cells:
        rivals[cell], gap = harder_rival(evidence, cell, ("sgd", "sgd_double"))
        gaps.append(gap)
    pooled = pooled_difference(evidence, "test_error_pct", "sam", rivals, claimed=BELOW)
    return decide(
        evidence,
        [pooled, *map(for_information, gaps)],
        reproduced=pooled.outcome == SUPPORTS and all(gap.estimate < 0 for gap in gaps),
        not_reproduced=pooled.outcome == CONTRADICTS,
    )


def harder_rival(evidence: Evidence, cell: str, rivals: Sequence[str]) -> tuple[str, Part]:
    """The baseline SAM looks worse against. One that allows no conclusion comes first, as it may be the better one."""
    printed = printed_gap(evidence, cell)
    gaps = {
        rival: difference(evidence, cell, "test_error_pct", "sam", rival, claimed=BELOW, printed=printed)
        for rival in rivals
    }
    return max(gaps.items(), key=lambda item: math.inf if math.isnan(item[1].low) else item[1].estimate)


@rule("foret-long-sgd-does-not-help", roles=("sam", "sgd_double", "sgd"), matched="gradient evaluations")
def longer_sgd_does_not_close_the_gap(evidence: Evidence) -> Decision:
    error, cells = "test_error_pct", evidence.cells
    gaps = [difference(evidence, cell, error, "sam", "sgd_double", claimed=BELOW) for cell in cells]
    help_of_doubling = [
        difference(evidence, cell, error, "sgd_double", "sgd", name=f"{cell}, doubling") for cell in cells
    ]
    return decide(
        evidence,
        [*gaps, *map(for_information, help_of_doubling)],
        reproduced=every(gaps, SUPPORTS),
        not_reproduced=every(gaps, CONTRADICTS),
    )


@rule("foret-svhn", roles=("sam", "sgd"), matched="epochs")
def svhn(evidence: Evidence) -> Decision:
    gaps = {cell: error_gap(evidence, cell) for cell in evidence.cells}
    wide_resnets = [gap for cell, gap in gaps.items() if cell.startswith("wrn")]
    others = [for_information(gap) for cell, gap in gaps.items() if not cell.startswith("wrn")]
    return decide(
        evidence,
        [*wide_resnets, *others],
        reproduced=every(wide_resnets, SUPPORTS),
        not_reproduced=every(wide_resnets, CONTRADICTS),
    )


@rule("foret-fashion-mnist", roles=("sam", "sgd"), matched="epochs")
def fashion_mnist(evidence: Evidence) -> Decision:
    gaps = [error_gap(evidence, cell) for cell in evidence.cells]
    return decide(evidence, gaps, reproduced=every(gaps, SUPPORTS), not_reproduced=every(gaps, CONTRADICTS))


def error_gap(evidence: Evidence, cell: str) -> Part:
    printed = printed_gap(evidence, cell)
    return difference(evidence, cell, "test_error_pct", "sam", "sgd", claimed=BELOW, printed=printed)


# ---------------------------------------------------------------------------------------------- verdicts


def verdicts(profile: str, store: Store) -> list[Verdict]:
    """The verdict on every claim, in the order of `claims.yaml`.

    Raises:
        InputError: unknown profile, a rule without a claim, or an experiment with a claim that has no rule.
    """
    check_rules()
    return [verdict(claim_id, profile, store) for claim_id in published.claims()]


def verdict(claim_id: str, profile: str, store: Store) -> Verdict:
    """The verdict on one claim from the records of a store.

    Raises:
        InputError: unknown claim or profile.
    """
    stem, _ = experiments.decides(claim_id, experiments.check_profile(profile))
    return judge(claim_id, profile, store, experiments.arms(stem, profile) if stem else ())


def judge(claim_id: str, profile: str, store: Store, arms: Sequence[Arm], *, varied: bool = False) -> Verdict:
    """The verdict from these arms of the claim's experiment; `varied` says that a reader changed seeds or fields.

    Raises:
        InputError: unknown claim or profile.
    """
    claim = published.claim(claim_id)
    stem, cells = experiments.decides(claim_id, profile)
    digest = rule_digest(claim_id, profile=profile) if claim_id in RULES else ""
    absent = _nothing_to_judge(claim, profile, stem, cells, arms)
    if absent:
        return Verdict(claim_id, NOT_RUN, (), claim.published, digest, False, profile, absent, varied)
    miniature = not experiments.published_scale(stem, profile)
    frame = store.frame([arm for arm in arms if arm.cell in cells])
    outcome, parts, notes = RULES[claim_id](frame, miniature)
    met = {REPRODUCED: claim.reproduced_if, NOT_REPRODUCED: claim.not_reproduced_if}.get(outcome, "")
    reason = "; ".join(filter(None, (met, notes)))
    marked = miniature and outcome != NOT_RUN
    return Verdict(claim_id, outcome, parts, claim.published, digest, marked, profile, reason, varied)


def check_rules() -> None:
    """Every rule has a claim, and every claim of an experiment that exists has a rule.

    Raises:
        InputError: naming those that do not.
    """
    claims = published.claims()
    orphans = sorted(RULES.keys() - claims.keys())
    if orphans:
        raise InputError(f"rules {orphans} have no claim: add the claim to claims.yaml or take the rule out")
    bare = [name for name, claim in claims.items() if claim.experiment in experiments.STEMS and name not in RULES]
    if bare:
        raise InputError(f"claims {bare} have no rule although their experiment exists: write it in samlib/claims.py")


def _nothing_to_judge(claim: Claim, profile: str, stem: str | None, cells: Sequence[str], arms: Sequence[Arm]) -> str:
    """Why no record can bear on a claim on this profile; empty if one can."""
    if claim.priority == "beyond-one-GPU":
        return "needs many accelerators, or weights and data outside this study"
    if stem is None:
        return f"experiment {claim.experiment} does not exist yet"
    unbound = [cell for cell in cells if cell not in {arm.cell for arm in arms}]
    if unbound:
        return f"{stem} has no arm in the cells {', '.join(unbound)} on the profile {profile}"
    return "" if cells else f"{stem} has no setting for this claim on the profile {profile}"


# ---------------------------------------------------------------------------------------------- for tables


def row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as one row of the scoreboard: plain strings and truth values."""
    claim = published.claim(verdict.claim)
    deciding = [part for part in verdict.parts if part.outcome != INFORMATION]
    return {
        "claim": verdict.claim,
        "paper": claim.paper,
        "where": claim.where,
        "outcome": verdict.outcome,
        "statistic": "; ".join(map(part_text, deciding)),
        "published": published_text(verdict.published),
        "profile": verdict.profile,
        "miniature": verdict.miniature,
        "varied": verdict.varied,
        "reason": verdict.reason,
        "rule": verdict.rule_digest,
    }


def part_text(part: Part) -> str:
    """For example 'clean: sam - sgd of test_accuracy_pct, paired by seed: 1.82 [1.25, 2.39], n = 10'."""
    interval = "" if math.isnan(part.low) else f" [{part.low:.4g}, {part.high:.4g}]"
    return f"{part.name}: {part.statistic}: {part.estimate:.4g}{interval}, n = {part.n}"


def published_text(figures: Any) -> str:
    """The paper's figures on one line: 'sam 71.22, 70.77, 70.98; mean difference 6.54'."""
    if isinstance(figures, dict):
        return "; ".join(f"{str(name).replace('_', ' ')} {_nested_text(value)}" for name, value in figures.items())
    return ", ".join(map(published_text, figures)) if isinstance(figures, list) else str(figures)


def _nested_text(figures: Any) -> str:
    return f"({published_text(figures)})" if isinstance(figures, dict) else published_text(figures)


# ---------------------------------------------------------------------------------------------- digests


@dataclass(frozen=True, slots=True)
class Sources:
    """The texts that hold all that decides a claim, at one revision.

    `rules` is this module, `wording` is `claims.yaml`, `experiment` the module in `samlib/experiments` that the claim
    names there, empty while there is none, `statistics` is `samlib/stats.py`.
    """

    rules: str
    wording: str
    experiment: str
    statistics: str


def sources(claim_id: str) -> Sources:
    """The texts as they are now.

    Raises:
        InputError: unknown claim.
    """
    stem = published.claim(claim_id).experiment
    experiment = _text(f"experiments/{stem}.py") if stem in experiments.STEMS else ""
    return Sources(_text("claims.py"), published.claims_text(), experiment, _text("stats.py"))


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def rule_digest(claim_id: str, at: Sources | None = None, profile: str = "quick") -> str:
    """Sixteen hex digits over all that decides a claim. Comments, docstrings and layout do not count.

    That is: its rule with every definition of this module the rule reaches; the definitions of `stats` those call, and
    what they reach there; the claim's own entry in `DECIDES` for the profile, and `PUBLISHED_SCALE`, with what the two
    reach in the experiment; and the wording of its statistic and conditions. What the cells hold is not part of it: it
    is in the key of each record.

    Args:
        at: the texts of an older revision; by default those of now.
        profile: whose cells count, so that another profile may be bound later.

    Raises:
        InputError: there is no such rule or claim in these texts, or the experiment does not bind it.
    """
    return _digest(claim_id, sources(claim_id) if at is None else at, profile)


@cache
def _digest(claim_id: str, at: Sources, profile: str) -> str:
    rules, wording = _definitions(at.rules), _wording(at.wording)
    body = next((node for node in rules.values() if _decides(node, claim_id)), None)
    if body is None or claim_id not in wording:
        raise InputError(f"claim = {claim_id!r} has no rule, or no entry in claims.yaml, at this revision")
    reached = _reached(_names(body), rules)
    called = _attributes_of("stats", [body, *(rules[name] for name in reached)])
    statistics = _definitions(at.statistics)
    lines = [claim_id, "rule", _normal_form(body), *_code(reached, rules)]
    lines += ["stats", *_code(_reached(called, statistics), statistics)]
    lines += ["experiment", *_binding(claim_id, at.experiment, profile), "wording", *wording[claim_id]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _binding(claim_id: str, experiment: str, profile: str) -> list[str]:
    """The cells bound to a claim on a profile, and the profiles of published scale, as its experiment declares them."""
    if not experiment:
        return []
    declared = _definitions(experiment)
    profiles = _entry(getattr(declared.get("DECIDES"), "value", None), claim_id)
    if profiles is None or "PUBLISHED_SCALE" not in declared:
        raise InputError(
            f"claim = {claim_id!r} has no entry in DECIDES, or its experiment no PUBLISHED_SCALE, at this revision: "
            "write the two at the top level, DECIDES as one dict literal"
        )
    cells = _entry(profiles, profile)
    reached = _reached((_names(cells) if cells else set()) | {"PUBLISHED_SCALE"}, declared)
    return [_normal_form(cells) if cells else "no cells", *_code(reached, declared)]


def _entry(literal: ast.expr | None, key: str) -> ast.expr | None:
    """The value of one key in a dict literal."""
    if not isinstance(literal, ast.Dict):
        return None
    entries = zip(literal.keys, literal.values, strict=True)
    return {name.value: value for name, value in entries if isinstance(name, ast.Constant)}.get(key)


def _code(names: Iterable[str], definitions: Mapping[str, ast.stmt]) -> list[str]:
    return [f"{name}={_normal_form(definitions[name])}" for name in sorted(names)]


@cache
def _wording(claims_text: str) -> dict[str, tuple[str, ...]]:
    """The experiment each claim names, and the sentences its rule puts into code."""
    claims = published.parse_claims(claims_text)
    return {
        name: (
            claim.experiment,
            claim.statistic,
            claim.reproduced_if,
            claim.not_reproduced_if,
            claim.inconclusive_if,
        )
        for name, claim in claims.items()
    }


@cache
def _definitions(source: str) -> dict[str, ast.stmt]:
    """What a module defines at its top level, by name."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= dict.fromkeys(_assigned(node), node)
    return found


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names on the left; a loop variable of a comprehension on the right is not one."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _decides(node: ast.stmt, claim_id: str) -> bool:
    """Whether a definition is decorated with `@rule(claim_id, ...)`."""
    calls = [call for call in getattr(node, "decorator_list", []) if isinstance(call, ast.Call) and call.args]
    return any(
        isinstance(call.func, ast.Name)
        and call.func.id == "rule"
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == claim_id
        for call in calls
    )


def _reached(names: Iterable[str], definitions: Mapping[str, ast.stmt]) -> set[str]:
    """Those of the names that are defined, and the names of the definitions that those use in turn."""
    reached: set[str] = set()
    waiting = set(names)
    while waiting:
        new = (waiting & definitions.keys()) - reached
        reached |= new
        waiting = {used for name in new for used in _names(definitions[name])}
    return reached


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _attributes_of(module: str, trees: Iterable[ast.AST]) -> set[str]:
    """X for every `module.X` in the trees."""
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


def _normal_form(node: Any) -> str:
    """A syntax tree as text, the same on every Python: what a version adds empty, and docstrings, are left out."""
    if isinstance(node, list):
        return f"[{','.join(_normal_form(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    return f"{type(node).__name__}({','.join(_normal_fields(node))})"


def _normal_fields(node: ast.AST) -> Iterator[str]:
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty pieces into some f-strings
            value = [piece for piece in value if not (isinstance(piece, ast.Constant) and piece.value == "")]
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment"):
            yield f"{name}={_normal_form(value)}"


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
