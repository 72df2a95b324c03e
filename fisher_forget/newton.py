r"""The Newton correction: weights move to where training on the retained data alone would have put them.

Retraining without D_f is gradient flow on the retained objective L_r(w) + (wd/2)|w|^2. The damped Newton step
(B + tau I)^-1 grad L_r *is* one backward-Euler step of that flow over the time 1/tau; several of them follow it
further (docs/newton.md). The curvature of a step is the exact GGN, solved by conjugate gradients with the estimated
curvature as preconditioner, so that the answer hardly depends on damping; or the estimated curvature itself.

Only retained samples with output curvature contribute to the GGN, so products run over the `working_set` of samples
with the largest tr H_n, re-chosen at every sub-step, and the estimated curvature stands for the others in proportion to
their share of tr H_n, which is next to nothing in a converged network; the gradient is computed in full once and then
updated by its change on the working set (variance reduction) and, again, by what the curvature says of the others.

A network that is not at a minimum of its objective would go on training under this flow. Where most of the force is
not owed to the forget set, that part is subtracted then, so that the flow starts with grad L_r - grad L_D, taken where
a step of the flow over *all* samples leads: it stands still for an empty forget set, equals the plain one at a minimum,
and one step is the difference of d_A and d_r in Prop. 3 of Golatkar et al. 2020 (arXiv:1911.04933).

A class that no retained sample is labelled with leaves an output row that no flow brings to its limit in time: see
`fisher_forget.absent`. It starts from there, and the flow ends after its first sub-step, or before where the network is
not at a minimum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.absent import absent_classes, clear_rows
from fisher_forget.curvature.dense import Dense
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.matrix_free import Solution, conjugate_gradient
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Indices, Split, some
from fisher_forget.errors import ConfigError, CurvatureError, NumericalError
from fisher_forget.objective import Gradient, Objective
from fisher_forget.params import Params
from fisher_forget.progress import bar
from fisher_forget.snapshot import Snapshot, take_snapshot

Solver = Literal["auto", "cg", "direct"]
Product = Callable[[Params], Params]
STATIONARY = 0.5  # squared gradient norm over its sampling variance; converged digits models measure 0.17-0.27
SAMPLED = 512  # retained samples for that variance
JUDGED = 1000  # retained samples whose loss tells whether the network would go on training
POOL = 4000  # candidates among which the working set is re-chosen
TIMES = (125.0, 250.0, 500.0, 1000.0, 1000.0, 1000.0)  # sub-steps of steps="auto"; 1000 and more can diverge alone
STILL = 0.02  # stop when a sub-step moves the forget set's predictions by less than this share of the whole motion
DAMPINGS = tuple(10.0 ** (-k / 2) for k in range(13))  # 1 ... 1e-6, for damping="auto" with a single step
HALVINGS = 7  # of a step that leaves the budget, at most
DRIFTING = (60.0, 250.0, 500.0)  # sub-steps where the drift is subtracted
STRICT = 0.002  # budget, nats, of a network that is still being trained: its loss need not rise
AHEAD = 125.0  # time of the step over all samples that leads to where the forget set's gradient is taken
PROBED = 32  # watched samples of either kind that tell which parameters are output rows
QUICK, EXACT = (10, 0.05), (200, 1e-9)  # conjugate-gradient products and tolerance: along the flow, for a given damping


@dataclass(frozen=True)
class SubStep:
    """One backward-Euler step.

    Attributes:
        damping: tau = 1 / time.
        iterations: Conjugate-gradient products; 0 where the curvature was inverted directly.
        residual: Relative residual of the linear system.
        share: How much of the solution was taken: less than 1 where all of it left the budget.
        norm: Length of what was taken.
        loss: Mean loss on the watched retained samples afterwards, nats (NaN where none are).
        shift: Mean of KL(best || after) of their predictions, where their loss rose, and 0 elsewhere, nats (NaN
            where nobody is watched); best is the place with the lowest loss on the way here.
        moved: KL(before || after) of the forget set's predictions, nats.
        accepted: Whether it stayed within the budget.
    """

    damping: float
    iterations: int
    residual: float
    share: float
    norm: float
    loss: float
    shift: float
    moved: float
    accepted: bool


@dataclass(frozen=True)
class NewtonStep:
    """The whole correction.

    Attributes:
        params: The corrected parameters.
        norm: |w_new - w|.
        gradient_norm: |grad L_r(w) + wd w| at the start.
        stationarity: |grad L_D + wd w|^2 over the sampling variance of the mean gradient, as retained samples
            have it; below 0.5 at a minimum.
        at_minimum: Whether the given model was near a minimum of its training objective: such a gradient, and (if
            steps="auto") a step of the flow over all samples that does not lower the retained loss beyond the budget.
        drift_removed: Whether the force that is not owed to the forget set was subtracted.
        absent: Classes that no retained sample is labelled with, whose output rows were set to zero.
        path: Every sub-step tried, in order.
        held_back: Number of retained samples on which the loss is watched.
        loss_before: Mean loss on them before, nats.
        budget: By how much it was allowed to rise above the lowest on the way, moves to the worse (`SubStep.shift`)
            added, nats.
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
        curvature: Estimate at the original parameters, without damping: preconditioner, or B itself.
        weight_decay: wd of the training objective, mean loss + (wd/2)|w|^2.
        steps: Number of sub-steps, or "auto": times 125 to 1,000 up to a horizon of 3,875, or 60 to 500 up to 810 where
            the drift is subtracted, fewer when the forget set's predictions stop moving; a step that leaves the budget
            is halved until it does not, and is the last. Output rows of absent classes are set to zero, with one time
            of 125 at most where there are such. 1 is the textbook step.
        damping: tau of each sub-step for a given number of steps; "auto" takes the smallest of 13 values whose first
            step stays within the budget.
        solver: "cg" on exact GGN products, "direct" inverse of `curvature`, which stays that of the start
            at every sub-step, or "auto": direct if it is dense, else cg.
        drift: Subtract the force that is not owed to the forget set; "auto" where the model is not at a minimum, and
            that force outweighs what is owed.
        budget: How far the mean loss on some retained samples may rise above the lowest on the way, plus how far the
            predictions of those move whose own loss rises (`SubStep.shift`), nats; default max(0.01, 10 % of the loss),
            0.002 where the model is not at a minimum or the drift is subtracted; after the rows of absent classes the
            mean loss may not rise at all, and moves are not counted.
        working_set: Retained samples that enter the products and the gradient's change one by one.
        snapshot: Of the same model and data, where there is one; else one is taken.
        seed: Chooses the held-back samples.
        progress: Show progress bars.

    Raises:
        NumericalError: If a given damping leads to values that are not finite.
    """
    begun = time.perf_counter()
    if steps != "auto" and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ConfigError(f"steps={steps!r}", "a positive number or 'auto'", "Pass steps=1 for the textbook step.")
    if damping != "auto" and not (isinstance(damping, (int, float)) and damping >= 0):
        raise ConfigError(f"damping={damping!r}", "a non-negative number or 'auto'", "Pass damping=1e-3, say.")
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay={weight_decay}", "a non-negative number", "Pass the one used in training.")
    direct = solver == "direct" or (solver == "auto" and isinstance(curvature, Dense))
    literal = steps != "auto" and damping != "auto"
    snapshot = snapshot or take_snapshot(objective, split, progress=progress)
    retained = snapshot.retained(split, objective.gradient(split.batches("forget"), objective.start))
    stationarity = _stationarity(snapshot, objective, split, weight_decay, seed)

    def flow(own: Split, sums: Gradient) -> _Flow:
        spread = snapshot.spread_of(own.retain)
        options: dict[str, Any] = {"direct": direct, "literal": literal, "working_set": working_set}
        return _Flow(objective, own, curvature, sums, spread, weight_decay=weight_decay, **options)

    rng = np.random.default_rng(seed)
    correction = _Correction(
        objective,
        split,
        flow(split, retained),
        held=some(split.retain, 0 if literal else min(len(split.retain) // 10, 1000), rng),
        shown=some(split.forget, 512, rng),
        budget=budget,
        progress=progress,
    )
    everyone = flow(replace(split, retain=split.indices("all"), forget=split.forget[:0]), snapshot.total)
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
        cleared = clear_rows(objective, split, np.union1d(correction.held[:PROBED], correction.shown[:PROBED]), gone)
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


def _stationarity(snapshot: Snapshot, objective: Objective, split: Split, weight_decay: float, seed: int) -> float:
    """|grad L_D + wd w|^2 over the sampling variance of the mean gradient, tr E / N.

    E is the empirical Fisher of some retained samples: the forgotten ones may be outliers, such as wrong labels, whose
    large gradients would make any model look as if it were at a minimum.
    """
    full = P.add(snapshot.total.mean(), objective.start, weight_decay)
    few = some(split.retain, SAMPLED, seed)
    fisher = estimate_curvature(
        objective.twin(), split, objective.likelihood, structure="diagonal", kind="empirical", part=few
    )
    variance = fisher.trace() / snapshot.total.count
    return P.dot(full, full) / variance if variance > 0 else 0.0


def _drifts(everyone: Gradient, retained: Gradient, at: Params, weight_decay: float) -> bool:
    """Whether the force on the weights is mostly not owed to the forget set: |grad L_D + wd w| > |grad L_r - grad L_D|.

    Args:
        everyone: Sums over all samples.
        retained: Sums over the retained ones.
        at: w.
        weight_decay: wd.
    """
    full = everyone.mean()
    return P.norm(P.add(full, at, weight_decay)) > P.norm(P.add(retained.mean(), full, -1))


class _Flow:
    """The gradient flow of the mean loss over some samples plus weight decay, followed by backward-Euler steps.

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
        self.weight_decay, self.direct, self.literal, self.working_set = weight_decay, direct, literal, working_set
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
        """Sums over some samples there minus those at the base, and of the others what the curvature says."""
        here, before = (self.objective.gradient(self.split.batches(chosen), w) for w in (at, self.base))
        change, others = here - before, self._others(chosen)
        if others:
            curved = self.curvature.power(P.add(at, self.base, -1), 1)
            change = replace(change, sums=P.add(change.sums, curved, others * self.sums.count))
        return change

    def _others(self, chosen: Indices) -> float:
        """Share of tr H_n at the start that the retained samples have that are not among some."""
        if len(chosen) == len(self.split.retain) or not self.spread.any():
            return 0.0
        return 1 - float(self.spread[np.searchsorted(self.split.retain, chosen)].sum() / self.spread.sum())

    def solve(self, tau: float) -> Solution:
        """delta of (B + (wd + tau) I) delta = -(grad L + wd w - drift), by the curvature itself or conjugate gradients.

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
            self.sums, self.base, self._restart = self.sums + self._change(self.pool, self.at), self.at, False
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
        return force, (lambda v: P.add(ggn(v), self.curvature.power(v, 1), others)) if others else ggn

    def _working_set(self) -> Indices:
        """The pool's samples with the largest output curvature at the current weights."""
        likelihood = self.objective.likelihood
        outputs = self.objective.forward(self.split.batches(self.pool), self.at)
        spread = torch.cat([likelihood.output_curvature(f, y).cpu() for f, y in outputs]).numpy()
        return np.sort(self.pool[np.argsort(-spread, kind="stable")[: self.working_set]])


