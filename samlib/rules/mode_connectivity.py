"""Rules of 06 mode_connectivity."""

from collections.abc import Callable

from samlib import stats
from samlib.rules.conventions import (
    ABOVE,
    BELOW,
    MIN_SEEDS,
    SUPPORTS,
    Decision,
    Evidence,
    Part,
    can_conclude,
    decide,
    difference,
    every,
    for_information,
    judged_at,
    judged_part,
    rule,
    scores,
)

NAMED, CONTROLS = ("sam_to_sgd", "sam_to_large"), ("sgd_to_sgd", "sam_to_sam")
CHAIN, LINE = "chain", "line"
TRAINING, TEST, TEST_LOSS = "train_loss_barrier", "test_error_barrier_pct", "test_loss_barrier"
LOW_LOSS, HIGH_POINTS, SMALL_POINTS = 0.1, 2.0, 1.0  # the thresholds of the claim


@rule("boca-mode-connectivity-test-barrier", roles=(*NAMED, *CONTROLS), matched="epochs, and those of SGD doubled")
def test_error_is_high_on_a_chain_of_low_training_loss(evidence: Evidence) -> Decision:
    """The barrier is the highest value inside the path minus the higher of its ends, so that it can be below 0.

    Thresholds in nats and points belong to CIFAR-10. A miniature judges their signs: a training barrier "below 0.1"
    is one below that of the straight line, which is what a chain is for; a test-error barrier "above 2 points" is one
    above 0, and one "below 1 point" is one below 0.
    """
    low_training = for_named(lambda role: chain_is_low(evidence, role))
    high_test = for_named(lambda role: barrier(evidence, role, TEST, 0 if evidence.miniature else HIGH_POINTS, ABOVE))
    small_test = for_named(lambda role: barrier(evidence, role, TEST, 0 if evidence.miniature else SMALL_POINTS, BELOW))
    above_controls = [
        difference(evidence, CHAIN, TEST, role, control, name=f"{role}, beside {control}")
        for role in NAMED
        for control in CONTROLS
    ]
    test_loss = for_named(lambda role: barrier(evidence, role, TEST_LOSS, 0, ABOVE))
    return decide(
        evidence,
        [*low_training, *high_test, *above_controls, *map(for_information, test_loss)],
        reproduced=every([*low_training, *high_test, *above_controls], SUPPORTS),
        not_reproduced=every(small_test, SUPPORTS),
    )


def for_named(part_of: Callable[[str], Part]) -> list[Part]:
    return [part_of(role) for role in NAMED]


def chain_is_low(evidence: Evidence, role: str) -> Part:
    """The training barrier of the chain, or in a miniature what the straight line has more of it."""
    if evidence.miniature:
        return less_than_the_line(evidence, role)
    return barrier(evidence, role, TRAINING, LOW_LOSS, BELOW)


def barrier(evidence: Evidence, role: str, metric: str, threshold: float, claimed: str) -> Part:
    """Mean barrier of the chains of one pair over seeds, judged against a threshold."""
    interval = stats.mean(list(scores(evidence, CHAIN, role, metric).values()))
    statistic = f"mean of {metric}"
    trusted = can_conclude(evidence, [CHAIN], (role,), interval.n, statistic, MIN_SEEDS)
    return judged_at(threshold, judged_part(role, statistic, interval, trusted, claimed, None), claimed)


def less_than_the_line(evidence: Evidence, role: str) -> Part:
    """Mean of chain - straight line of the training barrier of one pair, paired by seed."""
    chain, line = (scores(evidence, cell, role, TRAINING) for cell in (CHAIN, LINE))
    interval = stats.paired_difference(chain, line)
    statistic = f"chain - line of {TRAINING}, paired by seed"
    trusted = can_conclude(evidence, [CHAIN, LINE], (role,), interval.n, statistic, MIN_SEEDS)
    return judged_part(role, statistic, interval, trusted, BELOW, None)
