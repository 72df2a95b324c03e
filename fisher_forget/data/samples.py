"""Samples in memory, with one input tensor or several by name, to be indexed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget.data.batches import TARGET_KEYS, default_unpack
from fisher_forget.errors import DataError

BATCH = 256  # samples read at a time


class KeywordDataset(TensorDataset):
    """Inputs that forward takes by keyword, such as token ids and attention mask, and targets.

    As of any `TensorDataset`, the targets are the last of `tensors`, and an index may be a number,
    a slice or a tensor of rows: `data[rows]` is a pair (inputs by name, targets).

    Example:
        >>> tokens = torch.tensor([[5, 2], [7, 0]])
        >>> data = KeywordDataset({"input_ids": tokens}, torch.tensor([1, 0]))
        >>> data[0]
        ({'input_ids': tensor([5, 2])}, tensor(1))
    """

    def __init__(self, inputs: Mapping[str, Tensor], targets: Tensor) -> None:
        super().__init__(*inputs.values(), targets)
        self.names = tuple(inputs)

    def __getitem__(self, index: Any) -> tuple[dict[str, Tensor], Tensor]:  # type: ignore[override]
        *inputs, targets = (x[index] for x in self.tensors)
        return dict(zip(self.names, inputs, strict=True)), targets


def samples(inputs: Any, targets: Any) -> TensorDataset:
    """A data set of all inputs [N, ...], by name where it is a mapping, and targets [N, ...].

    Args:
        inputs: Tensor, array or nested lists of numbers; or a mapping of such.
        targets: The same; integers become int64.

    Raises:
        DataError: If they are no numbers, or their lengths differ.
    """
    named = dict(inputs.items()) if hasattr(inputs, "items") else {"inputs": inputs}
    try:
        tensors = {name: torch.as_tensor(value) for name, value in named.items()}
        goal = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"inputs or targets that make no tensor ({error})"
        fix = "Turn words into token ids, and pad them to one length."
        raise DataError(got, "numbers in equal rows", fix) from error
    lengths = {name: len(x) if x.dim() else 0 for name, x in (tensors | {"targets": goal}).items()}
    if len(set(lengths.values())) > 1 or not len(goal):
        got = f"samples in the numbers {lengths}"
        raise DataError(got, "the same number of each, at least one", "Correct them.")
    goal = goal if goal.is_floating_point() else goal.long()
    if hasattr(inputs, "items"):
        return KeywordDataset(tensors, goal)
    return TensorDataset(tensors["inputs"], goal)


def take(data: TensorDataset, rows: Any) -> TensorDataset:
    """The samples at an index array, a mask or a slice."""
    return samples(*data[rows][:2])


def read_samples(source: Any) -> TensorDataset:
    """Samples in memory from what a user has.

    Args:
        source: A map-style data set of samples (inputs, target) or of dicts with a target under
            "labels", "label", "targets", "target" or "y"; or all of the samples at once: a tuple
            (inputs, targets) or such a dict. Inputs are a tensor, or tensors by name, which forward
            takes by keyword. A data set is read once.

    Raises:
        DataError: If it is something else, or samples differ in shape.

    Example:
        >>> read_samples([(torch.zeros(3), 1), (torch.ones(3), 0)])[:]
        (tensor([[0., 0., 0.],
                [1., 1., 1.]]), tensor([1, 0]))
    """
    if type(source) in (TensorDataset, KeywordDataset) and len(source.tensors) >= 2:
        return samples(*_unpacked(source[:]))
    if isinstance(source, (tuple, Mapping)):
        return samples(*_unpacked(source))
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__") or not len(source):
        got = f"samples of type {type(source).__name__}"
        expected = "a map-style data set with at least one sample, or a tuple (inputs, targets)"
        raise DataError(got, expected, "Give such; of a DataLoader, its `dataset`.")
    try:
        loader = DataLoader(source, batch_size=BATCH, generator=torch.Generator())
        inputs, targets = zip(*map(_unpacked, loader), strict=True)
        if hasattr(inputs[0], "items"):
            named = {name: torch.cat([x[name] for x in inputs]) for name in inputs[0]}
            return samples(named, torch.cat(targets))
        return samples(torch.cat(inputs), torch.cat(targets))
    except DataError:
        raise
    except Exception as error:  # of the user's data set, or of putting samples into one tensor
        got = f"{type(error).__name__} while reading {type(source).__name__}: {error}"
        expected = "samples (inputs, target) of one shape, inputs a tensor or tensors by name"
        fix = "Pad them to one length; give several inputs as a dict."
        raise DataError(got, expected, fix) from error


def _unpacked(raw: Any) -> tuple[Any, Any]:
    try:
        return default_unpack(raw)
    except DataError as error:
        expected = f"pairs (inputs, targets), or dicts with targets under one of {TARGET_KEYS}"
        raise DataError(error.got, expected, "Give such samples.") from error
