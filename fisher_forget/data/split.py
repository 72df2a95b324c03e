"""Who is retained and who is forgotten.

`forget_idx` indexes the training data set: `retain_loader.dataset`, or its base where that is a
`Subset`. Forget samples that the loader would yield are left out.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)
from torch.utils.data import SubsetRandomSampler as IndexSampler

from fisher_forget._util.moved import renamed
from fisher_forget.data.batches import Batch, Unpack, make_batch
from fisher_forget.data.samples import KeywordDataset
from fisher_forget.errors import FisherForgetWarning, SplitError

Indices = NDArray[np.int64]
Part = Literal["retain", "forget", "all"]


@dataclass(frozen=True)
class Split:
    """The training data set, cut into retained and forgotten samples.

    Attributes:
        base: The training data set that all indices refer to.
        retain: Sorted indices of the retained samples D_r.
        forget: Sorted indices of the forgotten samples D_f.
    """

    base: Dataset[Any]
    retain: Indices
    forget: Indices
    batch_size: int = 256
    collate: Any = field(default=default_collate, repr=False)
    workers: int = 0
    unpack: Unpack | None = field(default=None, repr=False)

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
        if type(self.base) in (TensorDataset, KeywordDataset) and self.collate is default_collate:
            # Indexing tensors directly is two orders of magnitude faster than collating single
            # samples.
            for start in range(0, len(indices), self.batch_size):
                rows = torch.from_numpy(indices[start : start + self.batch_size])
                yield make_batch(list(self.base[rows]), self.unpack)
            return
        loader: DataLoader[Any] = DataLoader(
            Subset(self.base, indices.tolist()),
            batch_size=self.batch_size,
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(0),  # leaves the global generator alone
        )
        for raw in loader:
            yield make_batch(raw, self.unpack)

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
        wanted = np.union1d(_validated(forget_idx, len(self.base), False), self.forget)  # type: ignore[arg-type]
        retain = np.setdiff1d(self.retain, wanted)
        if not len(retain):
            got = "requests that leave no retained sample"
            raise SplitError(got, "at least one", "Train a new model instead.")
        return replace(self, retain=retain, forget=wanted)

    def __repr__(self) -> str:
        return f"Split({len(self.retain)} retained, {len(self.forget)} forgotten)"

    def fingerprint(self) -> str:
        """Hash of who is retained and forgotten, and of a few samples of the data itself."""
        digest = hashlib.sha256()
        digest.update(self.retain.tobytes() + b"|" + self.forget.tobytes())
        indices = self.indices("all")
        probe = indices[np.unique(np.linspace(0, len(indices) - 1, 16).astype(int))]
        for leaf in pytree.tree_leaves([self.base[int(i)] for i in probe]):
            array = leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else leaf
            digest.update(
                array.tobytes() if isinstance(array, np.ndarray) else repr(array).encode()
            )
        return digest.hexdigest()[:16]


def resolve_split(
    retain_loader: DataLoader[Any] | Dataset[Any],
    forget_idx: Sequence[int] | Indices | Tensor | range,
    *,
    unpack: Unpack | None = None,
    allow_empty: bool = False,
) -> Split:
    """The `Split` that a loader and a list of indices describe.

    Args:
        retain_loader: A loader over the training data set or a `Subset` of it, or a bare data set.
        forget_idx: Distinct indices into the training data set.
        unpack: Takes (inputs, targets) out of a batch; see `default_unpack`.
        allow_empty: Accept an empty `forget_idx`, for control runs.

    Raises:
        SplitError: If the data set has no length, or `forget_idx` is empty, everything, duplicated,
            negative, out of range or not made of integers.
    """
    loader = retain_loader if isinstance(retain_loader, DataLoader) else None
    data: Any = retain_loader.dataset if isinstance(retain_loader, DataLoader) else retain_loader
    if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
        raise SplitError(
            f"a data set of type {type(data).__name__} without length",
            "a map-style data set, whose samples have an index",
            "Read the samples into a list or a TensorDataset first: without an index no one can "
            "say who is forgotten.",
        )
    base, members = _unnest(data)
    if loader is not None:
        members = _sampled(loader, members)
    members = np.unique(members)
    forget = _validated(forget_idx, len(base), allow_empty)
    retain = np.setdiff1d(members, forget)
    if not len(retain):
        got = "a forget_idx that leaves no retained sample in the loader"
        fix = "To forget everything, train a new model."
        raise SplitError(got, "at least one retained sample", fix)
    _warn_if_random(base, retain)
    if loader is None:
        return Split(base, retain, forget, unpack=unpack)
    return Split(
        base,
        retain,
        forget,
        loader.batch_size or 256,
        loader.collate_fn,
        loader.num_workers,
        unpack,
    )


def some(indices: Indices, few: int, seed: int | np.random.Generator) -> Indices:
    """At most `few` of the indices, drawn at random, sorted."""
    if len(indices) <= few:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, few, replace=False))


def _unnest(data: Any) -> tuple[Any, Indices]:
    """The base of nested `Subset`s, and which of its samples they hold, in their order."""
    members = np.arange(len(data))
    while isinstance(data, Subset):
        members = np.asarray(data.indices, dtype=np.int64)[members]
        data = data.dataset
    return data, members.astype(np.int64)


def _sampled(loader: DataLoader[Any], members: Indices) -> Indices:
    """The members that the loader yields: a sampler counts positions in the loader's data set."""
    if loader.batch_sampler is None:
        got = "a loader with batch_size=None, whose data set yields whole batches"
        fix = "Give the loader a data set of single samples and a batch_size."
        raise SplitError(got, "a loader whose data set yields single samples", fix)
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    if isinstance(sampler, IndexSampler):
        return members[np.asarray(list(sampler.indices), dtype=np.int64)]
    plain = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement
    )
    if not plain:
        warnings.warn(
            f"The loader's sampler ({type(sampler).__name__}) is ignored: every sample of the data "
            "set counts once.",
            FisherForgetWarning,
            stacklevel=4,
        )
    if loader.drop_last and loader.batch_size and len(members) % loader.batch_size:
        warnings.warn(
            "The loader has drop_last=True: a different set of samples would be dropped at each "
            "pass. All of them are used here; build the loader without drop_last to silence this.",
            FisherForgetWarning,
            stacklevel=4,
        )
    return members


