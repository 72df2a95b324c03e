r"""The Newton correction: weights move to where training on retained data alone would put them.

Retraining without D_f is gradient flow on the retained objective L_r(w) + (wd/2)|w|^2. The damped
Newton step (B + tau I)^-1 grad L_r *is* one backward-Euler step of that flow over the time 1/tau;
several of them follow it further (docs/newton.md). The curvature of a step is the exact GGN, solved
by conjugate gradients with the estimated curvature as preconditioner, so that the answer hardly
depends on damping; or the estimated curvature itself.

A network that is not at a minimum of its objective would go on training under this flow. Where most
of the force is not owed to the forget set, that part is subtracted then, so that the flow starts
with grad L_r - grad L_D, taken where a step of the flow over *all* samples leads: it stands still
for an empty forget set and equals the plain one at a minimum. With a given number of steps and a
given damping it is the difference of two Newton steps instead (`two_solves`).

A class that no retained sample is labelled with leaves an output row that no flow brings to its
limit in time: see `absent_classes`. It starts from there, and the flow ends after its first
sub-step, or before where the network is not at a minimum.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Unpack

import numpy as np

from fisher_forget import params as P
from fisher_forget._util.isolation import isolated
from fisher_forget.data.split import Indices, some
from fisher_forget.errors import ConfigError, CurvatureError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.absent_classes import absent_classes, clear_rows
from fisher_forget.unlearn.newton.drift import AHEAD, drift_of, drift_prevails
from fisher_forget.unlearn.newton.flow import Flow, LinearSolver
from fisher_forget.unlearn.newton.guard import Guard, HeldOut
from fisher_forget.unlearn.newton.path import Path, SubStep
from fisher_forget.unlearn.newton.policy import HORIZON, STATIONARY, Signs, decide, stationarity
from fisher_forget.unlearn.newton.two_solves import TwoSolves
from fisher_forget.unlearn.options import ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.problem import Problem, with_solver

HELD_OUT = 1000  # retained samples that guard the steps, at most, and a tenth of all
SHOWN = 512  # forget samples whose predictions tell when the flow has done its work
JUDGED = 1000  # retained samples whose loss tells whether the network would go on training
PROBED = 32  # held-out and forget samples each that tell which parameters are output rows


@dataclass(frozen=True)
class NewtonStep:
    """The whole correction.

    Attributes:
        params: The corrected parameters. Where noise is added to them, they are a secret: with
            them the noise is known, too.
        error: sigma_h, root-mean-square distance of a weight to where the flow still leads, by one
            more step over its whole horizon T = `HORIZON` from where it ended,

                sigma_h = |(B + (wd + 1/T) I)^-1 force| / sqrt(d),

            with the estimated curvature B. Where the loss is quadratic, and B is its matrix, this
            is the distance to the retrained weights, at most a factor 1 + 1 / (T wd) too small, and
            falls with every correction. Elsewhere it is an estimate, and no bound (docs/noise.md
            has measurements). NaN where the curvature has no such inverse.
        norm: |w_new - w|.
        gradient_norm: |grad L_r(w) + wd w| at the start.
        stationarity: |grad L_D + wd w|^2 over the sampling variance of the mean gradient, as
            retained samples have it; below 0.5 at a minimum.
        unsettled: Why the given model was not near a minimum of its training objective, in words:
            its gradient, or (if steps="auto") a step of the flow over all samples that lowers the
            retained loss beyond the budget. Empty where it was.
        drift_removed: Whether the force that is not owed to the forget set was subtracted.
        absent: Classes that no retained sample is labelled with, whose output rows start at 0.
        path: Every sub-step tried, in order.
        held_out: Number of retained samples that guard the steps.
        loss_before: Mean loss on them before, nats.
        budget: By how much it was allowed to rise above the lowest on the way, moves to the worse
            (`SubStep.shift`) added, nats.
        seconds: Wall time.
    """

    params: Params = field(repr=False)
    error: float
    norm: float
    gradient_norm: float
    stationarity: float
    unsettled: str
    drift_removed: bool
    absent: tuple[int, ...]
    path: tuple[SubStep, ...]
    held_out: int
    loss_before: float
    budget: float
    seconds: float

    @property
    def at_minimum(self) -> bool:
        """Whether the given model was near a minimum of its training objective."""
        return not self.unsettled

    @property
    def accepted(self) -> tuple[SubStep, ...]:
        """The sub-steps that were taken."""
        return tuple(s for s in self.path if s.accepted)

    @property
    def damping(self) -> float:
        """Damping of the last sub-step taken; infinite where none was."""
        return self.accepted[-1].damping if self.accepted else math.inf

    @property
    def noise_damping(self) -> float:
        """tau of the noise: the last sub-step's (1 without); wide where the step was blind."""
        return self.damping if self.accepted else 1.0


