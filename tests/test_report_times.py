"""Times per step and machines from records; rules on cells that decide nothing."""

import math
import statistics

import pandas as pd
import pytest

from samlib import report
from samlib import spec as specs_of
from samlib.experiments import Arm, digits
from samlib.rules import RULES
from samlib.store import Record, Store
from samlib.study import Study


def row(role, seed, seconds=1.0, step=100, status="done", cell="clean"):
    return {"cell": cell, "role": role, "seed": seed, "status": status, "wall_seconds": seconds, "step": step}


def test_times_are_medians_per_update_beside_those_of_sgd():
    seconds = {"sgd": [0.2, 0.1, 0.9], "sam": [0.4, 0.5, 0.6], "sgd_double": [0.4, 0.4, 0.4]}
    rows = [
        row(role, s, one, 200 if role == "sgd_double" else 100)
        for role in seconds
        for s, one in enumerate(seconds[role])
    ]
    rows.append(row("sam", 3, 99.0, status="diverged"))
    found = report.step_times(pd.DataFrame(rows))
    assert found["n"].tolist() == ["3", "3", "3"]
    for role, each in seconds.items():
        median = statistics.median(each) * 1000 / (200 if role == "sgd_double" else 100)
        shown = found.loc["clean", report.name(role)]
        assert (float(shown["ms per step"]), float(shown["times SGD"])) == (
            pytest.approx(median),
            pytest.approx(median / 2),
        )


def test_times_without_records_or_without_sgd(tmp_path):
    frame = Store(tmp_path).frame([Arm("sam", "clean", digits.sam("clean"), (0, 1))])
    assert report.step_times(frame).to_numpy().tolist() == [["none", "none", "0"]]
    found = report.step_times(pd.DataFrame([row("sam", 0, 0.5)]))
    assert found.to_numpy().tolist() == [["5.000", "none", "1"]]


def test_machines_are_those_of_the_finished_records(tmp_path):
    store = Store(tmp_path, writable=True)
    arm = Arm("sgd", "clean", digits.sgd("clean"), (0, 1, 2))
    study = Study("msam_sweep", "quick", store, (arm,), varied=False)
    assert report.machines(study) == "no finished runs"
    for spec, status, device in zip(arm.specs, ("done", "done", "failed"), ("B", "A", "C"), strict=True):
        made = {"device": device, "threads": 1}
        store.save(Record(specs_of.key(spec), specs_of.canonical(spec), status, environment=made))
    assert report.machines(study) == "A, threads per run: 1; B, threads per run: 1"
    assert report.machines(study, cells=["noise40"]) == "no finished runs"


def test_rules_elsewhere_are_the_rules_by_the_sign_alone():
    claim = "coldenhoff-a-sam-beats-sgd-per-seed"
    scores = {"sgd": (50.0,) * 4, "sam": (50.25, 49.75, 50.125, 49.875)}  # the interval is inside half a point
    rows = [
        {"cell": "noise", "role": role, "seed": seed, "status": "done"}
        | {"test_accuracy_pct": value, "test_accuracy_pct@best_test": value}
        for role, values in scores.items()
        for seed, value in enumerate(values)
    ]
    frame = pd.DataFrame(rows)
    outcome, parts, reason = RULES[claim](frame, True)
    assert outcome != RULES[claim](frame, False)[0]
    lines = report.rules_text([claim], frame).split("\n")
    assert lines[0] == f"- the rule of `{claim}` would say: {outcome}"
    assert len(lines) == 2 + len(parts)
    assert all(
        f"{part.n}" in line and f"{part.estimate:.4g}" in line for part, line in zip(parts, lines[1:], strict=False)
    )
    assert lines[-1] == f"    - {reason}"
    assert not math.isnan(parts[0].low)
