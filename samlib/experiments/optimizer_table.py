"""07: the optimiser table of boca2023 (Table 1) in miniature: SGD, SAM and average SAM, small and near-full batch.

Every arm of the table stands in one cell, since the claims compare across batch sizes. A role without a word on the
batch has the small one (published: 128), `large` the near-full one (published: 5000). The models of `table_arm` are
what experiments 05 and 06 measure: the same spec has the same key and is trained once.

Gpu and paper: MobileNetV2 on CIFAR-10. Paper: 200 epochs, as published. Gpu: a tenth of that, which leaves a batch of
5000 200 updates in place of 2,000. An epoch of all rows takes 23.7 s by the conservative estimate for an H200 (SGD and
average SAM 1.3 s, SAM 2.6 s, of each row that is there, SGD at twice the epochs included), so that 20 epochs with 5
seeds take 39.5 of the 50 minutes that 05 to 10 have, and the published table would take 79 for a single seed. The
estimate holds activations of 16 bits; where TF32 takes twice that, 3 of the 5 seeds fit. A verdict on gpu about 200
epochs is therefore marked as a miniature. What the paper says of trainings of 20 to 50 epochs is judged by these runs
as it stands.
"""

import dataclasses

from samlib.experiments import Arm, AtPublishedScale, cifar, digits
from samlib.spec import MeasureSpec, RunSpec, override

TITLE = "Which optimiser, which batch, which radius?"
PUBLISHED_SCALE = frozenset({"paper"})

TABLE, SHORT, EQUAL_UPDATES = "table", "short training", "equal updates"
SHORT_TABLE = AtPublishedScale((TABLE,))

DECIDES = {
    "boca-t1-128sam-beats-sgd": {"quick": (TABLE,), "gpu": (TABLE,), "paper": (TABLE,)},
    "boca-t1-best-rho": {"quick": (TABLE,), "gpu": (TABLE,), "paper": (TABLE,)},
    "boca-sgd400-not-better": {"quick": (TABLE,), "gpu": (TABLE,), "paper": (TABLE,)},
    "boca-avg-sam-not-better-than-sgd": {"quick": (TABLE,), "gpu": (TABLE,), "paper": (TABLE,)},
    "boca-5000-sam-not-better": {"quick": (TABLE,), "gpu": (TABLE,), "paper": (TABLE,)},
    "boca-5000-avg-lowest-train-loss": {"quick": (TABLE,), "gpu": (TABLE,), "paper": (TABLE,)},
    # A small network has no counterpart here.
    "boca-short-training-mobilenetv3-sam-worse": {"quick": (SHORT,), "gpu": SHORT_TABLE, "paper": (SHORT,)},
}

LARGE_BATCH = digits.TABLE.data.train_size  # one step an epoch
LARGE_RHO = (0.05, 0.1)  # the paper trains no 5000-SAM at 0.2
UPDATES_RATIO = LARGE_BATCH // digits.TABLE.train.batch_size  # steps an epoch of the small batch
EQUAL_UPDATES_SEEDS = digits.SEEDS[:5]  # dear, and decides nothing
SHORT_FACTOR = 0.25  # of the epochs; the paper's short trainings have 20 to 50 of 200

SGD = digits.sgd("table")
# The test images are looked at in every fourth epoch, since the paper reports the last one; the last, smaller batch of
# an epoch is left out, so that every step has one shape.
GPU_SGD = override(
    cifar.BOCA,
    {
        "precision": cifar.PRECISION["gpu"],
        "epochs": 20,
        "drop_last": True,
        "eval_every": 4,
        "eval_train_every": 20,
    },
)
STOPPED = "as many updates as the large batch"  # a cell


def rows(sgd: RunSpec, large_batch: int) -> dict[str, RunSpec]:
    """role -> spec, in the order of the paper's table; `sgd_large` is the baseline it lacks (E-B11)."""
    sam = {rho: digits.with_optim(sgd, method="sam", rho=rho) for rho in digits.TABLE_RHO}
    average = {rho: digits.with_optim(sgd, method="average_sam", rho=rho) for rho in digits.TABLE_AVERAGE_RHO}
    return {
        "sgd": sgd,
        **{f"sam rho={rho:g}": spec for rho, spec in sam.items()},
        **{f"average_sam rho={rho:g}": spec for rho, spec in average.items()},
        "sgd_large": digits.with_batch(sgd, large_batch),
        **{f"sam_large rho={rho:g}": digits.with_batch(sam[rho], large_batch) for rho in LARGE_RHO},
        **{f"average_sam_large rho={rho:g}": digits.with_batch(spec, large_batch) for rho, spec in average.items()},
    }


