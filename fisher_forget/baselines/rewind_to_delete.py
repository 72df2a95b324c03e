r"""Rewind-to-delete: go K steps of gradient descent back, and the same number forward on D_r.

    w_(t-1) = w_t + lr grad L_D(w_(t-1))    K times      w <- w - lr grad L_r(w)    K times

Mu and Klabjan 2024 (arXiv:2409.09778). Backwards is their proximal point iteration, the inverse of
a step of gradient descent on all of D, for models without a checkpoint of the training. From a
checkpoint, which their code trains on as the original was, the method is `rewind` of this package.

Their Gaussian noise, which an (epsilon, delta) certificate needs, is not part of it here: its size
follows from Lipschitz constants of the loss, which nobody knows of a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fisher_forget import params as P
from fisher_forget.baselines.base import DirectMethod, PricedWeights
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require
from fisher_forget.data.split import Part, Split
from fisher_forget.errors import NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

CLOSE = 1e-3  # of the step: how exactly one backwards is solved for
TRIES = 30  # fixed-point iterations; each takes a factor lr |Hessian| off the error


@dataclass(frozen=True, kw_only=True)
class RewindToDelete(DirectMethod):
    """Rewind-to-delete without a checkpoint.

    Attributes:
        steps: K.
        lr: Of both, that of the training; below the inverse of the largest curvature.
        weight_decay: L2 coefficient of the objective.

    Raises:
        ConfigError: If a value is out of range.
        NumericalError: In `unlearn`, if a step backwards cannot be solved for at this rate.
    """

    name = "rewind-to-delete"
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.03), "steps": Range(1, 30, whole=True)}

    steps: int = 10
    lr: float = 0.01
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self, at_least={"steps": 0, "weight_decay": 0}, above={"lr": 0})

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        objective = Objective(model, likelihood)
        at, price = objective.start, 0.0

        def step(part: Part, base: Params, where: Params, sign: int) -> Params:
            """Base + sign lr (grad L(where) + wd where)."""
            nonlocal price
            price += len(split.indices(part))
            force = objective.gradient(split.batches(part), where).mean()
            return P.add(base, P.add(force, where, self.weight_decay), sign * self.lr)

        for _ in range(self.steps):
            at, reached = step("all", at, at, 1), at
            for _ in range(TRIES):
                again = step("all", reached, at, 1)
                error, at = P.norm(P.add(again, at, -1)), again
                if error <= CLOSE * P.norm(P.add(at, reached, -1)):
                    break
            else:
                got = f"a step backwards at lr={self.lr:g} that does not settle"
                raise NumericalError(got, "lr below 1 / largest curvature", "Lower lr.")
        for _ in range(self.steps):
            at = step("retain", at, at, -1)
        return at, price
