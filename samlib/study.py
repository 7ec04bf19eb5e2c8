"""What a page of the book holds in its hands: the arms of one experiment, their records, and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from samlib import experiments, published, store, sweep
from samlib import spec as specs_of
from samlib.claims import Verdict, judge
from samlib.errors import InputError
from samlib.experiments import Arm
from samlib.store import Store


@dataclass(frozen=True, slots=True)
class Study:
    """One experiment on one profile, read from one store.

    `varied` says that a reader changed seeds or fields: such a study has keys of its own, and its verdicts say so.
    """

    stem: str
    profile: str
    store: Store
    arms: tuple[Arm, ...]
    varied: bool

    @property
    def cells(self) -> list[str]:
        """Its cells in the order of the arms, those apart on which settings are chosen."""
        return list(dict.fromkeys(arm.cell for arm in self.arms if not arm.tuning))

    def at(self, profile: str) -> "Study":
        """The same experiment on a profile: this study if it is on it, else the committed records, untouched by a
        reader's variation. It may have no arms there.

        Raises:
            InputError: unknown profile.
        """
        if profile == self.profile:
            return self
        arms = experiments.arms(self.stem, profile)
        return Study(self.stem, profile, store.open_store(profile, "results"), arms, varied=False)

    def pick(self, cells: Sequence[str] | None = None, roles: Sequence[str] | None = None) -> tuple[Arm, ...]:
        """The arms of some cells and roles."""
        return tuple(
            arm for arm in self.arms if (cells is None or arm.cell in cells) and (roles is None or arm.role in roles)
        )

    def frame(self, cells: Sequence[str] | None = None, roles: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per run; see `Store.frame`. Tuning runs that were not made here are the committed ones."""
        arms = self.pick(cells, roles)
        elsewhere = [arm for arm in arms if arm.tuning and not self.has(arm)]
        here = self.store.frame([arm for arm in arms if arm not in elsewhere])
        return pd.concat([here, self.committed.frame(elsewhere)], ignore_index=True) if elsewhere else here

    @property
    def committed(self) -> Store:
        """The committed records of the profile."""
        return store.open_store(self.profile, "results")

    def has(self, arm: Arm) -> bool:
        """Whether this store has a record of an arm."""
        return any(self.store.record_path(specs_of.key(member)).exists() for member in arm.specs)

    def history(self, cells: Sequence[str] | None = None, roles: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per evaluated epoch; see `Store.history`."""
        return self.store.history(self.pick(cells, roles))

    def tables(
        self, column: str = "", cells: Sequence[str] | None = None, roles: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """One row per row of the tables that a measure left behind; see `Store.tables`."""
        return self.store.tables(self.pick(cells, roles), column)

    def verdict(self, claim: str) -> Verdict:
        """The verdict on a claim from these records."""
        return judge(claim, self.profile, self.store, self.arms, varied=self.varied)

    def settings(self, cells: Sequence[str] | None = None, roles: Sequence[str] | None = None) -> pd.DataFrame:
        """What was run, one row per arm: the fields in which arms differ, and how many seeds have a finished record."""
        frame = self.frame(cells, roles)
        fields = [name for name in spec_fields(frame) if frame[name].nunique(dropna=False) > 1]
        rows = frame.groupby(["cell", "role"], sort=False)
        table = rows[fields].first().astype(object)
        table["seeds"] = rows["seed"].nunique()
        table["finished"] = rows["status"].agg(lambda statuses: (statuses == "done").sum())
        return table


def spec_fields(frame: pd.DataFrame) -> list[str]:
    """The columns that are fields of a spec, by their dotted names; a measure's column may hold a dot in a number."""
    return [name for name in frame.columns if "." in name and "@" not in name]


def open_study(
    stem: str,
    profile: str = "quick",
    store_name: str | Path = "results",
    seeds: int | Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Study:
    """The study of one experiment. With the store 'results' it only reads; with 'runs', or a folder of your own, it
    first trains what is absent, tuning runs apart. An experiment without runs on a profile is shown from the committed
    quick records, and says so.

    Raises:
        InputError: unknown experiment, profile, store, seed or field; nothing has run by then.
    """
    arms = experiments.arms(stem, profile, seeds, overrides)
    if not arms and (seeds is not None or overrides):
        raise InputError(f"seeds, overrides: {stem} has no runs on the profile {profile} to vary: use profile quick")
    if not arms:
        print(f"{stem} has no runs on the profile {profile}: shown are the committed records of the profile quick.")
        return open_study(stem)
    opened = store.open_store(profile, store_name)
    if opened.writable:
        sweep.run_all(experiments.specs([arm for arm in arms if not arm.tuning]), opened)
    return Study(stem, profile, opened, arms, varied=seeds is not None or bool(overrides))


def scoreboard(studies: Sequence[Study]) -> list[Verdict]:
    """The verdict on every claim of the four papers, in their order; a claim without a study here is not run."""
    by_claim = {claim: study for study in studies for claim in experiments.load(study.stem).DECIDES}
    first = studies[0]
    return [
        by_claim[claim].verdict(claim) if claim in by_claim else judge(claim, first.profile, first.store, ())
        for claim in published.claims()
    ]
