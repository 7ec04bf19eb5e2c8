"""The figures of 05: means and intervals where the frame has them; and the tables behind them, from made-up records."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from samlib import plots, report, stats
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import Arm, measure
from samlib.spec import OptimSpec, RunSpec
from samlib.store import Record, Store
from samlib.study import Study

FACTOR = "asymmetry_factor@mu=10.0@directions=8"
ROLES = ("sgd", "sam rho=0.1", "sam rho=0.2", "sgd_large")
PANELS = {"all": ROLES, "small": ROLES[:3]}


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    rows = [
        {"cell": "table", "role": role, "seed": seed, "status": "done", FACTOR: rng.normal(), "test_loss": rng.normal()}
        for role in ROLES
        for seed in range(4)
    ]
    table = pd.DataFrame(rows)
    table.loc[(table["role"] == "sam rho=0.2") & (table["seed"] > 0), ["status", "test_loss"]] = ["diverged", math.nan]
    return table


def marks(axes, look):
    return [
        line.get_xydata()[0].tolist()
        for line in axes.lines
        if line.get_marker() == look.marker and line.get_markerfacecolor() == look.face
    ]


def test_the_mark_of_an_arm_is_at_its_means(frame):
    figure = plots.scatter(frame, FACTOR, "test_loss", PANELS)
    arm = frame[frame["role"] == "sam rho=0.1"]
    for axes in figure.axes:
        assert marks(axes, plots.style("sam"))[0] == pytest.approx([arm[FACTOR].mean(), arm["test_loss"].mean()])
    assert [len(marks(axes, plots.style("sgd_large"))) for axes in figure.axes] == [1, 0]


def test_the_cross_of_an_arm_is_its_two_intervals(frame):
    axes = plots.scatter(frame, FACTOR, "test_loss", PANELS).axes[0]
    arm = frame[frame["role"] == "sgd"]
    across, up = stats.mean(arm[FACTOR].tolist()), stats.mean(arm["test_loss"].tolist())
    bars = [line.get_xydata() for line in axes.lines if line.get_marker() == "None"][:2]
    np.testing.assert_allclose(bars[0], [[across.low, up.estimate], [across.high, up.estimate]])
    np.testing.assert_allclose(bars[1], [[across.estimate, up.low], [across.estimate, up.high]])


def test_a_dot_for_each_finished_run(frame):
    axes = plots.scatter(frame, FACTOR, "test_loss", PANELS).axes[0]
    assert [len(dots.get_offsets()) for dots in axes.collections] == [4, 4, 1, 4]


def test_arms_are_named_where_a_panel_shows_a_part_of_them(frame):
    figure = plots.scatter(frame, FACTOR, "test_loss", PANELS)
    assert [[text.get_text() for text in axes.texts if text.get_text()] for axes in figure.axes] == [
        [],
        ["rho=0.1", "rho=0.2"],
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGD", "SAM", "SGD, large batch"]
    assert figure.axes[0].get_xlabel() == "asymmetry factor"


def test_without_runs_every_figure_says_so(frame):
    for figure in (
        plots.scatter(frame.assign(status="missing"), FACTOR, "test_loss", PANELS),
        plots.slices({"none": pd.DataFrame(columns=["cell", "role", "seed"])}),
        plots.correlations(pd.DataFrame(columns=["panel", "series", "mu", "estimate", "low", "high"]), 10.0),
    ):
        assert [text.get_text() for text in figure.axes[0].texts] == ["No finished runs yet."]


# ---------------------------------------------------------------------------------------------- r against mu


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "panel": ["training loss"] * 4 + ["test loss"] * 2,
            "series": ["published", "published", "normal", "normal", "published", "published"],
            "mu": [1.0, 10.0] * 3,
            "estimate": [0.1, -0.2, 0.3, math.nan, 0.5, 0.6],
            "low": [0.0, -0.4, 0.2, math.nan, 0.4, 0.5],
            "high": [0.2, 0.0, 0.4, math.nan, 0.6, 0.7],
        }
    )


def test_a_line_for_each_law_with_its_intervals(table):
    first, second = plots.correlations(table, 10.0).axes
    lines = {line.get_label(): line for line in first.lines}
    assert lines["published"].get_ydata().tolist() == [0.1, -0.2]
    assert lines["normal"].get_ydata().tolist() == [0.3]
    assert lines["published"].get_xdata() == pytest.approx([1, 10], rel=0.04)
    assert lines["mu of the verdict"].get_xdata() == [10.0, 10.0]
    np.testing.assert_allclose([s[:, 1] for s in first.collections[0].get_segments()], [[0, 0.2], [-0.4, 0]])
    assert first.get_xscale() == "log"
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["training loss", "test loss"]


def test_more_laws_than_looks_are_refused(table):
    with pytest.raises(InputError, match="there are looks for 2"):
        plots.correlations(table.assign(series=[*"abcabc"]), 10.0)


# ---------------------------------------------------------------------------------------------- slices


def test_a_slice_is_the_mean_to_both_sides_through_zero():
    rows = [
        {"cell": "table", "role": role, "seed": seed, "mu": mu, "rise_plus": seed + mu, "rise_minus": -seed - 2 * mu}
        for role in ("sam rho=0.1", "sam_large rho=0.1")
        for seed in (0, 1, 2)
        for mu in (1.0, 4.0)
    ]
    empty = pd.DataFrame(columns=["cell", "role", "seed"])
    first, second = plots.slices({"published": pd.DataFrame(rows), "none": empty}).axes
    small, large = (line for line in first.lines if line.get_label() in ("SAM", "SAM, large batch"))
    np.testing.assert_allclose(small.get_xydata(), [[-4, -9], [-1, -3], [0, 0], [1, 2], [4, 5]])
    assert (small.get_linestyle(), large.get_linestyle()) == ("-", "--")
    assert first.get_yscale() == "symlog"
    assert not second.get_legend_handles_labels()[1]


# ---------------------------------------------------------------------------------------------- the tables behind them


@pytest.fixture
def study(tmp_path):
    """Four settings of three seeds; at mu 1 the factor rises with the test loss of the setting, at mu 2 it falls."""
    template = measure("asymmetry_factor")
    arms = tuple(
        Arm(f"sam rho={rho:g}", "table", RunSpec(optim=OptimSpec("sam", rho=rho)), (0, 1, 2), (template,))
        for rho in (0.1, 0.2, 0.3, 0.4)
    )
    store = Store(tmp_path, writable=True)
    for arm in arms:
        rho = arm.base.optim.rho
        for member in arm.specs:
            final = {"last": {"epoch": 1, "step": 1, "test_loss": rho + member.seed}}
            store.save(Record(specs_of.key(member), specs_of.canonical(member), "done", final=final))
            (spec,) = arm.measures_of(member)
            table = {"mu": [1.0, 2.0], "asymmetry_factor": [rho, 1 - rho], "no_minimum": [0.5, rho]}
            table |= {"rise_plus": [member.seed, rho], "rise_minus": [-rho, 2.0]}
            store.save(Record(specs_of.key(spec), specs_of.canonical(spec), "done", measures={}, table=table))
    return Study("asymmetry", "quick", store, arms, varied=True)


COLUMNS = {
    ("training loss", "published"): "asymmetry_factor",
    ("test loss", "published"): "asymmetry_factor@split=test",
}


def test_r_of_setting_means_at_each_mu(study):
    found = report.correlations_by_mu(study, COLUMNS)
    assert found["estimate"].tolist() == pytest.approx([1, -1])
    assert found[["panel", "series", "mu", "n"]].to_numpy().tolist() == [
        ["training loss", "published", 1.0, 4],
        ["training loss", "published", 2.0, 4],
    ]


def test_a_seed_that_a_setting_lacks_counts_in_none(study):
    """Without its partner seeds 1 and 2 of the others would raise their mean loss, and r would fall."""
    member = study.arms[0].specs[2]
    study.store.record_path(specs_of.key(member)).unlink()
    assert report.correlations_by_mu(study, COLUMNS)["estimate"].tolist() == pytest.approx([1, -1])


def test_shares_without_a_minimum_are_means_over_models(study):
    found = report.without_minimum(study, COLUMNS)
    assert list(found.columns) == ["training loss, published"]
    assert found.iloc[:, 0].tolist() == ["0.5000", "0.2500"]


def test_a_measure_with_a_dot_in_a_setting_is_no_setting_of_the_runs(study):
    arms = tuple(dataclasses.replace(arm, measures=(measure("asymmetry_factor", mu=7.5),)) for arm in study.arms)
    varied = dataclasses.replace(study, arms=arms)
    assert "asymmetry_factor@mu=7.5" in varied.frame()
    assert list(varied.settings().columns) == ["optim.rho", "seeds", "finished"]
    assert "mu=7.5" not in report.common_settings(varied)


def test_rises_are_means_over_seeds_to_both_sides(study):
    found = report.rises(study, "asymmetry_factor", ["sam rho=0.3", "sam rho=0.1"])
    assert list(found.columns) == [
        (f"SAM, rho={rho}", side) for rho in (0.3, 0.1) for side in ("rise_plus", "rise_minus")
    ]
    assert found.loc[1.0].tolist() == ["1.000", "-0.3000", "1.000", "-0.1000"]
    assert found.loc[2.0].tolist() == ["0.3000", "2.000", "0.1000", "2.000"]


def test_without_records_the_tables_are_empty(tmp_path, study):
    bare = Study("asymmetry", "quick", Store(tmp_path / "none"), study.arms, varied=True)
    assert report.correlations_by_mu(bare, COLUMNS).empty
    assert report.without_minimum(bare, COLUMNS).empty
    assert report.rises(bare, "asymmetry_factor", ["sam rho=0.1"]).empty
