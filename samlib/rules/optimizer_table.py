"""Rules of 07 optimizer_table: Table 1 of boca2023 and the sentences around it.

A role without a word on the batch has the small one (published: 128), `large` the near-full one (published: 5000).
Better is a lower test loss and a higher test accuracy, each by its interval: better on one and worse on the other
decides nothing. A claim that names several radii is supported where every one supports it.

not_better: that an interval does not show a gain is no support; it has to lie wholly on the other side. A miniature has
no margin to grant, so there 'not better' takes intervals that show worse, and anything less stays inconclusive.
"""

from collections.abc import Sequence
from functools import cache

from samlib import published, stats
from samlib.rules.conventions import (
    ABOVE,
    BELOW,
    CONTRADICTS,
    MIN_SEEDS,
    SUPPORTS,
    Decision,
    Evidence,
    Part,
    decide,
    difference,
    diverged_seeds,
    every,
    for_information,
    most,
    note,
    rule,
    scores,
    some,
)

LOSS, ACCURACY, TRAIN_LOSS = "test_loss", "test_accuracy_pct", "train_loss"
SAM = ("sam rho=0.05", "sam rho=0.1", "sam rho=0.2")
AVERAGE_SAM = ("average_sam rho=0.5", "average_sam rho=1")
SAM_LARGE = ("sam_large rho=0.05", "sam_large rho=0.1")
AVERAGE_SAM_LARGE = ("average_sam_large rho=0.5", "average_sam_large rho=1")
NOT_AVERAGE_LARGE = ("sgd", *SAM, *AVERAGE_SAM, *SAM_LARGE)  # the other rows of Table 1
MARGINS = {LOSS: 0.005, ACCURACY: 0.3}  # nats and points: what still counts as not better
FEWER_UPDATES = "confound: the large batch makes fewer updates, at the same learning rate (E-B11)"


@rule("boca-t1-128sam-beats-sgd", roles=("sgd", *SAM), matched="epochs")
def sam_is_better_than_sgd(evidence: Evidence) -> Decision:
    parts = [part for cell in evidence.cells for role in SAM for part in better(evidence, cell, role, "sgd")]
    return decide(evidence, parts, reproduced=every(parts, SUPPORTS), not_reproduced=most(parts, CONTRADICTS))


@rule("boca-t1-best-rho", roles=SAM, matched="epochs and gradient evaluations")
def best_radius(evidence: Evidence) -> Decision:
    parts = []
    for cell in evidence.cells:
        parts.append(lead(evidence, cell, LOSS, SAM, "sam rho=0.1", BELOW))
        parts.append(lead(evidence, cell, ACCURACY, SAM, "sam rho=0.2", ABOVE))
    return decide(evidence, parts, reproduced=every(parts, SUPPORTS), not_reproduced=some(parts, CONTRADICTS))


@rule(
    "boca-sgd400-not-better",
    roles=("sgd_double", "sgd", *SAM),
    matched="gradient evaluations (twice the epochs against SAM); nothing (twice the epochs against SGD)",
)
def twice_the_epochs_is_worse(evidence: Evidence) -> Decision:
    parts, shown = [], []
    for cell in evidence.cells:
        parts += [longer_training(evidence, cell, LOSS, ABOVE), longer_training(evidence, cell, ACCURACY, BELOW)]
        shown.append(longer_training(evidence, cell, TRAIN_LOSS, ABOVE))
        shown += [part for role in SAM for part in worse(evidence, cell, "sgd_double", role)]
    return decide(
        evidence,
        [*parts, *map(for_information, shown)],
        reproduced=every(parts, SUPPORTS),
        not_reproduced=every(parts, CONTRADICTS),
    )


