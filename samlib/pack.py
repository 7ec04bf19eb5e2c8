"""Carries finished work from one machine to another in a few plain files.

DIR/records.zip    about.json (with what probes found) and records/<key>.json
DIR/tensors.zip    about.json, weights/<key>.pt or weights/<key>.half.pt, and checkpoints/<key>.pt, if asked for

What was finished comes first: records, then weights, then the checkpoints of runs in progress, for as long as there is
room. An archive that outgrows a file is cut into volumes (`tensors.zip.001`, ...), which `cat tensors.zip.* >
tensors.zip` joins. Nothing here needs torch but rounding weights to half precision, and no name in an archive is ever
used as a path.
"""

import json
import math
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import check_profile
from samlib.store import Record, Store, finished, parse, require_committed, write_bytes

FORMAT = 1
VOLUME_BYTES = 15 << 20  # of one file; what carries them may take 16 MiB and not a byte more
TOTAL_BYTES = 60 << 20  # of all files together, which are then six at most
ENTRY_BYTES = 200  # at most: what a zip archive adds to each member
ARCHIVES = ("records.zip", "tensors.zip")
WEIGHTS = ("full", "half")  # precision
KEY = "[0-9a-f]{16}"
MEMBER = re.compile(rf"records/{KEY}\.json|checkpoints/{KEY}\.pt|weights/{KEY}(?:\.half)?\.pt")


@dataclass(frozen=True, slots=True)
class Packed:
    """What an export holds, and the names of what would not fit."""

    records: int
    tensors: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.records} records"
        text += f" and {self.tensors} checkpoints and weights" if self.tensors else ""
        if self.left_out:
            text += f"; {len(self.left_out)} left out for want of room: {', '.join(self.left_out)}"
        return text


@dataclass(frozen=True, slots=True)
class Cargo:
    """What an export was found to hold, whole and in order: records by key, tensors and their ages by name, and what
    probes of the speed of machines found."""

    profile: str
    records: dict[str, Record] = field(default_factory=dict)
    tensors: dict[str, bytes] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Merged:
    """What an import wrote, and how many of its records were there already."""

    records: int
    there: int
    tensors: int

    def __str__(self) -> str:
        return f"{self.records} records new, {self.there} there already, {self.tensors} checkpoints and weights"


# ---------------------------------------------------------------------------------------------- export


@dataclass(frozen=True, slots=True)
class Member:
    """A file that is to be packed under a name; with `halve` its weights in half precision."""

    name: str
    path: Path
    halve: bool = False

    def content(self, room: int) -> bytes | None:
        """What is packed; None if that is more than so many bytes.

        Raises:
            ValueError: it cannot be rounded, being no file of weights.
        """
        if self.path.stat().st_size / (2 if self.halve else 1) > room:
            return None
        content = self.path.read_bytes()
        if self.halve:
            from samlib import half

            try:
                content = half.halved(content)
            except Exception as error:  # a broken pickle can raise anything
                raise ValueError(f"{self.path} cannot be read ({type(error).__name__}) and is left out") from None
        return content if len(content) <= room else None


