"""Runs the notebooks with papermill, each in a process of its own.

    python notebooks/execute.py --profile quick --store runs --out runs/quick/notebooks --workers 2
    python notebooks/execute.py --out /tmp/mine -p seeds "[0, 1]" -p overrides "{epochs: 20}" 01_sam_vs_sgd

Parameter names are checked against the `parameters` cell of every chosen notebook before anything runs. A notebook is
written to NAME.tmp.ipynb and moved to NAME.ipynb when it has finished; one that fails is kept as NAME.failed.ipynb and
the others still run.

Exit codes: 0 all ran, 1 some failed, 2 bad input and nothing written, 130 interrupted.
"""

import argparse
import ast
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

from samlib import experiments
from samlib.errors import InputError

HERE = Path(__file__).resolve().parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
INTERRUPT_GRACE_S = 15
TRACE_LINES = 20
POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        notebooks = chosen(args.source, args.notebooks)
        parameters = dict(read_parameter(name, text) for name, text in given(args))
        if args.workers < 1:
            raise InputError(f"workers = {args.workers}: use 1 or more")
        for notebook in notebooks:
            check(notebook, parameters)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_all(notebooks, args.out, parameters, args.workers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="execute.py", description="run the notebooks with papermill")
    parser.add_argument("notebooks", nargs="*", metavar="NN_stem", help="which notebooks (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the executed notebooks go")
    parser.add_argument("--profile", help="same as -p profile PROFILE")
    parser.add_argument("--store", help="same as -p store STORE")
    parser.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="notebooks that run at a time (1)")
    parser.add_argument("--source", type=Path, default=HERE, metavar="DIR", help="where the notebooks are (here)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------- what to run


def chosen(source: Path, names: Sequence[str]) -> list[Path]:
    """The notebooks of a folder in the order of their numbers, or those that are named.

    Raises:
        InputError: a name that is no notebook of the folder, or a folder without notebooks.
    """
    found = {path.stem: path for path in sorted(source.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise InputError(f"source = {str(source)!r} holds no notebook NN_stem.ipynb: name the folder that does")
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names] or list(found)
    for name in wanted:
        if name not in found:
            raise InputError(f"notebook = {name!r} does not exist: use one of {', '.join(found)}")
    return [path for stem, path in found.items() if stem in wanted]


def given(args: argparse.Namespace) -> list[tuple[str, str]]:
    shorthands = [("profile", args.profile), ("store", args.store)]
    return [(name, text) for name, text in shorthands if text is not None] + [tuple(pair) for pair in args.parameters]


def read_parameter(name: str, text: str) -> tuple[str, Any]:
    """A value as Python or YAML writes it: 3, 1e-3, None, [0, 1], {epochs: 20}, or else a plain word."""
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return name, yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(
            f"-p {name} {text!r} cannot be read: write a number, a word, a list [0, 1] or a mapping {{epochs: 20}}"
        ) from None


def check(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuses what the notebook would refuse, or papermill would only warn of, before anything is written.

    Raises:
        InputError: a name that the notebook does not declare, or a profile, seed or field that does not exist.
    """
    declared = {name: entry["default"] for name, entry in papermill.inspect_notebook(str(notebook)).items()}
    for name, value in parameters.items():
        if name not in declared:
            raise InputError(
                f"-p {name} {value!r}: notebook {notebook.stem} has no parameter {name!r}: "
                f"use one of {', '.join(declared) or '(it has none)'}"
            )
    if "profile" in parameters:
        experiments.check_profile(parameters["profile"])
    stem = notebook.stem.split("_", 1)[1]
    profile = parameters.get("profile", "quick")
    for experiment in (stem,) if stem in experiments.STEMS else experiments.STEMS:  # the scoreboard reads all of them
        experiments.arms(experiment, profile, parameters.get("seeds"), parameters.get("overrides"))


# ---------------------------------------------------------------------------------------------- running


@dataclass
class Running:
    """A notebook in the hands of papermill."""

    notebook: Path
    out: Path
    number: int
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen | None = None
    log: Any = None

    @property
    def partial(self) -> Path:
        return self.out / f"{self.notebook.stem}.tmp.ipynb"

    def start(self, parameters: dict[str, Any]) -> "Running":
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.notebook.stem}.failed.ipynb").unlink(missing_ok=True)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `finish` and `stop`)
        # a session of its own: Ctrl-C reaches it once, from here
        self.process = subprocess.Popen(
            command(self.notebook, self.partial, parameters),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def finish(self) -> str | None:
        """Puts the ended notebook in its place; what went wrong, or None."""
        done, broken = (self.out / f"{self.notebook.stem}{end}.ipynb" for end in ("", ".failed"))
        with self.log:
            self.log.seek(0)
            said = self.log.read()
        if self.process.returncode == 0:
            join_streams(self.partial)
            self.partial.replace(done)
            return None
        done.unlink(missing_ok=True)  # of an earlier run: nobody shall take it for this one
        if self.partial.exists():
            self.partial.replace(broken)
        return describe(broken, said)

    def stop(self) -> None:
        """Ends it, and leaves no half notebook."""
        self.process.send_signal(signal.SIGINT)  # papermill then shuts its kernel down
        try:
            self.process.wait(INTERRUPT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.partial.unlink(missing_ok=True)


def run_all(notebooks: Sequence[Path], out: Path, parameters: dict[str, Any], workers: int = 1) -> int:
    """Executes the notebooks into `out`, some at a time; 0, or 1 if one failed."""
    waiting = deque(Running(notebook, out, number) for number, notebook in enumerate(notebooks, start=1))
    running: list[Running] = []
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                chosen = waiting.popleft()
                print(f"[{chosen.number}/{len(notebooks)}] {chosen.notebook.stem} ...", flush=True)
                chosen.started = time.monotonic()
                running.append(chosen.start(parameters))
            ended = [one for one in running if one.process.poll() is not None]
            running = [one for one in running if one not in ended]
            for one in ended:
                problem = one.finish()
                report(one, len(notebooks), problem)
                failed += [one.notebook.stem] if problem else []
            time.sleep(0 if ended else POLL_S)
    except BaseException:
        for one in running:
            one.stop()
        raise
    if failed:
        print(f"{len(failed)} of {len(notebooks)} notebooks failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return 1 if failed else 0


def report(one: Running, of: int, problem: str | None) -> None:
    if problem:
        print(problem, file=sys.stderr, flush=True)
    outcome = "FAILED" if problem else "done"
    print(f"[{one.number}/{of}] {one.notebook.stem}: {outcome} in {time.monotonic() - one.started:.1f} s", flush=True)


def command(notebook: Path, output: Path, parameters: dict[str, Any]) -> list[str]:
    words = [sys.executable, "-m", "papermill", str(notebook), str(output), "-k", "python3", "--no-progress-bar"]
    words += ["--cwd", str(notebook.parent)]
    return words + (["-y", yaml.safe_dump(parameters)] if parameters else [])


def join_streams(path: Path) -> None:
    """Joins what a cell printed in one go: a kernel cuts it into pieces as time goes by, so no two runs are alike."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        joined: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if joined and output.output_type == "stream" and output.get("name") == joined[-1].get("name"):
                joined[-1].text += output.text
            else:
                joined.append(output)
        if "outputs" in cell:
            cell.outputs = joined
    nbformat.write(notebook, path)


# ---------------------------------------------------------------------------------------------- what went wrong


def describe(broken: Path, log: str) -> str:
    """The failed cell and the end of its traceback, or the end of papermill's log where no cell failed."""
    if broken.exists():
        for cell in nbformat.read(broken, as_version=4).cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    trace = COLOUR.sub("", "\n".join(output.traceback)).splitlines()
                    where = f"{broken}, In [{cell.execution_count}]"
                    return "\n".join([f"{where}: {output.ename}: {output.evalue}", *trace[-TRACE_LINES:]])
    name = broken.name.removesuffix(".failed.ipynb")
    return "\n".join([f"{name}: the kernel ended without an error cell", *log.splitlines()[-TRACE_LINES:]])


def terminate(signal_number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the same command starts the unfinished notebook again", file=sys.stderr)
        sys.exit(130)
