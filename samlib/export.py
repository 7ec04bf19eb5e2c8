"""The records of a profile as flat CSV files, with a data dictionary: for readers who work in another language."""

from pathlib import Path

import pandas as pd

from samlib import experiments
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.spec import CheckSpec, RunSpec
from samlib.store import Store

COLUMNS = {
    "experiment": "stem of the experiment that declares the run",
    "cell": "setting shared by the arms that are compared with each other",
    "role": "name of the arm in the decision rules",
    "seed": "seed of the data split, the noise, the initial weights and the order of the batches",
    "key": "hash of the spec; the record is records/<key>.json",
    "status": "done, diverged, failed, stale (made by older code) or missing",
    "wall_seconds": "time of the run, on the machine that the record names [s]",
    "epoch": "passes over the training images",
    "step": "updates of the weights",
    "lr": "learning rate of the last update of the epoch",
    "running_loss": "mean over the epoch of the logged training loss, smoothing and all [nat]",
    "train_loss": "mean cross entropy of the training images with the labels trained on, eval mode [nat]",
    "train_accuracy_pct": "accuracy on the training images, against the labels trained on [%]",
    "validation_loss": "mean cross entropy of the validation images, clean labels [nat]",
    "validation_accuracy_pct": "accuracy on the validation images, clean labels [%]",
    "test_loss": "mean cross entropy of the test images [nat]",
    "test_accuracy_pct": "accuracy on the test images [%]",
    "perturbation_norm_ratio": "norm of the perturbation that acts at the run's precision, over that of eps",
    "perturbation_cosine": "cosine between the perturbation that acts and eps",
    "perturbation_unmoved_fraction": "share of the perturbed weights that eps does not move at the run's precision",
    "lambda_max": "largest eigenvalue of the Hessian of the training loss, eval mode",
    "adversarial_sharpness": "rise of the training loss at the ascent point of norm rho",
    "check": "name of the exact check in samlib.checks",
}
EPOCH_SUFFIXES = {
    "best_test": "at the epoch of highest test accuracy (the choice some papers report; it has seen the test set)",
    "best_validation": "at the epoch of highest validation accuracy (early stopping)",
}


def export(profile: str, store: Store, folder: Path) -> list[Path]:
    """Writes runs.csv (one row per run), checks.csv, history.csv (one row per evaluated epoch) and columns.csv.

    Raises:
        InputError: the store has no records of this profile, or the folder cannot be written.
    """
    if not store.recorded():
        raise InputError(f"store = {store.folder} has no records: run the profile first, or name another store")
    tables = {
        "runs": _tables(profile, store.frame, RunSpec),
        "checks": _tables(profile, store.frame, CheckSpec),
        "history": _tables(profile, store.history, RunSpec),
    }
    tables = {name: table for name, table in tables.items() if len(table)}
    names = dict.fromkeys(column for table in tables.values() for column in table.columns)
    tables["columns"] = pd.DataFrame({"column": list(names), "meaning": [describe(name) for name in names]})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.csv" for name in tables]
        for path, table in zip(paths, tables.values(), strict=True):
            table.to_csv(path, index=False)
    except OSError as error:
        raise InputError(f"folder = {folder} cannot be written ({error.strerror}): name another") from error
    return paths


def describe(column: str) -> str:
    """One entry of the data dictionary."""
    documented = COLUMNS | specs_of.documentation(RunSpec)
    head, _, rest = column.partition("@")
    head, _, companion = head.partition(":")
    meaning = documented.get(head, f"value of the exact check: {head.replace('_', ' ')}")
    companion = rest.partition(":")[2] or companion
    if rest in EPOCH_SUFFIXES:
        return f"{meaning}, {EPOCH_SUFFIXES[rest]}" if head != "epoch" else f"epoch {EPOCH_SUFFIXES[rest]}"
    taken = f"; measured with {rest.partition(':')[0].replace('@', ', ')}" if rest else ""
    return f"{companion.replace('_', ' ')} of: {meaning}{taken}" if companion else f"{meaning}{taken}"


def _tables(profile: str, read, kind: type) -> pd.DataFrame:
    found = []
    for stem in experiments.STEMS:
        arms = [arm for arm in experiments.arms(stem, profile) if isinstance(arm.base, kind)]
        table = read(arms)
        if len(table):
            table.insert(0, "experiment", stem)
            found.append(table)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
