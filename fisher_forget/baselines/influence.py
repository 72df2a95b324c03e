r"""Influence unlearning: take the first-order influence of the forgotten samples off the weights.

    w <- w + alpha H^-1 v    v = grad L_D - grad L_r = (m/n) (g_f - g_r)

with g_f, g_r the mean gradients of D_f and D_r, and H the curvature of the retained loss. At a
minimum of L_D this is the Newton step towards one of L_r (Koh and Liang 2017, arXiv:1703.04730).
Two ways to H^-1 v:

- `WoodFisher`: the damped empirical Fisher of N retained samples, F = lambda I + (1/N) sum_n g_n
  g_n^T. Adding one sample after the other (Singh and Alistarh 2020, arXiv:2004.14340; for
  unlearning Izzo et al. 2021, arXiv:2002.10077, and Jia et al. 2023, arXiv:2304.04934),

      F_{k+1}^-1 x = F_k^-1 x - F_k^-1 g (g^T F_k^-1 x) / (N + g^T F_k^-1 g)

  leads to the same as all of them at once, F^-1 v = (v - G^T (N lambda I + G G^T)^-1 G v) / lambda
  with rows G [N, d]. The public code keeps only one vector o in place of every F_k^-1 g, so that
  its result lies in the span of v and the first sample's gradient.
- `Lissa`: the Neumann series h <- v + h - (H_batch + gamma I) h / s on random batches, whose fixed
  point is s (H + gamma I)^-1 v (Agarwal et al. 2017, arXiv:1602.03943; settings of Zhang et al.
  2024, arXiv:2408.00920).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.baselines.base import DirectMethod, PricedWeights
from fisher_forget.baselines.jacobian_rows import MEMORY, Rows
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require
from fisher_forget.curvature.double_backward import (
    hidden_from_hessian,
    hidden_from_products,
    refuse_hidden,
)
from fisher_forget.curvature.products import (
    GgnChunk,
    HessianChunk,
    summed,
    twice_differentiable,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split, some
from fisher_forget.errors import NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.weight_decay import WeightDecay, by_name, is_weight_decay, total_damping


@dataclass(frozen=True)
class WoodFisher(DirectMethod):
    """Influence with the empirical Fisher.

    Attributes:
        alpha: Length of the step; 1 is the influence itself.
        damping: lambda, nats per squared weight.
        samples: N, retained samples drawn at random for F.
        recursion: "exact", or "published" for the public code's single vector.
        memory: Bytes for gradients at a time, and for a solve with their products.

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "influence"
    grid: ClassVar[Grid] = {"alpha": Range(0.1, 100.0), "damping": Range(1e-3, 10.0)}

    alpha: float = 1.0
    damping: float = 1.0
    samples: int = 1000
    recursion: Literal["exact", "published"] = "exact"
    memory: int = MEMORY

    def __post_init__(self) -> None:
        require(
            self,
            at_least={"alpha": 0, "samples": 1, "memory": 1},
            above={"damping": 0},  # without damping F is singular
            recursion=(self.recursion in ("exact", "published"), "'exact' or 'published'"),
        )

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        objective = Objective(model, likelihood)
        v = forgotten_pull(objective, split)
        rows = Rows(
            model,
            split,
            [some(split.retain, self.samples, self.seed)],
            likelihood,
            lambda outputs, targets: [likelihood.residual(outputs, targets)],
            self.memory,
        )
        invert = solved if self.recursion == "exact" else single_vector
        x = invert(rows, v, self.damping, rows.positions()[0])
        gradients = len(split.retain) + len(split.forget) + rows.gradients
        return P.add(objective.start, x, self.alpha), gradients


