"""What the study runs: one file per experiment, each a declaration of arms and of the claims they decide.

An **arm** is one method in one setting, repeated over seeds. Its `role` is the name by which a decision rule calls it;
its `cell` is the setting it shares with the arms it is compared with. A module of this package holds

    TITLE           the page's question
    DECIDES         claim id -> profile -> the cells whose arms decide the claim
    PUBLISHED_SCALE profiles on the published data set and network family, where thresholds in points hold
    arms(profile)   the arms, in the order they are worth running
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.spec import CheckSpec, ConnectSpec, MeasureSpec, PathSpec, RunSpec, Spec

STEMS = (
    "sam_by_hand",
    "sam_vs_sgd",
    "batch_size",
    "asam_without_batchnorm",
    "msam_sweep",
    "asymmetry",
    "mode_connectivity",
    "optimizer_table",
    "precision",
)
PROFILES = ("quick", "gpu", "paper")


class AtPublishedScale(tuple):
    """Cells in `DECIDES` that are of the published scale although their profile is not in `PUBLISHED_SCALE`, since
    other cells of it are reduced."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One method in one setting, over seeds.

    `base` is the spec of which every member is a copy with its own seed and `epochs_factor` times the epochs (a factor
    and not a number, so that a reader's variation of the epochs keeps 'twice' and 'half' true). `measures` are
    templates: each is taken of every member, with the member's key as its parent. A `tuning` arm is one on which
    settings were chosen: it decides no claim, runs only where that is asked for, and a reader's variation leaves it as
    it is. `curves` names columns of
    the history for rules about a whole curve: each of their values is a column of the frame too. Where time is short,
    arms of a lower `priority` run first, seed by seed.
    """

    role: str
    cell: str
    base: RunSpec | ConnectSpec | CheckSpec
    seeds: tuple[int, ...]
    measures: tuple[MeasureSpec, ...] = ()
    epochs_factor: float = 1.0
    tuning: bool = False
    curves: tuple[str, ...] = ()
    priority: int = 1

    @property
    def specs(self) -> tuple[RunSpec | CheckSpec, ...]:
        base = self.base
        if isinstance(base, RunSpec) and self.epochs_factor != 1.0:
            epochs = max(1, int(base.train.epochs * self.epochs_factor))
            base = dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=epochs))
        return tuple(dataclasses.replace(base, seed=seed) for seed in self.seeds)

    @property
    def parents(self) -> tuple[RunSpec, ...]:
        """The runs whose models the members need, beside the members themselves."""
        return ()

    def measures_of(self, member: RunSpec | CheckSpec) -> tuple[MeasureSpec, ...]:
        parent = specs_of.key(member)
        return tuple(dataclasses.replace(measure, parent=parent) for measure in self.measures)

    def varied(self, seeds: tuple[int, ...] | None, overrides: Mapping[str, Any]) -> "Arm":
        """A reader's own variation: other seeds, other fields. Same role and cell, other keys."""
        if self.tuning:
            return self
        base = specs_of.override(self.base, overrides) if isinstance(self.base, RunSpec) else self.base
        return dataclasses.replace(self, base=base, seeds=self.seeds if seeds is None else seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Arm):
    """A path between the models of two arms, seed by seed.

    The path of seed s starts at the run of seed s of `start` and ends at the second run of seed s of `end`: on the same
    images, since both ends are to be minima of one training loss, but from another initialisation and with batches in
    another order, since from the same ones no barrier lies between two runs. `base` is a template of the path, its ends
    filled in for each member.
    """

    start: Arm
    end: Arm

    @property
    def ends(self) -> tuple[tuple[RunSpec, RunSpec], ...]:
        """The two runs that each member joins."""
        starts, ends = (dataclasses.replace(arm, seeds=self.seeds).specs for arm in (self.start, self.end))
        return tuple((start, specs_of.second_run(end)) for start, end in zip(starts, ends, strict=True))

    @property
    def specs(self) -> tuple[ConnectSpec, ...]:
        return tuple(
            dataclasses.replace(self.base, start=specs_of.key(start), end=specs_of.key(end), seed=start.seed)
            for start, end in self.ends
        )

    @property
    def parents(self) -> tuple[RunSpec, ...]:
        return tuple(run for runs in self.ends for run in runs)

    def varied(self, seeds: tuple[int, ...] | None, overrides: Mapping[str, Any]) -> "Pair":
        """Other seeds, and other fields of the runs; the path is trained as before."""
        start, end = (arm.varied(seeds, overrides) for arm in (self.start, self.end))
        return dataclasses.replace(self, start=start, end=end, seeds=self.seeds if seeds is None else seeds)


def path(**settings: Any) -> ConnectSpec:
    """A template for `Pair`: a path whose ends are filled in for each member."""
    return ConnectSpec("0" * 16, "0" * 16, PathSpec(**settings))


def measure(name: str, **settings: Any) -> MeasureSpec:
    """A template for `Arm.measures`: a measure whose parent is filled in for each member."""
    return MeasureSpec(parent="0" * 16, measure=name, **settings)


def load(stem: str) -> ModuleType:
    """The module of an experiment.

    Raises:
        InputError: no experiment has this stem.
    """
    if stem not in STEMS:
        raise InputError(f"experiment = {stem!r} is unknown: use one of {', '.join(STEMS)}")
    return import_module(f"samlib.experiments.{stem}")


def arms(
    stem: str,
    profile: str,
    seeds: int | Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Arm, ...]:
    """The arms of an experiment on a profile; `seeds` (a number or a list) and `overrides` make a variation of them.

    Raises:
        InputError: unknown experiment, profile, seed or field; nothing has run by then.
    """
    declared = load(stem).arms(check_profile(profile))
    check_overrides(overrides or {})
    if seeds is None and not overrides:
        return declared
    chosen = None if seeds is None else _seeds(seeds)
    varied = tuple(arm.varied(chosen, overrides or {}) for arm in declared)
    _ = [arm.specs for arm in varied]  # a bad seed is an error here, before anything runs
    return varied


def specs(arms: Sequence[Arm]) -> list[Spec]:
    """Every spec of the arms once, each measure and each path after the runs it needs."""
    found: dict[str, Spec] = {}
    for arm in arms:
        for spec in (*arm.parents, *(spec for member in arm.specs for spec in (member, *arm.measures_of(member)))):
            found.setdefault(specs_of.key(spec), spec)
    return list(found.values())


def in_order_of_worth(arms: Sequence[Arm]) -> list[Spec]:
    """Every spec of the arms once, in the order in which they are worth their time where it is short: arms of a lower
    priority first, among these seed by seed, so that paired comparisons are complete early, and each measure and path
    right after the runs it needs."""
    by_key = {specs_of.key(spec): spec for spec in specs(arms)}
    members = [(arm, member) for arm in arms for member in arm.specs]
    found: dict[str, Spec] = {}
    for arm, member in sorted(members, key=lambda pair: (pair[0].priority, pair[1].seed)):
        parents = (by_key[parent] for parent in specs_of.parents(member))
        for spec in (*parents, member, *arm.measures_of(member)):
            found.setdefault(specs_of.key(spec), spec)
    return list(found.values())


def titles(arms: Sequence[tuple[str, Arm]]) -> dict[str, str]:
    """Key -> what it is: experiment, cell, role and seed, and what is measured of a member."""
    found: dict[str, str] = {}
    for stem, arm in arms:
        for member in arm.specs:
            title = f"{stem} / {arm.cell} / {arm.role}, seed {member.seed}"
            found.setdefault(specs_of.key(member), title)
            for measured in arm.measures_of(member):
                found.setdefault(specs_of.key(measured), f"{title}: {measured.column}")
    return found


def all_specs(profile: str, stems: Sequence[str] = STEMS, tuning: bool = False) -> list[Spec]:
    """Every spec of a profile once, in the order of the experiments; with `tuning` also those of the tuning arms, which
    decide nothing and whose committed records stand in for them."""
    return specs([arm for stem in stems for arm in arms(stem, profile) if tuning or not arm.tuning])


def decides(claim: str, profile: str) -> tuple[str | None, tuple[str, ...]]:
    """The experiment that decides a claim and the cells bound to it on a profile; (None, ()) where none does yet."""
    for stem in STEMS:
        bound = load(stem).DECIDES
        if claim in bound:
            return stem, tuple(bound[claim].get(check_profile(profile), ()))
    return None, ()


def published_scale(stem: str, profile: str, claim: str = "") -> bool:
    """Whether thresholds in points, loss or ratios hold (else the sign alone is judged: a miniature), for an experiment
    or for one of its claims."""
    bound = load(stem).DECIDES.get(claim, {}).get(check_profile(profile))
    return profile in load(stem).PUBLISHED_SCALE or isinstance(bound, AtPublishedScale)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Their names alone, against any training run: a wrong one is an error even where only checks are run."""
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides = {overrides!r}: use a mapping of fields to values, for example {{'epochs': 20}}")
    for name in overrides:
        if specs_of.field_name(RunSpec(), name) == "seed":
            raise InputError("overrides: 'seed' is not changed by itself: use the parameter seeds")


def check_profile(profile: str) -> str:
    if profile not in PROFILES:
        raise InputError(f"profile = {profile!r} is unknown: use one of {', '.join(PROFILES)}")
    return profile


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, bool) or not isinstance(seeds, (int, Sequence)) or isinstance(seeds, str):
        raise InputError(f"seeds = {seeds!r}: use a number of seeds or a list of them")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not all(isinstance(seed, int) for seed in chosen):
        raise InputError(f"seeds = {seeds!r}: use whole numbers")
    if not chosen or len(set(chosen)) != len(chosen):
        raise InputError(f"seeds = {seeds!r}: use at least one seed, each once")
    return chosen
