"""The problem that Newton step and noise solve: model, data, curvature and gradient, together."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import check_model
from fisher_forget._util.isolation import isolated
from fisher_forget.curvature.double_backward import refuse_hidden
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data import batches
from fisher_forget.data.own_loss import LossFn
from fisher_forget.data.settle import settled_likelihood
from fisher_forget.data.split import Indices, Split, check_scored, resolve_split
from fisher_forget.errors import FisherForgetWarning, StorageError
from fisher_forget.likelihood import resolve_likelihood
from fisher_forget.unlearn.data_sums import DataSums, take_data_sums
from fisher_forget.unlearn.objective import Gradient, Objective
from fisher_forget.unlearn.options import ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.weight_decay import WeightDecay, by_name


@dataclass(frozen=True)
class Problem:
    """Who is to be forgotten by which model, and what is known at its weights.

    Attributes:
        objective: Losses of a private copy of the model.
        split: Who is retained and forgotten; nobody forgotten is a legal control run.
        curvature: Of the mean retained loss at the original weights, without damping.
        sums: Of all samples, retained and forgotten, at the original weights.
        weight_decay: wd of the training objective, mean loss + (1/2) sum_i wd_i w_i^2: a number for
            all parameters, or one by shell pattern of names, which becomes one by name.
        seconds: Wall time of what was computed for it.

    Raises:
        StorageError: If the sums were taken of other samples than the split has.
        ConfigError: If a pattern of the weight decay matches nothing.
    """

    objective: Objective
    split: Split
    curvature: Curvature
    sums: DataSums
    weight_decay: WeightDecay = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not np.array_equal(self.sums.samples, self.split.indices("all")):
            got = f"sums over {len(self.sums.samples):,} samples for {self.split}"
            raise StorageError(got, "sums over the same samples", "Take them anew.")
        decay = by_name(self.weight_decay, self.objective.model, list(self.objective.start))
        object.__setattr__(self, "weight_decay", decay)

    @classmethod
    @isolated()
    def of(
        cls,
        model: nn.Module,
        retain_loader: DataLoader[Any] | Dataset[Any] | Split,
        forget_idx: Sequence[int] | Indices | Tensor | range,
        options: ForgetOptions | None = None,
        *,
        unpack: batches.Unpack | None = None,
        loss_fn: LossFn | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **changes: Unpack[ForgetKeywords],
    ) -> Problem:
        """Curvature and gradient sums of a model: the first two stages of `forget`, whose arguments
        these are."""
        options = merged(options, changes)
        check_model(model)
        split = resolve_split(retain_loader, forget_idx, unpack=unpack)
        objective = objective_of(model, split, options, loss_fn, device)
        options = options.with_loss(objective.likelihood, loss_fn)
        check_scored(split, objective.likelihood)
        decay = by_name(options.decay, objective.model, list(objective.start))
        options = with_solver(options, objective, split, warn=True)
        clock = time.perf_counter()
        part, kind = options.curvature_plan(split)
        curvature = curvature_of(objective, split, options, part, kind, progress=progress)
        estimated = time.perf_counter()
        sums = take_data_sums(objective, split, seed=options.seed, progress=progress)
        seconds = {"curvature": estimated - clock, "gradient": time.perf_counter() - estimated}
        return cls(objective, split, curvature, sums, decay, seconds)

    @cached_property
    @isolated()
    def retained(self) -> Gradient:
        """Sums over the retained samples: all samples' less the forget set's."""
        forgotten = self.objective.gradient(self.split.batches("forget"), self.objective.start)
        return self.sums.total - forgotten


def objective_of(
    model: nn.Module,
    split: Split,
    options: ForgetOptions,
    loss_fn: LossFn | None,
    device: torch.device | str | None = None,
) -> Objective:
    """The objective of a private copy of the model, whose likelihood has the user's own loss."""
    likelihood = resolve_likelihood(options.likelihood)
    objective = Objective(model, likelihood, options.subset, device, options.memory)
    objective.likelihood = settled_likelihood(
        objective.model, split, options.likelihood, loss_fn, memory=options.memory
    )
    return objective


def with_solver(
    options: ForgetOptions, objective: Objective, split: Split, *, warn: bool = False
) -> ForgetOptions:
    """The options, with solver="auto" direct where products with the exact GGN can't be had.

    Which samples and columns the curvature is estimated from depends on it.

    Args:
        options: As they were given.
        objective: Of the model.
        split: The data.
        warn: Say so.

    Raises:
        CurvatureError: If solver="cg" asks for them.
    """
    if options.inverts:
        return options
    hidden = objective.hidden_from_products(split)
    if options.solver == "cg":
        refuse_hidden(hidden, "Use solver='direct', or leave it at 'auto'.")
    if not hidden:
        return options
    if warn:
        warnings.warn(
            f"The model's backward pass can't be differentiated again ({hidden}), so there are no "
            "products with the exact curvature. Newton steps invert the estimated one, of all "
            "retained samples (solver='direct').",
            FisherForgetWarning,
            stacklevel=4,
        )
    return options.changed({"solver": "direct"})


def curvature_of(
    objective: Objective,
    split: Split,
    options: ForgetOptions,
    part: Indices,
    kind: Kind,
    *,
    basis: Curvature | None = None,
    progress: bool = False,
) -> Curvature:
    """The curvature of some samples as the options ask for it; `ForgetOptions.curvature_plan` says
    which samples and kind, `basis` is that of `estimate_curvature`."""
    keywords = options.curvature_keywords(part, kind)
    keywords["basis"], keywords["progress"] = basis, progress
    return estimate_curvature(objective.tape, split, objective.likelihood, **keywords)
