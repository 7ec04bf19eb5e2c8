"""01: SAM against SGD at equal epochs, at equal gradient evaluations, and with and without label noise.

Quick profile: scikit-learn's digits; a small convolutional network where claims are decided, and the MLP of `digits`
under label noise, which decides nothing here. How its settings were chosen: `TUNING`. Gpu and
paper: the setting `plain` as coldenhoff2022 ran it. Paper alone: Table 1 of foret2021 with a WRN-28-10; its other
networks and data sets are beyond this library. On gpu it is not run: 30 epochs of a WRN-40-2 in 2 cells with 3 seeds,
at 3.9 s an epoch for SGD, SGD twice as long and SAM together, would take 12 of the 50 minutes that 01 to 03 have.
"""

import dataclasses

from samlib import spec as specs_of
from samlib.experiments import Arm, AtPublishedScale, cifar, digits, measure, tuning
from samlib.experiments.tuning import Choice
from samlib.spec import DataSpec, OptimSpec, RunSpec, TrainSpec

TITLE = "Does SAM generalise better than SGD?"
PUBLISHED_SCALE = frozenset({"paper"})

A = AtPublishedScale(("plain",))
TABLE_1 = (
    "c10_wrn200_basic",
    "c10_wrn200_cutout",
    "c10_wrn200_aa",
    "c10_wrn1800_basic",
    "c10_wrn1800_cutout",
    "c10_wrn1800_aa",
    "c100_wrn200_basic",
    "c100_wrn200_cutout",
    "c100_wrn200_aa",
    "c100_wrn1800_basic",
    "c100_wrn1800_cutout",
    "c100_wrn1800_aa",
)
DECIDES = {
    "coldenhoff-a-sam-beats-sgd-per-seed": {"quick": ("plain",), "gpu": A, "paper": A},
    "coldenhoff-a-equal-gradient-budget": {"quick": ("plain",), "gpu": A, "paper": A},
    "foret-t1-sam-beats-sgd-cifar": {"quick": ("clean",), "paper": TABLE_1},
    "foret-long-sgd-does-not-help": {"quick": ("clean",), "paper": TABLE_1},
    "foret-svhn": {},
    "foret-fashion-mnist": {},
}

SEEDS = tuple(range(10))
MEASURES = (measure("lambda_max"), measure("adversarial_sharpness"))

# Four settings. Clean digits leave little to gain unless training images are few: hence 100 of them. `plain` has the
# optimiser of coldenhoff2022 (no momentum, constant rate), the others that of foret2021 (momentum, cosine).
CLEAN = RunSpec(
    data=DataSpec("digits", train_size=100, validation_size=200),
    train=TrainSpec(epochs=100, batch_size=32, eval_every=5),
)
CELLS = {
    "plain": dataclasses.replace(CLEAN, optim=OptimSpec(momentum=0.0, schedule="constant")),
    "clean": CLEAN,
    "noise20": dataclasses.replace(digits.NOISY, data=dataclasses.replace(digits.NOISY.data, label_noise=0.2)),
    "noise40": digits.NOISY,
}

# Chosen by the rule of `tuning`. First the learning rate, for SGD on clean data; SAM and the noisy settings inherit it,
# as in the papers. Then rho, at that rate. The 20 % setting takes the rho of the 40 % one, untuned. Last a rival the
# papers do not have: SGD whose learning rate was tuned under noise.
LR = {"plain": 0.4, "clean": 0.1, "noise20": digits.LR["noise40"], "noise40": digits.LR["noise40"]}
RHO = {"plain": 0.2, "clean": 0.2, "noise20": digits.RHO["noise40"], "noise40": digits.RHO["noise40"]}
LR_UNDER_NOISE = 0.00625
LR_GRID = (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2)
PLAIN_LR_GRID = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
RHO_GRID = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)


def _with(spec: RunSpec, **optim: object) -> RunSpec:
    return dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, **optim))


def _rho(cell: str) -> Choice:
    return Choice(cell, _with(CELLS[cell], method="sam", lr=LR[cell]), "optim.rho", RHO_GRID, RHO[cell])


TUNING = (
    Choice("plain", CELLS["plain"], "optim.lr", PLAIN_LR_GRID, LR["plain"]),
    _rho("plain"),
    Choice("clean", CELLS["clean"], "optim.lr", LR_GRID, LR["clean"]),
    _rho("clean"),
    Choice("noise40", CELLS["noise40"], "optim.lr", LR_GRID, LR_UNDER_NOISE),
)


def arms(profile: str) -> tuple[Arm, ...]:
    if profile == "gpu":
        return (*coldenhoff(profile), *coldenhoff_tf32())
    if profile == "paper":
        return (*coldenhoff(profile), *(arm for cell in TABLE_1 for arm in foret(cell)))
    return (*(arm for cell in CELLS for arm in comparison(cell)), *tuning.arms(TUNING))


def comparison(cell: str) -> tuple[Arm, ...]:
    """The arms that share a cell: equal epochs, SGD with twice the epochs, SAM with half, and SGD tuned for noise."""
    base = CELLS[cell]
    sgd, sam = _with(base, lr=LR[cell]), _with(base, method="sam", rho=RHO[cell], lr=LR[cell])
    found = [
        Arm("sgd", cell, sgd, SEEDS, MEASURES),
        Arm("sam", cell, sam, SEEDS, MEASURES),
        Arm("sgd_double", cell, sgd, SEEDS, epochs_factor=2.0),
        Arm("sam_half", cell, sam, SEEDS, epochs_factor=0.5),
    ]
    if base.data.label_noise:
        found.append(Arm("sgd_tuned", cell, _with(base, lr=LR_UNDER_NOISE), SEEDS))
    return tuple(found)


def coldenhoff(profile: str) -> tuple[Arm, ...]:
    """Experiment A: SGD and SAM at equal epochs, which 02 shares with ten seeds, and at equal gradient evaluations."""
    specs, first = cifar.plain(profile), cifar.PLAIN_FIRST
    return (
        *(Arm(role, "plain", spec, cifar.PLAIN_SEEDS, priority=first) for role, spec in specs.items()),
        Arm("sam_half", "plain", specs["sam"], cifar.PLAIN_SEEDS[:5], epochs_factor=0.5, priority=first),
        Arm(
            "sgd_double",
            "plain",
            specs["sgd"],
            cifar.PLAIN_SEEDS[: cifar.OWN],
            epochs_factor=2.0,
            priority=cifar.BESIDE,
        ),
    )


def coldenhoff_tf32() -> tuple[Arm, ...]:
    """SAM in TF32, which PyTorch's convolutions take by default; it decides nothing."""
    seeds, sam = cifar.PLAIN_SEEDS[: cifar.OWN], specs_of.override(cifar.plain("gpu")["sam"], {"precision": "tf32"})
    return (Arm("sam", "plain, tf32", sam, seeds, priority=cifar.BESIDE),)


def foret(cell: str) -> tuple[Arm, ...]:
    """A cell of Table 1: SGD for E and for 2E epochs, the better of which the paper prints, and SAM for E."""
    data, model, augment = cell.split("_")
    specs = cifar.foret(data.replace("c", "cifar"), int(model.removeprefix("wrn")), augment)
    arms = [Arm(role, cell, spec, cifar.SEEDS) for role, spec in specs.items()]
    return (*arms, Arm("sgd_double", cell, specs["sgd"], cifar.SEEDS, epochs_factor=2.0))
