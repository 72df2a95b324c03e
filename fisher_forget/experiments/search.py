"""Which settings of a method a comparison tries: its defaults, then others of its grid.

Every method may try equally many. Lists of values are gone through in an order that is drawn once
for all by the method's name. Where there is a range, a tree-structured Parzen estimator proposes
(Bergstra et al. 2011, by Optuna): half of the trials at random, the others where those before
were good. It draws by the method's name, so that a search that is repeated is the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import zlib
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fisher_forget.baselines.protocol import Grid, Range, Unlearner
from fisher_forget.errors import ConfigError
from fisher_forget.experiments.outcomes import Trial

if TYPE_CHECKING:
    import optuna

ASKS = 5  # proposals for every trial, before a space of whole numbers counts as exhausted
Settings = dict[str, Any]
Attempt = Callable[[Settings], Trial]


def search(
    method: type[Unlearner], trials: int, attempt: Attempt, fixed: Collection[str] = ()
) -> list[Trial]:
    """Try the defaults, then other settings; as many as `trials`, or all that there are.

    Args:
        method: What has the grid.
        trials: How many; those that fail count.
        attempt: Makes a trial of settings other than the defaults.
        fixed: Fields that are left alone.
    """
    grid = to_choose(method, fixed)
    made = [attempt({})]
    defaults = {name: getattr(method(), name) for name in grid}
    seed = zlib.crc32(method.name.encode())
    if trials > 1 and needs_optuna([grid]):
        _ranges(grid, defaults, made, trials, attempt, seed)
    elif trials > 1:
        made += map(attempt, _lists(grid, defaults, seed)[: trials - 1])
    return made


def to_choose(method: type[Unlearner], fixed: Collection[str]) -> Grid:
    """The method's grid without the fields that are fixed."""
    return {name: values for name, values in method.grid.items() if name not in fixed}


def needs_optuna(grids: Iterable[Grid]) -> bool:
    """Whether one of the grids has a range.

    Raises:
        ConfigError: If one has, and Optuna is not installed.
    """
    needed = any(isinstance(values, Range) for grid in grids for values in grid.values())
    if needed and importlib.util.find_spec("optuna") is None:
        expected = "Optuna, which searches the ranges of the methods' settings"
        fix = "pip install 'fisher-forget[compare]', or set trials: 1."
        raise ConfigError("no module optuna", expected, fix)
    return needed


def _lists(grid: Grid, defaults: Settings, seed: int) -> list[Settings]:
    """All settings but the defaults, in a random order."""
    values = itertools.product(*(v for v in grid.values() if not isinstance(v, Range)))
    others = [one for v in values if (one := dict(zip(grid, v, strict=True))) != defaults]
    return [others[i] for i in np.random.default_rng(seed).permutation(len(others))]


def _ranges(
    grid: Grid, defaults: Settings, made: list[Trial], trials: int, attempt: Attempt, seed: int
) -> None:
    """Add trials of what the estimator proposes to that of the defaults."""
    study, space = _study(trials, seed), {name: _space(values) for name, values in grid.items()}
    tried = {repr(defaults): made[0]}
    if all(defaults[name] in values for name, values in grid.items()):
        _teach(study, space, {n: _coded(grid[n], v) for n, v in defaults.items()}, made[0])
    for _ in range(ASKS * trials):
        if len(made) == trials:
            return
        asked = study.ask(space)
        settings = {name: _decoded(values, asked.params[name]) for name, values in grid.items()}
        if (key := repr(settings)) not in tried:
            tried[key] = attempt(settings)
            made.append(tried[key])
        study.tell(asked, tried[key].objective)


def _study(trials: int, seed: int) -> optuna.Study:
    import optuna

    sampler = optuna.samplers.TPESampler(n_startup_trials=max(2, trials // 2), seed=seed)
    spoken = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce every study
    try:
        return optuna.create_study(sampler=sampler)
    finally:
        optuna.logging.set_verbosity(spoken)


def _teach(
    study: optuna.Study,
    space: dict[str, optuna.distributions.BaseDistribution],
    params: Settings,
    trial: Trial,
) -> None:
    """Tell the estimator of a trial that it has not proposed."""
    import optuna

    value = trial.objective
    study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))


def _space(values: tuple[Any, ...] | Range) -> optuna.distributions.BaseDistribution:
    import optuna

    kinds = optuna.distributions
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(range(len(values)))  # of any type
    if values.whole:
        return kinds.IntDistribution(int(values.low), int(values.high), log=values.log)
    return kinds.FloatDistribution(values.low, values.high, log=values.log)


def _coded(values: tuple[Any, ...] | Range, value: Any) -> Any:
    return value if isinstance(values, Range) else values.index(value)


def _decoded(values: tuple[Any, ...] | Range, code: Any) -> Any:
    return code if isinstance(values, Range) else values[code]
