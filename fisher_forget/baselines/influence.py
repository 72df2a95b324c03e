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

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.baselines.jacobian_rows import MEMORY, Rows
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.curvature.products import GgnChunk, summed, twice_differentiable
from fisher_forget.curvature.structures.hessian import HessianChunk
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split, some
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective


@dataclass(frozen=True)
class WoodFisher:
    """Influence with the empirical Fisher.

    Attributes:
        alpha: Length of the step; 1 is the influence itself.
        damping: lambda, nats per squared weight.
        samples: N, retained samples drawn at random for F.
        recursion: "exact", or "published" for the public code's single vector.
        memory: Bytes for gradients at a time, and for a solve with their products.
        likelihood: Name or instance.
        seed: Of the samples.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: ClassVar[str] = "influence"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "alpha": (0.3, 1.0, 3.0, 10.0),
        "damping": (0.01, 0.1, 1.0),
    }

    alpha: float = 1.0
    damping: float = 1.0
    samples: int = 1000
    recursion: Literal["exact", "published"] = "exact"
    memory: int = MEMORY
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("alpha", 0 <= self.alpha < math.inf, "a number of at least 0"),
            (
                "damping",
                0 < self.damping < math.inf,
                "a number above 0: without damping F is singular",
            ),
            ("samples", self.samples >= 1, "a number of at least 1"),
            ("recursion", self.recursion in ("exact", "published"), "'exact' or 'published'"),
            ("memory", self.memory >= 1, "bytes"),
        ):
            if not good:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}", expected, "Correct the method's settings."
                )

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        check_model(model)
        likelihood = resolve_likelihood(self.likelihood)
        with preserved_rng():
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
            count = rows.positions()[0]
            if self.recursion == "exact":
                x = solved(rows, v, self.damping, count)
            else:
                x = single_vector(rows, v, self.damping, count)
        gradients = len(split.retain) + len(split.forget) + rows.gradients
        return _moved(model, objective.start, x, self.alpha, begun, gradients / len(split.retain))


@dataclass(frozen=True)
class Lissa:
    """Influence with stochastic series for the inverse Hessian.

    Attributes:
        alpha: Length of the step.
        scale: s, above half the largest eigenvalue of any batch's H + gamma I, or the series
            diverges.
        damping: gamma, nats per squared weight.
        weight_decay: wd of the objective, added to gamma.
        steps: Terms of a series; eigenvalues far below s / steps are not inverted.
        repeats: Series, averaged.
        batch_size: Retained samples of a term.
        curvature: "hessian", which may be indefinite, or "ggn".
        likelihood: Name or instance.
        seed: Of the batches.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: ClassVar[str] = "influence-lissa"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "alpha": (0.3, 1.0, 3.0, 10.0),
        "scale": (10.0, 100.0, 1000.0),
    }

    alpha: float = 1.0
    scale: float = 1000.0
    damping: float = 0.01
    weight_decay: float = 0.0005
    steps: int = 1000
    repeats: int = 3
    batch_size: int = 10
    curvature: Literal["hessian", "ggn"] = "hessian"
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("alpha", 0 <= self.alpha < math.inf, "a number of at least 0"),
            ("scale", 0 < self.scale < math.inf, "a number above 0"),
            ("damping", 0 <= self.damping < math.inf, "a number of at least 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0"),
            ("steps", self.steps >= 1, "a number of at least 1"),
            ("repeats", self.repeats >= 1, "a number of at least 1"),
            ("batch_size", self.batch_size >= 1, "a number of at least 1"),
            ("curvature", self.curvature in ("hessian", "ggn"), "'hessian' or 'ggn'"),
        ):
            if not good:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}", expected, "Correct the method's settings."
                )

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched.

        Raises:
            NumericalError: If the series diverges.
        """
        begun = time.perf_counter()
        check_model(model)
        with preserved_rng():
            objective = Objective(model, resolve_likelihood(self.likelihood))
            v = forgotten_pull(objective, split)
            found = [self._series(objective, split, v, repeat) for repeat in range(self.repeats)]
        x = P.map_params(lambda *each: torch.stack(each).mean(0), found[0], *found[1:])
        size = min(self.batch_size, len(split.retain))
        # a product differentiates a gradient: about twice the work of one
        gradients = len(split.retain) + len(split.forget) + 2 * size * self.steps * self.repeats
        return _moved(model, objective.start, x, self.alpha, begun, gradients / len(split.retain))

    def _series(self, objective: Objective, split: Split, v: Params, repeat: int) -> Params:
        rng = np.random.default_rng([self.seed, repeat])
        size, ridge, h = (
            min(self.batch_size, len(split.retain)),
            self.damping + self.weight_decay,
            v,
        )
        for _ in range(self.steps):
            chosen = some(split.retain, size, rng)
            batch = next(replace(split, batch_size=size).batches(chosen)).on(objective.model)
            curved = P.add(self._product(objective, batch, h), h, ridge)
            h = P.add(P.add(v, h), curved, -1 / self.scale)
            if not P.finite(h):
                raise NumericalError(
                    f"a series that diverges at scale={self.scale:g}",
                    "a scale above half the largest eigenvalue of every batch's curvature",
                    "Raise `scale`, or pass curvature='ggn'.",
                )
        return P.scale(h, 1 / self.scale)

    def _product(self, objective: Objective, batch: Batch, h: Params) -> Params:
        """H_batch h."""
        leaves = {name: p.detach().requires_grad_() for name, p in objective.start.items()}
        likelihood, targets = objective.likelihood, batch.targets
        count = max(float(likelihood.counts(targets).double().sum()), 1.0)
        with twice_differentiable():
            outputs = objective.outputs(batch, leaves)
            if self.curvature == "hessian":
                return summed(
                    [HessianChunk(likelihood.losses(outputs, targets).sum(), leaves)], h, count
                )
            at = outputs.detach()
            return summed(
                [GgnChunk(outputs, leaves, lambda u: likelihood.hessian_product(at, u, targets))],
                h,
                count,
            )


def forgotten_pull(objective: Objective, split: Split) -> Params:
    """v = grad L_D - grad L_r = (m/n) (g_f - g_r) at the weights of the objective; zero without a
    forget set."""
    kept = objective.gradient(split.batches("retain"), objective.start)
    gone = objective.gradient(split.batches("forget"), objective.start)
    share = gone.count / max(gone.count + kept.count, 1.0)
    return P.scale(P.add(gone.mean(), kept.mean(), -1), share)


def solved(rows: Rows, v: Params, damping: float, count: float) -> Params:
    """F^-1 v with F = lambda I + (1/N) G^T G, from the N x N system.

    Args:
        rows: G, one gradient a sample.
        v: Right-hand side.
        damping: lambda.
        count: N, scored positions.
    """
    gram, right = rows.gram(), rows.times(v)
    gram.diagonal().add_(count * damping)
    a = torch.linalg.solve(gram, right)
    return P.scale(P.add(v, rows.transposed(a[:, None])[0], -1), 1 / damping)


def single_vector(rows: Iterable[Tensor], v: Params, damping: float, count: float) -> Params:
    """What the public code computes in place of F^-1 v: every F_k^-1 g is taken to lie along one
    vector o.

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
            along = torch.dot(o, g)
            x = x - torch.dot(x, g) / (count + along) * o
            o = o - along / (count + along) * o
    return P.unflatten(x, v)


def _moved(
    model: nn.Module, start: Params, x: Params, alpha: float, begun: float, passes: float
) -> Unlearned:
    """w + alpha x."""
    final = P.add(start, x, alpha)
    if not P.finite(final):
        raise NumericalError(
            "weights that are not finite", "finite weights", "Raise the damping, or lower alpha."
        )
    return Unlearned(P.load(model, final).eval(), time.perf_counter() - begun, passes)
