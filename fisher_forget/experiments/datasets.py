"""Data sets in memory, by name: the built-in ones and the user's own.

MNIST and CIFAR-10 are read from a root folder: the argument `root` (`data.root` in a
configuration), else the environment variable `FISHER_FORGET_DATA`, else the folder that the
operating system keeps for a user's data. A data set of one's own is a function: see `load_dataset`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fisher_forget.data.samples import read_samples, take
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.experiments import import_path
from fisher_forget.experiments.data_sources import (
    DATASETS,
    ROOT_VARIABLE,
    Array,
    Samples,
    user_folder,
)
from fisher_forget.experiments.faults import Fault, Injected


@dataclass(frozen=True)
class DataBundle:
    """A data set, ready to train on.

    Attributes:
        name: The name it was loaded by.
        train: `train[rows]` is (inputs, targets): inputs [N, ...], or such tensors by name, and
            targets int64 [N], or float32 [N, outputs]; the targets are the last of `train.tensors`.
        test: The same of the test samples.
        classes: Class names in the order of the targets; empty where these are not one class a
            sample.
        injected: The fault that was put into the training samples, if there was one.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    injected: Injected | None = None

    def with_fault(self, fault: Fault) -> DataBundle:
        """The same data with a fault in the training samples.

        Raises:
            ConfigError, DataError: As for `Fault.put`.
        """
        train, injected = fault.put(self.train, len(self.classes))
        return replace(self, train=train, injected=injected)


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> DataBundle:
    """Load a data set by its name; scaling and the train/test split do not depend on `seed` or the
    sizes asked for.

    A name with a colon is the import path of a function of your own, package.module:function; that
    of a plug-in stands for the function that it declares (`import_path.GROUPS`). It is called with
    the `options`, the global random states seeded by 0, and returns (train, test): `read_samples`
    says what these may be.

    Args:
        name: A key of `DATASETS`, the name of a plug-in, or an import path.
        root: Folder that holds the data on disk; see the module's docstring.
        max_train: Take at most this many training samples, with the class proportions of all of
            them.
        max_test: The same for the test samples.
        seed: Chooses the subset, and nothing else.
        options: Keyword arguments of a function of your own.

    Raises:
        ConfigError: If the name is unknown, a size is not positive, or a function of your own
            fails.
        DataError: If files are missing or damaged, or a function of your own returns something
            else.

    Example:
        >>> bundle = load_dataset("digits", max_train=100)
        >>> bundle.train.tensors[0].shape, len(bundle.classes)
        (torch.Size([100, 1, 8, 8]), 10)
    """
    if name not in DATASETS and import_path.is_own(name, "the data"):
        return _own(name, max_train, max_test, seed, options or {})
    if name not in DATASETS:
        known = sorted({*DATASETS, *import_path.plugins("the data")})
        near = difflib.get_close_matches(name, known, cutoff=0.4)
        fix = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Correct the name."
        expected = f"one of {known}, or package.module:function"
        raise ConfigError(f"the data set {name!r}", expected, fix)
    if options:
        got = f"the options {sorted(options)} for {name!r}"
        raise ConfigError(got, "none for a built-in data set", "Remove them.")
    raw = DATASETS[name].read(data_root(root))

    def part(samples: Samples, limit: int | None, stream: int) -> TensorDataset:
        inputs, targets = samples
        rows = _subset(targets, limit, (seed, stream), stratify=bool(raw.classes))
        scaled = raw.scale(torch.from_numpy(inputs[rows]))
        return TensorDataset(scaled, torch.from_numpy(targets[rows]))

    return DataBundle(name, part(raw.train, max_train, 0), part(raw.test, max_test, 1), raw.classes)


def _own(
    name: str, max_train: int | None, max_test: int | None, seed: int, options: Mapping[str, Any]
) -> DataBundle:
    """What the user's function returns, in memory; the classes are the whole numbers up to the
    largest target."""
    made = import_path.make(name, "the data", options, seed=0)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        got = f"{type(made).__name__} from {name}"
        raise DataError(got, "a pair (train, test)", "Return both data sets.")
    train, test = (read_samples(part) for part in made)
    targets = torch.cat([train.tensors[-1], test.tensors[-1]])
    labelled = targets.dim() == 1 and not targets.is_floating_point()
    classes = tuple(map(str, range(int(targets.max()) + 1))) if labelled else ()

    def part(samples: TensorDataset, limit: int | None, stream: int) -> TensorDataset:
        targets = samples.tensors[-1].numpy()
        return take(samples, _subset(targets, limit, (seed, stream), stratify=labelled))

    return DataBundle(name, part(train, max_train, 0), part(test, max_test, 1), classes)


def available(root: str | Path | None = None) -> dict[str, str]:
    """For each data set "ready", or how to get it."""
    place = data_root(root)
    problems = {name: source.missing(place) for name, source in DATASETS.items()}
    return {name: "ready" if error is None else error.fix for name, error in problems.items()}


def catalogue(root: str | Path | None = None) -> str:
    """Which data sets are found and where, and how to get the others."""
    place = data_root(root)
    lines = [
        f"Data sets in {place.resolve()}.",
        f"--root, data.root in a configuration or {ROOT_VARIABLE} name another folder; without "
        f"them it is {user_folder()}.",
        "",
    ]
    for name, source in DATASETS.items():
        problem = source.missing(place)
        lines.append(f"  {name:15}{'found' if problem is None else 'missing':9}{source.about}")
        if problem is None:
            where = place / source.folder if source.folder else "scikit-learn"
            details = [("in", str(where))]
        else:
            lacks = problem.got.removeprefix("no ")
            details = [("lacks", lacks), ("get", source.origin), ("do", problem.fix)]
        lines += [f"  {'':15}{word:9}{text}" for word, text in details]
    your_own = (
        "Your own: `data: package.module:function` in the configuration, and --allow-code; see "
        "`fisher-forget init`."
    )
    return "\n".join([*lines, "", your_own])


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data are read from: `root`, else the environment variable
    FISHER_FORGET_DATA, else the user's data folder."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or user_folder())


def _subset(
    targets: Array, limit: int | None, seed: tuple[int, int], *, stratify: bool
) -> NDArray[np.int64]:
    """Sorted indices of at most `limit` samples; class sizes are proportional, by largest
    remainder."""
    if limit is not None and limit < 1:
        expected = "at least one sample, or None for all"
        raise ConfigError(f"a subset of {limit} samples", expected, "Raise the size.")
    if limit is None or limit >= len(targets):
        return np.arange(len(targets))
    groups = targets if stratify else np.zeros(len(targets))
    _, member, counts = np.unique(groups, return_inverse=True, return_counts=True)
    share = limit * counts / len(targets)
    sizes = np.floor(share).astype(int)
    sizes[np.argsort(sizes - share, kind="stable")[: limit - sizes.sum()]] += 1
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(member == k))[:size] for k, size in enumerate(sizes)]
    return np.sort(np.concatenate(rows))
