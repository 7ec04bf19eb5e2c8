"""Figures of the study: a frame goes in, a Figure comes out. Nothing is shown or written here.

A method has one colour and one marker on every page; colours are those of Okabe and Ito, which readers with a colour
vision deficiency can tell apart, and no figure relies on colour alone. Missing runs are left out and counted: labels
and `caption` carry n. Every interval is Student's t over seeds, from `samlib.stats`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from samlib import stats
from samlib.errors import InputError

MEAN_INTERVAL = "95% t interval over seeds"
PAIRED_INTERVAL = "95% t interval of the differences paired by seed"
WIDTH = 7.2  # inches: the text width of the book
INK, FAINT = "#333333", "#6b6b6b"


@dataclass(frozen=True, slots=True)
class Style:
    """How a role looks. `varied` roles share the colour of their method: hollow markers, dashed lines."""

    label: str
    colour: str
    marker: str
    varied: bool = False

    @property
    def face(self) -> str:
        return "white" if self.varied else self.colour

    @property
    def line(self) -> str:
        return "--" if self.varied else "-"


METHODS = {
    "sgd": Style("SGD", "#0072B2", "o"),
    "sam": Style("SAM", "#D55E00", "s"),
    "asam": Style("ASAM", "#009E73", "^"),
    "msam": Style("mSAM", "#CC79A7", "D"),
    "average_sam": Style("average SAM", "#E69F00", "v"),
    "mixup": Style("Mixup", "#56B4E9", "P"),
}
VARIED = {
    "sgd_double": Style("SGD, twice the epochs", METHODS["sgd"].colour, "o", varied=True),
    "sgd_tuned": Style("SGD, learning rate tuned", METHODS["sgd"].colour, "X", varied=True),
    "sam_half": Style("SAM, half the epochs", METHODS["sam"].colour, "s", varied=True),
    "sgd_large": Style("SGD, large batch", METHODS["sgd"].colour, "o", varied=True),
    "sam_large": Style("SAM, large batch", METHODS["sam"].colour, "s", varied=True),
    "average_sam_large": Style("average SAM, large batch", METHODS["average_sam"].colour, "v", varied=True),
    "sam_batchnorm": Style("SAM, batch norm", METHODS["sam"].colour, "s", varied=True),
    "asam_batchnorm": Style("ASAM, batch norm", METHODS["asam"].colour, "^", varied=True),
}
SERIES = (Style("first", "#0072B2", "o"), Style("second", "#009E73", "^", varied=True))  # what is no method
PAIRS = {  # of models that a path joins; hollow: a control
    "sam_to_sgd": Style("SAM to SGD", "#CC79A7", "D"),
    "sam_to_large": Style("SAM to SAM, large batch", "#009E73", "^"),
    "sgd_to_sgd": Style("SGD to SGD", METHODS["sgd"].colour, "o", varied=True),
    "sam_to_sam": Style("SAM to SAM", METHODS["sam"].colour, "s", varied=True),
}
PATHS = {  # cell -> how what lies along a path of it looks
    "chain": Style("chain with one bend", "#0072B2", "o"),
    "line": Style("straight line", "#E69F00", "s", varied=True),
    "equal epochs": Style("chain, large batch with equal epochs", "#009E73", "^", varied=True),
    "as published": Style("chain as published", "#D55E00", "X", varied=True),
}
PRECISIONS = {  # of products, where lines of one method differ in nothing else
    "fp32": Style("fp32", "#333333", "o"),
    "tf32": Style("TF32", "#56B4E9", "s"),
    "fp16": Style("fp16", "#009E73", "^"),
    "bf16": Style("bf16", "#D55E00", "X"),
}
OUTCOMES = {
    "reproduced": ("#009E73", "o", 6.5),
    "not reproduced": ("#D55E00", "X", 7.0),
    "inconclusive": ("#E69F00", "D", 5.5),
    "not run": ("#b8b8b8", "_", 6.5),
}  # outcome -> colour, marker, size of the marker
METRICS = {
    "test_accuracy_pct": "test accuracy (%)",
    "validation_accuracy_pct": "validation accuracy (%)",
    "train_accuracy_pct": "training accuracy (%)",
    "test_error_pct": "test error (%)",
    "test_loss": "test loss (nats)",
    "validation_loss": "validation loss (nats)",
    "train_loss": "training loss (nats)",
    "running_loss": "running training loss (nats)",
    "lambda_max": "lambda_max, top Hessian eigenvalue",
    "adversarial_sharpness": "sharpness, rise of the training loss (nats)",
    "asymmetry_factor": "asymmetry factor",
    "first_layer_kurtosis": "excess kurtosis of the first layer's weights",
    "train_error_pct": "training error (%)",
    "train_loss_barrier": "training-loss barrier (nats)",
    "train_error_barrier_pct": "training-error barrier (percentage points)",
    "test_loss_barrier": "test-loss barrier (nats)",
    "test_error_barrier_pct": "test-error barrier (percentage points)",
    "t": "t, from the first model to the second",
    "epoch": "epoch",
    "train.batch_size": "batch size",
    "optim.num_shards": "shards per mini-batch",
    "optim.rho": "rho, radius of the perturbation",
    "perturbation_cosine": "cosine of what acts of eps with eps",
    "perturbation_norm_ratio": "norm of what acts of eps, over that of eps",
}
EPOCHS = {"best_test": "best test epoch", "best_validation": "best validation epoch"}


# ---------------------------------------------------------------------------------------------- looks


def style(role: str) -> Style:
    """The look of a role; 'sam rho=0.4' and the like look as a variation of their method.

    Raises:
        InputError: the role belongs to no method of this study.
    """
    known = METHODS | VARIED | PAIRS | PRECISIONS
    if role in known:
        return known[role]
    method, _, rest = role.partition(" ")
    if method not in known:
        raise InputError(f"role = {role!r} has no colour: add its method to samlib.plots.METHODS")
    base = known[method]
    return Style(f"{base.label}, {rest}", base.colour, base.marker, varied=True)


def axis_label(metric: str) -> str:
    """'test accuracy (%), best test epoch' for 'test_accuracy_pct@best_test'; a metric without words keeps its name."""
    name, _, epoch = metric.partition("@")
    words = METRICS.get(name, name)
    return f"{words}, {EPOCHS.get(epoch, epoch)}" if epoch else words


def difference_label(metric: str) -> str:
    """Differences of per cent are percentage points."""
    return f"difference of {axis_label(metric).replace('(%)', '(percentage points)')}"


def drawn(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the style of the study, and takes the figure out of pyplot, so that a page shows it once, or not at all
    after an error."""

    @wraps(function)
    def styled(*args: object, **kwargs: object) -> Figure:
        others = set(plt.get_fignums())
        try:
            with _looks():
                return function(*args, **kwargs)
        finally:
            for number in set(plt.get_fignums()) - others:
                plt.close(number)

    return styled