@isolated()
def newton_step(
    problem: Problem,
    options: ForgetOptions | None = None,
    *unexpected: object,
    working_set: int = 600,
    progress: bool = False,
    **changes: Unpack[ForgetKeywords],
) -> NewtonStep:
    r"""Move to where training on the retained data alone would have led.

    A sub-step solves (B(w) + (wd + tau) I) delta = -(grad L_r(w) + wd w) at the current w.

    With steps="auto" the times 1/tau are 125 to 1,000 up to a horizon of 3,875, or 60 to 500 up to
    810 where the drift is subtracted, fewer when the forget set's predictions stop moving; a step
    that leaves the budget is halved until it does not, and is the last. Output rows of absent
    classes are set to zero, with one time of 125 at most where there are such.

    Args:
        problem: Model, data, curvature and gradient; its `weight_decay` is that of the objective.
        options: `steps`, `damping`, `solver`, `drift`, `budget` and `seed` count here.
        *unexpected: None; a split and a curvature were arguments of version 0.1.
        working_set: Retained samples that enter the products and the gradient's change one by one;
            where steps and damping are given, all do.
        progress: Show progress bars.
        **changes: Fields of `ForgetOptions` by name, over those of `options`.

    Raises:
        ConfigError: If the first argument is no `Problem`.
        NumericalError: If a given damping leads to values that are not finite.
    """
    if not isinstance(problem, Problem) or unexpected:
        got = f"newton_step of {type(problem).__name__}"
        expected = "a Problem: objective, split, curvature, data sums and weight decay"
        raise ConfigError(got, expected, "Pass Problem.of(model, loader, forget_idx, options).")
    begun = time.perf_counter()
    options = with_solver(merged(options, changes), problem.objective, problem.split)
    solver = _linear_solver(problem, options, working_set)
    held_out, shown = _samples(problem, options, guarded=not solver.literal)
    start = problem.objective.start

    everyone = Flow(problem, problem.sums.samples, problem.sums.total, solver)
    guard = Guard.at(held_out, start, options.budget)
    loss_before = guard.best.loss
    signs = _signs(problem, everyone, guard, options)
    policy = decide(signs, options)
    if policy.budget is not None:
        guard = replace(guard, budget=policy.budget)
    absent: tuple[int, ...] = ()
    if options.steps == "auto":
        absent, start, guard = _cleared(problem, guard, shown, options.budget)
    remove_drift = policy.remove_drift and not absent
    if remove_drift and solver.literal:
        flow: Flow = TwoSolves(problem, solver, options)
    else:
        drift = drift_of(problem, everyone, guard) if remove_drift else None
        retain, begins = problem.split.retain, start if absent else None
        flow = Flow(problem, retain, problem.retained, solver, drift=drift, start=begins)

    path = Path(problem, flow, guard, start, shown)
    path.follow(policy.times(cleared=bool(absent)), options, progress)
    force = P.add(problem.retained.mean(), problem.objective.start, problem.weight_decay)
    return NewtonStep(
        params=path.at,
        error=_error(flow),
        norm=P.norm(P.add(path.at, problem.objective.start, -1)),
        gradient_norm=P.norm(force),
        stationarity=signs.stationarity,
        unsettled=policy.unsettled,
        drift_removed=remove_drift,
        absent=absent,
        path=tuple(path.steps),
        held_out=len(held_out.samples),
        loss_before=loss_before,
        budget=path.guard.budget,
        seconds=time.perf_counter() - begun,
    )


