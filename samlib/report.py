"""What the pages of the book print: verdicts as sentences, means and contrasts as tables, figures of the papers.

Every number keeps four significant digits, so that a change of one per cent in a statistic shows, and what comes back
is a string or a frame of strings, the same on every machine for the same records.
"""

import math
import statistics
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from samlib import experiments, plots, published, stats
from samlib.claims import Verdict, applied, part_text
from samlib.experiments import tuning
from samlib.experiments.tuning import Choice
from samlib.rules.conventions import FINISHED, INFORMATION, NOT_RUN, Part
from samlib.rules.precision import LEAST_COSINE, RHO, SAM, SGD
from samlib.stats import Interval
from samlib.study import Study, spec_fields

NOT_MEASURED = "Not measured on this profile."
PAGE_WIDTH = 84  # characters of a line of code or of printed text on a page of the book

# ---------------------------------------------------------------------------------------------- verdicts


def verdicts_text(verdicts: Iterable[Verdict]) -> str:
    """A Markdown list: for each claim its outcome, its sentence, and the statistics that decided."""
    return "\n".join(verdict_text(verdict) for verdict in verdicts)


def judged_text(study: Study, claims: Iterable[str]) -> str:
    """What the verdicts of a page rest on, then the verdicts."""
    claims = list(claims)
    return f"{ground_text(study, claims)}\n\n{verdicts_text(map(study.verdict, claims))}"


def decided_text(study: Study, claims: Iterable[str]) -> str:
    """The verdicts on those claims that have been decided."""
    decided = [verdict for verdict in map(study.verdict, claims) if verdict.outcome != NOT_RUN]
    return verdicts_text(decided) or f"None of these claims has been decided on the profile {study.profile} yet."


def verdict_text(verdict: Verdict) -> str:
    claim = published.claim(verdict.claim)
    marks = [
        mark for mark, holds in (("miniature", verdict.miniature), ("a reader's variation", verdict.varied)) if holds
    ]
    outcome = f"**{verdict.outcome}**" + (f" ({', '.join(marks)})" if marks else "")
    lines = [f"- {outcome}: {claim.statement} *({claim.paper}, {claim.where}; `{verdict.claim}`)*"]
    lines += [f"    - {part_line(part)}" for part in verdict.parts]
    return "\n".join([*lines, f"    - {verdict.reason}"])


def part_line(part: Part) -> str:
    """One compared statistic with its interval and n, and what the paper prints for it."""
    printed = "" if part.published is None else f"; the paper: {part.published:.4g}"
    return f"{part_text(part)}{printed}" + (" *(for information)*" if part.outcome == INFORMATION else "")


def reasons_text(verdicts: Iterable[Verdict]) -> str:
    """A Markdown list: each reason once, with the claims that share it."""
    claims_by_reason: dict[str, list[str]] = {}
    for verdict in verdicts:
        claims_by_reason.setdefault(verdict.reason, []).append(f"`{verdict.claim}`")
    return "\n".join(f"- **{reason}**: {', '.join(claims)}" for reason, claims in claims_by_reason.items())


def rules_text(claims: Iterable[str], frame: pd.DataFrame, study: Study | None = None) -> str:
    """A Markdown list: what the rules of these claims make of cells that are bound to none. It is for information, and
    no verdict.

    Args:
        study: of which thresholds hold here where they hold for the claim itself; without one the sign alone is judged.
    """
    if frame.empty:
        return "This profile has no such cells."
    lines = []
    for claim in claims:
        miniature = study is None or not experiments.published_scale(study.stem, study.profile, claim)
        outcome, parts, reason = applied(claim, frame, miniature)
        lines += [f"- the rule of `{claim}` would say: {outcome}", *(f"    - {part_text(part)}" for part in parts)]
        lines.append(f"    - {reason}")
    return "\n".join(lines)


def caption(what: str, frame: pd.DataFrame, metric: str, interval: str = plots.MEAN_INTERVAL) -> str:
    """The caption of a figure in Markdown, with n from the frame it shows."""
    if frame.empty:
        return f"*{what}: this profile has no such arms.*"
    return f"*{plots.caption(what, plots.seeds(frame, metric), interval)}*"


