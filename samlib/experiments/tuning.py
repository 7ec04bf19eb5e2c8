"""How a setting is chosen: on seeds of its own, by validation accuracy at the last epoch, by one rule for every choice.

An experiment lists its choices as `TUNING`. Their runs are committed, and a test applies the rule to them and compares
with the value the experiment uses.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from samlib import spec as specs_of
from samlib.experiments import Arm
from samlib.spec import RunSpec

DEV_SEEDS = (100, 101, 102, 103)  # appear in no result


@dataclass(frozen=True, slots=True)
class Choice:
    """One field of one method in one setting: the values that were tried, and the one that was chosen.

    `base` holds the method and everything chosen before. The grid goes on to both sides of `chosen`.
    """

    cell: str
    base: RunSpec
    field: str
    grid: tuple[float, ...]
    chosen: float

    @property
    def method(self) -> str:
        return self.base.optim.method

    @property
    def arms(self) -> tuple[Arm, ...]:
        """One arm per value; only the last epoch is looked at."""
        train = dataclasses.replace(self.base.train, eval_every=self.base.train.epochs)
        base, word = dataclasses.replace(self.base, train=train), self.field.split(".")[-1]
        return tuple(
            Arm(
                f"{self.method} {word}={value:g}",
                f"tuning {self.cell}",
                specs_of.override(base, {self.field: value}),
                DEV_SEEDS,
                tuning=True,
            )
            for value in self.grid
        )


def arms(choices: Iterable[Choice]) -> tuple[Arm, ...]:
    """The runs on which the choices rest; they decide no claim."""
    return tuple(arm for choice in choices for arm in choice.arms)


def choose(accuracies: Mapping[float, Sequence[float]]) -> float:
    """The value whose worst dev seed has the highest validation accuracy at the last epoch; ties go to the higher mean,
    then to the smaller value.

    The worst seed first: just above the best rho some seeds collapse to chance, and a mean over four can miss that.
    """
    return max(sorted(accuracies), key=lambda value: (min(accuracies[value]), sum(accuracies[value])))


def validation_accuracies(rows: Iterable[Mapping[str, object]], field: str) -> dict[float, list[float]]:
    """Validation accuracy of each dev seed per value of `field`, from the rows of a tuning frame."""
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(float(row[field]), []).append(float(row["validation_accuracy_pct"]))
    return found
