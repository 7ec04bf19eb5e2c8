"""The command line: python -m samlib list | run | import | show | verify | verdicts | compare | export | publish |
bench.

Exit codes: 0 fine, 1 a run, a comparison or the bench failed, 2 bad input (nothing was written), 3 a verdict flipped,
130 interrupted (the same command goes on).
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from samlib import estimate, experiments, pack, provenance
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import Arm
from samlib.spec import Spec
from samlib.store import Record, Store, known_store, open_store, pending, publish

INPUT_ERROR, INTERRUPTED = 2, 130
MARGIN, MARGIN_SECONDS = 0.05, 15.0  # of a time limit, and at most: what is left for the last checkpoint and the export
EXPORT_SECONDS = 10.0  # between two exports of a sweep that goes on


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except InputError as error:
        print(f"samlib: {error}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print("\nsamlib: interrupted. What is finished is kept; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m samlib", description="Runs the study and reads its records.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def bare_command(name: str, function, help: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(command=function)
        return found

    def command(name: str, function, help: str, store: str) -> argparse.ArgumentParser:
        found = bare_command(name, function, help)
        found.add_argument("--profile", default="quick", help=f"one of {', '.join(experiments.PROFILES)}")
        found.add_argument("--store", default=store, help="results, runs, or a folder such as ./mine")
        return found

    listing = command("list", list_experiments, "List the experiments with their runs and claims.", "results")
    listing.add_argument("--keys", action="store_true", help="also each run: key, status, cell, role, seed")
    run = command("run", run_pending, "Run what is pending.", "runs")
    run.add_argument("--experiment", action="append", metavar="STEM", help="only this experiment (may be repeated)")
    run.add_argument("--only", nargs="+", metavar="KEY", default=[], help="only these keys")
    run.add_argument("--tuning", action="store_true", help="tuning runs too whose records are committed")
    run.add_argument("--workers", type=int, help="worker processes (default: one per core, one on a GPU)")
    run.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    run.add_argument("--graph", action="store_true", help="one CUDA graph per training step (not yet proven on a GPU)")
    run.add_argument("--compile", action="store_true", help="passes by torch.compile (not yet proven on a GPU)")
    run.add_argument("--side-by-side", type=int, default=1, metavar="N", help="train N runs at a time on one GPU")
    run.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="a variation of your own: other seeds")
    run.add_argument(
        "--override",
        action="append",
        metavar="FIELD=VALUE",
        default=[],
        help="a variation of your own: another value of a field, such as epochs=2 (may be repeated)",
    )
    run.add_argument("--time-limit", metavar="9m", help="stop in time, and go on with the same command: 90s, 1h30m")
    run.add_argument("--known", nargs="+", metavar="DIR", default=[], help="do not run what these stores have")
    run.add_argument("--export", type=Path, metavar="DIR", help="pack what is finished, and not known, into few files")
    run.add_argument("--with-checkpoints", action="store_true", help="export the runs in progress too")
    run.add_argument(
        "--with-weights",
        nargs="?",
        const="full",
        choices=pack.WEIGHTS,
        help="export the weights of finished runs too; half: rounded to half precision, which takes half the room",
    )
    run.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    run.add_argument("--probe", action="store_true", help="first measure for a minute how fast this machine is")
    imported = bare_command("import", import_records, "Add what `run --export` packed to a store.")
    imported.add_argument("folder", type=Path, metavar="DIR")
    imported.add_argument(
        "--keep-old", action="store_true", help="leave runs as they are that have another result here"
    )
    imported.add_argument("--profile", help="refuse the records of any other (default: that of the export)")
    imported.add_argument("--store", default="runs", help="results (for maintainers), runs, or a folder such as ./mine")
    command("show", show, "Print one record.", "results").add_argument("key", metavar="KEY")
    verify = command("verify", verify_record, "Run one record again and compare.", "results")
    verify.add_argument("key", metavar="KEY")
    verify.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    verdicts = command("verdicts", print_verdicts, "Decide the claims.", "results")
    verdicts.add_argument("--claim", help="only this claim")
    verdicts.add_argument("--json", action="store_true", help="as JSON, with every statistic")
    command("compare", compare_stores, "Compare fresh records (runs) with the committed ones (results).", "runs")
    command("publish", publish_records, "Make a complete run the committed records (for maintainers).", "runs")
    export = command("export", export_tables, "Write the records as CSV with a data dictionary.", "results")
    export.add_argument("folder", type=Path, metavar="FOLDER")
    bench = bare_command("bench", run_bench, "Time the optimisers beside SGD and pytorch_optimizer (half an hour).")
    bench.add_argument("--only", nargs="+", metavar="SECTION", help="only these sections of the table")
    bench.add_argument("--rounds", type=int, help="in place of 15 to 60, by section")
    bench.add_argument("--quick", action="store_true", help="a part of it in seconds, to see that it runs")
    bench.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    bench.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the record as JSON; - is stdout")
    bench.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print a record as a Markdown table")
    return top


# ---------------------------------------------------------------------------------------------- the commands


def list_experiments(options: argparse.Namespace) -> int:
    store = open_store(options.profile, options.store)
    for stem in experiments.STEMS:
        specs = experiments.all_specs(options.profile, [stem])
        tuning = len(experiments.all_specs(options.profile, [stem], tuning=True)) - len(specs)
        left = len(pending(specs, store))
        print(f"{stem}: {experiments.load(stem).TITLE}")
        print(f"  {len(specs)} runs on {options.profile}, {left} of them pending in {options.store}")
        if tuning:
            print(f"  {tuning} tuning runs beside them: run --tuning")
        print(f"  decides {', '.join(experiments.load(stem).DECIDES)}")
        if options.keys:
            for row in store.frame(experiments.arms(stem, options.profile)).itertuples():
                print(f"  {row.key}  {row.status:<8}  {row.cell}: {row.role}, seed {row.seed}")
    return 0


def run_pending(options: argparse.Namespace) -> int:
    began = time.monotonic()
    from samlib import sweep

    sweep.check_side_by_side(options.side_by_side)
    limit = estimate.duration(options.time_limit) if options.time_limit else math.inf
    if limit < math.inf:  # schedulers and `timeout` send it: the checkpoint and the export are still written
        signal.signal(signal.SIGTERM, interrupt)
    store = open_store(options.profile, options.store)
    known = [known_store(options.profile, name) for name in options.known]
    if options.probe or not options.dry_run:
        require_device(options.profile, options.device)
    for name in ("graph", "compile"):
        if getattr(options, name):
            os.environ[f"SAMLIB_{name.upper()}"] = "1"
    varied = options.seeds, read_overrides(options.override)
    specs = chosen_specs(options.profile, options.experiment, options.only, options.tuning, *varied)
    if options.probe:
        measure_speed(specs, store, known, options)
    if options.dry_run:
        print_plan(specs, store, known, limit, options)
        return 0
    with exported(store, known, options) as refresh:
        summary = sweep.run_all(
            specs,
            store,
            known,
            options.workers,
            options.device,
            deadline=began + limit - min(MARGIN_SECONDS, MARGIN * limit),
            speed=known_speed(options, [store, *known]) if limit < math.inf else None,
            titles=experiments.titles(chosen_arms(options.profile, options.experiment, True, *varied)),
            after=refresh,
            side_by_side=options.side_by_side,
        )
    total = summary.done + summary.diverged + len(summary.failed)
    print(
        f"{total} runs in {summary.seconds:.0f} s ({summary.done} done, {summary.diverged} diverged, "
        f"{len(summary.failed)} failed); {len(specs) - total - summary.left} were there already. "
        f"Records: {store.folder / 'records'}"
    )
    if summary.left:
        print(f"{summary.left} runs are left: the same command goes on")
    if summary.too_long:
        print(f"{summary.too_long} of them are expected to take longer than the time limit: raise it for these")
    for key in summary.failed:
        record = store.load(key)
        print(f"  failed {key}: {(record.error or '').splitlines()[0] if record else ''}", file=sys.stderr)
    return 1 if summary.failed else 0


def known_speed(options: argparse.Namespace, stores: Sequence[Store]) -> estimate.Speed:
    """Of this machine; for a profile that needs a GPU, and where there is none here, of the one that was used last."""
    from samlib import probe

    if options.profile != "quick" and options.device is None and default_device() == "cpu":
        return estimate.elsewhere(stores)
    return probe.speed(options.device, stores)


def print_plan(
    specs: Sequence[Spec], store: Store, known: Sequence[Store], limit: float, options: argparse.Namespace
) -> None:
    from samlib import sweep

    speed = known_speed(options, [store, *known])
    speed.know(specs)
    trained = [key for place in (store, *known) for key in place.trained()]
    varied = options.seeds, read_overrides(options.override)
    arms = chosen_arms(options.profile, options.experiment, True, *varied)
    rows = estimate.plan(arms, sweep.parents_first(pending(specs, store, known)), speed, trained, limit)
    print(f"{options.profile} on {speed.device or 'a GPU of assumed speed'}, {len(specs)} runs in all")
    print(estimate.report(rows, options.profile, limit))


def measure_speed(specs: Sequence[Spec], store: Store, known: Sequence[Store], options: argparse.Namespace) -> None:
    from samlib import probe, sweep

    store.check_writable()
    sweep.put_aside_unusable(store)
    with sweep.one_thread():
        left, side_by_side = pending(specs, store, known), options.side_by_side
        for line in probe.probe(left, store, options.device, side_by_side=side_by_side):
            print(line, flush=True)


@contextmanager
def exported(
    store: Store, known: Sequence[Store], options: argparse.Namespace
) -> Iterator[Callable[[Record], None] | None]:
    """Packs what is finished, if that is asked for: now and then, by the function that is handed out, for a tenth of
    the time at most, and in the end, come it early or not."""
    if options.export is None:
        if options.with_checkpoints or options.with_weights:
            raise InputError("with-checkpoints and with-weights say what is packed: name a folder with --export too")
        yield None
        return
    from samlib import sweep

    store.check_writable()
    sweep.put_aside_unusable(store)
    if provenance.commit().get("dirty") is not False:
        print(
            "samlib: these records cannot become committed ones (import --store results): samlib differs from its "
            "commit, or has no history here. Then set SAMLIB_COMMIT to the output, at home, of "
            "git describe --always --abbrev=40 --dirty --exclude '*'",
            file=sys.stderr,
        )
    wanted = {"checkpoints": options.with_checkpoints, "weights": options.with_weights}
    pack.export(store, options.export, known, **wanted)  # a folder that cannot be written is found out now
    packed, pause = time.monotonic(), EXPORT_SECONDS

    def refresh(_: Record) -> None:
        nonlocal packed, pause
        began = time.monotonic()
        if began - packed <= pause:
            return
        try:
            pack.export(store, options.export, known, **wanted)
        except InputError as error:  # the sweep is worth more than one export; the last one has to succeed
            print(f"samlib: {error}", file=sys.stderr)
        packed = time.monotonic()
        pause = EXPORT_SECONDS * max(1.0, packed - began)

    try:
        yield refresh
    finally:
        print(f"{options.export}: {pack.export(store, options.export, known, **wanted)}")


def import_records(options: argparse.Namespace) -> int:
    cargo = pack.read(options.folder)
    if options.profile not in (None, cargo.profile):
        raise InputError(f"profile = {options.profile!r}: {options.folder} holds records of {cargo.profile}")
    target = open_store(cargo.profile, options.store)
    print(f"{target.folder}: {pack.merge(cargo, target, keep_old=options.keep_old)}")
    if target.writable:
        print("Another machine makes these runs again unless it finds them in a store named with --known")
    return 0


def show(options: argparse.Namespace) -> int:
    print(json.dumps(asdict(require_record(options)), indent=2))
    return 0


def verify_record(options: argparse.Namespace) -> int:
    from samlib import verify

    report = verify.verify(require_record(options), open_store(options.profile, options.store), options.device)
    print(report)
    return 0 if report.agrees else 1


def print_verdicts(options: argparse.Namespace) -> int:
    from samlib import claims

    store = open_store(options.profile, options.store)
    found = (
        [claims.verdict(options.claim, options.profile, store)]
        if options.claim
        else claims.verdicts(options.profile, store)
    )
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in found], indent=2))
    else:
        print(verdict_table(found))
    return 0


def compare_stores(options: argparse.Namespace) -> int:
    from samlib import claims
    from samlib.compare import compare

    fresh = open_store(options.profile, options.store)
    found = compare(options.profile, open_store(options.profile, "results"), fresh)
    print(verdict_table(claims.verdicts(options.profile, fresh)))
    print(found.report())
    return found.exit_code


def export_tables(options: argparse.Namespace) -> int:
    from samlib import export

    for path in export.export(options.profile, open_store(options.profile, options.store), options.folder):
        print(path)
    return 0


def publish_records(options: argparse.Namespace) -> int:
    source, target = open_store(options.profile, options.store), open_store(options.profile, "results")
    specs = experiments.all_specs(options.profile, tuning=True)
    reported = {specs_of.key(spec) for spec in experiments.all_specs(options.profile)}
    count = publish(specs, source, target, kept={specs_of.key(spec) for spec in specs} - reported)
    print(f"{count} records in {target.folder / 'records'}: look at them, run `make refresh`, and commit both")
    if half := sum(record.of_half_weights for record in target.records()):
        print(f"{half} of them were measured on weights in half precision, as their column half_weights says")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    from samlib.bench import run, table

    if options.table:
        print(table.markdown(table.load(options.table)))
        return 0
    if options.device == "cuda" and default_device() == "cpu":
        raise InputError("device = 'cuda': PyTorch sees no GPU here; use --device cpu")
    chosen = {"rounds": options.rounds, "quick": options.quick}
    record = run.run(options.device or default_device(), options.only, **chosen, keep=partial(keep_json, options.json))
    if options.json == "-":
        print(json.dumps(record, indent=1))
    else:
        print(table.text(record))
    return 0 if record["complete"] else INTERRUPTED if record["interrupted"] else 1


def keep_json(path: str | None, record: dict) -> None:
    """Writes the record so far, unless it is for stdout."""
    if path in (None, "-"):
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"json = {path!r} cannot be written: {error.strerror}; name a file in a folder of yours"
        ) from None


# ---------------------------------------------------------------------------------------------- what they share


def interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def chosen_arms(
    profile: str,
    stems: Sequence[str] | None,
    tuning: bool,
    seeds: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[tuple[str, Arm]]:
    """The arms of a profile, or of some experiments, or a variation of them, with the name of the experiment; without
    `tuning` no tuning arms whose committed records stand in for them."""
    stems = stems or experiments.STEMS
    found = [(stem, arm) for stem in stems for arm in experiments.arms(stem, profile, seeds, overrides)]
    committed = set(open_store(profile, "results").recorded())
    return [(stem, arm) for stem, arm in found if tuning or not (arm.tuning and keys_of(arm) <= committed)]


def keys_of(arm: Arm) -> set[str]:
    return {specs_of.key(member) for member in arm.specs}


def read_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE as a mapping; a value is a number, true, false, null or else a word."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"override = {text!r}: write FIELD=VALUE, for example epochs=2")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def chosen_specs(
    profile: str,
    stems: Sequence[str] | None,
    keys: Sequence[str],
    tuning: bool = False,
    seeds: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Spec]:
    """The specs of a profile, of some experiments, or with some keys (a measure brings along its run; a key may be that
    of a tuning run), those first that are worth most where time is short; or of a variation of them."""
    arms = chosen_arms(profile, stems, tuning or bool(keys), seeds, overrides)
    specs = experiments.in_order_of_worth([arm for _, arm in arms])
    if not specs:
        raise InputError(f"profile = {profile!r} has no runs yet: use --profile quick")
    if not keys:
        return specs
    by_key = {specs_of.key(spec): spec for spec in specs}
    for key in keys:
        if key not in by_key:
            raise InputError(f"key = {key!r} is no run of profile {profile}: see `python -m samlib list --keys`")
    parents = [parent for key in keys for parent in specs_of.parents(by_key[key])]
    return [by_key[key] for key in dict.fromkeys([*parents, *keys])]


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(profile: str, device: str | None) -> None:
    """The gpu and paper profiles train on CIFAR for hours: without a GPU that is a mistake unless asked for by name."""
    if profile == "quick" or device is not None:
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"profile = {profile!r} needs a GPU and PyTorch sees none here: run it on a machine with one, "
            "use --profile quick, or insist with --device cpu"
        )


def require_record(options: argparse.Namespace) -> Record:
    store: Store = open_store(options.profile, options.store)
    record = store.load(options.key) if specs_of.is_key(options.key) else None
    if record is None:
        raise InputError(
            f"key = {options.key!r} has no record in {store.folder}: a key is 16 hex digits; "
            "`python -m samlib list --keys` shows them"
        )
    return record


def verdict_table(verdicts: Sequence) -> str:
    """Claims that were decided, one per line, and a count of those not run."""
    decided = [verdict for verdict in verdicts if verdict.outcome != "not run"]
    width = max((len(verdict.claim) for verdict in verdicts), default=0)
    lines = [
        f"{verdict.claim:<{width}}  {verdict.outcome}{' (miniature)' if verdict.miniature else ''}"
        for verdict in decided
    ]
    left = len(verdicts) - len(decided)
    if len(verdicts) == 1 and left:
        return f"{verdicts[0].claim}  not run: {verdicts[0].reason}"
    return "\n".join([*lines, f"{left} further claims: not run on this profile"])


if __name__ == "__main__":
    sys.exit(main())
