"""One process of the bench: `python -m samlib.bench.speed ORDER`, where ORDER is JSON and names the file to write.

`run` starts it, with the environment that has to be there before torch is loaded.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from samlib.bench import engine, plan, precision, protocol, variants
from samlib.bench.protocol import NotEqualError, Times, difference, paired_ratio, require_equal, time_rounds
from samlib.provenance import environment

CHECK_BATCH = 16  # examples at most in the check of equality: one in each of 16 shards
# What is compiled is so in the second step, and for good in the third. An engine on a GPU has to replay its graph.
CHECK_STEPS = {"step": 2, "bookkeeping": 4, "engine": 2}


def main(order: Mapping[str, Any]) -> int:
    """Measures some cases and writes what came of it, also after an interrupt.

    Args:
        order: `options`, the arguments of `plan.cases`; `indices` into its list; `process`, the number of this process
            and the seed of its random order; `started`, the time when it was; `out`, the file to write.
    """
    cases = plan.cases(**order["options"])
    device = torch.device(order["options"]["device"])
    setting = {**environment(device.type), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    found = {"rows": [], "equality": [], "engine": [], "precision": [], "error": None, "environment": setting}
    only = len(order["indices"]) == 1  # of several cases the first one would have paid for the others' start
    try:
        for index in order["indices"]:
            measure(cases[index], device, order["process"], found, order["started"] if only else None)
    except KeyboardInterrupt:
        pass
    except NotEqualError as error:
        found["error"] = str(error)
    Path(order["out"]).write_text(json.dumps(found))
    return 0


def measure(
    case: plan.Case, device: torch.device, process: int, found: dict[str, list], started: float | None = None
) -> None:
    """Equality, then times; appends to `found` as it goes.

    Args:
        case, device: what, and where.
        process: seed of the random order.
        found: lists of rows, by the part of the record.
        started: time when this process was, for the seconds to the engine's first step; None: not taken.

    Raises:
        NotEqualError: a variant does not make the update it should.
        KeyboardInterrupt: not all rounds were run.
    """
    torch.set_num_threads(case.threads)
    if case.kind == "precision":
        found["precision"] += precision.rows((case.network,))
        return
    is_engine = case.kind == "engine"
    waited = seconds_to_first_step(case, device, started) if is_engine and started else None
    progress = partial(tqdm, desc=f"{case.section}, {case.network}", leave=False)
    found["equality"] += checks(case, device, progress)
    block = case.block if device.type == "cpu" or case.kind == "bookkeeping" else variants.BLOCK
    order = random.Random(process).sample(case.timed, len(case.timed))  # who comes first gets other memory
    built = {name: of(case).build(name, case, device, torch.float32, block) for name in order}
    built |= engine.ceilings(case, device) if is_engine else {}
    times = time_rounds(built, case.rounds, seed=process, progress=progress)
    done = len(times[case.timed[0]])
    if done > 1:
        found["rows"] += rows(case, times, device)
    if done > 1 and is_engine:
        found["engine"] += engine.throughput(case, times, device, waited)
    if done < case.rounds:
        raise KeyboardInterrupt


def of(case: plan.Case) -> ModuleType:
    """The module with the variants of a case."""
    return engine if case.kind == "engine" else variants


def seconds_to_first_step(case: plan.Case, device: torch.device, started: float) -> float:
    """From the start of this process to the end of the engine's first step, or of its first replay."""
    engine.first_step(case, device)
    return time.time() - started


def checks(case: plan.Case, device: torch.device, progress: Callable) -> list[dict[str, Any]]:
    """A few steps in float64 of every variant beside those of the one it must equal; baselines equal themselves."""
    small, steps = replace(case, batch=min(case.batch, CHECK_BATCH)), CHECK_STEPS[case.kind]
    if case.kind == "engine" and device.type == "cuda":
        steps = engine.GRAPH_STEPS
    update = cache(lambda name: protocol.update(of(case).build(name, small, device, torch.float64), steps))
    return [check(name, case, update) for name in progress(case.timed) if of(case).VARIANTS[name].like != name]


def check(name: str, case: plan.Case, update: Callable[[str], Tensor]) -> dict[str, Any]:
    like, tolerance = of(case).VARIANTS[name].like, of(case).VARIANTS[name].tolerance
    found = difference(update(name), update(like) if like else None)
    require_equal(f"{case.section}, {case.network}, {name}", found, tolerance)
    where = {"section": case.section, "network": case.network, "variant": name}
    return {**where, "like": like, "difference": found, "tolerance": tolerance}


def rows(case: plan.Case, times: Mapping[str, Sequence[Times]], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each comparison of a case, as this process saw it."""
    clock = "cuda" if device.type == "cuda" else case.clock
    wall = {name: [one.wall for one in series] for name, series in times.items()}
    chosen = wall if clock == "wall" else {name: [one.device for one in series] for name, series in times.items()}
    for one in case.comparisons:
        yield {
            "section": case.section,
            "network": case.network,
            "batch": case.batch or None,
            "variant": one.variant,
            "reference": one.reference,
            "clock": clock,
            **paired_ratio(chosen[one.variant], chosen[one.reference])._asdict(),
            "wall_ratio": paired_ratio(wall[one.variant], wall[one.reference]).ratio,
            "ms": 1000 * statistics.median(chosen[one.variant]),
            "reference_ms": 1000 * statistics.median(chosen[one.reference]),
            "rounds": len(wall[one.variant]),
            "threads": case.threads,
            "goal": one.goal,
        }


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
