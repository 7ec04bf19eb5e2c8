"""06: are the minima that SAM and SGD find joined by a chain of low loss? (boca2023, section 5.1, Figures 2 and 8)

The models are those of 07. A chain joins a model of seed s to a second run on the same images from another
initialisation: two runs from one initialisation have no barrier on the straight line, and nothing is left to join. The
noisy setting has no chain: under wrong labels the bend lowers the training loss by memorising them.

The settings of the chain were fixed before any test loss along a chain had been seen: 400 steps of 64 images, the l2
term of the trainings, and of the learning rates 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2 the one with the
lowest training barrier, in the worst of the four pairs on the worst of the dev seeds 100 to 103. The learning rate of
the models was halved later; the same trials again took the same value.
"""

import dataclasses
from collections.abc import Mapping

from samlib.experiments import Arm, Pair, digits, optimizer_table, path
from samlib.spec import ConnectSpec

TITLE = "Are the minima of SAM and SGD connected?"
PUBLISHED_SCALE = frozenset({"paper"})

DECIDES = {"boca-mode-connectivity-test-barrier": {"quick": ("chain", "line")}}

MODELS, CHAIN, LINE = "models", "chain", "line"
PUBLISHED, EQUAL_EPOCHS = "as published", "equal epochs"
PLANE, PUBLISHED_PLANE = "plane", "plane as published"

LR = 0.2
GRID = 21
PLANE_SEEDS = digits.SEEDS[:1]  # one picture

SAM = optimizer_table.table_arm("sam rho=0.2", cell=MODELS)  # 128-SAM
SGD = optimizer_table.sgd_double(cell=MODELS)  # 128-SGD, 400 epochs
# 5000-SAM, with as many updates as the small batch makes. With as many epochs it is no minimum of the training loss,
# and a path to it joins no two minima: that one is shown for information.
UNTRAINED = optimizer_table.table_arm("sam_large rho=0.1")
LARGE = dataclasses.replace(
    next(arm for arm in optimizer_table.equal_updates() if arm.role == UNTRAINED.role), cell=MODELS
)

# role -> the two arms that are joined: the pairs of the claim, then its controls.
NAMED = {"sam_to_sgd": (SAM, SGD), "sam_to_large": (SAM, LARGE)}
CONTROLS = {"sgd_to_sgd": (SGD, SGD), "sam_to_sam": (SAM, SAM)}
PAIRS = NAMED | CONTROLS


def arms(profile: str) -> tuple[Arm, ...]:
    if profile != "quick":
        return ()
    first = {"sam_to_sgd": PAIRS["sam_to_sgd"]}
    return (
        SAM,
        SGD,
        LARGE,
        *pairs(CHAIN, path(lr=LR)),
        *pairs(LINE, path(shape="line", lr=LR)),
        *pairs(PUBLISHED, path(lr=LR, test_labels="shifted", end="random"), first),  # E-B4 and E-B5
        *pairs(EQUAL_EPOCHS, path(lr=LR), {"sam_to_large": (SAM, UNTRAINED)}, digits.SEEDS[:5]),
        *pairs(PLANE, path(lr=LR, grid=GRID), first, PLANE_SEEDS),
        *pairs(PUBLISHED_PLANE, path(lr=LR, grid=GRID, test_labels="shifted", end="random"), first, PLANE_SEEDS),
    )


def pairs(
    cell: str,
    template: ConnectSpec,
    joined: Mapping[str, tuple[Arm, Arm]] = PAIRS,
    seeds: tuple[int, ...] = digits.SEEDS,
) -> tuple[Pair, ...]:
    return tuple(Pair(role, cell, template, seeds, start=start, end=end) for role, (start, end) in joined.items())
