"""When to follow the flow, how far, and within which budget: decided before any step is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fisher_forget import params as P
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import Problem

# Squared gradient norm over its sampling variance; converged digits models measure 0.17 to 0.27.
STATIONARY = 0.5
# Times of the sub-steps. One of 1,000 and more can diverge alone, and 125 first is what the classes
# of digits and MNIST need before the curvature has changed.
TIMES = (125.0, 250.0, 500.0, 1000.0, 1000.0, 1000.0)
HORIZON = sum(TIMES)  # of the whole flow
DRIFTING = (60.0, 250.0, 500.0)  # where the drift is subtracted
STRICT = 0.002  # budget, nats, of a model that is still being trained: its loss need not rise


@dataclass(frozen=True)
class Signs:
    """What the original weights tell.

    Attributes:
        stationarity: |grad L_D + wd w|^2 over the sampling variance of the mean gradient.
        gain: By how much a step of the flow over all samples lowers the retained loss, nats; 0
            where that is not asked for, infinite where such a step cannot be computed.
        allowed: How much of that is nothing to speak of, nats.
        drift_prevails: Whether more of the force is drift than is owed to the forget set.
    """

    stationarity: float
    gain: float
    allowed: float
    drift_prevails: bool

    @property
    def unsettled(self) -> str:
        """Why the model is not near a minimum, in words; empty where it is."""
        ratio = f"stationarity {self.stationarity:.2g}"
        if not self.stationarity < STATIONARY:
            return f"{ratio}, {STATIONARY} expected at most"
        if self.gain <= self.allowed:
            return ""
        if math.isinf(self.gain):
            return f"a step of training on cannot be computed; {ratio} is fine"
        lower = f"training on would lower the retained loss by {self.gain:.2g} nats"
        return f"{lower}, {self.allowed:.2g} expected at most; {ratio} is fine"


@dataclass(frozen=True)
class Policy:
    """How to follow the flow.

    Attributes:
        unsettled: Why the model is not near a minimum of its training objective; empty if it is.
        remove_drift: Whether only the force that is owed to the forget set acts.
        budget: Allowed rise of the held-out loss, nats; `None` for a share of it.
    """

    unsettled: str
    remove_drift: bool
    budget: float | None

    @property
    def at_minimum(self) -> bool:
        """Whether the model is near a minimum of its training objective."""
        return not self.unsettled

    def times(self, cleared: bool) -> tuple[float, ...]:
        """Times of the sub-steps of steps="auto".

        Args:
            cleared: Output rows of absent classes start at their limit: what training has no time
                to do is done, so that one short step, or none where the model drifts, follows.
        """
        if cleared:
            return TIMES[:1] if self.at_minimum else ()
        return DRIFTING if self.remove_drift else TIMES


def decide(signs: Signs, options: ForgetOptions) -> Policy:
    """The policy for a model with these signs; an option that is given decides itself."""
    at_minimum = not signs.unsettled
    if options.drift == "auto":
        remove_drift = not at_minimum and signs.drift_prevails
    else:
        remove_drift = options.drift
    budget = options.budget
    if budget is None and (remove_drift or not at_minimum):
        budget = STRICT
    return Policy(signs.unsettled, remove_drift, budget)


def stationarity(problem: Problem) -> float:
    """|grad L_D + wd w|^2 over the sampling variance of the mean gradient; < 0.5 at a minimum."""
    force = P.add(problem.sums.total.mean(), problem.objective.start, problem.weight_decay)
    variance = problem.sums.variance_of_mean(problem.split.retain)
    return P.dot(force, force) / variance if variance > 0 else 0.0
