r"""Bad teaching: learn from the given model on D_r, and from an untrained one on D_f.

    w <- w - lr grad mean over a batch of D_f and part of D_r of KL_T(teacher || student)

with the untrained teacher for samples of D_f, the given model for those of D_r, and KL_T = T^2 KL(.
/ T || . / T), nats per scored position. Chundawat et al. 2023 (arXiv:2205.08096). The public code
averages over classes, too, which divides the loss by C; Adam does not feel that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget._util.copies import copy_model
from fisher_forget.baselines.base import Training, TrainingMethod
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.retrain import Init, fresh
from fisher_forget.baselines.training_loop import Epoch, Loss, distillation, numbered, require
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, some


@dataclass(frozen=True, kw_only=True)
class BadTeacher(TrainingMethod):
    """Distillation from an untrained model on D_f and from the given one on D_r.

    Attributes:
        share: Of D_r that is used, drawn once.
        temperature: T.
        init: Makes the untrained teacher; by default the modules' own `reset_parameters`.

    Raises:
        ConfigError: If share or temperature is out of range.
        ModelError: In `unlearn`, if the model has layers that cannot be reset.
    """

    name = "bad-teacher"
    grid: ClassVar[Grid] = {
        "lr": Range(1e-5, 1e-2),
        "epochs": Range(1, 10, whole=True),
        "share": Range(0.1, 1.0),
    }

    epochs: int = 1
    share: float = 0.3
    temperature: float = 1.0
    lr: float = 1e-4
    batch_size: int = 256
    init: Init | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = (0 < self.share <= 1, "a share above 0, at most 1")
        require(self, above={"temperature": 0}, share=share)

    def losses(self, training: Training) -> Epoch:
        split = training.split
        good = copy_model(training.model).eval()
        bad = fresh(training.model, self.seed, self.init).eval()
        retained = some(split.retain, max(1, round(self.share * len(split.retain))), self.seed)
        used = np.union1d(retained, split.forget)  # batches mix both

        def loss(rows: Indices, batch: Batch, student: nn.Module) -> Tensor:
            batch = batch.on(student)
            outputs = training.outputs(student, batch)
            forgotten = torch.from_numpy(np.isin(rows, split.forget)).to(outputs.device)
            forgotten = forgotten.view(-1, *[1] * (outputs.dim() - 1))
            with torch.no_grad():
                # both teachers see the whole batch; each sample's own is picked from their outputs
                taught = training.outputs(bad, batch).where(
                    forgotten, training.outputs(good, batch)
                )
            likelihood = training.likelihood
            return distillation(likelihood, taught, outputs, batch.targets, self.temperature)

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            for rows, batch in numbered(split, used, self.batch_size, rng):
                yield partial(loss, rows, batch)

        return epoch
