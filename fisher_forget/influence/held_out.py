r"""What held-out samples say of a model, as a sum that has a gradient.

Each measure is sum_n c_n q_n over held-out samples n, q_n the loss or the probability p_n of the
second class. With r_A the mean of p_n over a set A,

    mean loss             over all scored positions, nats
    worst_group           max_a of the mean loss of group a, nats
    demographic_parity    max_a r_a - min_a r_a
    equalised_odds        mean over true labels y of max_a r_ay - min_a r_ay

over groups a, and their members with the label y. With decisions p_n > 1/2 in place of p_n the last
two are the gaps of Agarwal et al. (2018, arXiv:1803.02453) and Hardt et al. (2016,
arXiv:1610.02413), as fairlearn's `demographic_parity_difference` and `equalized_odds_difference`
(with agg="mean") compute them. In the gradient c_n is fixed: which groups lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.likelihood import Bernoulli, Categorical
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

Gap = Literal["demographic_parity", "equalised_odds", "worst_group"]
GAPS: tuple[Gap, ...] = get_args(Gap)


@dataclass(frozen=True)
class Measure:
    """sum_n c_n q_n.

    Attributes:
        weights: c_n [samples], float64.
        strata: A number for each sample, the same where c_n is: [samples].
        losses: Whether the q_n are losses; else probabilities of the second class.
        value: The sum.
        error: Its standard error over held-out samples like these, with c_n as it is.
        groups: Which ones it is of.
    """

    weights: Tensor
    strata: NDArray[np.int64]
    losses: bool
    value: float
    error: float = math.nan
    groups: str = ""

    def lots(self, count: int, seed: int) -> Iterator[Indices]:
        """Rows in at most so many lots, each with its share of every stratum."""
        order = np.random.default_rng(seed).permutation(len(self.strata))
        order = order[np.argsort(self.strata[order], kind="stable")]
        return (np.sort(order[k::count]) for k in range(min(count, len(order))))

    def gradient(self, objective: Objective, split: Split, rows: Indices) -> Params:
        """Gradient of the sum over some of the samples."""
        total, done = P.zeros_like(objective.start), 0
        for batch in objective.pieces(split.batches(split.retain[rows])):
            c = self.weights[rows[done : done + len(batch)]]
            with torch.enable_grad(), P.attached(objective.model, objective.start):
                q = _quantities(objective, objective.outputs(batch), batch.targets, self.losses)
                part = (c.to(q) * q).sum()
                for name, g in P.pull(part, objective.tape.params).items():
                    total[name] += g
            done += len(batch)
        return total


def mean_loss(objective: Objective, split: Split) -> Measure:
    """Mean loss over the scored positions of held-out samples."""
    losses, counts = objective.losses_and_counts(split.batches(split.retain), objective.start)
    total = float(counts.sum()) or 1.0
    weights = torch.full_like(losses, 1 / total)
    strata = np.zeros(len(losses), dtype=np.int64)
    return Measure(weights, strata, True, float(losses.sum()) / total)


def gap_between(gap: Gap, objective: Objective, split: Split, groups: Any) -> Measure:
    """How unfair the model is to groups of held-out samples.

    Args:
        gap: Which of the three.
        objective: Knows the model.
        split: The held-out samples.
        groups: The name of the group of each sample of the data set that these are of.

    Raises:
        ConfigError: If names and samples differ in number, there are fewer than two groups, or
            there are other classes than the two that a gap needs.
        DataError: If a group has no member with one of the labels, where these are told apart.
    """
    names, member = _members(groups, split)
    losses = gap == "worst_group"
    found, labels = [], []
    for outputs, targets in objective.forward(split.batches(split.retain), objective.start):
        found.append(_quantities(objective, outputs, targets, losses).cpu())
        labels.append(targets.cpu().double())
    q = torch.cat(found).numpy()
    label = np.zeros(len(q), dtype=np.int64)
    if gap == "equalised_odds":
        label = (torch.cat(labels).reshape(len(q)).numpy() > 0.5).astype(np.int64)
    value, variance, apart, weights = 0.0, 0.0, [], np.zeros(len(q))
    for y in np.unique(label):
        rows = [np.flatnonzero((member == a) & (label == y)) for a in range(len(names))]
        for name, of_group in zip(names, rows, strict=True):
            if not len(of_group):
                got = f"the group {str(name)!r} without a held-out sample of the label {y}"
                raise DataError(got, "at least one of each", "Hold more samples out.")
        means = np.array([q[of_group].mean() for of_group in rows])
        ends = (
            [(means.argmax(), 1.0)] if losses else [(means.argmax(), 1.0), (means.argmin(), -1.0)]
        )
        for a, sign in ends:
            share = sign / len(np.unique(label))
            weights[rows[a]] += share / len(rows[a])
            value += share * means[a]
            variance += share**2 * q[rows[a]].var() / len(rows[a])
        apart.append(" and ".join(str(names[a]) for a, _ in ends))
    told = "; ".join(dict.fromkeys(apart))
    strata = label * len(names) + member
    return Measure(
        torch.from_numpy(weights), strata, losses, float(value), float(variance**0.5), told
    )


def _members(groups: Any, split: Split) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The groups' names, and which one each sample belongs to.

    Raises:
        ConfigError: If they do not fit the samples, or are of one group.
    """
    size = len(split.base)  # type: ignore[arg-type]
    names = pd.Series(np.asarray(groups).tolist(), dtype=object)
    if np.ndim(groups) != 1 or len(names) != size:
        got = f"groups of shape {list(np.shape(groups))}"
        fix = "Pass the group of each sample of the data set that held_out is of."
        raise ConfigError(got, f"{size} names", fix)
    names = names.iloc[split.retain]
    if names.isna().any():
        got = f"no group of the held-out sample {split.retain[names.isna()][0]}"
        raise ConfigError(got, "a name for each", "Name those that are not known, too.")
    member, known = pd.factorize(names.map(str), sort=True)
    if len(known) < 2:
        got = f"the one group {known[0]!r}"
        raise ConfigError(got, "at least two groups", "Pass an attribute that differs.")
    return np.asarray(known), member.astype(np.int64)


def _quantities(objective: Objective, outputs: Tensor, targets: Tensor, losses: bool) -> Tensor:
    """q_n in float64."""
    likelihood, outputs = objective.likelihood, outputs.double()
    if losses:
        return likelihood.losses(outputs, targets)
    if isinstance(likelihood, Categorical) and outputs.shape[1:] == (2,):
        return outputs.softmax(1)[:, 1]
    if isinstance(likelihood, Bernoulli) and outputs.numel() == len(outputs):
        return outputs.reshape(len(outputs)).sigmoid()
    got = f"outputs of shape {list(outputs.shape)} for a {likelihood.name} likelihood"
    fix = "Take kind='worst_group', which looks at losses."
    raise ConfigError(got, "two classes, or one probability", fix)
