r"""Fine-tuning: go on training on the retained samples alone, and hope to forget the others.

    w <- w - lr (grad of the mean loss of a batch of D_r + wd w)

The baseline of Golatkar et al. 2020 (arXiv:1911.04933): 10 epochs at lr 0.01, without momentum, as
their public code and that of Kurmanji et al. 2023 (arXiv:2302.09880) have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fisher_forget.baselines.base import SgdMethod, Training
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import Epoch


@dataclass(frozen=True, kw_only=True)
class FineTune(SgdMethod):
    """Fine-tuning on D_r.

    Attributes:
        momentum: Of SGD.
        weight_decay: L2 coefficient.
    """

    name = "finetune"
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.5), "epochs": Range(1, 20, whole=True)}

    momentum: float = 0.0
    weight_decay: float = 0.0

    def losses(self, training: Training) -> Epoch:
        return training.over(training.split.retain, training.mean_loss)
