"""Carries finished work from one machine to another in a few plain files.

DIR/records.zip    about.json (with what probes found) and records/<key>.json
DIR/tensors.zip    about.json, checkpoints/<key>.pt and weights/<key>.pt, where they were asked for

An archive that outgrows a file is cut into volumes (`tensors.zip.001`, ...), which `cat tensors.zip.* > tensors.zip`
joins. Nothing here needs torch, and no name in an archive is ever used as a path.
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
MEMBER = re.compile(r"(records|checkpoints|weights)/([0-9a-f]{16})\.(json|pt)")


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


def export(
    source: Store, folder: Path, known: Sequence[Store] = (), *, checkpoints: bool = False, weights: bool = False
) -> Packed:
    """Packs the finished records of `source` that are in none of the stores `known`; on request also the checkpoints of
    runs in progress and the weights of finished ones, the newest first, as far as there is room.

    Each file is replaced as a whole, so that an export cut at any moment leaves the records of the one before.

    Raises:
        InputError: the folder cannot be written.
    """
    keys = [key for key in source.recorded() if finished(source, key) and not any(finished(s, key) for s in known)]
    records = ((f"records/{key}.json", source.record_path(key)) for key in keys)
    files = [*(_newest(source, "checkpoints") if checkpoints else ()), *(_newest(source, "weights") if weights else ())]
    about = {"format": FORMAT, "profile": source.folder.name, "probes": source.probes()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        archive, unpacked = _archive(about, records, TOTAL_BYTES, zipfile.ZIP_DEFLATED)
        _write(folder, ARCHIVES[0], archive)
        left_out = list(unpacked)
        if checkpoints or weights:
            about["saved"] = {name: path.stat().st_mtime_ns for name, path in files}
            archive, unpacked = _archive(about, files, TOTAL_BYTES - len(archive), zipfile.ZIP_STORED)
            _write(folder, ARCHIVES[1], archive)
            left_out += unpacked
    except OSError as error:
        raise InputError(
            f"export = {str(folder)!r} cannot be written ({error.strerror}): name another folder"
        ) from None
    lost = sum(name.startswith("records/") for name in left_out)
    return Packed(len(keys) - lost, len(files) - (len(left_out) - lost), tuple(left_out))


def _newest(source: Store, kind: str) -> list[tuple[str, Path]]:
    paths = sorted((source.folder / kind).glob("*.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [(name, path) for path in paths if MEMBER.fullmatch(name := f"{kind}/{path.name}")]


def _archive(
    about: dict[str, Any], members: Iterable[tuple[str, Path]], room: int, compression: int
) -> tuple[bytes, list[str]]:
    """A zip archive of at most `room` bytes, and the names of the members that it has no room for."""
    buffer, left_out = BytesIO(), []
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo("about.json"), json.dumps(about))
        for name, path in members:
            written = buffer.tell() + ENTRY_BYTES * (len(archive.infolist()) + 1)
            if written + path.stat().st_size > room:
                left_out.append(name)
            else:  # the date of a ZipInfo is fixed: the same content gives the same bytes
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), compression)
    return buffer.getvalue(), left_out


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
    """Adds what an export holds to a store: the committed records (records alone) or a working one. A checkpoint
    replaces an older one, and goes when its run is finished. With `keep_old` a run that the store has, with another
    result, stays as it is there.

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
        target.save(record)
        if target.writable and _saved(target.checkpoint_path(record.key)) < _ended(target, record.key):
            target.checkpoint_path(record.key).unlink(missing_ok=True)
    if target.writable and (probes := [probe for probe in cargo.probes if probe not in target.probes()]):
        target.save_probes([*target.probes(), *probes])
    tensors = [name for name in cargo.tensors if target.writable and _is_wanted(name, cargo, target)]
    for name in tensors:
        write_bytes(target.folder / name, cargo.tensors[name], saved=cargo.saved.get(name))
    return Merged(len(new), len(cargo.records) - len(new), len(tensors))


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
    match = MEMBER.fullmatch(name)
    if match is None or (match[1] == "records") != (match[3] == "json"):
        raise InputError(f"import = {path} holds {name!r}, which no export does: nothing was taken from it")
    if match[1] == "records":
        cargo.records[match[2]] = _record(member, path / name, match[2])
    else:
        cargo.tensors[name] = member


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
    """Weights that are not there; a checkpoint that is younger than the one there, and than the end of its run, which
    may be trained again for its weights."""
    kind, key = name.removesuffix(".pt").split("/")
    if target.weights_path(key).exists():
        return False
    return kind == "weights" or cargo.saved.get(name, 0) > max(_saved(target.checkpoint_path(key)), _ended(target, key))


def _saved(path: Path) -> float:
    """When a file was written, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _ended(target: Store, key: str) -> float:
    """When a run was finished, in nanoseconds; 0 if it is not."""
    if not finished(target, key):
        return 0
    at = target.load(key).finished
    return datetime.fromisoformat(at).timestamp() * 1e9 if at else math.inf
