r"""The textbook correction with the drift subtracted: the difference of two Newton steps.

With d_D = (A + (wd + tau) I)^-1 (grad L_D + wd w) on all samples and d_r = (B + (wd + tau) I)^-1
(grad L_r + wd w) on the retained ones, w - (d_r - d_D) leaves out what training on would do to
either (Golatkar et al. 2020, arXiv:1911.04933, Prop. 3). For a quadratic loss and tau = 0 it is
w + w*_r - w*_D: the retrained weights, shifted by the same excess that w has over the minimum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from fisher_forget import params as P
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.solvers import Solution
from fisher_forget.curvature.structures import STRUCTURES
from fisher_forget.errors import CurvatureError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.flow import Flow, LinearSolver
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import Problem, curvature_of


class TwoSolves(Flow):
    """The flow of the retained samples less that of all samples, each at its own weights.

    Args:
        problem: Losses, curvature of the retained samples and weight decay.
        solver: How the linear systems are solved; steps are taken whole.
        options: How the curvature was estimated.
    """

    def __init__(self, problem: Problem, solver: LinearSolver, options: ForgetOptions) -> None:
        super().__init__(problem, problem.known, problem.retained, solver)
        if solver.direct:  # else A comes by exact products
            problem = replace(problem, curvature=curvature_of_all(problem, options))
        self._whole = Flow(problem, problem.sums.samples, problem.sums.total, solver)

    def solve(self, tau: float) -> Solution:
        """d_D - d_r.

        Raises:
            CurvatureError, NumericalError: As for `Flow`.
        """
        mine, whole = super().solve(tau), self._whole.solve(tau)
        residual, iterations = max(mine.residual, whole.residual), mine.iterations
        return Solution(P.add(mine.x, whole.x, -1), iterations + whole.iterations, residual)

    def still_to_go(self, tau: float) -> Params:
        return P.add(super().still_to_go(tau), self._whole.still_to_go(tau), -1)

    def go(self, share: float = 1.0) -> None:
        """Each flow goes from where its own step has led."""
        super().go(share)
        self._whole.go(share)


def curvature_of_all(problem: Problem, options: ForgetOptions) -> Curvature:
    """A = (n_r B + m F_f) / n, F_f of the forgotten samples; estimated of all samples where the
    structure is no sum.

    Raises:
        CurvatureError: If B was put together by hand.
    """
    info, split = problem.curvature.info, problem.split
    if not len(split.forget):
        return problem.curvature
    if info is None:
        fix = "Pass solver='cg' or drift=False, or an estimated curvature."
        raise CurvatureError("a curvature put together by hand", "one of all samples, too", fix)
    spec, kind = STRUCTURES.get(info.structure), cast(Kind, info.kind)
    changes: dict[str, Any] = {"draws": info.draws, "seed": info.seed} if info.draws else {}
    if spec is not None:
        changes["structure"] = info.structure
    options = options.changed(changes)
    if spec is None or not spec.additive:
        return curvature_of(problem.objective, split, options, split.indices("all"), kind)
    basis = problem.curvature if spec.takes_basis else None
    part = curvature_of(problem.objective, split, options, split.forget, kind, basis=basis)
    share = problem.retained.count / problem.sums.total.count
    return problem.curvature.combined(part, share, 1 - share)
