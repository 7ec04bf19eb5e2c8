"""Figures show the numbers of the frame, all of them, in looks that hold across pages, and each is really rendered."""

import io
import math
from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from samlib import claims, experiments, plots, published, stats, store
from samlib.errors import InputError
from samlib.rules.conventions import OUTCOMES

ACCURACY = "test_accuracy_pct"
PAIRS = [("sam", "sgd"), ("sgd_double", "sgd")]


@pytest.fixture
def frame():
    """Two cells, three roles, four seeds; one arm is missing and one run of another failed with a number left over."""
    rng = np.random.default_rng(0)
    rows = [
        {"cell": cell, "role": role, "seed": seed, "status": "done", ACCURACY: 80 + gain + rng.normal()}
        for cell in ("clean", "noise40")
        for role, gain in (("sgd", 0.0), ("sam", 5.0), ("sgd_double", 0.5))
        for seed in range(4)
    ]
    table = pd.DataFrame(rows)
    table.loc[(table["cell"] == "noise40") & (table["role"] == "sgd_double"), ["status", ACCURACY]] = [
        "missing",
        math.nan,
    ]
    table.loc[(table["cell"] == "clean") & (table["role"] == "sam") & (table["seed"] == 3), "status"] = "failed"
    return table


@pytest.fixture
def history():
    rng = np.random.default_rng(0)
    rows = [
        {"cell": cell, "role": role, "seed": seed, "epoch": epoch, ACCURACY: 50 + epoch + rng.normal()}
        for cell in ("clean", "noise40")
        for role, epochs in (("sgd", 9), ("sam", 9), ("sam_half", 5))
        for seed in range(3)
        for epoch in range(0, epochs, 2)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def rows(tmp_path):
    return [claims.row(verdict) for verdict in claims.verdicts("quick", store.Store(tmp_path))]


def image(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def series(axes, marker) -> list[tuple[float, float]]:
    """Points drawn one by one with a marker."""
    found = [line.get_xydata() for line in axes.lines if line.get_marker() == marker]
    return [tuple(map(float, points[0])) for points in found if len(points) == 1]


# ---------------------------------------------------------------------------------------------- what is drawn


def test_paired_differences_draws_every_pair_with_its_interval(frame):
    figure = plots.paired_differences(frame, ACCURACY, PAIRS)
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[:2] == ["clean: SAM − SGD", "clean: SGD, twice the epochs − SGD"]
    assert [text.get_text() for text in axes.texts] == ["n = 3", "n = 4", "n = 4", "n = 0"]
    assert axes.get_xlabel() == "difference of test accuracy (percentage points)"

    clean = frame[(frame["cell"] == "clean") & (frame["status"] == "done")]
    sam, sgd = (clean[clean["role"] == role].set_index("seed")[ACCURACY] for role in ("sam", "sgd"))
    expected = stats.paired_difference(sam, sgd)
    assert series(axes, "s")[0] == pytest.approx((expected.estimate, 0))
    intervals = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "|"]
    assert intervals[0] == pytest.approx([expected.low, expected.high])
    assert len(intervals) == 3
    dots = [dots.get_offsets()[:, 0].tolist() for dots in axes.collections]
    assert sorted(dots[0]) == pytest.approx(sorted(stats.differences(sam, sgd).values()))
    zero = axes.lines[0]
    assert (list(zero.get_xdata()), zero.get_ydata()) == ([0, 0], [0, 1])


def test_paired_differences_survives_arms_that_share_nothing(frame):
    apart = frame.assign(seed=frame["seed"] + 10 * (frame["role"] == "sam"))
    axes = plots.paired_differences(apart, ACCURACY, PAIRS[:1]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["n = 0", "n = 0"]


def test_one_seed_is_a_dot_without_an_interval(frame):
    axes = plots.paired_differences(frame[frame["seed"] == 0], ACCURACY, PAIRS[:1]).axes[0]
    bounds = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == "|"])
    assert np.isnan(bounds).all()
    assert len(series(axes, "s")) == 2


