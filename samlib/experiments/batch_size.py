"""02: SGD and SAM at three batch sizes, at equal epochs and at equal numbers of updates.

Quick profile: scikit-learn's digits and a small MLP; learning rates and radii are those of `digits`, the same at every
batch size, as in the paper. Gpu and paper: experiment B of coldenhoff2022.
"""

import dataclasses
from collections.abc import Mapping

from samlib.experiments import Arm, AtPublishedScale, cifar, digits, measure, tuning
from samlib.spec import RunSpec

TITLE = "Does a large batch hurt, and does SAM make up for it?"
PUBLISHED_SCALE = frozenset({"paper"})

# 10, 50 and all of 100 images stand for 16, 64 and 128 of 50,000, as 1 to 5 to 10 for 1 to 4 to 8: of the sizes that
# divide 100 the nearest to that, so that an epoch is the same images at every size. Fixed before any of them had run.
EQUAL_EPOCHS = {"batch=10": 10, "batch=50": 50, "batch=100": 100}
# As many updates as the smallest batch has: one reason why the larger ones could be worse is taken away.
EQUAL_UPDATES = {"batch=10": 10, "batch=50, equal updates": 50, "batch=100, equal updates": 100}
# For information: equal epochs at a learning rate of which the smallest batch has no reason to suffer.
SMALL_LR = 0.1
SMALL_LR_CELLS = {"lr=0.1, batch=10": 10, "lr=0.1, batch=50": 50, "lr=0.1, batch=100": 100}
# For information: the noisy setting at equal epochs, and with as many updates as at the batch of 128 it was tuned for.
NOISY_EPOCHS = {"noise40, batch=16": 16, "noise40, batch=128": 128, "noise40, batch=300": 300}
NOISY_UPDATES = {
    "noise40, batch=16, equal updates": 16,
    "noise40, batch=128": 128,
    "noise40, batch=300, equal updates": 300,
}

# Gpu and paper: the sizes of the authors' code (E-C7).
CIFAR_SIZES = {"batch=16": 16, "batch=64": 64, "batch=128": 128}
# For information: each size for the 39,000 updates that a batch of 128 makes in 100 epochs.
CIFAR_UPDATES = {"batch=16, equal updates": 16, "batch=64, equal updates": 64}
CIFAR = AtPublishedScale(CIFAR_SIZES)

DECIDES = {
    "coldenhoff-b-small-batch-better": {"quick": tuple(EQUAL_EPOCHS), "gpu": CIFAR, "paper": CIFAR},
    "coldenhoff-b-sam-gain-5-to-10": {"quick": tuple(EQUAL_EPOCHS), "gpu": CIFAR, "paper": CIFAR},
    "coldenhoff-b-sam-lower-variance": {"quick": tuple(EQUAL_EPOCHS), "gpu": CIFAR, "paper": CIFAR},
    "coldenhoff-b-sam-mitigates-large-batch": {"quick": tuple(EQUAL_EPOCHS), "gpu": CIFAR, "paper": CIFAR},
    "coldenhoff-b-low-train-loss-not-better": {"quick": tuple(EQUAL_EPOCHS), "gpu": CIFAR, "paper": CIFAR},
    "coldenhoff-b-loss-curve-variance": {"quick": tuple(EQUAL_EPOCHS), "gpu": CIFAR, "paper": CIFAR},
}

TUNING = digits.TUNING  # of the settings that 02 and 04 to 07 share: run here, as the first of them

FEW_SEEDS = digits.SEEDS[:5]  # where nothing is decided

# Claims about spread are about batch 64 and 128, and need ten seeds there. A run at batch 16 takes eight times as long
# as one at 128: on gpu it has the paper's own seeds.
CIFAR_SEEDS = {
    "gpu": {16: cifar.PLAIN_SEEDS[: cifar.OWN], 64: cifar.PLAIN_SEEDS, 128: cifar.PLAIN_SEEDS},
    "paper": dict.fromkeys((16, 64, 128), cifar.PLAIN_SEEDS),
}
CIFAR_PRIORITY = {16: cifar.BATCH_16, 64: cifar.BATCH_64, 128: cifar.PLAIN_FIRST}