@rule(
    "boca-avg-sam-not-better-than-sgd",
    roles=("sgd", *AVERAGE_SAM),
    matched="epochs and gradient evaluations (one each)",
)
def average_sam_is_not_better_than_sgd(evidence: Evidence) -> Decision:
    pairs = [worse(evidence, cell, role, "sgd") for cell in evidence.cells for role in AVERAGE_SAM]
    return decide(
        evidence,
        [part for pair in pairs for part in pair],
        reproduced=all(gain_within_margin(evidence, *pair) for pair in pairs),
        not_reproduced=any(every(pair, CONTRADICTS) for pair in pairs),
    )


@rule("boca-5000-sam-not-better", roles=("sgd", *SAM[:2], *SAM_LARGE, "sgd_large"), matched="epochs")
def large_batch_sam_is_not_better(evidence: Evidence) -> Decision:
    note(evidence, FEWER_UPDATES)
    arms = [(cell, large, small) for cell in evidence.cells for large, small in zip(SAM_LARGE, SAM[:2], strict=True)]
    beside_sam = [part for cell, large, small in arms for part in worse(evidence, cell, large, small)]
    beside_sgd = [worse(evidence, cell, large, "sgd") for cell, large, _ in arms]
    baseline = [part for cell, large, _ in arms for part in worse(evidence, cell, large, "sgd_large")]
    deciding = beside_sam + [part for pair in beside_sgd for part in pair]
    return decide(
        evidence,
        [*deciding, *map(for_information, baseline)],
        reproduced=every(deciding, SUPPORTS),
        not_reproduced=any(every(pair, CONTRADICTS) for pair in beside_sgd),
    )


@rule("boca-5000-avg-lowest-train-loss", roles=(*NOT_AVERAGE_LARGE, *AVERAGE_SAM_LARGE, "sgd_large"), matched="epochs")
def large_batch_average_sam_fits_best_and_generalises_worse(evidence: Evidence) -> Decision:
    note(evidence, FEWER_UPDATES)
    fits, generalises, shown = [], [], []
    for cell in evidence.cells:
        runner_up = ranked(evidence, cell, TRAIN_LOSS, NOT_AVERAGE_LARGE, BELOW)[0]
        for role in AVERAGE_SAM_LARGE:
            fits.append(compared(evidence, cell, TRAIN_LOSS, role, runner_up, BELOW))
            shown.append(compared(evidence, cell, TRAIN_LOSS, role, "sgd_large", BELOW))
            for sam in SAM:
                loss, accuracy = worse(evidence, cell, role, sam)
                generalises.append(loss)
                shown.append(accuracy)
    return decide(
        evidence,
        [*fits, *generalises, *map(for_information, shown)],
        reproduced=every(fits + generalises, SUPPORTS),
        not_reproduced=every(fits, CONTRADICTS) or every(generalises, CONTRADICTS),
    )


@rule("boca-short-training-mobilenetv3-sam-worse", roles=("sgd", *SAM), matched="epochs")
def sam_does_not_beat_sgd_early(evidence: Evidence) -> Decision:
    """The claim is that SAM never did: at every radius it is at or below, and one radius above is against it."""
    parts = [difference(evidence, cell, ACCURACY, r, "sgd", claimed=BELOW) for cell in evidence.cells for r in SAM]
    return decide(
        evidence,
        parts,
        reproduced=all(part.high <= 0 for part in parts),
        not_reproduced=some(parts, CONTRADICTS),
    )


# ---------------------------------------------------------------------------------------------- parts


def better(evidence: Evidence, cell: str, a: str, b: str) -> tuple[Part, Part]:
    """a - b of test loss and of test accuracy; each supports where a is better."""
    return compared(evidence, cell, LOSS, a, b, BELOW), compared(evidence, cell, ACCURACY, a, b, ABOVE)


def worse(evidence: Evidence, cell: str, a: str, b: str) -> tuple[Part, Part]:
    """a - b of test loss and of test accuracy; each supports where a is worse."""
    return compared(evidence, cell, LOSS, a, b, ABOVE), compared(evidence, cell, ACCURACY, a, b, BELOW)


