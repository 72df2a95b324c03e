r"""The gradient flow of a mean loss, followed by backward-Euler steps over times 1/tau.

A step solves (B + (wd + tau) I) delta = -force, the force being what is owed at the original
weights and the change of grad L + wd w since. Its curvature B is the exact GGN, and the system is
solved by conjugate gradients with the estimated curvature as preconditioner; or B is the estimated
curvature itself.

Only samples with output curvature contribute to the GGN, so products run over the working set of
samples with the largest tr H_n, and the estimated curvature stands for the others in proportion to
their share of tr H_n, which is next to nothing in a converged network. As long as the predictions
of the working set have hardly moved the flow is linear: the force changes by B times the way, and
directions that were searched once answer for their part of every further system. Where they have
moved, the working set is chosen again, and the gradient by its change on the pool that the working
set is chosen from (variance reduction) and, again, by what the curvature says of the others: where
the pool is all samples, the flow ends where its force vanishes, however few enter the products.
Where the number of steps and the damping are given, both are of all samples: who asks for the
textbook step gets that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fisher_forget import params as P
from fisher_forget.curvature.solvers import Directions, Solution, conjugate_gradient
from fisher_forget.data.split import Indices
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Gradient
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.weight_decay import decayed, total_damping

CARRIED = 0.95  # of tr H_n by the working set, which has
LEAST, MOST = 100, 400  # samples, or all that there are
EACH = 10  # of them for a forgotten sample, at most: a small request needs no more
STRAIGHT = 0.1  # root-mean-square move of a logit, within which a tilted flow is linear
KEPT = 1 / 8  # of the memory, for directions
POOL = 5  # candidates among which it is re-chosen, for each of its samples
# Conjugate-gradient products and tolerance: of a tilted flow; of one that is to end where L_r is
# lowest, and takes a new gradient for each step; where a given damping asks for the solution.
ROUGH, CLOSE, EXACT = (10, 0.1), (10, 0.05), (200, 1e-9)


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
        straight: Root-mean-square move of a logit, within which the flow is taken as linear: 0
            where it is to end where L_r is lowest, which only its gradient knows.
    """

    direct: bool = False
    literal: bool = False
    working_set: int | None = None
    straight: float = 0.0


@dataclass
class Linear:
    """The flow near some weights, to first order.

    Attributes:
        origin: The weights.
        products: v -> B v; `None` where the estimated curvature itself is inverted.
        samples: The working set.
        curved: Their tr H_n at the origin, summed.
        change: What grad L + wd w has changed by since the original weights, where the flow is.
        directions: Conjugate in B + wd + tau.
        tau: Theirs.
    """

    origin: Params
    products: Products | None
    samples: Indices
    curved: float
    change: Params
    directions: Directions
    tau: float = math.nan