def arms(profile: str) -> tuple[Arm, ...]:
    if profile != "quick":
        return (*coldenhoff(profile), *coldenhoff_equal_updates(profile))
    dense = both("plain", eval_every=2)  # 25 points in the last half of the curve
    longer, small, noisy = both("plain", eval_every=100), both("plain", lr=SMALL_LR), both("noise40")
    return (
        *comparisons(EQUAL_EPOCHS, dense, digits.SEEDS),
        *comparisons(_only_in(EQUAL_UPDATES, EQUAL_EPOCHS), longer, FEW_SEEDS, updates_of=10),
        *comparisons(SMALL_LR_CELLS, small, FEW_SEEDS),
        *comparisons(NOISY_EPOCHS, noisy, FEW_SEEDS),
        *comparisons(_only_in(NOISY_UPDATES, NOISY_EPOCHS), noisy, FEW_SEEDS, updates_of=128),
        *tuning.arms(TUNING),
    )


def panels(profile: str) -> dict[str, tuple[str, ...]]:
    """What the claims are about, by the names of the page's panels: the cells of each, the smallest batch first."""
    if profile != "quick":
        return {"equal epochs": tuple(CIFAR_SIZES), "equal updates": (*CIFAR_UPDATES, "batch=128")}
    return {
        "equal epochs": tuple(EQUAL_EPOCHS),
        "equal updates": tuple(EQUAL_UPDATES),
        "equal epochs, small rate": tuple(SMALL_LR_CELLS),
    }


def both(setting: str, eval_every: int | None = None, lr: float | None = None) -> dict[str, RunSpec]:
    """role -> spec of SGD and of SAM in a setting of `digits`."""
    found = {"sgd": digits.sgd(setting), "sam": digits.sam(setting)}
    if lr is not None:
        found = {role: digits.with_optim(spec, lr=lr) for role, spec in found.items()}
    if eval_every is not None:
        found = {
            role: dataclasses.replace(spec, train=dataclasses.replace(spec.train, eval_every=eval_every))
            for role, spec in found.items()
        }
    return found


def comparisons(
    cells: Mapping[str, int], methods: Mapping[str, RunSpec], seeds: tuple[int, ...], updates_of: int | None = None
) -> tuple[Arm, ...]:
    """Every method in every cell, at the batch size of the cell; at equal epochs, or for as many updates as a batch of
    `updates_of` images makes in them, to the whole epoch."""
    found = []
    for cell, size in cells.items():
        for role, base in methods.items():
            factor = 1.0 if updates_of is None else updates(base, updates_of) / updates(base, size)
            spec = digits.with_batch(base, size)
            found.append(Arm(role, cell, spec, seeds, (measure("lambda_max"),), factor, curves=("running_loss",)))
    return tuple(found)


def updates(spec: RunSpec, batch_size: int) -> int:
    """Updates per epoch at a batch size; images left over are left out."""
    return spec.data.train_size // batch_size


def _only_in(cells: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    return {cell: size for cell, size in cells.items() if cell not in others}


def coldenhoff(profile: str) -> tuple[Arm, ...]:
    """Experiment B: equal epochs; the arms at batch 128 are those of 01."""
    return tuple(
        Arm(
            role,
            cell,
            digits.with_batch(spec, size),
            CIFAR_SEEDS[profile][size],
            curves=("running_loss",),
            priority=CIFAR_PRIORITY[size],
        )
        for cell, size in CIFAR_SIZES.items()
        for role, spec in cifar.plain(profile).items()
    )


def coldenhoff_equal_updates(profile: str) -> tuple[Arm, ...]:
    total = cifar.PLAIN.train.epochs * cifar.updates_per_epoch(cifar.PLAIN)
    return tuple(
        Arm(
            role,
            cell,
            cifar.stopped(digits.with_batch(spec, size), total),
            cifar.PLAIN_SEEDS[: cifar.OWN],
            priority=cifar.BESIDE,
        )
        for cell, size in CIFAR_UPDATES.items()
        for role, spec in cifar.plain(profile).items()
    )
