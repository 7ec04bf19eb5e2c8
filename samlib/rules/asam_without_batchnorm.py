"""Rules of 03 asam_without_batchnorm.

A miniature judges the sign alone: of a difference against 0, of a ratio against 1. The half point of 'similar', the
factor of ten of 'an order of magnitude' and the two points of 'close' are thresholds on CIFAR-10: a miniature notes
them, and they decide nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from samlib.rules.conventions import (
    BELOW,
    CONTRADICTS,
    SUPPORTS,
    Decision,
    Evidence,
    Part,
    decide,
    difference,
    every,
    for_information,
    mean_ratio,
    note,
    rule,
    some,
    spread_ratio,
    within,
)

KURTOSIS = "first_layer_kurtosis"
BATCH_NORM = {"sam": "sam_batchnorm", "asam": "asam_batchnorm"}
SLOPE, LATE_ACCURACY = "log_train_loss_slope_per_epoch@last_quarter", "test_accuracy_pct@last_quarter"


@rule("coldenhoff-c-asam-vs-sam-accuracy", roles=("asam", "sam"), matched="epochs")
def asam_is_better_than_sam(evidence: Evidence) -> Decision:
    printed = evidence.published["mean_difference"]
    gains = [difference(evidence, cell, "test_accuracy_pct", "asam", "sam", printed=printed) for cell in evidence.cells]
    for gain in gains:
        threshold_note(evidence, gain.name, "'similar', an interval above -0.5 points", gain.low > -0.5)
    return decide(evidence, gains, reproduced=every(gains, SUPPORTS), not_reproduced=every(gains, CONTRADICTS))


@rule("coldenhoff-c-train-loss-gap", roles=("asam", "sam"), matched="epochs")
def sam_ends_with_the_lower_training_loss(evidence: Evidence) -> Decision:
    printed = evidence.published["geometric_mean"]
    ratios = [mean_ratio(evidence, cell, "train_loss", "asam", "sam", printed=printed) for cell in evidence.cells]
    for ratio in ratios:
        threshold_note(evidence, ratio.name, "'order of magnitude', an interval that reaches 10", ratio.high >= 10)
    return decide(evidence, ratios, reproduced=every(ratios, SUPPORTS), not_reproduced=every(ratios, CONTRADICTS))


def threshold_note(evidence: Evidence, cell: str, what: str, holds: bool) -> None:
    note(evidence, f"{cell}: {what}: {'yes' if holds else 'no'}{' (does not bind here)' if evidence.miniature else ''}")


@rule("coldenhoff-c-heavier-tails", roles=(*BATCH_NORM, *BATCH_NORM.values()), matched="epochs")
def tails_are_heavier_without_batch_norm(evidence: Evidence) -> Decision:
    gaps = {cell: tails(evidence, cell, KURTOSIS) for cell in evidence.cells}
    beside = [
        part
        for cell in evidence.cells
        for metric in (f"{KURTOSIS}:quantile_ratio", f"{KURTOSIS}:range")
        for part in tails(evidence, cell, metric)
    ]
    return decide(
        evidence,
        [*flat(gaps), *map(for_information, beside)],
        reproduced=all(every(parts, SUPPORTS) for parts in gaps.values()),
        not_reproduced=all(some(parts, CONTRADICTS) for parts in gaps.values()),
    )


def tails(evidence: Evidence, cell: str, metric: str) -> list[Part]:
    """Without batch norm minus with it, for each optimiser."""
    return [difference(evidence, cell, metric, without, batch) for without, batch in BATCH_NORM.items()]


def flat(parts_by_cell: Mapping[str, Sequence[Part]]) -> list[Part]:
    return [part for parts in parts_by_cell.values() for part in parts]


@rule("coldenhoff-c-asam-lower-variance", roles=("asam", "sam"), matched="epochs")
def asam_varies_less(evidence: Evidence) -> Decision:
    evidence = with_columns(evidence, log_train_loss=logarithms(evidence, ["train_loss"])["train_loss"])
    printed = {name: pair["asam"] / pair["sam"] for name, pair in evidence.published.items()}
    spreads = {
        cell: [
            spread(evidence, cell, "log_train_loss", printed["sd_log_train_loss"]),
            spread(evidence, cell, "test_accuracy_pct", printed["sd_accuracy"]),
        ]
        for cell in evidence.cells
    }
    absolute = [spread(evidence, cell, "train_loss", printed["sd_train_loss_1e-5"]) for cell in evidence.cells]
    return decide(
        evidence,
        [*flat(spreads), *map(for_information, absolute)],
        reproduced=all(every(parts, SUPPORTS) for parts in spreads.values()),
        not_reproduced=all(some(parts, CONTRADICTS) for parts in spreads.values()),
    )


def spread(evidence: Evidence, cell: str, metric: str, printed: float) -> Part:
    return spread_ratio(evidence, cell, metric, "asam", "sam", printed=printed)


@rule("coldenhoff-c-late-descent", roles=("sam", "asam"), matched="epochs")
def sam_goes_on_descending(evidence: Evidence) -> Decision:
    evidence = with_last_quarter(evidence)
    slopes = [difference(evidence, cell, SLOPE, "sam", "asam", claimed=BELOW) for cell in evidence.cells]
    gaps = [difference(evidence, cell, LATE_ACCURACY, "asam", "sam") for cell in evidence.cells]
    for gap in gaps:
        threshold_note(evidence, gap.name, "'close', an interval within 2 points", gap.low > -2 and gap.high < 2)
    close = evidence.miniature or all(within(evidence, gap, -2, 2) for gap in gaps)
    return decide(
        evidence,
        [*slopes, *map(for_information, gaps)],
        reproduced=every(slopes, SUPPORTS) and close,
        not_reproduced=every(slopes, CONTRADICTS),
    )


def with_last_quarter(evidence: Evidence) -> Evidence:
    """With the least-squares slope of log training loss over the last quarter of the epochs, and the mean accuracy."""
    epochs = last_quarter(evidence.rows.columns)
    logs = logarithms(evidence, [f"train_loss@epoch={epoch}" for epoch in epochs])
    accuracies = evidence.rows.reindex(columns=[f"test_accuracy_pct@epoch={epoch}" for epoch in epochs]).astype(float)
    slopes = [slope(epochs, values) for values in logs.to_numpy().tolist()]
    return with_columns(evidence, **{SLOPE: slopes, LATE_ACCURACY: accuracies.mean(axis="columns", skipna=False)})


def last_quarter(columns: Sequence[str]) -> list[int]:
    """The evaluated epochs from three quarters of the last one on."""
    heads = [name.partition("@epoch=") for name in columns]
    epochs = sorted(int(epoch) for metric, _, epoch in heads if metric == "train_loss" and epoch)
    return [epoch for epoch in epochs if 4 * epoch >= 3 * epochs[-1]]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; NaN for a single point, or where one is absent."""
    if len(x) < 2 or not all(map(math.isfinite, y)):
        return math.nan
    return statistics.linear_regression(x, y).slope


def logarithms(evidence: Evidence, metrics: Sequence[str]) -> pd.DataFrame:
    """Of losses, NaN where a run has none.

    A loss of exactly 0 is one that float32 has rounded away, and has no logarithm. Left out, the runs that went down
    farthest would be those that do not count; so a single one leaves no conclusion.
    """
    losses = evidence.rows.reindex(columns=list(metrics)).astype(float)
    unfit = evidence.rows[(losses <= 0).any(axis="columns") & (evidence.rows["status"] == "done")]
    for run in unfit.itertuples():
        evidence.obstacles.append(f"{run.cell}: {run.role} has a training loss that is not above 0 for seed {run.seed}")
    return losses.where(losses > 0).map(math.log)


def with_columns(evidence: Evidence, **columns: object) -> Evidence:
    return replace(evidence, rows=evidence.rows.assign(**columns))
