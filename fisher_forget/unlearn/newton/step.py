r"""The Newton correction: weights move to where training on retained data alone would put them.

Retraining without D_f is gradient flow on the retained objective L_r(w) + (wd/2)|w|^2. The damped
Newton step (B + tau I)^-1 grad L_r *is* one backward-Euler step of that flow over the time 1/tau;
several of them follow it further (docs/newton.md). The curvature of a step is the exact GGN, solved
by conjugate gradients with the estimated curvature as preconditioner, so that the answer hardly
depends on damping; or the estimated curvature itself.

A network that is not at a minimum of its objective would go on training under this flow, whoever is
forgotten. That force, grad L_D + wd w, is subtracted throughout, so that what is left of the force
is owed to the forget set alone: the given weights are stationary by construction, an empty forget
set moves nothing, and at a minimum nothing is subtracted. How far the flow is followed is read off
the model (`horizon`). With a given number of steps and a given damping it is the textbook step, or
with drift=True the difference of two (`two_solves`).
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
from fisher_forget.unlearn.newton.flow import STRAIGHT, Flow, LinearSolver
from fisher_forget.unlearn.newton.guard import HALVINGS, Descent, Guard, HeldOut
from fisher_forget.unlearn.newton.horizon import STEPS, Horizon, Owed
from fisher_forget.unlearn.newton.path import Path, SubStep
from fisher_forget.unlearn.newton.two_solves import TwoSolves
from fisher_forget.unlearn.options import ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.problem import GRADIENT_SAMPLES, Problem, with_solver
from fisher_forget.unlearn.self_check import still_recognised
from fisher_forget.unlearn.weight_decay import WeightDecay, contradiction

HELD_OUT = 500  # retained samples that guard the steps, at most
GROWTH = 1.5  # of the sub-steps that follow while a class is known
SHOWN = 100  # forget samples whose predictions are watched


@dataclass(frozen=True)
class NewtonStep:
    """The whole correction.

    Attributes:
        params: The corrected parameters. Where noise is added to them, they are a secret: with
            them the noise is known, too.
        weight_decay: wd of the objective: as given, or read off the model.
        acts_like: wd_hat, the weight decay that the model acts like (`ReadOff`).
        contradiction: By how much a given weight decay contradicts that, in words; or empty.
        horizon: Time T that the flow is followed for.
        error: sigma_h, root-mean-square distance of a weight to where the flow still leads, by one
            more step over the whole T that the model tells (`Horizon.of`) from where it ended,

                sigma_h = |(B + (wd + 1/T) I)^-1 force| / sqrt(d),

            with the estimated curvature B. Where the loss is quadratic, and B is its matrix, this
            is the distance to the retrained weights, at most a factor 1 + 1 / (T wd) too small, and
            falls with every correction. Elsewhere it is an estimate, and no bound (docs/noise.md
            has measurements). NaN where the curvature has no such inverse.
        norm: |w_new - w|.
        gradient_norm: |force| of all the forget set at the start.
        drift_removed: Whether the force that is not owed to the forget set was subtracted.
        path: Every sub-step tried, in order.
        held_out: Number of retained samples that guard the steps.
        loss_before: Mean loss on them before, nats.
        budget: By how much it was allowed to rise above the lowest on the way, moves to the worse
            (`SubStep.shift`) added, nats.
        seconds: Wall time.
    """

    params: Params = field(repr=False)
    weight_decay: WeightDecay
    acts_like: float
    contradiction: str
    horizon: float
    error: float
    norm: float
    gradient_norm: float
    drift_removed: bool
    path: tuple[SubStep, ...]
    held_out: int
    loss_before: float
    budget: float
    seconds: float

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
    working_set: int | None = None,
    progress: bool = False,
    **changes: Unpack[ForgetKeywords],
) -> NewtonStep:
    r"""Move to where training on the retained data alone would have led.

    A sub-step solves (B(w) + (wd + tau) I) delta = -(grad L_r(w) + wd w) at the current w.

    There are eight sub-steps over a `Horizon`, or as many as are given, in which more and more of
    the forgotten samples push; with steps="auto" eight more at most, each longer than the last,
    where a class of which no sample is retained is still recognised. A flow that leaves the budget,
    under which retained samples lose more than max(0.01 nats, 10 % of their loss), or after which
    the retained objective is above its start at a minimum (`Horizon.settled`), is followed again
    for half the time. Where that has not helped seven times, or the time is given, the step that
    leaves the budget is halved until it does not, and is the last; none is taken, if the samples
    lose too much even so.

    Args:
        problem: Model, data, curvature and gradient; its `weight_decay` is that of the objective.
        options: `steps`, `damping`, `solver`, `drift`, `budget` and `seed` count here.
        *unexpected: None; a split and a curvature were arguments of version 0.1.
        working_set: Retained samples that enter the products one by one, by default as many as
            have most of the output curvature; where steps and damping are given, all do.
        progress: Show progress bars.
        **changes: Fields of `ForgetOptions` by name, over those of `options`.

    Raises:
        ConfigError: If the first argument is no `Problem`, or its gradient is over some samples
            where that of all is the force.
        NumericalError: If a given damping leads to values that are not finite.
    """
    if not isinstance(problem, Problem) or unexpected:
        got = f"newton_step of {type(problem).__name__}"
        expected = "a Problem: objective, split, curvature, data sums and weight decay"
        raise ConfigError(got, expected, "Pass Problem.of(model, loader, forget_idx, options).")
    if merged(options, changes).whole and not problem.whole:
        got = f"a gradient over {len(problem.sums.samples):,} samples"
        fix = "Pass the same options to Problem.of()."
        raise ConfigError(got, "over all, which is the force of this step", fix)
    begun = time.perf_counter()
    options = with_solver(merged(options, changes), problem.objective, problem.split)
    told = Horizon.of(problem, STEPS if options.steps == "auto" else options.steps)
    horizon, solver = told, _linear_solver(problem, options, working_set, told)
    held_out, shown = _samples(problem, options, guarded=not solver.literal)
    start, decay = problem.objective.start, problem.decay

    guard = Guard.at(held_out, start, options.budget)
    loss_before = guard.best.loss
    if options.tilted and solver.literal:
        flow: Flow = TwoSolves(problem, solver, options)
    else:
        flow = Flow(problem, problem.known, problem.retained, solver)
    force = P.add(problem.retained.mean(), start, decay)
    owed = Owed(problem, horizon) if options.tilted and not solver.literal else None
    if owed is not None:
        force = owed.all()

    if not solver.literal:
        descent = _descent(problem, held_out)
        for tries in range(HALVINGS, -1, -1):  # that are left
            flow.restart()
            path = Path(problem, flow, guard, shown)
            times = horizon.times
            if options.damping != "auto":
                times = (1 / options.damping,) * len(times)
            # the same for half the time
            forces = [force] * len(times) if owed is None else owed.steps()
            went = path.follow(times, forces, progress)
            last = not tries or options.damping != "auto"
            if path.solved and (went or last) and not _failed(descent, path.at, horizon):
                break
            path.back(start)
            went = False
            if last:
                break
            horizon = horizon.half()  # B has changed too much on the way
        if went and options.steps == "auto":
            path.outlast(
                (times[-1] * GROWTH**k for k in range(1, STEPS + 1)),
                force,
                known=lambda at: _known(problem, shown, held_out.refreshed(at)),
                failed=lambda at: _failed(descent, at, horizon),
            )
    else:
        path = Path(problem, flow, guard, shown)
        path.repeat(options)
    given = options.known_decay != "auto"
    return NewtonStep(
        params=path.at,
        weight_decay=decay,
        acts_like=problem.found.value,
        contradiction=contradiction(decay, problem.found, problem.training_time) if given else "",
        horizon=horizon.time,
        error=_error(flow, told),
        norm=P.norm(P.add(path.at, start, -1)),
        gradient_norm=P.norm(force),
        drift_removed=options.tilted,
        path=tuple(path.steps),
        held_out=len(held_out.samples),
        loss_before=loss_before,
        budget=guard.budget,
        seconds=time.perf_counter() - begun,
    )


def _descent(problem: Problem, held_out: HeldOut) -> Descent | None:
    """The retained objective, as all known samples see it where these are few."""
    if not len(held_out.samples):
        return None
    start, known = problem.objective.start, problem.known
    whole = len(known) <= GRADIENT_SAMPLES
    judges = replace(held_out, samples=known) if whole else held_out
    own = problem.retained
    if not whole:
        own = problem.objective.gradient(judges.batches(), start)
    force = P.add(problem.retained.mean(), start, problem.decay)
    return Descent(judges, judges.look(start), own.mean(), force, problem.decay, whole)


def _failed(descent: Descent | None, at: Params, horizon: Horizon) -> bool:
    """Whether the weights may not stay there; all may, where nothing is guarded."""
    return descent is not None and descent.failed(at, settled=horizon.settled)


def _known(problem: Problem, shown: Indices, at: Params) -> bool:
    """Whether a class of which no sample is retained is still recognised."""
    if not problem.absent:
        return False
    batches = problem.split.batches(shown)
    return still_recognised(problem.objective, batches, at, problem.absent) > 0


def _error(flow: Flow, horizon: Horizon) -> float:
    """sigma_h of `NewtonStep` where the flow has ended."""
    try:
        ahead = flow.still_to_go(1 / horizon.time)
    except (CurvatureError, NumericalError):
        return math.nan
    return P.norm(ahead) / math.sqrt(P.size(ahead))


def _linear_solver(
    problem: Problem, options: ForgetOptions, working_set: int | None, horizon: Horizon
) -> LinearSolver:
    whole = options.solver == "auto" and problem.curvature.whole
    direct = whole or options.solver == "direct"
    straight = STRAIGHT if options.tilted and not (options.literal or horizon.settled) else 0.0
    return LinearSolver(direct, options.literal, working_set, straight)


def _samples(problem: Problem, options: ForgetOptions, *, guarded: bool) -> tuple[HeldOut, Indices]:
    """Held-out retained samples, none where a given damping means the textbook step, which no loss
    judges; and the forget samples whose predictions are looked at."""
    split, rng = problem.split, np.random.default_rng(options.seed)
    known = problem.known
    most = HELD_OUT if guarded else 0
    chosen = some(known, most, rng)
    curved = problem.sums.spread_of(known).numpy() > 0
    if curved.any() and not curved[np.searchsorted(known, chosen)].any():
        # few targets are scored, and none of these samples'
        chosen = some(known[curved], most, rng)
    held_out = HeldOut(
        problem.objective, split, chosen, problem.kept_statistics(options.batch_norm)
    )
    return held_out, some(split.forget, SHOWN, rng)
