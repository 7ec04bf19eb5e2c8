"""A metric against a setting: the means and intervals of the frame at the settings that were run."""

import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats

from samlib import plots, stats
from samlib.errors import InputError

ACCURACY, BATCH = "test_accuracy_pct", "train.batch_size"
SIZES = (8, 32, 100)
CELLS = [f"{setting}, batch={size}" for setting in ("epochs", "updates") for size in SIZES]
PANELS = {"equal epochs": CELLS[:3], "equal updates": CELLS[3:]}


@pytest.fixture
def frame():
    """Three batch sizes at equal epochs and at equal updates, two methods, four seeds; one arm has not run."""
    rng = np.random.default_rng(0)
    rows = [
        {"cell": cell, "role": role, "seed": seed, "status": "done", BATCH: size, ACCURACY: 80 + rng.normal()}
        for cell, size in zip(CELLS, SIZES * 2, strict=True)
        for role in ("sgd", "sam")
        for seed in range(4)
    ]
    table = pd.DataFrame(rows)
    table["lambda_max"] = np.exp(table[ACCURACY] - 80)
    table.loc[(table["cell"] == CELLS[1]) & (table["role"] == "sam"), ["status", ACCURACY, "lambda_max"]] = [
        "missing",
        math.nan,
        math.nan,
    ]
    return table


def image(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def means(axes, marker) -> np.ndarray:
    """The joined means of one method: one row (x, y) per setting."""
    (line,) = [line for line in axes.lines if line.get_marker() == marker]
    return line.get_xydata()


def intervals(axes, colour) -> list[list[float]]:
    bars = [line for line in axes.lines if line.get_marker() == "None" and line.get_color() == colour]
    return [line.get_ydata().tolist() for line in bars]


def values(frame, cell, role, metric=ACCURACY):
    return frame.loc[(frame["cell"] == cell) & (frame["role"] == role), metric].tolist()


def test_every_point_is_the_mean_of_its_seeds_with_its_interval(frame):
    figure = plots.against(frame, BATCH, ACCURACY, panels=PANELS)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    for cells, axes in zip(PANELS.values(), figure.axes, strict=True):
        expected = [stats.mean(values(frame, cell, "sgd")) for cell in cells]
        assert means(axes, "o")[:, 1].tolist() == pytest.approx([found.estimate for found in expected])
        bounds = intervals(axes, plots.style("sgd").colour)
        assert bounds == [pytest.approx([found.low, found.high]) for found in expected]
    assert means(figure.axes[1], "s")[:, 1].tolist() == pytest.approx(
        [np.mean(values(frame, cell, "sam")) for cell in CELLS[3:]]
    )
    assert [len(dots.get_offsets()) for axes in figure.axes for dots in axes.collections] == [12, 8, 12, 12]


def test_an_arm_that_has_not_run_is_left_out_of_its_line(frame):
    axes = plots.against(frame, BATCH, ACCURACY, panels=PANELS).axes[0]
    assert [round(x) for x in means(axes, "s")[:, 0] / 2**0.04] == [8, 100]


def test_the_axis_has_ticks_where_runs_are_and_lines_stand_beside_each_other(frame):
    axes = plots.against(frame, BATCH, ACCURACY, panels=PANELS).axes[1]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "batch size", "")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "32", "100"]
    assert axes.get_xticks().tolist() == [8, 32, 100]
    sgd, sam = means(axes, "o")[:, 0], means(axes, "s")[:, 0]
    assert np.sqrt(sgd * sam) == pytest.approx(SIZES)
    assert sam / sgd == pytest.approx(2**0.08)


def test_on_a_log_axis_the_mean_is_that_of_the_logarithms(frame):
    figure = plots.against(frame, BATCH, "lambda_max", panels=PANELS, log_y=True)
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    sampled = [values(frame, cell, "sgd", "lambda_max") for cell in CELLS[:3]]
    assert means(figure.axes[0], "o")[:, 1].tolist() == pytest.approx(scipy.stats.gmean(sampled, axis=1).tolist())
    logs = np.log(sampled[0])
    half = scipy.stats.t.ppf(0.975, 3) * logs.std(ddof=1) / 2
    low, high = intervals(figure.axes[0], plots.style("sgd").colour)[0]
    assert (low, high) == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)))
    linear = plots.against(frame, BATCH, "lambda_max", panels=PANELS)
    assert means(linear.axes[0], "o")[0, 1] == pytest.approx(np.mean(sampled[0]))


def test_roles_can_be_joined_to_one_line():
    """As num_shards: each number has a role of its own in one cell."""
    roles = {"sgd": 1, "sam": 1, "msam num_shards=2": 2, "msam num_shards=4": 4}
    rows = [
        {"cell": "clean", "role": role, "seed": seed, "status": "done", "optim.num_shards": shards, ACCURACY: shards}
        for role, shards in roles.items()
        for seed in range(3)
    ]
    lines = {"sgd": ["sgd"], "msam": [role for role in roles if role != "sgd"]}
    figure = plots.against(pd.DataFrame(rows), "optim.num_shards", ACCURACY, lines=lines)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "clean"
    assert means(axes, "D")[:, 1].tolist() == [1, 2, 4]
    assert means(axes, "o")[:, 1].tolist() == [1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGD", "mSAM"]
    apart = plots.against(pd.DataFrame(rows), "optim.num_shards", ACCURACY)
    assert len(apart.legends[0].get_texts()) == 4


def test_one_seed_is_a_point_without_an_interval(frame):
    axes = plots.against(frame[frame["seed"] == 0], BATCH, ACCURACY, panels=PANELS).axes[0]
    assert np.isnan(intervals(axes, plots.style("sgd").colour)).all()
    assert len(means(axes, "o")) == 3


def test_without_a_finished_run_the_figure_says_so(frame):
    figure = plots.against(frame.assign(status="missing"), BATCH, ACCURACY, panels=PANELS)
    assert [text.get_text() for text in figure.axes[0].texts] == ["No finished runs yet."]


def test_it_renders_the_same_twice_inside_its_bounds(frame):
    figure = plots.against(frame, BATCH, "lambda_max", panels=PANELS, log_y=True)
    again = plots.against(frame, BATCH, "lambda_max", panels=PANELS, log_y=True)
    assert image(figure) == image(again)
    assert plt.get_fignums() == []
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.05
    assert box.x1 < width + 0.05
    assert box.y1 < height + 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda frame: plots.against(frame, "optim.rho", ACCURACY), "no column 'optim.rho'"),
        (lambda frame: plots.against(frame, BATCH, "test_loss"), "no column 'test_loss'"),
        (lambda frame: plots.against(frame, BATCH, ACCURACY, panels={"a": ["b"]}), r"cells \['b'\]: the frame has epo"),
        (lambda frame: plots.against(frame, BATCH, ACCURACY, panels={"all": CELLS}), "SGD at train.batch_size = 8 hol"),
        (
            lambda frame: plots.against(frame.assign(lambda_max=-1.0), BATCH, "lambda_max", log_y=True),
            "lambda_max is not above 0 for seed 0 of sgd in epochs, batch=8",
        ),
        (lambda frame: plots.against(frame.assign(**{BATCH: 0}), BATCH, ACCURACY), "size is not above 0 for seed 0"),
        (lambda frame: plots.against(frame.replace("sam", "adam"), BATCH, ACCURACY), "role = 'adam' has no colour"),
    ],
)
def test_bad_input_is_named(call, message, frame):
    with pytest.raises(InputError, match=message):
        call(frame)
    assert plt.get_fignums() == []