def export(
    source: Store,
    folder: Path,
    known: Sequence[Store] = (),
    *,
    checkpoints: bool = False,
    weights: str | None = None,
) -> Packed:
    """Packs the finished records of `source` that are in none of the stores `known`; on request also the weights of
    finished runs and the checkpoints of runs in progress that are not there either, as far as there is room: weights
    first, since one file of them is worth a whole run, and of each kind the newest first.

    Each file is replaced as a whole, so that an export cut at any moment leaves the records of the one before, as long
    as these fit into one file.

    Args:
        weights: 'full', or 'half' for weights rounded to float16 (`samlib.half`), which take half the room; a run of
            which there are only rounded weights is packed with these.

    Raises:
        InputError: the folder cannot be written.
    """
    if weights not in (None, *WEIGHTS):
        raise InputError(f"weights = {weights!r} is unknown: use {' or '.join(WEIGHTS)}")
    keys = [key for key in source.recorded() if finished(source, key) and not any(finished(s, key) for s in known)]
    records = [Member(f"records/{key}.json", source.record_path(key)) for key in keys]
    tensors = [
        *(_newest_first(_weights(source, known, weights)) if weights else ()),
        *(_newest_first(_checkpoints(source, known)) if checkpoints else ()),
    ]
    about = {"format": FORMAT, "profile": source.folder.name, "probes": source.probes()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        archive, packed, left_out = _archive(about, records, TOTAL_BYTES, zipfile.ZIP_DEFLATED)
        _write(folder, ARCHIVES[0], archive)
        number = len(packed)
        if checkpoints or weights:
            about["saved"] = {member.name: _saved(member.path) for member in tensors}
            archive, *more = _archive(about, tensors, TOTAL_BYTES - len(archive), zipfile.ZIP_STORED)
            _write(folder, ARCHIVES[1], archive)
            packed, left_out = packed + more[0], left_out + more[1]
    except OSError as error:
        raise InputError(
            f"export = {str(folder)!r} cannot be written ({error.strerror}): name another folder"
        ) from None
    return Packed(number, len(packed) - number, tuple(left_out))


def _weights(source: Store, known: Sequence[Store], precision: str) -> Iterator[Member]:
    """The weights of each run, unless a known store has them as exactly."""
    for key in source.trained():
        path = source.trained_path(key)
        exact = path == source.weights_path(key)
        if precision == "full" and exact:
            name, there = f"weights/{key}.pt", [place.weights_path(key).exists() for place in known]
        else:
            name, there = f"weights/{key}.half.pt", [place.trained_path(key) is not None for place in known]
        if path is not None and MEMBER.fullmatch(name) and not any(there):
            yield Member(name, path, halve=exact and precision == "half")


def _checkpoints(source: Store, known: Sequence[Store]) -> Iterator[Member]:
    """The checkpoint of each run in progress, unless a known store has one that is as young."""
    for path in (source.folder / "checkpoints").glob("*.pt"):
        there = [_saved(place.checkpoint_path(path.stem)) for place in known]
        if MEMBER.fullmatch(name := f"checkpoints/{path.name}") and max(there, default=0) < _saved(path):
            yield Member(name, path)


def _newest_first(members: Iterable[Member]) -> list[Member]:
    return sorted(members, key=lambda member: _saved(member.path), reverse=True)


def _archive(
    about: dict[str, Any], members: Iterable[Member], room: int, compression: int
) -> tuple[bytes, list[str], list[str]]:
    """A zip archive of at most `room` bytes, and the names of its members and of those that it has no room for. A file
    that is gone (the checkpoint of a run that has ended since) or that cannot be rounded is no member."""
    buffer, packed, left_out = BytesIO(), [], []
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo("about.json"), json.dumps(about))
        for member in members:
            try:
                content = member.content(room - buffer.tell() - ENTRY_BYTES * (len(packed) + 2))
            except FileNotFoundError:
                continue
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            if content is None:
                left_out.append(member.name)
            else:  # the date of a ZipInfo is fixed: the same content gives the same bytes
                archive.writestr(zipfile.ZipInfo(member.name), content, compression)
                packed.append(member.name)
    return buffer.getvalue(), packed, left_out


def _write(folder: Path, name: str, archive: bytes) -> None:
    """One file, or as many volumes as it takes; what an earlier export left under other names goes last."""
    volumes = [archive[start : start + VOLUME_BYTES] for start in range(0, len(archive), VOLUME_BYTES)]
    names = [name] if len(volumes) == 1 else [f"{name}.{number:03}" for number in range(1, len(volumes) + 1)]
    for volume, content in zip(names, volumes, strict=True):
        write_bytes(folder / volume, content)
    for path in folder.glob(f"{name}*"):
        if path.name not in names:
            path.unlink()


# ---------------------------------------------------------------------------------------------- import


def read(folder: Path) -> Cargo:
    """Everything that an export holds, each record checked against its key.

    Raises:
        InputError: there is no export, it is damaged, or it holds a record that no store may have.
    """
    found: Cargo | None = None
    for path, content in _archives(folder):
        try:
            cargo = _cargo(path, content)
        except InputError as error:
            if found is None or not path.name.startswith(ARCHIVES[1]):
                raise
            print(f"{error}\n  its checkpoints and weights are left; the records are whole", file=sys.stderr)
            continue
        if found is None:
            found = cargo
        elif cargo.profile != found.profile:
            raise InputError(
                f"import = {str(folder)!r} holds the profiles {found.profile} and {cargo.profile}: use one"
            )
        else:
            found.records.update(cargo.records)
            found.tensors.update(cargo.tensors)
            found.saved.update(cargo.saved)
            found.probes.extend(probe for probe in cargo.probes if probe not in found.probes)
    if found is None:
        raise InputError(f"import = {str(folder)!r} has no {' and no '.join(ARCHIVES)}: name the folder of an export")
    return found


