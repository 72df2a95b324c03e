r"""The gradient flow of a mean loss, followed by backward-Euler steps over times 1/tau.

A step solves (B + (wd + tau) I) delta = -(grad L + wd w - drift). Its curvature B is the exact GGN,
and the system is solved by conjugate gradients with the estimated curvature as preconditioner; or B
is the estimated curvature itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.solvers import Solution, conjugate_gradient
from fisher_forget.data.split import Indices, Split
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Gradient, Objective

Product = Callable[[Params], Params]
POOL = 4000  # candidates among which the working set is re-chosen
QUICK, EXACT = (
    (10, 0.05),
    (200, 1e-9),
)  # conjugate-gradient products and tolerance: along the flow, for a given damping


class Flow:
    """The gradient flow of the mean loss over some samples plus weight decay, followed by
    backward-Euler steps.

    Args:
        objective: Losses.
        split: Its retained samples are those of the flow.
        curvature: Preconditioner, or B itself.
        sums: Gradient sums of the samples at the start.
        spread: tr H_n of each of those samples at the start.
        weight_decay: wd.
        direct: Invert `curvature` itself.
        literal: Solve to the end: the damping was given.
        working_set: Samples that enter the products.
    """

    def __init__(
        self,
        objective: Objective,
        split: Split,
        curvature: Curvature,
        sums: Gradient,
        spread: Tensor,
        *,
        weight_decay: float,
        direct: bool,
        literal: bool,
        working_set: int,
    ) -> None:
        self.objective, self.split, self.curvature, self.sums = objective, split, curvature, sums
        self.weight_decay, self.direct, self.literal, self.working_set = (
            weight_decay,
            direct,
            literal,
            working_set,
        )
        self.spread = spread.double().numpy()
        order = np.argsort(-self.spread, kind="stable")
        self.pool = split.retain[order[: max(POOL, working_set)]]
        self.at: Params = dict(objective.start)
        self.base = self.at  # where `sums` are of
        self.drift: Params | None = None  # subtracted from the force
        self._restart = False
        self._linear: tuple[Params, Product | None] | None = None

    def move(self, at: Params) -> None:
        """Go there."""
        self.at, self._linear = at, None

    def restart(self, at: Params) -> None:
        """Go there; before the next step, the pool is to tell how far the gradient has changed."""
        self.move(at)
        self._restart = True

    def _change(self, chosen: Indices, at: Params) -> Gradient:
        """Sums over some samples there minus those at the base, and of the others what the
        curvature says."""
        here, before = (
            self.objective.gradient(self.split.batches(chosen), w) for w in (at, self.base)
        )
        change, others = here - before, self._others(chosen)
        if others:
            curved = self.curvature.power(P.add(at, self.base, -1), 1)
            change = replace(change, sums=P.add(change.sums, curved, others * self.sums.count))
        return change

    def _others(self, chosen: Indices) -> float:
        """Share of tr H_n at the start that the retained samples have that are not among some."""
        if len(chosen) == len(self.split.retain) or not self.spread.any():
            return 0.0
        return 1 - float(
            self.spread[np.searchsorted(self.split.retain, chosen)].sum() / self.spread.sum()
        )

    def solve(self, tau: float) -> Solution:
        """delta of (B + (wd + tau) I) delta = -(grad L + wd w - drift), by the curvature itself or
        conjugate gradients.

        Raises:
            CurvatureError: If the curvature is a Hessian that needs more damping.
            NumericalError: If numbers overflow.
        """
        if self._linear is None:
            self._linear = self._linearise()
        force, ggn = self._linear
        total = tau + self.weight_decay
        damped, b = self.curvature.damped(total), P.scale(force, -1)
        if ggn is None:
            return Solution(damped.power(b, -1), 0, 0.0)
        product = ggn
        iterations, tolerance = EXACT if self.literal else QUICK
        return conjugate_gradient(
            lambda v: P.add(product(v), v, total),
            b,
            lambda r: damped.power(r, -1),
            iterations=iterations,
            tolerance=tolerance,
        )

    def _linearise(self) -> tuple[Params, Product | None]:
        """Force grad L(w) + wd w - drift, and products with the GGN, at the current weights."""
        chosen = self._working_set() if len(self.pool) > self.working_set else self.pool
        if self._restart:
            self.sums, self.base, self._restart = (
                self.sums + self._change(self.pool, self.at),
                self.at,
                False,
            )
        if self.at is self.base:
            gradient = self.sums.mean()
        elif len(self.split.retain) <= self.working_set:
            gradient = self.objective.gradient(self.split.batches("retain"), self.at).mean()
        else:  # variance reduction
            gradient = (self.sums + self._change(chosen, self.at)).mean()
        force = P.add(gradient, self.at, self.weight_decay)
        if self.drift is not None:
            force = P.add(force, self.drift, -1)
        if self.direct:
            return force, None
        ggn = self.objective.ggn(self.split.batches(chosen), self.at, self.sums.count)
        others = self._others(chosen)
        return force, (
            lambda v: P.add(ggn(v), self.curvature.power(v, 1), others)
        ) if others else ggn

    def _working_set(self) -> Indices:
        """The pool's samples with the largest output curvature at the current weights."""
        likelihood = self.objective.likelihood
        outputs = self.objective.forward(self.split.batches(self.pool), self.at)
        spread = torch.cat([likelihood.output_curvature(f, y).cpu() for f, y in outputs]).numpy()
        return np.sort(self.pool[np.argsort(-spread, kind="stable")[: self.working_set]])