@contextmanager
def _looks() -> Iterator[None]:
    ours = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#bbbbbb",
        "axes.titlelocation": "left",
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.8,
        "figure.dpi": 120,
        "savefig.dpi": 160,
    }
    with plt.rc_context(), sns.axes_style("whitegrid"), plt.rc_context(ours):
        yield


# ---------------------------------------------------------------------------------------------- figures


@drawn
def paired_differences(frame: pd.DataFrame, metric: str, pairs: Sequence[tuple[str, str]]) -> Figure:
    """One row per cell and pair of roles: a dot per seed, the mean difference a - b with its 95% interval, a zero line.

    Args:
        frame: one row per run, with cell, role, seed, status and the metric; see `Store.frame`.
        pairs: (a, b) roles. A pair without a finished seed in common keeps its row, marked n = 0; a cell that has no
            arm of one of the roles has no such row. Without any row, or any finished run, the figure says so.

    Raises:
        InputError: the frame lacks a column, or a role has no colour.
    """
    done = finished(frame, metric)
    roles = frame.groupby("cell", sort=False)["role"].unique()
    rows = [(cell, a, b) for cell in roles.index for a, b in pairs if {a, b} <= set(roles[cell])]
    if not rows:
        return _words("No cell has both of the methods compared.")
    if done.empty:
        return _nothing_yet()
    figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.36 * len(rows)), layout="constrained")
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    counts = []
    for height, (cell, a, b) in enumerate(rows):
        gaps = stats.differences(_by_seed(done, cell, a, metric), _by_seed(done, cell, b, metric))
        counts.append(_value_row(axes, height, style(a), list(gaps.values())))
        if height and cell != rows[height - 1][0]:
            axes.axhline(height - 0.5, color="#e6e6e6", linewidth=0.8)
    _rows_of_text(axes, [f"{cell}: {style(a).label} − {style(b).label}" for cell, a, b in rows])
    _counts_at_the_right(axes, counts)
    axes.set_xlabel(difference_label(metric))
    return figure


