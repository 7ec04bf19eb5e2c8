"""Rules of 01 sam_vs_sgd."""

import math
from collections.abc import Sequence

from samlib import stats
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
    pooled_difference,
    printed_gap,
    rule,
    seeds_in_favour,
    within,
)


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
