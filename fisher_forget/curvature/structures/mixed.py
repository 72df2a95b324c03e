"""Mixed blocks: each group of parameters has a structure of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

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
    left = list(names)
    groups: list[Group] = []
    for pattern, structure in structures.items():
        members = tuple(name for name in left if fnmatchcase(name, pattern))
        if not members:
            taken = any(fnmatchcase(name, pattern) for name in names)
            raise CurvatureError(
                f"the pattern {pattern!r} in structure=, "
                + ("all taken by earlier ones" if taken else "of nothing"),
                f"patterns that each match some of {left or list(names)}",
                "The first match wins: put special patterns before general ones."
                if taken
                else "Correct the pattern.",
            )
        groups.append((structure, members))
        left = [name for name in left if name not in members]
    if left:
        got = f"no pattern in structure= for {left[:5]}" + (" and others" if len(left) > 5 else "")
        fix = "Add a last pattern '*', or leave parameters out with subset=."
        raise CurvatureError(got, "a structure for every parameter", fix)
    return groups


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
