"""Batches: how inputs and targets are taken out of what a loader yields, moved and cut."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fisher_forget.errors import DataError, FisherForgetWarning
from fisher_forget.likelihood.streams import Streams

DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}
TARGET_KEYS = ("labels", "label", "targets", "target", "y")
Unpack = Callable[[Any], tuple[Any, Any]]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword, of one forward call
# Input, by its path within args and kwargs -> whether it has a row for every sample
Layout = Mapping[str, bool]
UNPACK = "Pass unpack=lambda batch: (inputs, targets)."


@dataclass(frozen=True)
class Batch:
    """Positional and keyword inputs of one forward call, and the targets.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        targets: [B, ...].
        by_sample: (args, kwargs) with 0 in place of every tensor [B, ...] that leads with the
            samples, else `None`. Left out, a tensor of B rows is taken for one that does.
        samples: Their indices in the data set [B]; `None` of a batch that was not read from one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor
    by_sample: Inputs | None = None
    samples: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        leaves = pytree.tree_leaves((self.args, self.kwargs, self.targets))
        return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `fn`, which keeps the samples in their place, to every tensor."""
        args, kwargs, targets = pytree.tree_map_only(
            Tensor, fn, (self.args, self.kwargs, self.targets)
        )
        return Batch(args, kwargs, targets, self.by_sample, self.samples)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; floating inputs to `dtype`: a float64 model takes float32 data."""

        return self.map(lambda x: x.to(device, dtype if x.is_floating_point() else None))

    def on(self, model: nn.Module) -> Batch:
        """The batch on the model's device and in its floating-point type; an encoder-decoder of
        `transformers` gets the decoder's inputs that it would make of its `labels`."""
        first = next(model.parameters())
        placed = self.to(first.device, first.dtype)
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        make: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if not decodes or make is None or placed.kwargs.keys() & DECODER_INPUTS:
            return placed
        (args, kwargs), name = placed.dims(), "decoder_input_ids"
        given = placed.kwargs | {name: make(labels=placed.targets)}
        return replace(placed, kwargs=given, by_sample=(args, kwargs | {name: 0}))

    def chunks(self, size: int) -> Iterator[Batch]:
        """Cut into pieces of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def sample_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of one sample's tensors, and of those that all samples share."""
        return tuple(x.shape if dim is None else x.shape[1:] for x, dim in self._tensors())

    def shared_shapes(self) -> list[list[int]]:
        """Shapes of the inputs without a row for every sample."""
        return [list(x.shape) for x, dim in self._tensors() if dim is None]

    def _tensors(self) -> Iterator[tuple[Tensor, int | None]]:
        """Every input tensor, with its entry of `dims`."""
        trees = (self.args, self.kwargs), self.dims()
        for x, dim in zip(*map(pytree.tree_leaves, trees), strict=True):
            if isinstance(x, Tensor):
                yield x, dim

    def dims(self) -> Inputs:
        """(args, kwargs) with 0 in place of every tensor that leads with the samples, else `None`:
        the `in_dims` of `torch.func.vmap`."""
        if self.by_sample is not None:
            return self.by_sample
        return _by_sample((self.args, self.kwargs), {}, len(self))

    def take(self, rows: slice | Tensor) -> Batch:
        """The samples at a slice or at indices; tensors that do not lead with the batch go along
        whole."""
        dims = self.dims()
        args, kwargs = pytree.tree_map(
            lambda x, dim: x if dim is None else x[rows], (self.args, self.kwargs), dims
        )
        samples = None if self.samples is None else self.samples[rows]
        return Batch(args, kwargs, self.targets[rows], dims, samples)

    def streams(self, seed: int) -> Streams:
        """Random numbers of the samples, wherever in the data they are read from."""
        assert self.samples is not None
        return Streams(seed, self.samples)


