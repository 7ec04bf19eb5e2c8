"""The records of a profile as flat CSV files, with a data dictionary: for readers who work in another language."""

import dataclasses
from pathlib import Path

import pandas as pd

from samlib import experiments
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.spec import CheckSpec, ConnectSpec, MeasureSpec, RunSpec
from samlib.store import Store

COLUMNS = {
    "experiment": "stem of the experiment that declares the run",
    "cell": "setting shared by the arms that are compared with each other",
    "role": "name of the arm in the decision rules",
    "seed": "seed of the data split, the noise, the initial weights and the order of the batches; "
    "of a check: of every random number in it; of a path: of the run it starts at, of t and of the batches of its bend",
    "split_seed": "seed of the data split and the noise, where it is not that of the run: a second run on its images",
    "key": "hash of the spec; the record is records/<key>.json",
    "status": "done, diverged (loss or weights not finite), failed, stale (made by older code) or missing",
    "wall_seconds": "time of the run, on the machine that the record names [s]",
    "half_weights": "how many of the measures in the row, or whether the path (1), were taken of weights that had been "
    "rounded to half precision to be carried from one machine to another",
    # what is evaluated during training
    "epoch": "passes over the training images so far",
    "step": "updates of the weights so far",
    "lr": "learning rate of the last update of the epoch",
    "running_loss": "mean over the epoch's updates of the logged training loss, smoothing and all [nat]",
    "train_loss": "mean cross entropy of the training images with the labels trained on, eval mode [nat]",
    "train_accuracy_pct": "accuracy on the training images, against the labels trained on [%]",
    "validation_loss": "mean cross entropy of the validation images, clean labels [nat]",
    "validation_accuracy_pct": "accuracy on the validation images, clean labels [%]",
    "test_loss": "mean cross entropy of the test images [nat]",
    "test_accuracy_pct": "accuracy on the test images [%]",
    "skipped_steps": "fp16: steps so far that were skipped, because a gradient was not finite",
    # what acts of the perturbation, round(w + eps) - round(w), at the weights the run ended with
    "perturbation_norm_ratio": "norm of the perturbation that acts at the run's precision, over that of eps",
    "perturbation_cosine": "cosine between the perturbation that acts and eps; 0 if nothing acts",
    "perturbation_unmoved_fraction": "share of all weights, those left out of the perturbation among them, whose value "
    "at the run's precision eps does not change",
    # measures of a trained model
    "lambda_max": "runs: largest (not largest absolute) eigenvalue of the Hessian of the mean cross entropy of the "
    "training images with the labels trained on, eval mode; checks: that of the toy's loss over all its examples, mean "
    "of 14 points in the second half of the run",
    "lambda_max:residual": "||Hv - lambda_max v|| / |lambda_max| of the unit eigenvector v found: bounds the relative "
    "distance of lambda_max to the nearest eigenvalue",
    "lambda_max:products": "Hessian-vector products that lambda_max took",
    "lambda_max:converged": "True where the Lanczos iteration for lambda_max reached its tolerance; where it did not, "
    "the measure has no numbers",
    "adversarial_sharpness": "perturbed_loss - loss: rise of the mean cross entropy of the training images with the "
    "labels trained on, eval mode, from w to w + eps, with eps one ascent step of norm rho = 0.05 on all the images "
    "at once; negative where the loss falls along its own gradient [nat]",
    "adversarial_sharpness:perturbed_loss": "the loss at w + eps, at the end of that ascent [nat]",
    "adversarial_sharpness:loss": "the loss at w, from which adversarial_sharpness rises [nat]",
    "asymmetry_factor": "mean over random directions u of min / max of the two changes of the mean cross entropy from "
    "w to w + mu u and to w - mu u, of the training images with the labels trained on, eval mode, mu = 5 and 30 "
    "directions of length 1 with entries uniform on [0, 1]; negative or above 1 where a change is negative",
    "asymmetry_factor:no_minimum": "share of those directions along which one of the two changes is 0 or less",
    "asymmetry_factor:rise_plus": "change of that loss from w to w + 0.4 mu u along the first direction [nat]",
    "asymmetry_factor:rise_minus": "change of that loss from w to w - 0.4 mu u along the first direction [nat]",
    "asymmetry_factor:weight_norm": "Euclidean norm of all weights together",
    "first_layer_kurtosis": "excess kurtosis of the weights of the first layer, its bias left out, corrected for the "
    "number of weights; 0 for normal weights, -1.2 for uniform ones, above 0 for heavier tails",
    "first_layer_kurtosis:quantile_ratio": "99.5 % quantile of the absolute values of those weights, over the 75 % one",
    "first_layer_kurtosis:range": "largest minus smallest of those weights, in standard deviations of them",
    "first_layer_kurtosis:sd": "standard deviation of those weights",
    "first_layer_kurtosis:weights": "number of those weights",
    # paths between two trained models
    "start": "key of the run whose model a path starts at",
    "end": "key of the run whose model it ends at, a second run on the same images; with path.end = random that of the "
    "model at which the bend begins",
    "train_loss_barrier": "highest mean cross entropy of the training images at the points inside the path, minus that "
    "at the higher of its two ends; eval mode, batch-norm statistics taken anew at every point [nat]",
    "train_error_barrier_pct": "the same of the share of wrong answers on the training images [points]",
    "test_loss_barrier": "the same of the mean cross entropy of the test images [nat]",
    "test_error_barrier_pct": "the same of the share of wrong answers on the test images [points]",
    "end_x": "Euclidean distance from the start to the end of a path: the end is (end_x, 0) in the plane of its chain",
    "bend_x": "coordinate of the bend along the line from the start to the end",
    "bend_y": "distance of the bend from that line",
    # exact checks: settings
    "check": "name of the exact check in samlib.checks",
    "p": "setting of dual_norm: exponent of the norm of the ball ||eps||_p <= rho, above 1; inf is the largest entry",
    "method": "setting of edge_of_stability: optimiser that trains the toy, sgd, sam or msam",
    # exact checks: values
    "relative_gap": "dual_norm: |<eps, g> - best| / best, for eps in closed form and best the largest <e, g> in the "
    "p-ball that a numerical solver finds; 0 in theory",
    "norm_ratio": "dual_norm: ||eps||_p / rho of the eps in closed form; 1 in theory",
    "max_relative_difference": "one_shard: max |a - b| / max |b| between an mSAM update a with one shard and a SAM "
    "update b, the larger of two: b by samlib.optim and b written out by hand; 0 in theory",
    "mean_of_ascents_difference": "one_shard: max |a - b| / max |b| between an mSAM update a with three shards and the "
    "mean b of three SAM updates by hand, one per shard; 0 in theory",
    "min_eigenvalue_sam_minus_sgd": "effective_jacobian: smallest eigenvalue of J_SAM - J_SGD, the mean linear "
    "operators J of one step w <- (I - lr J) w on a quadratic loss, measured on the optimisers; not below 0 in theory",
    "min_eigenvalue_msam_minus_sam": "effective_jacobian: smallest eigenvalue of J_mSAM - J_SAM, likewise; not below 0 "
    "in theory",
    "formula_error": "effective_jacobian: largest |measured - formula| entry of the three J, each relative to the "
    "largest entry of its formula; 0 in theory",
    "edge_ratio": "edge_of_stability: lr / 2 times the top eigenvalue of the method's mean linear operator J, mean of "
    "the points of lambda_max; 1 at the edge of stability",
    "stability_limit": "edge_of_stability: 2 / lr, the lambda_max at which SGD would cease to be stable, mean of the "
    "points of lambda_max",
    "loss": "edge_of_stability: half the mean squared error of the toy over all its examples, mean of the points of "
    "lambda_max",
}
EPOCHS = {
    "best_test": "epoch of highest test accuracy (the choice some papers report; it has seen the test set)",
    "best_validation": "epoch of highest validation accuracy (early stopping)",
}


