"""Which group each sample that is read belongs to.

Names, as indices of a group's samples, count the samples of what was given: of a `Subset` in its
order, of a loader those of its data set. Samples are read in the order of their indices in the base
data set, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fisher_forget.data.indices import unnested
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Likelihood


def rows_of(data: DataLoader[Any] | Dataset[Any] | Split, split: Split) -> Indices:
    """Where each sample of `data`, in its own order, is among those that are read; -1 where a
    loader leaves it out.

    Args:
        data: What was given.
        split: What it was resolved to; its retained samples are read.
    """
    if isinstance(data, Split):
        return np.arange(len(split.retain))
    members = unnested(data.dataset if isinstance(data, DataLoader) else data)[1]
    rows = np.searchsorted(split.retain, members)
    return np.where(np.isin(members, split.retain), rows, -1)


def names_by_row(groups: Any, rows: Indices) -> NDArray[Any]:
    """The name of the group of each sample that is read, as text.

    Args:
        groups: A name for each sample of the data.
        rows: What `rows_of` says of these.

    Raises:
        ConfigError: If names are no flat list, too few or too many, missing, or a sample has two.
    """
    listed = groups.tolist() if hasattr(groups, "tolist") else groups
    flat = isinstance(listed, Iterable) and not isinstance(listed, (str, bytes, Mapping, set))
    named = list(listed) if flat else []
    flat = flat and not any(np.ndim(name) for name in named)
    if not flat or len(named) != len(rows):
        shape = f" of shape {list(groups.shape)}" if hasattr(groups, "shape") else ""
        got = f"groups as a {type(groups).__name__}{shape}, which is no flat list"
        got = f"{len(named)} names of groups" if flat else got
        raise ConfigError(got, f"{len(rows)} names, one a sample", "Name each sample's group.")
    plain = [name.item() if isinstance(name, (Tensor, np.generic)) else name for name in named]
    names = pd.Series(plain, dtype=object)
    missing = np.flatnonzero(names.isna() & (rows >= 0))
    if len(missing):
        got = f"no group of {len(missing):,} samples, such as {missing[:5].tolist()}"
        raise ConfigError(got, "a name for each", "Name those that are not known, too.")
    pairs = pd.DataFrame({"row": rows, "name": names.map(str)})[rows >= 0].drop_duplicates()
    twice = pairs["row"].duplicated()
    if twice.any():
        sample = int(np.flatnonzero(rows == pairs["row"][twice].iloc[0])[-1])
        got = f"the sample {sample} a second time, in another group"
        raise ConfigError(
            got, "one group for each sample", "Give it the same name, or leave it out."
        )
    return pairs.sort_values("row")["name"].to_numpy(dtype=object)


def is_scored(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> NDArray[np.bool_]:
    """Whether any target of a sample counts, be it right or not: [samples]."""
    mask = likelihood.mask(outputs, targets)
    if mask is None:
        return np.ones(len(outputs), dtype=bool)
    return (mask.reshape(len(mask), -1) > 0).any(1).cpu().numpy()