def default_unpack(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a tuple, list, dict or dataclass.

    A tuple or list gives its first two elements. Further ones are ignored, unless they may be the
    targets: integers, or floats behind floats. A dict, a dataclass or a named tuple gives its
    target key (`labels`, `label`, `targets`, `target` or `y`); a single remaining entry is passed
    to forward by position, several by keyword.

    Raises:
        DataError: If it is something else, or which are the targets is not clear.
    """
    entries = _entries(batch)
    keys = [] if entries is None else [key for key in TARGET_KEYS if key in entries]
    if entries is not None and keys:
        _check_columns(entries)
        targets = entries.pop(keys[0])
        return (next(iter(entries.values())) if len(entries) == 1 else entries), targets
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        if len(batch) > 2:
            _check_further(batch)
        return batch[0], batch[1]
    if entries is not None:
        got = f"a batch with the keys {sorted(map(str, entries))}"
        raise DataError(got, f"targets under one of {TARGET_KEYS}", UNPACK)
    got = f"a batch of type {type(batch).__name__}"
    expected = "a tuple or list (inputs, targets) or a dict with a target key"
    raise DataError(got, expected, UNPACK)


def make_batch(
    raw: Any, unpack: Unpack | None = None, layout: Layout | None = None, size: int | None = None
) -> Batch:
    """A `Batch` from what the loader yielded.

    Args:
        raw: One batch, as the collate function made it.
        unpack: Takes (inputs, targets) out of it.
        layout: Which inputs have a row for every sample; by default those that have as many rows
            as there are targets.
        size: How many samples it was made of, if that is known.

    Raises:
        DataError: If inputs or targets cannot be found, or there is not one of each a sample.
    """
    inputs, targets = unpacked(raw, unpack)
    if size is not None:
        check_targets(inputs, targets, size)
    dims = _by_sample(inputs, layout or {}, len(targets))
    if 0 not in pytree.tree_leaves(dims):
        raise _rowless(inputs, len(targets))
    return Batch(*inputs, targets, dims)


def layout_of(inputs: Sequence[Inputs], sizes: Sequence[int]) -> Layout:
    """Which inputs have a row for every sample: those whose rows follow the size of the batch.

    Args:
        inputs: Of batches of different sizes.
        sizes: Their numbers of samples.
    """
    rows = [
        {
            pytree.keystr(path): len(x)
            for path, x in pytree.tree_leaves_with_path(tree)
            if _has_rows(x)
        }
        for tree in inputs
    ]
    everywhere = set.intersection(*map(set, rows))
    return {
        path: all(found[path] == size for found, size in zip(rows, sizes, strict=True))
        for path in everywhere
    }


def unpacked(raw: Any, unpack: Unpack | None = None) -> tuple[Inputs, Tensor]:
    """Inputs of forward and targets, out of what the loader yielded.

    Raises:
        DataError: If they cannot be found.
    """
    try:
        inputs, targets = (unpack or default_unpack)(raw)
    except DataError:
        raise
    except Exception as error:
        got = f"{type(error).__name__} from unpack: {error}"
        fix = "Correct the function given as unpack=."
        raise DataError(got, "unpack(batch) to return (inputs, targets)", fix) from error
    if any(map(_is_packed, pytree.tree_leaves(inputs, _is_packed))):
        raise DataError(
            "a PackedSequence among the inputs, whose rows are steps of several samples",
            "inputs with a row for every sample",
            "Pass padded sequences and lengths, and call pack_padded_sequence in forward.",
        )
    inputs = plain(inputs)
    if isinstance(inputs, dict):
        return ((), inputs), _targets(targets)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return (args, {}), _targets(targets)


def plain(tree: Any) -> Any:
    """A tree with tensors in place of arrays, and dicts in place of other mappings and
    dataclasses."""

    def leaf(x: Any) -> Any:
        if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
            return torch.from_numpy(np.array(x))  # a copy: arrays may be read-only or reversed
        entries = None if isinstance(x, Tensor) else _entries(x)
        return x if entries is None else plain(entries)

    return pytree.tree_map(leaf, tree)


def _targets(targets: Any) -> Tensor:
    """Targets [B, ...]; integers become int64."""
    try:
        tensor = torch.as_tensor(plain(targets))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"targets of type {type(targets).__name__} that are not numbers ({error})",
            "a tensor, an array or numbers",
            "Map the labels to numbers in the data set, turn lists into tensors there (Hugging "
            "Face's data sets: with_format('torch')), or pass unpack=lambda batch: (inputs, "
            "targets).",
        ) from error
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.long()  # cross-entropy takes no other integers
    return tensor[None] if tensor.dim() == 0 else tensor


def _entries(batch: Any) -> dict[Any, Any] | None:
    """What a mapping, a dataclass or a named tuple holds, by name; `None` for anything else."""
    if callable(getattr(batch, "keys", None)) and callable(getattr(batch, "items", None)):
        return dict(batch.items())
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return dict(batch._asdict())
    return None


def _check_columns(entries: Mapping[Any, Any]) -> None:
    """Refuse lists that the default collate function has turned around, a tensor a position."""
    for name, value in entries.items():
        columns = isinstance(value, list) and all(isinstance(x, Tensor) for x in value)
        if columns and value and all(x.dim() == 1 for x in value):
            got = f"{name!r} as a list of {len(value)} tensors of shape {list(value[0].shape)}"
            fix = (
                "Turn the lists of the samples into tensors in the data set (Hugging Face's: "
                "with_format('torch')), or pass a loader with a collate function that does."
            )
            raise DataError(got, "one tensor that leads with the samples", fix)


def warn_of_weights(raw: Any, size: int) -> None:
    """Warn where a number a sample, which may weight the losses, is left out of a tuple."""
    entries = _entries(raw)
    named = entries is not None and any(key in entries for key in TARGET_KEYS)
    further = [] if named or not isinstance(raw, (tuple, list)) else map(plain, raw[2:])
    for x in further:
        numbers = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0
        if numbers and x.numel() == size == len(x) and bool((x != x[0]).any()):
            warnings.warn(
                "The batches hold a further number for every sample, which is not used: "
                "each sample counts the same. If the training weighted its losses, that "
                "is another objective. For silence pass unpack=lambda batch: (batch[0], batch[1]).",
                FisherForgetWarning,
                stacklevel=6,
            )


def _check_further(batch: Sequence[Any]) -> None:
    """Refuse to guess where a further element may be what the model was trained to predict."""
    first, second, *further = map(plain, batch)
    tensors = [x for x in further if isinstance(x, Tensor)]
    whole = any(not x.is_floating_point() for x in tensors)
    floats = isinstance(second, Tensor) and second.is_floating_point()
    if not whole and not (tensors and floats):
        return
    shown = [
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in (first, second, *further)
    ]
    names = ", ".join(f"batch[{i}]" for i in range(len(batch) - 1))
    raise DataError(
        f"a batch of {len(batch)} elements: {', '.join(shown)}",
        "two, inputs and targets, or an unpack= that says which they are",
        "If the first two are inputs and targets, pass unpack=lambda batch: (batch[0], batch[1]). "
        f"If the last holds the targets, pass unpack=lambda batch: (({names}), "
        f"batch[{len(batch) - 1}]).",
    )


def _by_sample(inputs: Inputs, layout: Layout, size: int) -> Inputs:
    """0 in place of every tensor that leads with the samples, else `None`."""

    def dim(path: pytree.KeyPath, x: Any) -> int | None:
        if not _has_rows(x):
            return None
        name = pytree.keystr(path)
        leads = layout.get(name, len(x) == size)
        if leads and len(x) != size:
            got = f"an input with {len(x)} rows in a batch of {size} samples"
            fix = "Let the collate function give every sample one row of it in every batch."
            raise DataError(got, f"{size} rows, as in other batches", fix)
        return 0 if leads else None

    dims: Inputs = pytree.tree_map_with_path(dim, inputs)
    return dims


def check_targets(inputs: Inputs, targets: Tensor, size: int) -> None:
    """Refuse a batch of so many samples that has not one target each."""
    if len(targets) == size:
        return
    lengths = _lengths(inputs)
    got = f"{len(targets)} targets for inputs of length {lengths}, of {size} samples"
    fix = f"The first dimension of each counts samples. {UNPACK}"
    if lengths == [len(targets)]:
        fix = (
            "Let the collate function keep every sample once: leave out in the data set what "
            "cannot be read, and give several views of a sample a dimension behind the first."
        )
    raise DataError(got, "as many targets as inputs in every batch, one a sample", fix)


def _rowless(inputs: Inputs, size: int) -> DataError:
    """What to say where no input has a row for every sample."""
    lengths = _lengths(inputs)
    got = f"{size} targets for inputs of length {lengths}, of which none counts the samples"
    return DataError(
        got if lengths else f"inputs without a tensor, for {size} targets",
        "as many targets as inputs in every batch, one a sample",
        "The first dimension of each counts samples: put it there, and pad what is merged into "
        "one tensor or held in lists and objects (graphs, bags, clips), with a mask or lengths "
        f"beside it. {UNPACK}",
    )


def _lengths(inputs: Inputs) -> list[int]:
    return sorted({len(x) for x in pytree.tree_leaves(inputs) if _has_rows(x)})


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedSequence)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0
