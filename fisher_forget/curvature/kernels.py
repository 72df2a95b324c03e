"""Operations whose fused kernels can't be differentiated twice, by kernels that can.

A mode puts them in their place. It holds for the calling thread alone, and as long as it is on: no
flag of torch changes, and no module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """By matrix products and a softmax."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        shut = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = shut.masked_fill(~attn_mask, -torch.inf)
    by_products = torch.ops.aten._scaled_dot_product_attention_math
    out: Tensor = by_products(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
    return out


def _multi_head(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Where its weights are wanted, attention is not fused."""
    out, weights = F.multi_head_attention_forward(*args, **options | {"need_weights": True})
    return out, weights if options.get("need_weights", True) else None


def _lstm(*args: Any) -> tuple[Tensor, ...]:
    """As packed sequences of equal lengths."""
    if isinstance(args[1], Tensor):  # packed already
        return torch.lstm(*args)
    x, *rest, batch_first = args
    x = x.transpose(0, 1) if batch_first else x
    steps, size = x.shape[:2]
    sizes = torch.full((steps,), size)
    out, *state = torch.lstm(x.reshape(steps * size, -1), sizes, *rest)
    out = out.view(steps, size, -1)
    return (out.transpose(0, 1) if batch_first else out, *state)


def _embedding(*args: Any, **options: Any) -> Tensor:
    """With dense gradients."""
    return F.embedding(*args, **options | {"sparse": False})


def _embedding_bag(ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """By rows, summed up bag by bag; a maximum stays what it is."""
    if options["mode"] == "max" or options["max_norm"] is not None:
        return F.embedding_bag(ids, weight, **options)
    flat, starts = ids.reshape(-1), options["offsets"]
    if starts is None:  # bags of equal lengths
        starts = torch.arange(len(ids), device=ids.device) * ids.shape[1]
    elif options["include_last_offset"]:
        starts = starts[:-1]
    places = torch.arange(len(flat), device=ids.device, dtype=starts.dtype)
    bag = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    padding = options["padding_idx"]
    counted = torch.ones_like(flat) if padding is None else flat != padding % len(weight)
    factors = counted.to(weight.dtype)
    if options["per_sample_weights"] is not None:
        factors = factors * options["per_sample_weights"].reshape(-1)
    rows = F.embedding(flat, weight) * factors[:, None]
    total = rows.new_zeros(len(starts), weight.shape[1]).index_add(0, bag, rows)
    if options["mode"] == "sum":
        return total
    counts = factors.new_zeros(len(starts)).index_add(0, bag, factors)
    return total / counts.clamp(min=1)[:, None]


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, **_: Any) -> Tensor:
    """From the differences themselves."""
    out: Tensor = torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)
    return out


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch's own takes |v| for a constant when it is differentiated twice."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


REPLACED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    torch.lstm: _lstm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch.cdist: _cdist,
    torch._weight_norm: _weight_norm,
}


class TwiceDifferentiable(TorchFunctionMode):
    """While it is on, the operations of `REPLACED` use kernels that can be differentiated twice."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))
