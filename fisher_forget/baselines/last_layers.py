r"""Work on the last k layers alone: fine-tune them (CF-k), or train them from scratch (EU-k), on
the retained samples.

    CF-k:  (w_1 ... w_L-k fixed)   w_j <- w_j - lr grad_j L_r(w)                         from the given weights
    EU-k:  the same                                                                      from fresh w_L-k+1 ... w_L

Goel et al. 2022 (arXiv:2201.06640): with k = L these are fine-tuning and retraining; a smaller k
costs less and keeps what the first layers know of D_f. The learning rate and epochs are those of
Kurmanji et al. 2023 (arXiv:2302.09880). A layer is a module that holds weights of two or more
dimensions, with the norms that follow it; the order is the one in which the model's `__init__`
names them. BatchNorm statistics are estimated on D_r in all layers, fixed or not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.retrain import Init, fresh
from fisher_forget.baselines.training_loop import (
    Descent,
    descend,
    each,
    mean_loss,
    require,
    shuffled,
)
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Likelihood, resolve_likelihood


@dataclass(frozen=True)
class CFk:
    """Fine-tuning of the last k layers.

    Attributes:
        k: Number of layers that move.
        epochs: Passes over D_r.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Name or instance.
        seed: Of the order of the samples.

    Raises:
        ConfigError: If k is below 1, or above the number of layers.
    """

    name: ClassVar[str] = "cf-k"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (0.001, 0.01, 0.05), "k": (1, 2, 3)}

    k: int = 1
    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("k", self.k, self.k >= 1, "a number of layers of at least 1")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        return self.trained(model, split, last_layers(model, self.k))

    def trained(self, start: nn.Module, split: Split, modules: Sequence[str]) -> Unlearned:
        """Train the own parameters of some modules on D_r."""
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)
        twin = copy.deepcopy(start)
        moving = {
            id(p) for name in modules for p in twin.get_submodule(name).parameters(recurse=False)
        }
        for p in twin.parameters():
            p.requires_grad_(p.requires_grad and id(p) in moving)
        found = descend(
            twin,
            Descent(self.epochs, self.lr, self.momentum, self.weight_decay),
            lambda _, rng: each(
                shuffled(split, split.retain, self.batch_size, rng),
                lambda m, b: mean_loss(m, likelihood, b),
            ),
            seed=self.seed,
        )
        for p, given in zip(found.parameters(), start.parameters(), strict=True):
            p.requires_grad_(given.requires_grad)
        return Unlearned(found, time.perf_counter() - begun, float(self.epochs))


@dataclass(frozen=True)
class EUk:
    """Training of the last k layers from scratch.

    Attributes:
        k: Number of layers that are drawn anew and move.
        epochs: Passes over D_r.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        init: Makes an untrained model of the same kind; by default the modules' own
            `reset_parameters`.
        likelihood: Name or instance.
        seed: Of the fresh weights and the order of the samples.

    Raises:
        ConfigError: If k is below 1, or above the number of layers.
    """

    name: ClassVar[str] = "eu-k"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (0.001, 0.01, 0.05), "k": (1, 2, 3)}

    k: int = 1
    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    init: Init | None = None
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("k", self.k, self.k >= 1, "a number of layers of at least 1")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched.

        Raises:
            ModelError: If one of the layers cannot be reset.
        """
        modules = last_layers(model, self.k)
        tuned = CFk(
            self.k,
            self.epochs,
            self.lr,
            self.batch_size,
            self.momentum,
            self.weight_decay,
            self.likelihood,
            self.seed,
        )
        return tuned.trained(fresh(model, self.seed, self.init, modules), split, modules)


def last_layers(model: nn.Module, k: int) -> tuple[str, ...]:
    """Names of the modules of the last k layers, in order; see the head of this file for what a
    layer is.

    Raises:
        ConfigError: If there are fewer layers with trainable parameters.
    """
    layers: list[list[str]] = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and (not layers or any(p.dim() >= 2 for p in own)):
            layers.append([])
        if own:
            layers[-1].append(name)
    if k > len(layers):
        raise ConfigError(
            f"k={k}", f"at most the model's {len(layers)} layers that can move", "Lower k."
        )
    return tuple(name for layer in layers[-k:] for name in layer)
