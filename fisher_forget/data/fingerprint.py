"""Hashes by which samples are known again after a restart."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisher_forget.data.batches import plain, unpacked
from fisher_forget.data.reader import Indices, Reader
from fisher_forget.errors import DataError, FisherForgetWarning

Hashes = npt.NDArray[np.uint8]
Pieces = tuple[bytes, bytes, bytes]
NOTHING: Pieces = (b"", b"", b"")
SAMPLES = 16  # are read twice
BYTES = 16  # of a hash
LOT = 64  # samples read at a time
SCALARS = (str, bytes, int, float, complex, type(None), np.generic)

KNOWN_BY_TYPE = (
    "The samples hold objects that do not tell their content: they are known by their type alone, "
    "and other ones of that type are not told from them. Pass a collate function or unpack= that "
    "makes tensors of them; SISA has fingerprint= for it."
)


def among(hashes: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """Which of the samples are among others, by their hashes: [samples]."""
    known = set(map(bytes, others))
    return np.array([bytes(row) in known for row in hashes], dtype=bool)


class SampleHasher:
    """BLAKE2b of samples as the collate function makes them, each by itself.

    A few samples are read twice first. What differs between the reads, as random augmentation makes
    it, counts by its shape; where that differs, too, by its type. So do objects that do not tell
    their content, other than tensors, arrays, images, numbers and words; where a batch holds some,
    what `unpack` takes out of it counts as well, and there is a warning if that fails.

    Args:
        reader: Of the samples; its worker processes hash them, too.
        indices: Of all of them, sorted; `SAMPLES` are read twice.
        lot: How many are read at a time.

    Attributes:
        probe: Indices of those that are read twice.
    """

    def __init__(self, reader: Reader, indices: Indices, lot: int = LOT) -> None:
        self.reader, self.lot = reader, min(lot, LOT)
        self.probe = indices[np.unique(np.linspace(0, len(indices) - 1, SAMPLES).astype(int))]
        first, second = (list(self._samples(self.probe)) for _ in range(2))
        self._levels: dict[str, int] = {}
        for path in {path for sample in first for path in sample}:
            reads = [
                [sample.get(path, NOTHING) for sample in samples] for samples in (first, second)
            ]
            for level in range(len(NOTHING)):  # the finest that stays
                if [x[level] for x in reads[0]] == [x[level] for x in reads[1]]:
                    self._levels[path] = level
                    break

    def __call__(self, indices: Indices) -> Hashes:
        """Of these samples, which are read once: [samples, 16]."""
        told = self._rows(indices) if self.reader.indexed else self._told(indices)
        hashes = np.zeros((len(indices), BYTES), dtype=np.uint8)
        for at, pieces in enumerate(told):
            hashes[at] = np.frombuffer(_digest(b"|".join(pieces)), dtype=np.uint8)
        return hashes

    def _told(self, indices: Indices) -> Iterator[Sequence[bytes]]:
        """What counts of each sample."""
        for sample in self._samples(indices):
            counts = [(p.encode(), x[self._levels.get(p, -1)]) for p, x in sorted(sample.items())]
            yield [part for piece in counts for part in piece]  # a dict may be made in any order

    def _rows(self, indices: Indices) -> Iterator[Sequence[bytes]]:
        """The same of tensors of which many rows are taken at a time."""
        for start in range(0, len(indices), self.lot):
            rows = indices[start : start + self.lot]
            (lot,) = self.reader.collated([rows])
            columns = []
            for path, x in sorted(_leaves(lot).items()):
                level = self._levels.get(path, -1)
                same = [_pieces(x[:1])[level]] * len(rows)
                columns += [[path.encode()] * len(rows), same if level else _contents(x)]
            yield from zip(*columns, strict=True)

    def _samples(self, indices: Indices) -> Iterator[dict[str, Pieces]]:
        """What each sample holds, by its path in a batch of one."""
        for pieces, batch in self.reader.alone(_of_batch, indices, self.lot):
            if batch is not None:
                try:
                    taken = _leaves(unpacked(batch, self.reader.unpack))
                except DataError:
                    warnings.warn(KNOWN_BY_TYPE, FisherForgetWarning, stacklevel=2)
                    taken = {}
                pieces |= {f"unpacked{path}": _pieces(x) for path, x in taken.items()}
            yield pieces


class KnownSamples:
    """Tells whether samples are what they were.

    Args:
        hasher: `SampleHasher` of the data.
        indices: Of all samples, sorted.
        hashes: Theirs, as they were; without them a sample is known from the first `check` on.
    """

    def __init__(
        self, hasher: Callable[[Indices], Hashes], indices: Indices, hashes: Hashes | None
    ) -> None:
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


def _of_batch(batch: Any) -> tuple[dict[str, Pieces], Any]:
    """What a batch holds, by path; and the batch, if some of that does not tell its content."""
    leaves = _leaves(batch)
    opaque = any(map(_opaque, leaves.values()))
    return {path: _pieces(x) for path, x in leaves.items()}, batch if opaque else None


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """What a tree holds, by path; tensors in place of arrays."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if type(tree) in (list, tuple):
        parts: Iterable[tuple[Any, Any]] = enumerate(tree)
    elif type(tree) is dict:
        parts = tree.items()
    else:  # the same for whatever torch knows as a tree
        leaves = pytree.tree_leaves_with_path(plain(tree))
        return {path + pytree.keystr(p): x for p, x in leaves}
    return {p: x for key, part in parts for p, x in _leaves(part, f"{path}[{key!r}]").items()}


def _opaque(x: Any) -> bool:
    """Whether it does not tell its content."""
    if isinstance(x, np.ndarray):
        return bool(x.dtype.hasobject)
    return not isinstance(x, (Tensor, *SCALARS)) and not callable(getattr(x, "tobytes", None))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=BYTES).digest()


def _pieces(x: Any) -> Pieces:
    """By content, by form, by type."""
    return _digest(_content(x)), _form(x), _kind(x)


def _contents(x: Tensor) -> list[bytes]:
    """By content, each row of a tensor, as a tensor of one row."""
    form, rows = _form(x[:1]), x.detach().cpu()
    rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
    content = rows.contiguous().view(torch.uint8).numpy()
    return [_digest(form + row.tobytes()) for row in content]


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
