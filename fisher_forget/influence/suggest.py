r"""suggest(): which training samples are worth forgetting.

With |g|^2 = g^T H^-1 g, unit gradients u = g / |g|, their inner product in the same metric and the
mean U of the unit gradients of training samples ("the crowd"), the score of sample i is

    memorised     |g_i|^2 / N           its own loss without it rises by that, nats
    harmful       - g . H^-1 g_i / N    the mean held-out loss without it falls by that, nats
    a gap         the same, g the gradient of a gap between groups (held_out.py)
    mislabelled   max_c f_i[c] - f_i[y_i] over other classes c, f_i the readout of the others
    poisoned      mean of the three largest <u_i, u_k> over known samples k, less <u_i, U>

Cosines, since a well-fitted sample has a short gradient, however wrong its label is; a readout of
the others (readout.py), since a network fits wrong labels, too. What else was tried, and how often
these are right, is in docs/research.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Unpack, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget import params as P
from fisher_forget._util.checks import is_whole
from fisher_forget._util.isolation import isolated
from fisher_forget.data import batches
from fisher_forget.data.fingerprint import among
from fisher_forget.data.group_names import names_by_row, rows_of
from fisher_forget.data.indices import forget_indices
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import ConfigError, SplitError
from fisher_forget.influence.held_out import (
    GAPS,
    Gap,
    HeldOutGap,
    Measure,
    gap_between,
    mean_loss,
)
from fisher_forget.influence.influence import (
    Influence,
    InfluenceKeywords,
    cosines,
    drawn,
    opened,
)
from fisher_forget.influence.products import Readings
from fisher_forget.influence.readout import misfits

Kind = Literal[
    "memorised",
    "harmful",
    "mislabelled",
    "poisoned",
    "demographic_parity",
    "equalised_odds",
    "worst_group",
]
LOTS = 8  # of the held-out samples, whose spread is the standard error
CROWD = 2000  # samples whose mean unit gradient stands for that of all
KNOWN = 64  # samples of the known poison that others are compared with, at most
NEAREST = 3  # of these
SHOWN = 10
LARGE = 0.2  # share of all samples that is too many to be like the known ones
MEANINGS: dict[Kind, str] = {
    "memorised": "By how many nats the sample's own loss would rise if the model were trained "
    "without it, to first order: what it alone has taught the model about itself.",
    "harmful": "By how many nats the mean loss of the held-out samples would fall if the model "
    "were trained without it, to first order.",
    "mislabelled": "By how much a linear readout of the other samples' features prefers another "
    "class to the label: above 0 where it says another; of targets that are no classes, their "
    "squared distance from it.",
    "poisoned": "How much more what the sample teaches is like the nearest known poison than like "
    "all samples: a difference of cosines, from -2 to 2.",
    "worst_group": "By how many nats the mean held-out loss of the worst group would fall if the "
    "model were trained without it, to first order.",
    "demographic_parity": "By how much the groups' mean probabilities of the second class would "
    "come closer if the model were trained without it, to first order.",
    "equalised_odds": "By how much the groups' mean probabilities of the second class, among "
    "held-out samples with the same label, would come closer if the model were trained without "
    "it, to first order, in the mean over both labels.",
}
NEEDS: dict[str, tuple[str, ...]] = {
    "harmful": ("held_out",),
    "poisoned": ("known",),
    **dict.fromkeys(GAPS, ("held_out", "groups")),
}
WHAT = {
    "held_out": "samples that the model was not trained on",
    "known": "indices of the poisoned samples that are known",
    "groups": "the name of each held-out sample's group",
}


@dataclass(frozen=True)
class Suggestions:
    """Training samples, the one that is most worth forgetting first.

    Attributes:
        kind: What was looked for.
        meaning: What the score is, in a sentence.
        likely: Of "poisoned": how many samples score nearer to what is usual (the median) among the
            known ones, each beside the others, than to what is usual among all; `None` of other
            kinds, or with a single known sample.
        gap: Between groups of held-out samples (or the worst one's loss) as the model is: `value`,
            `standard_error`, `p_value`, and whether it is `within_chance`; `None` of other kinds.
        table: One row a sample, by descending score: `sample` (its index), `score`, its
            `standard_error` where held-out samples make it uncertain, `loss` in nats, `label` and
            `predicted` class where there are classes (a label that the loss ignores, such as -100,
            stays as it is). Known poison is left out.
    """

    kind: Kind
    meaning: str
    table: pd.DataFrame
    likely: int | None = None
    gap: HeldOutGap | None = None

    def indices(self, k: int) -> Indices:
        """The first k samples, ready to be `forget_idx`.

        Raises:
            ConfigError: If there are not so many.
        """
        if not is_whole(k, 1) or k > len(self.table):
            got, expected = f"k={k!r}", f"a whole number from 1 to {len(self.table)}"
            raise ConfigError(got, expected, "Ask for fewer samples.")
        return self.table["sample"].to_numpy()[:k].copy()

    def __str__(self) -> str:
        head = self.table.head(SHOWN).to_string(index=False, float_format=lambda x: f"{x:.3g}")
        likely = "" if self.likely is None else f" {self.likely:,} score like the known ones."
        if self.likely is not None and self.likely > LARGE * len(self.table):
            likely += (
                " These are so many that the known ones have little in common that others lack."
            )
        if self.gap is not None:
            likely = (
                f" It is {self.gap.value:.3g} now, with a standard error of "
                f"{self.gap.standard_error:.2g}; groups drawn at random have as much with a "
                f"probability of {self.gap.p_value:.2g}"
                f"{': within chance, nothing to find.' if self.gap.within_chance else '.'}"
            )
        title = f"By {self.kind.replace('_', ' ')}, {len(self.table):,} samples."
        return f"{title} {self.meaning}{likely}\n{head}"

    __repr__ = __str__


@isolated()
def suggest(
    model: nn.Module,
    data: DataLoader[Any] | Dataset[Any] | Split,
    *,
    kind: Kind = "memorised",
    held_out: DataLoader[Any] | Dataset[Any] | Split | None = None,
    groups: Any = None,
    known: Any = None,
    unpack: batches.Unpack | None = None,
    progress: bool = True,
    **changes: Unpack[InfluenceKeywords],
) -> Suggestions:
    """Training samples that are worth forgetting, by their influence on the model.

    It takes one pass over the training data, and looks at a few thousand samples more than once;
    "mislabelled" takes two passes without gradients.

    Args:
        model: Trained, in eval mode; never touched.
        data: Loader or data set that it was trained on, without random augmentation.
        kind: "memorised", "harmful" (to held-out samples), "mislabelled", "poisoned" (as some
            known samples are), or what makes the model unfair: "demographic_parity",
            "equalised_odds", "worst_group".
        held_out: Loader or data set of samples that the model was not trained on; for "harmful"
            and unfair models.
        groups: The name of the group of each sample of `held_out`, in its order (of a loader, of
            its data set); for unfair models.
        known: Indices of the part of the poison that is known, or a mask; for "poisoned".
        unpack: As for `forget`.
        progress: Show progress bars.
        **changes: As for `Influence.of`. "mislabelled" looks at no curvature, so that
            `weight_decay`, `damping`, `max_samples` and `subset` do not change it.

    Raises:
        ConfigError: An unknown kind; what the kind needs is missing, or what it does not look at
            was given.
        SplitError: Held-out samples that are training samples, too, or fewer than two; known
            samples that are none, all, or no training samples.
        DataError: A group with fewer than two held-out samples that have a target.
        ModelError, DataError, CurvatureError, NumericalError: As for `forget`.

    Example:
        >>> import torch
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> found = suggest(torch.nn.Linear(3, 2).eval(), data, progress=False)
        >>> len(found.indices(5)), list(found.table)
        (5, ['sample', 'score', 'loss', 'label', 'predicted'])
    """
    _check(kind, {"held_out": held_out, "groups": groups, "known": known})
    split = resolve_split(data, [], unpack=unpack, allow_empty=True)
    rest = None if known is None else _known(known, split)
    unseen, names = None, None
    if held_out is not None:
        unseen = resolve_split(held_out, [], unpack=unpack, allow_empty=True)
        _check_unseen(unseen, split)
        names = None if groups is None else names_by_row(groups, rows_of(held_out, unseen))
    meaning, gap = MEANINGS[kind], None
    if kind == "mislabelled":
        objective, split, _ = opened(model, split, None, **changes)
        found = _Found(*misfits(objective, split, progress=progress))
    else:
        influence = Influence.of(model, split, progress=progress, **changes)
        seed = changes.get("seed", 0)
        if unseen is not None:
            if names is None:
                measure = mean_loss(influence.objective, unseen)
            else:
                measure = gap_between(cast(Gap, kind), influence.objective, unseen, names, seed)
                gap = measure.gap
                meaning += f" The groups: {measure.groups}."
            found = _fall(influence, unseen, measure, seed)
        elif rest is not None:
            found = _likeness(influence, rest, seed)
        else:
            read = influence.read()
            found = _Found(read, read.squares / read.positions)
    table = _table(split.retain, found, rest)
    likely = None if math.isnan(found.least) else int((table["score"] >= found.least).sum())
    return Suggestions(kind, meaning, table, likely, gap)


@dataclass(frozen=True)
class _Found:
    """Scores of the training samples, their standard errors, and what is called likely."""

    read: Readings
    score: Tensor
    error: Tensor | None = None
    least: float = math.nan


def _fall(influence: Influence, unseen: Split, measure: Measure, seed: int) -> _Found:
    """- g . H^-1 g_n / N of the measure's gradient g, and its standard error from lots of the
    held-out samples."""
    whole, deviations = measure.gradients(influence.objective, unseen, LOTS, seed)
    read = influence.read([whole, *deviations])
    along = read.products / read.positions
    return _Found(read, -along[:, 0], along[:, 1:].square().sum(1).sqrt())


def _likeness(influence: Influence, known: Indices, seed: int) -> _Found:
    """Mean of the largest cosines with known samples, less that with the crowd; and the middle
    between the medians of the known ones and of all, NaN of a single known one."""
    bytes_each = 8 * P.size(influence.objective.start)  # a gradient, and H^-1 times it
    room = max(1, influence.objective.memory // bytes_each)
    chosen = drawn(known, min(KNOWN, room), seed)
    units = influence.unit_gradients(chosen)
    read = influence.read([*units, influence.crowd(CROWD, seed)])
    found = cosines(read)
    rows = torch.from_numpy(np.searchsorted(influence.samples, chosen))
    found[rows, torch.arange(len(rows))] = -1.0  # nobody is compared with itself
    nearest = found[:, :-1].topk(min(NEAREST, max(len(units) - 1, 1)), dim=1).values.mean(1)
    score = nearest - found[:, -1]
    middle = (score[rows].quantile(0.5) + score.quantile(0.5)) / 2
    least = float(middle) if len(units) > 1 else math.nan
    return _Found(read, score, None, least)


def _table(samples: Indices, found: _Found, known: Indices | None) -> pd.DataFrame:
    """All samples but the known ones, by descending score; ties by index."""
    read = found.read
    columns: dict[str, Any] = {"sample": samples, "score": found.score.numpy()}
    if found.error is not None:
        columns["standard_error"] = found.error.numpy()
    columns["loss"] = read.losses.numpy()
    for name, classes in (("label", read.labels), ("predicted", read.predicted)):
        if bool((classes >= 0).any()):
            columns[name] = classes.numpy()
    table = pd.DataFrame(columns)
    if known is not None:
        table = table[~table["sample"].isin(known)]
    return table.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)


def _check(kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse a kind that there is not, or that is not told what it needs."""
    if kind not in MEANINGS:
        got, expected = f"kind={kind!r}", f"one of {tuple(MEANINGS)}"
        raise ConfigError(got, expected, "Pass one of these names.")
    for name, value in given.items():
        wanted = name in NEEDS.get(kind, ())
        if wanted and value is None:
            raise ConfigError(f"kind={kind!r} without {name}", WHAT[name], f"Pass {name}=.")
        if not wanted and value is not None:
            got, expected = f"{name}= with kind={kind!r}", f"no {name}, which it does not look at"
            raise ConfigError(got, expected, f"Leave {name}= out, or choose another kind.")


def _known(known: Any, split: Split) -> Indices:
    """Sorted indices of the known poison.

    Raises:
        SplitError: If they are none, all, or no training samples.
    """
    expected = f"indices of some of the {len(split.retain):,} training samples"
    try:
        found = forget_indices(known, len(split.base), allow_empty=True)  # type: ignore[arg-type]
    except SplitError as error:
        every = "names every sample" in error.got
        fix = "Nothing is left to be found: train a new model." if every else error.fix
        raise SplitError(error.got.replace("forget_idx", "known"), expected, fix) from error
    if not len(found):
        raise SplitError("an empty known", expected, "Name at least one sample that is poisoned.")
    strangers = np.setdiff1d(found, split.retain)
    if len(strangers):
        got = f"known samples that the loader leaves out, such as {strangers[:5].tolist()}"
        raise SplitError(got, expected, "Pass the data that the model was trained on.")
    if len(found) == len(split.retain):
        fix = "Nothing is left to be found: train a new model."
        raise SplitError("a known that names every sample", expected, fix)
    return found


def _check_unseen(unseen: Split, split: Split) -> None:
    """Refuse held-out samples that say nothing of unseen data.

    Raises:
        SplitError: If there are fewer than two, or some are training samples.
    """
    if len(unseen.retain) < 2:
        got = f"{len(unseen.retain)} held-out samples"
        raise SplitError(got, "at least two, which tell an error", "Hold more samples out.")
    seen = unseen.retain[among(unseen.hashes, split.hashes)]
    if len(seen):
        few = [int(i) for i in seen[:5]]
        got = f"{len(seen):,} held-out samples that are training samples, such as {few}"
        fix = "Leave them out: their loss says nothing of unseen samples."
        raise SplitError(got, "samples that the model was not trained on", fix)
