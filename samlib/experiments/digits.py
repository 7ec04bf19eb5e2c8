"""The settings of the quick profile that experiments 02 and 04 to 07 share: a small MLP with batch norm on digits.

The MLP and not the CNN of experiment 01, because a step takes a quarter of the time: that is ten seeds for each of six
experiments within minutes. The sizes (images, batch, epochs) were set before any of these experiments had run: CLEAN
and NOISY are those of experiment 01; TABLE has as many images as leave a near-full batch and a small one far apart.
"""

import dataclasses

from samlib.experiments.tuning import Choice
from samlib.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec

SEEDS = tuple(range(10))
MLP = ModelSpec("mlp", width=64)


def with_optim(spec: RunSpec, **optim: object) -> RunSpec:
    return dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, **optim))


def with_batch(spec: RunSpec, batch_size: int, epochs: int | None = None) -> RunSpec:
    """Another batch size and, where given, another number of epochs."""
    train = dataclasses.replace(spec.train, batch_size=batch_size, epochs=epochs or spec.train.epochs)
    return dataclasses.replace(spec, train=train)


# Few clean images: on many, digits leave nothing to gain.
CLEAN = RunSpec(
    data=DataSpec("digits", train_size=100, validation_size=200),
    model=MLP,
    train=TrainSpec(epochs=100, batch_size=32, eval_every=10),
)
# The same with the optimiser of coldenhoff2022: no momentum, constant rate.
PLAIN = with_optim(CLEAN, momentum=0.0, schedule="constant")
# Many images, of which four in ten carry a wrong label.
NOISY = RunSpec(
    data=DataSpec("digits", train_size=600, validation_size=200, label_noise=0.4),
    model=MLP,
    train=TrainSpec(epochs=40, batch_size=128, eval_every=4),
)
# Clean images, a batch of 16 beside one of all 300: the table of boca2023 and what is measured on its models. With its
# optimiser: Nesterov momentum, and in every method the gradient that the update uses is clipped (erratum E-B25).
TABLE = RunSpec(
    data=DataSpec("digits", train_size=300, validation_size=200),
    model=MLP,
    optim=OptimSpec(nesterov=True, clip="descent", clip_norm=5.0),
    train=TrainSpec(epochs=40, batch_size=16, eval_every=10),
)

# Learning rates are chosen by the rule of `tuning`, for SGD on clean data; SAM and the noisy setting inherit them, as
# in the papers. Radii are the papers' own where the setting is a paper's (coldenhoff2022's code, behdin2023's rows on
# CIFAR, boca2023's table); on clean digits four dev seeds cannot tell one from another. The noisy setting is no
# paper's, and its radius is chosen by the rule.
LR = {"clean": 0.05, "plain": 1.6, "noise40": 0.05, "table": 0.0125}
RHO = {"clean": 0.2, "plain": 0.05, "noise40": 0.8}
TABLE_RHO = (0.05, 0.1, 0.2)
TABLE_AVERAGE_RHO = (0.5, 1.0)  # of average SAM
LR_GRID = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
TABLE_LR_GRID = (0.00625, *LR_GRID[:-1])
PLAIN_LR_GRID = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
NOISY_RHO_GRID = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
BASES = {"clean": CLEAN, "plain": PLAIN, "noise40": NOISY, "table": TABLE}


def _lr(cell: str) -> Choice:
    grid = {"plain": PLAIN_LR_GRID, "table": TABLE_LR_GRID}.get(cell, LR_GRID)
    return Choice(cell, BASES[cell], "optim.lr", grid, LR[cell])


def sgd(cell: str) -> RunSpec:
    """SGD at the learning rate of a setting."""
    return with_optim(BASES[cell], lr=LR[cell])


def sam(cell: str, rho: float | None = None) -> RunSpec:
    """SAM at the learning rate of a setting, and at its rho or another."""
    return with_optim(sgd(cell), method="sam", rho=RHO[cell] if rho is None else rho)


TUNING = (
    _lr("clean"),
    _lr("plain"),
    _lr("table"),
    Choice("noise40", sam("noise40", RHO["noise40"]), "optim.rho", NOISY_RHO_GRID, RHO["noise40"]),
)
