"""Records on disk, and the frames made from them. The only file that knows paths; nothing here needs torch.

results/<profile>/records/<key>.json        committed, read-only
runs/<profile>/records/<key>.json           working store, git-ignored
runs/<profile>/weights/<key>.pt             weights of finished runs, so that a new measure needs no retraining
runs/<profile>/weights/<key>.half.pt        the same in half precision, from an export; the others come first
runs/<profile>/checkpoints/<key>.pt         a run in progress
runs/<profile>/probe.json                   how fast machines were found to be
runs/<profile>/aside/                       files that could not be used, moved out of the way
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import PROFILES, Arm, check_profile
from samlib.spec import CHECKS, CheckSpec, ConnectSpec, MeasureSpec, RunSpec, Spec

SCHEMA = 1  # version of the record's form
NUMERICS = 2  # raised by hand whenever a change to samlib can move results: older records then show as stale

METRICS = tuple(f"{split}_{metric}" for split in ("train", "validation", "test") for metric in ("loss", "accuracy_pct"))
PERTURBATION = ("perturbation_norm_ratio", "perturbation_cosine", "perturbation_unmoved_fraction")
STATUSES = ("done", "diverged", "failed")
STORES = ("results", "runs")


class RecordError(InputError):
    """A record that cannot be used: truncated, of another schema, or not of the spec its name says."""


@dataclass(slots=True)
class Record:
    """What one run left behind. Plain JSON data throughout.

    Attributes:
        spec: the canonical spec; `key` is its hash.
        status: done, diverged (loss or weights not finite) or failed (an exception, in `error`).
        history: columns of equal length, `epoch` and `step` among them.
        final: metrics at the `last`, `best_test` and `best_validation` epoch.
        measures: measures of a model, or values of a check.
        table: columns of equal length that a measure samples: points along a path, bins of a histogram.
        perturbation: what of eps acted at the precision of the run, at its end (norm ratio, cosine, unmoved share).
        environment: versions, device, threads, platform, commit and whether the checkout was dirty; `weights` is half
            where a model was measured from weights in half precision.
    """

    key: str
    spec: dict[str, Any]
    status: str
    history: dict[str, list[float | None]] = field(default_factory=dict)
    final: dict[str, dict[str, float | None]] = field(default_factory=dict)
    measures: dict[str, float | None] = field(default_factory=dict)
    table: dict[str, list[float | None]] = field(default_factory=dict)
    perturbation: dict[str, float | None] = field(default_factory=dict)
    data_digest: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    images_per_second: float | None = None
    finished: str = ""
    error: str | None = None
    numerics: int = NUMERICS
    schema: int = SCHEMA

    @property
    def stale(self) -> bool:
        return self.numerics != NUMERICS

    @property
    def usable(self) -> bool:
        """Whether the run need not be made again."""
        return self.status != "failed" and not self.stale

    @property
    def of_half_weights(self) -> bool:
        """Whether it was measured on weights that an export had rounded to half precision."""
        return self.environment.get("weights") == "half"


# ---------------------------------------------------------------------------------------------- the store


def project_root() -> Path:
    """Where results/ and runs/ lie: SAMLIB_ROOT, else the checkout that holds this file, else the current folder."""
    if named := os.environ.get("SAMLIB_ROOT"):
        return Path(named).expanduser().resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "results").is_dir() else Path.cwd()


def open_store(profile: str, store: str | Path = "results") -> "Store":
    """The committed records of a profile (`results`), the working store (`runs`), or a folder of your own.

    A folder is written with a separator (`./mine`), so that a mistyped `results` is not taken for one.

    Raises:
        InputError: unknown profile, or a word that is no store.
    """
    check_profile(profile)
    if str(store) in STORES:
        return Store(project_root() / str(store) / profile, writable=str(store) == "runs")
    folder = Path(store).expanduser()
    if not (folder.is_absolute() or {"/", os.sep} & set(str(store))):
        written = " (as text: a Path drops the './')" if isinstance(store, Path) else ""
        raise InputError(
            f"store = {str(store)!r} is unknown: use results, runs, or a folder written with a separator such as "
            f"./mine{written}"
        )
    committed = folder.resolve() == (project_root() / "results").resolve()  # also when a shell completes the name
    return Store(folder / profile, writable=not committed)


def known_store(profile: str, name: str) -> "Store":
    """A store that is only read: as for `open_store`, or the folder of the profile itself (`results/gpu`), which need
    not be there yet.

    Raises:
        InputError: no such folder, or one whose name leaves open which is meant.
    """
    if name in STORES:
        return open_store(profile, name)
    folder = Path(name).expanduser()
    if not folder.is_absolute() and folder.parts[:1] and folder.parts[0] in STORES:
        folder = project_root() / folder
    within, is_profile = (folder / profile).is_dir(), folder.name == profile
    if folder.name in PROFILES and not is_profile:
        raise InputError(f"known = {name!r} is of the profile {folder.name}, not of {profile}: name its own")
    if is_profile and within:
        raise InputError(f"known = {name!r} holds a folder {profile} and is called so too: name {folder / profile}")
    if not (folder.is_dir() or (is_profile and folder.parent.is_dir())):
        raise InputError(f"known = {name!r} is no folder: name a store, such as results or results/{profile}")
    return Store(folder if is_profile else folder / profile)


@dataclass(frozen=True, slots=True)
class Store:
    """The records of one profile below one folder."""

    folder: Path
    writable: bool = False

    def record_path(self, key: str) -> Path:
        return self.folder / "records" / f"{key}.json"

    def weights_path(self, key: str) -> Path:
        return self.folder / "weights" / f"{key}.pt"

    def half_weights_path(self, key: str) -> Path:
        return self.folder / "weights" / f"{key}.half.pt"

    def trained_path(self, key: str) -> Path | None:
        """The weights of a run that are here: the exact ones, else those in half precision, else None."""
        paths = self.weights_path(key), self.half_weights_path(key)
        return next((path for path in paths if path.exists()), None)

    def checkpoint_path(self, key: str) -> Path:
        return self.folder / "checkpoints" / f"{key}.pt"

    @property
    def probe_path(self) -> Path:
        return self.folder / "probe.json"

    def probes(self) -> list[dict[str, Any]]:
        """What probes of the speed of machines have found here, the oldest first; empty where nothing can be read."""
        try:
            return json.loads(self.probe_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []

    def save_probes(self, found: Sequence[dict[str, Any]]) -> None:
        write_text(self.probe_path, json.dumps(found, indent=1) + "\n")

    def adopt(self, key: str, known: Sequence["Store"]) -> None:
        """Takes over the record of a finished run from the first store that has it, and its weights from the first that
        has them, exact ones before those in half precision; a run that this store has itself stays as it is."""
        if finished(self, key):
            return
        holders = [place for place in known if finished(place, key)]
        for place in holders[:1]:
            self.save(place.load(key))
        places = [self, *(place for place in holders if place.load(key) == holders[0].load(key))]
        paths = [path(place, key) for path in (Store.weights_path, Store.half_weights_path) for place in places]
        for path in [path for path in paths if path.exists()][:1]:
            if path != self.trained_path(key):
                write_bytes(self.folder / "weights" / path.name, path.read_bytes())

    def load(self, key: str) -> Record | None:
        """The record of a key; None where there is none.

        Raises:
            RecordError: the file cannot be read, is truncated, of another schema or form, or holds another spec than
                its name says.
        """
        path = self.record_path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"record {path} cannot be read ({error}): move it away and run again") from error
        return parse(text, path, key)

    def save(self, record: Record) -> Path:
        """Writes a record so that a reader sees the old file, the new one, or none, but never a part of one."""
        path = self.record_path(record.key)
        write_text(
            path, json.dumps(_json_ready(asdict(record)), indent=None, separators=(",", ":"), allow_nan=False) + "\n"
        )
        return path

    def recorded(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "records").glob("*.json"))

    def trained(self) -> list[str]:
        """The keys of the runs whose weights are here."""
        return sorted({path.name.removesuffix(".pt").removesuffix(".half") for path in self.weights()})

    def weights(self) -> list[Path]:
        """The files of weights, those in half precision among them."""
        return list((self.folder / "weights").glob("*.pt"))

    def records(self) -> Iterator[Record]:
        yield from (record for key in self.recorded() if (record := self.load(key)) is not None)

    def put_aside(self, key: str) -> Path:
        """Moves a record that cannot be used to `aside/`, so that its run is made again and nothing is lost."""
        source = self.record_path(key)
        for attempt in range(10_000):
            target = self.folder / "aside" / f"{source.name}{f'.{attempt}' if attempt else ''}"
            if not target.exists():
                break
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return target

    def check_writable(self) -> None:
        """
        Raises:
            InputError: nothing can be written here; nothing has run by then.
        """
        if not self.writable:
            raise InputError(f"store = {self.folder} holds committed records and is read-only: use the store 'runs'")
        probe = self.folder / f".probe-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"store = {self.folder} cannot be written ({error.strerror}): name another folder"
            ) from error

    def frame(self, arms: Sequence[Arm]) -> pd.DataFrame:
        """One row per member of the arms.

        Columns: cell, role, seed, key, status, every field of the spec by its dotted name, the metrics of the last
        epoch (`test_accuracy_pct`) and of two others (`test_accuracy_pct@best_validation`), the measures, and how many
        of the row's measures were taken of weights in half precision (`half_weights`; a path counts itself); for the
        `curves` of an arm also every evaluated epoch (`running_loss@epoch=20`). A run without a record is a row of
        status 'missing'; one made by older code is 'stale'.
        """
        rows = [self._row(arm, member) for arm in arms for member in arm.specs]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["cell", "role", "seed", "key", "status"])

    def history(self, arms: Sequence[Arm]) -> pd.DataFrame:
        """One row per evaluated epoch of each finished member: cell, role, seed, and the columns of the history.

        Only runs that are done and not stale are in it, the same runs whose numbers count in a frame: a run that
        failed, diverged or was made by older code has no curve.
        """
        frames = []
        for arm in arms:
            for member in arm.specs:
                record = self.load(specs_of.key(member))
                if record is not None and record.status == "done" and not record.stale and record.history:
                    frames.append(pd.DataFrame(record.history).assign(cell=arm.cell, role=arm.role, seed=member.seed))
        return (
            pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["cell", "role", "seed", "epoch"])
        )

    def tables(self, arms: Sequence[Arm], column: str = "") -> pd.DataFrame:
        """One row per row of a table that the finished members, or the measure called `column` of each of them, left
        behind: cell, role, seed, and the columns of the table."""
        frames = []
        for arm in arms:
            for member in arm.specs:
                named = [measure for measure in arm.measures_of(member) if measure.column == column]
                for spec in named if column else [member]:
                    record = self.load(specs_of.key(spec))
                    if record is not None and record.status == "done" and not record.stale and record.table:
                        frames.append(pd.DataFrame(record.table).assign(cell=arm.cell, role=arm.role, seed=member.seed))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["cell", "role", "seed"])

    def _row(self, arm: Arm, member: Spec) -> dict[str, Any]:
        key = specs_of.key(member)
        row = {"cell": arm.cell, "role": arm.role, "seed": member.seed, "key": key, "status": "missing"}
        row |= {name: value for name, value in specs_of.flat(member).items() if name != "seed"}
        row |= dict.fromkeys([*expected_columns(member), *(measure.column for measure in arm.measures)], math.nan)
        row |= {} if isinstance(member, CheckSpec) else {"half_weights": 0}
        record = self.load(key)
        if record is None:
            return row
        row["status"] = "stale" if record.stale else record.status
        row |= metrics(record) | curve_columns(record, arm.curves)
        if isinstance(member, ConnectSpec):
            row["half_weights"] = int(record.of_half_weights)
        for measure in arm.measures_of(member):
            measured = self.load(specs_of.key(measure))
            if measured is not None and measured.status == "done" and not measured.stale:
                row |= measure_columns(measure, measured.measures)
                row["half_weights"] += measured.of_half_weights
            else:
                row |= measure_columns(measure, {})
        return row


def expected_columns(member: Spec) -> Sequence[str]:
    """The numbers a finished run will have: columns that are there, and empty, before it has."""
    if isinstance(member, CheckSpec):
        return CHECKS[member.check]
    if isinstance(member, ConnectSpec):
        return member.values
    epochs = ("", "@best_test", *(["@best_validation"] if member.data.validation_size else []))
    acting = PERTURBATION if member.optim.method in ("sam", "asam") else ()
    return [*(f"{metric}{epoch}" for metric in METRICS for epoch in epochs), *acting]


def metrics(record: Record) -> dict[str, float | None]:
    """A record's numbers as columns."""
    row = dict(record.final.get("last", {}))
    for name in ("best_test", "best_validation"):
        row |= {f"{metric}@{name}": value for metric, value in record.final.get(name, {}).items()}
    row |= {f"perturbation_{name}": value for name, value in record.perturbation.items()}
    return row | record.measures | {"wall_seconds": record.wall_seconds}