def _error(flow: Flow) -> float:
    """sigma_h of `NewtonStep` where the flow has ended."""
    try:
        ahead = flow.still_to_go(1 / HORIZON)
    except (CurvatureError, NumericalError):
        return math.nan
    return P.norm(ahead) / math.sqrt(P.size(ahead))


def _linear_solver(problem: Problem, options: ForgetOptions, working_set: int) -> LinearSolver:
    whole = options.solver == "auto" and problem.curvature.whole
    direct = whole or options.solver == "direct"
    literal = options.steps != "auto" and options.damping != "auto"
    return LinearSolver(direct, literal, working_set)


def _samples(problem: Problem, options: ForgetOptions, *, guarded: bool) -> tuple[HeldOut, Indices]:
    """Held-out retained samples, none where a given damping means the textbook step, which no loss
    judges; and the forget samples whose predictions are looked at."""
    split, rng = problem.split, np.random.default_rng(options.seed)
    most = min(len(split.retain) // 10, HELD_OUT) if guarded else 0
    chosen = some(split.retain, most, rng)
    curved = problem.sums.spread_of(split.retain).numpy() > 0
    if curved.any() and not curved[np.searchsorted(split.retain, chosen)].any():
        # few targets are scored, and none of these samples'
        chosen = some(split.retain[curved], most, rng)
    return HeldOut(problem.objective, split, chosen), some(split.forget, SHOWN, rng)


def _signs(problem: Problem, everyone: Flow, guard: Guard, options: ForgetOptions) -> Signs:
    """What the original weights tell, at no higher cost than the policy needs."""
    ratio = stationarity(problem)
    judge = options.steps == "auto" and ratio < STATIONARY
    return Signs(
        stationarity=ratio,
        gain=_gain(problem, everyone, guard.budget, options.seed) if judge else 0.0,
        allowed=guard.budget,
        drift_prevails=drift_prevails(problem),
    )


def _gain(problem: Problem, everyone: Flow, budget: float, seed: int) -> float:
    """By how much a step of the flow over all samples, nobody forgotten, lowers the retained loss.

    Nats; 0 where that loss is below the budget, infinite where there is no such step. The gradient
    alone does not tell where the loss is still high: its sampling variance is, too.
    """
    objective, split = problem.objective, problem.split
    samples = some(split.retain, JUDGED, seed)
    before = objective.mean_loss(split.batches(samples), objective.start)
    if not before > budget:
        return 0.0
    try:
        ahead = P.add(objective.start, everyone.solve(1 / AHEAD).x)
        after = objective.mean_loss(split.batches(samples), ahead)
    except (CurvatureError, NumericalError):
        return math.inf
    return before - after if math.isfinite(after) else math.inf


def _cleared(
    problem: Problem, guard: Guard, shown: Indices, budget: float | None
) -> tuple[tuple[int, ...], Params, Guard]:
    """Absent classes whose output rows can start at zero, the weights then, and their guard.

    A class fewer to tell apart is no reason to lose anything: from there on the held-out loss may
    not rise above what it was before, unless a budget is given.
    """
    start = problem.objective.start
    absent = absent_classes(problem.sums.total, problem.retained)
    if not absent:
        return (), start, guard
    probe = np.union1d(guard.held_out.samples[:PROBED], shown[:PROBED])
    cleared = clear_rows(problem.objective, problem.split, probe, absent)
    if cleared is None:
        return (), start, guard
    look = guard.held_out.look(cleared)
    by_loss = replace(guard, count_moves=False)
    if not by_loss.fits(look):
        return (), start, guard
    if budget is None:
        by_loss = replace(by_loss, budget=max(0.0, look.loss - guard.best.loss))
    return absent, cleared, by_loss
