"""Runs the notebooks with papermill, each in a process of its own.

    python notebooks/execute.py --profile quick --store runs --out runs/quick/notebooks
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
from collections.abc import Sequence
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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        notebooks = chosen(args.source, args.notebooks)
        parameters = dict(read_parameter(name, text) for name, text in given(args))
        for notebook in notebooks:
            check(notebook, parameters)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_all(notebooks, args.out, parameters)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="execute.py", description="run the notebooks with papermill")
    parser.add_argument("notebooks", nargs="*", metavar="NN_stem", help="which notebooks (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the executed notebooks go")
    parser.add_argument("--profile", help="same as -p profile PROFILE")
    parser.add_argument("--store", help="same as -p store STORE")
    parser.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
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


def run_all(notebooks: Sequence[Path], out: Path, parameters: dict[str, Any]) -> int:
    failed = []
    for number, notebook in enumerate(notebooks, start=1):
        print(f"[{number}/{len(notebooks)}] {notebook.stem} ...", flush=True)
        start = time.monotonic()
        problem = run_one(notebook, out, parameters)
        if problem:
            failed.append(notebook.stem)
            print(problem, file=sys.stderr, flush=True)
        print(f"[{number}/{len(notebooks)}] {'FAILED' if problem else 'done'} in {time.monotonic() - start:.1f} s")
    if failed:
        print(f"{len(failed)} of {len(notebooks)} notebooks failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_one(notebook: Path, out: Path, parameters: dict[str, Any]) -> str | None:
    """Executes a notebook into `out`; returns what went wrong, or None."""
    out.mkdir(parents=True, exist_ok=True)
    done, partial, broken = (out / f"{notebook.stem}{end}.ipynb" for end in ("", ".tmp", ".failed"))
    broken.unlink(missing_ok=True)
    code, log = run_papermill(notebook, partial, parameters)
    if code == 0:
        join_streams(partial)
        partial.replace(done)
        return None
    done.unlink(missing_ok=True)  # of an earlier run: nobody shall take it for this one
    if partial.exists():
        partial.replace(broken)
    return describe(broken, log)


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


def run_papermill(notebook: Path, output: Path, parameters: dict[str, Any]) -> tuple[int, str]:
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "-k", "python3", "--no-progress-bar"]
    command += ["--cwd", str(notebook.parent)]
    if parameters:
        command += ["-y", yaml.safe_dump(parameters)]
    with tempfile.TemporaryFile("w+") as log:
        # a session of its own: Ctrl-C reaches it once, from here
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            stop(process)
            output.unlink(missing_ok=True)
            raise
        log.seek(0)
        return code, log.read()


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)  # papermill then shuts its kernel down
    try:
        process.wait(INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