def _validated(forget_idx: Any, total: int, allow_empty: bool) -> Indices:
    """Sorted distinct indices below `total`."""
    where = f"indices into the training data set of {total} samples"
    flat = "Pass a flat list of int."
    try:
        if isinstance(forget_idx, Tensor):
            raw = forget_idx.detach().cpu().numpy()
        else:
            raw = np.asarray(list(forget_idx))
    except (TypeError, ValueError) as error:  # a bare number, or lists of different lengths
        got = f"forget_idx of type {type(forget_idx).__name__} ({error})"
        raise SplitError(got, where, flat) from error
    if raw.size == 0 and allow_empty:
        return np.zeros(0, dtype=np.int64)
    if raw.size == 0:
        raise SplitError("an empty forget_idx", where, "Name at least one sample to forget.")
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        mask = "For a boolean mask pass np.flatnonzero(mask)."
        got = f"forget_idx with dtype {raw.dtype} and shape {raw.shape}"
        raise SplitError(got, where, mask if raw.dtype.kind == "b" else flat)
    forget = raw.astype(np.int64)
    if forget.min() < 0:
        got = f"the negative index {forget.min()} in forget_idx"
        raise SplitError(got, where, "Count from the start: 0 is first.")
    if forget.max() >= total:
        raise SplitError(
            f"the index {forget.max()} in forget_idx",
            f"{where} (0 to {total - 1})",
            "If the loader holds a copy of the retained samples, give it the full data set or a "
            "Subset of it.",
        )
    values, times = np.unique(forget, return_counts=True)
    if len(values) < len(forget):
        got = f"forget_idx that repeats {values[times > 1][:5].tolist()}"
        raise SplitError(got, where + ", each once", "Remove the duplicates.")
    if len(values) == total:
        got = "a forget_idx that names every sample"
        raise SplitError(got, where, "To forget everything, train a new model.")
    return values


def _warn_if_random(base: Any, retain: Indices) -> None:
    """Two reads of the same samples must agree, or every pass would see other data."""
    for index in retain[:4]:
        first, second = pytree.tree_leaves(base[int(index)]), pytree.tree_leaves(base[int(index)])
        if any(_differ(a, b) for a, b in zip(first, second, strict=False)):
            warnings.warn(
                f"Sample {index} differs between two reads: the data set augments at random, so "
                "each pass sees other data. Pass the training data set without its augmentation.",
                FisherForgetWarning,
                stacklevel=4,
            )
            return


def _differ(first: Any, second: Any) -> bool:
    """Whether two reads of an array differ; NaN equals NaN: broken data are not augmented data."""
    if not isinstance(first, (Tensor, np.ndarray)):
        return False
    if first.shape != second.shape:
        return True
    both_nan = (first != first) & (second != second)
    return not bool(((first == second) | both_nan).all())


def __getattr__(name: str) -> Any:
    return renamed(name, __name__, {"resolve": "data.split.resolve_split"})