@dataclass(frozen=True)
class Lissa(DirectMethod):
    """Influence with stochastic series for the inverse Hessian.

    Attributes:
        alpha: Length of the step.
        scale: s, above half the largest eigenvalue of H + gamma I of every batch: else it diverges.
        damping: gamma, nats per squared weight.
        weight_decay: wd of the objective, added to gamma: a number, or numbers by pattern of names.
        steps: Terms of a series; eigenvalues far below s / steps are not inverted.
        repeats: Series, averaged.
        batch_size: Retained samples of a term.
        curvature: "hessian", which may be indefinite, or "ggn".

    Raises:
        ConfigError: If a value is out of range.
        NumericalError: In `unlearn`, if the series diverges.
    """

    name = "influence-lissa"
    grid: ClassVar[Grid] = {"alpha": Range(0.1, 100.0), "scale": Range(10.0, 1e4)}

    alpha: float = 1.0
    scale: float = 1000.0
    damping: float = 0.01
    weight_decay: WeightDecay = 0.0005
    steps: int = 1000
    repeats: int = 3
    batch_size: int = 10
    curvature: Literal["hessian", "ggn"] = "hessian"

    def __post_init__(self) -> None:
        least = {"alpha": 0, "damping": 0}
        require(
            self,
            at_least=least | {"steps": 1, "repeats": 1, "batch_size": 1},
            above={"scale": 0},
            weight_decay=(is_weight_decay(self.weight_decay), "numbers of at least 0"),
            curvature=(self.curvature in ("hessian", "ggn"), "'hessian' or 'ggn'"),
        )

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        objective = Objective(model, likelihood)
        few = split.few("retain").on(objective.model)
        probe = (objective.model, objective.tape.params, few)
        hidden = hidden_from_products(*probe)
        if not hidden and self.curvature == "hessian":
            hidden = hidden_from_hessian(*probe, likelihood)
        refuse_hidden(hidden, "Use 'influence', whose gradients are enough.")
        v = forgotten_pull(objective, split)
        series = [self._series(objective, split, v, repeat) for repeat in range(self.repeats)]
        x = P.map_params(lambda *terms: torch.stack(terms).mean(0), series[0], *series[1:])
        size = min(self.batch_size, len(split.retain))
        # a product differentiates a gradient: about twice the work of one
        gradients = len(split.retain) + len(split.forget) + 2 * size * self.steps * self.repeats
        return P.add(objective.start, x, self.alpha), gradients

    def _series(self, objective: Objective, split: Split, v: Params, repeat: int) -> Params:
        rng = np.random.default_rng([self.seed, repeat])  # other batches in every series
        size, h = min(self.batch_size, len(split.retain)), v
        decay = by_name(self.weight_decay, objective.model, list(objective.start))
        ridge = total_damping(decay, self.damping)
        for _ in range(self.steps):
            sample_idx = some(split.retain, size, rng)
            batch = next(split.read([sample_idx])).on(objective.model)
            # h <- v + h - (H_batch + gamma I) h / s, which ends at s (H + gamma I)^-1 v
            curved = P.add(self._product(objective, batch, h), h, ridge)
            h = P.add(P.add(v, h), curved, -1 / self.scale)
            if not P.finite(h):
                got = f"a series that diverges at scale={self.scale:g}"
                expected = "a scale above half the largest eigenvalue of every batch's curvature"
                raise NumericalError(got, expected, "Raise `scale`, or pass curvature='ggn'.")
        return P.scale(h, 1 / self.scale)  # the fixed point is s (H + gamma I)^-1 v

    def _product(self, objective: Objective, batch: Batch, h: Params) -> Params:
        """H_batch h."""
        live = objective.tape.params
        likelihood, targets = objective.likelihood, batch.targets
        count = float(likelihood.counts(targets).double().sum()) or 1.0
        with twice_differentiable(objective.model):
            outputs = objective.outputs(batch)
            at = outputs.detach()
            # H h differentiates the loss twice; the GGN J^T H_out J h only the outputs
            chunk = (
                HessianChunk(likelihood.losses(outputs, targets).sum(), live)
                if self.curvature == "hessian"
                else GgnChunk(outputs, live, lambda u: likelihood.hessian_product(at, u, targets))
            )
            return summed([chunk], h, count)


def forgotten_pull(objective: Objective, split: Split) -> Params:
    """v = grad L_D - grad L_r = (m/n) (g_f - g_r) at `objective.start`; zero for no D_f."""
    retained = objective.gradient(split.batches("retain"), objective.start)
    forgotten = objective.gradient(split.batches("forget"), objective.start)
    # grad L_D is the mean over n of which m are forgotten: (m/n) g_f + (1 - m/n) g_r
    share = forgotten.count / (forgotten.count + retained.count or 1.0)
    return P.scale(P.add(forgotten.mean(), retained.mean(), -1), share)


def solved(rows: Rows, v: Params, damping: float, count: float) -> Params:
    """F^-1 v with F = lambda I + (1/N) G^T G, from the N x N system.

    Args:
        rows: G, one gradient a sample.
        v: Right-hand side.
        damping: lambda.
        count: N, scored positions.
    """
    # Woodbury: F^-1 v = (v - G^T (N lambda I + G G^T)^-1 G v) / lambda
    gram, right = rows.gram(), rows.times(v)
    gram.diagonal().add_(count * damping)
    a = torch.linalg.solve(gram, right)
    return P.scale(P.add(v, rows.transposed(a[:, None])[0], -1), 1 / damping)


def single_vector(rows: Iterable[Tensor], v: Params, damping: float, count: float) -> Params:
    """The public code's stand-in for F^-1 v: every F_k^-1 g is taken to lie along one vector o.

    Args:
        rows: G, one gradient a sample, in the order of the recursion.
        v: Right-hand side.
        damping: lambda; 1 in the public code.
        count: N.
    """
    x, o = P.flatten(v) / damping, None
    for block in rows:
        for g in block:
            if o is None:  # the first sample starts o, and leaves x alone
                o = g / damping
                continue
            # F_{k+1}^-1 of the head of this file, for x and for o in place of F_k^-1 g
            along = torch.dot(o, g)
            x = x - torch.dot(x, g) / (count + along) * o
            o = o - along / (count + along) * o
    return P.unflatten(x, v)
