"""The tables for readers of another language, and a dictionary that explains each of their columns."""

import json

import pandas as pd
import pytest

from samlib import checks, experiments
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.export import COLUMNS, EPOCHS, describe, export
from samlib.spec import CHECKS, ConnectSpec, MeasureSpec, RunSpec
from samlib.store import Record, Store, open_store


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The committed records of the quick profile, exported."""
    paths = export("quick", open_store("quick"), tmp_path_factory.mktemp("csv"))
    return {path.stem: pd.read_csv(path) for path in paths}


def entry_of(column):
    """The entry a column is to have: its own name, without the epoch or the settings of a measure."""
    head, _, rest = column.partition("@")
    companion = rest.partition(":")[2]
    return f"{head}:{companion}" if companion else head


def test_every_exported_column_has_an_entry_of_its_own(tables):
    columns = {column for name in ("runs", "paths", "checks", "history") for column in tables[name].columns}
    meanings = tables["columns"].set_index("column")["meaning"]
    documented = specs_of.documentation(RunSpec) | specs_of.documentation(ConnectSpec)
    fields = {name: doc for name, doc in documented.items() if "." in name}
    assert set(meanings.index) == columns
    for column in columns:
        assert meanings[column].startswith({**COLUMNS, **fields}[entry_of(column)]) or column.startswith("epoch@")
        assert meanings[column] != column.split(".")[-1]
    assert meanings.is_unique


def test_no_entry_is_without_a_column(tables):
    columns = set(tables["columns"]["column"])
    assert set(COLUMNS) <= columns | {entry_of(column) for column in columns}


def test_settings_of_checks_are_called_settings_and_their_values_are_not(tables):
    for check, values in CHECKS.items():
        rows = tables["checks"][tables["checks"]["check"] == check].dropna(axis=1)
        settings = set(rows.columns) & {"p", "method"}
        for name in settings:
            assert describe(name).startswith(f"setting of {check}: ")
        for name in set(values) - {"lambda_max"}:
            assert describe(name).startswith(f"{check}: ")


def test_what_the_dictionary_says_of_the_toy_is_what_the_check_averages():
    assert f"mean of {len(checks.MEASURED)} points in the second half of the run" in describe("lambda_max")
    assert checks.MEASURED[0] > checks.STEPS / 2


def test_what_the_dictionary_says_of_measures_are_their_defaults():
    default = MeasureSpec("0" * 16)
    assert (default.split, default.mode, default.rho) == ("train", "eval", 0.05)
    assert (default.steps, default.shard_size) == (1, None)
    assert "one ascent step of norm rho = 0.05 on all the images" in describe("adversarial_sharpness")


def test_the_seed_is_explained():
    assert describe("seed").startswith("seed of the data split")


def test_epochs_and_settings_are_added_to_the_entry():
    assert describe("test_loss@best_test") == f"{COLUMNS['test_loss']}, at the {EPOCHS['best_test']}"
    assert describe("epoch@best_validation") == EPOCHS["best_validation"]
    column = "adversarial_sharpness@rho=0.1@shard_size=128:loss"
    assert describe(column) == f"{COLUMNS['adversarial_sharpness:loss']}; here with rho=0.1, shard_size=128 instead"
    assert describe("lambda_max:products") == COLUMNS["lambda_max:products"]


@pytest.mark.parametrize(
    "column",
    ["nonsense", "lambda_max:nonsense", "test_loss@worst", "lambda_max@rhoo=0.1", "lambda_max@rho=", "optim.rhoo", ""],
)
def test_a_column_without_an_entry_is_an_error(column):
    with pytest.raises(InputError, match=f"column = '{column}' has no entry"):
        describe(column)


def test_a_record_with_an_unexplained_number_is_not_exported(tmp_path):
    spec = experiments.arms("sam_by_hand", "quick")[0].specs[0]
    record = open_store("quick").load(specs_of.key(spec))
    record.measures["mystery"] = 1.0
    store = Store(tmp_path / "quick", writable=True)
    path = store.save(record)
    assert json.loads(path.read_text())["measures"]["mystery"] == 1.0
    with pytest.raises(InputError, match="column = 'mystery' has no entry"):
        export("quick", store, tmp_path / "csv")
    assert not (tmp_path / "csv").exists()


def test_the_history_leaves_out_runs_that_are_not_done(tmp_path):
    arm = next(arm for arm in experiments.arms("sam_vs_sgd", "quick") if len(arm.specs) > 1)
    store = Store(tmp_path / "quick", writable=True)
    for spec, status in zip(arm.specs, ("done", "diverged"), strict=False):
        history = {"epoch": [1, 2], "test_loss": [1.0, 0.5]}
        store.save(Record(specs_of.key(spec), specs_of.canonical(spec), status, history=history))
    export("quick", store, tmp_path / "csv")
    history = pd.read_csv(tmp_path / "csv" / "history.csv")
    assert set(history["seed"]) == {arm.specs[0].seed}
    runs = pd.read_csv(tmp_path / "csv" / "runs.csv")
    assert set(runs.loc[runs["key"] == specs_of.key(arm.specs[1]), "status"]) == {"diverged"}
