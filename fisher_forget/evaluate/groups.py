"""What forgetting did to each group of the samples that stay, before anything is published.

A request can be chosen to hurt others: a boundary that a group needs, most of a minority. The mean
over all retained samples does not show it. Of every group the same samples are looked at before and
after; the 95 % interval of a drop is `paired_interval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget._util.checks import is_number
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data import batches
from fisher_forget.data.indices import unnested
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Interval, paired_interval
from fisher_forget.evaluate.predictions import predict, settled_by
from fisher_forget.likelihood import Likelihood, Score

Groups = Sequence[Any] | NDArray[Any] | Tensor | Mapping[str, Sequence[int] | NDArray[np.int64]]


@dataclass(frozen=True)
class GroupHarm:
    """What became of one group.

    Attributes:
        name: Of the group.
        samples: How many.
        score: Before and after; what it is, `Harm.score` says.
        loss: Mean loss before and after, nats.
        drop: By how much the score became worse, with a 95 % interval over samples like these.
    """

    name: str
    samples: int
    score: tuple[float, float]
    loss: tuple[float, float]
    drop: Interval


@dataclass(frozen=True, repr=False)
class Harm:
    """What became of every group, the most harmed first.

    Attributes:
        groups: One entry a group.
        score: What the scores are.
    """

    groups: tuple[GroupHarm, ...]
    score: Score

    @property
    def worst(self) -> GroupHarm:
        """The group whose score fell most."""
        return self.groups[0]

    def check(self, limit: float) -> None:
        """Refuse a model that harms a group too much, before it is published.

        Args:
            limit: The most that the score of a group may fall by: .02 are two points of accuracy.

        Raises:
            ConfigError: If the limit is negative, or no number.
            NumericalError: If a group's score fell by more; all such groups are named.
        """
        if not is_number(limit):
            raise ConfigError(f"limit={limit!r}", "a number of at least 0", "Pass .02, say.")
        harmed = [group for group in self.groups if not group.drop.value <= limit]
        if harmed:
            told = ", ".join(
                f"{g.name!r} from {self.score.format(g.score[0])} to "
                f"{self.score.format(g.score[1])} ({g.samples:,} samples)"
                for g in harmed
            )
            got = f"a model that harms groups of retained samples: {told}"
            fix = "Do not publish it; look at who asked for what, or train a new model."
            raise NumericalError(got, f"a fall of at most {self.score.format(limit)}", fix)

    def __str__(self) -> str:
        rows = []
        for g in self.groups:
            low, high = (self.score.format(x, unit=False) for x in (g.drop.low, g.drop.high))
            rows.append(
                [
                    g.name,
                    f"{g.samples:,}",
                    *(self.score.format(x) for x in g.score),
                    f"{self.score.format(g.drop.value, unit=False)} ({low} to {high})",
                    f"{g.loss[0]:.3g} -> {g.loss[1]:.3g}",
                ]
            )
        name = self.score.name
        heads = ["group", "samples", f"{name} before", "after", "worse by", "loss (nats)"]
        return markdown_table(heads, rows)

    __repr__ = __str__

    def to_pandas(self) -> pd.DataFrame:
        """A row a group."""
        return pd.DataFrame(
            {
                "group": [g.name for g in self.groups],
                "samples": [g.samples for g in self.groups],
                "score_before": [g.score[0] for g in self.groups],
                "score_after": [g.score[1] for g in self.groups],
                "drop": [g.drop.value for g in self.groups],
                "drop_low": [g.drop.low for g in self.groups],
                "drop_high": [g.drop.high for g in self.groups],
                "loss_before": [g.loss[0] for g in self.groups],
                "loss_after": [g.loss[1] for g in self.groups],
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file, or for a ledger's evidence."""
        return {**self.score.stored(), "groups": [asdict(g) for g in self.groups]}


