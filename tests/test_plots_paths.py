"""The figures of 06: what lies along a path, and a chain in its plane."""

import io

import numpy as np
import pandas as pd
import pytest

from samlib import plots, stats
from samlib.errors import InputError

METRICS = ("train_loss", "test_error_pct")
NODES = {"start": (0.0, 0.0), "bend": (1.0, 2.0), "end": (3.0, 0.0)}


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"cell": cell, "role": role, "seed": seed, "t": t, "train_loss": 1 + rng.random(), "test_error_pct": 5 + t}
        for cell in ("chain", "line")
        for role in ("sam_to_sgd", "sam_to_sam")
        for seed in range(3)
        for t in (0.0, 0.5, 1.0)
    )


@pytest.fixture
def grid():
    return pd.DataFrame(
        {"x": x, "y": y, "train_loss": 0.01 + x**2 + y**2, "test_loss": 0.5 + x**2}
        for y in np.linspace(-1, 3, 5)
        for x in np.linspace(-1, 4, 6)
    )


def rendered(figure):
    figure.savefig(io.BytesIO(), format="png")
    return figure


def test_a_row_per_metric_a_column_per_role_and_a_line_per_cell(table):
    figure = rendered(plots.paths(table, METRICS))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["SAM to SGD", "SAM to SAM", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss (nats)", "", "test error (%)", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chain with one bend", "straight line"]
    for axes, (metric, role) in zip(
        figure.axes, [(m, r) for m in METRICS for r in table["role"].unique()], strict=True
    ):
        for line, band, cell in zip(axes.lines, axes.collections, ("chain", "line"), strict=True):
            rows = table[(table["cell"] == cell) & (table["role"] == role)]
            found = [stats.mean(group[metric].tolist()) for _, group in rows.groupby("t")]
            assert line.get_xdata().tolist() == [0.0, 0.5, 1.0]
            assert line.get_ydata().tolist() == pytest.approx([interval.estimate for interval in found])
            heights = band.get_paths()[0].vertices[:, 1]
            assert heights.max() == pytest.approx(max(interval.high for interval in found))
            assert heights.min() == pytest.approx(min(interval.low for interval in found))


def test_every_panel_of_a_row_shows_all_of_every_line(table):
    table.loc[(table["role"] == "sam_to_sam") & (table["cell"] == "line"), "train_loss"] += 50.0
    figure = plots.paths(table, METRICS)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] > 50


def test_the_metrics_of_one_pair_stand_beside_each_other(table):
    figure = rendered(plots.paths(table[table["role"] == "sam_to_sgd"], METRICS))
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss (nats)", "test error (%)"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"t"}


def test_one_seed_is_a_line_without_a_band(table):
    figure = rendered(plots.paths(table[table["seed"] == 0], METRICS))
    assert len(figure.axes[0].lines) == 2


def test_a_plane_has_the_chain_in_both_panels_with_levels_of_its_own(grid):
    figure = rendered(plots.plane(grid, NODES))
    train, test, *bars = figure.axes
    assert [axes.get_title(loc="left") for axes in (train, test)] == ["training loss", "test loss"]
    for axes in (train, test):
        assert axes.lines[-1].get_xydata().tolist() == [list(place) for place in NODES.values()]
        assert [text.get_text() for text in axes.texts] == list(NODES)
    assert [bar.get_xlabel() for bar in bars] == ["training loss (nats)", "test loss (nats)"]
    limits = [axes.collections[0].get_clim() for axes in (train, test)]
    for (low, high), metric in zip(limits, ("train_loss", "test_loss"), strict=True):
        assert (low, high) == pytest.approx(tuple(np.quantile(grid[metric], [0.02, 0.98])))
    shuffled = plots.plane(grid.sample(frac=1, random_state=0), NODES)
    assert [path.vertices.tolist() for path in shuffled.axes[0].collections[0].get_paths()] == [
        path.vertices.tolist() for path in train.collections[0].get_paths()
    ]


def test_without_records_the_figures_say_so(table, grid):
    for figure in (plots.paths(table[:0], METRICS), plots.plane(grid[:0], NODES)):
        assert [text.get_text() for text in figure.axes[0].texts] == ["No finished runs yet."]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda table, grid: plots.paths(table, ("loss",)), ["no column 'loss'"]),
        (lambda table, grid: plots.paths(table.assign(cell="detour"), METRICS), ["cell = 'detour'", "PATHS"]),
        (lambda table, grid: plots.paths(table.assign(role="a_to_b"), METRICS), ["role = 'a_to_b'"]),
        (lambda table, grid: plots.plane(grid[1:], NODES), ["29 places", "one seed"]),
        (lambda table, grid: plots.plane(grid.drop(columns="x"), NODES), ["no column 'x'"]),
    ],
)
def test_what_cannot_be_drawn_is_named(table, grid, call, words):
    with pytest.raises(InputError) as error:
        call(table, grid)
    for word in words:
        assert word in str(error.value)


def test_pairs_have_looks_of_their_own():
    looks = [plots.style(role) for role in plots.PAIRS]
    assert len({(look.colour, look.marker) for look in looks}) == len(looks)
    assert len({(look.colour, look.marker) for look in plots.PATHS.values()}) == len(plots.PATHS)
    assert plots.axis_label("test_error_barrier_pct") == "test-error barrier (percentage points)"
