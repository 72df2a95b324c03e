r"""Selective Synaptic Dampening: shrink the weights that D_f needs far more than all samples do.

    w_i <- w_i min(lambda I_D,i / I_f,i, 1)    where I_f,i > alpha I_D,i

I_f and I_D are the diagonals of the empirical Fisher of D_f and of all of D, (1/N) sum_n (dl_n /
dw_i)^2. Nothing is trained. Foster, Schoepf and Brintrup 2024 (arXiv:2308.07707).

Their public code squares the gradient of a *batch's* mean loss. Where gradients cancel within a
batch, which at a minimum is what they do over D, that is no estimate of the formula above: its size
depends on the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.baselines.base import DirectMethod, PricedWeights
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require, shuffled
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.data.split import Indices, Split
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective


@dataclass(frozen=True)
class Ssd(DirectMethod):
    """Selective Synaptic Dampening.

    Attributes:
        alpha: How many times more important for D_f than for D a weight must be.
        lam: lambda, how strongly such a weight is dampened.
        importance: "sample" squares the gradient of every sample; "batch" that of every batch, as
            the public code does.
        batch_size: Of importance="batch".

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "ssd"
    grid: ClassVar[Grid] = {"alpha": Range(1.0, 100.0), "lam": Range(0.1, 10.0)}

    alpha: float = 10.0
    lam: float = 1.0
    importance: Literal["sample", "batch"] = "sample"
    batch_size: int = 128

    def __post_init__(self) -> None:
        importance = (self.importance in ("sample", "batch"), "'sample' or 'batch'")
        least = {"alpha": 0, "lam": 0, "batch_size": 1}
        require(self, at_least=least, importance=importance)

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        measure = sample_importance if self.importance == "sample" else self._batch_importance
        start = P.detached(P.trainable(model))
        everyone = measure(model, split, likelihood, split.indices("all"))
        forgotten = P.zeros_like(start)
        if len(split.forget):
            forgotten = measure(model, split, likelihood, split.forget)
        # D once, D_f once more
        gradients = len(split.retain) + 2 * len(split.forget)
        return P.map_params(self._dampened, start, everyone, forgotten), gradients

    def _dampened(self, w: Tensor, everyone: Tensor, forgotten: Tensor) -> Tensor:
        # min(lambda I_D / I_f, 1): a weight never grows
        shrunk = w * (self.lam * everyone / forgotten).clamp(max=1)
        return torch.where(forgotten > self.alpha * everyone, shrunk, w)

    def _batch_importance(
        self, model: nn.Module, split: Split, likelihood: Likelihood, samples: Indices
    ) -> Params:
        """Mean over random batches of the squared gradient of the batch's mean loss."""
        objective = Objective(model, likelihood)
        total, batches = P.zeros_like(objective.start), 0
        for batch in shuffled(split, samples, self.batch_size, np.random.default_rng(self.seed)):
            gradient = objective.gradient([batch], objective.start).mean()
            total, batches = P.add(total, P.map_params(torch.square, gradient)), batches + 1
        return P.scale(total, 1 / batches)


def sample_importance(
    model: nn.Module, split: Split, likelihood: Likelihood, samples: Indices
) -> Params:
    """Diagonal of the empirical Fisher: squared sample gradients, summed, per scored position."""
    fisher = estimate_curvature(
        model, split, likelihood, structure="diagonal", kind="empirical", part=samples
    )
    return fisher.diagonal()
