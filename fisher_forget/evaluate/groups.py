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
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import is_number
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data import batches
from fisher_forget.data.group_names import is_scored, names_by_row, rows_of
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import ConfigError, DataError, FisherForgetError, NumericalError
from fisher_forget.evaluate.intervals import Interval, paired_interval
from fisher_forget.evaluate.predictions import predict, settled_by
from fisher_forget.likelihood import Likelihood, Score

Groups = Sequence[Any] | NDArray[Any] | Tensor | Mapping[str, Sequence[int] | NDArray[np.int64]]


@dataclass(frozen=True)
class GroupHarm:
    """What became of one group.

    Attributes:
        name: Of the group.
        samples: How many have a target that counts.
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
    data: DataLoader[Any] | Dataset[Any] | Split,
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
        groups: A name for each sample of `data` (of a loader, of its data set), or indices by name,
            which may overlap; by default the classes. Samples without a target that counts are left
            out.
        likelihood: As for `forget`.
        unpack: As for `forget`.

    Raises:
        DataError: If a group has fewer than two samples with a target, the models have different
            outputs, or the data cannot be read.
        ConfigError: If groups do not fit the data.
        NumericalError: If a model's outputs are not finite.

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
    _check_answers(kind, answers)
    targets = answers[0][1]
    scores = [kind.scores(f, y).double().numpy() for f, y in answers]
    losses = [kind.losses(f, y).double().numpy() for f, y in answers]
    counts = kind.counts(targets).double().numpy()
    found = []
    for name, rows in _named(groups, targets, rows_of(data, split), is_scored(kind, *answers[0])):
        old, new = (values[rows] for values in scores)
        worse = old - new if kind.score.higher_is_better else new - old
        total = float(counts[rows].sum()) or 1.0
        means = float(losses[0][rows].sum()) / total, float(losses[1][rows].sum()) / total
        score = float(np.mean(old)), float(np.mean(new))
        found.append(GroupHarm(name, len(rows), score, means, paired_interval(worse)))
    found.sort(key=lambda group: -group.drop.value)
    return Harm(tuple(found), kind.score)


def _check_answers(kind: Likelihood, answers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Refuse models that do not answer the same question, or not with numbers.

    Raises:
        DataError: Outputs of different shapes, or that the targets do not fit.
        NumericalError: Outputs that are not finite.
    """
    shapes = [list(outputs.shape[1:]) for outputs, _ in answers]
    if shapes[0] != shapes[1]:
        got = f"outputs of shape {shapes[0]} a sample before and {shapes[1]} after"
        raise DataError(got, "the same classes of both models", "Compare models of one task.")
    for name, (outputs, targets) in zip(("before", "after"), answers, strict=True):
        try:
            kind.check(outputs, targets)
        except FisherForgetError as error:
            got = f"{error.got}, from the model {name}"
            raise type(error)(got, error.expected, error.fix) from error


def _named(
    groups: Groups | None, targets: Tensor, rows: Indices, scored: NDArray[np.bool_]
) -> Iterator[tuple[str, Indices]]:
    """Rows of the scored samples, by the name of their group.

    Args:
        groups: As for `harm_by_group`.
        targets: In the order in which samples are read.
        rows: What `rows_of` says of the samples of the data.
        scored: Which of the samples that are read have a target that counts.

    Raises:
        ConfigError, DataError: If they do not fit.
    """
    if isinstance(groups, Mapping):
        pairs = [(str(name), _chosen(str(name), given, rows)) for name, given in groups.items()]
    else:
        if groups is None and (targets.is_floating_point() or targets.ndim != 1):
            got = "no groups, and targets that are no classes"
            raise ConfigError(got, "groups=", "Pass a name for each sample.")
        names = targets.numpy() if groups is None else names_by_row(groups, rows)
        different = np.unique(names[scored] if groups is None else names)
        pairs = [(str(name), np.flatnonzero(names == name)) for name in different]
    if not pairs:
        raise ConfigError("no groups", "at least one", "Pass groups.")
    pairs = [(name, members[scored[members]]) for name, members in pairs]
    for name, members in pairs:
        if len(members) < 2:
            got, fix = (
                f"the group {name!r} with {len(members)} samples",
                "Leave it out, or join it.",
            )
            raise DataError(got, "at least 2 with a target, for an interval", fix)
    return iter(pairs)


def _chosen(name: str, given: Any, rows: Indices) -> Indices:
    """Rows of a group that is given by indices, each once.

    Raises:
        ConfigError: If these are no indices of the data.
    """
    chosen = np.asarray(given).reshape(-1)
    if not len(chosen):
        return np.zeros(0, dtype=np.int64)
    if chosen.dtype.kind not in "iu":
        got = f"the group {name!r} of {chosen.dtype}"
        raise ConfigError(got, "indices", "Pass whole numbers.")
    if chosen.min() < 0 or chosen.max() >= len(rows):
        got = f"the group {name!r} with indices from {chosen.min()} to {chosen.max()}"
        raise ConfigError(got, f"0 to {len(rows) - 1}", "Count the samples of `data`.")
    found = np.unique(rows[chosen])
    return found[found >= 0]
