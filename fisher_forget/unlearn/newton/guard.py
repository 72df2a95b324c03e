"""The guard: weights must keep the loss and the predictions of held-out retained samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

SHARE = 0.1  # of the held-out loss by which it may rise, if no budget is given
HALVINGS = 7  # of a step that leaves the budget, at most
LEAST = 0.01  # nats by which it may rise in any case


@dataclass(frozen=True)
class Look:
    """Held-out loss and outputs at candidate weights.

    Attributes:
        at: The weights.
        share: Of the step that led there.
        loss: Mean loss, nats; NaN where numbers overflow, or nobody is held out.
        outputs: Of the held-out samples, batch by batch.
        losses: Of each of them, nats.
    """

    at: Params
    share: float
    loss: float
    outputs: list[Tensor] = field(default_factory=list, repr=False)
    losses: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)


@dataclass(frozen=True)
class HeldOut:
    """Held-out retained samples, and the model on them.

    Attributes:
        objective: Losses.
        split: Data.
        samples: Their indices; none where a damping was given, and nothing is guarded.
    """

    objective: Objective
    split: Split
    samples: Indices

    def look(self, at: Params, share: float = 1.0) -> Look:
        """Loss and outputs at some weights."""
        unknown = Look(at, share, math.nan)
        if not len(self.samples) or not P.finite(at):
            return unknown
        try:
            pairs = list(self.objective.forward(self.split.batches(self.samples), at))
        except NumericalError:
            return unknown
        likelihood = self.objective.likelihood
        losses = torch.cat([likelihood.losses(f, y).double() for f, y in pairs])
        positions = sum(float(likelihood.counts(y).double().sum()) for _, y in pairs)
        return Look(at, share, float(losses.sum()) / positions, [f for f, _ in pairs], losses)


@dataclass(frozen=True)
class Guard:
    """What the weights may cost the held-out samples.

    Attributes:
        held_out: The samples.
        best: The place with the lowest held-out loss on the way.
        budget: Allowed rise of the loss above that, moves to the worse added, nats.
        count_moves: Whether moves to the worse count: a loss that falls on most samples hides what
            the others lose, such as a class that is pushed down as a whole.
    """

    held_out: HeldOut
    best: Look
    budget: float
    count_moves: bool = True

    @classmethod
    def at(cls, held_out: HeldOut, start: Params, budget: float | None) -> Self:
        """The guard at the start; its budget is max(0.01, 10 % of the loss) if none is given."""
        look = held_out.look(start)
        return cls(held_out, look, max(LEAST, SHARE * look.loss) if budget is None else budget)

    def shift(self, look: Look) -> float:
        """KL(best || there) of predictions whose own loss is higher there, mean over all, nats."""
        if math.isnan(look.loss):
            return math.nan
        moved = divergences(self.held_out.objective, self.best.outputs, look.outputs)
        return float((moved * (look.losses > self.best.losses)).mean())

    def fits(self, look: Look) -> bool:
        """Whether the weights may go there."""
        if not len(self.held_out.samples):
            return P.finite(look.at)
        shift = self.shift(look) if self.count_moves else 0.0
        return look.loss + shift <= self.best.loss + self.budget

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


def divergences(objective: Objective, before: list[Tensor], after: list[Tensor]) -> Tensor:
    """KL(before || after) of every sample of two lists of outputs, nats: [samples]."""
    pairs = zip(before, after, strict=True)
    return torch.cat([objective.likelihood.kl(p, q) for p, q in pairs])
