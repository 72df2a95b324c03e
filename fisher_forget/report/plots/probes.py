"""What probes read from the layers of several models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisher_forget.errors import DataError
from fisher_forget.overlearn import Probed
from fisher_forget.report.plots.style import GREY, MARKERS, SERIES, axes_or_new, finish


def plot_probes(found: Mapping[str, Probed], ax: Axes | None = None) -> Axes:
    """Gain of a probe over the guess, layer by layer, with its 95 % interval, in points.

    Args:
        found: Model -> what was found; all of the same layers, at most five models.
        ax: Where to draw.

    Raises:
        DataError: If there are no models, too many, or layers differ.
    """
    layers = [[x.layer for x in probed.layers] for probed in found.values()]
    if not 1 <= len(found) <= len(MARKERS) or any(x != layers[0] for x in layers):
        got = f"{len(found)} models with the layers {layers[:2]}"
        expected = f"1 to {len(MARKERS)} models, probed at the same layers"
        raise DataError(got, expected, "Pass Probe(layers=...) the same names.")
    ax = axes_or_new(ax)
    places = np.arange(len(layers[0]))
    ax.axhline(0, color=GREY, linewidth=1)
    for i, (name, probed) in enumerate(found.items()):
        gains = np.array([[x.gain.value, x.gain.low, x.gain.high] for x in probed.layers]) * 100
        value, low, high = gains.T
        aside = 0.14 * (i - (len(found) - 1) / 2)
        bars = np.maximum([value - low, high - value], 0)
        style: dict[str, Any] = {"color": SERIES[i], "marker": MARKERS[i], "linestyle": "none"}
        ax.errorbar(places + aside, value, bars, label=name, capsize=2, **style)
    ax.set_xticks(places, layers[0])
    ax.set_xlabel("layer")
    ax.set_ylabel("accuracy beyond the guess (points)")
    finish(ax, legend_columns=2)
    return ax