def curve_columns(record: Record, names: Iterable[str]) -> dict[str, float | None]:
    """Columns of a record's history, each value under a name of its own: `running_loss@epoch=20`."""
    return {
        f"{name}@epoch={epoch:g}": value
        for name in names
        if name in record.history
        for epoch, value in zip(record.history["epoch"], record.history[name], strict=True)
    }


def measure_columns(measure: MeasureSpec, values: dict[str, float | None]) -> dict[str, float | None]:
    """The values of a measure under the names of `MeasureSpec.column`: the measure itself, then its companions."""
    head = measure.measure
    columns = {measure.column: values.get(head, math.nan)}
    columns |= {f"{measure.column}:{name}": value for name, value in values.items() if name != head}
    return columns


# ---------------------------------------------------------------------------------------------- reading and writing


def parse(text: str, path: Path, key: str) -> Record:
    """A record from its JSON text, checked against the key it is filed under.

    Raises:
        RecordError: the text is no record that can be used; it names the path.
    """
    try:
        data = json.loads(text)
        version = data["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"record {path} is truncated or no record ({error}): move it away and run again") from error
    if version != SCHEMA:
        raise RecordError(
            f"record {path} has schema = {version}, this samlib reads {SCHEMA}: move it away and run again"
        )
    try:
        record = Record(**data)
        actual = _key_of(json.dumps(record.spec, sort_keys=True))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # JSON of any form may stand in a spec
        raise RecordError(f"record {path} does not fit this samlib ({error}): move it away and run again") from error
    if not actual == record.key == key:
        raise RecordError(f"record {path} holds the spec of {actual}, not of {key}: move it away and run again")
    if record.status not in STATUSES:
        raise RecordError(
            f"record {path} has status = {record.status!r}, not one of {', '.join(STATUSES)}: run it again"
        )
    if unfit := _unfit_fields(record):
        raise RecordError(f"record {path} has no numbers where they belong, in {', '.join(unfit)}: run it again")
    return record


@lru_cache(maxsize=1 << 14)  # a verdict reads the same records again and again
def _key_of(text: str) -> str:
    """The key of a canonical spec, given as JSON."""
    return specs_of.key(specs_of.from_canonical(json.loads(text)))


def _unfit_fields(record: Record) -> list[str]:
    """The fields whose content is not of the form that `Record` gives them."""
    final = record.final
    fits = {
        "history": _are_columns(record.history),
        "table": _are_columns(record.table),
        "final": isinstance(final, dict) and all(_is_row(row) for row in final.values()),
        "measures": _is_row(record.measures),
        "perturbation": _is_row(record.perturbation),
        "wall_seconds": _are_numbers([record.wall_seconds]),
        "environment": isinstance(record.environment, dict),
    }
    return [name for name, fit in fits.items() if not fit]


def _are_columns(columns: Any) -> bool:
    return (
        isinstance(columns, dict)
        and all(isinstance(column, list) and _are_numbers(column) for column in columns.values())
        and len({len(column) for column in columns.values()}) <= 1
    )


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and _are_numbers(row.values())


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, (int, float)) for value in values)


