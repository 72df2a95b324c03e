r"""First-order influence of training samples, with the package's own curvature.

The objective is (1/N) sum_n l_n + (wd/2)|w|^2. Without the term of sample i its minimum moves by

    dw_i = H^-1 g_i / N,    H = B + (wd + tau) I,

to first order, g_i = dl_i/dw (Koh and Liang 2017, arXiv:1703.04730), so that the mean loss of other
samples with the mean gradient g changes by g . dw_i, and the sample's own by g_i^T H^-1 g_i / N.
B is the EKFAC of the generalised Gauss-Newton matrix (Grosse et al. 2023, arXiv:2308.03296).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget import params as P
from fisher_forget._util.checks import check_model, check_names
from fisher_forget._util.isolation import isolated
from fisher_forget._util.progress import bar
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data import batches
from fisher_forget.data.own_loss import LossFn
from fisher_forget.data.split import Indices, Split, check_scored, resolve_split, some
from fisher_forget.errors import SplitError
from fisher_forget.influence.products import Readings, mean_gradient, read_gradients
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.options import ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.problem import curvature_of, objective_of
from fisher_forget.unlearn.weight_decay import (
    Decayed,
    WeightDecay,
    by_name,
    decayed,
    read_off,
)

CURVED = 2000  # samples that curvature and weight decay are estimated from, at most
DAMPING = 0.1  # of the mean eigenvalue, as in Grosse et al. 2023
TINY = 1e-30
STREAM = 0x1F  # of the draws below


class InfluenceKeywords(TypedDict, total=False):
    """Options of influence; they mean what they mean for `forget`."""

    likelihood: Likelihood | str
    loss_fn: LossFn | None
    weight_decay: WeightDecay | Literal["auto"]
    damping: float | Literal["auto"]
    max_samples: int | Literal["auto"] | None
    subset: str | tuple[str, ...] | None
    seed: int
    memory: int


def opened(
    model: nn.Module,
    data: DataLoader[Any] | Dataset[Any] | Split,
    unpack: batches.Unpack | None,
    **changes: Unpack[InfluenceKeywords],
) -> tuple[Objective, Split, ForgetOptions]:
    """The losses of a private copy of the model, the training data, and the options; checked."""
    check_names(changes, InfluenceKeywords.__annotations__)
    loss_fn = changes.pop("loss_fn", None)
    options = merged(None, cast(ForgetKeywords, changes))
    check_model(model)
    split = resolve_split(data, [], unpack=unpack, allow_empty=True)
    if len(split.retain) < 2:
        got = f"{len(split.retain)} training samples"
        raise SplitError(got, "at least two", "Pass the data that the model was trained on.")
    objective = objective_of(model, split, options, loss_fn)
    options = options.with_loss(objective.likelihood, loss_fn)
    check_scored(split, objective.likelihood)
    return objective, split, options


def drawn(indices: Indices, most: int, seed: int) -> Indices:
    """At most so many of the indices, drawn at random by a generator that is shared with no one:
    who drew the faulty samples by `default_rng(seed)` would else have drawn these."""
    return some(indices, most, np.random.default_rng([seed, STREAM]))


@dataclass(frozen=True)
class Influence:
    """What single training samples do to a model.

    Attributes:
        objective: Losses of a private copy of the model.
        split: The training data.
        metric: H.
        progress: Whether passes show a progress bar.
    """

    objective: Objective
    split: Split
    metric: Curvature
    progress: bool = False

    @classmethod
    @isolated()
    def of(
        cls,
        model: nn.Module,
        data: DataLoader[Any] | Dataset[Any] | Split,
        *,
        unpack: batches.Unpack | None = None,
        progress: bool = False,
        **changes: Unpack[InfluenceKeywords],
    ) -> Influence:
        """Estimate the curvature of a model on its training data.

        Args:
            model: Trained, in eval mode; copied and never touched.
            data: Loader or data set that it was trained on, without random augmentation.
            unpack: As for `forget`.
            progress: Show progress bars.
            **changes: `likelihood`, `loss_fn`, `weight_decay`, `subset`, `seed` and `memory` as for
                `forget`; `max_samples` that the curvature is estimated from, 2,000 by default,
                `None` for all; `damping`, tau, by default a tenth of the mean eigenvalue of B.

        Raises:
            ModelError, DataError, ConfigError, CurvatureError, NumericalError: As for `forget`.
            SplitError: If there are fewer than two training samples.
        """
        objective, split, options = opened(model, data, unpack, **changes)
        most = CURVED if options.max_samples == "auto" else options.max_samples
        part = split.retain if most is None else drawn(split.retain, most, options.seed)
        kind: Kind = "sketch" if len(part) < len(split.retain) else "auto"
        curvature = curvature_of(objective, split, options, part, kind, progress=progress)
        decay = _decay(objective, split, options, part, progress)
        tau = options.damping
        if tau == "auto":
            tau = DAMPING * curvature.trace() / P.size(objective.start)
        # a model that fits everything has no curvature, and no influence either
        metric = decayed(curvature, decay, max(tau, TINY))
        held = metric.held if isinstance(metric, Decayed) else metric
        return cls(objective, split, held, progress)

    @property
    def samples(self) -> Indices:
        """Indices of the training samples, sorted; all results are in their order."""
        return self.split.retain

    def read(self, gradients: Sequence[Params] = (), samples: Indices | None = None) -> Readings:
        """g_n . H^-1 v_k and g_n^T H^-1 g_n of training samples, in one pass.

        Args:
            gradients: v_k, by parameter name.
            samples: Indices; by default all training samples.
        """
        directions = [self.metric.power(v, -1.0) for v in gradients]
        chosen = self.samples if samples is None else samples
        return read_gradients(
            self.objective, self.split, chosen, directions, self.metric, progress=self.progress
        )

    @isolated()
    def on(
        self,
        target: DataLoader[Any] | Dataset[Any] | Split,
        *,
        unpack: batches.Unpack | None = None,
    ) -> Tensor:
        """g . H^-1 g_n / N: by how much the mean loss of other samples changes without each of the
        training samples, in nats: [training samples], float64; below 0 where it harms them.

        Args:
            target: The other samples.
            unpack: As for `forget`.
        """
        split = resolve_split(target, [], unpack=unpack, allow_empty=True)
        read = self.read([mean_gradient(self.objective, split, split.retain)])
        return read.products[:, 0] / read.positions

    @isolated()
    def own(self) -> Tensor:
        """g_n^T H^-1 g_n / N: by how much the loss of each training sample rises without it, in
        nats: [training samples], float64."""
        read = self.read()
        return read.squares / read.positions

    def unit_gradients(self, samples: Indices) -> list[Params]:
        """g_n / |g_n|, |g|^2 = g^T H^-1 g, of a few training samples."""
        weights = _inverse_norms(self.read(samples=samples))
        lots = bar(enumerate(samples), len(samples), "known samples", self.progress)
        return [
            mean_gradient(self.objective, self.split, np.array([i]), weights[n : n + 1])
            for n, i in lots
        ]

    def crowd(self, most: int, seed: int) -> Params:
        """Mean of g_n / |g_n| over training samples, at most so many, drawn at random."""
        chosen = drawn(self.samples, most, seed)
        weights = _inverse_norms(self.read(samples=chosen))
        return mean_gradient(self.objective, self.split, chosen, weights)


def cosines(read: Readings) -> Tensor:
    """g_n . H^-1 v_k / |g_n|: cosines in the metric of H^-1 where the v_k have length 1."""
    return read.products * _inverse_norms(read)[:, None]


def _inverse_norms(read: Readings) -> Tensor:
    """1 / |g_n|; 0 for a sample without a gradient, which is like nobody."""
    return torch.where(read.squares > TINY, read.squares.clamp(min=TINY).rsqrt(), 0.0)


def _decay(
    objective: Objective, split: Split, options: ForgetOptions, part: Indices, progress: bool
) -> WeightDecay:
    """wd as it is given, or what the model acts like."""
    known = options.known_decay
    if known != "auto":
        return by_name(known, objective.model, list(objective.start))
    lots = bar(split.batches(part), split.steps(part), "gradient", progress)
    total = objective.gradient(lots, objective.start)
    return read_off(total.mean(), objective.start, total.loss / (total.count or 1.0)).value
