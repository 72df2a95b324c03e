r"""Saliency unlearning: random labels, but only for the weights that D_f pulls at most.

    m = 1 for the share k of weights with the largest |grad of L_f(w)|, 0 for the others
    w <- w - lr m (grad of the loss with random labels on D_f, own labels on D_r, + wd w)

Fan et al. 2024, SalUn (arXiv:2310.12508). `SalUn` is the public code as it is now: the gradient is
taken at the given weights, in eval mode, over all of D_f; every epoch goes through D_f and then
D_r; masked weights stay where they are.

`SalUn2023` is the code as first released, which results until 2024 come from. It steps the model
uphill between the batches of D_f whose gradients it sums, and keeps the *smallest* sums; D_f and
D_r are mixed; the mask does not hold the weight decay off, so that masked weights shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fisher_forget import params as P
from fisher_forget.baselines.base import Training
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.random_labels import RandomLabels, Relabelling, labelled, mixed
from fisher_forget.baselines.training_loop import Descent, Epoch, require
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
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.1), "share": Range(0.1, 1.0, log=False)}

    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, share=(0 < self.share <= 1, "a share above 0, at most 1"))

    def mask(self, training: Training) -> Params:
        likelihood = labelled(training.likelihood, self.name)
        training.count(len(training.split.forget))  # the gradient on D_f
        return saliency(training.model, training.split, likelihood, self.share)


@dataclass(frozen=True, kw_only=True)
class SalUn2023(SalUn):
    """SalUn as first released: the least salient weights, while all of them decay.

    Attributes:
        mask_lr: Learning rate of the steps between the batches of the mask's gradient.
    """

    name = "salun-2023"
    grid: ClassVar[Grid] = {"lr": Range(1e-2, 1.0), "share": Range(0.1, 1.0, log=False)}

    lr: float = 0.1
    mask_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, above={"mask_lr": 0})

    def descent(self) -> Descent:
        return replace(super().descent(), masked_decay=True)

    def losses(self, training: Training) -> Epoch:
        draw = Relabelling.of(training, self.name)
        # the epoch's number is part of the key: other labels in every epoch
        return lambda number, rng: mixed(training, draw, rng, (self.seed, number))

    def mask(self, training: Training) -> Params:
        objective = Objective(training.model, labelled(training.likelihood, self.name))
        at = objective.start
        sums = velocity = P.zeros_like(at)
        rng = np.random.default_rng(self.seed)
        for batch in training.batches(training.split.forget, rng):
            training.count(len(batch))
            gradient = objective.gradient([batch], at).mean()
            sums = P.add(sums, gradient)
            # SGD on minus the loss, with momentum and weight decay
            push = P.add(P.scale(at, self.weight_decay), gradient, -1)
            velocity = P.add(push, velocity, self.momentum)
            at = P.add(at, velocity, -self.mask_lr)
        return ranked(sums, self.share, largest=False)


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
    return ranked(gradient, share)


def ranked(gradient: Params, share: float, *, largest: bool = True) -> Params:
    """1 for exactly this share of the weights, over all layers together, those of the largest or
    smallest |gradient|; 0 for others."""
    size = P.flatten(gradient).abs()
    kept = torch.topk(size, max(1, round(share * len(size))), largest=largest).indices
    return P.unflatten(torch.zeros_like(size).index_fill_(0, kept, 1.0), gradient)
