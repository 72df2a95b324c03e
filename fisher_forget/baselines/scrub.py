r"""SCRUB: a student leaves its teacher, the given model, on D_f and follows it on D_r.

    max step, batch of D_f:   w <- w + lr grad KL_T(w0 || w)
    min step, batch of D_r:   w <- w - lr grad [gamma L_r(w) + alpha KL_T(w0 || w)]

with KL_T = T^2 KL(teacher / T || student / T), nats per scored position, and L_r the mean loss.
Every epoch has a pass of max steps over D_f, as long as it is among the first `max_epochs`, and
then one of min steps over D_r; one optimizer serves both. Kurmanji et al. 2023 (arXiv:2302.09880).
The defaults are those of their small-scale experiments, whose weight decay is that of the training
before; the large-scale ones are alpha 0.001, gamma 0.99, temperature 4, max_epochs 2, SGD, 3
epochs, batches of 256 and 512. Some versions in circulation give the optimizer
the teacher's weights, so that the student never moves.

KL and its gradient vanish where student and teacher agree: without dropout, BatchNorm and weight
decay, the first pass over D_f does nothing. Their SCRUB+R, which goes back to the checkpoint whose
error on D_f matches that on held-out samples, is not here: held-out samples are no part of a split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget._util.copies import copy_model
from fisher_forget.baselines.base import Training, TrainingMethod
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import (
    Descent,
    Epoch,
    Loss,
    distillation,
    each,
    require,
    shuffled,
)
from fisher_forget.data.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Scrub(TrainingMethod):
    """SCRUB.

    Attributes:
        max_epochs: How many epochs begin with a pass over D_f.
        alpha: Weight of the KL on D_r.
        gamma: Weight of the loss on D_r.
        temperature: T.
        forget_batch_size: Samples per max step.
        weight_decay: L2 coefficient.
        optimizer: "adam" or "sgd", whose momentum is 0.9.
        milestones: Epochs, counted from 0, from which on the learning rate is divided by ten.
    """

    name = "scrub"
    grid: ClassVar[Grid] = {
        "lr": Range(5e-5, 5e-3),
        "alpha": Range(1e-3, 1.0),
        "max_epochs": Range(1, 10, whole=True),
        "forget_batch_size": Range(8, 128, whole=True),
    }

    max_epochs: int = 3
    alpha: float = 0.5
    gamma: float = 1.0
    temperature: float = 2.0
    lr: float = 5e-4
    batch_size: int = 32
    forget_batch_size: int = 64
    weight_decay: float = 0.1
    optimizer: Literal["sgd", "adam"] = "adam"
    milestones: tuple[int, ...] = (5, 8, 9)

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {"alpha": 0, "gamma": 0, "weight_decay": 0}
        require(
            self,
            at_least=weights | {"max_epochs": 0, "forget_batch_size": 1},
            above={"temperature": 0},
            optimizer=(self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'"),
        )

    def descent(self) -> Descent:
        settings = replace(super().descent(), optimizer=self.optimizer)
        return replace(settings, weight_decay=self.weight_decay, milestones=self.milestones)

    def losses(self, training: Training) -> Epoch:
        split, teacher = training.split, copy_model(training.model).eval()

        def compared(student: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            """Outputs, and KL_T(w0 || w)."""
            outputs = training.outputs(student, batch)
            with torch.no_grad():
                taught = training.outputs(teacher, batch)
            likelihood, targets = training.likelihood, batch.targets
            return outputs, distillation(likelihood, taught, outputs, targets, self.temperature)

        def leave(student: nn.Module, batch: Batch) -> Tensor:
            return -compared(student, batch)[1]

        def follow(student: nn.Module, batch: Batch) -> Tensor:
            outputs, kl = compared(student, batch)
            loss = training.likelihood.mean_loss(outputs, batch.targets)
            return self.gamma * loss + self.alpha * kl

        def epoch(number: int, rng: np.random.Generator) -> Iterator[Loss]:
            # max steps first, so that the min steps mend what they did to D_r
            if number < self.max_epochs:
                forgotten = shuffled(split, split.forget, self.forget_batch_size, rng)
                yield from each(forgotten, leave)
            yield from each(training.batches(split.retain, rng), follow)

        return epoch
