r"""Saliency unlearning: random labels, but only for the weights that D_f pulls at most.

    m = 1 for the share k of weights with the largest |grad of L_f(w)|, 0 for the others
    w <- w - lr m (grad of the loss with random labels on D_f, own labels on D_r, + wd w)

Fan et al. 2024, SalUn (arXiv:2310.12508). The gradient is taken at the given weights, in eval mode,
over all of D_f. A release of the public code steps the model uphill between the batches of that sum
and keeps the smallest gradients instead of the largest; both are put right here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fisher_forget import params as P
from fisher_forget.baselines.base import Training
from fisher_forget.baselines.protocol import Grid
from fisher_forget.baselines.random_labels import RandomLabels, labelled
from fisher_forget.baselines.training_loop import require
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective


@dataclass(frozen=True, kw_only=True)
class SalUn(RandomLabels):
    """Random labels on the salient weights.

    Attributes:
        share: k, share of the weights that may move, in (0, 1].
    """

    name = "salun"
    grid: ClassVar[Grid] = {"lr": (0.001, 0.013, 0.05), "share": (0.1, 0.3, 0.5)}

    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, share=(0 < self.share <= 1, "a share above 0, at most 1"))

    def mask(self, training: Training) -> Params:
        likelihood = labelled(training.likelihood, self.name)
        training.count(len(training.split.forget))  # the gradient on D_f
        return saliency(training.model, training.split, likelihood, self.share)


def saliency(model: nn.Module, split: Split, likelihood: Likelihood, share: float) -> Params:
    """1 for the weights with the largest gradient of the loss on D_f over all layers, 0 for others.

    Args:
        model: Its trainable parameters are looked at.
        split: D_f.
        likelihood: Gives the loss.
        share: Of ones; rounded to the nearest number of weights, at least one.
    """
    objective = Objective(model, likelihood)
    gradient = objective.gradient(split.batches("forget"), objective.start).sums
    size = P.flatten(gradient).abs()
    # exactly the share k, over all layers together
    kept = torch.topk(size, max(1, round(share * len(size)))).indices
    return P.unflatten(torch.zeros_like(size).index_fill_(0, kept, 1.0), gradient)
