"""Who is retained and who is forgotten.

`forget_idx` indexes the training data set: `retain_loader.dataset`, or its base where that is a
plain `Subset`. Forget samples that the loader would yield are left out.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.isolation import isolated
from fisher_forget._util.moved import renamed
from fisher_forget.data.batches import Batch, Unpack
from fisher_forget.data.fingerprint import Hashes, SampleHasher
from fisher_forget.data.indices import forget_indices, members_of
from fisher_forget.data.reader import KEPT, Indices, Reader
from fisher_forget.errors import DataError, FisherForgetWarning, SplitError
from fisher_forget.likelihood import Likelihood

__all__ = ["Indices", "Part", "Split", "check_scored", "resolve_split", "some"]

LOT = 8  # samples read at a time where a few will do
Part = Literal["retain", "forget", "all"]


@dataclass(frozen=True)
class Split:
    """The training data set, cut into retained and forgotten samples.

    Attributes:
        base: The training data set that all indices refer to.
        retain: Sorted indices of the retained samples D_r.
        forget: Sorted indices of the forgotten samples D_f.
        batch_size: Samples a batch.
        reader: Reads them.
        known_as: A name that tells these data from others, in place of a look at every sample.
    """

    base: Dataset[Any]
    retain: Indices
    forget: Indices
    batch_size: int = 256
    reader: Reader = field(default=cast(Reader, None), repr=False, compare=False)
    known_as: str = ""

    def __post_init__(self) -> None:
        if self.reader is None:
            object.__setattr__(self, "reader", Reader(self.base))

    def indices(self, part: Part | Indices) -> Indices:
        """Sorted indices of a part; indices as they are."""
        if not isinstance(part, str):
            return part
        if part == "all":
            return np.sort(np.concatenate([self.retain, self.forget]))
        return self.retain if part == "retain" else self.forget

    def batches(self, part: Part | Indices) -> Iterator[Batch]:
        """Batches of a part (or of given indices) in index order, the same at every pass."""
        indices = self.indices(part)
        cuts = range(self.batch_size, len(indices), self.batch_size)
        return self.read(np.split(indices, cuts) if len(indices) else [])

    def read(self, plan: Sequence[Indices]) -> Iterator[Batch]:
        """A batch of each of the given lots of samples.

        Raises:
            DataError: If samples cannot be read, or are no batch.
        """
        if self.reader.layout is None and plan:
            self._probe()
        yield from self.reader.batches(plan)

    def _probe(self) -> None:
        """Two reads of the same samples must agree, or every pass would see other data."""
        rows = self.indices("retain" if len(self.retain) else "all")[: self.batch_size]
        if not self.reader.probe(rows):
            warnings.warn(
                "The first batch differs between two reads: the data set or the collate function "
                "augments at random (crops, masks, mixed samples), so each pass sees other data. "
                "Pass the training data without its augmentation.",
                FisherForgetWarning,
                stacklevel=4,
            )

    def first(self, part: Part | Indices) -> Batch:
        """The first of `batches`, without a look at the others."""
        return next(self.read([self.indices(part)[: self.batch_size]]))

    def few(self, part: Part | Indices) -> Batch:
        """Eight samples at random, in random order, as one batch: the first ones say little of the
        others where data are sorted by class, length or task. No more than a batch: samples of
        different sizes may not fit together."""
        order = np.random.default_rng(0).permutation(self.indices(part))
        return next(self.read([order[: min(LOT, self.batch_size)]]))

    def steps(self, part: Part | Indices) -> int:
        """Number of batches of a part."""
        return -(-len(self.indices(part)) // self.batch_size)

    def subset(self, retain: Indices) -> Split:
        """The same split with fewer retained samples."""
        return replace(self, retain=retain)

    def forgetting(self, forget_idx: Sequence[int] | Indices | Tensor | range) -> Split:
        """The same data with these samples forgotten, too; naming one again is no error.

        Raises:
            SplitError: As for `resolve_split`.
        """
        wanted = np.union1d(forget_indices(forget_idx, len(self.base)), self.forget)  # type: ignore[arg-type]
        retain = np.setdiff1d(self.retain, wanted)
        if not len(retain):
            got = "requests that leave no retained sample"
            raise SplitError(got, "at least one", "Train a new model instead.")
        return replace(self, retain=retain, forget=wanted)

    def __repr__(self) -> str:
        return f"Split({len(self.retain)} retained, {len(self.forget)} forgotten)"

    @cached_property
    def hasher(self) -> SampleHasher:
        """Hashes samples, by which they are known again."""
        return SampleHasher(self.reader, self.indices("all"), self.batch_size)

    @property
    def looked_at(self) -> Indices:
        """Samples that the fingerprint depends on."""
        return self.hasher.probe if self.known_as else self.indices("all")

    @cached_property
    def hashes(self) -> Hashes:
        """Of all samples, by ascending index; they are read at the first use."""
        return self.hasher(self.indices("all"))

    @isolated()
    def fingerprint(self) -> str:
        """Hash of who is retained and forgotten, and of every sample; or of the name of the data,
        and of a few."""
        digest = hashlib.sha256(self.retain.tobytes() + b"|" + self.forget.tobytes())
        if self.known_as:
            digest.update(b"|" + self.known_as.encode() + b"|")
        digest.update((self.hasher(self.looked_at) if self.known_as else self.hashes).tobytes())
        return digest.hexdigest()[:16]


def resolve_split(
    retain_loader: DataLoader[Any] | Dataset[Any] | Split,
    forget_idx: Sequence[int] | Indices | Tensor | range,
    *,
    unpack: Unpack | None = None,
    allow_empty: bool = False,
) -> Split:
    """The `Split` that a loader and a list of indices describe. No sample is read.

    Args:
        retain_loader: A loader over the training data set or a `Subset` of it, or a bare data set;
            or a `Split`, for its samples as they are read there.
        forget_idx: Distinct indices into the training data set, or a boolean mask over it.
        unpack: Takes (inputs, targets) out of a batch; see `default_unpack`.
        allow_empty: Accept an empty `forget_idx`, for control runs.

    Raises:
        SplitError: If the data set has no length, or `forget_idx` is empty, everything, duplicated,
            negative, out of range, of the wrong length or not made of integers.
    """
    whole = retain_loader if isinstance(retain_loader, Split) else _whole(retain_loader, unpack)
    forget = forget_indices(forget_idx, len(whole.base), allow_empty)  # type: ignore[arg-type]
    retain = np.setdiff1d(whole.indices("all"), forget)
    if not len(retain):
        got = "a forget_idx that leaves no retained sample in the loader"
        fix = "To forget everything, train a new model."
        raise SplitError(got, "at least one retained sample", fix)
    return replace(whole, retain=retain, forget=forget)


def _whole(source: DataLoader[Any] | Dataset[Any], unpack: Unpack | None) -> Split:
    """All samples that a loader yields, none of them forgotten."""
    base, members = members_of(source)
    nobody = np.zeros(0, dtype=np.int64)
    if not isinstance(source, DataLoader):
        return Split(base, members, nobody, reader=Reader(base, unpack))
    settings = {name: getattr(source, name) for name in KEPT}
    size = getattr(source.batch_sampler, "batch_size", None) or Split.batch_size
    return Split(base, members, nobody, size, Reader(base, unpack, settings))


def check_scored(
    split: Split, likelihood: Likelihood, parts: Sequence[Part | Indices] = ("retain", "forget")
) -> None:
    """Refuse samples of which no target counts in the loss, as all are ignored; few are read.

    Args:
        split: The data.
        likelihood: Knows which targets count.
        parts: Which of them; none of a part without samples is missed.

    Raises:
        DataError: If a part has samples, but no scored target.
    """
    for part in parts:
        few = replace(split, batch_size=min(LOT, split.batch_size))
        samples, lots = len(split.indices(part)), few.batches(part)
        if samples and not any(likelihood.scored(batch.targets) for batch in lots):
            name = {"retain": " retained", "forget": " forgotten"}.get(str(part), "")
            got = f"{samples:,}{name} samples without a scored target"
            fix = "Leave them out, or check which targets the likelihood ignores (ignore_index)."
            raise DataError(got, "at least one target that counts in the loss", fix)


def some(indices: Indices, few: int, seed: int | np.random.Generator) -> Indices:
    """At most `few` of the indices, drawn at random, sorted."""
    if len(indices) <= few:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, few, replace=False))


def __getattr__(name: str) -> Any:
    return renamed(name, __name__, {"resolve": "data.split.resolve_split"})
