"""Tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fisher_forget._util.numbers import MISSING


def markdown_table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A GitHub table, padded to be read as it is; every column but the first is right-aligned.

    Args:
        columns: Headings.
        rows: Cells, one a heading; `None` and NaN become a dash.

    Example:
        >>> print(markdown_table(["part", "KL"], [["a|b", "1.0"]]))
        | part |  KL |
        | :--- | --: |
        | a\\|b | 1.0 |
    """
    lines = [[_cell(value) for value in row] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join(_aligned(line, widths)) + " |" for line in [lines[0], rule, *lines[1:]]
    )


def _cell(value: object) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return MISSING if missing else " ".join(str(value).split()).replace("|", "\\|")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return [cells[0].ljust(widths[0]), *padded[1:]]
