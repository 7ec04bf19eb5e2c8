"""The record as text: a table for the terminal, and Markdown for the docs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samlib.errors import InputError

HEADINGS = ("section", "network", "variant / reference", "ratio", "95 % interval", "wall", "ms / ms", "rounds", "goal")
ENGINE_HEADINGS = (
    "section", "network", "variant", "images / s", "s / epoch of 50,000 images, extrapolated", "goal", "of matmul",
    "matmul, TFLOP/s", "of copy", "copy, GB/s", "first step, s",
)  # fmt: skip
START_HEADINGS = ("section", "network", "variant", "cache of kernels", "seconds to the first step", "goal")
Table = list[Sequence[str]]  # the headings, then the rows
NUMBERS = 3  # headings from here on are numbers, set flush right
MET = {True: "met", False: "missed", None: ""}


def text(record: dict[str, Any]) -> str:
    """Aligned columns, for a terminal."""
    return "\n".join([*_each_table(record, _aligned), *notes(record)])


def markdown(record: dict[str, Any]) -> str:
    """Markdown tables with the machine below them."""
    return "\n".join([*_each_table(record, _piped), *notes(record)])


def _each_table(record: dict[str, Any], draw: Callable[[Table], list[str]]) -> list[str]:
    """The speeds and, where they were asked for, the engine and the precision; a blank line after each."""
    tables = [[HEADINGS, *map(_cells, record["rows"])]] if record["rows"] else []
    if record.get("engine"):  # records from before there was an engine lack it
        tables.append([ENGINE_HEADINGS, *map(_engine_cells, record["engine"])])
    if record.get("start"):
        tables.append([START_HEADINGS, *map(_start_cells, record["start"])])
    if record["precision"]:
        names = list(record["precision"][0])
        rows = [[_cell(row[name]) for name in names] for row in record["precision"]]
        tables.append([[name.replace("_", " ") for name in names], *rows])
    return [line for one in tables for line in (*draw(one), "")]


def _aligned(lines: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(_justified, range(len(widths)), line, widths)).rstrip() for line in lines]


def _justified(at: int, cell: str, width: int) -> str:
    return cell.ljust(width) if at < NUMBERS else cell.rjust(width)


def _piped(lines: Table) -> list[str]:
    rule = ["---" if at < NUMBERS else "---:" for at in range(len(lines[0]))]
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def notes(record: dict[str, Any]) -> list[str]:
    """Where and how the numbers came about, one sentence a line."""
    env = record["environment"]
    load = record["load"] or [float("nan")]
    threads = " and ".join(map(str, sorted({row["threads"] for row in record["rows"]}))) or "as set"
    changes = " with changes" if env.get("dirty") else ""
    lines = [
        f"{env.get('device', 'no process finished')}, {record['cores']} cores, load {min(load)} to {max(load)}; "
        f"threads {threads}; PyTorch {env.get('torch')}, pytorch_optimizer {record['pytorch_optimizer']}, Python "
        f"{env.get('python')}; commit {str(env.get('commit'))[:12]}{changes}; {record['started'][:10]}, "
        f"{record['seconds']:.0f} s.",
        f"Equality in float64: {len(record['equality'])} checks, all within their tolerance.",
    ]
    lines += [f"Not timed: {_failure(row)}." for row in record.get("failures", [])]
    return [*lines, *([] if record["complete"] else ["Not complete: some of it was not timed."])]


def _failure(row: dict[str, Any]) -> str:
    return ", ".join(row[name] for name in ("section", "network", "variant") if row[name]) + f": {row['error']}"


def load(path: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        InputError: there is none in this file.
    """
    try:
        record = json.loads(path.read_text())
        if record["schema"] == 1 and isinstance(record["rows"], list):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"table = {str(path)!r} holds no record of the bench: write one with `samlib bench --json {path}`")


def _cells(row: dict[str, Any]) -> Sequence[str]:
    return (
        row["section"],
        row["network"] + (f", batch {row['batch']}" if row["batch"] else ""),
        f"{row['variant']} / {row['reference']}",
        f"{row['ratio']:.3f}",
        f"{row['low']:.3f} to {row['high']:.3f}",
        f"{row['wall_ratio']:.3f}",
        f"{row['ms']:.3g} / {row['reference_ms']:.3g}",
        f"{row['rounds']} in {len(row['processes'])}",
        "" if row["goal"] is None else f"{row['goal']:.2f} {MET[row['met']]}",
    )


def _engine_cells(row: dict[str, Any]) -> Sequence[str]:
    goal, waited = row["epoch_goal"], row["first_step_seconds"]
    return (
        row["section"],
        f"{row['network']}, {row['precision']}, batch {row['batch']}",
        row["variant"],
        f"{row['images_per_second']:,.0f}",
        f"{row['epoch_seconds']:.3g}",
        "" if goal is None else f"{goal:.2f} {MET[row['epoch_seconds'] <= goal]}",
        _share(row["of_matmul"]),
        _cell(row["matmul_tflops"]),
        _share(row["of_copy"]),
        _cell(row["copy_gb_per_second"]),
        "" if waited is None else f"{waited:.1f}",
    )


def _start_cells(row: dict[str, Any]) -> Sequence[str]:
    return (
        row["section"],
        f"{row['network']}, {row['precision']}, batch {row['batch']}",
        row["variant"],
        row["cache"],
        f"{row['seconds']:.1f}",
        "" if row["goal"] is None else f"{row['goal']:.0f} {MET[row['seconds'] <= row['goal']]}",
    )


def _share(ends: Sequence[float] | None) -> str:
    return "" if ends is None else "{:.2g} [{:.2g}, {:.2g}]".format(*ends)
