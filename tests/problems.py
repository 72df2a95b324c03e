"""Problems put together from their parts."""

from __future__ import annotations

from torch import nn

from fisher_forget import Categorical, Curvature, Likelihood, Problem
from fisher_forget.data.split import Split
from fisher_forget.unlearn.data_sums import take_data_sums
from fisher_forget.unlearn.objective import Objective


def problem_of(
    model: nn.Module,
    split: Split,
    curvature: Curvature,
    likelihood: Likelihood | None = None,
    weight_decay: float = 0.0,
) -> Problem:
    """A problem with a curvature of the test's own."""
    objective = Objective(model, likelihood or Categorical())
    return Problem(objective, split, curvature, take_data_sums(objective, split), weight_decay)
