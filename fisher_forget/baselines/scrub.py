r"""SCRUB: a student leaves its teacher, the given model, on the forgotten samples and follows it on
the retained ones.

    max step, batch of D_f:   w <- w + lr grad KL_T(w0 || w)
    min step, batch of D_r:   w <- w - lr grad [gamma L_r(w) + alpha KL_T(w0 || w)]

with KL_T = T^2 KL(teacher / T || student / T), nats per scored position, and L_r the mean loss.
Every epoch has a pass of max steps over D_f, as long as it is among the first `max_epochs`, and
then one of min steps over D_r; one optimizer serves both. Kurmanji et al. 2023 (arXiv:2302.09880).
The defaults are those of their small-scale experiments; the large-scale ones are alpha 0.001, gamma
0.99, temperature 4, max_epochs 2, SGD, 3 epochs. Some versions in circulation give the optimizer
the teacher's weights, so that the student never moves.

KL and its gradient vanish where student and teacher agree: without dropout, BatchNorm and weight
decay, the first pass over D_f does nothing. Their SCRUB+R, which goes back to the checkpoint whose
error on D_f matches that on held-out samples, is not here: held-out samples are no part of a split.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.training_loop import (
    Descent,
    Loss,
    checked,
    descend,
    distillation,
    each,
    mean_of,
    outputs_of,
    require,
    shuffled,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood, resolve_likelihood


@dataclass(frozen=True)
class Scrub:
    """SCRUB.

    Attributes:
        epochs: Passes over D_r.
        max_epochs: How many of them begin with a pass over D_f.
        alpha: Weight of the KL on D_r.
        gamma: Weight of the loss on D_r.
        temperature: T.
        lr: Learning rate.
        batch_size: Samples per min step.
        forget_batch_size: Samples per max step.
        weight_decay: L2 coefficient.
        optimizer: "adam" or "sgd", whose momentum is 0.9.
        milestones: Epochs, counted from 0, from which on the learning rate is a tenth of what it
            was.
        likelihood: Name or instance.
        seed: Of the order of the samples.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: ClassVar[str] = "scrub"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "lr": (1e-4, 5e-4, 2e-3),
        "alpha": (0.1, 0.5),
        "max_epochs": (1, 3),
    }

    epochs: int = 10
    max_epochs: int = 3
    alpha: float = 0.5
    gamma: float = 1.0
    temperature: float = 2.0
    lr: float = 5e-4
    batch_size: int = 128
    forget_batch_size: int = 32
    weight_decay: float = 0.1
    optimizer: Literal["sgd", "adam"] = "adam"
    milestones: tuple[int, ...] = (5, 8, 9)
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("max_epochs", self.max_epochs, self.max_epochs >= 0, "a number of at least 0")
        require("alpha", self.alpha, self.alpha >= 0, "a weight of at least 0")
        require("gamma", self.gamma, self.gamma >= 0, "a weight of at least 0")
        require("temperature", self.temperature, self.temperature > 0, "a temperature above 0")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)
        teacher = copy.deepcopy(model).eval()

        def taught(batch: Batch) -> Tensor:
            with torch.no_grad():
                return outputs_of(teacher, batch)

        def leave(student: nn.Module, batch: Batch) -> Tensor:
            outputs, targets = checked(student, likelihood, batch)
            return -distillation(likelihood, taught(batch), outputs, targets, self.temperature)

        def follow(student: nn.Module, batch: Batch) -> Tensor:
            outputs, targets = checked(student, likelihood, batch)
            kl = distillation(likelihood, taught(batch), outputs, targets, self.temperature)
            return self.gamma * mean_of(likelihood, outputs, targets) + self.alpha * kl

        def epoch(number: int, rng: np.random.Generator) -> Iterator[Loss]:
            if number < self.max_epochs:
                yield from each(shuffled(split, split.forget, self.forget_batch_size, rng), leave)
            yield from each(shuffled(split, split.retain, self.batch_size, rng), follow)

        settings = Descent(
            self.epochs,
            self.lr,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            milestones=self.milestones,
        )
        found = descend(model, settings, epoch, seed=self.seed)
        samples = self.epochs * len(split.retain) + min(self.epochs, self.max_epochs) * len(
            split.forget
        )
        return Unlearned(
            found, time.perf_counter() - begun, samples * (1 + 1 / 3) / len(split.retain)
        )
