"""Methods side by side: how close they come, what they cost in accuracy, and in time.

Both figures take one row a method, with the columns method; kl, kl_low, kl_high (nats, 95 %
interval); accuracy, accuracy_low, accuracy_high (%, on retained test data); cost (wall time over
that of retraining); ours (whether it is this package's). The rows "original" and "retrained" are
reference marks; the KL of "retrained" is the floor. Each figure marks and joins its own Pareto
front: the methods than which no other has both less KL and more accuracy, or less time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fisher_forget.errors import DataError
from fisher_forget.report.plots.annotate import Array, Obstacles, Point, along, annotate, ends_first
from fisher_forget.report.plots.hover import explain
from fisher_forget.report.plots.style import (
    BLUE,
    EDGE,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    STYLES,
    VERMILLION,
    axes_or_new,
    finish,
    log_limits,
    score_limits,
)

Flags = NDArray[np.bool_]
MARKS = ("original", "retrained")
METHODS_SIZE = (7.4, 5.2)  # inches: up to 26 methods, numbered, and their key below
KEY_COLUMNS = 4
FEW = 8  # methods that are all named beside their points
LIGHT = "#c4c4c4"  # of error bars
SHARDS = ("shards", "slices", "accuracy")
COLUMNS = (
    *("method", "kl", "kl_low", "kl_high", "accuracy", "accuracy_low", "accuracy_high"),
    *("cost", "ours"),
)


def plot_methods(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """KL on the forgotten data against accuracy on retained test data, one point a method, with 95
    % intervals.

    Methods on the Pareto front (filled diamonds) and this package's (filled circles) are named
    beside their points, and so are a few others; many are numbered, and the key stands below.

    Args:
        frame: One row a method, see the module.
        ax: Where to draw.

    Raises:
        DataError: If a column or a method is missing.
    """
    rows, marks = _rows(frame)
    ax = axes_or_new(ax, METHODS_SIZE)
    x, y = (rows[name].to_numpy(dtype=float) for name in ("accuracy", "kl"))
    _floor(ax, marks)
    left, right = _ends(rows, "accuracy")
    low, high = _ends(rows, "kl")
    xerr, yerr = np.abs([x - left, right - x]), np.abs([y - low, high - y])
    _bars(ax, x, y, xerr=xerr, yerr=yerr)
    busy = along(left, y, right, y) + along(x, low, x, high)
    points = {name: (marks["accuracy"][name], marks["kl"][name]) for name in MARKS}
    front = _front(rows, "accuracy", -1)
    busy += _stair(ax, x[front], y[front])
    _symbols(ax, rows, x, y, front)
    for name, at in points.items():
        _mark(ax, name, at)
    log_limits(ax, "y", [*y, *low, *(at[1] for at in points.values())])
    score_limits(ax, [*x, *(at[0] for at in points.values())], "%", margin=0.12, stretch=True)
    ax.set_xlabel("accuracy on retained test data (%)")
    busy += _across(ax, marks["kl"]["retrained"])
    places = list(zip(x, y, strict=True))
    _label(ax, rows, places, front, Obstacles(list(points.values()), busy))
    return ax


def plot_cost(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """KL on the forgotten data against wall time, as a share of that of retraining: what closeness
    costs.

    Symbols, names and key are those of `plot_methods`.

    Args:
        frame: One row a method, see the module.
        ax: Where to draw.

    Raises:
        DataError: If a column or a method is missing.
    """
    rows, marks = _rows(frame)
    ax = axes_or_new(ax, METHODS_SIZE)
    x, y = (rows[name].to_numpy(dtype=float) for name in ("cost", "kl"))
    low, high = _ends(rows, "kl")
    _floor(ax, marks)
    ax.axvline(1.0, color=GREEN, linewidth=1, linestyle=":", zorder=1)
    original = marks["kl"]["original"]
    look = {"color": STYLES["original"]["color"], "linewidth": 1.4, "linestyle": "-."}
    ax.axhline(original, label=LABELS["original"], zorder=1, **look)
    yerr = np.abs([y - low, high - y])
    _bars(ax, x, y, yerr=yerr)
    at = (1.0, marks["kl"]["retrained"])
    front = _front(rows, "cost", 1)
    busy = along(x, low, x, high) + _stair(ax, x[front], y[front])
    _symbols(ax, rows, x, y, front)
    _mark(ax, "retrained", at)
    log_limits(ax, "x", [*x, 1.0])
    log_limits(ax, "y", [*y, *low, original, at[1]])
    ax.set_xlabel("wall time (retrainings)")
    busy += _across(ax, original) + _across(ax, at[1])
    _label(ax, rows, list(zip(x, y, strict=True)), front, Obstacles([at], busy))
    return ax


def plot_shards(frame: pd.DataFrame, single: float, ax: Axes | None = None) -> Axes:
    """Accuracy of SISA's ensemble against the number of shards, one line a number of slices.

    Args:
        frame: Columns shards, slices, accuracy (%); several rows of the same shards and slices
            (seeds) are averaged, with their standard deviation as bars.
        single: Accuracy of one model trained on everything, %.
        ax: Where to draw.

    Raises:
        DataError: If a column is missing or there are no rows.
    """
    if missing := [name for name in SHARDS if name not in frame]:
        raise DataError(f"a table without {missing}", f"the columns {SHARDS}", "Add them.")
    if frame.empty:
        raise DataError("a table without rows", "at least one", "Fit a SISA first.")
    ax = axes_or_new(ax)
    lines = list(frame.groupby("slices"))
    for (slices, rows), colour, marker in zip(
        lines, (BLUE, ORANGE, VERMILLION, GREY) * len(lines), "osv^" * len(lines), strict=False
    ):
        points = rows.groupby("shards")["accuracy"].agg(["mean", "std"])
        x, std = points.index.to_numpy(dtype=float), points["std"].to_numpy()
        yerr = None if np.isnan(std).any() else std
        label = f"{slices} slice{'s' if slices != 1 else ''} a shard"
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3}
        ax.errorbar(x, points["mean"].to_numpy(), yerr=yerr, label=label, **look)
    ax.axhline(single, color=GREEN, linestyle="--", linewidth=1.4, label="one model on everything")
    shards = sorted(frame["shards"].unique())
    ax.set_xscale("log")
    ax.set_xticks(shards, [str(s) for s in shards])
    ax.minorticks_off()
    ax.set_xlabel("shards (number)")
    ax.set_ylabel("test accuracy of the ensemble (%)")
    finish(ax, legend_columns=1 if len(lines) < 2 else 2)
    return ax


def _rows(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """(methods, the closest first; column -> reference mark -> value)"""
    missing = [name for name in COLUMNS if name not in frame] or [
        m for m in MARKS if m not in set(frame["method"])
    ]
    if missing:
        got = f"a comparison without {missing}"
        raise DataError(got, f"the columns {COLUMNS}, and rows {MARKS}", "Add them.")
    known = frame["method"].isin(MARKS)
    rows = frame[~known & np.isfinite(frame["kl"]) & np.isfinite(frame["accuracy"])]
    values = frame[known].set_index("method")
    columns = ("kl", "accuracy")
    marks = {column: {name: float(values[column][name]) for name in MARKS} for column in columns}
    return rows.sort_values("kl", kind="stable").reset_index(drop=True), marks


def _ends(rows: pd.DataFrame, column: str) -> tuple[Array, Array]:
    """The interval's ends; the value itself where there is none."""
    low, high = (rows[f"{column}_{end}"].fillna(rows[column]) for end in ("low", "high"))
    return low.to_numpy(dtype=float), high.to_numpy(dtype=float)


