"""The problem that Newton step and noise solve: model, data, curvature and gradient, together."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Unpack

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
from fisher_forget.unlearn.batch_norm import norm_layers
from fisher_forget.unlearn.data_sums import DataSums, take_data_sums
from fisher_forget.unlearn.objective import Gradient, Objective
from fisher_forget.unlearn.options import BatchNorm, ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.weight_decay import ReadOff, WeightDecay, by_name, read_off

TRACE = 1e-9  # of a class's target mass: what subtracting soft labels leaves
TENFOLD = 10  # samples whose mean gradient is taken, for each that is forgotten
GRADIENT_SAMPLES = 5000  # whose mean gradient stands for that of all, where it is no force itself


@dataclass(frozen=True)
class Problem:
    """Who is to be forgotten by which model, and what is known at its weights.

    Attributes:
        objective: Losses of a private copy of the model.
        split: Who is retained and forgotten; nobody forgotten is a legal control run.
        curvature: Of the mean retained loss at the original weights, without damping.
        sums: Of all samples, retained and forgotten, at the original weights.
        weight_decay: wd of the training objective, mean loss + (1/2) sum_i wd_i w_i^2: a number for
            all parameters, or one by shell pattern of names; "auto" is what the model acts like.
        training_time: T of the training, where it is known (`TrainingTime`).
        seconds: Wall time of what was computed for it.

    Raises:
        StorageError: If the sums were taken of other samples than the split has.
        ConfigError: If a pattern of the weight decay matches nothing.
    """

    objective: Objective
    split: Split
    curvature: Curvature
    sums: DataSums
    weight_decay: WeightDecay | Literal["auto"] = "auto"
    training_time: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not np.isin(self.sums.samples, self.split.indices("all")).all():
            got = f"sums over {len(self.sums.samples):,} samples for {self.split}"
            raise StorageError(got, "sums over samples of it", "Take them anew.")
        _ = self.decay  # refuses wrong patterns

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
        if options.known_decay != "auto":  # wrong patterns are refused before any work
            by_name(options.known_decay, objective.model, list(objective.start))
        options = with_solver(options, objective, split, warn=True)
        clock = time.perf_counter()
        part, kind = options.curvature_plan(split)
        curvature = curvature_of(objective, split, options, part, kind, progress=progress)
        estimated = time.perf_counter()
        # the mean's error enters the force by m / n_r: who forgets many reads them all anyway
        most = None if options.whole else max(GRADIENT_SAMPLES, TENFOLD * len(split.forget))
        sums = take_data_sums(objective, split, most, seed=options.seed, progress=progress)
        seconds = {"curvature": estimated - clock, "gradient": time.perf_counter() - estimated}
        decay, lasted = options.known_decay, options.training_time
        return cls(objective, split, curvature, sums, decay, lasted, seconds)

    @cached_property
    def found(self) -> ReadOff:
        """Which weight decay the model acts like, and how long it was trained."""
        total = self.sums.total
        return read_off(total.mean(), self.objective.start, total.loss / (total.count or 1.0))

    @cached_property
    def decay(self) -> WeightDecay:
        """wd: a number, or one by parameter name."""
        if self.weight_decay == "auto":
            return self.found.value
        return by_name(self.weight_decay, self.objective.model, list(self.objective.start))

    @property
    def positions(self) -> float:
        """Scored positions of all samples; estimated where the sums are of some of them."""
        return self.sums.total.count * len(self.split.indices("all")) / len(self.sums.samples)

    @cached_property
    def retained_positions(self) -> float:
        """Scored positions of the retained samples."""
        counts = self.objective.likelihood.counts
        forgotten = (float(counts(b.targets).sum()) for b in self.split.batches("forget"))
        return self.positions - math.fsum(forgotten)

    @property
    def whole(self) -> bool:
        """Whether the sums are of all samples."""
        return len(self.sums.samples) == len(self.split.indices("all"))

    @property
    def known(self) -> Indices:
        """Retained samples that the sums are of."""
        return np.intersect1d(self.sums.samples, self.split.retain)

    @cached_property
    def absent(self) -> tuple[int, ...]:
        """Classes that some forgotten sample is labelled with, but no retained one; none without
        classes."""
        objective, split, at = self.objective, self.split, self.objective.start
        mass, kept = objective.class_mass(split.batches("forget"), at), self.retained.classes
        if not mass.dim():
            return ()
        total = self.sums.total.classes
        none_left = kept <= TRACE * total if kept.dim() else torch.ones_like(mass, dtype=torch.bool)
        absent = ((mass > 0) & none_left).nonzero().flatten()
        if len(absent) and len(self.known) < len(split.retain):
            # the sums are of some samples: the others may have the class
            for batch in split.batches("retain"):
                if batch.targets.is_floating_point():
                    here = objective.class_mass([batch], at)[absent] > 0
                else:
                    here = torch.isin(absent, batch.targets.cpu())
                absent = absent[~here]
                if not len(absent):
                    break
        return tuple(absent.tolist())

    def kept_statistics(self, batch_norm: BatchNorm) -> tuple[str, ...]:
        """Norm layers whose running statistics are not recomputed, by what the option says."""
        layers = tuple(norm_layers(self.objective.model))
        return {"auto": self.sums.foreign, "refresh": (), "keep": layers}[batch_norm]

    @cached_property
    @isolated()
    def retained(self) -> Gradient:
        """Sums over the `known` samples: those of all less the forget set's among them."""
        gone = np.intersect1d(self.sums.samples, self.split.forget)
        forgotten = self.objective.gradient(self.split.batches(gone), self.objective.start)
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
