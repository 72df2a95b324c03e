r"""Ascent on the forgotten samples: alone (NegGrad), or against descent on the retained (NegGrad+).

    NegGrad:   w <- w + lr grad L_f(w)
    NegGrad+:  w <- w - lr grad [alpha L_r(w) - (1 - alpha) L_f(w)]

with L_f and L_r the mean losses of batches of D_f and D_r, in nats.

NegGrad is the baseline of Golatkar et al. 2020 (arXiv:1911.04933), here with the settings of Jia et
al. 2023 (arXiv:2304.04934); NegGrad+ that of Kurmanji et al. 2023 (arXiv:2302.09880). The loss has
no upper bound, so the distance travelled is a matter of learning rate and epochs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from fisher_forget.baselines.base import SgdMethod, Training
from fisher_forget.baselines.protocol import Grid
from fisher_forget.baselines.training_loop import Epoch, Loss, require
from fisher_forget.data.batches import Batch


@dataclass(frozen=True, kw_only=True)
class NegGrad(SgdMethod):
    """Gradient ascent on D_f.

    Attributes:
        epochs: Passes over D_f.
        lr: Learning rate.
        batch_size: Samples per step.
    """

    name = "neggrad"
    grid: ClassVar[Grid] = {"lr": (1e-5, 1e-4, 1e-3, 1e-2), "epochs": (1, 5)}

    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 256

    def losses(self, training: Training) -> Epoch:
        # the weight decay, which is the optimizer's, still pulls towards zero
        return training.over(training.split.forget, lambda m, b: -training.mean_loss(m, b))


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(SgdMethod):
    """Descent on D_r and ascent on D_f in every step.

    An epoch is a pass over D_r; D_f is gone through again and again meanwhile, in batches of the
    same size as far as it has the samples.

    Attributes:
        alpha: Weight of the retained loss, in [0, 1].
    """

    name = "neggrad+"
    grid: ClassVar[Grid] = {"lr": (0.001, 0.01), "alpha": (0.9, 0.95, 0.99, 0.999)}

    alpha: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, alpha=(0 <= self.alpha <= 1, "a weight in [0, 1]"))

    def losses(self, training: Training) -> Epoch:
        def loss(retained: Batch, forgotten: Batch | None, model: nn.Module) -> Tensor:
            descent = self.alpha * training.mean_loss(model, retained.on(model))
            if forgotten is None:
                return descent
            return descent - (1 - self.alpha) * training.mean_loss(model, forgotten.on(model))

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            forgetting = _endless(training, rng)
            for retained in training.batches(training.split.retain, rng):
                yield partial(loss, retained, next(forgetting, None))

        return epoch


def _endless(training: Training, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches of D_f over and over, in a new order each time; none if it is empty."""
    while len(training.split.forget):
        yield from training.batches(training.split.forget, rng)
