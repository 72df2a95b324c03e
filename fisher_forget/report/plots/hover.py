"""What a marker of a figure stands for, shown where the pointer rests: titles in the SVG, without
any script."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import colors
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NO_POINTS = (None, "None", "", " ", "|", "_")  # no markers, or the ends of error bars
_MARK = "titles:"  # how the id of an artist begins that carries the titles of its points


def explain(artist: Line2D | PathCollection, texts: Sequence[str]) -> None:
    """Say what each point of an artist is; the texts travel in the artist's id.

    Args:
        artist: Markers.
        texts: One a point.
    """
    artist.set_gid(_MARK + json.dumps(list(texts), ensure_ascii=False))


def explain_all(figure: Figure) -> None:
    """Give every point that has no text one of its series and its coordinates, in the words of
    legend and axes."""
    for ax in figure.axes:
        labels = {
            _look(artist): str(artist.get_label()) for artist in _markers(ax) if _named(artist)
        }
        for artist in _markers(ax):
            if artist.get_gid() is None:
                series = labels.get(_look(artist), "")
                explain(artist, [_describe(ax, series, x, y) for x, y in _points(artist)])


def titled(svg: bytes) -> bytes:
    """An SVG file of matplotlib's with a title in each marker that `explain` has a text for."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for count, group in enumerate(g for g in root.iter() if g.get("id", "").startswith(_MARK)):
        texts = json.loads(group.attrib["id"].removeprefix(_MARK))
        group.set("id", f"points_{count}")
        marks = list(group.iter(f"{{{SVG}}}use"))
        if len(marks) != len(texts):  # points outside the figure are not drawn
            continue
        for mark, text in zip(marks, texts, strict=True):
            ElementTree.SubElement(mark, f"{{{SVG}}}title").text = text
    return ElementTree.tostring(root, encoding="unicode").encode()


def _markers(ax: Axes) -> list[Line2D | PathCollection]:
    marked = (line for line in ax.lines if line.get_marker() not in _NO_POINTS)
    lines = [line for line in marked if np.size(line.get_xdata()) > 0]
    return [*lines, *(c for c in ax.collections if isinstance(c, PathCollection))]


def _named(artist: Artist) -> bool:
    return not str(artist.get_label()).startswith("_")


def _look(artist: Line2D | PathCollection) -> tuple[object, ...]:
    """What tells series apart: shape and colour."""
    if isinstance(artist, Line2D):
        return str(artist.get_marker()), colors.to_hex(artist.get_color())
    edges = np.atleast_2d(np.asarray(artist.get_edgecolor(), dtype=float))
    return np.shape(artist.get_paths()[0].vertices), *(colors.to_hex(tuple(c)) for c in edges[:1])


def _points(artist: Line2D | PathCollection) -> list[tuple[float, float]]:
    data = artist.get_xydata() if isinstance(artist, Line2D) else artist.get_offsets()
    points: Any = np.ma.filled(np.ma.asarray(data, dtype=float), np.nan)
    return [(float(x), float(y)) for x, y in points if np.isfinite([x, y]).all()]


def _describe(ax: Axes, series: str, x: float, y: float) -> str:
    return "\n".join(filter(None, [series, _coordinate(ax.yaxis, y), _coordinate(ax.xaxis, x)]))


def _coordinate(axis: Axis, value: float) -> str:
    """ "accuracy (%): 98.2", or the name beside the nearest tick where the axis has names."""
    places = np.asarray(axis.get_majorticklocs(), dtype=float)
    names = axis.get_major_formatter().format_ticks(list(places))
    worded = names and not any(re.search(r"\d", name) for name in names)
    if worded and isinstance(axis.get_major_locator(), FixedLocator):
        return " ".join(names[int(np.argmin(np.abs(places - value)))].split())
    label = " ".join(axis.get_label_text().split())
    return f"{label}: {value:.3g}" if label else f"{value:.3g}"
