"""How far a repeated run may be off: points for percentages, shares for everything else."""

import math

import pytest

from samlib import spec as specs_of
from samlib.spec import RunSpec
from samlib.store import Record
from samlib.verify import Report


def record(status="done"):
    return Record(specs_of.key(RunSpec()), specs_of.canonical(RunSpec()), status)


def report(name, old, new):
    return Report(record(), record(), ((name, old, new),))


@pytest.mark.parametrize(
    ("name", "old", "new", "agrees"),
    [
        ("test_accuracy_pct", 90.0, 84.0, False),
        ("test_accuracy_pct", 90.0, 86.0, True),
        ("test_accuracy_pct", 84.0, 90.0, False),
        ("test_accuracy_pct", 90.0, 68.0, False),
        ("train_accuracy_pct", 4.0, 8.5, True),  # more than a quarter off, less than 5 points
        ("validation_accuracy_pct", 4.0, 9.5, False),
        ("test_loss", 1.0, 1.3, True),  # a quarter of the larger number
        ("test_loss", 1.0, 1.4, False),
        ("lambda_max", 40.0, 36.0, True),
        ("lambda_max", 40.0, 20.0, False),
        ("lambda_max", -1.0, 1.0, False),
        ("relative_gap", 4e-16, 0.0, True),  # rounding alone
        ("test_loss", 0.3, 3.0, False),  # 5 is no tolerance of a loss
        ("test_accuracy_pct", math.nan, math.nan, True),
        ("test_accuracy_pct", 90.0, math.nan, False),
    ],
)
def test_what_agrees(name, old, new, agrees):
    found = report(name, old, new)
    assert found.agrees is agrees
    assert ("DIFFERS" in str(found)) is not agrees


def test_one_number_that_differs_is_enough():
    numbers = (("test_accuracy_pct", 90.0, 90.0), ("lambda_max", 1.0, 1.0), ("train_accuracy_pct", 90.0, 70.0))
    found = Report(record(), record(), numbers)
    assert not found.agrees
    assert "train_accuracy_pct: 90 stored, 70 now" in str(found)


def test_identical_numbers_and_another_status():
    assert report("test_accuracy_pct", 90.0, 90.0).exact
    assert not report("test_accuracy_pct", 90.0, 90.001).exact
    other = Report(record(), record("diverged"), (("test_accuracy_pct", 90.0, 90.0),))
    assert not other.agrees
    assert "status: done stored, diverged now" in str(other)
