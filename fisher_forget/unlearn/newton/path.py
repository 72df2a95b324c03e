"""The weights on their way along the flow, sub-step by sub-step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fisher_forget import params as P
from fisher_forget._util.progress import bar
from fisher_forget.data.split import Indices
from fisher_forget.errors import CurvatureError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.flow import Flow
from fisher_forget.unlearn.newton.guard import HALVINGS, Guard
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import Problem


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
        shift: By how much the losses have risen that rose, mean over all held-out samples, nats,
            above the place with the lowest mean loss on the way here.
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
        flow: Of the retained objective, at its start.
        guard: What a step may cost.
        shown: Forget samples whose predictions are looked at.

    Attributes:
        at: Where the weights are.
        steps: Every sub-step tried.
    """

    def __init__(self, problem: Problem, flow: Flow, guard: Guard, shown: Indices) -> None:
        self.flow, self.guard, self.at = flow, guard, flow.at
        self.steps: list[SubStep] = []
        self._objective = problem.objective
        self._shown = problem.objective.reader(problem.split, shown)

    @property
    def solved(self) -> bool:
        """Whether the first system had a solution: a Hessian may be indefinite over a long time."""
        return not math.isnan(self.steps[0].norm)

    def follow(self, times: Sequence[float], forces: Iterable[Params], progress: bool) -> bool:
        """Sub-steps over these times, each with its force at the original weights.

        Returns:
            Whether all were taken whole.
        """
        for time_step, force in zip(
            bar(times, len(times), "Newton", progress), forces, strict=True
        ):
            self.flow.owed = force
            if not self.advance(1 / time_step, HALVINGS) or self.steps[-1].share < 1:
                return False  # the next would leave the budget, too
        return True

    def back(self, start: Params) -> None:
        """Back to the start: none of the sub-steps is taken."""
        self.at = start
        self.flow.restart()
        self.steps = [replace(step, accepted=False) for step in self.steps]

    def outlast(
        self,
        times: Iterable[float],
        force: Params,
        *,
        known: Callable[[Params], bool],
        failed: Callable[[Params], bool],
    ) -> None:
        """More sub-steps over these times, as long as a class is known; one that fails is taken
        back, and the last."""
        for time_step in times:
            if not known(self.at):
                return
            before = self.at, self.guard
            went = self.follow([time_step], [force], progress=False)
            if self.steps[-1].accepted and failed(self.at):
                self.at, self.guard = before
                self.flow.undo()
                self.steps[-1] = replace(self.steps[-1], accepted=False)
                return
            if not went:
                return

    def repeat(self, options: ForgetOptions) -> None:
        """The textbook step, as often as asked for: a given number of sub-steps at one damping.

        Raises:
            NumericalError: If it leads to values that are not finite.
        """
        assert options.steps != "auto"
        assert options.damping != "auto"
        got = f"a Newton step at damping {options.damping} that left the finite numbers"
        fix = "Use a larger damping, or damping='auto'."
        overflow = NumericalError(got, "finite weights and losses", fix)
        for step in range(options.steps):
            try:
                fits = self.advance(options.damping)
            except NumericalError as error:
                if not step:  # at the given weights, so that no step is to blame
                    raise
                raise overflow from error
            if not fits:
                raise overflow

    def advance(self, tau: float, halvings: int = 0) -> bool:
        """One sub-step from the current weights; they move only if it fits.

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
            moved = self._moved(look.at)
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
                accepted=fits,
            )
        )
        if fits:
            self.at, self.guard = look.at, self.guard.passed(look)
            self.flow.go(look.share)
        return fits

    def _moved(self, to: Params) -> float:
        """Mean KL(here || there) of the forget set's predictions, nats."""
        moved = self._objective.divergence(self._shown(), self.at, to)
        return float(moved.mean()) if len(moved) else 0.0
