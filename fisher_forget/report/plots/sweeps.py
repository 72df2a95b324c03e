"""What a sweep found: the trade-off, and scores along one axis of the grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from fisher_forget.errors import DataError
from fisher_forget.report.plots.annotate import (
    NAMED,
    Array,
    Obstacles,
    Point,
    along,
    annotate,
    ends_first,
)
from fisher_forget.report.plots.style import (
    BLUE,
    EDGE,
    GREEN,
    GREY,
    LABELS,
    LINES,
    MARKERS,
    SERIES,
    STYLES,
    VERMILLION,
    axes_or_new,
    band,
    bar_or_none,
    finish,
    log_limits,
    score_limits,
    short,
)
from fisher_forget.report.tables import part_label
from fisher_forget.sweep import SweepTable
from fisher_forget.sweep.table import SKIPPED

Shade = Callable[[float], tuple[float, ...]]  # noise scale -> colour
SHADE = "cividis"  # grows monotonically in grey, too
PART_LOOKS = {"forget": (BLUE, "-", "////"), "retain": (VERMILLION, "--", "\\\\\\\\")}
KEPT_LABELS = {"test": "test data", "test_retained_classes": "test data of the retained classes"}


@dataclass(frozen=True)
class Curve:
    """The settings of a sweep that differ in one axis only.

    Attributes:
        label: What they share and other curves do not.
        rows: Of `SweepTable.frontier`.
        look: Colour, marker and line of a series.
    """

    label: str
    rows: pd.DataFrame
    look: dict[str, Any]


def plot_tradeoff(table: SweepTable, ax: Axes | None = None) -> Axes:
    """Forgetting against usefulness: KL on the forgotten data over the test score, one point a
    setting.

    A point is the mean over draws with its 95 % interval both ways; light dots are single draws.
    Points of one curve differ in the noise alone, and methods without noise are points of their
    own. A stair joins the settings that no other beats in both. The target is the retrained models'
    point, on the floor.

    Raises:
        DataError: If the table has no rows.
    """
    ax = axes_or_new(ax)
    kept, frontier = f"score_{table.kept}", _frontier(table)
    front = _Front(ax, kept, table.score.factor)
    _retrained_region(ax, table, front.factor)
    draws = table.frame[(table.frame["status"] != SKIPPED) & (table.frame["scale"] > 0)]
    front.dots(draws)
    curves = list(_curves(table, frontier, "noise"))
    shade = _shades(frontier["scale"]) if len(curves) == 1 else None
    for curve in curves:
        front.curve(curve, shade)
    if (frontier["ruined"] == 1).any():
        hollow: dict[str, Any] = {"color": GREY, "markerfacecolor": "white", "markersize": 7}
        ax.plot([], [], "o", label="ruined", **hollow)
    _stair(ax, frontier[frontier["pareto"]], kept, front.factor)
    marks = [_mark(ax, table, name, kept, front.factor) for name in ("original", "retrained")]

    log_limits(ax, "y", [*draws["kl_forget"], *frontier["kl_forget"], *(y for _, y in marks)])
    scores = [*frontier[kept] * front.factor, *(x for x, _ in marks)]
    score_limits(ax, scores, table.score.unit, stretch=True)
    ax.set_xlabel(table.score.title(f"on {KEPT_LABELS[table.kept]}"))
    ax.set_ylabel("KL(retrained ‖ scrubbed)\non forgotten data (nats)")
    finish(ax, legend_columns=2)
    front.annotate(marks)
    return ax


class _Front:
    """What is drawn of a trade-off, and what a text must not cover.

    Args:
        ax: The axes.
        kept: Column of the score.
        factor: Shown score over stored score.
    """

    def __init__(self, ax: Axes, kept: str, factor: float) -> None:
        self.ax, self.kept, self.factor = ax, kept, factor
        self.busy: list[Point] = []
        self.named: list[tuple[Point, str]] = []

    def dots(self, draws: pd.DataFrame) -> None:
        """Single draws."""
        self.busy += zip(draws[self.kept] * self.factor, draws["kl_forget"], strict=True)
        x, y = np.reshape(self.busy, (-1, 2)).T
        self.ax.scatter(x, y, s=9, color=GREY, alpha=0.35, linewidths=0, zorder=2)

    def curve(self, curve: Curve, shade: Shade | None) -> None:
        """A line through the settings of a curve, with their intervals and symbols."""
        ax, look, rows = self.ax, curve.look, curve.rows
        x, y = rows[self.kept].to_numpy() * self.factor, rows["kl_forget"].to_numpy()
        left, right, down, up = self._errors(rows, x, y)
        bars: dict[str, Any] = {"ecolor": "#a6a6a6", "elinewidth": 0.9, "zorder": 2.2}
        ax.errorbar(x, y, yerr=[down, up], xerr=[left, right], fmt="none", **bars)
        line: dict[str, Any] = {"linestyle": look["linestyle"], "linewidth": 1.2, "zorder": 3}
        ax.plot(x, y, color=look["color"], **line)
        sizes = np.linspace(5, 9, len(x)) if len(x) > 1 else [8.0]
        for at, size, (_, row) in zip(zip(x, y, strict=True), sizes, rows.iterrows(), strict=True):
            self._symbol(at, size, row, curve, shade)
        if math.isfinite(rows["scale"].max()):
            key = {"markerfacecolor": shade(rows["scale"].median())} if shade else {}
            ax.plot([], [], label=curve.label, markersize=7, linewidth=1.2, **(look | key))
        self.busy += along(x[:-1], y[:-1], x[1:], y[1:]) + along(x - left, y, x + right, y)
        self.busy += along(x, y - down, x, y + up)

    def _errors(self, rows: pd.DataFrame, x: Array, y: Array) -> list[Array]:
        """Lengths of the bars to the left, right, below and above; 0 for a single draw."""
        return [
            np.nan_to_num(np.abs(factor * rows[f"{name}_{end}"] - at))
            for name, factor, at in ((self.kept, self.factor, x), ("kl_forget", 1.0, y))
            for end in ("low", "high")
        ]

    def _symbol(
        self, at: Point, size: float, row: pd.Series[Any], curve: Curve, shade: Shade | None
    ) -> None:
        """One setting: hollow if it ruined the model."""
        scale = float(row["scale"])
        if scale == 0:  # drawn last and hollow, as it lies on others
            newton = {"linestyle": "none", "markersize": 9, "zorder": 5, **STYLES["newton"]}
            self.ax.plot([at[0]], [at[1]], label=_once(self.ax, LABELS["newton"]), **newton)
            return
        color = shade(scale) if shade else curve.look["color"]
        hollow = {"markerfacecolor": "white", "markeredgecolor": color}
        style: dict[str, Any] = {"color": color, "marker": curve.look["marker"], "zorder": 4}
        style |= EDGE if row["ruined"] < 1 else hollow
        self.ax.plot(*at, markersize=size, **style)
        text = f"s = {short(scale, digits=2)}" if math.isfinite(scale) else curve.label
        self.named.append((at, text))

    def annotate(self, marks: list[Point]) -> None:
        """Noise scales and methods beside their points; methods first."""
        if not self.named:
            return
        points, texts = [at for at, _ in self.named], [text for _, text in self.named]
        methods = [i for i, text in enumerate(texts) if not text.startswith("s = ")]
        order = [*methods, *(i for i in ends_first(len(texts)) if i not in methods)]
        limit = NAMED + len(methods)
        annotate(self.ax, points, texts, Obstacles(marks, self.busy), limit=limit, order=order)


def plot_noise(
    table: SweepTable, quantity: Literal["kl", "loss"] = "kl", ax: Axes | None = None
) -> Axes:
    """KL or loss on forgotten and on retained data against the noise scale, with 95 % bands over
    draws.

    Dotted lines are the retrained models: the floor of the KL, or their loss.

    Raises:
        DataError: If the table has no rows, or no scale above zero.
    """
    frontier = _frontier(table)
    frontier = frontier[frontier["scale"] > 0]  # which a logarithmic axis cannot show
    if frontier.empty:
        got = "noise scales that are all zero"
        raise DataError(got, "scales above zero", "Sweep over positive scales.")
    ax = _along_axis(axes_or_new(ax), table, frontier, "scale", "noise", quantity)
    ax.set_xlabel("noise scale s, in w + s · (B + τI)⁻ᵖ ξ (no unit)")
    finish(ax, legend_columns=2)
    return ax


def plot_damping(
    table: SweepTable, quantity: Literal["kl", "loss"] = "kl", ax: Axes | None = None
) -> Axes:
    """KL or loss on forgotten and on retained data against the damping of the Newton step, with 95
    % bands over draws.

    Raises:
        DataError: If the sweep has no damping that is a number above zero.
    """
    frontier = _frontier(table)
    if "damping" in table.axes:  # "auto" has no place on the axis
        frontier = frontier.assign(damping=pd.to_numeric(frontier["damping"], errors="coerce"))
        frontier = frontier[frontier["damping"] > 0]
    else:
        frontier = frontier.iloc[:0]
    if frontier.empty:
        fix = "Sweep over {'damping': [1e-3, ...], 'steps': [1]}."
        raise DataError("a sweep without dampings", "dampings above zero", fix)
    ax = _along_axis(axes_or_new(ax), table, frontier, "damping", "damping", quantity)
    ax.set_xlabel("damping τ of the Newton step (nats per squared weight)")
    finish(ax, legend_columns=2)
    return ax


def _along_axis(
    ax: Axes,
    table: SweepTable,
    frontier: pd.DataFrame,
    column: str,
    axis: str,
    quantity: Literal["kl", "loss"],
) -> Axes:
    """A line a curve and part, with its band, and the retrained models' value."""
    values: list[float] = []
    curves = list(_curves(table, frontier.sort_values(column), axis))
    for part, (color, line, hatch) in PART_LOOKS.items():
        name = f"{quantity}_{part}"
        base: dict[str, Any] = {"color": color, "linestyle": line, "linewidth": 1.6}
        for curve in curves:
            label = part_label(part) + (f", {curve.label}" if len(curves) > 1 else "")
            x, y = curve.rows[column].to_numpy(), curve.rows[name].to_numpy()
            ends = (curve.rows[f"{name}_{end}"].fillna(curve.rows[name]) for end in ("low", "high"))
            low, high = (end.to_numpy() for end in ends)
            ax.fill_between(x, np.maximum(low, y * 1e-3), high, zorder=1, **band(color, hatch))
            look: dict[str, Any] = {"marker": curve.look["marker"], "markersize": 6, **EDGE}
            if len(curves) > 1:
                look["linestyle"] = curve.look["linestyle"]
            ax.plot(x, y, label=label, zorder=4, **(base | look))
            values += [*y, *high]
        target = table.marks["retrained"][name]
        values.append(target)
        what = "floor" if quantity == "kl" else "retrained"
        label = f"{what}, {part_label(part)}"
        ax.axhline(target, color=color, linestyle=":", linewidth=1.4, label=label, zorder=2)
    log_limits(ax, "x", frontier[column].to_list(), margin=0.05)
    log_limits(ax, "y", values)
    ax.set_ylabel("KL(retrained ‖ scrubbed) (nats)" if quantity == "kl" else "mean loss (nats)")
    return ax