class Flow:
    """The flow of the mean loss of some samples, with weight decay, from the original weights on.

    Args:
        problem: Losses, curvature and weight decay.
        samples: Indices of the samples that the mean is over, sorted.
        sums: Their gradient sums at the original weights.
        solver: How the linear systems are solved.

    Attributes:
        at: Where it is.
        owed: The force at the original weights, grad L + wd w unless told otherwise: the rest of
            that is drift.
    """

    def __init__(
        self, problem: Problem, samples: Indices, sums: Gradient, solver: LinearSolver
    ) -> None:
        self.problem, self.samples, self.solver = problem, samples, solver
        self._batches = problem.split.batches
        self._spread = problem.sums.spread_of(samples).double().numpy()
        most_curved = np.argsort(-self._spread, kind="stable")
        self._few = solver.working_set or self._enough(self._spread[most_curved])
        self._pool = samples[most_curved[: POOL * self._few]]
        self._sums, self._base = sums, dict(problem.objective.start)
        self._before: Gradient | None = None  # of the pool, at the original weights
        self.owed = P.add(sums.mean(), self._base, problem.decay)
        self.restart()

    def _enough(self, spread: np.ndarray) -> int:
        """Samples of a working set, of all with these tr H_n, descending."""
        if len(spread) <= MOST:
            return MOST
        carry = int(np.searchsorted(np.cumsum(spread), CARRIED * spread.sum())) + 1
        most = EACH * len(self.problem.split.forget) if self.solver.straight else MOST
        return max(LEAST, min(carry, most, MOST))

    def restart(self) -> None:
        """Back to the original weights."""
        self.at = self._base
        self._near: Linear | None = None
        self._next: tuple[Params, Params] | None = None  # the last solution x, and (B + wd) x
        self._last: tuple[Params, Params] | None = None  # where it was before, and the change there

    def go(self, share: float = 1.0) -> None:
        """Go that share of the last solution."""
        assert self._near is not None
        assert self._next is not None
        x, curved = self._next
        self._last = self.at, self._near.change
        self.at = P.add(self.at, x, share)
        self._near.change = P.add(self._near.change, curved, share)

    def undo(self) -> None:
        """Back to before the last `go`."""
        assert self._near is not None
        assert self._last is not None
        self.at, self._near.change = self._last

    def solve(self, tau: float) -> Solution:
        """delta of (B + (wd + tau) I) delta = -force.

        Raises:
            CurvatureError: If the curvature is a Hessian that needs more damping.
            NumericalError: If numbers overflow.
        """
        if self._near is None or self._bent(self._near):
            self._near = self._linearised()
        near, curvature, decay = self._near, self.problem.curvature, self.problem.decay
        held, b = decayed(curvature, decay, tau), P.scale(P.add(self.owed, near.change), -1)
        if near.products is None and not isinstance(decay, Mapping):
            solution = Solution(held.power(b, -1), 0, 0.0, P.zeros_like(b))
        else:
            products, total = near.products, total_damping(decay, tau)
            if near.tau != tau:
                near.tau, near.directions = tau, Directions(near.directions.room)
            # a structure that cannot hold the decays preconditions only: the solution is exact
            precise = self.solver.literal or products is None
            along = ROUGH if self.solver.straight else CLOSE
            iterations, tolerance = EXACT if precise else along
            solution = conjugate_gradient(
                lambda v: P.add(products(v) if products else curvature.power(v, 1), v, total),
                b,
                lambda r: held.power(r, -1),
                iterations=iterations,
                tolerance=tolerance,
                known=near.directions,
            )
        # (B + wd + tau) x = b - left
        self._next = solution.x, P.add(P.add(b, solution.left, -1), solution.x, -tau)
        return solution

    def still_to_go(self, tau: float) -> Params:
        """(B + (wd + tau) I)^-1 force at the current weights, B as estimated.

        Where the loss is quadratic with this B, and tau is 0, the way to its minimum.

        Raises:
            CurvatureError: If the curvature is a Hessian that needs more damping.
        """
        held = decayed(self.problem.curvature, self.problem.decay, tau)
        # in a literal step, too, the pool's gradient is enough for an estimate
        return held.power(P.add(self.owed, self._change()), -1)

    def _bent(self, near: Linear) -> bool:
        """Whether the working set's predictions have moved too far for the flow to be linear: their
        divergence is half the squared move, weighted by the curvature."""
        if self.at is near.origin:
            return False
        if not self.solver.straight:
            return True
        objective, read = self.problem.objective, partial(self._batches, near.samples)
        moved = objective.divergence(read(), near.origin, self.at)
        counts = torch.cat([objective.likelihood.counts(b.targets).cpu() for b in read()])
        return not 2 * float(moved @ counts.to(moved)) <= self.solver.straight**2 * near.curved

    def _linearised(self) -> Linear:
        """The flow to first order here: the working set of the samples with the largest output
        curvature, of the pool; all samples in a literal step."""
        problem, literal = self.problem, self.solver.literal
        objective, curvature = problem.objective, problem.curvature
        samples, curved = self.samples, 0.0
        if not literal:
            pairs = objective.forward(self._batches(self._pool), self.at)
            spread = torch.cat(
                [objective.likelihood.output_curvature(f, y).cpu().double() for f, y in pairs]
            )
            most = spread.argsort(descending=True, stable=True)[: self._few]
            samples, curved = np.sort(self._pool[most.numpy()]), float(spread[most].sum())
        products: Products | None = None
        if not self.solver.direct:
            count = None if literal else self._sums.count
            exact = objective.ggn(problem.split, samples, self.at, count)
            rest = 0.0 if literal else self._rest(samples)

            def products(v: Params) -> Params:
                return P.add(exact(v), curvature.power(v, 1), rest) if rest else exact(v)

        pair = 2 * sum(x.numel() * x.element_size() for x in self.at.values())
        room = 0 if literal else int(KEPT * objective.memory / pair)
        change = self._change(whole=literal)
        return Linear(self.at, products, samples, curved, change, Directions(room))

    def _change(self, *, whole: bool = False) -> Params:
        """What grad L + wd w has changed by since the original weights: by its change on the pool,
        and of the others by what B says; or of the `whole`."""
        away, gradient = P.add(self.at, self._base, -1), self.problem.objective.gradient
        if self.at is self._base:
            return away
        if whole or len(self.samples) <= len(self._pool):
            there = gradient(self._batches(self.samples), self.at).mean()
            change = P.add(there, self._sums.mean(), -1)
        else:
            pool = partial(self._batches, self._pool)
            self._before = self._before or gradient(pool(), self._base)
            moved = gradient(pool(), self.at) - self._before
            change = P.scale(moved.sums, 1 / self._sums.count)
            if rest := self._rest(self._pool):
                change = P.add(change, self.problem.curvature.power(away, 1), rest)
        return P.add(change, away, self.problem.decay)

    def _rest(self, working: Indices) -> float:
        """Share of tr H_n at the start that samples outside the working set have."""
        if len(working) == len(self.samples) or not self._spread.any():
            return 0.0
        inside = self._spread[np.searchsorted(self.samples, working)].sum()
        return 1 - float(inside / self._spread.sum())
