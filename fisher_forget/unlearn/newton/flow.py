r"""The gradient flow of a mean loss, followed by backward-Euler steps over times 1/tau.

A step solves (B + (wd + tau) I) delta = -(grad L + wd w - drift). Its curvature B is the exact GGN,
and the system is solved by conjugate gradients with the estimated curvature as preconditioner; or B
is the estimated curvature itself.

Only samples with output curvature contribute to the GGN, so products run over the working set of
samples with the largest tr H_n, re-chosen at every step, and the estimated curvature stands for the
others in proportion to their share of tr H_n, which is next to nothing in a converged network. The
gradient is computed in full once and then updated by its change on the pool that the working set is
chosen from (variance reduction) and, again, by what the curvature says of the others: where the
pool is all samples, the flow ends where its force vanishes, however few enter the products. Where
the number of steps and the damping are given, both are of all samples: who asks for the textbook
step gets that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fisher_forget import params as P
from fisher_forget.curvature.solvers import Solution, conjugate_gradient
from fisher_forget.data.split import Indices
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Gradient
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.weight_decay import decayed, total_damping

CARRIED = 0.95  # of tr H_n by the working set, which has
LEAST, MOST = 100, 400  # samples, or all that there are
POOL = 5  # candidates among which it is re-chosen, for each of its samples
# Conjugate-gradient products and tolerance. Along the flow a rough solution is enough: the next
# step starts with a new gradient. A given damping asks for the solution itself.
QUICK, EXACT = (10, 0.05), (200, 1e-9)


Products = Callable[[Params], Params]


@dataclass(frozen=True)
class LinearSolver:
    """How the linear systems are solved.

    Attributes:
        direct: Invert the estimated curvature itself.
        literal: Solve to the end, with products of all samples: number of steps and damping were
            given.
        working_set: Samples that enter the products otherwise; by default as many as have
            `CARRIED` of tr H_n.
    """

    direct: bool = False
    literal: bool = False
    working_set: int | None = None


class Flow:
    """The flow of the mean loss of some samples, with weight decay, from the original weights on.

    Args:
        problem: Losses, curvature and weight decay.
        samples: Indices of the samples that the mean is over, sorted.
        sums: Their gradient sums at the original weights.
        solver: How the linear systems are solved.

    Attributes:
        at: Where it is.
        drift: Subtracted from the force.
    """

    def __init__(
        self, problem: Problem, samples: Indices, sums: Gradient, solver: LinearSolver
    ) -> None:
        self.problem, self.samples, self.solver = problem, samples, solver
        self.drift: Params | None = None
        self._batches = problem.split.batches
        self._spread = problem.sums.spread_of(samples).double().numpy()
        most_curved = np.argsort(-self._spread, kind="stable")
        carried = np.cumsum(self._spread[most_curved])
        enough = np.searchsorted(carried, CARRIED * carried[-1]) + 1 if len(carried) else LEAST
        if len(samples) <= MOST:
            enough = MOST
        self._few = solver.working_set or int(min(max(enough, LEAST), MOST))
        self._pool = samples[most_curved[: POOL * self._few]]
        # `_sums` are the gradient sums at `_base`, from which later gradients are reckoned
        self._sums, self._base = sums, dict(problem.objective.start)
        self.at = self._base
        self._before: Gradient | None = None  # of the pool, at the base
        self._linear: tuple[Params, Products | None, float] | None = None

    def move(self, at: Params) -> None:
        """Go on from there."""
        self.at, self._linear = at, None

    def owe(self, force: Params) -> None:
        """From now on the force at the original weights is this one: what exceeds it is drift."""
        plain = P.add(self._sums.mean(), self._base, self.problem.decay)
        self.drift, self._linear = P.add(plain, force, -1), None

    def solve(self, tau: float) -> Solution:
        """delta of (B + (wd + tau) I) delta = -(grad L + wd w - drift).

        Raises:
            CurvatureError: If the curvature is a Hessian that needs more damping.
            NumericalError: If numbers overflow.
        """
        self._linear = self._linear or self.linearise()
        force, ggn, rest = self._linear
        curvature, decay = self.problem.curvature, self.problem.decay
        held, b = decayed(curvature, decay, tau), P.scale(force, -1)
        if ggn is None and not isinstance(decay, Mapping):
            return Solution(held.power(b, -1), 0, 0.0)
        total = total_damping(decay, tau)

        def product(v: Params) -> Params:
            out = curvature.power(v, 1) if ggn is None else ggn(v)
            out = P.add(out, v, total)
            return P.add(out, curvature.power(v, 1), rest) if rest else out

        # a structure that cannot hold the decays preconditions only: the solution is exact
        precise = self.solver.literal or ggn is None
        iterations, tolerance = EXACT if precise else QUICK
        return conjugate_gradient(
            product, b, lambda r: held.power(r, -1), iterations=iterations, tolerance=tolerance
        )

    def still_to_go(self, tau: float) -> Params:
        """(B + (wd + tau) I)^-1 (grad L + wd w - drift) at the current weights, B as estimated.

        Where the loss is quadratic with this B, and tau is 0, the way to its minimum.

        Raises:
            CurvatureError: If the curvature is a Hessian that needs more damping.
        """
        # an estimate: in a literal step, too, the pool's gradient is enough
        force = self._linear[0] if self._linear else self._force()
        return decayed(self.problem.curvature, self.problem.decay, tau).power(force, -1)

    def linearise(self) -> tuple[Params, Products | None, float]:
        """The flow at the current weights, to first order.

        Returns:
            The force grad L(w) + wd w - drift; products with the GGN of the working set, of all
            samples in a literal step, `None` where the curvature itself is inverted; the share of
            tr H_n that is left to it.
        """
        objective, literal = self.problem.objective, self.solver.literal
        force = self._force(whole=literal)
        if self.solver.direct:
            return force, None, 0.0
        if literal:
            return force, objective.ggn(self.problem.split, self.samples, self.at), 0.0
        working = self._working()
        ggn = objective.ggn(self.problem.split, working, self.at, self._sums.count)
        return force, ggn, self._rest(working)

    def _force(self, *, whole: bool = False) -> Params:
        """grad L(w) + wd w - drift; its change by the pool, or `whole`."""
        if self.at is self._base:
            gradient = self._sums.mean()
        elif whole or len(self.samples) <= len(self._pool):
            samples = self._batches(self.samples)
            gradient = self.problem.objective.gradient(samples, self.at).mean()
        else:  # variance reduction: only the pool's gradient is computed again
            gradient = (self._sums + self._change(self.at)).mean()
        force = P.add(gradient, self.at, self.problem.decay)
        return force if self.drift is None else P.add(force, self.drift, -1)

    def _working(self) -> Indices:
        """The samples that enter products: the pool's with the largest output curvature at the
        current weights."""
        if len(self._pool) <= self._few:
            return self._pool
        likelihood = self.problem.objective.likelihood
        pairs = self.problem.objective.forward(self._batches(self._pool), self.at)
        spread = torch.cat([likelihood.output_curvature(f, y).cpu() for f, y in pairs]).numpy()
        order = np.argsort(-spread, kind="stable")
        return np.sort(self._pool[order[: self._few]])

    def _change(self, at: Params) -> Gradient:
        """Sums of the pool after less those at the base; of the others what B says."""
        gradient = self.problem.objective.gradient
        if self._before is None:
            self._before = gradient(self._batches(self._pool), self._base)
        change = gradient(self._batches(self._pool), at) - self._before
        if rest := self._rest(self._pool):
            curved = self.problem.curvature.power(P.add(at, self._base, -1), 1)
            change = replace(change, sums=P.add(change.sums, curved, rest * self._sums.count))
        return change

    def _rest(self, working: Indices) -> float:
        """Share of tr H_n at the start that samples outside the working set have."""
        if len(working) == len(self.samples) or not self._spread.any():
            return 0.0
        inside = self._spread[np.searchsorted(self.samples, working)].sum()
        return 1 - float(inside / self._spread.sum())
