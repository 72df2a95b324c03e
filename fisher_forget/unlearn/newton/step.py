r"""The Newton correction: weights move to where training on the retained data alone would have put
them.

Retraining without D_f is gradient flow on the retained objective L_r(w) + (wd/2)|w|^2. The damped
Newton step (B + tau I)^-1 grad L_r *is* one backward-Euler step of that flow over the time 1/tau;
several of them follow it further (docs/newton.md). The curvature of a step is the exact GGN, solved
by conjugate gradients with the estimated curvature as preconditioner, so that the answer hardly
depends on damping; or the estimated curvature itself.

Only retained samples with output curvature contribute to the GGN, so products run over the
`working_set` of samples with the largest tr H_n, re-chosen at every sub-step, and the estimated
curvature stands for the others in proportion to their share of tr H_n, which is next to nothing in
a converged network; the gradient is computed in full once and then updated by its change on the
working set (variance reduction) and, again, by what the curvature says of the others.

A network that is not at a minimum of its objective would go on training under this flow. Where most
of the force is not owed to the forget set, that part is subtracted then, so that the flow starts
with grad L_r - grad L_D, taken where a step of the flow over *all* samples leads: it stands still
for an empty forget set, equals the plain one at a minimum, and one step is the difference of d_A
and d_r in Prop. 3 of Golatkar et al. 2020 (arXiv:1911.04933).

A class that no retained sample is labelled with leaves an output row that no flow brings to its
limit in time: see `absent_classes`. It starts from there, and the flow ends after its first
sub-step, or before where the network is not at a minimum.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fisher_forget import params as P
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.data.split import Split, some
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.data_sums import Snapshot, take_snapshot
from fisher_forget.unlearn.newton.absent_classes import absent_classes, clear_rows
from fisher_forget.unlearn.newton.flow import Flow
from fisher_forget.unlearn.newton.guard import Correction, SubStep
from fisher_forget.unlearn.objective import Gradient, Objective

Solver = Literal["auto", "cg", "direct"]
STATIONARY = 0.5  # squared gradient norm over its sampling variance; converged digits models measure 0.17-0.27
SAMPLED = 512  # retained samples for that variance
JUDGED = 1000  # retained samples whose loss tells whether the network would go on training
TIMES = (
    125.0,
    250.0,
    500.0,
    1000.0,
    1000.0,
    1000.0,
)  # sub-steps of steps="auto"; 1000 and more can diverge alone
DRIFTING = (60.0, 250.0, 500.0)  # sub-steps where the drift is subtracted
STRICT = 0.002  # budget, nats, of a network that is still being trained: its loss need not rise
PROBED = 32  # watched samples of either kind that tell which parameters are output rows


@dataclass(frozen=True)
class NewtonStep:
    """The whole correction.

    Attributes:
        params: The corrected parameters.
        norm: |w_new - w|.
        gradient_norm: |grad L_r(w) + wd w| at the start.
        stationarity: |grad L_D + wd w|^2 over the sampling variance of the mean gradient, as
            retained samples have it; below 0.5 at a minimum.
        at_minimum: Whether the given model was near a minimum of its training objective: such a
            gradient, and (if steps="auto") a step of the flow over all samples that does not lower
            the retained loss beyond the budget.
        drift_removed: Whether the force that is not owed to the forget set was subtracted.
        absent: Classes that no retained sample is labelled with, whose output rows were set to
            zero.
        path: Every sub-step tried, in order.
        held_back: Number of retained samples on which the loss is watched.
        loss_before: Mean loss on them before, nats.
        budget: By how much it was allowed to rise above the lowest on the way, moves to the worse
            (`SubStep.shift`) added, nats.
        seconds: Wall time.
    """

    params: Params
    norm: float
    gradient_norm: float
    stationarity: float
    at_minimum: bool
    drift_removed: bool
    absent: tuple[int, ...]
    path: tuple[SubStep, ...]
    held_back: int
    loss_before: float
    budget: float
    seconds: float

    @property
    def accepted(self) -> tuple[SubStep, ...]:
        """The sub-steps that were taken."""
        return tuple(s for s in self.path if s.accepted)

    @property
    def damping(self) -> float:
        """Damping of the last sub-step taken."""
        return self.accepted[-1].damping if self.accepted else math.inf


def newton_step(
    objective: Objective,
    split: Split,
    curvature: Curvature,
    *,
    weight_decay: float = 0.0,
    steps: int | Literal["auto"] = "auto",
    damping: float | Literal["auto"] = "auto",
    solver: Solver = "auto",
    drift: bool | Literal["auto"] = "auto",
    budget: float | None = None,
    working_set: int = 600,
    snapshot: Snapshot | None = None,
    seed: int = 0,
    progress: bool = False,
) -> NewtonStep:
    r"""Move to where training on the retained data alone would have led.

    A sub-step solves (B(w) + (wd + tau) I) delta = -(grad L_r(w) + wd w) at the current w.

    Args:
        objective: The model at the original parameters.
        split: Who is retained and forgotten; nobody forgotten is a legal control run.
        curvature: Estimate at the original parameters, without damping: preconditioner, or B
            itself.
        weight_decay: wd of the training objective, mean loss + (wd/2)|w|^2.
        steps: Number of sub-steps, or "auto": times 125 to 1,000 up to a horizon of 3,875, or 60 to
            500 up to 810 where the drift is subtracted, fewer when the forget set's predictions
            stop moving; a step that leaves the budget is halved until it does not, and is the last.
            Output rows of absent classes are set to zero, with one time of 125 at most where there
            are such. 1 is the textbook step.
        damping: tau of each sub-step for a given number of steps; "auto" takes the smallest of 13
            values whose first step stays within the budget.
        solver: "cg" on exact GGN products, "direct" inverse of `curvature`, which stays that of the
            start at every sub-step, or "auto": direct if it is dense, else cg.
        drift: Subtract the force that is not owed to the forget set; "auto" where the model is not
            at a minimum, and that force outweighs what is owed.
        budget: How far the mean loss on some retained samples may rise above the lowest on the way,
            plus how far the predictions of those move whose own loss rises (`SubStep.shift`), nats;
            default max(0.01, 10 % of the loss), 0.002 where the model is not at a minimum or the
            drift is subtracted; after the rows of absent classes the mean loss may not rise at all,
            and moves are not counted.
        working_set: Retained samples that enter the products and the gradient's change one by one.
        snapshot: Of the same model and data, where there is one; else one is taken.
        seed: Chooses the held-back samples.
        progress: Show progress bars.

    Raises:
        NumericalError: If a given damping leads to values that are not finite.
    """
    begun = time.perf_counter()
    if steps != "auto" and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ConfigError(
            f"steps={steps!r}", "a positive number or 'auto'", "Pass steps=1 for the textbook step."
        )
    if damping != "auto" and not (isinstance(damping, (int, float)) and damping >= 0):
        raise ConfigError(
            f"damping={damping!r}", "a non-negative number or 'auto'", "Pass damping=1e-3, say."
        )
    if not weight_decay >= 0:
        raise ConfigError(
            f"weight_decay={weight_decay}",
            "a non-negative number",
            "Pass the one used in training.",
        )
    direct = solver == "direct" or (solver == "auto" and isinstance(curvature, Dense))
    literal = steps != "auto" and damping != "auto"
    snapshot = snapshot or take_snapshot(objective, split, progress=progress)
    retained = snapshot.retained(
        split, objective.gradient(split.batches("forget"), objective.start)
    )
    stationarity = _stationarity(snapshot, objective, split, weight_decay, seed)

    def flow(own: Split, sums: Gradient) -> Flow:
        spread = snapshot.spread_of(own.retain)
        options: dict[str, Any] = {"direct": direct, "literal": literal, "working_set": working_set}
        return Flow(objective, own, curvature, sums, spread, weight_decay=weight_decay, **options)

    rng = np.random.default_rng(seed)
    correction = Correction(
        objective,
        split,
        flow(split, retained),
        held=some(split.retain, 0 if literal else min(len(split.retain) // 10, 1000), rng),
        shown=some(split.forget, 512, rng),
        budget=budget,
        progress=progress,
    )
    everyone = flow(
        replace(split, retain=split.indices("all"), forget=split.forget[:0]), snapshot.total
    )
    settled = stationarity < STATIONARY and not (
        steps == "auto" and correction.trains_on(everyone, some(split.retain, JUDGED, seed))
    )
    removed = not settled and _drifts(snapshot.total, retained, objective.start, weight_decay)
    if drift != "auto":
        removed = drift
    if budget is None and (removed or not settled):
        correction.allowed = STRICT
    absent: tuple[int, ...] = ()
    if steps == "auto" and (gone := absent_classes(snapshot.total, retained)):
        cleared = clear_rows(
            objective, split, np.union1d(correction.held[:PROBED], correction.shown[:PROBED]), gone
        )
        if cleared is not None and correction.clear(cleared):
            absent = gone
    if removed and not absent:
        correction.remove_drift(everyone)
    if steps == "auto":
        times: tuple[float, ...] = DRIFTING if removed else TIMES
        if absent:  # what training has no time to do, the row has done
            times = TIMES[:1] if settled else ()
        correction.follow(list(times) if damping == "auto" else [1 / damping] * len(times))
    else:
        tau = correction.choose_damping() if damping == "auto" else float(damping)
        for _ in range(steps if tau is not None else 0):
            if not correction.advance(tau or 0.0) and damping != "auto":
                raise NumericalError(
                    f"a Newton step at damping {tau:g} that left the finite numbers",
                    "finite weights and losses",
                    "Use a larger damping, or damping='auto'.",
                )
    return NewtonStep(
        params=correction.theta,
        norm=P.norm(P.add(correction.theta, objective.start, -1)),
        gradient_norm=P.norm(P.add(retained.mean(), objective.start, weight_decay)),
        stationarity=stationarity,
        at_minimum=settled,
        drift_removed=removed and not absent,
        absent=absent,
        path=tuple(correction.path),
        held_back=len(correction.held),
        loss_before=correction.loss_before,
        budget=correction.allowed,
        seconds=time.perf_counter() - begun,
    )


def _stationarity(
    snapshot: Snapshot, objective: Objective, split: Split, weight_decay: float, seed: int
) -> float:
    """|grad L_D + wd w|^2 over the sampling variance of the mean gradient, tr E / N.

    E is the empirical Fisher of some retained samples: the forgotten ones may be outliers, such as
    wrong labels, whose large gradients would make any model look as if it were at a minimum.
    """
    full = P.add(snapshot.total.mean(), objective.start, weight_decay)
    few = some(split.retain, SAMPLED, seed)
    fisher = estimate_curvature(
        objective.twin(),
        split,
        objective.likelihood,
        structure="diagonal",
        kind="empirical",
        part=few,
    )
    variance = fisher.trace() / snapshot.total.count
    return P.dot(full, full) / variance if variance > 0 else 0.0


def _drifts(everyone: Gradient, retained: Gradient, at: Params, weight_decay: float) -> bool:
    """Whether the force on the weights is mostly not owed to the forget set: |grad L_D + wd w| >
    |grad L_r - grad L_D|.

    Args:
        everyone: Sums over all samples.
        retained: Sums over the retained ones.
        at: w.
        weight_decay: wd.
    """
    full = everyone.mean()
    return P.norm(P.add(full, at, weight_decay)) > P.norm(P.add(retained.mean(), full, -1))