def export(profile: str, store: Store, folder: Path) -> list[Path]:
    """Writes runs.csv, paths.csv and checks.csv (one row per run), history.csv (one row per evaluated epoch of the
    finished runs) and columns.csv (what each column of the others means).

    Raises:
        InputError: the store has no records of this profile, a column has no meaning on record, or the folder cannot
            be written. In the first two cases nothing has been written.
    """
    if not store.recorded():
        raise InputError(f"store = {store.folder} has no records: run the profile first, or name another store")
    tables = {
        "runs": _tables(profile, store.frame, RunSpec),
        "paths": _tables(profile, store.frame, ConnectSpec),
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
    """One entry of the data dictionary, for a name made as `<entry>`, `<metric>@<epoch>`, or
    `<measure>@<field>=<value>@...:<companion>`.

    Raises:
        InputError: a column without an entry of its own: a dictionary that guesses would mislead its reader.
    """
    head, _, rest = column.partition("@")
    chosen, _, companion = rest.partition(":")
    entry = f"{head}:{companion}" if companion else head
    settings = chosen.split("@") if chosen else []
    fields = specs_of.documentation(RunSpec) | specs_of.documentation(ConnectSpec)
    documented = COLUMNS | {name: doc for name, doc in fields.items() if "." in name}
    if entry not in documented or not (chosen in EPOCHS or all(map(_is_setting, settings))):
        raise InputError(f"column = {column!r} has no entry in the data dictionary: add one to samlib.export.COLUMNS")
    if chosen in EPOCHS:
        return EPOCHS[chosen] if entry == "epoch" else f"{documented[entry]}, at the {EPOCHS[chosen]}"
    return documented[entry] + (f"; here with {', '.join(settings)} instead" if settings else "")


def _is_setting(text: str) -> bool:
    """Whether `text` is how the name of a measure's column gives one of its settings (`MeasureSpec.column`)."""
    name, _, value = text.partition("=")
    return name in specs_of.documentation(MeasureSpec) and bool(value)


def _tables(profile: str, read, kind: type) -> pd.DataFrame:
    found = []
    for stem in experiments.STEMS:
        arms = [arm for arm in experiments.arms(stem, profile) if isinstance(arm.base, kind)]
        arms = [dataclasses.replace(arm, curves=()) for arm in arms]  # the curves are in history.csv
        table = read(arms)
        if len(table):
            table.insert(0, "experiment", stem)
            found.append(table)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