@drawn
def curves(
    history: pd.DataFrame, metric: str, *, reference: Mapping[str, float] | None = None, log: bool = False
) -> Figure:
    """A metric against the epoch, one panel per cell: mean over seeds of each role with its 95% band.

    Args:
        history: one row per run and epoch, with cell, role, seed, epoch and the metric; see `Store.history`.
        reference: cell -> value of a horizontal line, the accuracy SGD would have had if stopped in time.
        log: a log axis, with geometric means over seeds and the interval of the mean logarithm.

    Without any finished run the figure says so.

    Raises:
        InputError: the history lacks a column, a role has no colour, or a value has no place on a log axis.
    """
    if history.empty:
        return _nothing_yet()
    _need(history, ("cell", "role", "seed", "epoch", metric))
    if log:
        _need_positive(history, [metric])
    cells = list(history["cell"].unique())
    figure, panels = _panels(cells, height=3.0)
    for cell, axes in zip(cells, panels, strict=True):
        here = history[history["cell"] == cell]
        for role in here["role"].unique():
            _curve(axes, style(role), here[here["role"] == role], metric, _geometric_mean if log else stats.mean)
        if reference is not None and cell in reference:
            line = {"color": FAINT, "linestyle": (0, (1, 1.5)), "linewidth": 1.6}
            axes.axhline(reference[cell], label="SGD, stopped at its best validation epoch", **line)
        axes.set_xlabel(axis_label("epoch"))
        axes.set_xlim(left=0)
    if log:
        panels[0].set_yscale("log")  # the panels share it
    panels[0].set_ylabel(axis_label(metric))
    _legend_below(figure, panels)
    return figure


@drawn
def by_role(frame: pd.DataFrame, metric: str) -> Figure:
    """A metric by role, one panel per cell: a faint dot per seed, the mean with its 95% interval.

    Args:
        frame: one row per run, with cell, role, seed, status and the metric; see `Store.frame`. A role without a
            finished seed keeps its row, marked n = 0. Without any finished run the figure says so.

    Raises:
        InputError: the frame is empty or lacks a column, or a role has no colour.
    """
    done = finished(frame, metric)
    if len(frame) and done.empty:
        return _nothing_yet()
    cells, roles = list(frame["cell"].unique()), list(frame["role"].unique())
    figure, panels = _panels(cells, height=1.0 + 0.4 * len(roles))
    for cell, axes in zip(cells, panels, strict=True):
        counts = [
            _value_row(axes, height, style(role), list(_by_seed(done, cell, role, metric).values()))
            for height, role in enumerate(roles)
        ]
        _rows_of_text(axes, [style(role).label for role in roles])
        _counts_at_the_right(axes, counts)
        axes.set_xlabel(axis_label(metric))
    return figure


@drawn
def against(
    frame: pd.DataFrame,
    x: str,
    metric: str,
    *,
    panels: Mapping[str, Sequence[str]] | None = None,
    lines: Mapping[str, Sequence[str]] | None = None,
    log_y: bool = False,
) -> Figure:
    """A metric against a setting on a log2 axis: a faint dot per seed, means with their 95% intervals joined by a line.

    Lines stand a little beside each other, so that intervals at one x do not hide each other.

    Args:
        frame: one row per run, with cell, role, seed, status, x and the metric; see `Store.frame`.
        x: a column of positive numbers, such as 'train.batch_size' or 'optim.num_shards'.
        panels: title -> cells shown in that panel; by default one panel per cell.
        lines: role that gives the look -> roles on the line, where roles differ along x; by default a line per role.
        log_y: a log axis, with geometric means over seeds and the interval of the mean logarithm.

    Without any finished run the figure says so.

    Raises:
        InputError: the frame lacks a column, a role has no colour, a value has no place on a log axis, or a panel holds
            two runs of one seed at one point of a line.
    """
    done = finished(frame, metric)
    if done.empty:
        return _nothing_yet()
    _need(frame, (x,))
    panels = {cell: (cell,) for cell in frame["cell"].unique()} if panels is None else panels
    unknown = {cell for cells in panels.values() for cell in cells} - set(frame["cell"])
    if unknown:
        raise InputError(f"panels name the cells {sorted(unknown)}: the frame has {', '.join(frame['cell'].unique())}")
    lines = {role: (role,) for role in frame["role"].unique()} if lines is None else lines
    _need_positive(done, [x, metric] if log_y else [x])
    figure, grid = _panels(list(panels), height=3.0)
    for cells, axes in zip(panels.values(), grid, strict=True):
        here = done[done["cell"].isin(cells)]
        for place, (look, roles) in enumerate(lines.items()):
            beside = 2 ** (0.08 * (place - (len(lines) - 1) / 2))
            _line_of_means(axes, style(look), here[here["role"].isin(roles)], x, metric, beside, log_y)
        _log2_axis(axes, sorted(frame.loc[frame["cell"].isin(cells), x].unique()))
        axes.set_xlabel(axis_label(x))
    if log_y:
        grid[0].set_yscale("log")  # the panels share it
    grid[0].set_ylabel(axis_label(metric))
    _legend_below(figure, grid)
    return figure


