"""Batches cut into pieces that fit in memory, by what autograd saves for one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.data.batches import Batch

MEMORY = 2**30  # bytes that activations may take at a time where nothing else is said: 1 GiB
PIECE = 4  # of them, one part in so many for a pass over the data
# Copies of the outputs that are alive at a time, at most: a KL divergence has two of float32 and
# five of float64. With a vocabulary of 50,000 they are most of what a sample takes.
OUTPUTS = 12


class Pieces:
    """Cuts batches into pieces; the size of one sample is measured once for every shape of inputs.

    Args:
        model: A private copy.
        build: Makes the graph of some samples, as long as its result is held.
        at: The weights that it is made at, where the model is at others.
    """

    def __init__(
        self,
        model: nn.Module,
        build: Callable[[Batch], object],
        at: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._build, self._at = model, build, at or {}
        self._known: dict[tuple[torch.Size, ...], int] = {}

    def __call__(self, batch: Batch, memory: int) -> Iterator[Batch]:
        """Pieces that take at most so many bytes each, and one sample at least."""
        if len(batch) == 1:
            yield batch
            return
        yield from batch.chunks(max(1, memory // self.sample_bytes(batch)))

    def sample_bytes(self, batch: Batch) -> int:
        """Bytes that a sample of the batch takes: its graph, and copies of its outputs."""
        shapes = batch.sample_shapes()
        if shapes not in self._known:
            self._known[shapes] = self._measure(next(batch.chunks(1)))
        return self._known[shapes]

    def _measure(self, single: Batch) -> int:
        """What autograd saves for one sample, without parameters and buffers themselves."""
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage().data_ptr()
            saved[storage] = max(saved.get(storage, 0), x.numel() * x.element_size())
            return x

        with P.attached(self._model, self._at):
            held = (*self._model.parameters(), *self._model.buffers())
            weights = {x.untyped_storage().data_ptr() for x in held}
            with torch.no_grad():
                outputs = P.call(self._model, {}, single.args, single.kwargs)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                self._build(single)
        graph = sum(size for storage, size in saved.items() if storage not in weights)
        return max(1, graph + OUTPUTS * outputs.numel() * outputs.element_size())
