"""The comparison with the committed records: agreement, a mean out of tolerance, a flipped verdict."""

import json
import shutil

import pytest

from samlib import __main__ as cli
from samlib import claims, experiments
from samlib import spec as specs_of
from samlib.compare import FAILURE, FLIP, OK, Setting, compare
from samlib.store import Store, open_store


@pytest.fixture
def copy(everything, monkeypatch):
    """The same of one experiment: a comparison of all takes seconds."""
    monkeypatch.setattr(experiments, "STEMS", ("sam_vs_sgd",))
    return everything


@pytest.fixture
def everything(tmp_path):
    """The committed records, and the same as if they had just been run."""
    committed = open_store("quick")
    target = tmp_path / "runs" / "quick"
    shutil.copytree(committed.folder / "records", target / "records")
    return committed, Store(target, writable=True)


def rewrite(store, arms, change):
    for arm in arms:
        for row in store.frame([arm]).itertuples():
            path = store.record_path(row.key)
            data = json.loads(path.read_text())
            change(data)
            path.write_text(json.dumps(data))


def shift(metric, by):
    def change(data):
        data["final"]["last"][metric] += by

    return change


def arms(cell, role):
    return [arm for arm in experiments.arms("sam_vs_sgd", "quick") if (arm.cell, arm.role) == (cell, role)]


def test_the_same_records_agree(everything):
    found = compare("quick", *everything)
    assert found.exit_code == OK
    assert found.flips == ()
    assert all(setting.agrees for setting in found.settings)
    assert {setting.stem for setting in found.settings} == set(experiments.STEMS)
    assert "Every verdict is the committed one." in found.report()


def test_a_mean_outside_its_tolerance_is_a_failure(copy):
    committed, fresh = copy
    rewrite(fresh, arms("noise20", "sgd_double"), shift("test_accuracy_pct", 30.0))
    found = compare("quick", committed, fresh)
    assert [(s.cell, s.role, s.metric) for s in found.deviations] == [("noise20", "sgd_double", "test_accuracy_pct")]
    assert found.exit_code == FAILURE
    assert "OUTSIDE" in found.report()


def test_a_flipped_verdict_is_printed_and_has_a_code_of_its_own(copy):
    committed, fresh = copy
    for role, by in (("sam", -60.0), ("sam_half", -60.0)):
        rewrite(fresh, arms("plain", role), shift("test_accuracy_pct", by))
    found = compare("quick", committed, fresh)
    assert found.exit_code == FLIP
    assert "coldenhoff-a-sam-beats-sgd-per-seed" in {claim for claim, _, _ in found.flips}
    assert "FLIPPED" in found.report()


def test_measures_of_half_precision_weights_are_pointed_out(copy):
    committed, fresh = copy
    arm = arms("clean", "sam")[0]
    for member in arm.specs:
        measured = fresh.load(specs_of.key(arm.measures_of(member)[0]))
        measured.measures["lambda_max"] += 1e3
        measured.environment["weights"] = "half"
        fresh.save(measured)
    rewrite(fresh, [arm], shift("test_loss", 30.0))
    found = {setting.metric: str(setting) for setting in compare("quick", committed, fresh).deviations}
    said = {metric: "; 10 measures here were taken of half-precision weights" in line for metric, line in found.items()}
    assert said == {"test_loss": False, "lambda_max": True}
    claim = next(claim for claim, cells in experiments.load("sam_vs_sgd").DECIDES.items() if "clean" in cells["quick"])
    said = "10 measures of these runs were taken of weights rounded to half precision"
    assert [said in claims.verdict(claim, "quick", store).reason for store in copy] == [False, True]


def test_a_missing_run_is_a_failure(copy):
    committed, fresh = copy
    row = fresh.frame(arms("noise20", "sgd_double")).iloc[0]
    fresh.record_path(row["key"]).unlink()
    assert compare("quick", committed, fresh).exit_code == FAILURE


def test_a_missing_measure_is_a_failure(copy):
    committed, fresh = copy
    arm = arms("clean", "sam")[0]
    fresh.record_path(specs_of.key(arm.measures_of(arm.specs[3])[0])).unlink()
    found = compare("quick", committed, fresh)
    assert {(s.metric, s.n) for s in found.deviations} == {("lambda_max", 10)}


def test_a_profile_without_committed_records_has_nothing_to_compare_with(tmp_path):
    empty = Store(tmp_path, writable=True)
    found = compare("quick", empty, empty)
    assert found.exit_code == OK
    assert "nothing to compare with" in found.report()


def test_a_deviation_of_tuning_runs_decides_nothing(copy):
    committed, fresh = copy
    rewrite(fresh, arms("tuning clean", "sgd lr=0.1"), shift("test_accuracy_pct", 40.0))
    found = compare("quick", committed, fresh)
    assert found.exit_code == OK
    assert "decides nothing" in found.report()


def test_tuning_arms_of_which_nothing_was_run_are_left_out(copy):
    committed, fresh = copy
    for row in fresh.frame(arms("tuning clean", "sgd lr=0.1")).itertuples():
        fresh.record_path(row.key).unlink()
    found = compare("quick", committed, fresh)
    assert found.exit_code == OK
    assert not [s for s in found.settings if (s.cell, s.role) == ("tuning clean", "sgd lr=0.1")]
    assert len(found.settings) == len(compare("quick", committed, committed).settings) - 2


def test_the_tolerance_is_inclusive():
    assert Setting("s", "c", "r", "m", 3, 1.0, 1.5, 0.5).agrees
    assert not Setting("s", "c", "r", "m", 3, 1.0, 1.51, 0.5).agrees
    assert not Setting("s", "c", "r", "m", 3, 1.0, float("nan"), 0.5).agrees


def test_the_command_returns_the_code(copy, monkeypatch, capsys):
    _, fresh = copy
    assert cli.main(["compare", "--store", str(fresh.folder.parent)]) == OK
    rewrite(fresh, arms("noise40", "sam"), shift("test_loss", 9.0))
    assert cli.main(["compare", "--store", str(fresh.folder.parent)]) == FAILURE
    assert "OUTSIDE" in capsys.readouterr().out
