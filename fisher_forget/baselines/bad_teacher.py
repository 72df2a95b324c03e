r"""Bad teaching: learn from the given model on retained samples, and from an untrained one on
forgotten ones.

    w <- w - lr grad mean over a batch of D_f and part of D_r of KL_T(teacher || student)

with the untrained teacher for samples of D_f, the given model for those of D_r, and KL_T = T^2 KL(.
/ T || . / T), nats per scored position. Chundawat et al. 2023 (arXiv:2205.08096). The public code
averages over classes, too, which divides the loss by C; Adam does not feel that.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.retrain import Init, fresh
from fisher_forget.baselines.training_loop import (
    Descent,
    Loss,
    checked,
    descend,
    distillation,
    numbered,
    outputs_of,
    require,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split, some
from fisher_forget.likelihood import Likelihood, resolve_likelihood


@dataclass(frozen=True)
class BadTeacher:
    """Distillation from an untrained model on D_f and from the given one on D_r.

    Attributes:
        epochs: Passes over D_f and the used part of D_r.
        share: Of D_r that is used, drawn once.
        temperature: T.
        lr: Learning rate of Adam.
        batch_size: Samples per step.
        init: Makes the untrained teacher; by default the modules' own `reset_parameters`.
        likelihood: Name or instance.
        seed: Of the untrained teacher, the part of D_r and the order of the samples.

    Raises:
        ConfigError: If share or temperature is out of range.
    """

    name: ClassVar[str] = "bad-teacher"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "lr": (1e-4, 1e-3, 1e-2),
        "epochs": (1, 3, 5),
        "share": (0.3, 1.0),
    }

    epochs: int = 1
    share: float = 0.3
    temperature: float = 1.0
    lr: float = 1e-4
    batch_size: int = 256
    init: Init | None = None
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("share", self.share, 0 < self.share <= 1, "a share above 0, at most 1")
        require("temperature", self.temperature, self.temperature > 0, "a temperature above 0")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched.

        Raises:
            ModelError: If the model has layers that cannot be reset.
        """
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)
        good, bad = copy.deepcopy(model).eval(), fresh(model, self.seed, self.init).eval()
        used = np.union1d(
            some(split.retain, max(1, round(self.share * len(split.retain))), self.seed),
            split.forget,
        )

        def loss(forgotten: Tensor, batch: Batch, student: nn.Module) -> Tensor:
            outputs, targets = checked(student, likelihood, batch)
            with torch.no_grad():
                among = forgotten.to(outputs.device).view(-1, *[1] * (outputs.dim() - 1))
                taught = outputs_of(bad, batch).where(among, outputs_of(good, batch))
            return distillation(likelihood, taught, outputs, targets, self.temperature)

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            for rows, batch in numbered(split, used, self.batch_size, rng):
                yield partial(loss, torch.from_numpy(np.isin(rows, split.forget)), batch)

        found = descend(
            model, Descent(self.epochs, self.lr, optimizer="adam"), epoch, seed=self.seed
        )
        passes = (
            self.epochs * len(used) * (1 + 2 / 3) / len(split.retain)
        )  # two teachers look at every sample
        return Unlearned(found, time.perf_counter() - begun, passes)