def merge(cargo: Cargo, target: Store, keep_old: bool = False) -> Merged:
    """Adds what an export holds to a store: the committed records (records alone) or a working one. Exact weights
    replace those in half precision. A checkpoint replaces an older one, and goes when its run is finished. With
    `keep_old` a run that the store has, with another result, stays as it is there.

    Raises:
        InputError: a record differs from the one that the store has under its key, or goes to the committed records and
            was made by a samlib that no commit holds; nothing has been written by then.
    """
    new = [record for key, record in cargo.records.items() if _is_new(record, target, key, keep_old)]
    if target.writable:
        target.check_writable()
    else:
        require_committed(cargo.records.values())
    for record in new:
        if target.writable and (there := target.load(record.key)) is not None and there.stale:
            _remove_weights(target, record.key)  # they are of older code too, and no longer those of the record
        target.save(record)
        if target.writable and _saved(target.checkpoint_path(record.key)) < _ended(target, record.key):
            target.checkpoint_path(record.key).unlink(missing_ok=True)
    if target.writable and (probes := [probe for probe in cargo.probes if probe not in target.probes()]):
        target.save_probes([*target.probes(), *probes])
    written = 0
    for name, content in cargo.tensors.items() if target.writable else ():
        if _is_wanted(name, cargo, target):
            write_bytes(target.folder / name, content, saved=cargo.saved.get(name))
            written += 1
            if target.folder / name == target.weights_path(_key(name)):
                target.half_weights_path(_key(name)).unlink(missing_ok=True)
    return Merged(len(new), len(cargo.records) - len(new), written)


def _archives(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """The path and the bytes of each archive, its volumes joined."""
    try:
        for path in (folder / name for name in ARCHIVES):
            if path.exists():
                yield path, path.read_bytes()
            if volumes := sorted(folder.glob(f"{path.name}.[0-9][0-9][0-9]")):
                yield volumes[0], b"".join(volume.read_bytes() for volume in volumes)
    except OSError as error:
        raise InputError(
            f"import = {str(folder)!r} cannot be read ({error.strerror}): name the folder of an export"
        ) from None


def _cargo(path: Path, content: bytes) -> Cargo:
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
            about = json.loads(members.pop("about.json"))
            cargo = Cargo(
                check_profile(about["profile"]),
                saved={name: int(at) for name, at in about.get("saved", {}).items()},
                probes=[_probe(entry) for entry in about.get("probes", [])],
            )
            known_format = about["format"] == FORMAT
    except Exception as error:  # damaged bytes can raise anything
        raise InputError(f"import = {path} is truncated or no export ({error}): export again") from None
    if not known_format:
        raise InputError(f"import = {path} has format = {about['format']}, this samlib reads {FORMAT}: export again")
    for name, member in members.items():
        _take(cargo, path, name, member)
    return cargo


def _probe(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `Store.probes`, if it is one."""
    specs_of.from_canonical(entry["spec"])
    if not (entry["images_per_second"] > 0 and {type(entry["device"]), type(entry["finished"])} == {str}):
        raise ValueError(f"no probe: {entry}")
    return entry


def _take(cargo: Cargo, path: Path, name: str, member: bytes) -> None:
    if not MEMBER.fullmatch(name):
        raise InputError(f"import = {path} holds {name!r}, which no export does: nothing was taken from it")
    if name.startswith("records/"):
        cargo.records[_key(name)] = _record(member, path / name, _key(name))
    else:
        cargo.tensors[name] = member


def _key(name: str) -> str:
    """Of the run that a member of an archive belongs to."""
    return name.split("/")[1].split(".")[0]


def _record(content: bytes, path: Path, key: str) -> Record:
    record = parse(content.decode(errors="replace"), path, key)
    if not record.usable:
        reason = "failed" if record.status == "failed" else f"was made by older code (numerics = {record.numerics})"
        raise InputError(f"record {path} {reason}: run it again before the export")
    return record


def _is_new(record: Record, target: Store, key: str, keep_old: bool) -> bool:
    there = target.load(key)
    if there is None or not there.usable:
        return True
    if there != record and not keep_old:
        raise InputError(
            f"record {key} of the import differs from {target.record_path(key)}, finished {there.finished}: "
            "one run has two results; move one of them away, or --keep-old keeps those that are there"
        )
    return False


def _is_wanted(name: str, cargo: Cargo, target: Store) -> bool:
    """Weights that are not there as exactly, unless the run has another result there; a checkpoint that is younger than
    the one there, and than the end of its run, which may be trained again for its weights."""
    key = _key(name)
    if name.startswith("checkpoints/"):
        older = max(_saved(target.checkpoint_path(key)), _ended(target, key))
        return target.trained_path(key) is None and cargo.saved.get(name, 0) > older
    there = target.weights_path(key).exists() or (target.folder / name).exists()
    return not there and (key not in cargo.records or cargo.records[key] == target.load(key))


def _remove_weights(target: Store, key: str) -> None:
    for path in (target.weights_path(key), target.half_weights_path(key)):
        path.unlink(missing_ok=True)


def _saved(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _ended(target: Store, key: str) -> float:
    """When a run was finished, in nanoseconds; 0 if it is not."""
    if not finished(target, key):
        return 0
    at = target.load(key).finished
    return datetime.fromisoformat(at).timestamp() * 1e9 if at else math.inf