def _frontier(table: SweepTable) -> pd.DataFrame:
    if table.frame.empty:
        got = "a sweep without cells"
        raise DataError(got, "at least one", "Sweep over at least one scale and one seed.")
    return table.frontier()


def _curves(table: SweepTable, rows: pd.DataFrame, axis: str) -> Iterator[Curve]:
    """Rows that differ in the axis only, in its order; the label names what changes from curve to
    curve."""
    others = [name for name in table.axes if name != axis and rows[name].nunique(dropna=False) > 1]
    groups = rows.groupby(others, dropna=False, sort=False) if others else [((), rows)]
    for i, (key, group) in enumerate(groups):
        words = [_word(name, value) for name, value in zip(others, key, strict=True)]
        look = {"color": SERIES[i % 5], "marker": MARKERS[i % 5], "linestyle": LINES[i % 5]}
        label = ", ".join(filter(None, words)) or "scrubbed, by noise s"
        if not others:
            look["color"] = GREY
        yield Curve(label, group.sort_values("scale" if axis == "noise" else axis), look)


def _word(name: str, value: object) -> str:
    """A value of an axis in a legend; "" where the method has no such option."""
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    text = short(value) if isinstance(value, float) else str(value)
    if name in ("method", "structure"):
        return text
    return f"p = {text}" if name == "exponent" else f"{name} {text}"


