"""Exact curvature products over a data set, v -> B v, from graphs that are kept or rebuilt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params

# v -> sum over some samples, keyed by the parameters they use
Chunk = Callable[[Mapping[str, Tensor]], Params]


class GgnChunk:
    r"""v -> sum_n J_n^T H_n J_n v over some samples, on the graph of one forward and backward pass.

    J v comes from differentiating u -> J^T u (Pearlmutter's R-operator by double backward), so each
    product costs about one training pass over the samples and works for every layer that autograd
    can differentiate twice.

    Args:
        outputs: The model's, with their graph.
        live: Its parameters, the leaves of the graph.
        weight: u_n -> H_n u_n.
    """

    def __init__(self, outputs: Tensor, live: Params, weight: Callable[[Tensor], Tensor]) -> None:
        self._outputs, self._weight = outputs, weight
        self._u = torch.zeros_like(outputs, requires_grad=True)
        leaves = list(live.values())
        grads = torch.autograd.grad(outputs, leaves, self._u, create_graph=True, allow_unused=True)
        pairs = zip(live.items(), grads, strict=True)
        self._used = {name: (p, g) for (name, p), g in pairs if g is not None}

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """Keyed by the parameters that the samples use."""
        leaves, grads = [p for p, _ in self._used.values()], [g for _, g in self._used.values()]
        # J^T u is linear in u, so its derivative with respect to u, against v, is J v
        (jv,) = torch.autograd.grad(
            grads, self._u, [v[name] for name in self._used], retain_graph=True
        )
        back = torch.autograd.grad(self._outputs, leaves, self._weight(jv), retain_graph=True)
        return dict(zip(self._used, back, strict=True))


class HessianChunk:
    r"""v -> sum_n (d^2 l_n / dw^2) v over some samples, on the graph of one gradient.

    H = GGN + (1/N) sum_n sum_k r_nk d^2 f_nk / dw^2. The second part makes it indefinite away from
    a minimum, and is not a sum of outer products: there are no columns to accumulate, only products
    H v (Pearlmutter 1994, Neural Computation 6).

    Args:
        loss: Sum of the samples' losses.
        live: The parameters, leaves of its graph.
    """

    def __init__(self, loss: Tensor, live: Params) -> None:
        grads = torch.autograd.grad(loss, list(live.values()), create_graph=True, allow_unused=True)
        pairs = zip(live.items(), grads, strict=True)
        # a parameter with a constant gradient has zero rows and columns
        self._used = {name: (p, g) for (name, p), g in pairs if g is not None and g.requires_grad}

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """Keyed by the parameters that the samples use."""
        if not self._used:
            return {}
        leaves, grads = [p for p, _ in self._used.values()], [g for _, g in self._used.values()]
        along = [v[name] for name in self._used]
        products = torch.autograd.grad(grads, leaves, along, retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(self._used, products, strict=True) if g is not None}


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Graphs on, without the fused attention kernels, which can't be differentiated twice."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def summed(chunks: Iterable[Chunk], v: Mapping[str, Tensor], count: float) -> Params:
    """(1/count) sum over the chunks of what they make of v."""
    total = {name: torch.zeros_like(x) for name, x in v.items()}
    for chunk in chunks:
        # parameters that a chunk does not use add nothing
        for name, value in chunk(v).items():
            total[name] += value
    return P.scale(total, 1 / count)


class DataProduct:
    """v -> B v over a data set: graphs are kept where all fit the memory, else rebuilt by chunk.

    Args:
        batches: The same samples at every call, on the model's device.
        build: Makes the chunk of some samples; a random kind draws its columns from the generator,
            the same each time.
        live: The parameters.
        likelihood: Counts the scored positions.
        samples: How many samples `batches` yields.
        memory: Bytes that graphs may take at a time.
        seed: Of the generator.
        keep: Overrides the choice.

    Attributes:
        count: Scored positions that the mean is over.
        kept: Whether all graphs are kept.
        nbytes: Bytes of the kept graphs, as measured on one sample.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Batch]],
        build: Callable[[Batch, torch.Generator], Chunk],
        live: Params,
        likelihood: Likelihood,
        *,
        samples: int,
        memory: int,
        seed: int = 0,
        keep: bool | None = None,
    ) -> None:
        self._batches, self._build, self._seed = batches, build, seed
        self.sample_bytes = self._measure(next(batches()), live)
        self._step = max(1, memory // self.sample_bytes)
        self.kept = samples <= self._step if keep is None else keep
        self.nbytes = self.sample_bytes * samples if self.kept else 0
        counts = (float(likelihood.counts(batch.targets).double().sum()) for batch in batches())
        self.count = math.fsum(counts) or 1.0
        self._chunks = list(self._built()) if self.kept else None

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """B v."""
        return summed(self._built() if self._chunks is None else self._chunks, v, self.count)

    def _built(self) -> Iterator[Chunk]:
        generator = torch.Generator().manual_seed(self._seed)
        for batch in self._batches():
            for piece in batch.chunks(self._step):
                with twice_differentiable():
                    chunk = self._build(piece, generator)
                yield chunk

    def _measure(self, batch: Batch, live: Params) -> int:
        """Bytes that autograd saves for one sample, without the parameters themselves."""
        weights = {p.untyped_storage().data_ptr() for p in live.values()}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                at = storage.data_ptr()
                saved[at] = max(saved.get(at, 0), x.numel() * x.element_size())
            return x

        single, generator = next(batch.chunks(1)), torch.Generator().manual_seed(0)
        with twice_differentiable(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self._build(single, generator)
        return max(sum(saved.values()), 1)


class GgnProduct:
    r"""v -> (1/count) sum_n J_n^T H_n J_n v, exact, with the graphs of all given samples kept.

    Args:
        outputs: The model at the point of expansion.
        live: Its parameters, the leaves of the graph.
        likelihood: Gives H_n.
        batches: The samples.
        count: Divisor: the scored positions of *all* retained data, even for some samples.
    """

    def __init__(
        self,
        outputs: Callable[[Batch], Tensor],
        live: Params,
        likelihood: Likelihood,
        batches: Iterable[Batch],
        count: float,
    ) -> None:
        self.count = count
        self._chunks: list[Chunk] = []
        for batch in batches:
            with twice_differentiable():
                out = outputs(batch)
                weight = partial(likelihood.hessian_product, out.detach(), targets=batch.targets)
                self._chunks.append(GgnChunk(out, live, weight))

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """B v."""
        return summed(self._chunks, v, self.count)