@dataclass(frozen=True)
class _Look:
    """What the watched retained samples say of some weights.

    Attributes:
        at: The weights.
        share: Of the step that led there.
        loss: Mean loss, nats; NaN where numbers overflow, or nobody is watched.
        outputs: Of the watched samples.
        losses: Of each of them, nats.
    """

    at: Params
    share: float
    loss: float
    outputs: list[Tensor] = field(default_factory=list, repr=False)
    losses: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)


@dataclass
class _Correction:
    """Where the weights are, and whether they may go on.

    Attributes:
        objective: Losses.
        split: Data.
        flow: On the retained samples.
        held: Retained samples that are watched.
        shown: Forget samples whose predictions are watched.
        budget: Allowed rise of the loss on the held samples, plus moves to the worse, nats.
        progress: Show progress bars.
    """

    objective: Objective
    split: Split
    flow: _Flow
    held: Indices
    shown: Indices
    budget: float | None
    progress: bool

    def __post_init__(self) -> None:
        self.theta: Params = dict(self.objective.start)
        self.path: list[SubStep] = []
        self.moves = True
        counts = [self.objective.likelihood.counts(b.targets).double().sum() for b in self.split.batches(self.held)]
        self.positions = float(sum(counts))
        self.best = self._look(self.theta)  # on the way, by the watched loss
        self.loss_before = self.best.loss
        self.allowed = self.budget if self.budget is not None else max(0.01, 0.1 * self.loss_before)
        self.first = self.last = self._outputs(self.shown, self.theta)

    def trains_on(self, everyone: _Flow, judged: Indices) -> bool:
        """Whether a step of the flow over all samples, nobody forgotten, lowers the loss of some beyond the budget.

        The gradient alone does not tell where the loss is still high: its sampling variance is, too.
        """
        before = self.objective.mean_loss(self.split.batches(judged), self.theta)
        if not before > self.allowed:
            return False
        try:
            ahead = P.add(self.theta, everyone.solve(1 / AHEAD).x)
            after = self.objective.mean_loss(self.split.batches(judged), ahead)
        except (CurvatureError, NumericalError):
            return True
        return not after >= before - self.allowed

    def remove_drift(self, everyone: _Flow) -> None:
        r"""Leave of the force only what is owed to the forget set, at w_D where a step of the flow over all leads.

        At the start, F = grad L_r(w_D) - grad L_D(w_D) = (m/n_r) (grad L_D(w_D) - grad L_f(w_D)). Where a share s of
        the step delta over all samples is taken, which is halved like any other that leaves the budget, the step's own
        equation gives grad L_D(w_D) + wd w_D = (1 - s) (grad L_D(w) + wd w) - s tau delta. A given damping means the
        textbook step, which does not look ahead: F = grad L_r(w) - grad L_D(w).
        """
        objective, wd = self.objective, self.flow.weight_decay
        full, ahead = everyone.sums.mean(), self.theta
        try:
            delta = None if self.flow.literal else everyone.solve(1 / AHEAD).x
        except (CurvatureError, NumericalError):
            delta = None
        if delta is not None:
            found = self._shortened(delta, HALVINGS, moves=False)
            if self._fits(found, moves=False):
                total = P.add(P.scale(P.add(full, ahead, wd), 1 - found.share), delta, -found.share / AHEAD)
                full, ahead = P.add(total, found.at, -wd), found.at
        forgotten = objective.gradient(self.split.batches("forget"), ahead)
        owed = P.scale(P.add(P.scale(full, forgotten.count), forgotten.sums, -1), 1 / self.flow.sums.count)
        self.flow.drift = P.add(P.add(self.flow.sums.mean(), self.theta, wd), owed, -1)

    def clear(self, theta: Params) -> bool:
        """Start from the weights with some output rows set to zero, if the watched loss stays within the budget.

        A class fewer to tell apart is no reason to lose anything: from there on the loss may not rise above what it was
        before, unless a budget is given.
        """
        look = self._look(theta)
        if not self._fits(look, moves=False):
            return False
        if self.budget is None:
            self.allowed = max(0.0, look.loss - self.loss_before)
        self.theta = theta
        self.moves = False
        self.first = self.last = self._outputs(self.shown, theta)
        self.flow.restart(theta)
        return True

    def follow(self, times: list[float]) -> None:
        """Sub-steps, until the forget set's predictions stand still or one does not stay within the budget whole."""
        for turn, horizon in enumerate(bar(times, len(times), "Newton", self.progress), 1):
            if not self.advance(1 / horizon, halvings=HALVINGS) or self.path[-1].share < 1:
                return
            if turn >= 3 and self.path[-1].moved <= STILL * self._moved(self.first, self.last):
                return

    def advance(self, tau: float, *, halvings: int = 0, trial: bool = False) -> bool:
        """One sub-step from the current weights; they move only if it stays within the budget, and is no trial."""
        step, look, outputs = self._try(tau, halvings)
        self.path.append(replace(step, accepted=step.accepted and not trial))
        if step.accepted and not trial:
            self.theta, self.last = look.at, outputs
            if look.loss < self.best.loss:
                self.best = look
            self.flow.move(self.theta)
        return step.accepted

    def choose_damping(self) -> float | None:
        """The smallest of `DAMPINGS`, on the way down, whose step stays within the budget; `None` if there is none."""
        best = None
        for tau in bar(DAMPINGS, len(DAMPINGS), "damping", self.progress):
            if self.advance(tau, trial=True):
                best = tau
            elif best is not None or not math.isnan(self.path[-1].norm):
                break
        return best

    def _try(self, tau: float, halvings: int) -> tuple[SubStep, _Look, list[Tensor]]:
        """Solve the step and look at the retained loss and the forget set's predictions where it leads."""
        try:
            solved = self.flow.solve(tau)
        except (CurvatureError, NumericalError):
            if self.flow.literal:
                raise
            nan = math.nan
            return SubStep(tau, 0, math.inf, 0.0, nan, nan, nan, nan, False), self.best, []
        look = self._shortened(solved.x, halvings, self.moves)
        step = SubStep(
            damping=tau,
            iterations=solved.iterations,
            residual=solved.residual,
            share=look.share,
            norm=look.share * P.norm(solved.x),
            loss=look.loss,
            shift=self._shift(look),
            moved=math.nan,
            accepted=False,
        )
        try:
            outputs = self._outputs(self.shown, look.at)
        except NumericalError:
            return step, look, []
        moved, accepted = self._moved(self.last, outputs), self._fits(look, self.moves)
        return replace(step, moved=moved, accepted=accepted), look, outputs

    def _shortened(self, delta: Params, halvings: int, moves: bool) -> _Look:
        """The largest share of a step that stays within the budget, and what it leads to.

        To a quarter of itself; 2^-halvings, and out of the budget, if there is none.
        """
        for k in range(halvings + 1):
            found = self._look(P.add(self.theta, delta, 0.5**k), 0.5**k)
            if not self._fits(found, moves):
                continue
            for more in (0.5, 0.25) if k else ():
                share = found.share + more * 0.5**k
                larger = self._look(P.add(self.theta, delta, share), share)
                found = larger if self._fits(larger, moves) else found
            break
        return found

    def _look(self, at: Params, share: float = 1.0) -> _Look:
        unknown = _Look(at, share, math.nan)
        if not len(self.held) or not P.finite(at):
            return unknown
        try:
            pairs = list(self.objective.forward(self.split.batches(self.held), at))
        except NumericalError:
            return unknown
        losses = torch.cat([self.objective.likelihood.losses(f, y).double() for f, y in pairs])
        return _Look(at, share, float(losses.sum()) / self.positions, [f for f, _ in pairs], losses)

    def _shift(self, look: _Look) -> float:
        """KL(best || there) of the watched predictions whose own loss is higher there, mean over all, nats."""
        if math.isnan(look.loss):
            return math.nan
        return float((self._kl(self.best.outputs, look.outputs) * (look.losses > self.best.losses)).mean())

    def _fits(self, look: _Look, moves: bool) -> bool:
        """Whether the weights may go there; `moves` tells whether moves of predictions to the worse count.

        A loss that falls on most samples hides what the others lose: a class that is pushed down as a whole.
        """
        if not len(self.held):
            return P.finite(look.at)
        return look.loss + (self._shift(look) if moves else 0.0) <= self.best.loss + self.allowed

    def _outputs(self, samples: Indices, at: Params) -> list[Tensor]:
        return [f for f, _ in self.objective.forward(self.split.batches(samples), at)]

    def _moved(self, before: list[Tensor], after: list[Tensor]) -> float:
        """Mean KL(before || after) of two lists of outputs, nats."""
        return float(self._kl(before, after).mean()) if before else 0.0

    def _kl(self, before: list[Tensor], after: list[Tensor]) -> Tensor:
        return torch.cat([self.objective.likelihood.kl(p, q) for p, q in zip(before, after, strict=True)])
