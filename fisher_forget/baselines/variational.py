r"""Variational forgetting: learned noise, as wide in every filter as the retained loss allows.

    Sigma* = argmin E_{n ~ N(0, Sigma)} L_r(w + n) - lambda ln|Sigma|,    w <- w + n

Sigma is diagonal, with one log-variance a filter (a slice along the first dimension of a weight of
two dimensions or more), from 0.005 times the variance of its weights and never above e^-3. Where
the loss is quadratic with curvature B the variance of a filter of k weights becomes 2 lambda k /
tr(B of the filter). One-dimensional parameters get no noise. Golatkar et al. 2020
(arXiv:1911.04933), section on variational forgetting and public code.

The code draws noise at the outputs of layers (local reparameterisation), which needs to know every
kind of layer. Here weights are drawn in pairs w + n, w - n, whose first-order effects on the loss
cancel. For comparisons: the noise is drawn from a seed, so it is public; a release needs `forget`.
The code's learned prior on each layer, which keeps flat directions finite, is left out: the
limit e^-3 does that.

The seed is public: such noise is for comparisons and protects nothing. To release a model, use
`forget`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.isolation import seeded
from fisher_forget.baselines.base import DirectMethod, PricedWeights
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require, shuffled
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split
from fisher_forget.errors import ModelError, NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

START, LIMIT = 0.005, -3.0  # share of a filter's variance to start from; largest log-variance
SMALLEST = 1e-8  # added to a filter's variance, which may be 0


@dataclass(frozen=True)
class Variational(DirectMethod):
    """Variational forgetting.

    Attributes:
        trade_off: lambda, nats of loss per nat of ln|Sigma|.
        epochs: Passes over D_r.
        lr: Adam's, of the log-variances.
        batch_size: Samples per step.

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "variational"
    grid: ClassVar[Grid] = {"trade_off": Range(1e-8, 1e-4)}

    trade_off: float = 1e-6
    epochs: int = 10
    lr: float = 0.1
    batch_size: int = 128

    def __post_init__(self) -> None:
        require(self, at_least={"epochs": 0, "batch_size": 1}, above={"trade_off": 0, "lr": 0})

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        objective = Objective(model, likelihood)
        generator = seeded(self.seed)
        logs = self.log_variances(objective, split, generator)
        noisy = _noisy(objective.start, logs, generator)[0]
        # a step computes the gradients at w + n and at w - n
        return objective.start | noisy, 2 * self.epochs * len(split.retain)

    def log_variances(
        self, objective: Objective, split: Split, generator: torch.Generator
    ) -> Params:
        """ln of the variance of every filter [filters, 1, ...], for the weights that have filters.

        Args:
            objective: Losses.
            split: Its retained samples count.
            generator: Of the noise.

        Raises:
            ModelError: If no parameter has filters.
            NumericalError: If a loss is not finite.
        """
        logs = {
            name: _start(w).requires_grad_() for name, w in objective.start.items() if w.dim() > 1
        }
        if not logs:
            got = "a model without a weight of two dimensions or more"
            raise ModelError(got, "filters that noise can be added to", "Use forget().")
        optimizer, rng = torch.optim.Adam(logs.values(), self.lr), np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            for batch in shuffled(split, split.retain, self.batch_size, rng):
                for x, g in zip(
                    logs.values(), self._gradient(objective, batch, logs, generator), strict=True
                ):
                    x.grad = g
                optimizer.step()
                with torch.no_grad():
                    for x in logs.values():
                        x.clamp_(max=LIMIT)  # keeps flat directions finite
        return P.detached(logs)

    def _gradient(
        self, objective: Objective, batch: Batch, logs: Params, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """d/d log-variances of [L(w + n) + L(w - n)] / 2 - lambda ln|Sigma|."""
        with torch.enable_grad():
            pair = _noisy(objective.start, logs, generator)
            # ln|Sigma| counts a filter's log-variance once for each of its weights
            each = {n: objective.start[n].numel() / max(x.numel(), 1) for n, x in logs.items()}
            spread = torch.stack([x.sum() * each[name] for name, x in logs.items()]).sum()
        ends, pulls = [spread], [spread.new_tensor(-self.trade_off)]
        for noisy in pair:
            try:
                at = objective.gradient([batch], objective.start | P.detached(noisy)).mean()
            except NumericalError as error:
                expected = "finite losses under noise"
                raise NumericalError(error.got, expected, "Lower trade_off or lr.") from error
            ends += noisy.values()
            pulls += [at[name] / 2 for name in noisy]
        return torch.autograd.grad(ends, list(logs.values()), pulls)


def _start(w: Tensor) -> Tensor:
    """First guess: a share of the variance of each filter's weights."""
    filters = w.detach().flatten(1)
    # a filter of one weight has no variance: its square stands for it
    variance = filters.var(1) if filters.shape[1] > 1 else filters.square()[:, 0]
    return (START * variance + SMALLEST).log().clamp(max=LIMIT).view(-1, *[1] * (w.dim() - 1))


def _noisy(start: Params, logs: Params, generator: torch.Generator) -> tuple[Params, Params]:
    """(w + n, w - n) for the weights with filters, differentiable in the log-variances."""
    weights = {name: start[name] for name in logs}
    xi = P.randn_like(weights, generator)
    # n = exp(log sigma^2 / 2) xi, differentiable in the log-variance
    noise = {name: (x / 2).exp() * xi[name] for name, x in logs.items()}
    return P.add(weights, noise), P.add(weights, noise, -1)
