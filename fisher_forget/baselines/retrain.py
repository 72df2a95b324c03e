r"""Retraining without the forgotten samples: what every other method is to come close to, and the
cost it is to save.

    w = train(fresh weights, D_r)

`fresh` draws the weights that `Retrain`, EU-k and the incompetent teacher start from.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from fisher_forget import params as P
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.training_loop import Descent, descend, each, mean_loss, shuffled
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, ModelError
from fisher_forget.likelihood import Likelihood, resolve_likelihood

Train = Callable[
    [nn.Module, Dataset[Any], Indices, int], nn.Module
]  # (fresh model, data, D_r, seed) -> trained
Init = Callable[[], nn.Module]  # an untrained model; torch's global seed is set before


@dataclass(frozen=True)
class Retrain:
    """Training from scratch on D_r.

    Attributes:
        train: How the model was trained: (fresh model, training data set, indices of D_r, seed) ->
            trained model. By default SGD at a constant rate, as the next fields say.
        init: Makes an untrained model of the same kind; by default the modules' own
            `reset_parameters`.
        epochs: Passes over D_r.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Name or instance.
        seed: Of the fresh weights and of the training.
    """

    name: ClassVar[str] = "retrain"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {}

    train: Train | None = None
    init: Init | None = None
    epochs: int = 40
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched. `passes` is NaN where `train` is
        given: it is not known.

        Raises:
            ModelError: If the model has layers that cannot be reset.
            ConfigError: If `train` or `init` does not return such a model.
        """
        begun = time.perf_counter()
        start = fresh(model, self.seed, self.init)
        if self.train is None:
            likelihood = resolve_likelihood(self.likelihood)
            found = descend(
                start,
                Descent(self.epochs, self.lr, self.momentum, self.weight_decay),
                lambda _, rng: each(
                    shuffled(split, split.retain, self.batch_size, rng),
                    lambda m, b: mean_loss(m, likelihood, b),
                ),
                seed=self.seed,
            )
            return Unlearned(found, time.perf_counter() - begun, float(self.epochs))
        with preserved_rng():
            found = self.train(start, split.base, split.retain.copy(), self.seed)
        if not isinstance(found, nn.Module):
            raise ConfigError(
                f"train to return {type(found).__name__}",
                "the trained model",
                "Return the model at the end of train.",
            )
        return Unlearned(found.eval(), time.perf_counter() - begun, math.nan)


def fresh(
    model: nn.Module, seed: int, init: Init | None = None, only: Collection[str] | None = None
) -> nn.Module:
    """A copy of the model whose trainable parameters, and statistics, are those of an untrained
    model.

    Parameters without `requires_grad` (a frozen backbone) keep their values.

    Args:
        model: Untouched.
        seed: Of the draw.
        init: Makes an untrained model; `None` calls the modules' own `reset_parameters`.
        only: Names of the modules whose own parameters and buffers are drawn anew; `None` means all
            of them.

    Raises:
        ModelError: If a module with trainable parameters of its own has no `reset_parameters`.
        ConfigError: If `init` returns something else than such a model.
    """
    twin = copy.deepcopy(model)
    frozen = P.detached({name: p for name, p in twin.named_parameters() if not p.requires_grad})
    modules = {name: m for name, m in twin.named_modules() if only is None or name in only}
    with preserved_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if init is None:
            for name, module in modules.items():
                _reset(name, module)
        else:
            _copy_from(init(), modules)
        own = dict(twin.named_parameters())
        for name, value in frozen.items():
            own[name].copy_(value)
    return twin


def _reset(name: str, module: nn.Module) -> None:
    own = list(module.parameters(recurse=False))
    if own and not any(p.requires_grad for p in own):
        return
    reset = getattr(module, "reset_parameters", None) or (
        own and getattr(module, "_reset_parameters", None)
    )
    if callable(reset):
        reset()
    elif own:
        raise ModelError(
            f"the module {name or 'at the top'} of type {type(module).__name__} with parameters of its own and no "
            "reset_parameters",
            "modules that can draw their parameters anew",
            "Pass init=, a function without arguments that returns an untrained model.",
        )


def _copy_from(made: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Parameters and buffers of the modules, from the modules of the same names."""
    given = dict(made.named_modules()) if isinstance(made, nn.Module) else {}
    for name, module in modules.items():
        frozen = bool(own := list(module.parameters(recurse=False))) and not any(
            p.requires_grad for p in own
        )
        for kind in () if frozen else ("_parameters", "_buffers"):
            for key, value in getattr(module, kind).items():
                new = getattr(given.get(name), kind, {}).get(key)
                if value is None:
                    continue
                if new is None or new.shape != value.shape:
                    raise ConfigError(
                        f"init to return {type(made).__name__} without {'.'.join(filter(None, (name, key)))} of shape "
                        f"{tuple(value.shape)}",
                        "a model with the same modules as the given one",
                        "Build the model in init as it was built before training.",
                    )
                value.copy_(new)
