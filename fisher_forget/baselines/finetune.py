r"""Fine-tuning: go on training on the retained samples alone, and hope that the others are
forgotten on the way.

    w <- w - lr (grad of the mean loss of a batch of D_r + wd w)

The baseline of Golatkar et al. 2020 (arXiv:1911.04933): 10 epochs at lr 0.01.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.training_loop import Descent, descend, each, mean_loss, shuffled
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood, resolve_likelihood


@dataclass(frozen=True)
class FineTune:
    """Fine-tuning on D_r.

    Attributes:
        epochs: Passes over D_r.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Name or instance.
        seed: Of the order of the samples.
    """

    name: ClassVar[str] = "finetune"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (0.001, 0.01, 0.05), "epochs": (2, 5, 10)}

    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)
        found = descend(
            model,
            Descent(self.epochs, self.lr, self.momentum, self.weight_decay),
            lambda _, rng: each(
                shuffled(split, split.retain, self.batch_size, rng),
                lambda m, b: mean_loss(m, likelihood, b),
            ),
            seed=self.seed,
        )
        return Unlearned(found, time.perf_counter() - begun, float(self.epochs))