# ---------------------------------------------------------------------------------------------- one profile and another


def ground_text(study: Study, claims: Iterable[str]) -> str:
    """One sentence in Markdown: on what the verdicts on these claims rest on the profile of the study, from the specs,
    how many of these runs are finished, and whether thresholds in points, loss or ratios bind."""
    bound = {claim: cells for claim in claims if (cells := experiments.decides(claim, study.profile)[1])}
    cells = [cell for cell in study.cells if any(cell in decisive for decisive in bound.values())]
    if not cells:
        return f"*The profile {study.profile} has no run that decides a claim of this page.*"
    runs = study.frame(cells)
    data = " and ".join(_images(*pair) for pair in _distinct(runs, "data.name", "data.train_size"))
    setting = f"{' and '.join(sorted(set(runs['model.name'])))} on {data}"
    seeds = _span(runs.groupby(["cell", "role"])["seed"].nunique())
    numbers = (
        f"{_span(runs['train.epochs'])} epochs, a batch of {_span(runs['train.batch_size'])}, {seeds} seeds an arm"
    )
    done = f"{len(finished(runs))} of {len(runs)} runs finished"
    small = [claim for claim in bound if not experiments.published_scale(study.stem, study.profile, claim)]
    judged = {0: "thresholds bind", len(bound): "judged by the sign alone"}
    scale = judged.get(len(small), f"{len(small)} of {len(bound)} claims judged by the sign alone")
    return f"*Profile {study.profile}: {setting}; {numbers}; {done}; {scale}.*"


def _distinct(runs: pd.DataFrame, *columns: str) -> list[tuple[object, ...]]:
    return list(runs[list(columns)].drop_duplicates().itertuples(index=False, name=None))


def _images(name: str, train_size: float | None) -> str:
    """For example '100 images of digits'; without a size, all there are."""
    size = "all training images" if train_size is None or math.isnan(train_size) else f"{train_size:,.0f} images"
    return f"{size} of {name}"


