"""Which samples a loader yields, and which ones `forget_idx` names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data import SubsetRandomSampler as IndexSampler

from fisher_forget.data.reader import Indices
from fisher_forget.errors import FisherForgetWarning, SplitError


def members_of(source: DataLoader[Any] | Dataset[Any]) -> tuple[Dataset[Any], Indices]:
    """The training data set behind a loader or data set, and the sorted indices of the samples of
    it that the loader yields; a sample that it repeats counts once.

    Raises:
        SplitError: If the samples have no index.
    """
    loader = source if isinstance(source, DataLoader) else None
    data: Any = source if loader is None else loader.dataset
    _check_indexed(data)
    base, members = unnested(data)
    if loader is not None:
        members = members[
            _counted(_positions(loader, len(members)), len(members), "the sampler's list")
        ]
    distinct = np.unique(members)
    if len(distinct) < len(members):
        _warn(
            f"The loader holds {len(members):,} indices of {len(distinct):,} distinct samples: "
            "each counts once here. If it was trained with the repeats, that is another objective."
        )
    return base, distinct


def forget_indices(forget_idx: Any, total: int, allow_empty: bool = False) -> Indices:
    """Sorted distinct indices below `total`.

    Args:
        forget_idx: Indices, or a boolean mask over all samples: a tensor, an array, or anything
            that can be iterated over.
        total: Samples of the training data set.
        allow_empty: Accept none.

    Raises:
        SplitError: If it is something else, empty, everything, duplicated or out of range.
    """
    where = f"indices into the training data set of {total} samples"
    flat = "Pass a flat list of int, or a boolean mask over all samples."
    raw = _as_array(forget_idx, where, flat)
    if raw.ndim == 1 and raw.dtype.kind == "b":
        if len(raw) != total:
            got = f"a boolean forget_idx of length {len(raw)}"
            fix = _copy_fix(total, len(raw), int(raw.sum())) or "Pass one entry a sample."
            raise SplitError(got, f"a mask over the {total} samples of the data set", fix)
        raw = np.flatnonzero(raw)
    if raw.size == 0 and allow_empty:
        return np.zeros(0, dtype=np.int64)
    if raw.size == 0:
        raise SplitError("an empty forget_idx", where, "Name at least one sample to forget.")
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        got = f"forget_idx with dtype {raw.dtype} and shape {raw.shape}"
        raise SplitError(got, where, flat)
    forget: Indices = raw.astype(np.int64)
    if forget.min() < 0:
        got = f"the negative index {forget.min()} in forget_idx"
        raise SplitError(got, where, "Count from the start: 0 is first.")
    values, times = np.unique(forget, return_counts=True)
    if values[-1] >= total:
        full = total + len(values) if values[-1] < total + len(values) else 0
        fix = _copy_fix(total, full, len(values)) or (
            "Pass the data set that the indices count in, or a Subset of it."
        )
        got = f"the index {values[-1]} in forget_idx"
        raise SplitError(got, f"{where} (0 to {total - 1})", fix)
    if len(values) < len(forget):
        got = f"forget_idx that repeats {values[times > 1][:5].tolist()}"
        mask = len(forget) == total and values[-1] <= 1
        fix = "Pass a mask as booleans: mask.bool()." if mask else "Remove the duplicates."
        raise SplitError(got, where + ", each once", fix)
    if len(values) == total:
        got = "a forget_idx that names every sample"
        raise SplitError(got, where, "To forget everything, train a new model.")
    return values


def _as_array(
    forget_idx: Any, where: str, fix: str, name: str = "forget_idx"
) -> np.ndarray[Any, Any]:
    try:
        if isinstance(forget_idx, Tensor):
            forget_idx = forget_idx.detach().cpu()
        if hasattr(forget_idx, "__array__"):
            forget_idx = np.asarray(forget_idx)
        entries = list(forget_idx)
        raw: np.ndarray[Any, Any] = np.asarray(entries)
    except (TypeError, ValueError, RuntimeError) as error:  # a number, lists of different lengths
        got = f"{name} of type {type(forget_idx).__name__} ({error})"
        if isinstance(forget_idx, Subset):
            got, fix = "a Subset as forget_idx", "Pass its indices: forget_idx=subset.indices."
        raise SplitError(got, where, fix) from error
    if raw.dtype.kind in "iu" and any(isinstance(entry, (bool, np.bool_)) for entry in entries):
        raise SplitError(f"{name} that mixes numbers and truth values", where, fix)
    return raw


def _copy_fix(total: int, full: int, forgotten: int) -> str:
    """What to do where the numbers show a loader over a copy of the retained samples."""
    if full - forgotten != total:
        return ""
    return (
        f"The loader's {total} samples and the {forgotten} of forget_idx make {full}: it seems to "
        "hold a copy of the data without them. Give it the full data set, or a Subset of it."
    )


def _check_indexed(data: Any) -> None:
    """Refuse data without an index, and what is several data sets."""
    name = type(data).__name__
    if isinstance(data, Mapping):
        got = f"a {name} of {', '.join(map(str, list(data)[:4]))}"
        raise SplitError(got, "one data set", f"Pass one of them: data[{next(iter(data), 0)!r}].")
    if isinstance(data, tuple) and data and all(hasattr(x, "shape") for x in data):
        got, fix = "a tuple of arrays", "Pass TensorDataset(inputs, targets)."
        raise SplitError(got, "a data set of single samples", fix)
    if hasattr(data, "dataset") and not hasattr(data, "__getitem__"):
        got, fix = f"a {name}, which is no DataLoader", "Pass the torch DataLoader within it."
        raise SplitError(got, "a torch.utils.data.DataLoader or a data set", fix)
    if isinstance(data, (list, tuple)) and any(isinstance(x, (DataLoader, Dataset)) for x in data):
        got = f"a {name} of {', '.join(type(x).__name__ for x in data[:4])}"
        fix = "Pass one of them, or a loader over a ConcatDataset."
        raise SplitError(got, "one loader or data set", fix)
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        fix = "Pass TensorDataset(inputs, targets), with tensors made of its columns."
        raise SplitError(f"a {name} of pandas", "a data set of (inputs, targets)", fix)
    if callable(getattr(data, "train_dataloader", None)):
        fix = "Pass the loader that its train_dataloader() gives."
        raise SplitError(f"a {name}", "a torch.utils.data.DataLoader or a data set", fix)
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        lacks = "an index" if hasattr(data, "__len__") else "length"
        raise SplitError(
            f"a data set of type {name} without {lacks}",
            "a map-style data set, whose samples have an index",
            "Read the samples into a list or a TensorDataset first: without an index no one can "
            "say who is forgotten.",
        )


def unnested(data: Any) -> tuple[Any, Indices]:
    """The base of nested `Subset`s, and which of its samples they hold, in their order.

    A `Subset` with a way of its own to give a sample, such as a transform, is a data set of its
    own.
    """
    members = np.arange(len(data))
    while isinstance(data, Subset) and all(
        getattr(type(data), name) is getattr(Subset, name)
        for name in ("__getitem__", "__getitems__", "__len__")
    ):
        base: Any = data.dataset
        held = _counted(data.indices, len(base), "Subset.indices")
        members, data = held[members], base
    return data, members


def _counted(given: Any, total: int, owner: str) -> Indices:
    """Indices below `total`, counted from the start: -1 is the last sample, as in a list."""
    expected = f"indices of the {total:,} samples that it chooses from"
    held = _as_array(given, expected, "Pass a flat list of int.", owner)
    if held.size == 0:
        return np.zeros(0, dtype=np.int64)
    if held.ndim != 1 or held.dtype.kind not in "iu":
        got = f"{owner} of dtype {held.dtype} and shape {held.shape}"
        raise SplitError(got, expected, "Pass a flat list of int; of a mask, mask.nonzero().")
    beyond = held[(held < -total) | (held >= total)]
    if len(beyond):
        fix = "Correct its indices: no sample has this one."
        raise SplitError(f"the index {beyond[0]} in {owner}", expected, fix)
    return np.where(held < 0, held + total, held).astype(np.int64)


def _positions(loader: DataLoader[Any], total: int) -> Indices:
    """Positions in the loader's data set that it yields."""
    batches: Any = loader.batch_sampler
    if batches is None:
        got = "a loader with batch_size=None, whose data set yields whole batches"
        fix = "Give the loader a data set of single samples and a batch_size."
        raise SplitError(got, "a loader whose data set yields single samples", fix)
    if type(loader).__iter__ is not DataLoader.__iter__:
        _warn(
            f"The loader is a {type(loader).__name__} with an __iter__ of its own: what that does "
            "to batches is not seen. They are made of its data set and its collate function."
        )
    if loader.drop_last and loader.batch_size and (left := total % loader.batch_size):
        _warn(
            f"The loader has drop_last=True: another {left} samples would be dropped at each "
            f"pass. All {total:,} are used here; build the loader without drop_last to silence "
            "this."
        )
    sampler: Any = batches.sampler if type(batches) is BatchSampler else batches
    listed = sampler.indices if isinstance(sampler, IndexSampler) else sampler
    if isinstance(listed, (Sequence, np.ndarray, Tensor)):
        parts = [np.atleast_1d(np.asarray(part)) for part in listed]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    source = len(getattr(sampler, "data_source", ()))
    once = isinstance(sampler, RandomSampler) and not sampler.replacement
    if type(sampler) is SequentialSampler or (once and sampler.num_samples == source):
        return np.arange(source)
    drawn = f"{len(sampler):,} " if hasattr(sampler, "__len__") else ""
    what = "indices" if type(batches) is BatchSampler else "batches"
    _warn(
        f"The loader's {type(sampler).__name__} ({drawn}{what} a pass) is not used: each of the "
        f"{total:,} samples of its data set counts once, without weights or repeats. If it trained "
        "on others, pass a Subset of them."
    )
    return np.arange(total)


def _warn(message: str) -> None:
    warnings.warn(message, FisherForgetWarning, stacklevel=5)
