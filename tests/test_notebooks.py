"""The stored notebooks: well kept, and sensitive. A change of one per cent in any statistic must show in their text.

That each cell still prints what is stored is nbval's work (`make test` runs it). Here the code cells of a notebook run
in one process, without figures, so that many small changes can be tried in seconds.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from samlib import experiments, plots, report, stats
from samlib.experiments import sam_vs_sgd
from samlib.store import Store
from samlib.study import open_study

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PARAMETERS = ("profile", "store", "seeds", "overrides")
ids = {"ids": lambda path: path.stem}


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


# ------------------------------------------------------------------------------------------------ hygiene


def test_every_experiment_has_its_page():
    assert [path.stem[3:] for path in NOTEBOOKS] == [*experiments.STEMS, "scoreboard"]


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_counts_run_from_1_to_n_and_no_output_is_an_error(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_one_parameters_cell_with_the_same_names_everywhere(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert tuple(re.findall(r"^(\w+)(?:: \w+)? = .+  # .+$", source(tagged[0]), re.M)) == PARAMETERS
    assert 'profile: str = "quick"' in source(tagged[0])
    assert 'store: str = "results"' in source(tagged[0])
    assert not [cell for cell in cells(path) if "injected-parameters" in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_no_cell_hides_its_value_or_escapes_the_comparison(path):
    assert not [source(cell) for cell in cells(path) if source(cell).rstrip().endswith(";")]
    assert "NBVAL" not in path.read_text()
    assert "nbval-" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_figures_are_described(path):
    for cell in cells(path):
        if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
            assert len(cell["metadata"]["mystnb"]["image"]["alt"]) > 40


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_nothing_of_the_machine_that_ran_it(path):
    notebook = json.loads(path.read_text())
    assert "papermill" not in notebook["metadata"]
    assert not [cell for cell in notebook["cells"] if {"papermill", "execution"} & set(cell["metadata"])]
    assert str(FOLDER.parent) not in path.read_text()


# ------------------------------------------------------------------------------------------------ sensitivity


@pytest.fixture(scope="module")
def shell():
    # A module of its own: the shell would else take the place of `__main__`, which multiprocessing needs.
    found = InteractiveShell.instance(user_module=types.ModuleType("page"))
    yield found
    InteractiveShell.clear_instance()


def printed(shell, path):
    """The text that the code cells print or show, run in order. Figures are not drawn: nbval does not compare them."""
    shell.reset(new_session=True)
    return "\n".join(printed_by(shell, cell) for cell in cells(path))


def printed_by(shell, cell):
    with capture_output() as captured:
        result = shell.run_cell(source(cell), silent=False, store_history=False)
    result.raise_error()
    shown = [output.data for output in captured.outputs]
    shown.append(shell.display_formatter.format(result.result)[0])
    texts = [data[mime] for data in shown for mime in ("text/markdown", "text/html", "text/plain") if mime in data]
    return "\n".join([captured.stdout, *texts])


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_a_page_without_records_says_so_and_does_not_fail(shell, path, monkeypatch, tmp_path):
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    text = printed(shell, path)
    assert "no finished record" in text


@pytest.fixture
def without_figures(monkeypatch):
    leave_figures_out(monkeypatch)


def leave_figures_out(patch):
    for name in ("paired_differences", "curves", "scoreboard"):
        patch.setattr(plots, name, lambda *_, **__: None)
    patch.setattr(plt, "show", lambda: plt.close("all"))


STATISTICS = [
    (name, field)
    for name in ("mean", "paired_difference", "unpaired_difference", "geometric_mean_ratio", "slope_over_log2")
    for field in ("estimate", "low", "high")
]
STATISTICS += [(name, field) for name in ("sd_ratio", "correlation") for field in ("estimate", "low", "high")]
STATISTICS += [("brown_forsythe", "p")]


def one_per_cent_off(function, field):
    def changed(*args, **kwargs):
        found = function(*args, **kwargs)
        if not dataclasses.is_dataclass(found):
            return 1.01 * found
        return dataclasses.replace(found, **{field: 1.01 * getattr(found, field)})

    return changed


def test_every_statistic_is_tried():
    public = {name for name, value in vars(stats).items() if callable(value) and value.__module__ == stats.__name__}
    tried = {name for name, _ in STATISTICS}
    others = {"Interval", "differences", "curve_sd_ratio"}  # the last on page 02 alone
    assert {name for name in public if not name.startswith("_")} - tried == others


@dataclasses.dataclass
class Page:
    """Page 01, run once with nothing changed: its cells, what each prints and which statistics it calls, and the names
    that it leaves. A cell is run again among these names, in a tenth of the time of the whole page."""

    cells: list = dataclasses.field(default_factory=lambda: cells(FOLDER / "01_sam_vs_sgd.ipynb"))
    texts: list[str] = dataclasses.field(default_factory=list)
    calls: list[set[str]] = dataclasses.field(default_factory=list)
    names: dict = dataclasses.field(default_factory=dict)

    def run(self, shell, patch):
        """The first run. Figures are left out, so that it prints what is stored but for these."""
        leave_figures_out(patch)
        called = set()
        for name in {name for name, _ in STATISTICS}:
            patch.setattr(stats, name, noted(getattr(stats, name), called))
        shell.reset(new_session=True)
        for cell in self.cells:
            called.clear()
            self.texts.append(printed_by(shell, cell))
            self.calls.append(set(called))
        self.names = {name: value for name, value in shell.user_ns.items() if name not in shell.user_ns_hidden}
        return self

    def differs(self, shell, numbers):
        """Whether one of these cells prints another text now."""
        shell.reset(new_session=True)
        shell.user_ns.update(self.names)
        return any(printed_by(shell, self.cells[number]) != self.texts[number] for number in numbers)


def noted(function, called):
    def noting(*args, **kwargs):
        called.add(function.__name__)
        return function(*args, **kwargs)

    return noting


@pytest.fixture(scope="module")
def page(shell):
    with pytest.MonkeyPatch.context() as patch:
        return Page().run(shell, patch)


def test_the_first_run_prints_what_the_notebook_stores(page):
    stored = [
        "".join(output["text"])
        for cell in page.cells
        for output in cell["outputs"]
        if output["output_type"] == "stream"
    ]
    assert stored
    for text in stored:
        assert text.strip() in "\n".join(page.texts)


def test_nothing_changed_changes_nothing(shell, page, without_figures):
    assert not page.differs(shell, range(len(page.cells)))


@pytest.mark.parametrize(("name", "field"), STATISTICS)
def test_one_per_cent_more_in_any_statistic_changes_the_page(shell, page, without_figures, monkeypatch, name, field):
    monkeypatch.setattr(stats, name, one_per_cent_off(getattr(stats, name), field))
    assert page.differs(shell, [number for number, calls in enumerate(page.calls) if name in calls])


def test_the_same_one_per_cent_makes_nbval_itself_fail(tmp_path):
    """Once through the real thing: a kernel whose samlib.stats.mean is one per cent off, and nbval's own comparison."""
    (tmp_path / "sitecustomize.py").write_text(
        "import dataclasses, importlib.abc, importlib.util, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'samlib.stats':\n"
        "            return None\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        load = spec.loader.exec_module\n"
        "        def changed(module):\n"
        "            load(module)\n"
        "            mean = module.mean\n"
        "            module.mean = lambda *a: dataclasses.replace(found := mean(*a), estimate=1.01 * found.estimate)\n"
        "        spec.loader.exec_module = changed\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    sanitize = str(FOLDER.parent / "tests" / "nbval_sanitize.cfg")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", sanitize, str(FOLDER / "01_sam_vs_sgd.ipynb")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-2000:]
    assert re.search(r"\d+ failed", done.stdout)