def write_text(path: Path, text: str) -> None:
    """Written under a temporary name in the same folder, flushed to disk, then renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, saved: int | None = None) -> None:
    """The same for bytes; `saved` is the file's time in nanoseconds, if it is not to be now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if saved is not None:
        os.utime(temporary, ns=(saved, saved))
    temporary.replace(path)


def pending(specs: Iterable[Spec], store: Store, known: Sequence[Store] = ()) -> list[Spec]:
    """The specs without a usable record in the store or in those known elsewhere."""
    return [spec for spec in specs if not any(finished(place, specs_of.key(spec)) for place in (store, *known))]


def publish(specs: Sequence[Spec], source: Store, target: Store, kept: Iterable[str] = ()) -> int:
    """Makes the records of these specs, and no others, those of `target`; returns how many.

    Records of the keys `kept` may be absent from `source`: those that `target` has then stay.

    Raises:
        InputError: a run is not finished, or was made by a samlib that no commit holds; nothing has
            been written by then.
    """
    records = {specs_of.key(spec): source.load(specs_of.key(spec)) for spec in specs}
    records |= {key: target.load(key) for key in kept if records.get(key) is None}
    absent = [key for key, record in records.items() if record is None or not record.usable]
    if absent or not records:
        raise InputError(f"store = {source.folder} lacks {len(absent)} finished runs of {len(records)}: run them first")
    require_committed(records.values())
    for record in records.values():
        target.save(record)
    for key in set(target.recorded()) - set(records):
        target.record_path(key).unlink()
    return len(records)


