"""One process of the bench: `python -m samlib.bench.speed ORDER`, where ORDER is JSON and names the file to write.

`run` starts it, with the environment that has to be there before torch is loaded.
"""

import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from samlib.bench import anchor, engine, plan, precision, protocol, variants
from samlib.bench.protocol import Built, Times, difference, paired_ratio, require_equal, time_rounds, warm_up
from samlib.provenance import environment

CHECK_BATCH = 16  # examples at most in the check of equality: one in each of 16 shards
# What is compiled is so in the second step, and for good in the third. An engine on a GPU has to replay its graph.
CHECK_STEPS = {"step": 2, "bookkeeping": 4, "engine": 2, "anchor": 2}
MODULES = {"engine": engine, "anchor": anchor}  # with the variants of a kind of case; of the others it is `variants`


def main(order: Mapping[str, Any]) -> int:
    """Measures some cases and writes what came of it, also after an interrupt.

    Args:
        order: `options`, the arguments of `plan.cases`; `indices` into its list; `process`, the number of this process
            and the seed of its random order; `started`, the time when it was; `out`, the file to write.
    """
    cases = plan.cases(**order["options"])
    device = torch.device(order["options"]["device"])
    setting = {**environment(device.type), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    found = {**{name: [] for name in plan.PARTS}, "environment": setting}
    only = len(order["indices"]) == 1  # of several cases the first one would have paid for the others' start
    try:
        for index in order["indices"]:
            measure(cases[index], device, order["process"], found, order["started"] if only else None)
    except KeyboardInterrupt:
        pass
    except Exception as error:  # in the rounds themselves; what is measured is kept
        found["failures"].append(failure(cases[index], None, error))
    Path(order["out"]).write_text(json.dumps(found))
    return 0


def measure(
    case: plan.Case, device: torch.device, process: int, found: dict[str, list], started: float | None = None
) -> None:
    """Equality, then times; appends to `found` as it goes.

    A variant that does not make the update it should, or that does not run at all (a step that cannot be captured, too
    little memory), is not timed, and neither is what is compared with it; `found["failures"]` says why.

    Args:
        case, device: what, and where.
        process: seed of the random order.
        found: lists of rows, by the part of the record.
        started: time when this process was, for the seconds to the engine's first step; None: not taken.

    Raises:
        KeyboardInterrupt: not all rounds were run.
    """
    torch.set_num_threads(case.threads)
    if case.kind == "precision":
        found["precision"] += precision.rows((case.network,))
        return
    if case.kind == "start":
        found["start"].append(start(case, device, started, filled=process > 0))
        return
    waited = seconds_to_first_step(case, device, started) if case.kind == "engine" and started else None
    progress = partial(tqdm, desc=f"{case.section}, {case.network}", leave=False)
    case = checked(case, device, found, progress)
    torch.compiler.reset()  # it remembers what the checks have compiled, against a limit
    case, built = built_and_warm(case, device, process, found)
    if not case.comparisons:
        return
    built |= engine.ceilings(case, device) if case.kind in MODULES else {}
    times = time_rounds(built, case.rounds, seed=process, progress=progress)
    done = len(times[case.timed[0]])
    if done > 1:
        found["rows"] += rows(case, times, device)
    if done > 1 and case.kind in MODULES:
        found["engine"] += of(case).throughput(case, times, device, waited)
    if done < case.rounds:
        raise KeyboardInterrupt


def of(case: plan.Case) -> ModuleType:
    """The module with the variants of a case."""
    return MODULES.get(case.kind, variants)


def start(case: plan.Case, device: torch.device, started: float, filled: bool) -> dict[str, Any]:
    """From the start of this process to the end of the first step, or replay, of the engine with a compiled model."""
    engine.first_step(case, device, compiled=True)
    names = ("section", "network", "batch", "precision")
    cache = "filled" if filled else "empty"
    return {
        **{name: getattr(case, name) for name in names},
        "variant": engine.engine_of(device) + plan.COMPILED,
        "cache": cache,
        "seconds": time.time() - started,
        "goal": plan.START_GOALS[cache] if device.type == "cuda" else None,
    }


def seconds_to_first_step(case: plan.Case, device: torch.device, started: float) -> float:
    """From the start of this process to the end of the engine's first step, or of its first replay."""
    engine.first_step(case, device)
    return time.time() - started


def checked(case: plan.Case, device: torch.device, found: dict[str, list], progress: Callable) -> plan.Case:
    """A few steps in float64 of every variant beside those of the one it must equal; baselines equal themselves.

    Returns:
        The case without those that do not.
    """
    small, steps = replace(case, batch=min(case.batch, CHECK_BATCH)), CHECK_STEPS[case.kind]
    if case.kind in MODULES and device.type == "cuda":
        steps = engine.GRAPH_STEPS
    update = cache(lambda name: protocol.update(of(case).build(name, small, device, torch.float64), steps))

    def equal(name: str) -> None:
        if of(case).VARIANTS[name].like != name:
            found["equality"].append(check(name, case, update))

    return those_that_run(case, equal, found, progress(case.timed))


def built_and_warm(
    case: plan.Case, device: torch.device, process: int, found: dict[str, list]
) -> tuple[plan.Case, dict[str, Built]]:
    """What is to be timed, ready for it; and the case without what is not."""
    block = case.block if device.type == "cpu" or case.kind in ("bookkeeping", "anchor") else variants.BLOCK
    built: dict[str, Built] = {}

    def build(name: str) -> None:
        one = of(case).build(name, case, device, torch.float32, block)
        warm_up(one)
        built[name] = one

    order = random.Random(process).sample(case.timed, len(case.timed))  # who comes first gets other memory
    case = those_that_run(case, build, found, order)
    return case, {name: built[name] for name in order if name in case.timed}


def those_that_run(
    case: plan.Case, take: Callable[[str], None], found: dict[str, list], names: Iterable[str]
) -> plan.Case:
    """The case without the comparisons of the variants for which `take` raises, which `found` then says."""
    failed = set()
    for name in names:
        try:
            take(name)
        except Exception as error:  # of the variant, its capture or its compiler: they raise what they like
            failed.add(name)
            found["failures"].append(failure(case, name, error))
    kept = [one for one in case.comparisons if not {one.variant, one.reference} & failed]
    return replace(case, comparisons=tuple(kept))


def failure(case: plan.Case, name: str | None, error: Exception) -> dict[str, Any]:
    """What became of a variant, or of a whole case (None), which is also said at once."""
    traceback.print_exception(error)
    said = (str(error).strip() or "without a word").splitlines()[0]
    where = {"section": case.section, "network": case.network, "variant": name}
    return {**where, "error": f"{type(error).__name__}: {said}"}


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
