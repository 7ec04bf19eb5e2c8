"""04: mSAM against SAM and SGD, over the number of shards, with what batch norm does apart, and for part of a training.

Quick profile: the MLP on digits. Learning rate and rho are those of `digits`, equal for SAM and mSAM (erratum E-M3).
Paper: ResNet-50 and WRN-28-10 on CIFAR-10 and CIFAR-100; its pre-trained transformers, ImageNet and GLUE are beyond
this library.
"""

from samlib.experiments import Arm, cifar, digits, measure
from samlib.spec import RunSpec, override

TITLE = "Does averaging SAM over shards of the mini-batch generalise better still?"
PUBLISHED_SCALE = frozenset({"paper"})

CIFAR_100 = ("cifar100_resnet50", "cifar100_wrn")
TABLE_2 = ("cifar10_resnet50", "cifar10_wrn", "cifar100_resnet50", "cifar100_wrn")
DECIDES = {
    "behdin-t2-cifar-order": {"quick": ("clean",), "paper": TABLE_2},
    "behdin-m-sweep-rises-to-32-then-flat": {"quick": ("clean",), "paper": CIFAR_100},
    "behdin-lambda-max-order": {"quick": ("clean",), "paper": CIFAR_100},
    "behdin-hybrid-switching": {"quick": ("clean",), "paper": CIFAR_100},
}

# The paper's mSAM has 32 shards of 16 images, and accuracy is said to stop rising at 64 shards of 8. Four shards of 8
# images play the 32 here, and eight of 4 the 64: half the images of the published shards, because 16 and 8 would be two
# and four shards, and leave a slope two points. Sixteen shards of 2 images are not run: a hidden unit's statistics over
# two images leave of its input the sign.
NUM_SHARDS = 4
SWEEP = {
    "msam half the shards": NUM_SHARDS // 2,
    "msam": NUM_SHARDS,
    "msam twice the shards": 2 * NUM_SHARDS,
}
SWITCHES = (0.2, 0.5, 0.8)  # shares of the training (erratum E-M8)
CELLS = ("clean", "noise40")
FEW_SEEDS = digits.SEEDS[:5]  # where nothing is decided
MEASURES = (measure("lambda_max"),)


def arms(profile: str) -> tuple[Arm, ...]:
    if profile == "gpu":
        return ()
    if profile == "paper":
        return tuple(arm for cell in TABLE_2 for arm in behdin(cell))
    return (*sweep("clean", digits.SEEDS), *controls(), *hybrids(), *sweep("noise40", FEW_SEEDS))


def msam(cell: str, num_shards: int = NUM_SHARDS, **optim: object) -> RunSpec:
    return digits.with_optim(digits.sam(cell), num_shards=num_shards, **optim)


def sweep(cell: str, seeds: tuple[int, ...]) -> tuple[Arm, ...]:
    """SGD, also with as many epochs as SAM has passes; and SAM over the number of shards: SAM itself is one."""
    return (
        Arm("sgd", cell, digits.sgd(cell), seeds, MEASURES),
        Arm("sgd_double", cell, digits.sgd(cell), seeds, MEASURES, epochs_factor=2.0),
        Arm("sam", cell, digits.sam(cell), seeds, MEASURES),
        *(Arm(role, cell, msam(cell, shards), seeds, MEASURES) for role, shards in SWEEP.items()),
    )


def controls() -> tuple[Arm, ...]:
    """The two changes that mSAM makes to SGD, the ascent of each shard and the batch-norm statistics of each shard, one
    without the other (erratum E-M7)."""
    ghost = msam("clean", rho=0.0)  # without a radius there is no ascent: the mean of the shards' gradients at w
    return (
        Arm("sgd ghost batch norm", "clean", ghost, FEW_SEEDS, MEASURES),
        Arm("msam whole-batch norm", "clean", msam("clean", shard_batchnorm="batch"), FEW_SEEDS, MEASURES),
    )


def hybrids() -> tuple[Arm, ...]:
    """mSAM up to a switch and SGD from there, and the other way round."""
    first = [Arm(f"msam first {s:.0%}", "clean", msam("clean", ascent_until=s), digits.SEEDS) for s in SWITCHES]
    last = [Arm(f"msam last {1 - s:.0%}", "clean", msam("clean", ascent_from=s), digits.SEEDS) for s in SWITCHES]
    return (*first, *last)


# num_shards -> role; 32 shards of 16 images are the `msam` of the tables.
PAPER_SWEEP = {
    4: "msam an eighth of the shards",
    8: "msam a quarter of the shards",
    16: "msam half the shards",
    32: "msam",
    64: "msam twice the shards",
}


def behdin(cell: str) -> tuple[Arm, ...]:
    """A cell of Table 2, with SGD at twice the epochs; on CIFAR-100 also the top eigenvalue, the sweep over the number
    of shards, and mSAM for part of the training."""
    data, model = cell.split("_")
    specs = cifar.behdin(data, {"wrn": "wrn28_10"}.get(model, model))
    measures = MEASURES if cell in CIFAR_100 else ()
    arms = [Arm(role, cell, spec, cifar.SEEDS, measures) for role, spec in specs.items()]
    arms.append(Arm("sgd_double", cell, specs["sgd"], cifar.SEEDS, epochs_factor=2.0))
    if cell not in CIFAR_100:
        return tuple(arms)
    others = {role: override(specs["msam"], {"num_shards": shards}) for shards, role in PAPER_SWEEP.items()}
    for share in SWITCHES:
        others[f"msam first {share:.0%}"] = override(specs["msam"], {"ascent_until": share})
        others[f"msam last {1 - share:.0%}"] = override(specs["msam"], {"ascent_from": share})
    return (*arms, *(Arm(role, cell, spec, cifar.SEEDS) for role, spec in others.items() if role != "msam"))
