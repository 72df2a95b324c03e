"""The cells of a grid: one method with one value of each of its options."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fisher_forget.baselines import METHODS
from fisher_forget.baselines.fisher import FisherForget
from fisher_forget.baselines.protocol import settings_of
from fisher_forget.errors import ConfigError
from fisher_forget.unlearn.options import ForgetOptions

OURS = FisherForget.name
CURVATURE = (
    "structure",
    "kind",
    "draws",
    "max_samples",
    "solver",
    "subset",
)  # what a curvature estimate depends on
DRAW = ("noise", "exponent", "seed")  # what needs neither another estimate nor another Newton step
_SHARED = ("likelihood", "unpack", "device", "progress")  # by all cells, or by none
DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(ForgetOptions) if field.name not in _SHARED
}


@dataclass(frozen=True)
class Cell:
    """One method with its options.

    Attributes:
        method: Its name.
        options: All of `forget`'s; of another method those that differ from its defaults, and the
            seed.
    """

    method: str
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The cell as text; the same for the same cell."""
        return f"{self.method}({', '.join(f'{name}={self.options[name]!r}' for name in sorted(self.options))})"

    def part(self, names: Iterable[str]) -> str:
        """Some options as text: cells that agree share what depends on these alone."""
        return repr([self.options[name] for name in names])

    @property
    def level(self) -> float:
        """The noise scale, by which draws are ordered; those that look for a scale come first."""
        noise = self.options["noise"]
        return float(noise) if isinstance(noise, (int, float)) else -1.0


def expand(grid: Mapping[str, Iterable[Any]], fixed: Mapping[str, Any]) -> tuple[Cell, ...]:
    """All cells of a grid, each once. An axis crosses the methods that have an option of that name.

    Where noise is an axis, the Newton step without noise is a cell, too, and a single one: it has
    no draws.

    Args:
        grid: Option -> values; "method" -> names.
        fixed: Option -> value, for every cell that has it.

    Raises:
        ConfigError: An unknown method or option, an axis without values, or a value that is out of
            range.
    """
    axes = {name: _values(name, values) for name, values in grid.items()}
    methods = axes.pop("method", [OURS])
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(
            f"the methods {unknown}", f"some of {list(METHODS)}", "Correct the names."
        )
    known = {name: _options(name) for name in METHODS}
    _check_names(axes, [known[name] for name in methods])
    _check_names(
        fixed, known.values()
    )  # of methods that are not in the grid, too: options may be shared by grids
    found: dict[str, Cell] = {}
    for method in methods:
        own = {name: values for name, values in axes.items() if name in known[method]}
        base: dict[str, Any] = {"seed": 0} | {
            name: value for name, value in fixed.items() if name in known[method]
        }
        if method == OURS:
            base = DEFAULTS | base
            own |= {"noise": [0.0, *(v for v in own["noise"] if v)]} if "noise" in own else {}
        first = own.get("seed", [base["seed"]])[0]
        for values in itertools.product(*own.values()):
            options = base | dict(zip(own, values, strict=True))
            if method == OURS:
                options["noise"] = 0.0 if options["noise"] is None else options["noise"]
                options["seed"] = first if options["noise"] == 0 else options["seed"]
                ForgetOptions(**options)  # refuses what is out of range
            cell = Cell(method, options)
            found[cell.key] = cell
    return tuple(found.values())


def grouped(cells: Iterable[Cell], by: Callable[[Cell], Any]) -> list[list[Cell]]:
    """Cells that agree, together; in the order in which each group is first met."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(by(cell), []).append(cell)
    return list(groups.values())


def _values(name: str, values: Iterable[Any]) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (found := list(values)):
        raise ConfigError(
            f"the axis {name}={values!r}", "one value at least, in a list", f"Pass {name!r}: [...]."
        )
    return [value.item() if isinstance(value, np.generic) else value for value in found]


def _options(method: str) -> set[str]:
    if method == OURS:
        return set(DEFAULTS)
    return {*settings_of(METHODS[method])} - {*_SHARED}


def _check_names(names: Iterable[str], known: Collection[Collection[str]]) -> None:
    for name in names:
        if not any(name in options for options in known):
            every = sorted({option for options in known for option in options})
            near = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
            fix = (
                f"Did you mean {near[0]!r}?"
                if near
                else "Leave it out, or add the method that has it."
            )
            raise ConfigError(f"the option {name!r}", f"one of {every}", fix)
