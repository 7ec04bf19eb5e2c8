"""The two sentences at the head of page 14: they follow from the runs, whatever these say."""

import re

import pandas as pd
import pytest

from samlib import report
from samlib.rules.precision import SAM, SGD


def arms(cosine, gain_in_bf16=1.0, left_out=()):
    """Three seeds of each arm; SAM gains 1 point over SGD, but in bf16 about `gain_in_bf16`."""
    rows = []
    for precision in SAM:
        gain = gain_in_bf16 if precision == "bf16" else 1.0
        for role, accuracy in ((SGD[precision], 90.0), (SAM[precision], 90.0 + gain)):
            rows += [
                {"cell": "clean", "role": role, "seed": seed, "status": "done", "test_accuracy_pct": accuracy + noise}
                | {"perturbation_cosine": cosine[precision], "perturbation_norm_ratio": 1.25}
                for seed, noise in enumerate((0.0, 0.1, -0.1) if role == SAM["bf16"] else (0.0,) * 3)
                if role not in left_out
            ]
    return pd.DataFrame(rows)


COSINES = {"fp32": 1.0, "tf32": 0.99, "fp16": 0.98, "bf16": 0.75}


@pytest.mark.parametrize(
    ("gain", "verdict", "gap"),
    [
        (0.5, "It costs accuracy, as", "-0.5000 [-0.7484, -0.2516] (n = 3) points"),
        (1.5, "It costs no accuracy here, as", "0.5000 [0.2516, 0.7484] (n = 3) points"),
        (1.1, "It may or may not cost accuracy, as", "0.1000 [-0.1484, 0.3484] (n = 3) points"),
    ],
)
def test_the_cost_follows_from_the_interval_of_the_gains(gain, verdict, gap):
    text = report.low_precision_text(arms(COSINES, gain), "clean")
    first, second = re.split(r"(?<=\.) (?=[A-Z])", text)
    assert "norm 0.05 has a cosine of 0.7500 with it and 1.250 times its norm" in first
    assert "against a cosine of 1.000 in fp32, 0.9900 in tf32, 0.9800 in fp16." in first
    assert second.startswith(verdict)
    assert gap in second
    assert "use fp32 or tf32 or fp16, or a larger radius" in second


def test_a_bf16_that_keeps_the_perturbation_is_not_warned_of():
    text = report.low_precision_text(arms(COSINES | {"bf16": 0.96}), "clean")
    assert "bf16 will do for this network and radius" in text


def test_a_precision_that_turns_it_is_not_recommended():
    assert "use fp32 or tf32, or a larger" in report.low_precision_text(arms(COSINES | {"fp16": 0.9}), "clean")
    alone = arms(COSINES | {"fp16": 0.9}, left_out=(SAM["fp32"], SAM["tf32"]))
    assert "use fp32, or a larger radius" in report.low_precision_text(alone, "clean")


def test_of_precisions_that_have_not_been_run_nothing_is_said():
    text = report.low_precision_text(arms(COSINES, left_out=(SAM["fp32"], SGD["fp32"], SAM["tf32"])), "clean")
    assert "against a cosine of 0.9800 in fp16." in text
    assert "What that costs is open, as runs in fp32 are missing: to climb where SAM means to, use fp16, or" in text


@pytest.mark.parametrize("left_out", [(SAM["bf16"],), (SAM["fp32"], SAM["tf32"], SAM["fp16"])])
def test_without_the_runs_it_says_so(left_out):
    frame = arms(COSINES, left_out=left_out)
    for missing in (frame, frame.assign(status="missing"), frame.iloc[:0]):
        assert report.low_precision_text(missing, "clean") == "The runs that say it are missing."
