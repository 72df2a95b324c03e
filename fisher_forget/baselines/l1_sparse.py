r"""Fine-tuning on the retained samples with an l1 penalty that fades out.

    w <- w - lr grad [L_r(w) + alpha_t |w|_1 + (wd / 2) |w|^2]        alpha_t = alpha (1 - t / T),  t = 0 ... T - 1

with L_r the mean loss of a batch of D_r, T = epochs - free and no penalty in the last `free`
epochs. Jia et al. 2023, "l1-sparse MU" (arXiv:2304.04934): sparse models forget more easily, and a
penalty that decreases costs least accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.training_loop import (
    Descent,
    Loss,
    descend,
    each,
    mean_loss,
    require,
    shuffled,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood, resolve_likelihood


@dataclass(frozen=True)
class L1Sparse:
    """Fine-tuning with a fading l1 penalty.

    Attributes:
        epochs: Passes over D_r.
        alpha: Penalty of the first epoch, nats per unit of |w|_1.
        free: Last epochs without penalty.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Name or instance.
        seed: Of the order of the samples.

    Raises:
        ConfigError: If alpha or free is out of range.
    """

    name: ClassVar[str] = "l1-sparse"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "lr": (0.001, 0.01, 0.05),
        "alpha": (1e-5, 1e-4, 5e-4, 1e-3),
    }

    epochs: int = 10
    alpha: float = 5e-4
    free: int = 0
    lr: float = 0.01
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 <= self.alpha < float("inf"), "a penalty of at least 0")
        require(
            "free",
            self.free,
            0 <= self.free <= self.epochs,
            f"a number of epochs from 0 to {self.epochs}",
        )

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)

        def epoch(number: int, rng: np.random.Generator) -> Iterator[Loss]:
            penalised = self.epochs - self.free
            alpha = self.alpha * (1 - number / penalised) if number < penalised else 0.0

            def loss(model: nn.Module, batch: Batch) -> Tensor:
                l1 = torch.stack([p.abs().sum() for p in P.trainable(model).values()]).sum()
                return mean_loss(model, likelihood, batch) + alpha * l1

            yield from each(shuffled(split, split.retain, self.batch_size, rng), loss)

        found = descend(
            model,
            Descent(self.epochs, self.lr, self.momentum, self.weight_decay),
            epoch,
            seed=self.seed,
        )
        return Unlearned(found, time.perf_counter() - begun, float(self.epochs))