def _floor(ax: Axes, marks: Mapping[str, Mapping[str, float]]) -> None:
    look: dict[str, Any] = {"color": GREEN, "linestyle": "--", "linewidth": 1.4, "zorder": 1}
    ax.axhline(marks["kl"]["retrained"], label="floor", **look)


def _bars(ax: Axes, x: Array, y: Array, **errors: Any) -> None:
    """Error bars below all else, and their line of the legend in its place: Matplotlib would have
    it last."""
    look: dict[str, Any] = {"fmt": "none", "ecolor": LIGHT, "elinewidth": 0.8, "capsize": 2}
    ax.errorbar(x, y, **errors, zorder=2, **look)
    ax.plot([], [], color=LIGHT, label="interval, 95 %")


def _across(ax: Axes, y: float) -> list[Point]:
    """Points along a horizontal line, equally far apart on the page."""
    steps = np.linspace(0.0, 1.0, 120)
    pixels = ax.transAxes.transform(np.stack([steps, 0 * steps], axis=1))
    return [(float(x), y) for x, _ in ax.transData.inverted().transform(pixels)]


def _symbols(ax: Axes, rows: pd.DataFrame, x: Array, y: Array, front: Flags) -> None:
    """Shape and fill say what colour says."""
    ours = rows["ours"].to_numpy(dtype=bool)
    hollow = {"markerfacecolor": "white"}
    look: dict[str, Any]
    looks: tuple[tuple[str, Any, str, int, str, dict[str, Any]], ...] = (
        ("other methods", ~ours & ~front, "o", 6, GREY, hollow),
        ("on the Pareto front", ~ours & front, "d", 8, "black", EDGE),
        ("fisher-forget", ours, "o", 9, BLUE, EDGE),
    )
    for label, chosen, marker, size, color, fill in looks:
        if chosen.any():
            look = {"markersize": size, "color": color, "label": label, "zorder": 4, **fill}
            (line,) = ax.plot(x[chosen], y[chosen], marker, **look)
            explain(line, [_describe(row) for _, row in rows[chosen].iterrows()])


