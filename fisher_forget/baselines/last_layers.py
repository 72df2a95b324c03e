r"""Fine-tune the last k layers alone (CF-k), or train them from scratch (EU-k), on D_r.

    w_j <- w_j - lr grad_j L_r(w)    for j > L - k; the first L - k layers are fixed

    CF-k:  from the given weights
    EU-k:  from fresh weights of the last k layers

Goel et al. 2022 (arXiv:2201.06640): with k = L these are fine-tuning and retraining; a smaller k
costs less and keeps what the first layers know of D_f. Learning rates and epochs, 10 and from
scratch 30, are those of Kurmanji et al. 2023 (arXiv:2302.09880), without momentum. A layer is a
module that holds weights of two or more dimensions, with the norms that follow it; the order is the
one in which the model's `__init__` names them. BatchNorm statistics are estimated on D_r in all
layers, fixed or not, but for those that this data never set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fisher_forget._util.copies import copy_model
from fisher_forget.baselines.base import Training
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.retrain import Init, fresh
from fisher_forget.baselines.training_loop import Descent, require
from fisher_forget.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CFk(FineTune):
    """Fine-tuning of the last k layers.

    Attributes:
        k: Number of layers that move.

    Raises:
        ConfigError: If k is below 1, or, in `unlearn`, above the number of layers.
    """

    name = "cf-k"
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.5), "k": (1, 2, 3)}

    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, at_least={"k": 1})

    def start(self, training: Training) -> nn.Module:
        return self.fixed(copy_model(training.model))

    def fixed(self, twin: nn.Module) -> nn.Module:
        """The same model, whose last layers alone may move."""
        last = [twin.get_submodule(name) for name in last_layers(twin, self.k)]
        moving = {id(p) for module in last for p in module.parameters(recurse=False)}
        for p in twin.parameters():
            p.requires_grad_(p.requires_grad and id(p) in moving)
        return twin


@dataclass(frozen=True, kw_only=True)
class EUk(CFk):
    """Training of the last k layers from scratch.

    Attributes:
        milestones: Epochs, counted from 0, from which on the learning rate is divided by ten.
        init: Makes an untrained model of the same kind; by default `reset_parameters` does.

    Raises:
        ModelError: In `unlearn`, if one of the layers cannot be reset.
    """

    name = "eu-k"

    epochs: int = 30
    milestones: tuple[int, ...] = (11, 16, 21)
    init: Init | None = None

    def descent(self) -> Descent:
        return replace(super().descent(), milestones=self.milestones)

    def start(self, training: Training) -> nn.Module:
        model = training.model
        return self.fixed(fresh(model, self.seed, self.init, last_layers(model, self.k)))


def last_layers(model: nn.Module, k: int) -> tuple[str, ...]:
    """Names of the modules of the last k layers, in order; the head of this file defines a layer.

    Raises:
        ConfigError: If there are fewer layers with trainable parameters.
    """
    layers: list[list[str]] = []
    for name, module in model.named_modules():
        trainable = [p for p in module.parameters(recurse=False) if p.requires_grad]
        # a matrix starts a layer; vectors (biases, norms) belong to the one before them
        if trainable and (not layers or any(p.dim() >= 2 for p in trainable)):
            layers.append([])
        if trainable:
            layers[-1].append(name)
    if k > len(layers):
        raise ConfigError(
            f"k={k}", f"at most the model's {len(layers)} layers that can move", "Lower k."
        )
    return tuple(name for layer in layers[-k:] for name in layer)
