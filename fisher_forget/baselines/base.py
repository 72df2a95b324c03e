"""Bases of the methods: `TrainingMethod` for those that train, `DirectMethod` for the others."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget._util.isolation import isolated
from fisher_forget.baselines.protocol import Grid, Unlearned
from fisher_forget.baselines.training_loop import (
    Descent,
    Epoch,
    Loss,
    descend,
    each,
    require,
    shuffled,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Indices, Split, check_scored
from fisher_forget.errors import NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.batch_norm import foreign_statistics, still_given

PricedWeights = tuple[Params, float]  # the new weights, and the sample gradients that they cost


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method: a frozen dataclass of settings that says in `scrub` what it does.

    Attributes:
        seed: Of everything random.
    """

    name: ClassVar[str]
    grid: ClassVar[Grid] = {}

    seed: int = 0

    @abstractmethod
    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        """A scrubbed copy of the model, and the sample gradients that it cost."""

    def prepare(self, model: nn.Module, split: Split) -> tuple[Self, nn.Module]:
        """What is done once, before any request, and is not counted: the method with what it has
        prepared, and the model that it forgets from.

        It depends on no setting in the grid, so that it is done once for all settings tried.
        """
        return self, model

    def template(self, model: nn.Module) -> nn.Module:
        """A model of the architecture that `unlearn` returns for this one, with any weights."""
        return model

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        with isolated():
            ready, start = self.prepare(model, split)
            begun = time.perf_counter()
            scrubbed, gradients = ready.scrub(start, split)
        seconds = time.perf_counter() - begun
        return Unlearned(scrubbed.eval(), seconds, gradients / len(split.retain))


@dataclass(frozen=True, kw_only=True)
class DirectMethod(Method):
    """A method that computes the new weights.

    Attributes:
        likelihood: Name or instance.
    """

    likelihood: Likelihood | str = "categorical"

    @abstractmethod
    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        """The trainable parameters' new values, and the sample gradients that they cost."""

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        check_model(model)
        likelihood = trained_likelihood(model, split, self.likelihood)
        check_scored(split, likelihood)
        weights, gradients = self.weights(model, split, likelihood)
        if not P.finite(weights):
            fix = "Raise the method's damping or weight_decay, or lower the length of its step."
            raise NumericalError("weights that are not finite", "finite weights", fix)
        return P.load(model, weights), gradients


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(Method):
    """A method that trains a copy of the model by Adam; `losses` says on what.

    Attributes:
        epochs: Calls of the epoch function that `losses` returns.
        lr: Learning rate.
        batch_size: Samples per step.
        likelihood: Name or instance.

    Raises:
        ConfigError: If a value is out of range.
        NumericalError: In `unlearn`, if the training diverges.
    """

    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 128
    likelihood: Likelihood | str = "categorical"

    def __post_init__(self) -> None:
        require(self, at_least={"epochs": 0, "batch_size": 1}, above={"lr": 0})

    @abstractmethod
    def losses(self, training: Training) -> Epoch:
        """A function of an epoch's number and a generator, which yields the loss of every step."""

    def descent(self) -> Descent:
        """How to descend."""
        return Descent(self.epochs, self.lr, optimizer="adam")

    def start(self, training: Training) -> nn.Module:
        """Where the training starts: the given model, by default."""
        return training.model

    def mask(self, training: Training) -> Params | None:
        """0 for weights that stay where they are, 1 for others; by default all move."""
        return None

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        likelihood = trained_likelihood(model, split, self.likelihood)
        training = Training(model, split, likelihood, self.batch_size)
        mask, losses = self.mask(training), self.losses(training)
        start = self.start(training)
        kept = still_given(training.foreign, start, model)
        trained = descend(start, self.descent(), losses, seed=self.seed, mask=mask, kept=kept)
        for p, given in zip(trained.parameters(), model.parameters(), strict=True):
            p.requires_grad_(given.requires_grad)  # `start` may have frozen more
        return trained, training.gradients


@dataclass(frozen=True, kw_only=True)
class SgdMethod(TrainingMethod):
    """A method that trains a copy of the model by SGD.

    Attributes:
        momentum: Of SGD.
        weight_decay: L2 coefficient.
    """

    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        momentum = (0 <= self.momentum < 1, "a value in [0, 1)")
        require(self, at_least={"weight_decay": 0}, momentum=momentum)

    def descent(self) -> Descent:
        return Descent(self.epochs, self.lr, self.momentum, self.weight_decay)


def first_outputs(model: nn.Module, split: Split, likelihood: Likelihood) -> Tensor:
    """Outputs [1, ...] of the first retained sample, whose target is checked, without a graph."""
    batch = split.first(split.retain[:1]).on(model)
    with torch.no_grad():
        outputs = P.first_call(model, batch.args, batch.kwargs)
    likelihood.check(outputs, batch.targets)
    return outputs


class Training:
    """What the losses of a training are made of; it counts the work.

    Args:
        model: The given one, untouched.
        split: Who is retained and forgotten.
        likelihood: Gives losses and KL.
        batch_size: Samples per step.

    Attributes:
        gradients: Sample gradients so far; a forward pass without graph counts a third.
    """

    def __init__(
        self, model: nn.Module, split: Split, likelihood: Likelihood, batch_size: int
    ) -> None:
        check_scored(split, likelihood)
        self.model, self.split, self.likelihood = model, split, likelihood
        self.batch_size = batch_size
        self._thirds = 0  # whole numbers: a sum of thirds would be rounded

    @cached_property
    def foreign(self) -> tuple[str, ...]:
        """Norm layers of the given model whose running statistics this data did not set."""
        return foreign_statistics(self.model, self.split)

    @property
    def gradients(self) -> float:
        return self._thirds / 3

    def count(self, samples: int, *, forward_only: bool = False) -> None:
        """Add the work of so many samples."""
        self._thirds += samples * (1 if forward_only else 3)

    def batches(self, samples: Indices, rng: np.random.Generator) -> Iterator[Batch]:
        """The samples once, in random order."""
        return shuffled(self.split, samples, self.batch_size, rng)

    def over(self, samples: Indices, loss: Callable[[nn.Module, Batch], Tensor]) -> Epoch:
        """An epoch that goes through the samples once, in random order, one step a batch."""

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            return each(self.batches(samples, rng), loss)

        return epoch

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs [B, ...] of the model or a teacher, checked to fit the targets.

        BatchNorm cannot normalise a sample by itself: for a batch of one, it uses its running
        statistics.
        """
        self.count(len(batch), forward_only=not torch.is_grad_enabled())
        alone = len(batch) == 1
        norms = [m for m in model.modules() if alone and m.training and isinstance(m, _BatchNorm)]
        for norm in norms:
            norm.eval()
        outputs = P.first_call(model, batch.args, batch.kwargs)
        for norm in norms:
            norm.train()  # the model is the trained one: its mode outlives the batch
        self.likelihood.check(outputs.detach(), batch.targets)
        return outputs

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss per scored position of a batch, nats, with its graph."""
        return self.likelihood.mean_loss(self.outputs(model, batch), batch.targets)
