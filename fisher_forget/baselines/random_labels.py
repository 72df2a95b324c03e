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

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fisher_forget._util.random_state import preserved_rng
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.training_loop import (
    Descent,
    Loss,
    descend,
    each,
    mean_loss,
    numbered,
    outputs_of,
    shuffled,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Categorical, Likelihood, resolve_likelihood
from fisher_forget.params import Params


@dataclass(frozen=True)
class RandomLabels:
    """Labels from all classes, drawn anew in every epoch; D_f, then D_r.

    Attributes:
        epochs: Passes over D_f and D_r.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Categorical, by name or instance.
        seed: Of the labels and the order of the samples.

    Raises:
        ConfigError: If the likelihood is another one.
    """

    name: ClassVar[str] = "random-labels"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (0.001, 0.01, 0.05), "epochs": (2, 5, 10)}

    epochs: int = 10
    lr: float = 0.013
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        return self.masked(model, split, None)

    def masked(self, model: nn.Module, split: Split, mask: Params | None) -> Unlearned:
        """The same, with weights of mask 0 held where they are."""
        begun = time.perf_counter()
        likelihood = labelled(self.likelihood, self.name)
        classes = class_count(model, split, likelihood)

        def epoch(number: int, rng: np.random.Generator) -> Iterator[Loss]:
            forgotten = numbered(split, split.forget, self.batch_size, rng)
            wrong = (
                relabel(b, rows, split.forget, classes, likelihood, (self.seed, number))
                for rows, b in forgotten
            )
            for batches in (wrong, shuffled(split, split.retain, self.batch_size, rng)):
                yield from each(batches, lambda m, b: mean_loss(m, likelihood, b))

        settings = Descent(self.epochs, self.lr, self.momentum, self.weight_decay)
        found = descend(model, settings, epoch, seed=self.seed, mask=mask)
        return Unlearned(found, time.perf_counter() - begun, _passes(self.epochs, split))


@dataclass(frozen=True)
class Amnesiac:
    """Labels from the other classes, drawn once; D_f and D_r mixed.

    Attributes:
        epochs: Passes over D_f and D_r.
        lr: Learning rate of Adam.
        batch_size: Samples per step.
        likelihood: Categorical, by name or instance.
        seed: Of the labels and the order of the samples.

    Raises:
        ConfigError: If the likelihood is another one.
    """

    name: ClassVar[str] = "amnesiac"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (1e-4, 1e-3), "epochs": (1, 3, 10)}

    epochs: int = 3
    lr: float = 1e-4
    batch_size: int = 128
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        likelihood = labelled(self.likelihood, self.name)
        classes = class_count(model, split, likelihood)

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            mixed = numbered(split, split.indices("all"), self.batch_size, rng)
            batches = (
                relabel(b, rows, split.forget, classes, likelihood, (self.seed,), least=1)
                for rows, b in mixed
            )
            yield from each(batches, lambda m, b: mean_loss(m, likelihood, b))

        found = descend(
            model, Descent(self.epochs, self.lr, optimizer="adam"), epoch, seed=self.seed
        )
        return Unlearned(found, time.perf_counter() - begun, _passes(self.epochs, split))


def labelled(likelihood: Likelihood | str, method: str) -> Categorical:
    """The likelihood, if its targets are classes.

    Raises:
        ConfigError: If they are not.
    """
    found = resolve_likelihood(likelihood)
    if not isinstance(found, Categorical):
        raise ConfigError(
            f"{method} with the {found.name} likelihood",
            "a categorical one: a wrong label is drawn from classes",
            "Choose a method that needs no labels to draw, such as bad-teacher or neggrad+.",
        )
    return found


def class_count(model: nn.Module, split: Split, likelihood: Likelihood) -> int:
    """C, the last dimension of the outputs; one sample is looked at, and its target checked."""
    twin = copy.deepcopy(model).eval()
    with preserved_rng(), torch.no_grad():
        batch = next(split.batches(split.retain[:1]))
        outputs = outputs_of(twin, batch)
        likelihood.check(outputs, batch.on(twin).targets)
    return outputs.shape[-1]


def relabel(
    batch: Batch,
    rows: Indices,
    forget: Indices,
    classes: int,
    likelihood: Categorical,
    key: tuple[int, ...],
    least: int = 0,
) -> Batch:
    """Label (y + k) mod C at every scored position of the forgotten samples, k uniform on least ...
    C - 1.

    Args:
        batch: Targets are classes [B, ...] or probabilities [B, ..., C], which become one-hot.
        rows: Index of every sample [B]: with the key, it fixes the sample's draw, whichever batch
            it is in.
        forget: Indices of the forgotten samples.
        classes: C.
        likelihood: Says which positions are scored.
        key: Non-negative seeds.
        least: 0 draws from all classes, 1 from the others.
    """
    targets = batch.targets
    soft = targets.is_floating_point()
    labels = targets.argmax(-1) if soft else targets
    wrong = np.isin(rows, forget)
    shifts = torch.zeros(labels.shape, dtype=torch.long)
    for at in np.flatnonzero(wrong):
        drawn = np.random.default_rng((*key, int(rows[at]))).integers(
            least, max(classes, least + 1), labels.shape[1:]
        )
        shifts[at] = torch.as_tensor(drawn)
    moved = (labels + shifts.to(labels.device)) % classes
    moved = (
        F.one_hot(moved, classes).to(targets.dtype)
        if soft
        else moved.where(targets != likelihood.ignore_index, targets)
    )
    among = torch.from_numpy(wrong).to(targets.device).view(-1, *[1] * (targets.dim() - 1))
    return replace(batch, targets=moved.where(among, targets))


def _passes(epochs: int, split: Split) -> float:
    return epochs * (len(split.forget) + len(split.retain)) / len(split.retain)
