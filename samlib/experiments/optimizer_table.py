"""07: the optimiser table of boca2023 (Table 1) in miniature: SGD, SAM and average SAM, small and near-full batch.

Every arm of the table stands in one cell, since the claims compare across batch sizes. A role without a word on the
batch has the small one (published: 128), `large` the near-full one (published: 5000). The models of `table_arm` are
what experiments 05 and 06 measure: the same spec has the same key and is trained once.
"""

import dataclasses

from samlib.experiments import Arm, digits
from samlib.spec import MeasureSpec, RunSpec

TITLE = "Which optimiser, which batch, which radius?"
PUBLISHED_SCALE = frozenset({"paper"})

TABLE, SHORT, EQUAL_UPDATES = "table", "short training", "equal updates"

DECIDES = {
    "boca-t1-128sam-beats-sgd": {"quick": (TABLE,)},
    "boca-t1-best-rho": {"quick": (TABLE,)},
    "boca-sgd400-not-better": {"quick": (TABLE,)},
    "boca-avg-sam-not-better-than-sgd": {"quick": (TABLE,)},
    "boca-5000-sam-not-better": {"quick": (TABLE,)},
    "boca-5000-avg-lowest-train-loss": {"quick": (TABLE,)},
    "boca-short-training-mobilenetv3-sam-worse": {"quick": (SHORT,)},  # a small network has no counterpart here
}

LARGE_BATCH = digits.TABLE.data.train_size  # one step an epoch
LARGE_RHO = (0.05, 0.1)  # the paper trains no 5000-SAM at 0.2
UPDATES_RATIO = LARGE_BATCH // digits.TABLE.train.batch_size  # steps an epoch of the small batch
EQUAL_UPDATES_SEEDS = digits.SEEDS[:5]  # dear, and decides nothing
SHORT_FACTOR = 0.25  # of the epochs; the paper's short trainings have 20 to 50 of 200

SGD = digits.sgd("table")


def _sam(rho: float) -> RunSpec:
    return digits.with_optim(SGD, method="sam", rho=rho)


def _average_sam(rho: float) -> RunSpec:
    return digits.with_optim(SGD, method="average_sam", rho=rho)


def _large(spec: RunSpec) -> RunSpec:
    return digits.with_batch(spec, LARGE_BATCH)


# role -> spec, in the order of the paper's table; `sgd_large` is the baseline it lacks (E-B11).
SPECS = {
    "sgd": SGD,
    **{f"sam rho={rho:g}": _sam(rho) for rho in digits.TABLE_RHO},
    **{f"average_sam rho={rho:g}": _average_sam(rho) for rho in digits.TABLE_AVERAGE_RHO},
    "sgd_large": _large(SGD),
    **{f"sam_large rho={rho:g}": _large(_sam(rho)) for rho in LARGE_RHO},
    **{f"average_sam_large rho={rho:g}": _large(_average_sam(rho)) for rho in digits.TABLE_AVERAGE_RHO},
}
ROLES = tuple(SPECS)


def table_arm(role: str, measures: tuple[MeasureSpec, ...] = (), cell: str = TABLE) -> Arm:
    """A row of the table, for whoever measures its models: `table_arm("sam rho=0.1", (measure("lambda_max"),))`."""
    return Arm(role, cell, SPECS[role], digits.SEEDS, measures)


def sgd_double(measures: tuple[MeasureSpec, ...] = (), cell: str = TABLE) -> Arm:
    """SGD at the small batch with twice the epochs: as many gradients as SAM."""
    return Arm("sgd_double", cell, SGD, digits.SEEDS, measures, epochs_factor=2.0)


def arms(profile: str) -> tuple[Arm, ...]:
    if profile != "quick":
        return ()
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
