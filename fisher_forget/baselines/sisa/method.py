"""SISA as a method to compare: an ensemble of its own, trained once, that forgets exactly
(arXiv:1912.03817)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.retrain import Init, Train, fresh
from fisher_forget.baselines.sisa.aggregate import Aggregate
from fisher_forget.baselines.sisa.ensemble import SISA
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError


@dataclass(frozen=True)
class Sharded:
    """Shards are trained on all samples, and then those that are hit by the forget set are trained
    again.

    What comes out is SISA's own ensemble, not the given model, which gives its architecture alone.
    The time is that of forgetting; training the shards, which comes before any request, is not
    counted.

    Attributes:
        train: How a model is trained: (fresh model, training data set, indices, seed) -> trained
            model.
        init: Makes an untrained model; by default the modules' own `reset_parameters`.
        shards: S.
        slices: R.
        seed: Of the cut and of the training.
    """

    name: ClassVar[str] = "sisa"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {}

    train: Train | None = None
    init: Init | None = None
    shards: int = 5
    slices: int = 1
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched. `passes` is NaN: the epochs of
        `train` are not known.

        Raises:
            ConfigError: If `train` is missing.
        """
        if self.train is None:
            raise ConfigError(
                "no train", "the function that trains a shard", "Pass train=, see `SISA`."
            )
        every = np.sort(split.indices("all"))
        samples: Dataset[Any] = Subset(split.base, every.tolist())
        build = partial(_build, model, self.init)
        sisa = SISA(
            build,
            partial(_train, self.train, split.base, every),
            shards=self.shards,
            slices=self.slices,
            seed=self.seed,
        )
        sisa.fit(samples)
        begun = time.perf_counter()
        sisa.forget(np.searchsorted(every, split.forget))
        return Unlearned(sisa.module(), time.perf_counter() - begun, float("nan"))

    def template(self, model: nn.Module) -> nn.Module:
        """What `unlearn` returns for this model, with other weights, where no shard is left
        empty."""
        members: Sequence[nn.Module] = [
            fresh(model, self.seed, self.init) for _ in range(self.shards)
        ]
        return Aggregate(members, [1] * self.shards)


def _build(model: nn.Module, init: Init | None) -> nn.Module:
    return fresh(model, torch.initial_seed(), init)  # SISA sets the global seed, shard by shard


def _train(
    train: Train,
    base: Dataset[Any],
    every: Indices,
    model: nn.Module,
    _data: Dataset[Any],
    rows: Indices,
    seed: int,
) -> nn.Module:
    """Rows of the samples of a split, as rows of the data set below them, which the user's function
    knows."""
    return train(model, base, every[rows], seed)
