"""What attacks recover, as images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from fisher_forget.attack import Reconstruction
from fisher_forget.errors import DataError
from fisher_forget.report.plots.style import axes_or_new

MOST = 8  # samples in a row


def plot_reconstructions(
    found: Reconstruction,
    shape: tuple[int, int],
    others: Mapping[str, Tensor] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Deleted images, above what was recovered of them, above the same from retrained models.

    All are drawn in the range of the deleted images.

    Args:
        found: By `NewtonInversion` or `ChangedAnswers`.
        shape: Height and width of an image.
        others: Further rows by name [N, D].
        ax: Where to draw.

    Raises:
        DataError: If samples have not so many pixels.
    """
    rows: dict[str, Tensor | None] = {
        "deleted": found.truth,
        "recovered": found.recovered,
        "from retrained": found.recovered_retrained,
        **(others or {}),
    }
    shown = {name: x[:MOST] for name, x in rows.items() if x is not None}
    columns, (height, width) = min(len(found.truth), MOST), shape
    if any(x.shape != (columns, height * width) for x in shown.values()):
        got = f"samples of shape {tuple(found.truth.shape)} as images of {height} x {width}"
        raise DataError(got, "[N, height * width], alike in all rows", "Correct `shape`.")
    ax = axes_or_new(ax, (1.1 * columns + 2.2, 1.15 * len(shown)))
    low, high = float(found.truth.min()), float(found.truth.max())
    look: dict[str, Any] = {"cmap": "gray_r", "vmin": low, "vmax": high, "interpolation": "nearest"}
    for line, (name, images) in enumerate(shown.items()):
        top = -1.08 * line
        for column, image in enumerate(torch.unbind(images)):
            left = 1.08 * column
            ax.imshow(image.view(shape).numpy(), extent=(left, left + 1, top - 1, top), **look)
        ax.text(-0.1, top - 0.5, name, fontsize=9, ha="right", va="center", wrap=True)
    ax.set_xlim(-2.1, 1.08 * columns)
    ax.set_ylim(-1.08 * len(shown), 0.05)
    ax.set_axis_off()
    return ax