SPECS = rows(SGD, LARGE_BATCH)
ROLES = tuple(SPECS)


def table_arm(role: str, measures: tuple[MeasureSpec, ...] = (), cell: str = TABLE) -> Arm:
    """A row of the table, for whoever measures its models: `table_arm("sam rho=0.1", (measure("lambda_max"),))`."""
    return Arm(role, cell, SPECS[role], digits.SEEDS, measures)


def sgd_double(measures: tuple[MeasureSpec, ...] = (), cell: str = TABLE) -> Arm:
    """SGD at the small batch with twice the epochs: as many gradients as SAM."""
    return Arm("sgd_double", cell, SGD, digits.SEEDS, measures, epochs_factor=2.0)


def arms(profile: str) -> tuple[Arm, ...]:
    if profile == "gpu":
        return (*boca(GPU_SGD), *boca_stopped(GPU_SGD), *boca_tf32(GPU_SGD))
    if profile == "paper":
        return (*boca(cifar.BOCA), *boca_stopped(cifar.BOCA), *boca_short(cifar.BOCA))
    return (*map(table_arm, ROLES), sgd_double(), *equal_updates(), *short_training())


def equal_updates() -> tuple[Arm, ...]:
    """The large batch with as many updates as the small one has; it decides nothing (E-B11)."""
    roles = ("sgd_large", "sam_large rho=0.1", "average_sam_large rho=0.5")
    return tuple(
        Arm(role, EQUAL_UPDATES, _scored_once(SPECS[role]), EQUAL_UPDATES_SEEDS, epochs_factor=UPDATES_RATIO)
        for role in roles
    )


def short_training() -> tuple[Arm, ...]:
    roles = ("sgd", *(f"sam rho={rho:g}" for rho in digits.TABLE_RHO))
    return tuple(Arm(role, SHORT, SPECS[role], digits.SEEDS, epochs_factor=SHORT_FACTOR) for role in roles)


def _scored_once(spec: RunSpec) -> RunSpec:
    """Evaluated at the last epoch only: an epoch of one step is cheaper than its evaluation."""
    train = dataclasses.replace(spec.train, eval_every=spec.train.epochs * UPDATES_RATIO)
    return dataclasses.replace(spec, train=train)


def boca(sgd: RunSpec) -> tuple[Arm, ...]:
    """The table with CIFAR-10, and SGD with twice the epochs."""
    specs, seeds, priority = rows(sgd, cifar.BOCA_LARGE_BATCH), cifar.BOCA_SEEDS, cifar.TABLE
    return (
        *(Arm(role, TABLE, spec, seeds, priority=priority) for role, spec in specs.items()),
        Arm("sgd_double", TABLE, sgd, seeds, epochs_factor=2.0, priority=priority),
    )


def boca_stopped(sgd: RunSpec) -> tuple[Arm, ...]:
    """The small batch, over after the updates that the large one makes; it decides nothing (E-B11)."""
    specs = rows(sgd, cifar.BOCA_LARGE_BATCH)
    updates = sgd.train.epochs * cifar.updates_per_epoch(specs["sgd_large"])
    return tuple(
        Arm(role, STOPPED, cifar.stopped(specs[role], updates), cifar.BOCA_SEEDS, priority=cifar.TABLE_BESIDE)
        for role in ("sgd", "sam rho=0.05", "sam rho=0.1", "average_sam rho=0.5", "average_sam rho=1")
    )


def boca_tf32(sgd: RunSpec) -> tuple[Arm, ...]:
    """Two rows in the precision of the authors' code; it decides nothing."""
    specs, seeds = rows(override(sgd, {"precision": "tf32"}), cifar.BOCA_LARGE_BATCH), cifar.BOCA_SEEDS[:3]
    return tuple(
        Arm(role, f"{TABLE}, tf32", specs[role], seeds, priority=cifar.TABLE_BESIDE) for role in ("sgd", "sam rho=0.1")
    )


def boca_short(sgd: RunSpec) -> tuple[Arm, ...]:
    specs = rows(sgd, cifar.BOCA_LARGE_BATCH)
    return tuple(
        Arm(role, SHORT, specs[role], cifar.BOCA_SEEDS, epochs_factor=SHORT_FACTOR)
        for role in ("sgd", *(f"sam rho={rho:g}" for rho in digits.TABLE_RHO))
    )
