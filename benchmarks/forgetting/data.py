"""The data of the rows, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from sklearn import datasets
from torch import Tensor

from benchmarks.forgetting import docstrings
from benchmarks.forgetting.rows import Row, Setup
from fisher_forget.experiments.datasets import load_dataset

HELD_OUT = 0.2  # of tables and docstrings, for testing
TESTED = 2000  # images at most


@dataclass(frozen=True)
class Data:
    """Inputs and classes to train on and to test on, and the group of each training sample."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    groups: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y.max()) + 1


def _parted(x: Tensor, y: Tensor, groups: list[str] | None = None) -> Data:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([round(HELD_OUT * len(y))])
    names = tuple(groups[i] for i in train.tolist()) if groups else ()
    return Data(x[train], y[train], x[test], y[test], names)


def _table(name: str) -> Data:
    found = getattr(datasets, f"load_{name}")()
    x = (found.data - found.data.mean(0)) / found.data.std(0)
    return _parted(torch.tensor(x, dtype=torch.float32), torch.tensor(found.target))


def _images(name: str, count: int | None = None) -> Data:
    bundle = load_dataset(name, max_train=count, max_test=TESTED)
    (x, y), (x_test, y_test) = bundle.train.tensors, bundle.test.tensors
    return Data(x, y, x_test, y_test)


SOURCES: dict[str, Callable[[], Data]] = {
    "wine": lambda: _table("wine"),
    "breast_cancer": lambda: _table("breast_cancer"),
    "digits": lambda: _images("digits"),
    "mnist": lambda: _images("mnist", 6000),
    "cifar10": lambda: _images("cifar10", 5000),
    "docstrings": lambda: _parted(*docstrings.load()),
}


@lru_cache(maxsize=2)
def _source(name: str) -> Data:
    return SOURCES[name]()


def load(setup: Setup) -> Data:
    """The data of a setup, its wrong labels among them."""
    data = _source(setup.data)
    wrong, y = _some(torch.arange(len(data.y)), setup.wrong), data.y.clone()
    shift = torch.randint(1, data.classes, wrong.shape, generator=torch.Generator().manual_seed(0))
    y[wrong] = (y[wrong] + shift) % data.classes
    return Data(data.x, y, data.x_test, data.y_test, data.groups)


def forget_idx(row: Row, data: Data) -> Tensor:
    """The samples to forget, in order."""
    every = torch.arange(len(data.y))
    if row.forget == "module":
        return torch.tensor([i for i, name in enumerate(data.groups) if name == row.of])
    if row.forget == "wrong":
        return _some(every, row.setup.wrong)
    among = every if row.forget == "random" else every[data.y == row.of]
    return among if row.forget == "class" else _some(among, row.count)


def _some(idx: Tensor, count: int) -> Tensor:
    order = torch.randperm(len(idx), generator=torch.Generator().manual_seed(7))
    return idx[order[:count]].sort().values
