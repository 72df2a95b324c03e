"""The guard: what the weights may cost the retained samples, on the way and at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.batch_norm import statistics_at
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.self_check import RISE, RISE_SHARE
from fisher_forget.unlearn.weight_decay import WeightDecay

BUDGET = 0.1  # nats by which the held-out loss may rise on the way: a mere safety
HALVINGS = 7  # of a step that is not to be taken whole, at most
ROUNDING = 1e-6  # of the loss, by which rounding may raise what is descended
ERRORS = 2.0  # standard errors that are no doubt


@dataclass(frozen=True)
class Look:
    """Held-out losses at candidate weights.

    Attributes:
        at: The weights.
        share: Of the step that led there.
        loss: Mean loss, nats; NaN where numbers overflow, or nobody is held out.
        losses: Of each sample, summed over its positions, nats: [held out].
        positions: Scored positions of all.
    """

    at: Params
    share: float
    loss: float
    losses: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    positions: float = 1.0


@dataclass(frozen=True)
class HeldOut:
    """Held-out retained samples, and the model on them.

    Attributes:
        objective: Losses.
        split: Data.
        samples: Their indices; none where a damping was given, and nothing is guarded.
        kept: Norm layers that keep their running statistics. The others are looked at with those
            that these samples have at the weights, as the result will have its own.
    """

    objective: Objective
    split: Split
    samples: Indices
    kept: Sequence[str] = ()

    def look(self, at: Params, share: float = 1.0) -> Look:
        """Losses at some weights."""
        unknown = Look(at, share, math.nan)
        if not len(self.samples) or not P.finite(at):
            return unknown
        try:
            losses, counts = self.objective.losses_and_counts(self.batches(), self.refreshed(at))
        except NumericalError:
            return unknown
        positions = float(counts.sum())
        return Look(at, share, float(losses.sum()) / positions, losses, positions)

    def refreshed(self, at: Params) -> Params:
        """The weights, and the running statistics that these samples have there."""
        model = self.objective.model
        return {**at, **statistics_at(model, at, self.split, self.samples, self.kept)}

    def batches(self) -> Iterable[Batch]:
        """Their batches."""
        return self.split.batches(self.samples)


@dataclass(frozen=True)
class Descent:
    r"""What the flow descends, up to a constant, as some retained samples see it.

    Where the force at w_0 is F that is phi(w) = L_r(w) + (wd/2) |w - w_0|^2 + (F - grad L_r(w_0))^T
    w. With the mean loss L_s of the samples for L_r, its change from w_0 to w_0 + delta is

        L_s(w_0 + delta) - L_s(w_0) + (F - grad L_s(w_0) + (wd/2) delta)^T delta.

    Attributes:
        samples: The samples, and the model on them.
        start: Their losses at w_0.
        gradient: grad L_s(w_0).
        force: F.
        weight_decay: wd.
        all: Whether these are all that L_r is of.
    """

    samples: HeldOut
    start: Look
    gradient: Params
    force: Params
    weight_decay: WeightDecay
    all: bool

    def change(self, there: Look) -> float:
        """Of phi from the start, nats; NaN where numbers overflow."""
        delta = P.add(there.at, self.start.at, -1)
        slope = P.add(P.add(self.force, self.gradient, -1), P.scale(delta, 0.5), self.weight_decay)
        return there.loss - self.start.loss + P.dot(slope, delta)

    def failed(self, at: Params, *, settled: bool) -> bool:
        """Whether the samples lose more than max(`RISE` nats, `RISE_SHARE` of their loss), or phi
        is above its start where the model was at a minimum; beyond doubt, if they are some only."""
        there = self.samples.look(at)
        change = there.losses - self.start.losses
        doubt = ROUNDING * self.start.loss
        if not self.all and len(change) > 1:
            doubt += ERRORS * float(change.std()) * len(change) ** 0.5 / there.positions
        allowed = max(RISE, RISE_SHARE * self.start.loss)
        lost = not there.loss - self.start.loss <= allowed + doubt  # NaN is
        return lost or (settled and not self.change(there) <= doubt)


@dataclass(frozen=True)
class Guard:
    """Whether the weights may go somewhere.

    Attributes:
        held_out: The samples.
        best: The place with the lowest held-out loss on the way.
        budget: Allowed rise of the loss above that, moves to the worse added, nats.
    """

    held_out: HeldOut
    best: Look
    budget: float

    @classmethod
    def at(cls, held_out: HeldOut, start: Params, budget: float | None) -> Self:
        """The guard at the start."""
        look = held_out.look(start)
        return cls(held_out, look, BUDGET if budget is None else budget)

    def shift(self, look: Look) -> float:
        """By how much the losses rise that rise, mean over all, nats: a loss that falls on most
        samples hides what the others lose, such as a class that is pushed down as a whole."""
        if math.isnan(look.loss):
            return math.nan
        rises = (look.losses - self.best.losses).clamp(min=0)
        return float(rises.sum()) / self.best.positions

    def fits(self, look: Look) -> bool:
        """Whether the weights may go there."""
        if not len(self.held_out.samples):
            return P.finite(look.at)
        return look.loss + self.shift(look) <= self.best.loss + self.budget

    def passed(self, look: Look) -> Self:
        """The guard after the weights have gone there."""
        return replace(self, best=look) if look.loss < self.best.loss else self

    def longest(self, start: Params, delta: Params, halvings: int) -> Look:
        """The largest share of a step that fits, to a quarter of itself.

        2^-halvings, which does not fit, if there is none.
        """
        for k in range(halvings + 1):
            look = self.held_out.look(P.add(start, delta, 0.5**k), 0.5**k)
            if not self.fits(look):
                continue
            # between this share, which fits, and its double, which does not
            for more in (0.5, 0.25) if k else ():
                share = look.share + more * 0.5**k
                further = self.held_out.look(P.add(start, delta, share), share)
                look = further if self.fits(further) else look
            break
        return look