def harm_by_group(
    before: nn.Module,
    after: nn.Module,
    data: Dataset[Any] | Split,
    groups: Groups | None = None,
    *,
    likelihood: Likelihood | str = "categorical",
    unpack: batches.Unpack | None = None,
) -> Harm:
    """Hold two models against each other, group by group.

    Args:
        before: The model that requests were made to.
        after: What forgetting made of it, before it is published.
        data: Samples that stay: the retained ones, or better some that neither was trained on.
        groups: A name for each sample of `data`, or indices by name, which may overlap; by default
            the classes.
        likelihood: As for `forget`.
        unpack: As for `forget`.

    Raises:
        DataError: If a group has no sample, or fewer than two; or the data cannot be read.
        ConfigError: If groups do not fit the data.

    Example:
        >>> import torch
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(2, 2).eval()
        >>> harm = harm_by_group(model, model, data)
        >>> harm.worst.drop.value
        0.0
    """
    split = resolve_split(data, [], unpack=unpack, allow_empty=True)
    kind = settled_by(before, {"data": split}, likelihood)
    answers = [predict(model, split) for model in (before, after)]
    targets = answers[0][1]
    scores = [kind.scores(outputs, targets).double().numpy() for outputs, _ in answers]
    losses = [kind.losses(outputs, targets).double().numpy() for outputs, _ in answers]
    counts = kind.counts(targets).double().numpy()
    found = []
    for name, rows in _named(groups, targets, _rows(data, split)):
        old, new = (values[rows] for values in scores)
        worse = old - new if kind.score.higher_is_better else new - old
        total = max(float(counts[rows].sum()), 1.0)
        means = float(losses[0][rows].sum()) / total, float(losses[1][rows].sum()) / total
        score = float(np.mean(old)), float(np.mean(new))
        found.append(GroupHarm(name, len(rows), score, means, paired_interval(worse)))
    found.sort(key=lambda group: -group.drop.value)
    return Harm(tuple(found), kind.score)


def _rows(data: Dataset[Any] | Split, split: Split) -> NDArray[np.int64]:
    """Where each sample of `data`, in its own order, is among those that are read, which are in the
    order of their indices."""
    if isinstance(data, Split):
        return np.arange(len(split.retain))
    return np.searchsorted(split.retain, unnested(data)[1])


def _named(
    groups: Groups | None, targets: Tensor, order: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Rows by the name of their group.

    Args:
        groups: As for `harm_by_group`.
        targets: In the order in which samples are read.
        order: Row of each sample of the data set.

    Raises:
        ConfigError, DataError: If they do not fit.
    """
    size = len(order)
    if isinstance(groups, Mapping):
        pairs = [(str(name), np.asarray(rows).reshape(-1)) for name, rows in groups.items()]
        for name, rows in pairs:
            if rows.dtype.kind not in "iu" and len(rows):
                got = f"the group {name!r} of {rows.dtype}"
                raise ConfigError(got, "indices", "Pass whole numbers.")
            if len(rows) and not (rows.min() >= 0 and rows.max() < size):
                got = f"the group {name!r} with indices from {rows.min()} to {rows.max()}"
                raise ConfigError(got, f"0 to {size - 1}", "Count the samples of `data`.")
    else:
        if groups is None and (targets.is_floating_point() or targets.ndim != 1):
            got = "no groups, and targets that are no classes"
            raise ConfigError(got, "groups=", "Pass a name for each sample.")
        labels = np.asarray(targets[order] if groups is None else groups).reshape(-1)
        if len(labels) != size:
            got, expected = f"{len(labels)} names of groups", f"{size}, one a sample"
            raise ConfigError(got, expected, "Pass a name for each sample of `data`.")
        pairs = [(str(name), np.flatnonzero(labels == name)) for name in np.unique(labels)]
    if not pairs:
        raise ConfigError("no groups", "at least one", "Pass groups.")
    for name, rows in pairs:
        if len(rows) < 2:
            got, fix = f"the group {name!r} with {len(rows)} samples", "Leave it out, or join it."
            raise DataError(got, "at least 2, for an interval", fix)
    return iter([(name, order[rows]) for name, rows in pairs])
