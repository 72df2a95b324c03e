r"""How far the flow is followed, and since when each forgotten sample has been pushing.

Late in training on D the loss falls as a power of time, and so do the residuals and the curvature
that go with it. In the logarithm of time, s = ln t, the difference between training with and
without D_f then obeys an equation whose coefficients stand still,

    d delta / d s = -T (B delta + force),

with B and the force as they are at the end of the training, the time T. So what retraining would
have done is done from the given weights by the same flow, T for every e-folding of the training's
history: from the past, when the residuals came down, to the present.

*How long an e-folding is.* Training until T acts like a weight decay wd_hat (`ReadOff`), and a flow
along a direction without curvature goes as far in the time 1/(k wd_hat), k layers deep, as all its
history went. It is the median of the layers, so that weights that were drawn at random and hardly
trained, such as a large embedding's, do not count. What of the gradient is not -wd_hat w, the share
rho^2 of |grad L_D|^2, tells whether that decay is real: at a minimum nothing is left, and the flow
is followed to its end,

    time = min(1 / (4 rho^2 wd_hat), 10 / wd_hat),  in eight sub-steps.

*Since when.* A sample with the loss l had the loss L_0 of a guess before it was learnt,
1 + ln(L_0 / l) e-foldings ago. A forgotten sample's force acts that long: one that was hardly ever
learnt only at the end, one that has been known for long from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.data.split import Indices
from fisher_forget.params import Params
from fisher_forget.unlearn.problem import Problem

STEPS = 8  # sub-steps unless their number is given; e-foldings of a history that ended early
DEPTH = 4  # k: of four layers, as the networks that this was looked at with
SETTLED = 10.0  # times 1/wd, after which e^-10 of the way is left
LONGEST = 1e6  # time, where nothing holds the weights
PARTS = 4  # of a sub-step, to which it is told since when a sample pushes
TINY = 1e-30
OF_TRAINING = 1 / 2  # of a known training's time, whose rate fell to zero, is an e-folding


@dataclass(frozen=True)
class Horizon:
    """How far the flow is followed.

    Attributes:
        e_fold: Time of the flow that stands for one e-folding of the training's history.
        time: Of the whole flow, in equal sub-steps.
        settled: Whether the flow is followed to its end, since the model was at a minimum. What the
            flow descends is what retraining minimises then; else it is tilted.
        steps: Number of sub-steps.
    """

    e_fold: float
    time: float
    settled: bool = False
    steps: int = STEPS

    @classmethod
    def of(cls, problem: Problem, steps: int = STEPS) -> Horizon:
        """As the model tells it, or a training whose time is known."""
        found, known = problem.found, problem.training_time
        wd = found.typical or found.value
        if known is not None:
            e_fold = OF_TRAINING * known
        elif wd > 0:
            beside = found.beside
            e_fold = 1 / (STEPS * DEPTH * beside * wd) if beside else math.inf
        else:  # the weights would grow without end, or stand still: the loss alone tells the time
            e_fold = found.time / 2
        end = min(SETTLED / wd, LONGEST) if wd > 0 else LONGEST
        time = max(min(STEPS * e_fold, end), TINY)  # a loss of 0 tells none
        return cls(e_fold, time, STEPS * e_fold >= end, steps)

    def half(self) -> Horizon:
        """Half as far, with the same share of the history in each sub-step."""
        return replace(self, e_fold=self.e_fold / 2, time=self.time / 2)

    @property
    def times(self) -> tuple[float, ...]:
        """Of the sub-steps."""
        return (self.time / self.steps,) * self.steps

    def active(self, problem: Problem, losses: Tensor) -> Tensor:
        """In how many of the last sub-steps samples of these losses push: [N], 1 to `steps`.

        All, where the loss of a guess is not known: only classes have one.
        """
        masses = problem.sums.total.classes
        if masses.dim() == 0:
            return torch.full_like(losses, self.steps)
        shares = masses[masses > 0] / masses.sum()
        guess = float(-(shares * shares.log()).sum())
        ago = 1 + (math.log(max(guess, TINY)) - losses.clamp(min=TINY).log()).clamp(min=0)
        return (ago * self.e_fold * self.steps / self.time).clamp(1, self.steps)


@dataclass(frozen=True)
class Owed:
    r"""The force that is owed to the forget set, at the given weights.

    Of samples A it is (1/n_r) (|A| grad L_D - sum over A of grad l_n): of all of them
    grad L_r - grad L_D. Zero if nobody is forgotten.

    Attributes:
        problem: Losses and data.
        horizon: Says in how many of the last sub-steps a sample pushes.
    """

    problem: Problem
    horizon: Horizon

    def of(self, samples: Indices) -> Params:
        """Of some forgotten samples."""
        problem, at = self.problem, self.problem.objective.start
        some = problem.objective.gradient(problem.split.batches(samples), at)
        pull = P.add(P.scale(problem.sums.total.mean(), some.count), some.sums, -1)
        return P.scale(pull, 1 / problem.retained_positions)

    def all(self) -> Params:
        """Of all forgotten samples."""
        return self.of(self.problem.split.forget)

    def steps(self) -> Iterator[Params]:
        """Of those that push in each sub-step; one pass over the forget set, group by group."""
        problem, at = self.problem, self.problem.objective.start
        forget = problem.split.forget
        losses, counts = problem.objective.losses_and_counts(problem.split.batches(forget), at)
        since = self.horizon.active(problem, losses / counts.clamp(min=1.0))
        active = (since * PARTS).round().numpy() / PARTS  # few groups, each with one gradient
        force = P.zeros_like(at)
        for left in range(self.horizon.steps - 1, -1, -1):  # sub-steps that follow
            now = force
            for joins in np.unique(active[(active > left) & (active <= left + 1)]):
                pull = self.of(forget[active == joins])
                # the part of this sub-step in which the group pushes
                now, force = P.add(now, pull, float(joins) - left), P.add(force, pull)
            yield now
