"""Shell patterns over names: a value for each name, by the first pattern that matches it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fisher_forget.errors import FisherForgetError


def assign(
    patterns: Iterable[str], names: Sequence[str], where: str, error: type[FisherForgetError]
) -> dict[str, tuple[str, ...]]:
    """The names that each pattern takes, in order; those of no pattern are left out.

    Args:
        patterns: In order: the first match wins.
        names: All there are.
        where: Option that holds the patterns, for the message.
        error: What is raised.

    Raises:
        FisherForgetError: If a pattern takes no name.

    Example:
        >>> from fisher_forget.errors import ConfigError
        >>> names = ["0.weight", "0.bias", "1.weight"]
        >>> assign(["*.bias", "1.*"], names, "weight_decay", ConfigError)
        {'*.bias': ('0.bias',), '1.*': ('1.weight',)}
    """
    left, taken = list(names), dict[str, tuple[str, ...]]()
    for pattern in patterns:
        taken[pattern] = tuple(name for name in left if fnmatchcase(name, pattern))
        if not taken[pattern]:
            raise _takes_nothing(pattern, names, left, where, error)
        left = [name for name in left if name not in taken[pattern]]
    return taken


def _takes_nothing(
    pattern: str,
    names: Sequence[str],
    left: Sequence[str],
    where: str,
    error: type[FisherForgetError],
) -> FisherForgetError:
    got, expected = f"the pattern {pattern!r} in {where}=", "patterns that each match some of "
    if any(fnmatchcase(name, pattern) for name in names):
        fix = "The first match wins: put special patterns before general ones."
        rest = f"{expected}{list(left)}" if left else "fewer patterns: no name is left for it"
        return error(f"{got}, all taken by earlier ones", rest, fix)
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    fix = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Correct the pattern."
    return error(f"{got}, of nothing", f"{expected}{list(left or names)}", fix)
