r"""Fine-tuning on the retained samples with an l1 penalty that fades out.

    w <- w - lr grad [L_r(w) + alpha_t |w|_1 + (wd / 2) |w|^2]
    alpha_t = alpha (1 - t / T),  t = 0 ... T - 1

with L_r the mean loss of a batch of D_r, T = epochs - free and no penalty in the last `free`
epochs. Jia et al. 2023, "l1-sparse MU" (arXiv:2304.04934): sparse models forget more easily, and a
penalty that decreases costs least accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.baselines.base import SgdMethod, Training
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import Epoch, Loss, each, require
from fisher_forget.data.batches import Batch


@dataclass(frozen=True, kw_only=True)
class L1Sparse(SgdMethod):
    """Fine-tuning with a fading l1 penalty.

    Attributes:
        alpha: Penalty of the first epoch, nats per unit of |w|_1.
        free: Last epochs without penalty.

    Raises:
        ConfigError: If alpha or free is out of range.
    """

    name = "l1-sparse"
    grid: ClassVar[Grid] = {"lr": Range(1e-4, 0.1), "alpha": Range(1e-6, 1e-2)}

    alpha: float = 5e-4
    free: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        free = (0 <= self.free <= self.epochs, f"a number of epochs from 0 to {self.epochs}")
        require(self, at_least={"alpha": 0}, free=free)

    def losses(self, training: Training) -> Epoch:
        def epoch(number: int, rng: np.random.Generator) -> Iterator[Loss]:
            # alpha_t = alpha (1 - t / T), which the last `free` epochs are without
            penalised = self.epochs - self.free
            alpha = self.alpha * (1 - number / penalised) if number < penalised else 0.0

            def loss(model: nn.Module, batch: Batch) -> Tensor:
                l1 = torch.stack([p.abs().sum() for p in P.trainable(model).values()]).sum()
                return training.mean_loss(model, batch) + alpha * l1

            return each(training.batches(training.split.retain, rng), loss)

        return epoch
