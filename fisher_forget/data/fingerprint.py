"""Hashes by which samples are known again after a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisher_forget.data.batches import plain
from fisher_forget.data.reader import Indices, Reader
from fisher_forget.errors import DataError

Hashes = npt.NDArray[np.uint8]
Level = Callable[[Any], bytes]
SAMPLES = 16  # are read twice
BYTES = 16  # of a hash
SCALARS = (str, bytes, int, float, complex, type(None), np.generic)


class SampleHasher:
    """BLAKE2b of samples as the collate function makes them.

    A few samples are read twice first. What differs between the reads, as random augmentation makes
    it, counts by its shape; where that differs, too, by its type. So do objects that do not tell
    their content, other than tensors, arrays, images, numbers and words.

    Args:
        reader: Of the samples.
        indices: Of all of them, sorted; `SAMPLES` are read twice.
    """

    def __init__(self, reader: Reader, indices: Indices) -> None:
        self.reader = reader
        probe = indices[np.unique(np.linspace(0, len(indices) - 1, SAMPLES).astype(int))]
        first, second = (list(_samples(reader, probe)) for _ in range(2))
        self._levels: dict[str, Level] = {}
        for path in {path for sample in first for path in sample}:
            reads = [[sample.get(path) for sample in samples] for samples in (first, second)]
            for level in (_content, _form, _kind):  # the finest that stays
                if [*map(level, reads[0])] == [*map(level, reads[1])]:
                    self._levels[path] = level
                    break

    def __call__(self, indices: Indices) -> Hashes:
        """Of these samples, which are read once: [samples, 16]."""
        hashes = np.zeros((len(indices), BYTES), dtype=np.uint8)
        for at, sample in enumerate(_samples(self.reader, indices)):
            digest = hashlib.blake2b(digest_size=BYTES)
            for path, x in sorted(sample.items()):  # a dict may be made in any order
                digest.update(path.encode() + b"|" + self._levels.get(path, _kind)(x) + b"|")
            hashes[at] = np.frombuffer(digest.digest(), dtype=np.uint8)
        return hashes


class KnownSamples:
    """Tells whether samples are what they were.

    Args:
        hasher: Of the data.
        indices: Of all samples, sorted.
        hashes: Theirs, as they were; without them a sample is known from the first `check` on.
    """

    def __init__(self, hasher: SampleHasher, indices: Indices, hashes: Hashes | None) -> None:
        self._hasher = hasher
        known = () if hashes is None else zip(indices.tolist(), map(bytes, hashes), strict=True)
        self._known: dict[int, bytes] = dict(known)

    def check(self, indices: Indices) -> None:
        """Read these samples.

        Raises:
            DataError: If some are not what they were.
        """
        now = dict(zip(indices.tolist(), map(bytes, self._hasher(indices)), strict=True))
        changed = [i for i, found in now.items() if self._known.get(i, found) != found]
        if changed:
            got = f"forgotten samples that have changed since, such as {sorted(changed)[:5]}"
            expected = "the samples as the model was trained on them"
            fix = (
                "Restore them; or call rebase() before they are erased, after which none is read. "
                "A data set that changes its samples at random cannot be prepared for."
            )
            raise DataError(got, expected, fix)
        self._known |= now


def _samples(reader: Reader, indices: Indices) -> Iterator[dict[str, Any]]:
    """What each sample holds, by its path in a batch of one."""
    done = 0
    try:
        for batch in reader.collated([indices[k : k + 1] for k in range(len(indices))]):
            yield _leaves(batch)
            done += 1
    except DataError:
        # A data set may be given for its indices alone, without a collate function that fits.
        for index in indices[done:]:
            yield _leaves(reader.base[int(index)])


def _leaves(batch: Any) -> dict[str, Any]:
    return {pytree.keystr(p): x for p, x in pytree.tree_leaves_with_path(plain([batch]))}


def _content(x: Any) -> bytes:
    if isinstance(x, Tensor):
        if x.is_nested:
            return b"|".join([_kind(x), *map(_content, x.unbind())])
        dense = x.detach().cpu() if x.layout is torch.strided else x.detach().cpu().to_dense()
        return _form(x) + dense.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(x, SCALARS):
        return repr(x).encode()
    if isinstance(x, np.ndarray):
        return _form(x) + (b"" if x.dtype.hasobject else x.tobytes())
    if callable(getattr(x, "tobytes", None)):  # images of PIL
        return _form(x) + bytes(x.tobytes())
    return _kind(x)


def _form(x: Any) -> bytes:
    if isinstance(x, Tensor) and x.is_nested:
        return b"|".join([_kind(x), *map(_form, x.unbind())])
    shape = getattr(x, "shape", getattr(x, "size", None))  # the size of an image of PIL
    return _kind(x) + (repr(tuple(shape)).encode() if isinstance(shape, tuple) else b"")


def _kind(x: Any) -> bytes:
    return f"{type(x).__qualname__} {getattr(x, 'dtype', '')}".encode()
