"""Batches: how inputs and targets are taken out of what a loader yields, moved and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisher_forget.errors import DataError

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
Unpack = Callable[[Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Batch:
    """Positional and keyword inputs of one forward call, and the targets; every tensor leads with
    the batch dim."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `fn` to every tensor."""
        args, kwargs, targets = pytree.tree_map_only(
            Tensor, fn, (self.args, self.kwargs, self.targets)
        )
        return Batch(args, kwargs, targets)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; floating inputs to `dtype`: a float64 model takes float32 data."""

        return self.map(lambda x: x.to(device, dtype if x.is_floating_point() else None))

    def on(self, model: nn.Module) -> Batch:
        """The batch on the model's device and in its floating-point type."""
        first = next(model.parameters())
        return self.to(first.device, first.dtype)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Cut into pieces of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def sample_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of one sample's tensors."""
        return tuple(
            x.shape[1:]
            for x in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(x, Tensor)
        )

    def dims(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with 0 in place of every tensor that leads with the samples, else `None`:
        the `in_dims` of `torch.func.vmap`."""
        total = len(self)
        dims: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
            lambda x: 0 if isinstance(x, Tensor) and x.dim() and len(x) == total else None,
            (self.args, self.kwargs),
        )
        return dims

    def take(self, rows: slice) -> Batch:
        """The samples of a slice; tensors that do not lead with the batch go along whole."""
        total = len(self)
        return self.map(lambda x: x[rows] if x.dim() and len(x) == total else x)


def default_unpack(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a tuple, list or dict.

    A tuple or list gives its first two elements; further ones are ignored. A dict gives its target
    key (`labels`, `label`, `targets`, `target` or `y`); a single remaining entry is passed to
    forward by position, several by keyword.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if isinstance(batch, dict) or (hasattr(batch, "keys") and hasattr(batch, "items")):
        rest = dict(batch.items())
        keys = [key for key in TARGET_KEYS if key in rest]
        if keys:
            targets = rest.pop(keys[0])
            return (next(iter(rest.values())) if len(rest) == 1 else rest), targets
        got = f"a dict batch with the keys {sorted(map(str, rest))}"
        fix = "Pass unpack=lambda batch: (inputs, targets)."
        raise DataError(got, f"targets under one of {TARGET_KEYS}", fix)
    got = f"a batch of type {type(batch).__name__}"
    fix = "Pass unpack=lambda batch: (inputs, targets)."
    raise DataError(got, "a tuple or list (inputs, targets, ...) or a dict with a target key", fix)


def make_batch(raw: Any, unpack: Unpack | None = None) -> Batch:
    """A `Batch` from what the loader yielded.

    Raises:
        DataError: If inputs or targets cannot be found, or their lengths differ.
    """
    try:
        inputs, targets = (unpack or default_unpack)(raw)
    except DataError:
        raise
    except Exception as error:
        got = f"{type(error).__name__} from unpack: {error}"
        fix = "Correct the function given as unpack=."
        raise DataError(got, "unpack(batch) to return (inputs, targets)", fix) from error
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"targets of type {type(targets).__name__} that are not numbers ({error})",
            "a tensor, an array or numbers",
            "Map the labels to numbers in the data set, or pass "
            "unpack=lambda batch: (inputs, targets).",
        ) from error
    if not (targets.is_floating_point() or targets.is_complex()):
        targets = targets.long()  # cross-entropy takes no other integers
    if targets.dim() == 0:
        targets = targets[None]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if hasattr(inputs, "keys") and hasattr(inputs, "items"):
        kwargs = dict(inputs.items())
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    lengths = {
        len(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()
    }
    if len(targets) not in lengths:
        got = f"{len(targets)} targets for inputs of length {sorted(lengths)}"
        fix = "Pass unpack=lambda batch: (inputs, targets)."
        raise DataError(got, "as many targets as inputs in every batch", fix)
    return Batch(args, kwargs, targets)
