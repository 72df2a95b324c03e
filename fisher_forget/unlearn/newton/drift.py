"""Drift: the force on the weights of a model that would go on training, forget set or not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from fisher_forget import params as P
from fisher_forget.errors import CurvatureError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.flow import Flow
from fisher_forget.unlearn.newton.guard import HALVINGS, Guard
from fisher_forget.unlearn.problem import Problem

AHEAD = 125.0  # time of the step over all samples that leads to where the drift is measured


def drift_prevails(problem: Problem) -> bool:
    """Whether |grad L_D + wd w| > |grad L_r - grad L_D|: most of the force is not owed to D_f."""
    full = problem.sums.total.mean()
    drift = P.norm(P.add(full, problem.objective.start, problem.weight_decay))
    return drift > P.norm(P.add(problem.retained.mean(), full, -1))


def drift_of(problem: Problem, everyone: Flow, guard: Guard) -> Params:
    r"""The force at the start that is not owed to the forget set, to be subtracted.

    Owed is F = grad L_r(w_D) - grad L_D(w_D) = (m/n_r) (grad L_D(w_D) - grad L_f(w_D)), at w_D
    where a step of the flow over all samples leads. Where a share s of the step delta is taken,
    which is halved like any other that leaves the budget, the step's own equation gives
    grad L_D(w_D) + wd w_D = (1 - s) (grad L_D(w) + wd w) - s tau delta.
    """
    objective, wd, start = problem.objective, problem.weight_decay, problem.objective.start
    full, ahead = problem.sums.total.mean(), start
    delta = None
    with suppress(CurvatureError, NumericalError):
        delta = everyone.solve(1 / AHEAD).x
    if delta is not None:
        by_loss = replace(guard, count_moves=False)
        look = by_loss.longest(start, delta, HALVINGS)
        if by_loss.fits(look):
            force = P.scale(P.add(full, start, wd), 1 - look.share)
            force = P.add(force, delta, -look.share / AHEAD)
            decayed = P.add(P.zeros_like(force), look.at, wd)
            full, ahead = P.add(force, decayed, -1), look.at
    forgotten = objective.gradient(problem.split.batches("forget"), ahead)
    # m grad L_D - sum of the forget set's gradients, over n_r
    owed = P.add(P.scale(full, forgotten.count), forgotten.sums, -1)
    owed = P.scale(owed, 1 / problem.retained.count)
    return P.add(P.add(problem.retained.mean(), start, wd), owed, -1)
