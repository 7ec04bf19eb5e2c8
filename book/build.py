"""Builds the Jupyter Book from executed notebooks and from records, without touching a tracked file.

    python book/build.py --notebooks runs/quick/notebooks --profile quick --store runs --out runs/quick/book

The sources are staged in OUT/source: the pages of this folder, the executed notebooks, and in generated/ the parts that
are drawn from verdicts, claims and errata. Every warning of Sphinx is an error, and a book that did not build leaves
OUT/html as it was.

Exit codes: 0 built, 1 the build failed, 2 bad input and nothing written.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import findings
import nbformat
import yaml

from samlib import claims
from samlib.errors import InputError
from samlib.store import open_store

HERE = Path(__file__).resolve().parent
NOT_STAGED = shutil.ignore_patterns("_build", "__pycache__", "*.py")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        notebooks = executed_notebooks(args.notebooks)
        verdicts = claims.verdicts(args.profile, open_store(args.profile, args.store))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = stage(notebooks, verdicts, findings.on_gpu(args.profile), args.out)
    if not build(source, args.out):
        return 1
    print(f"book: {(args.out / 'html' / 'index.html').resolve()}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="build.py", description="build the book")
    parser.add_argument("--notebooks", type=Path, required=True, metavar="DIR", help="executed notebooks")
    parser.add_argument("--profile", required=True, help="profile the notebooks were executed with")
    parser.add_argument("--store", required=True, help="store they read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def pages() -> list[str]:
    """Every page of the table of contents, without its suffix."""
    toc = yaml.safe_load((HERE / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def executed_notebooks(folder: Path) -> list[Path]:
    """The notebooks that the table of contents lists.

    Raises:
        InputError: one of them is not in the folder, or has not been executed.
    """
    found = [folder / f"{page.removeprefix('notebooks/')}.ipynb" for page in pages() if page.startswith("notebooks/")]
    missing = [path.name for path in found if not is_executed(path)]
    if missing:
        raise InputError(
            f"notebooks = {str(folder)!r} has no executed {', '.join(missing)}: execute them first "
            f"(python notebooks/execute.py --out DIR, then --notebooks DIR)"
        )
    return found


def is_executed(path: Path) -> bool:
    if not path.is_file():
        return False
    return all(cell.execution_count for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


# ---------------------------------------------------------------------------------------------- staging


def stage(
    notebooks: Sequence[Path], verdicts: Sequence[claims.Verdict], full: Sequence[claims.Verdict], out: Path
) -> Path:
    source = out / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(HERE, source, ignore=NOT_STAGED)
    (source / "notebooks").mkdir()
    for notebook in notebooks:
        shutil.copy2(notebook, source / "notebooks")
    (source / "generated").mkdir()
    for name, text in generated(verdicts, full).items():
        (source / "generated" / f"{name}.md").write_text(text, encoding="utf-8")
    return source


def generated(verdicts: Sequence[claims.Verdict], full: Sequence[claims.Verdict]) -> dict[str, str]:
    return {
        "findings": findings.findings(verdicts, badge, full),
        "conventions": findings.conventions(),
        "rules": findings.rules(),
        "errata": findings.errata(),
        "speed": findings.speed(),
        "precision": findings.precision(),
    }


def badge(outcome: str) -> str:
    return f'<span class="verdict verdict-{outcome.replace(" ", "-")}">{outcome}</span>'


# ---------------------------------------------------------------------------------------------- building


def build(source: Path, out: Path) -> bool:
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", str(source), "--path-output", str(work)]
    command += ["--warningiserror", "--nitpick", "--keep-going", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        print(f"error: the book did not build (sources: {source})", file=sys.stderr)
        return False
    html = out / "html"
    shutil.rmtree(html, ignore_errors=True)
    (work / "_build" / "html").replace(html)
    shutil.rmtree(work)
    return True


if __name__ == "__main__":
    sys.exit(main())
