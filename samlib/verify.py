"""Runs one record again and compares it with what is stored."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from samlib import spec as specs_of
from samlib.store import Record, Store

# On the machine that made a record a run repeats to the last digit. On another processor the path of a run drifts: two
# instruction sets were seen to differ by up to 1.8 points of accuracy in one run; `compare` judges means over seeds.
# A single run further off than this has more than rounding against it.
EXACT = 1e-6
RELATIVE = 0.25  # of numbers of any scale, such as losses and eigenvalues
ROUNDING = 1e-6  # of numbers that are zero but for rounding
POINTS = 5.0  # of percentages, in points: a share of 90 per cent would be a tolerance of 22 points


@dataclass(frozen=True, slots=True)
class Report:
    """What came out of a repeated run: (name, stored, now) for every number that was compared."""

    record: Record
    again: Record
    numbers: tuple[tuple[str, float, float], ...]

    @property
    def exact(self) -> bool:
        return self._same_status and all(_close(old, new, EXACT, 1e-12) for _, old, new in self.numbers)

    @property
    def agrees(self) -> bool:
        return self._same_status and all(
            _close(old, new, 0.0, POINTS) if "_pct" in name else _close(old, new, RELATIVE, ROUNDING)
            for name, old, new in self.numbers
        )

    @property
    def _same_status(self) -> bool:
        return self.record.status == self.again.status

    def __str__(self) -> str:
        outcome = "identical" if self.exact else "agrees" if self.agrees else "DIFFERS"
        lines = [f"{self.record.key}: {outcome} ({len(self.numbers)} numbers, {self.again.wall_seconds:.1f} s)"]
        if not self._same_status:
            lines.append(f"  status: {self.record.status} stored, {self.again.status} now")
        if self.record.of_half_weights:
            lines.append("  stored: of weights rounded to half precision; now of the exact ones")
        if not self.exact:
            lines += [f"  {name}: {old:.7g} stored, {new:.7g} now" for name, old, new in self.numbers if old != new]
        return "\n".join(lines)


def verify(record: Record, store: Store, device: str | None = None) -> Report:
    """Runs the record's spec in a folder of its own (with the run a measure belongs to) and compares.

    Raises:
        InputError: a measure whose run has no record, or a device that is not there.
    """
    from samlib import sweep, train

    spec = specs_of.from_canonical(record.spec)
    with tempfile.TemporaryDirectory() as folder, sweep.one_thread():
        scratch = Store(Path(folder), writable=True)
        for key in specs_of.parents(spec):
            parent = store.load(key)
            if parent is not None:
                scratch.save(parent)
        again = train.run(spec, scratch, device)
        again = scratch.load(again.key) or again  # rounded as stored records are
    return Report(record, again, tuple(_numbers(record, again)))


def _numbers(record: Record, again: Record) -> Iterator[tuple[str, float, float]]:
    for name, old in record.measures.items():
        yield name, _number(old), _number(again.measures.get(name))
    for name, old in record.final.get("last", {}).items():
        yield name, _number(old), _number(again.final.get("last", {}).get(name))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _close(old: float, new: float, relative: float, absolute: float) -> bool:
    """Within the larger of the two tolerances; NaN is close to NaN."""
    return (math.isnan(old) and math.isnan(new)) or math.isclose(old, new, rel_tol=relative, abs_tol=absolute)