def require_committed(records: Iterable[Record]) -> None:
    """
    Raises:
        InputError: a record was made by a samlib that no commit holds.
    """
    unknown = [record.key for record in records if record.environment.get("dirty") is not False]
    if unknown:
        raise InputError(
            f"{len(unknown)} records, {unknown[0]} among them, were made by a samlib that differs from its commit: "
            "commit it, remove them and run again"
        )


def finished(store: Store, key: str) -> bool:
    """Whether the store has a usable record of a key."""
    record = store.load(key)
    return record is not None and record.usable


def _json_ready(value: Any) -> Any:
    """Numbers to 7 digits; what is not finite becomes null, as JSON has no word for it."""
    if isinstance(value, dict):
        return {name: _json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def parent_spec(store: Store, measure: MeasureSpec) -> RunSpec:
    """The run a measure belongs to, from that run's record.

    Raises:
        InputError: the store has no record of it.
    """
    return parent_run(store, measure.parent, "measure.parent")


def parent_run(store: Store, key: str, field: str) -> RunSpec:
    """The run of a key, from its record; `field` is how a spec names it.

    Raises:
        InputError: the store has no record of it, or of no training run.
    """
    record = store.load(key)
    if record is None:
        raise InputError(f"{field} = {key} has no record in {store.folder}: run it first")
    parent = specs_of.from_canonical(record.spec)
    if not isinstance(parent, RunSpec):
        raise InputError(f"{field} = {key} is no training run: a measure is taken of a trained model")
    return parent
