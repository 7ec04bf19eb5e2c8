"""Rules of 02 batch_size.

A cell is one batch size, read from `train.batch_size`. In a miniature the sign alone is judged: where the wording asks
for a gain of so many points, any gain supports and any loss contradicts. No other rule here has such a threshold.

The training loss is `running_loss`, the mean over an epoch's updates of the loss at the weights each started from: what
a training curve usually shows, and what claims.yaml presumes of the paper's.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from samlib import stats
from samlib.errors import InputError
from samlib.rules.conventions import (
    ABOVE,
    BELOW,
    CONTRADICTS,
    INFORMATION,
    MIN_SEEDS,
    SPREAD_SEEDS,
    SUPPORTS,
    Decision,
    Evidence,
    Part,
    arm_rows,
    can_conclude,
    decide,
    difference,
    every,
    for_information,
    judged_at,
    judged_part,
    listed,
    mean_ratio,
    most,
    note,
    rule,
    scores,
    slope_per_doubling,
    some,
    spread_ratio,
)

ACCURACY, LOSS = "test_accuracy_pct", "running_loss"


@rule("coldenhoff-b-small-batch-better", roles=("sgd", "sam"))
def accuracy_falls_as_the_batch_grows(evidence: Evidence) -> Decision:
    note(evidence, matched_over_sizes(evidence))
    sizes = cells_by_size(evidence)
    slopes = [accuracy_slope(evidence, sizes, role) for role in evidence.roles]
    steps = [
        adjacent_step(evidence, smaller, larger, role)
        for role in evidence.roles
        for smaller, larger in pairwise(sizes.values())
    ]
    return decide(
        evidence,
        [*slopes, *map(for_information, steps)],
        reproduced=every(slopes, SUPPORTS),
        not_reproduced=some(slopes, CONTRADICTS),
    )


@rule("coldenhoff-b-sam-gain-5-to-10", roles=("sgd", "sam"), matched="epochs, at each batch size")
def sam_gains_at_every_batch_size(evidence: Evidence) -> Decision:
    cells = list(cells_by_size(evidence).values())
    printed = {cells[-1]: evidence.published["batch_128_from_table_I"]}
    gains = [difference(evidence, cell, ACCURACY, "sam", "sgd", printed=printed.get(cell)) for cell in cells]
    as_large = evidence.miniature or all(4 <= gain.estimate <= 11 for gain in gains)
    elsewhere = any(gain.high < 3 or gain.low > 12 for gain in gains)
    return decide(
        evidence,
        gains,
        reproduced=every(gains, SUPPORTS) and as_large,
        not_reproduced=some(gains, CONTRADICTS) if evidence.miniature else elsewhere,
    )


@rule("coldenhoff-b-sam-lower-variance", roles=("sgd", "sam"), matched="epochs, at each batch size")
def sam_varies_less_at_the_two_larger_batches(evidence: Evidence) -> Decision:
    cells = list(cells_by_size(evidence).values())
    paper = evidence.published
    ratio = paper["sd_sam_batch128_table_I"] / paper["sd_sgd_batch128_table_I"]
    printed = {cells[-1]: round(ratio, 4)}
    spreads = {cell: spread_ratio(evidence, cell, ACCURACY, "sam", "sgd", printed=printed.get(cell)) for cell in cells}
    deciding = [spreads[cell] for cell in cells[-2:]]
    others = [for_information(spreads[cell]) for cell in cells[:-2]]
    return decide(
        evidence,
        [*deciding, *others, *(equal_spread(evidence, cell) for cell in cells)],
        reproduced=every(deciding, SUPPORTS),
        not_reproduced=some(deciding, CONTRADICTS),
    )


@rule("coldenhoff-b-sam-mitigates-large-batch", roles=("sgd", "sam"))
def sam_loses_less_from_the_smallest_batch_to_the_largest(evidence: Evidence) -> Decision:
    note(evidence, matched_over_sizes(evidence))
    cells = list(cells_by_size(evidence).values())
    ends = [cells[0], cells[-1]]
    drops = {
        role: stats.differences(*(scores(evidence, cell, role, ACCURACY) for cell in ends)) for role in evidence.roles
    }
    found = [drop_part(evidence, ends, (role,), stats.mean(list(drops[role].values()))) for role in evidence.roles]
    gap = drop_part(evidence, ends, evidence.roles, stats.paired_difference(drops["sgd"], drops["sam"]))
    return decide(
        evidence,
        [gap, *map(for_information, found)],
        reproduced=gap.outcome == SUPPORTS,
        not_reproduced=gap.outcome == CONTRADICTS,
    )


@rule("coldenhoff-b-low-train-loss-not-better", roles=("sgd", "sam"), matched="epochs, at each batch size")
def sgd_fits_better_and_generalises_worse(evidence: Evidence) -> Decision:
    """'Accuracy claim contradicted' is read as the rest of the sentence: at a majority of batch sizes."""
    cells = cells_by_size(evidence).values()
    losses = [mean_ratio(evidence, cell, LOSS, "sgd", "sam", claimed=BELOW) for cell in cells]
    gaps = [difference(evidence, cell, ACCURACY, "sgd", "sam", claimed=BELOW) for cell in cells]
    at_once = [every(pair, SUPPORTS) for pair in zip(losses, gaps, strict=True)]
    return decide(
        evidence,
        [*losses, *gaps],
        reproduced=2 * sum(at_once) > len(at_once),
        not_reproduced=most(losses, CONTRADICTS) or most(gaps, CONTRADICTS),
    )


@rule("coldenhoff-b-loss-curve-variance", roles=("sgd", "sam"), matched="epochs, at each batch size")
def the_loss_curves_of_sam_lie_closer_together(evidence: Evidence) -> Decision:
    spreads = [curve_spread_ratio(evidence, cell) for cell in cells_by_size(evidence).values()]
    return decide(evidence, spreads, reproduced=most(spreads, SUPPORTS), not_reproduced=most(spreads, CONTRADICTS))


# ---------------------------------------------------------------------------------------------- batch sizes


def cells_by_size(evidence: Evidence) -> dict[int, str]:
    """Batch size -> its cell, the smallest first.

    Raises:
        InputError: two cells have the same batch size, or there are fewer than two.
    """
    sizes = evidence.rows.groupby("cell")["train.batch_size"].first()
    if len(sizes) < 2 or sizes.duplicated().any():
        given = ", ".join(f"{cell}: {size:g}" for cell, size in sizes.items())
        raise InputError(f"train.batch_size = {given}: use at least two cells, each with another batch size")
    return {int(size): cell for cell, size in sizes.sort_values().items()}


def matched_over_sizes(evidence: Evidence) -> str:
    """equal_budget, where batch sizes are compared with each other."""
    epochs = evidence.rows["train.epochs"].nunique()
    return f"matched over the batch sizes: learning rate{' and epochs, not updates' if epochs == 1 else ', not epochs'}"


def accuracy_slope(evidence: Evidence, sizes: Mapping[int, str], role: str) -> Part:
    points = {size: (cell, role) for size, cell in sizes.items()}
    return slope_per_doubling(evidence, points, ACCURACY, claimed=BELOW, name="over the batch sizes")


def adjacent_step(evidence: Evidence, smaller: str, larger: str, role: str) -> Part:
    """Accuracy of one role at a batch size minus that at the next smaller one."""
    interval = stats.paired_difference(*(scores(evidence, cell, role, ACCURACY) for cell in (larger, smaller)))
    statistic = f"{larger} - {smaller} of {ACCURACY}, paired by seed"
    trusted = can_conclude(evidence, [smaller, larger], (role,), interval.n, statistic, MIN_SEEDS)
    return judged_part(role, statistic, interval, trusted, BELOW, None)


def drop_part(evidence: Evidence, ends: Sequence[str], roles: Sequence[str], interval: stats.Interval) -> Part:
    """The drop from the smallest batch to the largest of one role, or the difference of two such drops."""
    smallest, largest = ends
    statistic = f"{' - '.join(f'drop of {role}' for role in roles)} in {ACCURACY}, paired by seed"
    trusted = can_conclude(evidence, ends, roles, interval.n, statistic, MIN_SEEDS)
    return judged_part(f"{smallest} to {largest}", statistic, interval, trusted, ABOVE, None)


# ---------------------------------------------------------------------------------------------- spread


def equal_spread(evidence: Evidence, cell: str) -> Part:
    arms_of_cell = [list(scores(evidence, cell, role, ACCURACY).values()) for role in ("sam", "sgd")]
    n = min(map(len, arms_of_cell))
    p = stats.brown_forsythe(*arms_of_cell) if n >= MIN_SEEDS else math.nan  # two values are equally far from a median
    statistic = f"Brown-Forsythe p, sam and sgd have the same spread of {ACCURACY}"
    return Part(cell, statistic, p, math.nan, math.nan, n, INFORMATION)


def curve_spread_ratio(evidence: Evidence, cell: str) -> Part:
    """Mean over the last half of the epochs of the sd over seeds of log10 training loss, that of SAM over that of SGD.

    The paper's last 50 epochs are the last half of its 100.
    """
    sam, sgd = (log_curves(evidence, cell, role) for role in ("sam", "sgd"))
    shared = [seed for seed in sam if seed in sgd]
    interval = stats.curve_sd_ratio([sam[seed] for seed in shared], [sgd[seed] for seed in shared])
    statistic = f"sd of sam / sd of sgd of log10 {LOSS} over seeds, mean over the last half of the epochs"
    trusted = can_conclude(evidence, [cell], ("sam", "sgd"), interval.n, statistic, SPREAD_SEEDS)
    return judged_at(1, judged_part(cell, statistic, interval, trusted, BELOW, None), BELOW)


def log_curves(evidence: Evidence, cell: str, role: str) -> dict[int, list[float]]:
    """seed -> log10 of its training loss at each evaluated epoch of the last half, over the runs that are done."""
    done = arm_rows(evidence, cell, role)
    done = done[done["status"] == "done"]
    if done.empty:
        return {}
    done = done.dropna(axis="columns", how="all")  # epochs of other cells
    epochs = {name: float(name.partition("=")[2]) for name in done if name.startswith(f"{LOSS}@epoch=")}
    last_half = [name for name, epoch in epochs.items() if 2 * epoch > done["train.epochs"].max()]
    if not last_half:
        raise InputError(f"frame has no column '{LOSS}@epoch=...': put {LOSS} among the curves of {role} in {cell}")
    curves = dict(zip(done["seed"], done[last_half].astype(float).to_numpy().tolist(), strict=True))
    unfit = [seed for seed, curve in curves.items() if not all(value > 0 for value in curve)]
    if unfit:  # no logarithm: a spread without these seeds would be another one
        evidence.obstacles.append(f"{cell}: {role} has no {LOSS} above 0 at every epoch for seeds {listed(unfit)}")
    return {seed: [math.log10(value) for value in curve] for seed, curve in curves.items() if seed not in unfit}
