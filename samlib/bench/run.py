"""The whole bench: starts its processes one after the other and puts the record together. Loads no torch itself."""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from samlib.bench import plan
from samlib.errors import InputError

SCHEMA = 1
Record = dict[str, Any]

# Threads that wait must not spin: on a shared machine they then take the time of those that work.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def run(
    device: str,
    only: Sequence[str] | None = None,
    *,
    rounds: int | None = None,
    quick: bool = False,
    keep: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Measures and returns the record. An interrupt keeps what is there, with `complete` false; so does what fails, and
    the others go on.

    Args:
        device, only, rounds, quick: as for `plan.cases`.
        keep: is given the record before the first process and after every one.

    Raises:
        InputError: as `plan.cases`; pytorch_optimizer is not installed.
    """
    options = {"device": device, "only": only, "rounds": rounds, "quick": quick}
    cases = plan.cases(**options)
    if importlib.util.find_spec("pytorch_optimizer") is None:
        raise InputError(
            "the bench compares with pytorch_optimizer, which is not installed: pip install 'samlib[bench]'"
        )
    record = _begin(options)
    keep(record)  # a file that cannot be written is known now
    parts: list[Record] = []
    with tempfile.TemporaryDirectory() as caches:
        for number, (process, indices) in enumerate(orders := list(_orders(cases, quick)), start=1):
            print(f"bench: process {number} of {len(orders)}", file=sys.stderr)
            chosen = [cases[index] for index in indices]
            order = {"options": options, "indices": indices, "process": process}
            part, record["interrupted"] = _process(order, _variables(chosen, Path(caches, str(indices[0]))))
            if not record["interrupted"]:
                part = part or _ended(chosen)
            parts += [part] if part else []
            _put_together(record, parts)
            record["complete"] = number == len(orders) and not record["failures"] and not record["interrupted"]
            keep(record)
            if record["interrupted"]:
                break
    return record


def _orders(cases: Sequence[plan.Case], quick: bool) -> Iterator[tuple[int, list[int]]]:
    """The number of each process, from 0 for every case, and the cases it measures."""
    if quick:
        yield 0, list(range(len(cases)))
    else:
        yield from ((process, [index]) for index, case in enumerate(cases) for process in range(case.processes))


def _variables(cases: Sequence[plan.Case], cache: Path) -> dict[str, str]:
    """The environment of a process for these cases; one that times a start has a cache of kernels of its own."""
    threads = str(max(case.threads for case in cases))
    found = {**PASSIVE, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if any(case.kind == "start" for case in cases):
        found |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    return found


def _process(order: dict[str, Any], variables: dict[str, str]) -> tuple[Record | None, bool]:
    """What one fresh process found, None if it failed; and whether an interrupt came.

    The process is in a session of its own, so that one interrupt reaches it once, through here.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "part.json")
        order = {**order, "started": time.time(), "out": str(out)}
        command = [sys.executable, "-m", "samlib.bench.speed", json.dumps(order)]
        child = subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True)
        interrupted = False
        try:
            child.wait()
        except KeyboardInterrupt:
            interrupted = True
            child.send_signal(signal.SIGINT)
            child.wait()
        return json.loads(out.read_text()) if out.exists() else None, interrupted


def _ended(cases: Sequence[plan.Case]) -> Record:
    """In place of what a process would have found that ended before."""
    gone = [{"section": case.section, "network": case.network, "variant": None, "error": "no result"} for case in cases]
    return {**{name: [] for name in plan.PARTS}, "environment": {}, "failures": gone}


def _begin(options: dict[str, Any]) -> Record:
    return {
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "complete": False,
        "interrupted": False,
        "options": options,
        "environment": {},
        "pytorch_optimizer": version("pytorch-optimizer"),
        "cores": os.cpu_count(),
        "load": [],
        **{name: [] for name in plan.PARTS},
    }


def _put_together(record: Record, parts: Sequence[Record]) -> None:
    record["seconds"] = round(time.time() - datetime.fromisoformat(record["started"]).timestamp(), 1)
    record["load"].append(round(os.getloadavg()[0], 2))
    environment = next((part["environment"] for part in parts if part["environment"]), {})
    record["environment"] = {name: value for name, value in environment.items() if name != "threads"}
    record |= {name: [row for part in parts for row in part[name]] for name in plan.PARTS}
    record["equality"] = _worst(record["equality"])
    record["rows"] = merged(record["rows"])
    record["engine"] = merged_engine(record["engine"])


def _worst(checks: Sequence[Record]) -> list[Record]:
    """One check for each variant of a case: the process with the largest difference."""
    found: dict[tuple, Record] = {}
    for row in checks:
        key = (row["section"], row["network"], row["variant"])
        if key not in found or row["difference"] > found[key]["difference"]:
            found[key] = row
    return list(found.values())


def merged(rows: Sequence[Record]) -> list[Record]:
    """One row for each comparison, from those of its processes.

    The ratio is the median over processes, the interval reaches from the lowest end to the highest, and a goal is met
    unless the near end of the interval misses it in the greater part of the processes.
    """
    groups: dict[tuple, list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("section", "network", "variant", "reference")), []).append(row)
    return [_merged(group) for group in groups.values()]


def _merged(group: Sequence[Record]) -> Record:
    goal = group[0]["goal"]
    return {
        **group[0],
        **{
            name: statistics.median(row[name] for row in group)
            for name in ("ratio", "wall_ratio", "ms", "reference_ms")
        },
        "low": min(row["low"] for row in group),
        "high": max(row["high"] for row in group),
        "rounds": sum(row["rounds"] for row in group),
        "processes": [[row["ratio"], row["low"], row["high"]] for row in group],
        "met": None if goal is None else 2 * sum(row["low"] > goal for row in group) <= len(group),
    }


def merged_engine(rows: Sequence[Record]) -> list[Record]:
    """One row for each variant of an engine case: medians over its processes, intervals to their furthest ends."""
    groups: dict[tuple, list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("section", "network", "variant")), []).append(row)
    return [{name: _middle([row[name] for row in group]) for name in group[0]} for group in groups.values()]


def _middle(values: Sequence[Any]) -> Any:
    if isinstance(values[0], float):
        return statistics.median(values)
    if isinstance(values[0], list):  # a ratio and the ends of its interval
        ratio, low, high = zip(*values, strict=True)
        return [statistics.median(ratio), min(low), max(high)]
    return values[0]
