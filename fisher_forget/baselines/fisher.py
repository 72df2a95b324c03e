"""Fisher forgetting as a method to compare: the package's own `forget`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fisher_forget._util.checks import check_model
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import seeded
from fisher_forget.baselines.base import Method
from fisher_forget.baselines.meter import metered
from fisher_forget.data.split import Split
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.options import ForgetOptions


@dataclass(frozen=True)
class FisherForget(ForgetOptions, Method):
    """`fisher_forget.forget`; every field is its option of that name, with its default.

    For comparisons, which are to be repeatable: the noise is drawn from `seed`, so that whoever
    knows the seed can take it away again. What is released must come from `forget` itself.
    """

    name = "fisher-forget"  # no grid: its defaults need no tuning

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        check_model(model)
        twin, work = metered(model)
        # an instance is taken at its word
        own = None if isinstance(self.likelihood, str) else self.likelihood.mean_loss
        public = seeded(self.seed)
        result = forget(
            twin, split, split.forget, self, loss_fn=own, progress=False, generator=public
        )
        clean = copy_model(model)  # without the meter
        clean.load_state_dict(result.model.state_dict())
        clean.zero_grad(set_to_none=True)
        return clean, work[0]