# ------------------------------------------------------------------------------------------------ words and numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.8234, "1.823"), (-0.5, "-0.5000"), (86.64, "86.64"), (1234.0, "1234"), (1e-7, "1.000e-07"), (math.nan, "none")],
)
def test_numbers_keep_four_digits(value, text):
    assert report.number(value) == text


def test_interval_text():
    interval = stats.Interval(1.8234, 1.25, 2.3968, 10, 0.95, "t")
    assert report.interval_text(interval) == "1.823 [1.250, 2.397] (n = 10)"
    assert report.interval_text(stats.mean([1.0])) == "1.000 (n = 1)"


@pytest.mark.parametrize(("value", "text"), [(3.6e-15, "1e-14"), (9.9e-4, "1e-3"), (0.0, "1e-15")])
def test_bounds_on_rounding_errors(value, text):
    assert report.bound(value) == text
    assert value < float(text)


def test_the_text_of_the_tuning_holds_the_rule_and_its_numbers():
    lines = report.tuning_text(open_study("sam_vs_sgd"), sam_vs_sgd.TUNING[:1]).splitlines()
    choice = sam_vs_sgd.TUNING[0]
    assert lines[1] == f"plain, sgd, optim.lr: best by its worst seed {choice.chosen:g}"
    assert [entry.partition(":")[0].strip() for entry in lines[2].split(",")] == [f"{v:g}" for v in choice.grid]


def test_a_choice_without_records_is_missing(tmp_path):
    empty = dataclasses.replace(open_study("sam_vs_sgd"), store=Store(tmp_path))
    lines = report.tuning_text(empty, sam_vs_sgd.TUNING[:1]).splitlines()
    assert "committed records" in lines[1]
    assert [lines[0], *lines[2:]] == report.tuning_text(open_study("sam_vs_sgd"), sam_vs_sgd.TUNING[:1]).splitlines()


def test_a_study_that_made_no_tuning_runs_shows_the_committed_ones_and_no_others(tmp_path):
    committed = open_study("sam_vs_sgd")
    empty = dataclasses.replace(committed, store=Store(tmp_path))
    status = empty.frame().groupby("cell")["status"].unique().map(set)
    assert {cell: found for cell, found in status.items() if cell.startswith("tuning")}
    for cell, found in status.items():
        assert found == ({"done"} if cell.startswith("tuning") else {"missing"})
    assert list(empty.frame()["key"]) == list(committed.frame()["key"])


def test_arms_that_differ_in_rho_alone_have_a_table():
    table = report.settings(open_study("asymmetry"), roles=["sam rho=0.05", "sam rho=0.1"])
    assert table["rho"].tolist() == ["0.05", "0.1"]
    assert "method" not in table