def compared(evidence: Evidence, cell: str, metric: str, a: str, b: str, claimed: str) -> Part:
    return difference(evidence, cell, metric, a, b, claimed=claimed, printed=printed_difference(metric, a, b))


def longer_training(evidence: Evidence, cell: str, metric: str, claimed: str) -> Part:
    """Twice the epochs of SGD against once; the paper's figures are its artefact's, as no table prints them."""
    word = {LOSS: "loss", ACCURACY: "acc", TRAIN_LOSS: "train_loss"}[metric]
    figures = evidence.published["artefact"]
    printed = round(figures[f"{word}_400"] - figures[f"{word}_200"], 6)
    return difference(evidence, cell, metric, "sgd_double", "sgd", claimed=claimed, printed=printed)


def gain_within_margin(evidence: Evidence, loss: Part, accuracy: Part) -> bool:
    """not_better: both whole intervals on the near side of their margin. miniature: the sign alone, a margin of 0."""
    margins = dict.fromkeys(MARGINS, 0.0) if evidence.miniature else MARGINS
    return loss.low > -margins[LOSS] and accuracy.high < margins[ACCURACY]


def lead(evidence: Evidence, cell: str, metric: str, roles: Sequence[str], named: str, side: str) -> Part:
    """How far the best arm is ahead of the next; supports where the best is the one the claim names.

    The interval does not know that the pair was picked by its means, and is a little narrow for that.
    """
    best, second = ranked(evidence, cell, metric, roles, side)[:2]
    against = ABOVE if side == BELOW else BELOW
    name = f"{cell}, {'lowest' if side == BELOW else 'highest'} {metric} with {best}"
    printed = printed_difference(metric, best, second)
    return difference(
        evidence, cell, metric, best, second, claimed=side if best == named else against, name=name, printed=printed
    )


def ranked(evidence: Evidence, cell: str, metric: str, roles: Sequence[str], side: str) -> list[str]:
    """The arms by their mean, best first, over the seeds that all of them have finished.

    A rank among arms of which one diverged, or over too few seeds, is an obstacle to any conclusion.
    """
    arms = {role: scores(evidence, cell, role, metric) for role in roles}
    shared = sorted(set.intersection(*map(set, arms.values())))
    if len(shared) < MIN_SEEDS:
        evidence.obstacles.append(f"{cell}: no rank in {metric}: n = {len(shared)}, at least {MIN_SEEDS} are needed")
    lost = [text for role in roles if (text := diverged_seeds(evidence, cell, role))]
    evidence.obstacles.extend(f"no rank in {metric}: {text}" for text in lost)
    means = {role: stats.mean([arm[seed] for seed in shared]).estimate for role, arm in arms.items()}
    return sorted(roles, key=means.__getitem__, reverse=side == ABOVE)


# ---------------------------------------------------------------------------------------------- what the paper prints

METHOD_AND_BATCH = {
    "sgd": ("SGD", 128),
    "sam": ("SAM", 128),
    "average_sam": ("average SAM", 128),
    "sam_large": ("SAM", 5000),
    "average_sam_large": ("average SAM", 5000),
}


def printed_difference(metric: str, a: str, b: str) -> float | None:
    first, second = printed_figure(metric, a), printed_figure(metric, b)
    return None if first is None or second is None else round(first - second, 6)


@cache
def printed_figure(metric: str, role: str) -> float | None:
    """What Table 1 prints for a role; None for a role it has no row for."""
    name, _, rho = role.partition(" rho=")
    if name not in METHOD_AND_BATCH:
        return None
    method, batch_size = METHOD_AND_BATCH[name]
    rows = published.results().query("paper == 'boca2023' and table == 'T1'")
    rows = rows[(rows["method"] == method) & (rows["batch_size"] == batch_size) & (rows["metric"] == metric)]
    rows = rows[rows["rho"] == float(rho)] if rho else rows
    return float(rows["value"].iloc[0]) if len(rows) else None
