r"""Retraining without the forgotten samples: the goal of every other method, and the cost to save.

    w = train(fresh weights, D_r)

`fresh` draws the weights that `Retrain`, EU-k and the incompetent teacher start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from fisher_forget import params as P
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import seeded_rng
from fisher_forget.baselines.base import Training
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.protocol import Grid
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, ModelError
from fisher_forget.likelihood import resolve_likelihood
from fisher_forget.unlearn.batch_norm import norm_layers, pinned, still_given

# (fresh model, data set, indices of the samples to train on, seed) -> trained model
Train = Callable[[nn.Module, Dataset[Any], Indices, int], nn.Module]
Init = Callable[[], nn.Module]  # an untrained model; torch's global seed is set before


@dataclass(frozen=True, kw_only=True)
class Retrain(FineTune):
    """Training from scratch on D_r.

    Attributes:
        train: How the model was trained: (fresh model, training data set, indices of D_r, seed) ->
            trained model. By default SGD at a constant rate, as the other fields say; with it, the
            `passes` of the result are NaN, since they are not known.
        init: Makes an untrained model of the same kind; by default `reset_parameters` does.

    Raises:
        ModelError: In `unlearn`, if the model has layers that cannot be reset.
        ConfigError: In `unlearn`, if `train` or `init` does not return such a model.
    """

    name = "retrain"
    grid: ClassVar[Grid] = {}

    train: Train | None = None
    init: Init | None = None
    epochs: int = 40
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def start(self, training: Training) -> nn.Module:
        return fresh(training.model, self.seed, self.init, foreign=training.foreign)

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        if self.train is None:
            return super().scrub(model, split)
        training = Training(model, split, resolve_likelihood(self.likelihood), self.batch_size)
        start = self.start(training)
        with pinned(start, still_given(training.foreign, start, model)):
            retrained = self.train(start, split.base, split.retain.copy(), self.seed)
        if not isinstance(retrained, nn.Module):
            got = f"train to return {type(retrained).__name__}"
            raise ConfigError(got, "the trained model", "Return the model at the end of train.")
        for layer in norm_layers(retrained).values():
            vars(layer).pop("train", None)  # of a copy, see `pinned`
        return retrained, math.nan


def fresh(
    model: nn.Module,
    seed: int,
    init: Init | None = None,
    only: Collection[str] | None = None,
    foreign: Collection[str] | None = None,
) -> nn.Module:
    """A copy of the model with the trainable parameters, and statistics, of an untrained one.

    Parameters without `requires_grad` (a frozen backbone) keep their values, and so do the running
    statistics of layers without others, unless it is known that this data set them.

    Args:
        model: Untouched.
        seed: Of the draw.
        init: Makes an untrained model; `None` calls the modules' own `reset_parameters`.
        only: Names of the modules whose own parameters and buffers are drawn anew; `None`: all.
        foreign: Names of the norm layers whose statistics this data did not set; `None`: unknown.

    Raises:
        ModelError: If a module with trainable parameters of its own has no `reset_parameters`.
        ConfigError: If `init` returns something else than such a model.
    """
    twin = copy_model(model)
    frozen = P.detached({name: p for name, p in twin.named_parameters() if not p.requires_grad})
    modules = {
        name: module
        for name, module in twin.named_modules()
        if (only is None or name in only) and not _stays(module, name in (foreign or ()))
    }
    with seeded_rng(seed), torch.no_grad():
        if init is None:
            # in the order in which `__init__` names them, which is mostly that of their first draw
            for name, module in modules.items():
                _reset(name, module)
        else:
            _copy_from(init(), modules)
        # a module may mix frozen and trainable parameters, and is drawn anew as a whole
        parameters = dict(twin.named_parameters())
        for name, value in frozen.items():
            parameters[name].copy_(value)
    if foreign is not None:
        for name, layer in norm_layers(twin).items():
            if name not in modules and name not in foreign:
                layer.reset_running_stats()
    return twin


def _reset(name: str, module: nn.Module) -> None:
    parameters = list(module.parameters(recurse=False))
    reset = getattr(module, "reset_parameters", None)
    if reset is None and parameters:
        reset = getattr(module, "_reset_parameters", None)  # torch's attention layers
    if callable(reset):
        reset()
    elif parameters:
        what = f"the module {name or 'at the top'} of type {type(module).__name__}"
        got = f"{what} with parameters of its own and no reset_parameters"
        fix = "Pass init=, a function without arguments that returns an untrained model."
        raise ModelError(got, "modules that can draw their parameters anew", fix)


def _stays(module: nn.Module, foreign: bool) -> bool:
    """Whether the module has parameters of its own, none of which may move, or has none and holds
    foreign statistics."""
    parameters = list(module.parameters(recurse=False))
    return not any(p.requires_grad for p in parameters) if parameters else foreign


def _copy_from(untrained: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Parameters and buffers of the modules, from the modules of the same names."""
    sources = dict(untrained.named_modules()) if isinstance(untrained, nn.Module) else {}
    for name, module in modules.items():
        for kind in ("_parameters", "_buffers"):
            for key, value in getattr(module, kind).items():
                if value is None:
                    continue
                new = getattr(sources.get(name), kind, {}).get(key)
                if new is None or new.shape != value.shape:
                    missing = f"{'.'.join(filter(None, (name, key)))} of shape {tuple(value.shape)}"
                    got = f"init to return {type(untrained).__name__} without {missing}"
                    fix = "Build the model in init as it was built before training."
                    raise ConfigError(got, "a model with the same modules as the given one", fix)
                value.copy_(new)
