"""Exact curvature products over a data set, v -> B v, from graphs that are kept or rebuilt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.curvature.kernels import TwiceDifferentiable
from fisher_forget.data.batches import Batch
from fisher_forget.data.pieces import Pieces
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params

# v -> sum over some samples, keyed by the parameters they use
Chunk = Callable[[Mapping[str, Tensor]], Params]


class Linearised:
    r"""Products with the Jacobian J of some samples' outputs, on the graph of one forward pass.

    J v comes from differentiating u -> J^T u (Pearlmutter's R-operator by double backward), so it
    costs about one training pass over the samples and works for every layer that autograd can
    differentiate twice.

    Args:
        outputs: The model's, with their graph.
        live: Its parameters, the leaves of the graph.
    """

    def __init__(self, outputs: Tensor, live: Params) -> None:
        self.outputs = outputs
        self._u = torch.zeros_like(outputs, requires_grad=True)
        leaves = list(live.values())
        grads = torch.autograd.grad(outputs, leaves, self._u, create_graph=True, allow_unused=True)
        pairs = zip(live.items(), grads, strict=True)
        # a gradient that does not depend on u is zero: that of a rounded value, say
        self._used = {n: (p, g) for (n, p), g in pairs if g is not None and g.requires_grad}

    def push(self, v: Mapping[str, Tensor]) -> Tensor:
        """J v, of the outputs' shape; keys that `v` lacks are zero."""
        names = [name for name in self._used if name in v]
        if not names:
            return torch.zeros_like(self._u)
        grads = [self._used[name][1] for name in names]
        # J^T u is linear in u, so its derivative with respect to u, against v, is J v
        (jv,) = torch.autograd.grad(
            grads,
            self._u,
            [v[name] for name in names],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return jv

    def pull(self, u: Tensor) -> Params:
        """J^T u, keyed by the parameters that the samples use."""
        return P.pull(self.outputs, {name: p for name, (p, _) in self._used.items()}, u)


class GgnChunk:
    r"""v -> sum_n J_n^T H_n J_n v over some samples.

    Args:
        outputs: The model's, with their graph.
        live: Its parameters, the leaves of the graph.
        weight: u_n -> H_n u_n.
    """

    def __init__(self, outputs: Tensor, live: Params, weight: Callable[[Tensor], Tensor]) -> None:
        self._jacobian, self._weight = Linearised(outputs, live), weight

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """Keyed by the parameters that the samples use."""
        return self._jacobian.pull(self._weight(self._jacobian.push(v)))


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
def twice_differentiable(
    model: nn.Module, at: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Graphs on, the model at given weights, and kernels that can be differentiated twice.

    What was built within one of these contexts is used within another, at the same weights.
    """
    with torch.enable_grad(), TwiceDifferentiable(), P.attached(model, at or {}):
        yield


def summed(chunks: Iterable[Chunk], v: Mapping[str, Tensor], count: float) -> Params:
    """(1/count) sum over the chunks of what they make of v."""
    total = {name: torch.zeros_like(x) for name, x in v.items()}
    # unlike a loop or a generator, `map` holds no chunk while the next one is built
    for part in map(lambda chunk: chunk(v), chunks):  # noqa: C417
        # parameters that a chunk does not use add nothing
        for name, value in part.items():
            total[name] += value
    return P.scale(total, 1 / count)


def ggn_chunk(model: nn.Module, live: Params, likelihood: Likelihood, batch: Batch) -> GgnChunk:
    """The GGN of a batch, at the weights that the model has now."""
    out = P.call(model, {}, batch.args, batch.kwargs)
    likelihood.check(out.detach(), batch.targets)
    return GgnChunk(
        out, live, partial(likelihood.hessian_product, out.detach(), targets=batch.targets)
    )


class DataProduct:
    """v -> B v over a data set: graphs are kept where all fit the memory, else rebuilt piece by
    piece.

    Args:
        model: A private copy, at the weights that the products are for whenever they are used.
        batches: The same samples at every call, on the model's device.
        build: Makes the chunk of some samples, the same each time.
        likelihood: Counts the scored positions.
        memory: Bytes that graphs may take at a time.
        keep: Overrides the choice.
        at: The weights that the products are for, where the model is at others.
        count: Divisor, where the samples are a part of those that the mean is over.

    Attributes:
        count: Scored positions that the mean is over.
        kept: Whether all graphs are kept.
        needed: Bytes of all graphs, as measured on one sample of each shape.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], Iterable[Batch]],
        build: Callable[[Batch], Chunk],
        likelihood: Likelihood,
        *,
        memory: int,
        keep: bool | None = None,
        at: Mapping[str, Tensor] | None = None,
        count: float | None = None,
    ) -> None:
        self._batches, self._build, self._memory = batches, build, memory
        self._within = partial(twice_differentiable, model, at)
        self._pieces = Pieces(model, self._chunk, at)
        counts, sizes = [], []
        for batch in batches():
            counts.append(float(likelihood.counts(batch.targets).double().sum()))
            sizes.append(len(batch) * self._pieces.sample_bytes(batch))
        self.count, self.needed = count or math.fsum(counts) or 1.0, sum(sizes)
        self.kept = self.needed <= memory if keep is None else keep
        self._chunks = list(self._built()) if self.kept else None

    @property
    def nbytes(self) -> int:
        """Of the graphs that are kept."""
        return self.needed if self.kept else 0

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """B v."""
        chunks = self._built() if self._chunks is None else self._chunks
        with self._within():
            return summed(chunks, v, self.count)

    def release(self) -> None:
        """Give the graphs up: products rebuild them from now on."""
        self.kept, self._chunks = False, None

    def _built(self) -> Iterator[Chunk]:
        for batch in self._batches():
            # nothing here holds a chunk while the next one is built
            yield from map(self._chunk, self._pieces(batch, self._memory))

    def _chunk(self, piece: Batch) -> Chunk:
        with self._within():
            return self._build(piece)
