"""03: SAM and ASAM in a network without batch norm, at the published radii and at tuned ones, and SAM and ASAM with it.

Quick profile: few clean digits, and the small convolutional network of 01, because the claims are about a first
convolution. From the authors' code (errata E-C6, E-C8): momentum 0.9 without Nesterov, cosine schedule, weight decay
0.0005, inputs in [0, 1], radii 0.05 and 0.5, and an ASAM that scales every tensor by |w| alone, with eta 0. That is
sound: a weight of exactly 0 is then not perturbed, and nothing is divided by |w|. Gpu and paper: experiment C of
coldenhoff2022.
"""

import dataclasses
import math

from samlib.experiments import Arm, AtPublishedScale, cifar, measure, tuning
from samlib.experiments.tuning import Choice
from samlib.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec, override

TITLE = "Without batch norm, is ASAM as good as SAM?"
PUBLISHED_SCALE = frozenset({"paper"})

# The claims say "rho 0.05 / 0.5 first, and each at its own best rho": both cells decide, and a rule has to be met in
# each. Tails are compared between networks, at the published radii alone.
C = AtPublishedScale(("published",))
# The cell "tuned" of gpu joins C_GPU, but for the claim about spread, with the radii of `GPU_RHO`: before the first
# record of C at the published radii is committed, or not at all, since a binding must not be younger than its records.
C_GPU = C
DECIDES = {
    "coldenhoff-c-asam-vs-sam-accuracy": {"quick": ("published", "tuned"), "gpu": C_GPU, "paper": C},
    "coldenhoff-c-train-loss-gap": {"quick": ("published", "tuned"), "gpu": C_GPU, "paper": C},
    "coldenhoff-c-heavier-tails": {"quick": ("published",), "gpu": C, "paper": C},
    "coldenhoff-c-asam-lower-variance": {"quick": ("published", "tuned"), "gpu": C, "paper": C},
    "coldenhoff-c-late-descent": {"quick": ("published", "tuned"), "gpu": C_GPU, "paper": C},
}

SEEDS = tuple(range(10))
CURVES = ("train_loss", "test_accuracy_pct")
MEASURES = (measure("first_layer_kurtosis"),)

# Images, batch, epochs and evaluations are those of the setting `clean` of 01.
WITHOUT = RunSpec(
    data=DataSpec("digits", train_size=100, validation_size=200, scaling="unit"),
    model=ModelSpec("cnn", norm="none"),
    optim=OptimSpec(eta=0.0),
    train=TrainSpec(epochs=100, batch_size=32, eval_every=5),
)

# Chosen by the rule of `tuning` without batch norm: the learning rate for SGD, then each rho at that rate. A grid of
# rho begins at half the published value and goes up by doublings. With batch norm nothing is tuned again.
LR = 0.05
RHO = {"published": {"sam": 0.05, "asam": 0.5}, "tuned": {"sam": 0.1, "asam": 2.0}}
LR_GRID = (0.0125, 0.025, 0.05, 0.1, 0.2)
RHO_GRID = {"sam": (0.025, 0.05, 0.1, 0.2, 0.4), "asam": (0.25, 0.5, 1.0, 2.0, 4.0)}


def _with(**optim: object) -> RunSpec:
    return dataclasses.replace(WITHOUT, optim=dataclasses.replace(WITHOUT.optim, **optim))


def _rho(method: str) -> Choice:
    return Choice("tuned", _with(method=method, lr=LR), "optim.rho", RHO_GRID[method], RHO["tuned"][method])


TUNING = (Choice("tuned", WITHOUT, "optim.lr", LR_GRID, LR), _rho("sam"), _rho("asam"))

# Gpu: the radii are chosen by the same rule from the same grid, on 5,000 held-out images, in an eighth of the epochs.
# As long as those runs have not been made no radius stands here, and no arm is declared at one: both come in one commit
# with the records of the choice.
GPU_RHO: dict[str, float] = {}
GPU_TUNING_BASE = override(cifar.without_norm("gpu"), {"validation_size": 5000, "epochs": 25})
GPU_TUNING = tuple(
    Choice("gpu", override(GPU_TUNING_BASE, {"method": method}), "optim.rho", grid, GPU_RHO.get(method, math.nan))
    for method, grid in RHO_GRID.items()
)


def arms(profile: str) -> tuple[Arm, ...]:
    if profile == "gpu":
        return (*choice_of_rho(), *coldenhoff(profile), *coldenhoff_tuned())
    if profile == "paper":
        return coldenhoff(profile)
    return (*without("published"), *with_batchnorm("published"), *without("tuned"), *tuning.arms(TUNING))


def without(cell: str) -> tuple[Arm, ...]:
    """SGD, SAM and ASAM without batch norm; SGD, which has no radius, is the same run in every cell."""
    sgd = Arm("sgd", cell, _with(lr=LR), SEEDS, MEASURES)
    rivals = [(method, _with(method=method, lr=LR, rho=rho)) for method, rho in RHO[cell].items()]
    return (sgd, *(Arm(method, cell, base, SEEDS, MEASURES, curves=CURVES) for method, base in rivals))


def with_batchnorm(cell: str) -> tuple[Arm, ...]:
    """SAM and ASAM with batch norm, and all else as without."""
    model = dataclasses.replace(WITHOUT.model, norm="batch")
    return tuple(
        Arm(
            f"{method}_batchnorm",
            cell,
            dataclasses.replace(_with(method=method, lr=LR, rho=rho), model=model),
            SEEDS,
            MEASURES,
        )
        for method, rho in RHO[cell].items()
    )


def choice_of_rho() -> tuple[Arm, ...]:
    return tuple(dataclasses.replace(arm, priority=cifar.CHOICE_OF_RHO) for arm in tuning.arms(GPU_TUNING))


def coldenhoff(profile: str) -> tuple[Arm, ...]:
    """Experiment C, and its methods in the network with batch norm, whose weights Figure 3 shows beside."""
    seeds, few = cifar.WITHOUT_NORM_SEEDS, cifar.WITHOUT_NORM_SEEDS[: cifar.OWN]
    found = []
    for method, rho in RHO["published"].items():
        bare, normalised = (
            override(spec, {"method": method, "rho": rho})
            for spec in (cifar.without_norm(profile), cifar.with_norm(profile))
        )
        found += [
            Arm(method, "published", bare, seeds, MEASURES, curves=CURVES, priority=cifar.WITHOUT_NORM),
            Arm(f"{method}_batchnorm", "published", normalised, few, MEASURES, priority=cifar.WITH_NORM),
        ]
    return tuple(found)


def coldenhoff_tuned() -> tuple[Arm, ...]:
    """C at the radii chosen on gpu; none before they have been."""
    seeds, priority = cifar.WITHOUT_NORM_SEEDS[:5], cifar.WITHOUT_NORM
    specs = {m: override(cifar.without_norm("gpu"), {"method": m, "rho": rho}) for m, rho in GPU_RHO.items()}
    return tuple(Arm(m, "tuned", spec, seeds, curves=CURVES, priority=priority) for m, spec in specs.items())
