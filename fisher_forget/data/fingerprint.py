"""A short hash by which data is known again after a restart."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisher_forget._util.isolation import isolated
from fisher_forget.data.batches import plain
from fisher_forget.data.reader import Indices, Reader
from fisher_forget.errors import DataError

SAMPLES = 16  # are looked at
SCALARS = (str, bytes, int, float, complex, type(None), np.generic)


@isolated()
def fingerprint(reader: Reader, retain: Indices, forget: Indices) -> str:
    """Hash of who is retained and forgotten, and of a few samples as the collate function makes
    them.

    These samples are read twice. What differs between the reads, as random augmentation makes it,
    counts by its shape; where that differs, too, by its type. So do objects that do not tell their
    content, other than tensors, arrays, images, numbers and words.
    """
    digest = hashlib.sha256(retain.tobytes() + b"|" + forget.tobytes())
    indices = np.sort(np.concatenate([retain, forget]))
    probe = indices[np.unique(np.linspace(0, len(indices) - 1, SAMPLES).astype(int))]
    first, second = (_samples(reader, probe) for _ in range(2))
    for path, reads in sorted(first.items()):  # a dict may be made in any order
        again = second.get(path, [])
        for level in (_content, _form, _kind):  # the finest that stays
            marks = [level(x) for x in reads]
            if marks == [level(x) for x in again]:
                digest.update(b"|".join([path.encode(), *marks]))
                break
    return digest.hexdigest()[:16]


def _samples(reader: Reader, probe: Indices) -> dict[str, list[Any]]:
    """What the samples hold, by its path in a batch of one."""
    try:
        batches = list(reader.collated(np.split(probe, len(probe))))
    except DataError:
        # A data set may be given for its indices alone, without a collate function that fits.
        batches = [reader.base[int(index)] for index in probe]
    found: dict[str, list[Any]] = {}
    for batch in batches:
        for path, x in pytree.tree_leaves_with_path(plain([batch])):
            found.setdefault(pytree.keystr(path), []).append(x)
    return found


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
