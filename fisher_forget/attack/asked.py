"""Who is asked about in an audit: deleted samples, beside retained and unseen ones of the same
classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fisher_forget.attack.release import WHOLE, Observer
from fisher_forget.data.fingerprint import Hashes, among
from fisher_forget.data.samples import samples, take
from fisher_forget.data.split import Indices, Split, some
from fisher_forget.errors import DataError
from fisher_forget.likelihood import Likelihood

ASKED = 1000  # samples of each kind, at most
FEWEST = 20  # unseen samples: of fewer, what is recovered is like them by chance
Sides = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class Asked:
    """Who is asked about.

    Attributes:
        deleted: Deleted samples.
        beside_retained: Deleted and retained samples, as many of each class; where no retained one
            is of their classes, of any.
        beside_unseen: Deleted and unseen samples, as many of each class; `None` where no unseen one
            is of their classes.
        public: Unseen samples.
        unseen: All of them, without those that are training samples, too.
    """

    deleted: TensorDataset
    beside_retained: Sides
    beside_unseen: Sides | None
    public: TensorDataset
    unseen: Split

    @classmethod
    def drawn(cls, split: Split, new: Split, kind: Likelihood, seed: int) -> Asked:
        """At most `ASKED` samples of each kind.

        Raises:
            DataError: If nobody was deleted, or most unseen samples are training samples, or they
                are few.
        """
        if not len(split.forget):
            got, fix = "a split of which nobody was forgotten", "Pass who was deleted."
            raise DataError(got, "at least one deleted sample", fix)
        rng = np.random.default_rng(seed)
        unseen = _apart(new, split)
        if len(unseen.retain) < FEWEST:
            got = f"{len(unseen.retain)} unseen samples"
            raise DataError(got, f"at least {FEWEST}", "Hold more samples out.")
        few = 10 * ASKED  # to choose from
        gone, stay = (_hashes(split, part) for part in (split.forget, split.retain))
        others_of = split.retain[~among(stay, gone)]
        deleted = _read(split, some(split.forget, ASKED, rng))
        kept = _read(split, some(others_of, few, rng))
        others = _read(unseen, some(unseen.retain, few, rng))
        any_other = take(kept, rng.permutation(len(kept))[: len(deleted)])
        return cls(
            deleted,
            _matched(deleted, kept, kind, rng) or (deleted, any_other),
            _matched(deleted, others, kind, rng),
            take(others, rng.permutation(len(others))[:ASKED]),
            unseen,
        )

    def classes(self, split: Split, kind: Likelihood) -> dict[str, Indices]:
        """Rows of unseen samples by class, of the classes of which the split retains samples.

        Raises:
            DataError: If targets are no classes.
        """
        new, kept = (
            classes_of(torch.cat([batch.targets for batch in part.batches("retain")]), kind)
            for part in (self.unseen, split)
        )
        if new is None or kept is None:
            fix = "Name a group for each sample."
            raise DataError("targets that are no classes", "groups=", fix)
        rows = {str(int(c)): np.flatnonzero(new == c) for c in np.unique(kept)}
        return {name: found for name, found in rows.items() if len(found) > 1}


def _hashes(split: Split, part: Indices) -> Hashes:
    """Of the samples of a part."""
    return split.hashes[np.searchsorted(split.indices("all"), part)]


def _apart(new: Split, split: Split) -> Split:
    """The unseen samples without those that are training samples, too: real data hold some twice.

    Raises:
        DataError: If these are most of them.
    """
    seen = among(new.hashes, split.hashes)
    if 2 * seen.sum() >= len(seen):
        got = f"{seen.sum():,} of {len(seen):,} unseen samples that are training samples"
        fix = "Pass samples that no model was trained on."
        raise DataError(got, "samples that no model was trained on", fix)
    return new.subset(new.retain[~seen])


def _read(split: Split, rows: Indices) -> TensorDataset:
    """Samples in memory.

    Raises:
        DataError: If they differ in shape, or have several inputs without names.
    """
    read = list(split.batches(rows))
    if any(len(batch.args) > 1 or (batch.args and batch.kwargs) for batch in read):
        got = "samples of several inputs without names"
        raise DataError(got, "one input, or inputs by name", "Give them as a dict.")
    try:
        targets = torch.cat([batch.targets for batch in read])
        if read[0].kwargs:
            named = {key: torch.cat([b.kwargs[key] for b in read]) for key in read[0].kwargs}
            return samples(named, targets)
        return samples(torch.cat([batch.args[0] for batch in read]), targets)
    except (RuntimeError, TypeError, KeyError) as error:
        got = f"samples that do not fit into one tensor ({error})"
        raise DataError(got, "samples of one shape", "Pad them to one length.") from error


def classes_of(targets: Tensor, kind: Likelihood) -> Indices | None:
    """The class of each sample [N]; `None` of numbers, and of several targets a sample."""
    try:
        return Observer(WHOLE, kind).classes(TensorDataset(targets))
    except DataError:
        return None


def _matched(
    first: TensorDataset, second: TensorDataset, kind: Likelihood, rng: np.random.Generator
) -> Sides | None:
    """As many samples of each class from both, drawn at random; `None` where no class is in both.
    Without classes as many of both."""
    both = [classes_of(x.tensors[-1], kind) for x in (first, second)]
    targets = [labels for labels in both if labels is not None]
    if len(targets) < 2:
        targets = [np.zeros(len(x), dtype=np.int64) for x in (first, second)]
    rows: tuple[list[Indices], list[Indices]] = ([], [])
    for c in np.unique(targets[0]):
        where = [rng.permutation(np.flatnonzero(x == c)) for x in targets]
        for chosen, found in zip(rows, where, strict=True):
            chosen.append(found[: min(map(len, where))])
    picked = [np.sort(np.concatenate(chosen)) for chosen in rows]
    if not len(picked[0]):
        return None
    return take(first, picked[0]), take(second, picked[1])
