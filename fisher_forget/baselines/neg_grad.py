r"""Ascent on the forgotten samples: alone (NegGrad), or against descent on the retained (NegGrad+).

    NegGrad:   w <- w + lr grad L_f(w)
    NegGrad+:  w <- w - lr grad [alpha L_r(w) - (1 - alpha) L_f(w)]

with L_f and L_r the mean losses of batches of D_f and D_r, in nats.

NegGrad is the baseline of Golatkar et al. 2020 (arXiv:1911.04933), here with the settings of Jia et
al. 2023 (arXiv:2304.04934); NegGrad+ that of Kurmanji et al. 2023 (arXiv:2302.09880), without
momentum as in their code: with it the ascent runs away, and CNNs end as a constant predictor. The
loss has no upper bound, so the distance travelled is a matter of learning rate and epochs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from fisher_forget.baselines.base import SgdMethod, Training
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import Epoch, Loss, require, shuffled
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split


@dataclass(frozen=True, kw_only=True)
class NegGrad(SgdMethod):
    """Gradient ascent on D_f.

    Attributes:
        epochs: Passes over D_f.
        lr: Learning rate.
        batch_size: Samples per step.
    """

    name = "neggrad"
    grid: ClassVar[Grid] = {"lr": Range(1e-5, 1e-2), "epochs": Range(1, 10, whole=True)}

    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 256

    def losses(self, training: Training) -> Epoch:
        # the weight decay, which is the optimizer's, still pulls towards zero
        return training.over(training.split.forget, lambda m, b: -training.mean_loss(m, b))


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(SgdMethod):
    """Descent on D_r and ascent on D_f in every step.

    An epoch is a pass over D_r; D_f is gone through again and again meanwhile.

    Attributes:
        alpha: Weight of the retained loss, in [0, 1].
        forget_batch_size: Forgotten samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
    """

    name = "neggrad+"
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.5), "alpha": Range(0.8, 0.999, log=False)}

    alpha: float = 0.95
    forget_batch_size: int = 64
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = (0 <= self.alpha <= 1, "a weight in [0, 1]")
        require(self, at_least={"forget_batch_size": 1}, alpha=alpha)

    def losses(self, training: Training) -> Epoch:
        def loss(retained: Batch, forgotten: Batch | None, model: nn.Module) -> Tensor:
            descent = self.alpha * training.mean_loss(model, retained.on(model))
            if forgotten is None:
                return descent
            return descent - (1 - self.alpha) * training.mean_loss(model, forgotten.on(model))

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            forgetting = _endless(training.split, self.forget_batch_size, rng)
            for retained in training.batches(training.split.retain, rng):
                yield partial(loss, retained, next(forgetting, None))

        return epoch


def _endless(split: Split, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches of D_f over and over, in a new order each time; none if it is empty."""
    while len(split.forget):
        yield from shuffled(split, split.forget, size, rng)
