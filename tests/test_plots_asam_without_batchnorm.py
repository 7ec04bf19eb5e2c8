"""The figures of 03: curves on a log axis, and histograms of weights on a log scale."""

import io
import math

import numpy as np
import pandas as pd
import pytest

from samlib import plots, stats
from samlib.errors import InputError

EPOCHS = (10, 20, 30)
PANELS = {"SAM": ("sam", "sam_batchnorm"), "ASAM": ("asam", "asam_batchnorm")}


@pytest.fixture
def history():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"cell": cell, "role": role, "seed": seed, "epoch": epoch, "train_loss": 10 ** (-epoch / 10 + rng.normal())}
        for cell in ("published", "tuned")
        for role in ("sam", "asam")
        for seed in range(4)
        for epoch in EPOCHS
    )


@pytest.fixture
def tables():
    """Three bins; two seeds of each role, with 4 weights each."""
    counts = {"sam": [(1, 2, 1), (0, 4, 0)], "sam_batchnorm": [(0, 4, 0), (0, 4, 0)], "asam": [(2, 1, 1), (1, 3, 0)]}
    return pd.DataFrame(
        {"cell": "published", "role": role, "seed": seed, "left": left, "right": left + 2.0, "count": float(count)}
        for role, runs in counts.items()
        for seed, bins in enumerate(runs)
        for left, count in zip((-3.0, -1.0, 1.0), bins, strict=True)
    )


def image(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def test_on_a_log_axis_curves_are_geometric_means_with_the_interval_of_the_logarithm(history):
    figure = plots.curves(history, "train_loss", log=True)
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    sam = history[(history["cell"] == "published") & (history["role"] == "sam")]
    found = [stats.mean(np.log(sam[sam["epoch"] == epoch]["train_loss"]).tolist()) for epoch in EPOCHS]
    line = figure.axes[0].lines[0]
    assert line.get_ydata().tolist() == pytest.approx([math.exp(point.estimate) for point in found])
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(min(math.exp(point.low) for point in found))
    assert band.max() == pytest.approx(max(math.exp(point.high) for point in found))
    assert band.min() > 0
    assert len(image(figure)) > 10_000


def test_without_log_curves_are_as_before(history):
    figure = plots.curves(history, "train_loss")
    assert figure.axes[0].get_yscale() == "linear"
    sam = history[(history["cell"] == "published") & (history["role"] == "sam")]
    means = sam.groupby("epoch")["train_loss"].mean()
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx(means.tolist())


@pytest.mark.parametrize("value", [0.0, -1e-9])
def test_a_loss_without_a_logarithm_is_named(history, value):
    history.loc[(history["role"] == "asam") & (history["seed"] == 2), "train_loss"] = value
    with pytest.raises(InputError, match="train_loss is not above 0 for seed 2 of asam in published"):
        plots.curves(history, "train_loss", log=True)


def test_histograms_are_densities_over_all_weights_of_all_seeds(tables):
    figure = plots.weight_histograms(tables, {"SAM": ("sam", "sam_batchnorm"), "ASAM": ("asam",)})
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["SAM", "ASAM"]
    assert first.get_yscale() == second.get_yscale() == "log"
    sam, batch = first.patches
    assert sam.get_data().values.tolist() == [1 / 16, 6 / 16, 1 / 16]
    assert sam.get_data().edges.tolist() == [-3, -1, 1, 3]
    assert batch.get_data().values[1] == pytest.approx(0.5)
    assert np.isnan(batch.get_data().values[[0, 2]]).all()  # 0 has no logarithm
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["SAM", "SAM, batch norm", "normal density", "ASAM"]
    assert len(image(figure)) > 10_000


def test_the_legend_stays_inside_the_figure(tables):
    figure = plots.weight_histograms(tables, PANELS)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_batch_norm_is_told_apart_without_colour(tables):
    figure = plots.weight_histograms(tables, PANELS)
    sam, batch = figure.axes[0].patches
    assert sam.get_edgecolor() == batch.get_edgecolor()
    assert sam.get_linestyle() != batch.get_linestyle()


def test_the_dotted_line_is_the_normal_density(tables):
    (line,) = plots.weight_histograms(tables, PANELS).axes[0].lines
    x, y = line.get_data()
    assert y.sum() * (x[1] - x[0]) == pytest.approx(1, abs=1e-4)
    assert y.max() == pytest.approx(0.39894, abs=1e-4)
    assert (x[0], x[-1]) == figure_limits(tables)


def figure_limits(tables):
    return plots.weight_histograms(tables, PANELS).axes[0].get_xlim()


def test_the_figure_reaches_as_far_as_the_weights(tables):
    far = tables.replace({"left": {1.0: 6.0}, "right": {3.0: 8.0}})
    assert figure_limits(far)[1] > 8 > figure_limits(tables)[1]


def test_roles_without_runs_are_left_out_and_nothing_at_all_is_said(tables):
    figure = plots.weight_histograms(tables, PANELS)
    assert [len(axes.patches) for axes in figure.axes] == [2, 1]
    empty = plots.weight_histograms(pd.DataFrame(columns=["cell", "role", "seed"]), PANELS)
    assert empty.axes[0].texts[0].get_text() == "No finished runs yet."
    without_spread = tables.assign(count=0.0)
    assert [len(axes.patches) for axes in plots.weight_histograms(without_spread, PANELS).axes] == [0, 0]


def test_a_bin_that_is_there_twice_is_refused(tables):
    both = pd.concat([tables, tables.assign(cell="tuned")])
    with pytest.raises(InputError, match="the bin from -3 of sam, seed 0, twice: pick one cell"):
        plots.weight_histograms(both, PANELS)
    with pytest.raises(InputError, match="no column 'count'"):
        plots.weight_histograms(tables.drop(columns="count"), PANELS)
