r"""What held-out samples say of a model, as a sum that has a gradient.

Each measure is sum_n c_n q_n over held-out samples n that have a target which counts, q_n the loss
or the probability p_n of the second class. With r_A the mean of p_n over a set A,

    mean loss             over all scored positions, nats
    worst_group           max_a of the mean loss over the scored positions of group a, nats
    demographic_parity    max_a r_a - min_a r_a
    equalised_odds        mean over true labels y of max_a r_ay - min_a r_ay

over groups a, and their members with the label y. With decisions p_n > 1/2 in place of p_n the last
two are the gaps of Agarwal et al. (2018, arXiv:1803.02453) and Hardt et al. (2016,
arXiv:1610.02413), as fairlearn's `demographic_parity_difference` and `equalized_odds_difference`
(with agg="mean") compute them. In the gradient c_n is fixed: which groups lie apart.

The largest gap is chosen among groups, so that it is large by chance, too. Its p-value is that of a
permutation test: how often it is as large with the names of groups shuffled, for equalised_odds
among samples with the same label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.data.group_names import is_scored
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.likelihood import Bernoulli, Categorical
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

Gap = Literal["demographic_parity", "equalised_odds", "worst_group"]
GAPS: tuple[Gap, ...] = get_args(Gap)
SHUFFLES = 999  # of the names of groups
CHANCE = 0.05  # p-values above are within chance
STREAM = 0x2F  # of the shuffles


class HeldOutGap(NamedTuple):
    """A gap between groups of held-out samples.

    Attributes:
        value: The gap; of "worst_group" the loss of the worst group, nats.
        standard_error: Over samples like these, with the groups that lie apart as they are.
        p_value: How often groups drawn at random have as large a gap, or as bad a worst group.
    """

    value: float
    standard_error: float
    p_value: float

    @property
    def within_chance(self) -> bool:
        """Whether groups drawn at random do as much in more than 5 % of draws."""
        return self.p_value > CHANCE


@dataclass(frozen=True)
class Measure:
    """sum_n c_n q_n.

    Attributes:
        weights: c_n [samples], float64; 0 where no target counts.
        counts: Scored positions [samples], float64.
        strata: A number for each sample, the same where c_n is: [samples].
        losses: Whether the q_n are losses; else probabilities of the second class.
        gap: What it is of a gap; `None` of a mean loss.
        groups: Which ones it is of.
    """

    weights: Tensor
    counts: Tensor
    strata: NDArray[np.int64]
    losses: bool
    gap: HeldOutGap | None = None
    groups: str = ""

    def gradient(self, objective: Objective, split: Split, rows: Indices, c: Tensor) -> Params:
        """sum_n c_n dq_n/dw over some of the samples, c [samples]."""
        total, done = P.zeros_like(objective.start), 0
        for batch in objective.pieces(split.batches(split.retain[rows])):
            part = c[rows[done : done + len(batch)]]
            with torch.enable_grad(), P.attached(objective.model, objective.start):
                q = _quantities(objective, objective.outputs(batch), batch.targets, self.losses)
                pulled = P.pull((part.to(q) * q).sum(), objective.tape.params)
                for name, g in pulled.items():
                    total[name] += g
            done += len(batch)
        return total

    def gradients(
        self, objective: Objective, split: Split, lots: int, seed: int
    ) -> tuple[Params, list[Params]]:
        r"""The gradient G of the sum, and its deviations D_k in random lots of the samples.

        With G_h the part of the stratum h, N_h its samples, and m_h its scored positions,

            D_k = sum_h f_h (G_hk - (m_hk / m_h) G_h),   f_h^-2 = 1 - sum_k (N_hk / N_h)^2,

        so that sum_k (D_k . v)^2 has the variance of G . v as its mean, however unequal the lots
        are: a stratum of N_h independent terms of variance s^2 has N_h s^2, and its part of a lot,
        less the expected one, N_hk (1 - N_hk / N_h) s^2.

        Args:
            objective: Knows the model.
            split: The held-out samples.
            lots: How many at most.
            seed: Of the lots.
        """
        used = np.flatnonzero(self.weights.numpy())
        order = np.random.default_rng(seed).permutation(used)
        order = order[np.argsort(self.strata[order], kind="stable")]
        count = min(lots, len(order))
        lot = np.full(len(self.strata), -1)
        lot[order] = np.arange(len(order)) % count  # each has its share of every stratum
        whole, scaled = P.zeros_like(objective.start), self.weights.clone()
        deviations = [P.zeros_like(objective.start) for _ in range(count)]
        for stratum in np.unique(self.strata[used]):
            rows = used[self.strata[used] == stratum]
            share = np.bincount(lot[rows], minlength=count) / len(rows)
            scale = 1 / math.sqrt(1 - (share**2).sum())
            scaled[rows] *= scale
            positions = np.bincount(lot[rows], self.counts.numpy()[rows], count)
            part = self.gradient(objective, split, rows, self.weights)
            for name, g in part.items():
                whole[name] += g
                for k, m in enumerate(scale * positions / positions.sum()):
                    deviations[k][name] -= m * g
        for k in range(count):
            part = self.gradient(objective, split, np.flatnonzero(lot == k), scaled)
            for name, g in part.items():
                deviations[k][name] += g
        return whole, deviations


def mean_loss(objective: Objective, split: Split) -> Measure:
    """Mean loss over the scored positions of held-out samples.

    Raises:
        DataError: If fewer than two samples have a target that counts.
    """
    _, counts = objective.losses_and_counts(split.batches(split.retain), objective.start)
    scored = int((counts > 0).sum())
    if scored < 2:
        got = f"{scored} held-out samples with a target that counts"
        raise DataError(got, "at least two, which tell an error", "Hold more samples out.")
    weights = (counts > 0).double() / counts.sum()
    return Measure(weights, counts, np.zeros(len(counts), dtype=np.int64), True)


def gap_between(
    gap: Gap, objective: Objective, split: Split, names: NDArray[Any], seed: int = 0
) -> Measure:
    """How unfair the model is to groups of held-out samples.

    Args:
        gap: Which of the three.
        objective: Knows the model.
        split: The held-out samples.
        names: The name of the group of each of them.
        seed: Of the shuffled names.

    Raises:
        ConfigError: If there are fewer than two groups, or other classes than the two that a gap
            needs.
        DataError: If a group has fewer than two members, with each of the labels where these are
            told apart.
    """
    member, known = pd.factorize(names, sort=True)
    if len(known) < 2:
        got = f"the one group {known[0]!r}"
        raise ConfigError(got, "at least two groups", "Pass an attribute that differs.")
    read = _read(gap, objective, split)
    kept = np.flatnonzero(read.counts)
    labels, label = np.unique(read.label[kept], return_inverse=True)
    of_kept = read.q[kept], read.counts[kept], label, member[kept]
    cells = _Cells(*of_kept, (len(labels), len(known)), read.losses)
    cells.check(labels, known)
    rates, weights = cells.rates(cells.member), np.zeros(len(names))
    variance, apart = 0.0, []
    for y, row in enumerate(rates):
        ends = [(int(row.argmax()), 1.0)] + [(int(row.argmin()), -1.0)] * (not read.losses)
        for a, sign in ends:
            inside = (cells.label == y) & (cells.member == a)
            q, n, share = cells.q[inside], cells.n[inside], sign / len(rates)
            weights[kept[inside]] += share / n.sum()
            rest = q - row[a] * n  # the error of a ratio, to first order
            variance += share**2 * (rest**2).sum() / n.sum() ** 2 * len(n) / (len(n) - 1)
        apart.append(" and ".join(str(known[a]) for a, _ in ends))
    found = HeldOutGap(cells.gap(cells.member), float(variance**0.5), cells.p_value(seed))
    strata = read.label * len(known) + member
    told = "; ".join(dict.fromkeys(apart))
    counts = torch.from_numpy(read.counts)
    return Measure(torch.from_numpy(weights), counts, strata, read.losses, found, told)


@dataclass(frozen=True)
class _Read:
    """q_n, scored positions (0 where no target counts) and labels: [samples]."""

    q: NDArray[np.float64]
    counts: NDArray[np.float64]
    label: NDArray[np.int64]
    losses: bool


def _read(gap: Gap, objective: Objective, split: Split) -> _Read:
    losses, likelihood = gap == "worst_group", objective.likelihood
    q, counts, labels = [], [], []
    for outputs, targets in objective.forward(split.batches(split.retain), objective.start):
        q.append(_quantities(objective, outputs, targets, losses).cpu().numpy())
        scored = is_scored(likelihood, outputs, targets)
        counts.append(likelihood.counts(targets).double().cpu().numpy() if losses else scored)
        if gap == "equalised_odds":
            soft = targets.dim() == 2 and targets.shape[1] == 2  # probabilities of both classes
            y = targets[:, 1] if soft else targets.reshape(len(targets))
            labels.append((y > 0.5).cpu().numpy())
    found = np.concatenate(q)
    label = np.concatenate(labels) if labels else np.zeros(len(found))
    return _Read(found, np.concatenate(counts).astype(float), label.astype(np.int64), losses)


@dataclass(frozen=True)
class _Cells:
    """Scored samples, by label and group.

    Attributes:
        q, n, label, member: q_n, scored positions, numbers of labels and of groups: [samples].
        shape: How many labels and groups.
        losses: Whether the q_n are losses.
    """

    q: NDArray[np.float64]
    n: NDArray[np.float64]
    label: NDArray[np.int64]
    member: NDArray[np.int64]
    shape: tuple[int, int]
    losses: bool

    def rates(self, member: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean of q_n over positions: [labels, groups]."""
        cell, size = self.label * self.shape[1] + member, math.prod(self.shape)
        total, n = np.bincount(cell, self.q, size), np.bincount(cell, self.n, size)
        return (total / n).reshape(self.shape)

    def gap(self, member: NDArray[np.int64]) -> float:
        """The measure, with these groups."""
        rates = self.rates(member)
        return float((rates.max(1) if self.losses else np.ptp(rates, axis=1)).mean())

    def p_value(self, seed: int) -> float:
        """(1 + shuffles with as large a gap) / (1 + shuffles)."""
        rng, member = np.random.default_rng([seed, STREAM]), self.member.copy()
        strata = [np.flatnonzero(self.label == y) for y in range(self.shape[0])]
        least, hits = self.gap(self.member) - 1e-12, 0  # sums differ in the last digit
        for _ in range(SHUFFLES):
            for rows in strata:
                member[rows] = rng.permutation(member[rows])
            hits += self.gap(member) >= least
        return (1 + hits) / (1 + SHUFFLES)

    def check(self, labels: Any, names: Any) -> None:
        """Refuse cells that tell no error.

        Args:
            labels: By number.
            names: Of groups, by number.

        Raises:
            DataError: If one has fewer than two samples.
        """
        if not len(self.q):
            got = "no held-out sample with a target that counts"
            raise DataError(got, "at least two of each group", "Hold more samples out.")
        sizes = np.bincount(
            self.label * self.shape[1] + self.member, minlength=math.prod(self.shape)
        )
        for cell in np.flatnonzero(sizes < 2):
            y, a = divmod(int(cell), self.shape[1])
            of = f" of the label {labels[y]}" if len(labels) > 1 else ""
            got = f"the group {str(names[a])!r} with {sizes[cell]} held-out samples{of}"
            fix = "Hold more samples out, or join groups."
            raise DataError(got, "at least two of each, with a target", fix)


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