@drawn
def weight_histograms(tables: pd.DataFrame, panels: Mapping[str, Sequence[str]]) -> Figure:
    """Weights in standard deviations, pooled over seeds, as densities on a log axis; dotted, the normal density.

    A bin without a weight is left empty: its density is 0 and has no logarithm.

    Args:
        tables: one row per run and bin, with cell, role, seed, left, right and count; see `Store.tables`. One cell.
        panels: title -> the roles drawn in that panel.

    Without any finished run the figure says so.

    Raises:
        InputError: the tables lack a column, hold a bin of one run twice (two cells do), or a role has no colour.
    """
    if tables.empty:
        return _nothing_yet()
    _need(tables, ("cell", "role", "seed", "left", "right", "count"))
    repeated = tables[tables.duplicated(["role", "seed", "left"])]
    if len(repeated):
        role, seed, left = repeated.iloc[0][["role", "seed", "left"]]
        raise InputError(f"tables hold the bin from {left:g} of {role}, seed {seed}, twice: pick one cell")
    figure, grid = _panels(list(panels), height=3.2)
    bins = tables[tables["count"] > 0]
    reach = 1.15 * bins[["left", "right"]].abs().to_numpy().max(initial=4.0)
    for (_, roles), axes in zip(panels.items(), grid, strict=True):
        for role in roles:
            _pooled_density(axes, style(role), tables[tables["role"] == role])
        z = np.linspace(-reach, reach, 201)
        axes.plot(z, np.exp(-z * z / 2) / np.sqrt(2 * np.pi), color=FAINT, linestyle=":", label="normal density")
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("weight / standard deviation")
    grid[0].set_yscale("log")
    grid[0].set_ylim(3e-4, 3)
    grid[0].set_ylabel("density")
    _legend_below(figure, grid)
    return figure


