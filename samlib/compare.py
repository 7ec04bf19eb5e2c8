"""Fresh records against the committed ones: every setting's mean within its tolerance, and verdict for verdict.

Training is not bit-stable across processors: the 180 reported runs, made once with AVX-512 and once with AVX2, moved by
up to 1.8 points of test accuracy, half of them not at all, and the means of settings by up to 0.32. So means are
compared, not runs, and a mean may move by three of its standard errors (over the committed seeds) plus a floor for the
rounding of a small test set.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from samlib import claims, experiments
from samlib.experiments import Arm
from samlib.spec import CHECKS, CheckSpec, ConnectSpec, key
from samlib.store import Store

STANDARD_ERRORS = 3.0
FLOORS = {
    "test_accuracy_pct": 0.5,
    "test_loss": 0.02,
    "lambda_max": 0.05,
    "adversarial_sharpness": 1e-4,
    "train_loss_barrier": 0.02,
    "train_error_barrier_pct": 0.5,
    "test_loss_barrier": 0.02,
    "test_error_barrier_pct": 0.5,
}
TRAINED = ("test_accuracy_pct", "test_loss")  # compared of a training; the other metrics of its arm are measures
CHECK_FLOOR = 1e-6  # of the values of exact checks
OK, FAILURE, FLIP = 0, 1, 3  # exit codes


@dataclass(frozen=True, slots=True)
class Setting:
    """One metric of one arm in both stores. `tolerance` is NaN where there is nothing to compare with."""

    stem: str
    cell: str
    role: str
    metric: str
    n: int
    committed: float
    fresh: float
    tolerance: float
    decisive: bool = True
    half_weights: int = 0  # measures of the arm, in both stores together, that were taken of half-precision weights

    @property
    def agrees(self) -> bool:
        return abs(self.fresh - self.committed) <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.stem} / {self.cell} / {self.role}: {self.metric} {self.committed:.6g} committed, {self.fresh:.6g} "
            f"now (difference {self.fresh - self.committed:+.3g}, tolerance {self.tolerance:.3g}, n = {self.n})"
            + (f"; {self.half_weights} measures here were taken of half-precision weights" if self.half_weights else "")
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every setting, and the claims whose verdict is no longer the committed one."""

    settings: tuple[Setting, ...]
    flips: tuple[tuple[str, str, str], ...]  # claim, committed outcome, outcome now

    @property
    def deviations(self) -> tuple[Setting, ...]:
        return tuple(setting for setting in self.settings if setting.decisive and not setting.agrees)

    @property
    def exit_code(self) -> int:
        return FLIP if self.flips else FAILURE if self.deviations else OK

    def report(self) -> str:
        if not self.settings:
            return "There are no committed records of this profile: nothing to compare with."
        agreeing = sum(setting.agrees for setting in self.settings)
        lines = [f"{agreeing} of {len(self.settings)} means agree with the committed records."]
        lines += [
            f"  {'OUTSIDE' if s.decisive else 'outside (tuning, decides nothing)'} {s}"
            for s in self.settings
            if not s.agrees
        ]
        lines += [
            f"  FLIPPED {claim}: {before} in the committed records, {now} now" for claim, before, now in self.flips
        ]
        lines += [] if self.flips else ["Every verdict is the committed one."]
        return "\n".join(lines)


def compare(profile: str, committed: Store, fresh: Store) -> Comparison:
    """Compares every setting and verdict of a profile. Tuning arms of which nothing was run are left out."""
    settings = [
        setting
        for stem in experiments.STEMS
        for arm in experiments.arms(stem, profile)
        if not (arm.tuning and not_run(arm, fresh))
        for setting in compare_arm(stem, arm, committed, fresh)
    ]
    before, now = ({v.claim: v.outcome for v in claims.verdicts(profile, store)} for store in (committed, fresh))
    decided = [claim for claim, outcome in before.items() if outcome != "not run"]
    flips = tuple((claim, before[claim], now[claim]) for claim in decided if before[claim] != now[claim])
    return Comparison(tuple(settings), flips)


def compare_arm(stem: str, arm: Arm, committed: Store, fresh: Store) -> Iterator[Setting]:
    """Each compared metric of one arm. A seed with a number on one side alone makes the comparison fail."""
    before, now = committed.frame([arm]), fresh.frame([arm])
    if not (before["status"] == "done").any():
        return
    half = sum(int(frame["half_weights"].sum()) for frame in (before, now) if "half_weights" in frame)
    for metric in compared_metrics(arm):
        old, new = (frame.set_index("seed")[metric].dropna().astype(float) for frame in (before, now))
        tolerance = STANDARD_ERRORS * _standard_error(old) + FLOORS.get(metric.split("@")[0], CHECK_FLOOR)
        mean = float(new.mean()) if set(old.index) == set(new.index) else math.nan
        name = (stem, arm.cell, arm.role, metric)
        measures = half if metric not in TRAINED else 0
        yield Setting(*name, len(old), float(old.mean()), mean, tolerance, not arm.tuning, measures)


def not_run(arm: Arm, store: Store) -> bool:
    return not any(store.record_path(key(member)).exists() for member in arm.specs)


def compared_metrics(arm: Arm) -> Sequence[str]:
    """Test accuracy, test loss and every measure of a training run; all values of a check or of a path."""
    if isinstance(arm.base, CheckSpec):
        return CHECKS[arm.base.check]
    if isinstance(arm.base, ConnectSpec):  # a plane of one seed is a picture
        return () if arm.base.path.grid else arm.base.values
    return [*TRAINED, *(measure.column for measure in arm.measures)]


def _standard_error(values: pd.Series) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
