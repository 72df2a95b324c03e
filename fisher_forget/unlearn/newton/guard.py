"""The weights on their way along the flow, and the guards that keep them within a budget on watched
samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util.progress import bar
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import CurvatureError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.flow import Flow
from fisher_forget.unlearn.objective import Objective

STILL = 0.02  # stop when a sub-step moves the forget set's predictions by less than this share of the whole motion
DAMPINGS = tuple(
    10.0 ** (-k / 2) for k in range(13)
)  # 1 ... 1e-6, for damping="auto" with a single step
HALVINGS = 7  # of a step that leaves the budget, at most
AHEAD = 125.0  # time of the step over all samples that leads to where the forget set's gradient is taken


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
        shift: Mean of KL(best || after) of their predictions, where their loss rose, and 0
            elsewhere, nats (NaN where nobody is watched); best is the place with the lowest loss on
            the way here.
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
class Look:
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
class Correction:
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
    flow: Flow
    held: Indices
    shown: Indices
    budget: float | None
    progress: bool

    def __post_init__(self) -> None:
        self.theta: Params = dict(self.objective.start)
        self.path: list[SubStep] = []
        self.moves = True
        counts = [
            self.objective.likelihood.counts(b.targets).double().sum()
            for b in self.split.batches(self.held)
        ]
        self.positions = float(sum(counts))
        self.best = self._look(self.theta)  # on the way, by the watched loss
        self.loss_before = self.best.loss
        self.allowed = self.budget if self.budget is not None else max(0.01, 0.1 * self.loss_before)
        self.first = self.last = self._outputs(self.shown, self.theta)

    def trains_on(self, everyone: Flow, judged: Indices) -> bool:
        """Whether a step of the flow over all samples, nobody forgotten, lowers the loss of some
        beyond the budget.

        The gradient alone does not tell where the loss is still high: its sampling variance is,
        too.
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

    def remove_drift(self, everyone: Flow) -> None:
        r"""Leave of the force only what is owed to the forget set, at w_D where a step of the flow
        over all leads.

        At the start, F = grad L_r(w_D) - grad L_D(w_D) = (m/n_r) (grad L_D(w_D) - grad L_f(w_D)).
        Where a share s of the step delta over all samples is taken, which is halved like any other
        that leaves the budget, the step's own equation gives grad L_D(w_D) + wd w_D = (1 - s) (grad
        L_D(w) + wd w) - s tau delta. A given damping means the textbook step, which does not look
        ahead: F = grad L_r(w) - grad L_D(w).
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
                total = P.add(
                    P.scale(P.add(full, ahead, wd), 1 - found.share), delta, -found.share / AHEAD
                )
                full, ahead = P.add(total, found.at, -wd), found.at
        forgotten = objective.gradient(self.split.batches("forget"), ahead)
        owed = P.scale(
            P.add(P.scale(full, forgotten.count), forgotten.sums, -1), 1 / self.flow.sums.count
        )
        self.flow.drift = P.add(P.add(self.flow.sums.mean(), self.theta, wd), owed, -1)

    def clear(self, theta: Params) -> bool:
        """Start from the weights with some output rows set to zero, if the watched loss stays
        within the budget.

        A class fewer to tell apart is no reason to lose anything: from there on the loss may not
        rise above what it was before, unless a budget is given.
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
        """Sub-steps, until the forget set's predictions stand still or one does not stay within the
        budget whole."""
        for turn, horizon in enumerate(bar(times, len(times), "Newton", self.progress), 1):
            if not self.advance(1 / horizon, halvings=HALVINGS) or self.path[-1].share < 1:
                return
            if turn >= 3 and self.path[-1].moved <= STILL * self._moved(self.first, self.last):
                return

    def advance(self, tau: float, *, halvings: int = 0, trial: bool = False) -> bool:
        """One sub-step from the current weights; they move only if it stays within the budget, and
        is no trial."""
        step, look, outputs = self._try(tau, halvings)
        self.path.append(replace(step, accepted=step.accepted and not trial))
        if step.accepted and not trial:
            self.theta, self.last = look.at, outputs
            if look.loss < self.best.loss:
                self.best = look
            self.flow.move(self.theta)
        return step.accepted

    def choose_damping(self) -> float | None:
        """The smallest of `DAMPINGS`, on the way down, whose step stays within the budget; `None`
        if there is none."""
        best = None
        for tau in bar(DAMPINGS, len(DAMPINGS), "damping", self.progress):
            if self.advance(tau, trial=True):
                best = tau
            elif best is not None or not math.isnan(self.path[-1].norm):
                break
        return best

    def _try(self, tau: float, halvings: int) -> tuple[SubStep, Look, list[Tensor]]:
        """Solve the step and look at the retained loss and the forget set's predictions where it
        leads."""
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

    def _shortened(self, delta: Params, halvings: int, moves: bool) -> Look:
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

    def _look(self, at: Params, share: float = 1.0) -> Look:
        unknown = Look(at, share, math.nan)
        if not len(self.held) or not P.finite(at):
            return unknown
        try:
            pairs = list(self.objective.forward(self.split.batches(self.held), at))
        except NumericalError:
            return unknown
        losses = torch.cat([self.objective.likelihood.losses(f, y).double() for f, y in pairs])
        return Look(at, share, float(losses.sum()) / self.positions, [f for f, _ in pairs], losses)

    def _shift(self, look: Look) -> float:
        """KL(best || there) of the watched predictions whose own loss is higher there, mean over
        all, nats."""
        if math.isnan(look.loss):
            return math.nan
        return float(
            (self._kl(self.best.outputs, look.outputs) * (look.losses > self.best.losses)).mean()
        )

    def _fits(self, look: Look, moves: bool) -> bool:
        """Whether the weights may go there; `moves` tells whether moves of predictions to the worse
        count.

        A loss that falls on most samples hides what the others lose: a class that is pushed down as
        a whole.
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
        return torch.cat(
            [self.objective.likelihood.kl(p, q) for p, q in zip(before, after, strict=True)]
        )
