"""Rules of 14 precision, claims of this study itself.

A gain is the test accuracy of SAM less that of SGD in the same precision, so that what rounding does to any training is
not put down to the perturbation. All are at rho 0.05.

A miniature judges the sign alone, and here that says: of the perturbation, whether bf16 turns it further than fp16,
which of a coarser format is nearly certain; of gains and of lambda_max, on which side of no difference they lie. That
two gains are about equal has no sign, so that its claim stays open.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from samlib import stats
from samlib.rules.conventions import (
    ABOVE,
    BELOW,
    CONTRADICTS,
    INCONCLUSIVE,
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
    mean_ratio,
    note,
    rule,
    scores,
    some,
    within,
)

ACCURACY, COSINE = "test_accuracy_pct", "perturbation_cosine"
LEAST_COSINE = 0.95
MARGIN = 0.3  # points of test accuracy
RHO = 0.05
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
SAM = {precision: f"sam rho={RHO:g} {precision}" for precision in PRECISIONS}
SGD = {precision: f"sgd {precision}" for precision in PRECISIONS}
REMEDY = f"{SAM['bf16']} two products"


@rule("study-bf16-turns-the-perturbation", roles=(SAM["bf16"], SAM["fp16"]), matched="epochs")
def bf16_turns_the_perturbation(evidence: Evidence) -> Decision:
    cells = evidence.cells
    turned = [difference(evidence, cell, COSINE, SAM["bf16"], SAM["fp16"], claimed=BELOW) for cell in cells]
    means = [mean_cosine(evidence, cell, SAM["bf16"], BELOW) for cell in cells]
    means += [mean_cosine(evidence, cell, SAM["fp16"], ABOVE) for cell in cells]
    deciding, beside = (turned, means) if evidence.miniature else (means, turned)
    return decide(
        evidence,
        [*deciding, *map(for_information, beside)],
        reproduced=every(deciding, SUPPORTS),
        not_reproduced=some(deciding, CONTRADICTS),
    )


@rule(
    "study-bf16-shrinks-the-gain",
    roles=(SAM["bf16"], SGD["bf16"], SAM["fp32"], SGD["fp32"]),
    matched="epochs",
)
def bf16_shrinks_the_gain(evidence: Evidence) -> Decision:
    gaps = [gain_gap(evidence, cell, "bf16") for cell in evidence.cells]
    apart = [
        for_information(difference(evidence, cell, ACCURACY, arms["bf16"], arms["fp32"], claimed=BELOW))
        for cell in evidence.cells
        for arms in (SAM, SGD)
    ]
    return decide(
        evidence,
        [*gaps, *apart],
        reproduced=every(gaps, SUPPORTS),
        not_reproduced=all(gap.outcome == CONTRADICTS or within(evidence, gap, -MARGIN, MARGIN) for gap in gaps),
    )


@rule(
    "study-bf16-flattens-less",
    roles=(SAM["bf16"], SGD["bf16"], SAM["fp32"], SGD["fp32"]),
    matched="epochs",
)
def bf16_flattens_less(evidence: Evidence) -> Decision:
    metric = lambda_max(evidence)
    ratios = [ratio_gap(evidence, cell, metric, "bf16") for cell in evidence.cells]
    apart = [
        for_information(mean_ratio(evidence, cell, metric, arms["bf16"], arms["fp32"]))
        for cell in evidence.cells
        for arms in (SAM, SGD)
    ]
    return decide(
        evidence,
        [*ratios, *apart],
        reproduced=every(ratios, SUPPORTS),
        not_reproduced=all(ratio.outcome == CONTRADICTS or within(evidence, ratio, 0.9, 1.1) for ratio in ratios),
    )


@rule("study-two-products-restore-the-gain", roles=(REMEDY, SAM["bf16"]), matched="epochs")
def two_products_restore_the_gain(evidence: Evidence) -> Decision:
    gains = [difference(evidence, cell, ACCURACY, REMEDY, SAM["bf16"]) for cell in evidence.cells]
    cosines = [for_information(mean_cosine(evidence, cell, REMEDY, ABOVE)) for cell in evidence.cells]
    return decide(
        evidence,
        [*gains, *cosines],
        reproduced=every(gains, SUPPORTS),
        not_reproduced=all(gain.outcome == CONTRADICTS or within(evidence, gain, -MARGIN, MARGIN) for gain in gains),
    )


@rule(
    "study-fp16-and-tf32-keep-the-gain",
    roles=tuple(arms[precision] for precision in ("fp16", "tf32", "fp32") for arms in (SAM, SGD)),
    matched="epochs",
)
def fp16_and_tf32_keep_the_gain(evidence: Evidence) -> Decision:
    gaps = [gain_gap(evidence, cell, precision) for cell in evidence.cells for precision in ("fp16", "tf32")]
    if evidence.miniature:
        note(evidence, "that two gains are about equal has no sign, and points do not bind in a miniature")
        return decide(evidence, list(map(for_information, gaps)), reproduced=False, not_reproduced=False)
    gaps = [about_equal(evidence, gap) for gap in gaps]
    return decide(evidence, gaps, reproduced=every(gaps, SUPPORTS), not_reproduced=some(gaps, CONTRADICTS))


def about_equal(evidence: Evidence, gap: Part) -> Part:
    """The same part, which supports the claim wholly inside the margin, and contradicts it wholly outside."""
    outside = gap.high < -MARGIN or gap.low > MARGIN
    inside = within(evidence, gap, -MARGIN, MARGIN)
    return replace(gap, outcome=SUPPORTS if inside else CONTRADICTS if outside else INCONCLUSIVE)


def mean_cosine(evidence: Evidence, cell: str, role: str, claimed: str) -> Part:
    """Mean over seeds, judged against the least cosine."""
    interval = stats.mean(list(scores(evidence, cell, role, COSINE).values()))
    statistic = f"{COSINE} of {role}, mean over seeds"
    trusted = can_conclude(evidence, [cell], [role], interval.n, statistic, MIN_SEEDS)
    return judged_at(LEAST_COSINE, judged_part(cell, statistic, interval, trusted, claimed, None), claimed)


def gain_gap(evidence: Evidence, cell: str, precision: str) -> Part:
    """The gain in a precision less that in fp32, seed by seed."""
    low, full = (paired(evidence, cell, ACCURACY, which, float.__sub__) for which in (precision, "fp32"))
    statistic = f"(sam - sgd) in {precision} - (sam - sgd) in fp32 of {ACCURACY}, paired by seed"
    interval = stats.paired_difference(low, full)
    roles = (SAM[precision], SGD[precision], SAM["fp32"], SGD["fp32"])
    trusted = can_conclude(evidence, [cell], roles, interval.n, statistic, MIN_SEEDS)
    return judged_part(cell, statistic, interval, trusted, BELOW, None)


def ratio_gap(evidence: Evidence, cell: str, metric: str, precision: str) -> Part:
    """The ratio SAM / SGD in a precision over that in fp32, seed by seed, judged against 1."""
    low, full = (paired(evidence, cell, metric, which, ratio) for which in (precision, "fp32"))
    unfit = sorted({seed for side in (low, full) for seed, value in side.items() if math.isnan(value)})
    if unfit:
        note(evidence, f"{cell}: {metric} is not above 0 for seeds {', '.join(map(str, unfit))}")
        low, full = ({s: v for s, v in side.items() if s not in unfit} for side in (low, full))
    interval = stats.geometric_mean_ratio(low, full)
    statistic = f"(sam / sgd) in {precision} / (sam / sgd) in fp32 of {metric}, geometric mean, paired by seed"
    roles = (SAM[precision], SGD[precision], SAM["fp32"], SGD["fp32"])
    trusted = can_conclude(evidence, [cell], roles, interval.n, statistic, MIN_SEEDS) and not unfit
    return judged_at(1, judged_part(cell, statistic, interval, trusted, ABOVE, None), ABOVE)


def paired(
    evidence: Evidence, cell: str, metric: str, precision: str, of: Callable[[float, float], float]
) -> dict[int, float]:
    """seed -> a function of the values of SAM and of SGD, over the seeds that both have."""
    sam, sgd = (scores(evidence, cell, arms[precision], metric) for arms in (SAM, SGD))
    return {seed: of(sam[seed], sgd[seed]) for seed in sam if seed in sgd}


def ratio(a: float, b: float) -> float:
    return a / b if a > 0 and b > 0 else math.nan


def lambda_max(evidence: Evidence) -> str:
    """Its column, on however many images it was taken."""
    named = (name for name in evidence.rows.columns if name.partition("@")[0] == "lambda_max" and ":" not in name)
    return next(named, "lambda_max")