def _describe(row: pd.Series[Any]) -> str:
    return (
        f"{row['method']}\n"
        f"KL {row['kl']:.3g} nats ({row['kl_low']:.3g} to {row['kl_high']:.3g})\n"
        f"accuracy {row['accuracy']:.1f} %\n{row['cost']:.2g} of the time of retraining"
    )


def _mark(ax: Axes, name: str, at: Point) -> None:
    style = {"markeredgecolor": "black", "markersize": 9, **STYLES[name]}
    ax.plot(at[0], at[1], linestyle="none", label=LABELS[name], zorder=3, **style)


def _front(rows: pd.DataFrame, column: str, sign: int) -> Flags:
    """Which rows no other beats in both: small KL together with a small (sign 1) or large (-1)
    value of the column."""
    x, y = sign * rows[column].to_numpy(dtype=float), rows["kl"].to_numpy(dtype=float)
    as_good = (x[:, None] <= x) & (y[:, None] <= y)
    better = as_good & ((x[:, None] < x) | (y[:, None] < y))
    return np.asarray(~better.any(axis=0), dtype=bool)


def _stair(ax: Axes, x: Array, y: Array) -> list[Point]:
    """The edge of what is reached, through the points of a front.

    Returns:
        Points along it.
    """
    order = np.argsort(-y, kind="stable")
    # from each as far as the next, then down to it
    corners_x, corners_y = np.repeat(x[order], 2)[1:], np.repeat(y[order], 2)[:-1]
    ax.plot(corners_x, corners_y, color="black", linestyle=":", linewidth=1.2, zorder=1.5)
    return along(corners_x[:-1], corners_y[:-1], corners_x[1:], corners_y[1:])


def _label(
    ax: Axes, rows: pd.DataFrame, points: list[Point], front: Flags, obstacles: Obstacles
) -> None:
    """Names beside the points that matter, and beside all where they are few; numbers beside the
    others, and their key below the legend."""
    ax.set_ylabel("KL(retrained ‖ scrubbed)\non forgotten data (nats)")
    named = front | rows["ours"].to_numpy(dtype=bool) | (len(rows) <= FEW)
    numbers = np.cumsum(~named)
    texts = [
        m if direct else str(n) for m, direct, n in zip(rows["method"], named, numbers, strict=True)
    ]
    for text, method, direct in zip(texts, rows["method"], named, strict=True):
        if not direct:
            ax.plot([], [], " ", label=f"{text}  {method}")
    finish(ax, legend_columns=KEY_COLUMNS)
    order = [i for i in ends_first(len(points)) if named[i]] + [
        i for i in ends_first(len(points)) if not named[i]
    ]
    annotate(ax, points, texts, obstacles, limit=len(points), everything=True, order=order)