@drawn
def paths(table: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Metrics along paths between two models: a line per cell, mean over seeds with its 95% band.

    A row of panels per metric and a column per role; with one role the metrics stand beside each other.

    Args:
        table: one row per path and t, with cell, role, seed, t and the metrics; see `Store.tables`.

    Without any finished path the figure says so.

    Raises:
        InputError: the table lacks a column, or a role or a cell has no look.
    """
    if table.empty:
        return _nothing_yet()
    _need(table, ("cell", "role", "seed", "t", *metrics))
    roles, cells = list(table["role"].unique()), list(table["cell"].unique())
    if unknown := [cell for cell in cells if cell not in PATHS]:
        raise InputError(f"cell = {unknown[0]!r} has no look: add it to samlib.plots.PATHS")
    shape, share = ((len(metrics), len(roles)), "row") if len(roles) > 1 else ((1, len(metrics)), False)
    size = (WIDTH, 0.7 + (1.55 if shape[0] > 1 else 2.3) * shape[0])
    figure, grid = plt.subplots(*shape, figsize=size, layout="constrained", sharex=True, sharey=share, squeeze=False)
    for axes, (metric, role) in zip(grid.flat, [(m, r) for m in metrics for r in roles], strict=True):
        for cell in cells:
            rows = table[(table["role"] == role) & (table["cell"] == cell)]
            if len(rows):
                _along(axes, PATHS[cell], rows, metric)
        if role == roles[0]:
            axes.set_ylabel(axis_label(metric))
        sns.despine(ax=axes)
    for axes, role in zip(grid[0], roles, strict=False):
        axes.set_title(style(role).label, fontsize=8.5)
    for axes in grid[-1]:
        axes.set_xlabel("t")
    for axes in grid.flat:  # when all panels of a row have their lines
        axes.set_ylim(bottom=0)
    _legend_below(figure, list(grid.flat))
    return figure


@drawn
def plane(table: pd.DataFrame, nodes: Mapping[str, tuple[float, float]]) -> Figure:
    """Contours of the training and the test loss in the plane of a chain, with the chain in it.

    Each panel has levels of its own, evenly spaced in the logarithm.

    Args:
        table: one row per place of a full grid, with x, y, train_loss and test_loss, of one seed; see `Store.tables`.
        nodes: name -> (x, y), in the order of the chain.

    Without a finished grid the figure says so.

    Raises:
        InputError: the table lacks a column, or holds no full grid.
    """
    if table.empty:
        return _nothing_yet()
    _need(table, ("x", "y", "train_loss", "test_loss"))
    wide, high = (np.ptp(table[axis]) for axis in ("x", "y"))
    size = (WIDTH, min(5.0, 1.6 + 0.45 * WIDTH * high / wide))
    figure, panels = plt.subplots(1, 2, figsize=size, layout="constrained", sharex=True, sharey=True)
    for axes, metric in zip(panels, ("train_loss", "test_loss"), strict=True):
        _contours(axes, table, metric)
        axes.plot(*zip(*nodes.values(), strict=True), color="white", linewidth=3.2)  # seen on dark and on light
        axes.plot(*zip(*nodes.values(), strict=True), "-o", color=INK, markersize=4.5, linewidth=1.6)
        for name, place in nodes.items():
            words = {"textcoords": "offset points", "xytext": (4, 5), "fontsize": 8, "color": INK}
            axes.annotate(name, place, bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}, **words)
        axes.set_xlabel("along the line of the ends")
    panels[0].set_ylabel("towards the bend")
    return figure


@drawn
def scatter(frame: pd.DataFrame, x: str, y: str, panels: Mapping[str, Sequence[str]]) -> Figure:
    """One metric against another: a faint dot per run, and the mean of each arm with its 95% interval both ways.

    The arms of one method at one batch size look alike ('sam rho=0.1' as 'sam', 'sam_large rho=0.1' as 'sam_large');
    in a panel with a part of the arms, what sets them apart stands beside the mean. Each panel has axes of its own.

    Args:
        frame: one row per run, with cell, role, seed, status and both metrics; see `Store.frame`.
        panels: title -> the roles drawn in that panel.

    Without any finished run the figure says so.

    Raises:
        InputError: the frame lacks a column, or a role has no colour.
    """
    done = finished(finished(frame, x), y)
    if done.empty:
        return _nothing_yet()
    figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, 3.2), layout="constrained", squeeze=False)
    for (title, roles), axes in zip(panels.items(), grid.flat, strict=True):
        axes.set_title(title)
        named = len(roles) < frame["role"].nunique()
        for (_, role), arm in done[done["role"].isin(roles)].groupby(["cell", "role"], sort=False):
            base, _, rest = role.partition(" ")
            points = arm[[x, y]].astype(float).to_numpy().T
            _mean_both_ways(axes, style(base), *points, rest if named else "")
        axes.set_xlabel(axis_label(x.partition("@")[0]))
        sns.despine(ax=axes)
    grid.flat[0].set_ylabel(axis_label(y))
    _legend_below(figure, list(grid.flat))
    return figure


@drawn
def correlations(table: pd.DataFrame, chosen: float) -> Figure:
    """A correlation coefficient against mu on a log axis, one panel per loss set, one line per law of the directions.

    Args:
        table: one row per panel, series and mu, with estimate, low and high; see `report.correlations_by_mu`.
        chosen: the mu that decides, marked by a dotted line.

    Without any coefficient the figure says so.

    Raises:
        InputError: the table lacks a column, or has more series than there are looks.
    """
    _need(table, ("panel", "series", "mu", "estimate", "low", "high"))
    known = table[np.isfinite(table["estimate"].astype(float))]
    if known.empty:
        return _nothing_yet()
    names = list(table["series"].unique())
    if len(names) > len(SERIES):
        raise InputError(f"series = {names}: there are looks for {len(SERIES)}")
    figure, panels = _panels(list(table["panel"].unique()), height=3.0)
    for panel, axes in zip(table["panel"].unique(), panels, strict=True):
        axes.axhline(0, color=INK, linewidth=1)
        axes.axvline(chosen, color=FAINT, linestyle=(0, (1, 1.5)), linewidth=1.6, label="mu of the verdict")
        for place, (series, look) in enumerate(zip(names, SERIES, strict=False)):
            rows = known[(known["panel"] == panel) & (known["series"] == series)]
            mus = rows["mu"].astype(float) * 1.03 ** (2 * place - 1)  # beside each other
            axes.vlines(mus, rows["low"], rows["high"], color=look.colour, linewidth=1.2)
            axes.plot(mus, rows["estimate"], look.line + look.marker, color=look.colour, label=series, markersize=4.5)
        axes.set_xscale("log")
        axes.set_ylim(-1.05, 1.05)
        axes.set_xlabel("mu, distance from the minimum")
    panels[0].set_ylabel("correlation r")
    _legend_below(figure, panels)
    return figure


@drawn
def slices(panels: Mapping[str, pd.DataFrame], linear: float = 0.1) -> Figure:
    """The rise of the loss along one direction to both sides of the minimum: a line per arm, its mean over seeds with a
    95% band. The vertical axis is linear up to `linear` and logarithmic beyond.

    Args:
        panels: title -> one row per run and distance, with cell, role, seed, mu, rise_plus and rise_minus; see
            `Store.tables`. Looks as in `scatter`; large-batch lines are dashed.

    Without any finished run the figure says so.

    Raises:
        InputError: a table lacks a column, or a role has no colour.
    """
    if not any(len(table) for table in panels.values()):
        return _nothing_yet()
    figure, grid = _panels(list(panels), height=3.4)
    for table, axes in zip(panels.values(), grid, strict=True):
        if len(table):
            _need(table, ("cell", "role", "seed", "mu", "rise_plus", "rise_minus"))
            for (_, role), arm in table.groupby(["cell", "role"], sort=False):
                _slice(axes, style(role.partition(" ")[0]), arm)
        axes.axhline(0, color=INK, linewidth=1, zorder=1)
        axes.set_xlabel("mu")
    grid[0].set_yscale("symlog", linthresh=linear)  # the panels share it
    grid[0].set_ylabel("rise of the training loss (nats)")
    _legend_below(figure, grid)
    return figure


@drawn
def scoreboard(rows: Iterable[Mapping[str, object]] | pd.DataFrame) -> Figure:
    """Every claim with its outcome, one panel per paper, and the number of claims by outcome.

    Args:
        rows: one per claim, with claim, paper, outcome and miniature; see `claims.row`.

    Raises:
        InputError: a column is absent or an outcome unknown.
    """
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    _need(table, ("claim", "paper", "outcome", "miniature"))
    unknown = set(table["outcome"]) - OUTCOMES.keys()
    if unknown:
        raise InputError(f"outcome = {sorted(unknown)} is unknown: use one of {', '.join(OUTCOMES)}")
    papers = table["paper"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    lines = papers.iloc[::2].tolist()  # two papers beside each other, the longer one first
    height = 0.6 + 0.175 * (sum(lines) + 2 * len(lines))
    looks = {"layout": "constrained", "squeeze": False, "height_ratios": lines}
    figure, grid = plt.subplots(len(lines), 2, figsize=(WIDTH, height), **looks)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, (paper, axes) in enumerate(zip(papers.index, grid.flat, strict=False)):
        _claims_of(axes, paper, table[table["paper"] == paper], lines[place // 2])
    figure.legend(handles=_outcome_handles(table["outcome"]), loc="outside upper left", ncols=len(OUTCOMES))
    return figure


# ---------------------------------------------------------------------------------------------- words beside a figure


def caption(what: str, n: Iterable[int], interval: str = MEAN_INTERVAL) -> str:
    """What is shown, then n and the kind of interval: no figure goes without the two.

    Args:
        n: seeds (or pairs) behind each mean; see `seeds`.

    Raises:
        InputError: no n is given.
    """
    counts = sorted(set(n))
    if not counts:
        raise InputError("n is empty: a caption says how many seeds each mean stands for")
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{what.rstrip('.')}. Means with {interval}; n = {span}."


def seeds(frame: pd.DataFrame, metric: str) -> list[int]:
    """Number of finished seeds of each arm of a frame, for `caption`; 0 for an arm without any."""
    arms = frame[["cell", "role"]].drop_duplicates().itertuples(index=False)
    done = finished(frame, metric)
    return [len(_by_seed(done, arm.cell, arm.role, metric)) for arm in arms]


def alt_text(figure: Figure, what: str) -> str:
    """A description for readers who cannot see the figure: what it shows, then panels, axes and series."""
    axes = [panel for panel in figure.axes if panel.axison or panel.get_title(loc="left")]
    titles = [title for panel in axes if (title := panel.get_title(loc="left"))]
    panels = f"{len(axes)} panels" if len(axes) > 1 else "One panel"
    sentences = [what.rstrip("."), panels + (f": {', '.join(titles)}" if titles else "")]
    sentences += [f"Horizontal axis: {text}" for text in _once(panel.get_xlabel() for panel in axes)]
    sentences += [f"Vertical axis: {text}" for text in _once(panel.get_ylabel() for panel in axes)]
    rows = _once(tick.get_text() for panel in axes for tick in panel.get_yticklabels() if _is_words(tick.get_text()))
    sentences += [f"Rows: {'; '.join(rows)}"] if rows else []
    series = _once(text.get_text() for legend in figure.legends for text in legend.get_texts())
    sentences += [f"Series: {'; '.join(series)}"] if series else []
    return ". ".join(sentences) + "."


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def _is_words(text: str) -> bool:
    return any(character.isalpha() for character in text)


# ---------------------------------------------------------------------------------------------- parts of figures


def finished(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs that are done and hold the metric; a frame of no arms at all has no columns to ask for."""
    if frame.empty:
        return frame
    _need(frame, ("cell", "role", "seed", "status", metric))
    values = frame[metric].astype(float)
    return frame[(frame["status"] == "done") & np.isfinite(values)]


def _need(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    absent = [name for name in columns if name not in frame]
    if absent:
        raise InputError(
            f"frame has no column {', '.join(map(repr, absent))}: it has {', '.join(map(str, frame.columns))}"
        )


def _by_seed(done: pd.DataFrame, cell: str, role: str, metric: str) -> dict[int, float]:
    rows = done[(done["cell"] == cell) & (done["role"] == role)]
    return dict(zip(rows["seed"], rows[metric].astype(float), strict=True))


def _nothing_yet() -> Figure:
    return _words("No finished runs yet.")


def _words(text: str) -> Figure:
    figure, axes = plt.subplots(figsize=(WIDTH * 0.62, 0.8))
    axes.set_axis_off()
    axes.text(0, 0.5, text, color=FAINT)
    return figure


def _panels(cells: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    if not len(cells):
        raise InputError("frame is empty: there is nothing to draw")
    width = WIDTH if len(cells) > 1 else WIDTH * 0.62
    figure, grid = plt.subplots(
        1, len(cells), figsize=(width, height), layout="constrained", sharey=True, squeeze=False
    )
    for cell, axes in zip(cells, grid.flat, strict=True):
        axes.set_title(cell)
        sns.despine(ax=axes)
    return figure, list(grid.flat)


def _value_row(axes: Axes, height: int, look: Style, values: Sequence[float]) -> int:
    """Dots, mean and interval on one horizontal line; returns n. Dots are spread so that equal values stay visible."""
    spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(len(values))
    axes.scatter(values, height + spread, s=14, color=look.colour, alpha=0.4, linewidths=0, zorder=2)
    if values:
        found = stats.mean(values)
        ends = {"marker": "|", "markersize": 9, "markeredgewidth": 1.6}
        axes.plot([found.low, found.high], [height, height], color=look.colour, linewidth=1.6, zorder=3, **ends)
        marks = {"markerfacecolor": look.face, "markeredgecolor": look.colour, "markeredgewidth": 1.4}
        axes.plot(found.estimate, height, look.marker, markersize=5.5, zorder=4, **marks)
    return len(values)


def _rows_of_text(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    sns.despine(ax=axes, left=True)


def _counts_at_the_right(axes: Axes, counts: Sequence[int]) -> None:
    for height, n in enumerate(counts):
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (2, 0)}
        axes.annotate(f"n = {n}", (1, height), va="center", fontsize=7.5, color=FAINT, annotation_clip=False, **where)


def _curve(
    axes: Axes,
    look: Style,
    rows: pd.DataFrame,
    metric: str,
    average: Callable[[Sequence[float]], stats.Interval] = stats.mean,
) -> None:
    points = {
        epoch: average(group[metric].astype(float).tolist())
        for epoch, group in rows.dropna(subset=[metric]).groupby("epoch")
    }
    epochs, found = list(points), list(points.values())
    marks = {
        "marker": look.marker,
        "markersize": 4.5,
        "markerfacecolor": look.face,
        "markevery": max(1, len(epochs) // 6),
    }
    axes.plot(epochs, [point.estimate for point in found], look.line, color=look.colour, label=look.label, **marks)
    low, high = [point.low for point in found], [point.high for point in found]
    axes.fill_between(epochs, low, high, color=look.colour, alpha=0.18, linewidth=0)


def _pooled_density(axes: Axes, look: Style, bins: pd.DataFrame) -> None:
    pooled = bins.groupby(["left", "right"], as_index=False)["count"].sum()
    weights = pooled["count"].sum()
    if not weights:
        return
    density = pooled["count"] / weights / (pooled["right"] - pooled["left"])
    edges = [*pooled["left"], pooled["right"].iloc[-1]]
    shape = {"color": look.colour, "linestyle": look.line, "linewidth": 1.6}
    axes.stairs(density.where(density > 0), edges, label=look.label, **shape)


def _line_of_means(
    axes: Axes, look: Style, rows: pd.DataFrame, x: str, metric: str, beside: float, log_y: bool
) -> None:
    repeated = rows[rows.duplicated([x, "seed"])]
    if len(repeated):
        value, seed = repeated.iloc[0][[x, "seed"]]
        raise InputError(f"{look.label} at {x} = {value:g} holds seed {seed:g} twice: name fewer roles or cells for it")
    average = _geometric_mean if log_y else stats.mean
    points = {value: average(arm[metric].astype(float).tolist()) for value, arm in rows.groupby(x)}
    spread = 2 ** (0.06 * (rows.groupby(x)["seed"].rank(pct=True) - 0.55))  # seeds from left to right
    axes.scatter(rows[x] * beside * spread, rows[metric], s=12, color=look.colour, alpha=0.4, linewidths=0, zorder=2)
    places, found = [value * beside for value in points], list(points.values())
    for place, point in zip(places, found, strict=True):
        axes.plot([place, place], [point.low, point.high], color=look.colour, linewidth=1.6, zorder=3)
    marks = {"marker": look.marker, "markersize": 5.5, "markerfacecolor": look.face, "markeredgewidth": 1.4}
    means = [point.estimate for point in found]
    axes.plot(places, means, look.line, color=look.colour, label=look.label, linewidth=1.2, zorder=4, **marks)


def _geometric_mean(values: Sequence[float]) -> stats.Interval:
    return stats.geometric_mean_ratio(dict(enumerate(values)), dict.fromkeys(range(len(values)), 1.0))


def _log2_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the settings that were run, and at no others."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlim(values[0] / 1.3, values[-1] * 1.3)


def _need_positive(done: pd.DataFrame, columns: Sequence[str]) -> None:
    for name in columns:
        unfit = done[done[name].astype(float) <= 0]
        if len(unfit):
            cell, role, seed = unfit.iloc[0][["cell", "role", "seed"]]
            raise InputError(
                f"{name} is not above 0 for seed {seed} of {role} in {cell}: a log axis has no place for it, leave "
                "such runs out first"
            )


def _along(axes: Axes, look: Style, rows: pd.DataFrame, metric: str) -> None:
    points = {t: stats.mean(group[metric].astype(float).tolist()) for t, group in rows.groupby("t")}
    marks = {"marker": look.marker, "markersize": 3.5, "markerfacecolor": look.face, "linewidth": 1.4}
    found = list(points.values())
    axes.plot(list(points), [p.estimate for p in found], look.line, color=look.colour, label=look.label, **marks)
    low, high = [p.low for p in found], [p.high for p in found]
    axes.fill_between(list(points), low, high, color=look.colour, alpha=0.18, linewidth=0)


def _contours(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    places = table.pivot(index="y", columns="x", values=metric)
    if places.isna().any(axis=None):
        raise InputError(f"table has {len(table)} places, which are no full grid: give those of one seed")
    low, high = np.quantile(places, [0.02, 0.98])  # a few places at the rim are not to take all the colours
    levels = np.geomspace(max(low, 1e-6), high, 13)
    looks = {"levels": levels, "norm": LogNorm(levels[0], levels[-1]), "cmap": "cividis_r", "extend": "both"}
    filled = axes.contourf(places.columns, places.index, places, **looks)
    axes.figure.colorbar(filled, ax=axes, location="bottom", format="%.2g", ticks=levels[::4], label=METRICS[metric])
    axes.set_title(METRICS[metric].partition(" (")[0])
    axes.set_aspect("equal")
    axes.grid(visible=False)


def _mean_both_ways(axes: Axes, look: Style, x: np.ndarray, y: np.ndarray, words: str) -> None:
    """A dot per run, a cross of the two intervals, the mean, and what sets the arm apart."""
    axes.scatter(x, y, s=12, color=look.colour, alpha=0.3, linewidths=0, zorder=2)
    across, up = stats.mean(x), stats.mean(y)
    bars = {"color": look.colour, "linewidth": 1.2, "zorder": 3}
    axes.plot([across.low, across.high], [up.estimate] * 2, **bars)
    axes.plot([across.estimate] * 2, [up.low, up.high], **bars)
    marks = {"markerfacecolor": look.face, "markeredgecolor": look.colour, "markeredgewidth": 1.4, "zorder": 4}
    axes.plot(across.estimate, up.estimate, look.marker, label=look.label, **marks)
    where = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 7, "color": FAINT, "zorder": 5}
    axes.annotate(words, (across.estimate, up.estimate), **where)


def _slice(axes: Axes, look: Style, arm: pd.DataFrame) -> None:
    sides = [arm.assign(mu=-arm["mu"], rise=arm["rise_minus"]), arm.assign(rise=arm["rise_plus"])]
    rises = pd.concat(sides).dropna(subset=["rise"]).groupby("mu")["rise"]
    points = {0.0: stats.mean([0.0])} | {mu: stats.mean(values.tolist()) for mu, values in rises}
    mus = sorted(points)
    axes.plot(mus, [points[mu].estimate for mu in mus], look.line, color=look.colour, label=look.label, linewidth=1.2)
    low, high = ([getattr(points[mu], bound) for mu in mus] for bound in ("low", "high"))
    axes.fill_between(mus, low, high, color=look.colour, alpha=0.08, linewidth=0)


def _legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    entries = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, len(entries)))


def _outcome_handles(outcomes: pd.Series) -> list[plt.Line2D]:
    return [
        plt.Line2D([], [], color=colour, marker=marker, markersize=size, linestyle="", label=f"{name} ({count})")
        for name, (colour, marker, size) in OUTCOMES.items()
        for count in [(outcomes == name).sum()]
    ]


def _claims_of(axes: Axes, paper: str, claims: pd.DataFrame, lines: int) -> None:
    axes.set_title(paper, fontweight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(lines - 0.5, -0.5)
    for height, claim in enumerate(claims.itertuples()):
        colour, marker, size = OUTCOMES[claim.outcome]
        axes.plot(0.015, height, marker, color=colour, markersize=size, clip_on=False)
        name = claim.claim.partition("-")[2] + (" (miniature)" if claim.miniature else "")
        axes.text(0.06, height, name, va="center", fontsize=7.5, color=FAINT if claim.outcome == "not run" else INK)