def _shades(scales: pd.Series[float]) -> Shade:
    """scale -> colour; a scale of zero is as light as the smallest."""
    positive = scales[scales > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 2 * low)
    colors = mpl.colormaps[SHADE]
    # the last sixth of the colours is too pale on white
    return lambda scale: colors(0.85 * (1 - float(norm(max(scale, low)))))


def _once(ax: Axes, label: str) -> str:
    """The label, unless the legend has it."""
    return "_" if label in ax.get_legend_handles_labels()[1] else label


def _mark(ax: Axes, table: SweepTable, name: str, kept: str, factor: float) -> Point:
    """The original's or the retrained models' point, these with their standard deviation."""
    mark, spread = table.marks[name], table.marks["retrained_std"] if name == "retrained" else {}
    x, y = mark[kept] * factor, mark["kl_forget"]
    xerr = bar_or_none(spread.get(kept, math.nan) * factor)
    yerr = bar_or_none(spread.get("kl_forget", math.nan))
    bars: dict[str, Any] = {"ecolor": "black", "elinewidth": 1, "capsize": 2, "zorder": 5}
    ax.errorbar([x], [y], xerr=xerr, yerr=yerr, fmt="none", **bars)
    style = {"markeredgecolor": "black", "markersize": 9, **STYLES[name]}
    ax.plot([x], [y], linestyle="none", label=LABELS[name], zorder=5, **style)
    return x, y


def _retrained_region(ax: Axes, table: SweepTable, factor: float) -> None:
    """The floor, and the retrained models' score, each with its standard deviation."""
    target, spread = table.marks["retrained"], table.marks["retrained_std"]
    floor, std = target["kl_forget"], spread["kl_forget"]
    if math.isfinite(std) and std > 0:
        ax.axhspan(max(floor - std, floor * 1e-3), floor + std, zorder=1, **band(GREEN))
    ax.axhline(floor, color=GREEN, linestyle="--", linewidth=1.4, label="floor ± std", zorder=1)
    score, std = factor * target[f"score_{table.kept}"], factor * spread[f"score_{table.kept}"]
    ax.axvspan(score - std, score + std, zorder=0.9, facecolor="#e9f5f1", linewidth=0)


def _stair(ax: Axes, rows: pd.DataFrame, kept: str, factor: float) -> None:
    """The edge of what is reached: a step from each setting that no other beats to the next."""
    rows = rows.sort_values("kl_forget")
    if len(rows) > 1:
        x, y = rows[kept] * factor, rows["kl_forget"]
        look: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}
        ax.step(x, y, where="post", label="Pareto front", zorder=2.5, **look)
