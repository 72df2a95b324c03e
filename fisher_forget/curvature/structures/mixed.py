"""Mixed blocks: each group of parameters has a structure of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fisher_forget._util import patterns
from fisher_forget.curvature.operator import BlockDiagonal, Curvature
from fisher_forget.errors import CurvatureError

Group = tuple[str, tuple[str, ...]]  # structure, names


def assign(structures: Mapping[str, str], names: Sequence[str]) -> list[Group]:
    """Give each parameter the structure of the first shell pattern that matches its name; one group
    per pattern.

    Args:
        structures: Structures by pattern, in order: {"conv*": "diagonal", "*": "ekfac"}.
        names: All parameters.

    Raises:
        CurvatureError: If a pattern takes no parameter, or a parameter is left over.
    """
    taken = patterns.assign(structures, names, "structure", CurvatureError)
    left = sorted({*names}.difference(*taken.values()), key=list(names).index)
    if left:
        got = f"no pattern in structure= for {left[:5]}" + (" and others" if len(left) > 5 else "")
        fix = "Add a last pattern '*', or leave parameters out with subset=."
        raise CurvatureError(got, "a structure for every parameter", fix)
    return [(structures[pattern], members) for pattern, members in taken.items()]


def join(
    groups: Sequence[Group], operators: Sequence[Curvature], names: Sequence[str]
) -> BlockDiagonal:
    """The groups' operators side by side, those that consist of blocks themselves taken apart."""
    parts: list[tuple[tuple[str, ...], Curvature]] = []
    for (_, members), curvature in zip(groups, operators, strict=True):
        if isinstance(curvature, BlockDiagonal):
            parts.extend(curvature.parts)
        else:
            parts.append((members, curvature))
    return BlockDiagonal(tuple(parts), tuple(names))
