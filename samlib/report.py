"""What the pages of the book print: verdicts as sentences, means and contrasts as tables, figures of the papers.

Every number keeps four significant digits, so that a change of one per cent in a statistic shows, and what comes back
is a string or a frame of strings, the same on every machine for the same records.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from samlib import plots, published, stats
from samlib.claims import INFORMATION, Part, Verdict, part_text
from samlib.claims import row as verdict_row
from samlib.stats import Interval
from samlib.study import Study

# ---------------------------------------------------------------------------------------------- verdicts


def verdicts_text(verdicts: Iterable[Verdict]) -> str:
    """A Markdown list: for each claim its outcome, its sentence, and the statistics that decided."""
    return "\n".join(verdict_text(verdict) for verdict in verdicts)


def verdict_text(verdict: Verdict) -> str:
    claim = published.claim(verdict.claim)
    marks = [
        mark for mark, holds in (("miniature", verdict.miniature), ("a reader's variation", verdict.varied)) if holds
    ]
    outcome = f"**{verdict.outcome}**" + (f" ({', '.join(marks)})" if marks else "")
    lines = [f"- {outcome}: {claim.statement} *({claim.paper}, {claim.where}; `{verdict.claim}`)*"]
    lines += [f"    - {part_line(part)}" for part in verdict.parts if part.outcome != INFORMATION]
    return "\n".join([*lines, f"    - {verdict.reason}"])


def part_line(part: Part) -> str:
    """One compared statistic with its interval and n, and what the paper prints for it."""
    return part_text(part) + ("" if part.published is None else f"; the paper: {part.published:.4g}")


def scoreboard(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per claim."""
    columns = ("claim", "paper", "where", "outcome", "statistic", "reason")
    table = pd.DataFrame([verdict_row(verdict) for verdict in verdicts])
    table["outcome"] = table["outcome"] + table["miniature"].map({True: " (miniature)", False: ""})
    return table[list(columns)].set_index("claim")


def caption(what: str, frame: pd.DataFrame, metric: str, interval: str = plots.MEAN_INTERVAL) -> str:
    """The caption of a figure in Markdown, with n from the frame it shows."""
    return f"*{plots.caption(what, plots.seeds(frame, metric), interval)}*"


def digests(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """The digest of the rule behind each verdict."""
    return pd.DataFrame({"rule": {verdict.claim: verdict.rule_digest for verdict in verdicts}}).rename_axis("claim")


# ---------------------------------------------------------------------------------------------- tables of our runs


def means(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean over seeds with its 95 % t interval, one row per cell and role."""
    rows = {}
    for (cell, role), arm in finished(frame).groupby(["cell", "role"], sort=False):
        rows[cell, name(role)] = {metric: interval_text(stats.mean(values(arm, metric))) for metric in metrics}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis(["cell", "method"]) if len(table) else table


def contrasts(frame: pd.DataFrame, metric: str, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Mean paired difference a - b with its 95 % interval, one row per cell and pair that the cell has arms for."""
    rows = []
    for cell, roles in frame.groupby("cell", sort=False)["role"].unique().items():
        for a, b in (pair for pair in pairs if set(pair) <= set(roles)):
            found = stats.paired_difference(by_seed(frame, cell, a, metric), by_seed(frame, cell, b, metric))
            rows.append(
                {"cell": cell, "comparison": f"{name(a)} - {name(b)}", f"difference of {metric}": interval_text(found)}
            )
    return pd.DataFrame(rows).set_index(["cell", "comparison"])


def ratios(frame: pd.DataFrame, metric: str, a: str, b: str) -> pd.DataFrame:
    """Geometric mean of the ratio a / b with its 95 % interval, one row per cell."""
    rows = {
        cell: stats.geometric_mean_ratio(by_seed(frame, cell, a, metric), by_seed(frame, cell, b, metric))
        for cell in frame["cell"].unique()
    }
    column = f"{metric}: {name(a)} / {name(b)}"
    return pd.DataFrame({column: {cell: interval_text(found) for cell, found in rows.items()}}).rename_axis("cell")


def settings(study: Study, **pick: Sequence[str]) -> pd.DataFrame:
    """What was run, one row per arm, with the fields in which the arms differ."""
    table = study.settings(**pick)
    table.index = [f"{cell}: {name(role)}" for cell, role in table.index]
    return table.map(lambda value: f"{value:g}" if isinstance(value, float) else str(value)).T.rename_axis("field").T


def paper_figures(paper: str, table: str, **where: object) -> pd.DataFrame:
    """What a paper prints in one of its tables, as transcribed in `results/published`."""
    rows = published.results()
    rows = rows[(rows["paper"] == paper) & (rows["table"] == table)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    shown = ["dataset", "model", "method", "augmentation", "seed", "metric", "value", "uncertainty"]
    rows = rows[shown].dropna(axis="columns", how="all")
    return rows.map(lambda value: f"{value:g}" if isinstance(value, float) else value).reset_index(drop=True)


# ---------------------------------------------------------------------------------------------- words and numbers


def interval_text(interval: Interval) -> str:
    """For example '1.823 [1.251, 2.394] (n = 10)'."""
    bounds = "" if math.isnan(interval.low) else f" [{number(interval.low)}, {number(interval.high)}]"
    return f"{number(interval.estimate)}{bounds} (n = {interval.n})"


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
    arms = [by_seed(frame, cell, role, metric) for role in roles]
    rows = [[arm[seed] for arm in arms] for seed in arms[0] if all(seed in arm for arm in arms)]
    return np.array(rows, dtype=float).reshape(-1, len(roles))
