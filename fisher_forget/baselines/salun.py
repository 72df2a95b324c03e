r"""Saliency unlearning: random labels, but only for the weights that the forgotten samples pull at
most.

    m = 1 for the share k of weights with the largest |grad of L_f(w)|, 0 for the others
    w <- w - lr m (grad of the loss with random labels on D_f, own labels on D_r, + wd w)

Fan et al. 2024, SalUn (arXiv:2310.12508). The gradient is taken at the given weights, in eval mode,
over all of D_f. A release of the public code steps the model uphill between the batches of that sum
and keeps the smallest gradients instead of the largest; both are put right here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from fisher_forget import params as P
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.random_labels import RandomLabels, labelled
from fisher_forget.baselines.training_loop import require
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective


@dataclass(frozen=True)
class SalUn:
    """Random labels on the salient weights.

    Attributes:
        share: k, share of the weights that may move, in (0, 1].
        epochs: Passes over D_f and D_r.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Categorical, by name or instance.
        seed: Of the labels and the order of the samples.

    Raises:
        ConfigError: If the share is out of range, or the likelihood another one.
    """

    name: ClassVar[str] = "salun"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "lr": (0.001, 0.013, 0.05),
        "share": (0.1, 0.3, 0.5),
    }

    share: float = 0.5
    epochs: int = 10
    lr: float = 0.013
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("share", self.share, 0 < self.share <= 1, "a share above 0, at most 1")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        mask = saliency(model, split, labelled(self.likelihood, self.name), self.share)
        relabelled = RandomLabels(
            self.epochs,
            self.lr,
            self.batch_size,
            self.momentum,
            self.weight_decay,
            self.likelihood,
            self.seed,
        )
        done = relabelled.masked(model, split, mask)
        passes = done.passes + len(split.forget) / len(split.retain)
        return replace(done, seconds=time.perf_counter() - begun, passes=passes)


def saliency(model: nn.Module, split: Split, likelihood: Likelihood, share: float) -> Params:
    """1 for the weights with the largest gradient of the loss on D_f, 0 for the others, over all
    layers together.

    Args:
        model: Its trainable parameters are looked at.
        split: D_f.
        likelihood: Gives the loss.
        share: Of ones; rounded to the nearest number of weights, at least one.
    """
    objective = Objective(model, likelihood)
    with preserved_rng():
        gradient = objective.gradient(split.batches("forget"), objective.start).sums
    size = P.flatten(gradient).abs()
    kept = torch.topk(size, max(1, round(share * len(size)))).indices
    return P.unflatten(torch.zeros_like(size).index_fill_(0, kept, 1.0), gradient)