def test_curves_are_means_over_seeds_with_their_band(history):
    figure = plots.curves(history, ACCURACY, reference={"noise40": 55.0})
    clean, noisy = figure.axes
    assert [clean.get_title(loc="left"), noisy.get_title(loc="left")] == ["clean", "noise40"]
    assert (clean.get_xlabel(), clean.get_ylabel()) == ("epoch", "test accuracy (%)")
    sgd = history[(history["cell"] == "clean") & (history["role"] == "sgd")]
    expected = [stats.mean(group[ACCURACY].tolist()) for _, group in sgd.groupby("epoch")]
    assert clean.lines[0].get_xdata().tolist() == [0, 2, 4, 6, 8]
    assert clean.lines[0].get_ydata().tolist() == pytest.approx([found.estimate for found in expected])
    band = clean.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(max(found.high for found in expected))
    assert band[:, 1].min() == pytest.approx(min(found.low for found in expected))
    assert [line.get_label() for line in noisy.lines][-1] == "SGD, stopped at its best validation epoch"
    assert not [line for line in clean.lines if "stopped" in line.get_label()]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["SGD", "SAM", "SAM, half the epochs", "SGD, stopped at its best validation epoch"]


def test_a_gap_in_a_curve_is_left_out(history):
    history.loc[history["epoch"] == 4, ACCURACY] = math.nan
    assert plots.curves(history, ACCURACY).axes[0].lines[0].get_xdata().tolist() == [0, 2, 6, 8]


def test_by_role_keeps_an_arm_without_records(frame):
    figure = plots.by_role(frame, ACCURACY)
    clean, noisy = figure.axes
    assert [tick.get_text() for tick in clean.get_yticklabels()] == ["SGD", "SAM", "SGD, twice the epochs"]
    assert [text.get_text() for text in clean.texts] == ["n = 4", "n = 3", "n = 4"]
    assert [text.get_text() for text in noisy.texts] == ["n = 4", "n = 4", "n = 0"]
    sam = frame.query("cell == 'clean' and role == 'sam' and status == 'done'")[ACCURACY]
    assert series(clean, "s") == [(pytest.approx(sam.mean()), 1)]


