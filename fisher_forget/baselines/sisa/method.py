"""SISA as a method: its own ensemble, trained once, forgets exactly (arXiv:1912.03817)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from fisher_forget.baselines.base import Method
from fisher_forget.baselines.retrain import Init, Train, fresh
from fisher_forget.baselines.sisa.aggregate import Aggregate
from fisher_forget.baselines.sisa.ensemble import SISA
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError
from fisher_forget.unlearn.batch_norm import foreign_statistics


@dataclass(frozen=True)
class Sharded(Method):
    """Shards are trained on all samples, then those that the forget set hits are trained again.

    What comes out is SISA's own ensemble, not the given model, which gives its architecture alone.
    The time is that of forgetting; training the shards, which comes before any request, is not
    counted. `passes` is NaN: the epochs of `train` are not known.

    Attributes:
        train: Trains a model: (fresh model, data set, indices, seed) -> trained model.
        init: Makes an untrained model; by default the modules' own `reset_parameters`.
        shards: S.
        slices: R.
        seed: Of the cut and of the training.
        ensemble: Trained on the samples of the split, as `prepare` does it; it is copied.

    Raises:
        ConfigError: In `unlearn`, if `train` is missing.
    """

    name = "sisa"  # no grid: any S and R forget exactly

    train: Train | None = None
    init: Init | None = None
    shards: int = 5
    slices: int = 1
    ensemble: SISA | None = field(default=None, repr=False, compare=False, kw_only=True)

    def prepare(self, model: nn.Module, split: Split) -> tuple[Self, nn.Module]:
        if self.ensemble is not None:
            return replace(self, ensemble=self.ensemble.copy()), model
        if self.train is None:
            raise ConfigError(
                "no train", "the function that trains a shard", "Pass train=, see `SISA`."
            )
        members = np.sort(split.indices("all"))
        foreign = foreign_statistics(model, split)
        ensemble = SISA(
            partial(_build, model, self.init, foreign),
            partial(_train, self.train, split.base, members),
            shards=self.shards,
            slices=self.slices,
            seed=self.seed,
        )
        ensemble.fit(Subset(split.base, members.tolist()))
        return replace(self, ensemble=ensemble), model

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        assert self.ensemble is not None  # `prepare` saw to it
        members = np.sort(split.indices("all"))
        self.ensemble.forget(np.searchsorted(members, split.forget))
        return self.ensemble.module(), math.nan

    def template(self, model: nn.Module) -> nn.Module:
        """The ensemble where no shard is left empty."""
        members = [fresh(model, self.seed, self.init) for _ in range(self.shards)]
        return Aggregate(members, [1] * self.shards)


def _build(model: nn.Module, init: Init | None, foreign: tuple[str, ...]) -> nn.Module:
    # SISA sets the global seed, shard by shard
    return fresh(model, torch.initial_seed(), init, foreign=foreign)


def _train(
    train: Train,
    base: Dataset[Any],
    members: Indices,
    model: nn.Module,
    _data: Dataset[Any],
    rows: Indices,
    seed: int,
) -> nn.Module:
    """Rows of the samples of a split as rows of its data set, which the user's function knows."""
    return train(model, base, members[rows], seed)