def _span(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def pending_text(study: Study) -> str:
    """A Markdown list: how many trainings of each arm are pending, in the order of the plan."""
    runs = study.frame()
    left = runs[~runs["status"].isin(FINISHED)]
    lines = [f"Of {len(runs)} trainings on the profile {study.profile} {len(runs) - len(left)} are finished."]
    counts = left.groupby(["cell", "role"], sort=False).size().to_dict()
    for priority in sorted({arm.priority for arm in study.arms if (arm.cell, arm.role) in counts}):
        arms = [arm for arm in study.arms if arm.priority == priority and (arm.cell, arm.role) in counts]
        by_cell: dict[str, list[str]] = {}
        for arm in arms:
            by_cell.setdefault(arm.cell, []).append(f"{name(arm.role)} ({counts[arm.cell, arm.role]})")
        pending = "; ".join(f"{cell}: {', '.join(of_roles)}" for cell, of_roles in by_cell.items())
        lines.append(f"- pending at priority {priority}: {pending}")
    return lines[0] + "".join(f"\n{line}" for line in ["", *lines[1:]] if len(lines) > 1)


def outcomes_beside(studies: Sequence[Study], claims: Sequence[str]) -> pd.DataFrame:
    """The outcome for each claim on the profile of each study."""
    verdicts = {study.profile: {claim: study.verdict(claim) for claim in claims} for study in studies}
    columns = {
        profile: {claim: outcome_text(one) for claim, one in found.items()} for profile, found in verdicts.items()
    }
    return pd.DataFrame(columns).rename_axis("claim")


def outcome_text(verdict: Verdict) -> str:
    """The outcome with its marks; of a claim that is not run, whether the profile has runs for it."""
    if verdict.outcome == NOT_RUN:
        return "pending" if experiments.decides(verdict.claim, verdict.profile)[1] else "no setting on this profile"
    marks = [word for word, holds in (("miniature", verdict.miniature), ("varied", verdict.varied)) if holds]
    return verdict.outcome + (f" ({', '.join(marks)})" if marks else "")


Figures = Mapping[str, Mapping[tuple[str, str], float]]  # epoch ("last" or "best_test") -> (cell, role) -> printed
EPOCHS = {"last": ("", "last epoch"), "best_test": ("@best_test", "best test epoch")}  # suffix of a column, and words


def printed_means(paper: str, table: str, metric: str = "test_accuracy_pct") -> dict[str, float]:
    """Role -> mean over seeds of what a paper prints in a table."""
    rows = published.results()
    rows = rows[(rows["paper"] == paper) & (rows["table"] == table) & (rows["metric"] == metric)]
    return {method.lower(): stats.mean(arm["value"].tolist()).estimate for method, arm in rows.groupby("method")}


def epochs_beside(frame: pd.DataFrame, printed: Figures | None = None) -> pd.DataFrame:
    """Test accuracy at the last epoch beside that at the best test epoch, each with what a paper prints for it: one row
    per cell and role, means over seeds with 95 % t intervals."""
    rows = {}
    for (cell, role), arm in frame.groupby(["cell", "role"], sort=False):
        row = rows[cell, name(role)] = {}
        for epoch, (suffix, words) in EPOCHS.items():
            found = stats.mean(values(finished(arm), f"test_accuracy_pct{suffix}"))
            row[words] = bounds_text(found, absent_text(arm))
            figures = (printed or {}).get(epoch, {})
            if figures:
                row[f"{words}, the paper"] = number(figures[cell, role]) if (cell, role) in figures else ""
        row["n"] = str(len(finished(arm)))
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis(["cell", "method"]) if len(table) else table


def epochs_text(frame: pd.DataFrame, printed: Figures, pairs: Sequence[tuple[str, str]]) -> str:
    """A Markdown list in words: how far each printed test accuracy is from ours, and how the difference of two methods
    changes if the epoch is chosen by the test images."""
    lines = [
        _beside_printed(frame, cell, role, epoch, figure)
        for epoch, figures in printed.items()
        for (cell, role), figure in figures.items()
    ]
    arms = set(frame[["cell", "role"]].itertuples(index=False, name=None))
    for cell in frame["cell"].unique():
        lines += [_worth_of_choosing(frame, cell, a, b) for a, b in pairs if {(cell, a), (cell, b)} <= arms]
    return "\n".join(f"- {line}" for line in lines) or "This profile has no such runs."


def _beside_printed(frame: pd.DataFrame, cell: str, role: str, epoch: str, figure: float) -> str:
    suffix, words = EPOCHS[epoch]
    found = stats.mean(list(by_seed(frame, cell, role, f"test_accuracy_pct{suffix}").values()))
    head = f"{cell}, {name(role)}, {words}: the paper has {number(figure)} %"
    if not found.n:
        return f"{head}, ours is {absent_text(_arms(frame, cell, [role]))}."
    side = f"{number(abs(found.estimate - figure))} points {'above' if found.estimate >= figure else 'below'} it"
    holds = "holds it" if found.low <= figure <= found.high else "leaves it out"
    interval = "" if math.isnan(found.low) else f", and our interval {holds}"
    return f"{head}; ours, {interval_text(found)}, is {side}{interval}."


def _worth_of_choosing(frame: pd.DataFrame, cell: str, a: str, b: str) -> str:
    last, best = (
        stats.differences(*(by_seed(frame, cell, role, f"test_accuracy_pct{suffix}") for role in (a, b)))
        for suffix, _ in EPOCHS.values()
    )
    head = f"{cell}, {name(a)} - {name(b)}"
    if not last:
        return f"{head}: {absent_text(_arms(frame, cell, [a, b]))}."
    gain, chosen = (stats.mean(list(gains.values())) for gains in (last, best))
    change = stats.paired_difference(best, last)
    return (
        f"{head}: {interval_text(gain)} points at the last epoch, {bounds_text(chosen)} at the best test epoch. "
        f"Choosing the epoch by the test images changes it by {bounds_text(change)}."
    )


def _arms(frame: pd.DataFrame, cell: str, roles: Sequence[str]) -> pd.DataFrame:
    return frame[(frame["cell"] == cell) & frame["role"].isin(roles)]


def absent_text(runs: pd.DataFrame) -> str:
    """Why runs have no value: some of them are still to be made, or none of them left one."""
    return "pending" if len(runs) and not runs["status"].isin(FINISHED).all() else "none"


def digests(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """The digest of the rule behind each verdict."""
    return pd.DataFrame({"rule": {verdict.claim: verdict.rule_digest for verdict in verdicts}}).rename_axis("claim")


# ---------------------------------------------------------------------------------------------- tables of our runs


def means(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean over seeds with its 95 % t interval, one row per cell and role."""
    rows = {}
    for (cell, role), arm in frame.groupby(["cell", "role"], sort=False):
        found = {metric: stats.mean(values(finished(arm), metric)) for metric in metrics}
        rows[cell, name(role)] = {metric: bounds_text(one, absent_text(arm)) for metric, one in found.items()}
        rows[cell, name(role)]["n"] = str(min(interval.n for interval in found.values()))
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis(["cell", "method"]) if len(table) else table


def contrasts(frame: pd.DataFrame, metric: str, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Mean paired difference a - b with its 95 % interval, one row per cell and pair that the cell has arms for."""
    rows = {}
    for cell, roles in frame.groupby("cell", sort=False)["role"].unique().items():
        for a, b in (pair for pair in pairs if set(pair) <= set(roles)):
            found = stats.paired_difference(by_seed(frame, cell, a, metric), by_seed(frame, cell, b, metric))
            shown = bounds_text(found, absent_text(_arms(frame, cell, [a, b])))
            rows[cell, f"{name(a)} - {name(b)}"] = (shown, str(found.n))
    index = pd.MultiIndex.from_tuples(list(rows), names=["cell", "comparison"])
    return pd.DataFrame(list(rows.values()), index, [f"difference of {metric}", "n"])


def ratios(frame: pd.DataFrame, metrics: Sequence[str], a: str, b: str) -> pd.DataFrame:
    """Geometric mean of the ratio a / b of each metric with its 95 % interval, one row per cell.

    A ratio needs values above 0: seeds without are left out, and n says so.
    """
    rows = {}
    for cell in frame["cell"].unique():
        arms = [[by_seed(frame, cell, role, metric) for role in (a, b)] for metric in metrics]
        arms = [[{seed: value for seed, value in arm.items() if value > 0} for arm in pair] for pair in arms]
        found = {metric: stats.geometric_mean_ratio(*pair) for metric, pair in zip(metrics, arms, strict=True)}
        absent = absent_text(_arms(frame, cell, [a, b]))
        rows[cell] = {f"{metric}: {name(a)} / {name(b)}": bounds_text(one, absent) for metric, one in found.items()}
        rows[cell]["n"] = str(min(interval.n for interval in found.values()))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("cell")


def step_times(frame: pd.DataFrame, base: str = "sgd") -> pd.DataFrame:
    """Milliseconds per update of the weights, evaluations included: the median over seeds, and how many times that of
    the role `base` in the same cell. Times of the machines that made the records (`machines`)."""
    arms = list(frame[["cell", "role"]].drop_duplicates().itertuples(index=False, name=None))
    times = {arm: _milliseconds_per_step(frame, *arm) for arm in arms}
    rows = {}
    for (cell, role), found in times.items():
        median, unit = (statistics.median(each) if each else math.nan for each in (found, times.get((cell, base))))
        shown = {"ms per step": number(median), f"times {name(base)}": number(median / unit), "n": str(len(found))}
        rows[cell, name(role)] = shown
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["cell", "method"])


def _milliseconds_per_step(frame: pd.DataFrame, cell: str, role: str) -> list[float]:
    seconds, steps = (by_seed(frame, cell, role, column) for column in ("wall_seconds", "step"))
    return [1000 * seconds[seed] / steps[seed] for seed in seconds]


def machines(study: Study, **pick: Sequence[str]) -> str:
    """What the finished runs were made on, as their records say: device, and threads per run."""
    records = (study.store.load(key) for key in finished(study.frame(**pick))["key"])
    made = (record.environment for record in records if record is not None)  # tuning runs may lie elsewhere
    found = sorted({f"{one['device']}, threads per run: {one['threads']}" for one in made})
    return "; ".join(found) or "no finished runs"


def correlations_by_mu(study: Study, columns: Mapping[tuple[str, str], str], metric: str = "test_loss") -> pd.DataFrame:
    """r of the asymmetry factor at each mu with a metric, over settings: means over the seeds that all of them have.

    Args:
        columns: (panel, series) -> column of the measure, whose table holds a factor for each mu.

    Returns:
        One row per panel, series and mu, with estimate, low and high of a bootstrap over settings, and n.
    """
    rows, frame = [], finished(study.frame())
    for (panel, series), column in columns.items():
        tables = study.tables(column)
        for mu in sorted(tables["mu"].unique()) if len(tables) else ():
            interval = _correlation_over_settings(tables[tables["mu"] == mu], frame, metric)
            found = {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "n": interval.n}
            rows.append({"panel": panel, "series": series, "mu": mu} | found)
    return pd.DataFrame(rows, columns=["panel", "series", "mu", "estimate", "low", "high", "n"])


def _correlation_over_settings(table: pd.DataFrame, frame: pd.DataFrame, metric: str) -> Interval:
    setting = ["cell", "role"]
    factors = table.pivot(index="seed", columns=setting, values="asymmetry_factor")
    losses = frame.pivot(index="seed", columns=setting, values=metric)[factors.columns]
    shared = factors.dropna().index.intersection(losses.dropna().index)
    means = [values.loc[shared].mean().tolist() if len(shared) else [] for values in (factors, losses)]
    return stats.correlation(*means)


def with_other_batch(again: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The runs of 07 at equal numbers of updates, in one cell: those that were made for it, of one batch size, and
    from the table the same methods with the other."""
    others = {_other_batch(role) for role in again["role"]}
    return pd.concat([again, table[table["role"].isin(others)]]).assign(cell="equal updates")


def _other_batch(role: str) -> str:
    """'sam_large rho=0.1' for 'sam rho=0.1', and the other way round."""
    method, _, rest = role.partition(" ")
    other = method.removesuffix("_large") if method.endswith("_large") else f"{method}_large"
    return f"{other} {rest}".strip()


def without_minimum(study: Study, columns: Mapping[tuple[str, str], str]) -> pd.DataFrame:
    """Share of the directions along which the loss falls to a side, mean over all models, one row per mu."""
    found = {
        ", ".join(names): study.tables(column).groupby("mu")["no_minimum"].mean()
        for names, column in columns.items()
        if len(study.tables(column))
    }
    return pd.DataFrame(found).map(number).rename_axis("mu")


def rises(study: Study, column: str, roles: Sequence[str]) -> pd.DataFrame:
    """Rise of the loss along one direction to its two sides, mean over seeds: one row per mu, a pair for each role."""
    tables = study.tables(column, roles=roles)
    if tables.empty:
        return pd.DataFrame()
    found = tables.groupby(["mu", "role"], sort=True)[["rise_plus", "rise_minus"]].mean().map(number)
    wide = found.unstack("role").swaplevel(axis="columns").reindex(columns=roles, level=0)
    return wide.rename(columns={role: name(role) for role in roles})


def low_precision_text(frame: pd.DataFrame, cell: str) -> str:
    """What a user of mixed precision must know, in two sentences: what acts of the perturbation, and what that costs.

    Both follow from the runs of a cell of experiment 14; of precisions that have not been run nothing is said.
    """
    cosines = {precision: _mean(frame, cell, SAM[precision], "perturbation_cosine") for precision in SAM}
    cosines = {precision: cosine for precision, cosine in cosines.items() if not math.isnan(cosine)}
    if "bf16" not in cosines or len(cosines) == 1:
        return "The runs that say it are missing."
    norm = _mean(frame, cell, SAM["bf16"], "perturbation_norm_ratio")
    beside = ", ".join(
        f"{number(cosine)} in {precision}" for precision, cosine in cosines.items() if precision != "bf16"
    )
    return (
        f"Where products round weights to bf16, what acts of SAM's perturbation of norm {RHO:g} has a cosine of "
        f"{number(cosines['bf16'])} with it and {number(norm)} times its norm, against a cosine of {beside}. "
        f"{_cost_of_bf16(frame, cell)}: {_advice([name for name in cosines if cosines[name] >= LEAST_COSINE])}."
    )


def _mean(frame: pd.DataFrame, cell: str, role: str, metric: str) -> float:
    return stats.mean(list(by_seed(frame, cell, role, metric).values())).estimate


def _cost_of_bf16(frame: pd.DataFrame, cell: str) -> str:
    gap = stats.paired_difference(*(_gains_of_sam(frame, cell, precision) for precision in ("bf16", "fp32")))
    if gap.n == 0:
        return "What that costs is open, as runs in fp32 are missing"
    verdict = "may or may not cost accuracy"
    if gap.low > 0 or gap.high < 0:
        verdict = "costs accuracy" if gap.high < 0 else "costs no accuracy here"
    return f"It {verdict}, as SAM's gain over SGD in bf16 less that in fp32 is {interval_text(gap)} points"


def _gains_of_sam(frame: pd.DataFrame, cell: str, precision: str) -> dict[int, float]:
    return stats.differences(*(by_seed(frame, cell, arms[precision], "test_accuracy_pct") for arms in (SAM, SGD)))


def _advice(kept: Sequence[str]) -> str:
    """`kept`: the precisions in which enough of the perturbation is left."""
    if "bf16" in kept:
        return "bf16 will do for this network and radius, and `acting_perturbation` tells whether it will for yours"
    return (
        f"to climb where SAM means to, use {' or '.join(kept) or 'fp32'}, or a larger radius, and ask "
        "`acting_perturbation` what your network loses"
    )


def settings(study: Study, **pick: Sequence[str]) -> pd.DataFrame:
    """What was run, one row per arm, with the fields in which the arms differ by their short names."""
    table = study.settings(**pick)
    table.index = pd.Index([f"{cell}: {name(role)}" for cell, role in table.index], name="arm")
    if {"optim.rho", "optim.method"} <= set(table):
        table["optim.rho"] = table["optim.rho"].where(table["optim.method"] != "sgd", "")  # SGD has no radius
    table.columns = [field.split(".")[-1] for field in table.columns]
    return table.map(_cell_text)


def _cell_text(value: object) -> str:
    """A number without needless zeros; a field that is not set stays empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def common_settings(study: Study, **pick: Sequence[str]) -> str:
    """The fields in which all these arms agree; augmentation where there is any."""
    frame = study.frame(**pick)
    fields = [field for field in spec_fields(frame) if frame[field].nunique(dropna=False) == 1]
    if not any(frame[field].iloc[0] not in (False, "none", 0) for field in fields if field.startswith("augment.")):
        fields = [field for field in fields if not field.startswith("augment.")]
    return textwrap.fill(", ".join(f"{field} = {frame[field].iloc[0]}" for field in fields), PAGE_WIDTH)


def tuning_text(study: Study, choices: Iterable[Choice]) -> str:
    """One block per choice: what the rule gives, and the worst validation accuracy over the dev seeds of each value.

    From the committed records where these runs were not made anew, which is said."""
    choices = list(choices)
    if not choices:
        return f"Nothing was chosen on the profile {study.profile}."
    anew = any(study.has(arm) for choice in choices for arm in choice.arms)
    frames = [(study.store if anew else study.committed).frame(choice.arms) for choice in choices]
    lines = ["value: worst validation accuracy over the dev seeds, in percent"]
    if not anew and any(len(finished(frame)) for frame in frames):
        lines.append("(committed records: these runs were not made anew; `make reproduce TUNING=1` makes them)")
    for choice, frame in zip(choices, frames, strict=True):
        left = int((~frame["status"].isin(FINISHED)).sum())
        found = tuning.validation_accuracies(finished(frame).to_dict("records"), choice.field)
        chosen = f"pending ({left} of {len(frame)} runs)" if left else f"{tuning.choose(found):g}" if found else "none"
        lines.append(f"{choice.cell}, {choice.method}, {choice.field}: best by its worst seed {chosen}")
        if found:
            lines.append("  " + ", ".join(f"{value:g}: {min(seen):.1f}" for value, seen in found.items()))
    return "\n".join(lines)


def paper_figures(paper: str, table: str, **where: object) -> pd.DataFrame:
    """What a paper prints in one of its tables, as transcribed in `results/published`."""
    rows = published.results()
    rows = rows[(rows["paper"] == paper) & (rows["table"] == table)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    shown = ["dataset", "model", "method", "augmentation", "seed", "metric", "value", "uncertainty"]
    rows = rows[shown].dropna(axis="columns", how="all")
    return rows.map(lambda value: f"{value:g}" if isinstance(value, float) else value).reset_index(drop=True)


def beside_the_paper(frame: pd.DataFrame, printed: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """What a paper prints for each role beside our mean with its 95 % t interval.

    Args:
        frame: the runs of one cell.
        printed: metric -> role -> figure. A role that the paper has no row for stays empty.
    """
    rows = {}
    for role, arm in frame.groupby("role", sort=False):
        found = {metric: stats.mean(values(finished(arm), metric)) for metric in printed}
        row = rows[name(role)] = {}
        for metric, figures in printed.items():
            row[f"{metric}, the paper"] = number(figures[role]) if role in figures else ""
            row[f"{metric}, ours"] = bounds_text(found[metric], absent_text(arm))
        row["n"] = str(min(interval.n for interval in found.values()))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


# ---------------------------------------------------------------------------------------------- words and numbers


def spread_text(a: Sequence[float], b: Sequence[float], absent: str = "none") -> str:
    """Standard deviation of a over that of b, whose values share seeds, as `interval_text`."""
    with warnings.catch_warnings():  # of two seeds a bootstrap leaves a single one, and NumPy says so
        warnings.filterwarnings("ignore", "Degrees of freedom", RuntimeWarning)
        return interval_text(stats.sd_ratio(a, b, paired=True), absent)


def interval_text(interval: Interval, absent: str = "none") -> str:
    """For example '1.823 [1.251, 2.394] (n = 10)'."""
    return f"{bounds_text(interval, absent)} (n = {interval.n})"


def bounds_text(interval: Interval, absent: str = "none") -> str:
    """For example '1.823 [1.251, 2.394]'; the estimate alone where there is no interval, `absent` without a value."""
    if math.isnan(interval.estimate):
        return absent
    bounds = "" if math.isnan(interval.low) else f" [{number(interval.low)}, {number(interval.high)}]"
    return f"{number(interval.estimate)}{bounds}"


def number(value: float) -> str:
    """Four significant digits; trailing zeros stay, so that columns line up."""
    if math.isnan(value):
        return "none"
    text = f"{value:#.4g}"
    return text.removesuffix(".")


def bound(value: float) -> str:
    """The next power of ten above a rounding error, whose own digits differ from machine to machine: '1e-14'."""
    if math.isnan(value):
        return "none"
    return "1e-15" if value == 0 else f"1e{math.floor(math.log10(abs(value))) + 1:d}"


def name(role: str) -> str:
    return plots.style(role).label


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["status"] == "done"]


def values(frame: pd.DataFrame, metric: str) -> list[float]:
    return frame[metric].dropna().astype(float).tolist() if metric in frame else []


def by_seed(frame: pd.DataFrame, cell: str, role: str, metric: str) -> dict[int, float]:
    """seed -> value of the finished runs of one arm."""
    rows = finished(frame)
    rows = rows[(rows["cell"] == cell) & (rows["role"] == role)]
    return rows.set_index("seed")[metric].dropna().astype(float).to_dict() if metric in rows else {}


def matrix(frame: pd.DataFrame, cell: str, roles: Sequence[str], metric: str) -> np.ndarray:
    """One row per seed that every role has finished, one column per role; shape (seeds, roles)."""
    return _complete_rows([by_seed(frame, cell, role, metric) for role in roles])


def columns(frame: pd.DataFrame, cell: str, role: str, metrics: Sequence[str]) -> np.ndarray:
    """One row per finished seed of one arm that has every metric, one column per metric; shape (seeds, metrics)."""
    return _complete_rows([by_seed(frame, cell, role, metric) for metric in metrics])


def _complete_rows(found: Sequence[dict[int, float]]) -> np.ndarray:
    rows = [[values[seed] for values in found] for seed in found[0] if all(seed in values for values in found)]
    return np.array(rows, dtype=float).reshape(-1, len(found))
