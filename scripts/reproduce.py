"""The whole study on one profile: train, run the notebooks, build the book, compare with the committed records.

    make reproduce PROFILE=quick
    make reproduce TUNING=1                                   also the runs on which settings were chosen
    .venv/bin/python scripts/reproduce.py --profile quick      the same, once `make env` has run, with the exit code

Everything goes below runs/PROFILE. Finished runs are kept, so that the same command goes on after an interruption.

Exit codes: 0 all agrees, 1 a step failed or a mean left its tolerance, 2 bad input, 3 a verdict flipped, 130 stopped.
make ends with 2 whatever a recipe returns; so the code also stands in runs/PROFILE/exit_code, and in make's last line.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samlib.errors import InputError
from samlib.experiments import check_profile
from samlib.store import open_store

ROOT = Path(__file__).resolve().parent.parent
# One thread per process: the sweep fills the machine with processes, and sums come out in one order.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# The quick profile runs on a CPU and with one instruction set (AVX2, as fast here as AVX-512), so that machines agree.
PINNED_FILES = (ROOT / "scripts" / "pinned.env", ROOT / "scripts" / f"pinned-{platform.machine()}.env")
PINNED = dict(line.split("=", 1) for path in PINNED_FILES if path.exists() for line in path.read_text().split())
BAD_INPUT, FLIP, INTERRUPTED = 2, 3, 130

MEANING = {
    0: "everything agrees with the committed records",
    1: "a step failed, or a mean left its tolerance: see above",
    BAD_INPUT: "bad input: see above",
    FLIP: "a verdict differs from the committed one: see above",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One process of the chain. `verdict` says that exit code 3 means a flipped verdict, and not a failure."""

    title: str
    arguments: tuple[str, ...]
    verdict: bool = False

    def run(self, variables: Mapping[str, str]) -> int:
        """Exit code of the whole chain if it ended with this step."""
        print(f"== {self.title}", flush=True)
        started = time.monotonic()
        code = wait_for([sys.executable, *self.arguments], os.environ | variables)
        print(f"== {self.title}: {time.monotonic() - started:.0f} s\n", flush=True)
        kept = (0, BAD_INPUT, FLIP) if self.verdict else (0, BAD_INPUT)
        return code if code in kept else 1


def wait_for(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit code of a command. An interruption is passed on to it once, and it gets the time to tidy up."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    return code


def interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def steps(profile: str, runs: Path, tuning: bool = False) -> list[Step]:
    notebooks, book = str(runs / "notebooks"), str(runs / "book")
    samlib = ("-m", "samlib")
    here = ("--profile", profile, "--store", "runs")
    return [
        Step("train what is missing", (*samlib, "run", *here, *(["--tuning"] if tuning else []))),
        Step("run the notebooks", ("notebooks/execute.py", *here, "--out", notebooks, "--workers", cores())),
        Step("build the book", ("book/build.py", "--notebooks", notebooks, *here, "--out", book)),
        Step("decide the claims and compare with the committed records", (*samlib, "compare", *here), verdict=True),
    ]


def cores() -> str:
    """Cores that this process may use."""
    return str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reproduce.py", description="reproduce the study on one profile")
    parser.add_argument("--profile", default="quick", help="quick, gpu or paper")
    parser.add_argument("--tuning", action="store_true", help="also the runs on which settings were chosen")
    options = parser.parse_args(argv)
    profile = options.profile
    try:
        check_profile(profile)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    runs = open_store(profile, "runs").folder
    note, book = runs / "exit_code", runs / "book" / "html" / "index.html"
    note.unlink(missing_ok=True)
    started = time.time()
    try:
        code = run_steps(steps(profile, runs, options.tuning), variables(profile))
    except KeyboardInterrupt:
        print(f"\ninterrupted: `make reproduce PROFILE={profile}` goes on from here", file=sys.stderr)
        return INTERRUPTED
    if runs.is_dir():
        note.write_text(f"{code}\n")
    built = book.exists() and book.stat().st_mtime >= started
    print(f"book:    {book.as_uri() if built else 'not built by this run'}")
    print(f"outcome: {MEANING[code]} (exit code {code})")
    return code


def variables(profile: str) -> dict[str, str]:
    """What every step finds in its environment."""
    return ONE_THREAD | PINNED if profile == "quick" else ONE_THREAD


def run_steps(chain: Sequence[Step], variables: Mapping[str, str]) -> int:
    """Runs the steps until one fails; its exit code, or 0."""
    for step in chain:
        if code := step.run(variables):
            return code
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    sys.exit(main())
