"""Where to write beside the points of a chart: a text covers nothing, and no other point is nearer
to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

NAMED = 5  # points written beside, at most
NEAR = 12  # points of distance beyond which a line leads to a text
GREY = "#595959"

Array = NDArray[np.float64]
Point = tuple[float, float]


def whole_figure(figure: Figure | SubFigure) -> Figure:
    """The figure that a part of it belongs to."""
    while isinstance(figure, SubFigure):
        figure = figure.figure
    return figure


def along(x0: Array, y0: Array, x1: Array, y1: Array, steps: int = 40) -> list[tuple[float, float]]:
    """Points along straight lines of a chart, where no text should be."""
    t = np.linspace(0.0, 1.0, steps)[:, None]
    tiny = 1e-12  # a bar that reaches below zero has no logarithm
    log_y = (1 - t) * np.log(np.maximum(y0, tiny)) + t * np.log(np.maximum(y1, tiny))
    return list(zip(((1 - t) * x0 + t * x1).ravel(), np.exp(log_y).ravel(), strict=True))


@dataclass(frozen=True)
class Obstacles:
    """What a text must not cover, in data coordinates.

    Attributes:
        marks: Symbols other than the points that are named.
        busy: Points of lines and small dots.
    """

    marks: Sequence[Point]
    busy: Sequence[Point]


def annotate(
    ax: Axes,
    points: list[Point],
    texts: list[str],
    obstacles: Obstacles,
    *,
    limit: int = NAMED,
    everything: bool = False,
    order: Sequence[int] | None = None,
) -> None:
    """Write texts beside points, where they cover nothing and no other point is nearer.

    A text without a free place is left out. One that finds none beside its point stands farther
    off, with a line to it. The layout must be final.

    Args:
        ax: The axes.
        points: What to name, in data coordinates.
        texts: One a point.
        obstacles: What must not be covered.
        limit: Most texts.
        everything: Let a text cross a line, or stand close to another point, rather than leave it
            out.
        order: Which come first; by default the ends, then halves, quarters, ..., so that the
            extremes keep theirs.
    """
    page = _Page(ax, points, obstacles)
    waiting = list(ends_first(len(points)) if order is None else order)
    # what found no place may first cross a line, then stand near another point, which only a crowd
    # makes necessary
    rounds = ((page.everywhere, True), (page.symbols, True), (page.symbols, False))
    for covered, strict in rounds[: 3 if everything else 1]:
        for i in list(waiting):
            if len(page.boxes) == limit:
                return
            if page.place(i, points[i], texts[i], covered, strict):
                waiting.remove(i)


class _Page:
    """Where things are, in pixels."""

    def __init__(self, ax: Axes, points: list[Point], obstacles: Obstacles) -> None:
        figure = whole_figure(ax.figure)
        width, height = figure.bbox.size
        # measures for any canvas
        self.renderer = RendererAgg(width, height, figure.dpi)  # type: ignore[no-untyped-call]
        self.ax, self.unit = ax, figure.dpi / 72  # pixels in a point
        self.centres = ax.transData.transform(points)
        angles = np.linspace(0, 2 * np.pi, 12)
        around = 5 * self.unit * np.array([(np.cos(a), np.sin(a)) for a in angles])
        marked = ax.transData.transform([*points, *obstacles.marks])
        self.symbols = (marked[:, None] + around).reshape(-1, 2)
        lines = ax.transData.transform(np.reshape(obstacles.busy, (-1, 2)))
        self.everywhere = np.concatenate([self.symbols, lines])
        self.inside = ax.get_window_extent(self.renderer).padded(-2 * self.unit)
        self.boxes: list[Bbox] = []

    def place(self, i: int, point: Point, words: str, covered: Array, strict: bool) -> bool:
        """Write beside point i at the first place that is free; whether there is one."""
        for distance, angle in _PLACES:
            text = _text(self.ax, point, words, distance, angle)
            text.update_positions(self.renderer)
            # the words alone, without the line to them
            box = Text.get_window_extent(text, self.renderer).padded(self.unit)
            taken = any(box.overlaps(other) for other in self.boxes) or _contains(box, covered)
            free = self._contains(box) and not taken
            if free and (not strict or self._clear(i, box, distance, angle)):
                self.boxes.append(box)
                return True
            text.remove()
        return False

    def _contains(self, box: Bbox) -> bool:
        inside = self.inside
        across = inside.x0 <= box.x0 and box.x1 <= inside.x1
        return bool(across and inside.y0 <= box.y0 and box.y1 <= inside.y1)

    def _clear(self, i: int, box: Bbox, distance: float, angle: float) -> bool:
        """Whether no other point is nearer to the text, or to the line that leads to it."""
        others = np.delete(self.centres, i, axis=0)
        if distance <= NEAR:
            nearest = _distances(box, others).min(initial=np.inf)
            return bool(nearest > _distances(box, self.centres)[i])
        direction = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
        line = self.centres[i] + np.linspace(0, 1, 12)[:, None] * self.unit * distance * direction
        gaps = (_distances(Bbox([at, at]), others).min(initial=np.inf) for at in line)
        return all(gap > 6 * self.unit for gap in gaps)


def _text(ax: Axes, point: Point, text: str, distance: float, angle: float) -> Annotation:
    """A text so many points away from its point; far away with a line."""
    dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if distance > NEAR else None
    return ax.annotate(
        text,
        point,
        xytext=(dx, dy),
        textcoords="offset points",
        ha="center" if abs(dx) < 1 else "left" if dx > 0 else "right",
        va="center" if abs(dy) < 1 else "bottom" if dy > 0 else "top",
        fontsize=8,
        color="#222222",
        zorder=6,
        arrowprops=line,
    )


# (distance in points, direction in degrees)
_PLACES = [(9, a) for a in (0, 180, 45, 135, 315, 225, 90, 270)] + [
    (d, a)
    for d in (22, 34, 48, 66, 90)
    for a in (90, 60, 120, 30, 150, 0, 180, 270, 300, 240, 330, 210)
]


def _contains(box: Bbox, at: Array) -> bool:
    x, y = at.T
    return bool(((box.x0 <= x) & (x <= box.x1) & (box.y0 <= y) & (y <= box.y1)).any())


def _distances(box: Bbox, at: Array) -> Array:
    x, y = at.T
    distances: Array = np.hypot(x - np.clip(x, box.x0, box.x1), y - np.clip(y, box.y0, box.y1))
    return distances


def ends_first(count: int) -> list[int]:
    """0, last, middle, quarters, ...

    Example:
        >>> ends_first(5)
        [0, 4, 2, 1, 3]
    """
    order = [0, count - 1] if count > 1 else [0][:count]
    parts = 2
    while len(order) < count:
        order += [
            i for k in range(1, parts, 2) if (i := round(k * (count - 1) / parts)) not in order
        ]
        parts *= 2
        if parts > 4 * count:
            order += [i for i in range(count) if i not in order]
    return order
