r"""The Newton correction: weights move to where training on the retained data alone would have put them.

Retraining without D_f is gradient flow on the retained objective L_r(w) + (wd/2)|w|^2. The damped Newton step
(B + tau I)^-1 grad L_r *is* one backward-Euler step of that flow over the time 1/tau; several of them follow it
further (docs/newton.md). The curvature of a step is the exact GGN, solved by conjugate gradients with the estimated
curvature as preconditioner, so that the answer hardly depends on damping; or the estimated curvature itself.

Only retained samples with output curvature contribute to the GGN, so products run over the `working_set` of samples
with the largest tr H_n, re-chosen at every sub-step; the gradient is computed in full once and then updated by its
change on the working set (variance reduction).

A network that is not at a minimum of its objective would go on training under this flow. Then the gradient of the
full objective at the start, g_D, is subtracted from the force: the flow of grad L_r(w) - g_D is zero for an empty
forget set and equals the plain flow at a minimum (Golatkar et al. 2020, arXiv:1911.04933, Prop. 3 has both terms).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.curvature.dense import Dense
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.matrix_free import GgnProduct, conjugate_gradient
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.objective import Objective
from fisher_forget.params import Params
from fisher_forget.progress import bar

Solver = Literal["auto", "cg", "direct"]
STATIONARY = 0.5  # squared gradient norm over its sampling variance; converged digits models measure 0.17-0.27
POOL = 4000  # candidates among which the working set is re-chosen
TIMES = (125.0, 250.0, 500.0, 1000.0, 1000.0, 1000.0)  # sub-steps of steps="auto"; 1000 and more can diverge alone
STILL = 0.02  # stop when a sub-step moves the forget set's predictions by less than this share of the whole motion
DAMPINGS = tuple(10.0 ** (-k / 2) for k in range(13))  # 1 ... 1e-6, for damping="auto" with a single step
REJECTIONS = 3
QUICK, EXACT = (10, 0.05), (200, 1e-9)  # conjugate-gradient products and tolerance: along the flow, for a given damping


@dataclass(frozen=True)
class SubStep:
    """One backward-Euler step.

    Attributes:
        damping: tau = 1 / time.
        iterations: Conjugate-gradient products; 0 where the curvature was inverted directly.
        residual: Relative residual of the linear system.
        norm: Length of the step.
        loss: Mean loss on the held-back retained samples afterwards, nats (NaN where none were held back).
        moved: KL(before || after) of the forget set's predictions, nats.
        accepted: Whether it stayed within the budget.
    """

    damping: float
    iterations: int
    residual: float
    norm: float
    loss: float
    moved: float
    accepted: bool


@dataclass(frozen=True)
class NewtonStep:
    """The whole correction.

    Attributes:
        params: The corrected parameters.
        norm: |w_new - w|.
        gradient_norm: |grad L_r(w) + wd w| at the start.
        stationarity: |grad L_D + wd w|^2 over the sampling variance of the mean gradient; below 0.5 is a minimum.
        at_minimum: Whether the given model was near a minimum of its training objective.
        drift_removed: Whether the motion without forgetting was subtracted.
        path: Every sub-step tried, in order.
        held_back: Number of retained samples held back from the curvature to watch the loss.
        loss_before: Mean loss on them before, nats.
        budget: By how much it was allowed to rise, nats.
        seconds: Wall time.
    """

    params: Params
    norm: float
    gradient_norm: float
    stationarity: float
    at_minimum: bool
    drift_removed: bool
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
        steps: Number of sub-steps, or "auto": times 125 to 1,000 up to a horizon of 3,875, fewer when the forget
            set's predictions stop moving, shortened when the held-back loss leaves the budget. 1 is the textbook step.
        damping: tau of each sub-step for a given number of steps; "auto" takes the smallest of 13 values whose first
            step stays within the budget.
        solver: "cg" on exact GGN products, "direct" inverse of `curvature`, or "auto": direct if it is dense, else cg.
        drift: Subtract the motion that happens without forgetting; "auto" where the model is not at a minimum.
        budget: How far the mean loss on held-back retained samples may rise, nats; default max(0.01, 10 % of it).
        working_set: Retained samples that enter the products and the gradient's change.
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
    chooses = steps == "auto" or damping == "auto"
    flow = _Flow(
        objective,
        split,
        curvature,
        weight_decay=weight_decay,
        direct=direct,
        literal=not chooses,
        working_set=working_set,
        seed=seed,
        progress=progress,
    )
    flow.begin(drift, budget)
    if steps == "auto":
        flow.follow(list(TIMES) if damping == "auto" else [1 / damping] * len(TIMES))
        return flow.result(time.perf_counter() - begun)
    tau = flow.choose_damping() if damping == "auto" else float(damping)
    for _ in range(steps if tau is not None else 0):
        if not flow.advance(tau or 0.0) and damping != "auto":
            raise NumericalError(
                f"a Newton step at damping {tau:g} that left the finite numbers",
                "finite weights and losses",
                "Use a larger damping, or damping='auto'.",
            )
    return flow.result(time.perf_counter() - begun)


@dataclass(frozen=True)
class _Linear:
    """The objective around the current weights: the force, and the operator of the step."""

    at: Params
    force: Params
    ggn: GgnProduct | None


class _Flow:
    """Where the weights are, and what is known about the gradient there."""

    def __init__(
        self,
        objective: Objective,
        split: Split,
        curvature: Curvature,
        *,
        weight_decay: float,
        direct: bool,
        literal: bool,
        working_set: int,
        seed: int,
        progress: bool,
    ) -> None:
        self.objective, self.split, self.curvature = objective, split, curvature
        self.weight_decay, self.direct, self.literal = weight_decay, direct, literal
        self.working_set, self.progress = working_set, progress
        self.theta: Params = dict(objective.start)
        self.path: list[SubStep] = []
        rng = np.random.default_rng(seed)
        self.held = _some(split.retain, 0 if literal else min(len(split.retain) // 10, 1000), rng)
        self.shown = _some(split.forget, 512, rng)  # forget samples whose predictions are watched
        self.sample = _some(split.indices("all"), 512, rng)  # for the gradient's sampling variance

    def begin(self, drift: bool | Literal["auto"], budget: float | None) -> None:
        """One pass over all data: the gradient in full, and where the output curvature is."""
        spread: list[Tensor] = []
        batches = bar(self.split.batches("retain"), self.split.steps("retain"), "retained gradient", self.progress)
        self.retained = self.objective.gradient(batches, self.theta, spread)
        everything = self.retained + self.objective.gradient(self.split.batches("forget"), self.theta)
        full = self._with_decay(everything.mean(), self.theta)
        self.gradient_norm = P.norm(self._with_decay(self.retained.mean(), self.theta))
        self.stationarity = self._stationarity(full, everything.count)
        self.tilted = self.stationarity >= STATIONARY if drift == "auto" else drift
        self.offset = full if self.tilted else P.zeros_like(full)
        usable = ~np.isin(self.split.retain, self.held)
        order = np.argsort(-torch.cat(spread).numpy()[usable], kind="stable")
        self.pool = self.split.retain[usable][order[: max(POOL, self.working_set)]]
        self.loss_before = self.objective.mean_loss(self.split.batches(self.held), self.theta)
        self.budget = budget if budget is not None else max(0.01, 0.1 * self.loss_before)
        self.first = self.last = self._forget_outputs(self.theta)

    def follow(self, times: list[float]) -> None:
        """Adaptive sub-steps: shortened on rejection, ended when the forget set's predictions stand still."""
        rejected = taken = 0
        for _ in bar(range(len(times)), len(times), "Newton", self.progress):
            while not self.advance(1 / times[0]):
                rejected += 1
                if rejected == REJECTIONS:
                    return
                times = [t / 4 for t in times]
            times, taken = times[1:], taken + 1
            if taken >= 3 and self.path[-1].moved <= STILL * self._moved(self.first, self.last):
                return

    def advance(self, tau: float) -> bool:
        """One sub-step from the current weights; they move only if it stays within the budget."""
        step, theta, outputs = self._try(self._linearise(), tau)
        self.path.append(step)
        if step.accepted:
            self.theta, self.last = theta, outputs
        return step.accepted

    def choose_damping(self) -> float | None:
        """The smallest of `DAMPINGS`, on the way down, whose step stays within the budget; `None` if there is none."""
        best, here = None, self._linearise()
        for tau in bar(DAMPINGS, len(DAMPINGS), "damping", self.progress):
            step, _, _ = self._try(here, tau)
            self.path.append(replace(step, accepted=False))  # a trial
            if not step.accepted:
                break
            best = tau
        return best

    def _linearise(self) -> _Linear:
        """Force grad L_r(w) + wd w - offset and GGN at the current weights."""
        moved = self.theta is not None and len(self.path) > 0
        chosen = self._working_set() if len(self.pool) > self.working_set else self.pool
        small = len(self.split.retain) <= self.working_set + len(self.held)
        if not moved:
            gradient = self.retained.mean()
        elif small:
            gradient = self.objective.gradient(self.split.batches("retain"), self.theta).mean()
        else:  # variance reduction: only samples with output curvature change their gradient
            here = self.objective.gradient(self.split.batches(chosen), self.theta)
            before = self.objective.gradient(self.split.batches(chosen), self.objective.start)
            change = P.add(here.sums, before.sums, -1)
            gradient = P.scale(P.add(self.retained.sums, change), 1 / self.retained.count)
        force = P.add(self._with_decay(gradient, self.theta), self.offset, -1)
        ggn = None
        if not self.direct:
            ggn = self.objective.ggn(self.split.batches(chosen), self.theta, self.retained.count)
        return _Linear(self.theta, force, ggn)

    def _try(self, here: _Linear, tau: float) -> tuple[SubStep, Params, list[Tensor]]:
        """Solve the step and look at the retained loss and the forget set's predictions where it leads."""
        total = tau + self.weight_decay
        damped, b = self.curvature.damped(total), P.scale(here.force, -1)
        if here.ggn is None:
            delta, iterations, residual = damped.power(b, -1), 0, 0.0
        else:
            product = here.ggn
            iterations, tolerance = EXACT if self.literal else QUICK
            solved = conjugate_gradient(
                lambda v: P.add(product(v), v, total),
                b,
                lambda r: damped.power(r, -1),
                iterations=iterations,
                tolerance=tolerance,
            )
            delta, iterations, residual = solved.x, solved.iterations, solved.residual
        theta = P.add(here.at, delta)
        loss = moved = math.nan
        outputs: list[Tensor] = []
        accepted = P.finite(theta)
        if accepted:
            try:
                loss = self.objective.mean_loss(self.split.batches(self.held), theta)
                outputs = self._forget_outputs(theta)
                moved = self._moved(self.last, outputs)
                accepted = not len(self.held) or loss <= self.loss_before + self.budget
            except NumericalError:
                accepted = False
        return SubStep(tau, iterations, residual, P.norm(delta), loss, moved, accepted), theta, outputs

    def _working_set(self) -> Indices:
        """The pool's samples with the largest output curvature at the current weights."""
        likelihood = self.objective.likelihood
        outputs = self.objective.forward(self.split.batches(self.pool), self.theta)
        spread = torch.cat([likelihood.output_curvature(f, y).cpu() for f, y in outputs]).numpy()
        return np.sort(self.pool[np.argsort(-spread, kind="stable")[: self.working_set]])

    def _with_decay(self, gradient: Params, at: Params) -> Params:
        return P.add(gradient, at, self.weight_decay)

    def _stationarity(self, full: Params, count: float) -> float:
        """|grad L_D + wd w|^2 N / tr(E), E the second moment of single-sample gradients (the empirical Fisher)."""
        fisher = estimate_curvature(
            self.objective.twin(),
            self.split,
            self.objective.likelihood,
            structure="diagonal",
            kind="empirical",
            part=self.sample,
        )
        noise = fisher.trace() / count
        return P.dot(full, full) / noise if noise > 0 else 0.0

    def _forget_outputs(self, at: Params) -> list[Tensor]:
        return [f for f, _ in self.objective.forward(self.split.batches(self.shown), at)]

    def _moved(self, before: list[Tensor], after: list[Tensor]) -> float:
        """Mean KL(before || after) on the watched forget samples, nats."""
        if not before:
            return 0.0
        kl = [self.objective.likelihood.kl(p, q) for p, q in zip(before, after, strict=True)]
        return float(torch.cat(kl).mean())

    def result(self, seconds: float) -> NewtonStep:
        """What was done."""
        return NewtonStep(
            params=self.theta,
            norm=P.norm(P.add(self.theta, self.objective.start, -1)),
            gradient_norm=self.gradient_norm,
            stationarity=self.stationarity,
            at_minimum=self.stationarity < STATIONARY,
            drift_removed=self.tilted,
            path=tuple(self.path),
            held_back=len(self.held),
            loss_before=self.loss_before,
            budget=self.budget,
            seconds=seconds,
        )


def _some(indices: Indices, few: int, rng: np.random.Generator) -> Indices:
    """At most `few` of the indices, sorted."""
    return indices if len(indices) <= few else np.sort(rng.choice(indices, few, replace=False))