def test_the_scoreboard_shows_every_claim_once(rows):
    rows[0] |= {"outcome": "reproduced"}
    rows[1] |= {"outcome": "inconclusive", "miniature": True}
    figure = plots.scoreboard(rows)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["reproduced (1)", "not reproduced (0)", "inconclusive (1)", "not run (67)"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert set(titles) == {*published.PAPERS, published.OWN, ""}  # the last panel is empty
    shown = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(shown) == 69
    assert "msam-m1-is-sam (miniature)" in shown
    by_height = {text.get_position()[1]: text.get_text() for text in figure.axes[titles.index("behdin2023")].texts}
    assert by_height[0] == "msam-m1-is-sam (miniature)"
    first = figure.axes[titles.index("foret2021")].lines[0]
    assert (first.get_color(), first.get_marker()) == plots.OUTCOMES["reproduced"][:2]
    assert image(plots.scoreboard(pd.DataFrame(rows))) == image(figure)


def test_a_scoreboard_of_one_paper(rows):
    figure = plots.scoreboard([row for row in rows if row["paper"] == "boca2023"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["boca2023", ""]
    assert image(figure)


# ---------------------------------------------------------------------------------------------- how it is drawn


def test_every_figure_renders_the_same_twice_and_leaves_nothing_behind(frame, history, rows):
    before = mpl.rcParams.copy()
    for draw in (
        lambda: plots.paired_differences(frame, ACCURACY, PAIRS),
        lambda: plots.curves(history, ACCURACY),
        lambda: plots.by_role(frame, ACCURACY),
        lambda: plots.scoreboard(rows),
    ):
        first = image(draw())
        assert len(first) > 5_000
        assert first == image(draw())
    assert plt.get_fignums() == []
    assert mpl.rcParams == before


def test_text_stays_inside_the_figure(frame, history, rows):
    for figure in (
        plots.paired_differences(frame, ACCURACY, PAIRS),
        plots.curves(history, ACCURACY, reference={"clean": 55.0}),
        plots.by_role(frame, ACCURACY),
        plots.scoreboard(rows),
    ):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        box = figure.get_tightbbox()
        assert box.x0 > -0.05
        assert box.y0 > -0.05
        assert box.x1 < width + 0.05
        assert box.y1 < height + 0.05


def seen_by(colour, deficiency) -> np.ndarray:
    """A colour as seen without one cone type (Machado, Oliveira and Fernandes 2009, severity 1), linear RGB."""
    matrix = {
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }[deficiency]
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.clip(np.array(matrix) @ linear, 0, 1)


@pytest.mark.parametrize("deficiency", ["protanopia", "deuteranopia"])
@pytest.mark.parametrize("palette", ["methods", "outcomes"])
def test_colours_and_markers_tell_apart(deficiency, palette):
    if palette == "methods":
        looks = [(look.colour, look.marker) for look in plots.METHODS.values()]
    else:
        looks = [(colour, marker) for colour, marker, _ in plots.OUTCOMES.values()]
    colours, markers = zip(*looks, strict=True)
    assert len(set(markers)) == len(markers)
    seen = [seen_by(colour, deficiency) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.1


def test_outcomes_are_those_of_the_verdicts():
    assert tuple(plots.OUTCOMES) == OUTCOMES


def test_a_method_keeps_its_colour_and_a_variation_is_hollow():
    assert plots.style("sgd_double").colour == plots.style("sgd").colour
    assert plots.style("sam rho=0.4").label == "SAM, rho=0.4"
    assert plots.style("sam rho=0.4").colour == plots.style("sam").colour
    assert (plots.style("sam").face, plots.style("sam_half").face) == (plots.style("sam").colour, "white")
    assert (plots.style("sam").line, plots.style("sam_half").line) == ("-", "--")


def test_every_role_of_a_trained_experiment_has_a_look():
    roles = {arm.role for arm in experiments.arms("sam_vs_sgd", "quick")}
    assert len({plots.style(role).label for role in roles}) == len(roles)


# ---------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("test_accuracy_pct", "test accuracy (%)"),
        ("test_accuracy_pct@best_test", "test accuracy (%), best test epoch"),
        ("lambda_max", "lambda_max, top Hessian eigenvalue"),
        ("hessian_trace", "hessian_trace"),
    ],
)
def test_axis_labels(metric, label):
    assert plots.axis_label(metric) == label


def test_differences_of_per_cent_are_points():
    assert plots.difference_label("test_error_pct") == "difference of test error (percentage points)"
    assert plots.difference_label("test_loss") == "difference of test loss (nats)"


def test_a_caption_says_n_and_the_interval(frame):
    assert plots.seeds(frame, ACCURACY) == [4, 3, 4, 4, 4, 0]
    text = plots.caption("SAM against SGD.", plots.seeds(frame, ACCURACY), plots.PAIRED_INTERVAL)
    assert text == "SAM against SGD. Means with 95% t interval of the differences paired by seed; n = 0 to 4."
    assert plots.caption("Curves", [10, 10]).endswith("95% t interval over seeds; n = 10.")


def test_alt_text_names_panels_axes_rows_and_series(frame, history):
    text = plots.alt_text(plots.curves(history, ACCURACY), "SAM ends above SGD.")
    assert text == (
        "SAM ends above SGD. 2 panels: clean, noise40. Horizontal axis: epoch. Vertical axis: test accuracy (%). "
        "Series: SGD; SAM; SAM, half the epochs."
    )
    text = plots.alt_text(plots.paired_differences(frame, ACCURACY, PAIRS[:1]), "SAM gains")
    assert "Rows: clean: SAM − SGD; noise40: SAM − SGD." in text


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda frame: plots.by_role(frame, "test_loss"), "no column 'test_loss': it has cell, role"),
        (lambda frame: plots.by_role(frame.replace("sam", "adam"), ACCURACY), "role = 'adam' has no colour"),
        (lambda frame: plots.by_role(frame[frame["seed"] > 9], ACCURACY), "nothing to draw"),
        (lambda frame: plots.curves(frame, ACCURACY), "no column 'epoch'"),
        (lambda frame: plots.caption("a", []), "n is empty"),
        (lambda frame: plots.scoreboard([{"claim": "a-b", "paper": "p"}]), "no column 'outcome', 'miniature'"),
        (
            lambda frame: plots.scoreboard([{"claim": "a-b", "paper": "p", "outcome": "maybe", "miniature": False}]),
            r"outcome = \['maybe'\] is unknown",
        ),
    ],
)
def test_bad_input_is_named(call, message, frame):
    with pytest.raises(InputError, match=message):
        call(frame)
    assert plt.get_fignums() == []
