"""Setting up methods for a comparison, as the experiment trains: by name, with what it knows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fisher_forget._util.copies import copy_model
from fisher_forget.baselines import METHODS
from fisher_forget.baselines.base import Method
from fisher_forget.baselines.protocol import Unlearned, Unlearner, settings_of
from fisher_forget.data.split import Indices
from fisher_forget.errors import ConfigError
from fisher_forget.experiments.cases import Case, trained, untrained
from fisher_forget.experiments.config import CompareConfig
from fisher_forget.experiments.import_path import find, is_own, plugins
from fisher_forget.experiments.search import needs_optuna, to_choose
from fisher_forget.unlearn.options import ForgetOptions

FRESH = 50_000  # added to seeds of fresh weights: none is an original's or a retrained model's


def chosen_methods(config: CompareConfig) -> dict[str, type[Unlearner]]:
    """Name -> class of the methods to compare.

    Raises:
        ConfigError: An unknown method; options that a method does not have or take; ranges to
            search without Optuna.
    """
    classes = [_method(name) for name in config.methods or METHODS]
    methods = {method.name: method for method in classes}
    _check_options(config.options, METHODS | methods)
    if config.trials > 1:
        options = config.options
        needs_optuna(to_choose(m, options.get(name, {})) for name, m in methods.items())
    return methods


def _method(name: str) -> type[Unlearner]:
    if name not in METHODS and not is_own(name, "a method"):
        known = sorted({*METHODS, *plugins("a method")})
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else "Correct the name."
        expected = f"one of {known}, or package.module:Class"
        raise ConfigError(f"the method {name!r}", expected, fix)
    method: type[Unlearner] = METHODS[name] if name in METHODS else find(name, "a method")
    return method


def _check_options(
    options: Mapping[str, Mapping[str, Any]], methods: Mapping[str, type[Unlearner]]
) -> None:
    fix = "Correct `options`."
    for name, values in options.items():
        if name not in methods:
            raise ConfigError(f"options of {name!r}", f"one of {sorted(methods)}", fix)
        known = list(settings_of(methods[name]))
        if unknown := sorted(values.keys() - set(known)):
            raise ConfigError(f"the options {unknown} of {name!r}", f"some of {known}", fix)
        try:
            methods[name](**values)
        except TypeError as error:
            expected = "values of the documented types"
            raise ConfigError(f"options of {name!r}: {error}", expected, fix) from error


def configured(
    config: CompareConfig,
    case: Case,
    method: type[Unlearner],
    settings: Mapping[str, Any],
    seed: int,
) -> Unlearner:
    """A method as the experiment would set it up.

    A field of one of these names gets what the experiment knows, unless it is in the method's grid:
    `likelihood`, `weight_decay` and `seed`; `train` and `init`, which train and build as the
    experiment does; `initial`, the original before its training; `training`, how it is trained, or
    for how long.
    """

    def fresh() -> nn.Module:
        return untrained(config, case.data, FRESH + torch.initial_seed() % FRESH)

    def fitted(model: nn.Module, _data: Dataset[Any], rows: Indices, seed: int) -> nn.Module:
        return trained(config, case.data, model, rows, seed)

    # forget() reads both off the model, as in a call without options
    reads = issubclass(method, ForgetOptions)
    known: dict[str, Callable[[], Any]] = {
        "likelihood": lambda: config.likelihood,
        "weight_decay": lambda: "auto" if reads else config.training.weight_decay,
        "seed": lambda: seed,
        "train": lambda: fitted,
        "init": lambda: fresh,
        "initial": lambda: untrained(config, case.data, seed),
        "training": lambda: None if reads else config.training,
    }
    names = [name for name in settings_of(method) if name in known and name not in method.grid]
    given = {name: known[name]() for name in names}
    return method(**given | config.options.get(method.name, {}) | dict(settings))


class Scrubber:
    """A method and the originals of a case: what it does once for all settings is kept.

    Args:
        config: Of the comparison.
        case: Whose originals are scrubbed.
        method: The method.
    """

    def __init__(self, config: CompareConfig, case: Case, method: type[Unlearner]) -> None:
        self.config, self.case, self.method = config, case, method
        self._prepared: dict[int, tuple[Method, nn.Module]] = {}

    def __call__(self, settings: Mapping[str, Any], index: int) -> Unlearned:
        """What the method with these settings makes of one original."""
        case, seed = self.case, self.config.seeds[index]
        unlearner = configured(self.config, case, self.method, settings, seed)
        start = copy_model(case.originals.models[index])  # a method of the user's may forget to
        if isinstance(unlearner, Method):
            if index not in self._prepared:
                self._prepared[index] = unlearner.prepare(start, case.split)
            ready, start = self._prepared[index]
            tried = {name: getattr(unlearner, name) for name in unlearner.grid}
            unlearner, start = replace(ready, **tried), copy_model(start)
        return unlearner.unlearn(start, case.split)
