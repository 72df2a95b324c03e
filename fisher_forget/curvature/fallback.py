"""Per-sample gradients of what no layer rule covers, from the model's own forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.params import Params

Columns = Callable[[Tensor], Params]  # column [N, ...] -> gradients of <column_n, f_n>, [N, *shape]


class Fallback:
    """Gradients of <column_n, f_n> of every sample of a chunk, for some parameters.

    The forward pass is made once for all columns, at the first one. Either all samples go through
    torch.func.vmap, each with a copy of the parameters of its own; or, for what vmap cannot trace
    (packed sequences, data-dependent branches, buffers that forward changes, functions without a
    batching rule), one sample at a time goes through plain autograd, which works for every model.

    Args:
        model: Its forward is called.
        params: The parameters, by name.
        batch: The samples.
        vectorised: Whether to use vmap.

    Attributes:
        vectorised: Whether vmap is in use; not after it has failed.
    """

    def __init__(self, model: nn.Module, params: Params, batch: Batch, vectorised: bool) -> None:
        self._model, self._params, self._batch = model, params, batch
        self.vectorised = vectorised
        self._columns: Columns | None = None

    def __call__(self, column: Tensor) -> Params:
        """Gradients [N, *shape] by name."""
        with torch.enable_grad():
            if self.vectorised:
                try:
                    return self._by_vmap(column)
                except Exception:  # what vmap traced on other samples, it need not on these
                    self.vectorised, self._columns = False, None
            self._columns = self._columns or self._one_by_one()
            return self._columns(column)

    def _by_vmap(self, column: Tensor) -> Params:
        with warnings.catch_warnings():
            # of operations that vmap has no rule for, and loops over: still faster than a loop here
            warnings.filterwarnings("ignore", "There is a performance drop")
            self._columns = self._columns or self._traced()
            return self._columns(column)

    def without_graph(self) -> Fallback:
        """The same, which makes its forward pass anew."""
        return Fallback(self._model, self._params, self._batch, self.vectorised)

    def _traced(self) -> Columns:
        """All samples in one pass of vmap."""
        size = len(self._batch)
        copies = {
            name: p.detach().expand(size, *p.shape).requires_grad_()
            for name, p in self._params.items()
        }
        dims = self._batch.dims()

        def single(weights: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            args, kwargs = torch.utils._pytree.tree_map(
                lambda x, dim: x if dim is None else x.unsqueeze(0),
                (args, kwargs),
                dims,
                is_leaf=lambda x: x is None,
            )
            return P.call(self._model, weights, args, kwargs)[0]

        each = torch.func.vmap(single, in_dims=(0, *dims))
        with P.attached(self._model, {}):  # no buffer keeps what was traced
            outputs = each(copies, self._batch.args, self._batch.kwargs)

        def gradients(column: Tensor) -> Params:
            return self._filled(P.pull(outputs, copies, column), size)

        return gradients

    def _one_by_one(self) -> Columns:
        """A forward pass a sample."""
        outputs = [P.call(self._model, {}, one.args, one.kwargs) for one in self._batch.chunks(1)]

        def gradients(column: Tensor) -> Params:
            pairs = zip(outputs, column.split(1), strict=True)
            # a sample's outputs may not depend on the parameters at all (an early exit)
            pulled = [P.pull(f, self._params, v) if f.requires_grad else {} for f, v in pairs]
            rows = [self._filled(gradient) for gradient in pulled]
            return {name: torch.stack([row[name] for row in rows]) for name in self._params}

        return gradients

    def _filled(self, gradients: Params, *size: int) -> Params:
        """Zeros for the parameters that the outputs do not use."""
        return {
            name: gradients[name].detach() if name in gradients else p.new_zeros(*size, *p.shape)
            for name, p in self._params.items()
        }
