"""The cells of a grid: one method with one value of each of its options."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisher_forget.baselines import METHODS
from fisher_forget.baselines.fisher import FisherForget
from fisher_forget.baselines.protocol import settings_of
from fisher_forget.errors import ConfigError
from fisher_forget.unlearn.options import ForgetOptions

OURS = FisherForget.name
SHARED = "likelihood"  # by all cells: the reference's
DRAW = ("noise", "exponent", "seed")  # need neither another curvature nor another Newton step
# Need another Newton step, and no other curvature. Of every further option it is assumed that the
# curvature depends on it.
NEWTON = ("weight_decay", "training", "steps", "damping", "drift", "budget", "batch_norm", "memory")


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
        options = ", ".join(f"{name}={self.options[name]!r}" for name in sorted(self.options))
        return f"{self.method}({options})"

    def without(self, names: Collection[str]) -> str:
        """The other options as text: cells that agree in it share what depends on these alone."""
        return repr([(name, self.options[name]) for name in self.options if name not in names])

    @property
    def level(self) -> float:
        """The noise scale, by which draws are ordered; those that look for a scale come first."""
        noise = self.options["noise"]
        return float(noise) if isinstance(noise, (int, float)) else -1.0


def expand(
    grid: Mapping[str, Iterable[Any]],
    options: ForgetOptions | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> tuple[Cell, ...]:
    """All cells of a grid, each once. An axis crosses the methods that have an option of that name.

    Where noise is an axis, the Newton step without noise is a cell, too, and a single one: it has
    no draws.

    Args:
        grid: Option -> values; "method" -> names.
        options: Of `forget`, in every cell of it.
        fixed: Option -> value, for every cell that has it.

    Raises:
        ConfigError: An unknown method or option, an axis without values, or a value that is out of
            range.
    """
    axes = {name: _values(name, values) for name, values in grid.items()}
    methods, fixed = axes.pop("method", [OURS]), fixed or {}
    if unknown := [name for name in methods if name not in METHODS]:
        got, expected = f"the methods {unknown}", f"some of {list(METHODS)}"
        raise ConfigError(got, expected, "Correct the names.")
    known = {name: _option_names(name) for name in METHODS}
    _check_names(axes, [known[name] for name in methods])
    # those of methods that are not in the grid, too: grids may share them
    _check_names(fixed, known.values())
    cells: dict[str, Cell] = {}
    for method in methods:
        crossed = {name: values for name, values in axes.items() if name in known[method]}
        base = {name: value for name, value in fixed.items() if name in known[method]}
        if method == OURS:
            base = vars((options or ForgetOptions()).changed(base))
            base = {name: base[name] for name in known[method]}
            if "noise" in crossed:
                crossed["noise"] = [0.0, *filter(None, crossed["noise"])]
        base = {"seed": 0} | base
        first_seed = crossed.get("seed", [base["seed"]])[0]
        for values in itertools.product(*crossed.values()):
            cell = _cell(method, base | dict(zip(crossed, values, strict=True)), first_seed)
            cells[cell.key] = cell
    return tuple(cells.values())


def _cell(method: str, options: dict[str, Any], first_seed: int) -> Cell:
    """A cell whose options are allowed; without noise there is nothing to draw, so that all seeds
    are the first one."""
    if method == OURS:
        ForgetOptions(**options)  # refuses what is out of range
        options["noise"] = options["noise"] or 0.0
        if not options["noise"]:
            options["seed"] = first_seed
    return Cell(method, options)


def grouped(cells: Iterable[Cell], by: Callable[[Cell], Any]) -> list[list[Cell]]:
    """Cells that agree, together; in the order in which each group is first met."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(by(cell), []).append(cell)
    return list(groups.values())


def _values(name: str, values: Iterable[Any]) -> Sequence[Any]:
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if not listed:
        got = f"the axis {name}={values!r}"
        raise ConfigError(got, "one value at least, in a list", f"Pass {name!r}: [...].")
    return [value.item() if isinstance(value, np.generic) else value for value in listed]


def _option_names(method: str) -> list[str]:
    return [name for name in settings_of(METHODS[method]) if name != SHARED]


def _check_names(names: Iterable[str], known: Collection[Collection[str]]) -> None:
    options = sorted({option for method in known for option in method})
    for name in names:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            fix = "Leave it out, or add the method that has it."
            fix = f"Did you mean {near[0]!r}?" if near else fix
            raise ConfigError(f"the option {name!r}", f"one of {options}", fix)
