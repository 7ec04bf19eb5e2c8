"""The decision rules: one module per experiment, and the conventions that all of them share.

RULES: claim id -> its rule, a function of the frame of an experiment and of whether it is a miniature.
"""

from samlib.rules import (
    asam_without_batchnorm,
    asymmetry,
    batch_size,
    mode_connectivity,
    msam_sweep,
    optimizer_table,
    precision,
    sam_by_hand,
    sam_vs_sgd,
)
from samlib.rules.conventions import RULES

__all__ = [
    "RULES",
    "asam_without_batchnorm",
    "asymmetry",
    "batch_size",
    "mode_connectivity",
    "msam_sweep",
    "optimizer_table",
    "precision",
    "sam_by_hand",
    "sam_vs_sgd",
]
