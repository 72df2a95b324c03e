r"""Fine-tuning: go on training on the retained samples alone, and hope to forget the others.

    w <- w - lr (grad of the mean loss of a batch of D_r + wd w)

The baseline of Golatkar et al. 2020 (arXiv:1911.04933): 10 epochs at lr 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fisher_forget.baselines.base import SgdMethod, Training
from fisher_forget.baselines.protocol import Grid
from fisher_forget.baselines.training_loop import Epoch


@dataclass(frozen=True, kw_only=True)
class FineTune(SgdMethod):
    """Fine-tuning on D_r.

    Attributes:
        weight_decay: L2 coefficient.
    """

    name = "finetune"
    grid: ClassVar[Grid] = {"lr": (0.001, 0.01, 0.05), "epochs": (2, 5, 10)}

    weight_decay: float = 0.0

    def losses(self, training: Training) -> Epoch:
        return training.over(training.split.retain, training.mean_loss)
