r"""Relabelling: go on training with wrong labels for the forgotten samples.

    w <- w - lr grad of the mean cross-entropy of D_r with its labels and of D_f with random ones

`RandomLabels` draws from all C classes, anew in every epoch, and goes through D_f before D_r: the
baseline of Golatkar et al. 2020 (arXiv:1911.04933) as Fan et al. 2024 (arXiv:2310.12508) run it.
`Amnesiac` draws once from the C - 1 other classes, and mixes both sets: the relabelling of Graves
et al. 2021 (arXiv:2010.10981, "unlearning"), which comparisons since Chundawat et al. 2023 list
under the name of that paper. Its other method takes the recorded updates of the batches that held
forgotten samples off the weights, which needs a log of the training run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from fisher_forget import params as P
from fisher_forget.baselines.base import SgdMethod, Training, TrainingMethod, first_outputs
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import Epoch, Loss, each, numbered
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Categorical, Likelihood


@dataclass(frozen=True, kw_only=True)
class RandomLabels(SgdMethod):
    """Labels from all classes, drawn anew in every epoch; D_f, then D_r.

    Raises:
        ConfigError: In `unlearn`, if the likelihood is not categorical.
    """

    name = "random-labels"
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.1), "epochs": Range(1, 20, whole=True)}

    lr: float = 0.013
    batch_size: int = 256

    def losses(self, training: Training) -> Epoch:
        draw = Relabelling.of(training, self.name)

        def epoch(number: int, rng: np.random.Generator) -> Iterator[Loss]:
            split = training.split
            forgotten = numbered(split, split.forget, self.batch_size, rng)
            # the epoch's number is part of the key: other labels in every epoch
            wrong = (draw(batch, rows, (self.seed, number)) for rows, batch in forgotten)
            for batches in (wrong, training.batches(split.retain, rng)):
                yield from each(batches, training.mean_loss)

        return epoch


@dataclass(frozen=True, kw_only=True)
class Amnesiac(TrainingMethod):
    """Labels from the other classes, drawn once; D_f and D_r mixed.

    Raises:
        ConfigError: In `unlearn`, if the likelihood is not categorical.
    """

    name = "amnesiac"
    grid: ClassVar[Grid] = {"lr": Range(1e-5, 1e-2), "epochs": Range(1, 10, whole=True)}

    epochs: int = 3
    lr: float = 1e-4

    def losses(self, training: Training) -> Epoch:
        draw = replace(Relabelling.of(training, self.name), least=1)

        return lambda _, rng: mixed(training, draw, rng, (self.seed,))


def mixed(
    training: Training, draw: Relabelling, rng: np.random.Generator, key: tuple[int, ...]
) -> Iterator[Loss]:
    """An epoch over D_f, with the wrong labels of this key, and D_r in the same batches."""
    everyone = training.split.indices("all")
    batches = numbered(training.split, everyone, training.batch_size, rng)
    return each((draw(batch, rows, key) for rows, batch in batches), training.mean_loss)


def labelled(likelihood: Likelihood, method: str) -> Categorical:
    """The likelihood, if its targets are classes.

    Raises:
        ConfigError: If they are not.
    """
    if not isinstance(likelihood, Categorical):
        got = f"{method} with the {likelihood.name} likelihood"
        fix = "Choose a method that needs no labels to draw, such as bad-teacher or neggrad+."
        raise ConfigError(got, "a categorical one: a wrong label is drawn from classes", fix)
    return likelihood


@dataclass(frozen=True)
class Relabelling:
    """Label (y + k) mod C at scored positions of forgotten samples, k uniform on least ... C - 1.

    Attributes:
        forget: Indices of the forgotten samples.
        classes: C.
        likelihood: Says which positions are scored.
        least: 0 draws from all classes, 1 from the others.
    """

    forget: Indices
    classes: int
    likelihood: Categorical
    least: int = 0

    @classmethod
    def of(cls, training: Training, method: str) -> Relabelling:
        """From all classes of the model's outputs: one sample is looked at, and its target checked.

        Raises:
            ConfigError: If the likelihood is not categorical.
        """
        likelihood, network = labelled(training.likelihood, method), P.load(training.model, {})
        outputs = first_outputs(network.eval(), training.split, likelihood)
        return cls(training.split.forget, likelihood.rows(outputs).shape[-1], likelihood)

    def __call__(self, batch: Batch, rows: Indices, key: tuple[int, ...]) -> Batch:
        """The batch with wrong labels.

        Args:
            batch: Targets are classes [B, ...] or probabilities [B, ..., C], which become one-hot.
            rows: Index of every sample [B]: with the key, it fixes the sample's draw in any batch.
            key: Non-negative seeds.
        """
        targets = batch.targets
        soft = targets.is_floating_point()
        dim = self.likelihood.class_dim or -1
        labels = targets.argmax(dim) if soft else targets
        wrong = np.isin(rows, self.forget)
        shifts = torch.zeros(labels.shape, dtype=torch.long)
        highest = max(self.classes, self.least + 1)
        # a generator for each sample: its label does not depend on the batch that it is in
        for at in np.flatnonzero(wrong):
            rng = np.random.default_rng((*key, int(rows[at])))
            shifts[at] = torch.as_tensor(rng.integers(self.least, highest, labels.shape[1:]))
        # (y + k) mod C with k >= 1 is uniform on the other classes
        moved = (labels + shifts.to(labels.device)) % self.classes
        if soft:
            moved = F.one_hot(moved, self.classes).movedim(-1, dim).to(targets.dtype)
        else:
            moved = moved.where(targets != self.likelihood.ignore_index, targets)
        among = torch.from_numpy(wrong).to(targets.device).view(-1, *[1] * (targets.dim() - 1))
        return replace(batch, targets=moved.where(among, targets))
