"""Rules of 04 msam_sweep.

`msam` plays the paper's 32 shards. A contradiction in any cell counts where a rule words it as 'either'.
"""

from collections.abc import Sequence

from samlib.rules.conventions import (
    BELOW,
    CONTRADICTS,
    SUPPORTS,
    Decision,
    Evidence,
    Part,
    arm_rows,
    decide,
    difference,
    every,
    for_information,
    judged_at,
    mean_ratio,
    most,
    rule,
    slope_per_doubling,
    some,
)

ACCURACY = "test_accuracy_pct"
ORDER = ("sgd", "sam", "msam")  # in which the paper prints a row of Table 2
STEPS_UP = (("sam", "sgd"), ("msam", "sam"))


@rule("behdin-t2-cifar-order", roles=("sgd", "sam", "msam", "sgd_double"), matched="epochs")
def msam_beats_sam_beats_sgd(evidence: Evidence) -> Decision:
    gains, at_twice_the_epochs = [], []
    for cell in evidence.cells:
        gains += [
            difference(evidence, cell, ACCURACY, a, b, printed=printed_gain(evidence, cell, a, b)) for a, b in STEPS_UP
        ]
        at_twice_the_epochs += [
            difference(evidence, cell, ACCURACY, a, "sgd_double", name=f"{cell}, SGD at twice the epochs")
            for a in ("sam", "msam")
        ]
    return decide(
        evidence,
        [*gains, *map(for_information, at_twice_the_epochs)],
        reproduced=every(gains, SUPPORTS),
        not_reproduced=some(gains, CONTRADICTS),
    )


def printed_gain(evidence: Evidence, cell: str, a: str, b: str) -> float | None:
    """a - b of the three figures the paper prints for a cell."""
    figures: Sequence[float] = evidence.published.get(cell, ())
    return round(figures[ORDER.index(a)] - figures[ORDER.index(b)], 6) if figures else None


@rule(
    "behdin-m-sweep-rises-to-32-then-flat",
    roles=("sam", "msam half the shards", "msam", "msam twice the shards"),
    matched="epochs and gradient evaluations",
)
def accuracy_rises_and_then_does_not(evidence: Evidence) -> Decision:
    """Flat is 'not better by 0.3 points'. A miniature has no such margin: there a fall counts for the claim, a rise
    against it, and an interval that holds 0 for neither."""
    margin = 0.0 if evidence.miniature else 0.3
    slopes, lasts = [], []
    for cell in evidence.cells:
        points = {num_shards(evidence, cell, role): (cell, role) for role in ("sam", "msam half the shards", "msam")}
        slopes.append(slope_per_doubling(evidence, points, ACCURACY, name=f"{cell}, up to msam"))
        last = difference(evidence, cell, ACCURACY, "msam twice the shards", "msam", name=f"{cell}, beyond msam")
        lasts.append(judged_at(margin, last, BELOW))
    return decide(
        evidence,
        [*slopes, *lasts],
        reproduced=every([*slopes, *lasts], SUPPORTS),
        not_reproduced=some([*slopes, *lasts], CONTRADICTS),
    )


def num_shards(evidence: Evidence, cell: str, role: str) -> float:
    return float(arm_rows(evidence, cell, role)["optim.num_shards"].iloc[0])


@rule("behdin-lambda-max-order", roles=("sgd", "sam", "msam"), matched="epochs")
def each_is_flatter_than_the_one_before(evidence: Evidence) -> Decision:
    ratios = [
        mean_ratio(evidence, cell, "lambda_max", a, b, claimed=BELOW) for cell in evidence.cells for a, b in STEPS_UP
    ]
    return decide(evidence, ratios, reproduced=every(ratios, SUPPORTS), not_reproduced=some(ratios, CONTRADICTS))


HYBRIDS = (
    "msam first 20%",
    "msam first 50%",
    "msam first 80%",
    "msam last 80%",
    "msam last 50%",
    "msam last 20%",
)


@rule("behdin-hybrid-switching", roles=("sgd", *HYBRIDS), matched="epochs")
def part_time_msam_beats_sgd(evidence: Evidence) -> Decision:
    """What the statement says of full-time mSAM and of SAM the rule leaves out: the page shows it."""
    gains: list[Part] = [
        difference(evidence, cell, ACCURACY, hybrid, "sgd") for cell in evidence.cells for hybrid in HYBRIDS
    ]
    return decide(evidence, gains, reproduced=every(gains, SUPPORTS), not_reproduced=most(gains, CONTRADICTS))
