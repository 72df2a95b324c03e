"""The weights on their way along the flow, sub-step by sub-step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util.progress import bar
from fisher_forget.data.split import Indices
from fisher_forget.errors import CurvatureError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.flow import Flow
from fisher_forget.unlearn.newton.guard import HALVINGS, Guard, divergences
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import Problem

STILL = 0.02  # of the whole motion of the forget set's predictions: a sub-step below ends the flow
DAMPINGS = tuple(10.0 ** (-k / 2) for k in range(13))  # 1 ... 1e-6, for damping="auto" with steps


@dataclass(frozen=True)
class SubStep:
    """One backward-Euler step.

    Attributes:
        damping: tau = 1 / time, nats per squared unit of weight.
        iterations: Conjugate-gradient products; 0 where the curvature was inverted directly.
        residual: Relative residual of the linear system.
        share: How much of the solution was taken: less than 1 where all of it left the budget.
        norm: Length of what was taken.
        loss: Mean loss on the held-out retained samples afterwards, nats (NaN where none are).
        shift: Mean of KL(best || after) of their predictions, where their loss rose, and 0
            elsewhere, nats; best is the place with the lowest loss on the way here.
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


class Path:
    """The weights on their way along the flow.

    Args:
        problem: Losses and data.
        flow: Of the retained objective.
        guard: What a step may cost.
        start: Where the way begins.
        shown: Forget samples whose predictions are looked at.
    """

    def __init__(
        self, problem: Problem, flow: Flow, guard: Guard, start: Params, shown: Indices
    ) -> None:
        self.flow, self.guard, self.at = flow, guard, start
        self.steps: list[SubStep] = []
        self._objective = problem.objective
        self._shown = list(problem.split.batches(shown))
        self._first = self._last = self._outputs(start)

    def follow(self, times: tuple[float, ...], options: ForgetOptions, progress: bool) -> None:
        """All sub-steps that the options ask for, over these times where they leave it open.

        Raises:
            NumericalError: If a given damping leads to values that are not finite.
        """
        if options.steps != "auto":
            self._repeat(options.steps, options.damping, progress)
            return
        if options.damping != "auto":
            times = (1 / options.damping,) * len(times)
        for turn, time_step in enumerate(bar(times, len(times), "Newton", progress), 1):
            taken = self.advance(1 / time_step, HALVINGS)
            if not taken or self.steps[-1].share < 1:
                return  # a step that was shortened is the last: the next would be, too
            whole = self._moved(self._first, self._last)
            if turn >= 3 and self.steps[-1].moved <= STILL * whole:
                return  # the forget set's predictions stand still

    def _repeat(self, steps: int, damping: float | Literal["auto"], progress: bool) -> None:
        """A given number of sub-steps, at one damping."""
        tau = self.smallest_damping(progress) if damping == "auto" else float(damping)
        for _ in range(0 if tau is None else steps):
            if not self.advance(tau or 0.0) and damping != "auto":
                got = f"a Newton step at damping {tau:g} that left the finite numbers"
                fix = "Use a larger damping, or damping='auto'."
                raise NumericalError(got, "finite weights and losses", fix)

    def advance(self, tau: float, halvings: int = 0, *, trial: bool = False) -> bool:
        """One sub-step from the current weights; they move only if it fits, and is no trial.

        Returns:
            Whether it fits.
        """
        nan = math.nan
        try:
            solution = self.flow.solve(tau)
        except (CurvatureError, NumericalError):
            if self.flow.solver.literal:
                raise
            self.steps.append(SubStep(tau, 0, math.inf, 0.0, nan, nan, nan, nan, accepted=False))
            return False
        look = self.guard.longest(self.at, solution.x, halvings)
        fits, moved = self.guard.fits(look), nan
        try:
            outputs = self._outputs(look.at)
            moved = self._moved(self._last, outputs)
        except NumericalError:
            fits = False
        self.steps.append(
            SubStep(
                damping=tau,
                iterations=solution.iterations,
                residual=solution.residual,
                share=look.share,
                norm=look.share * P.norm(solution.x),
                loss=look.loss,
                shift=self.guard.shift(look),
                moved=moved,
                accepted=fits and not trial,
            )
        )
        if fits and not trial:
            self.at, self._last, self.guard = look.at, outputs, self.guard.passed(look)
            self.flow.move(self.at)
        return fits

    def smallest_damping(self, progress: bool) -> float | None:
        """The smallest of `DAMPINGS`, on the way down, whose step fits; `None` if there is none."""
        best = None
        for tau in bar(DAMPINGS, len(DAMPINGS), "damping", progress):
            if self.advance(tau, trial=True):
                best = tau
            elif best is not None or not math.isnan(self.steps[-1].norm):
                break
        return best

    def _outputs(self, at: Params) -> list[Tensor]:
        return [f for f, _ in self._objective.forward(self._shown, at)]

    def _moved(self, before: list[Tensor], after: list[Tensor]) -> float:
        """Mean KL(before || after) of the forget set's predictions, nats."""
        return float(divergences(self._objective, before, after).mean()) if before else 0.0
