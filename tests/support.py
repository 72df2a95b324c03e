"""The tables of docs/how-to/your-model.md: what is supported, how, and what is refused, read off
real models. `python tests/support.py` prints them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pieces import LENGTH, PIECES, WIDTH
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from fisher_forget import forget
from fisher_forget.curvature.double_backward import hidden_from_products
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.errors import FisherForgetError

RULES, VMAP, SINGLE = "layer rules", "all at once", "one by one"


class Attention(nn.Module):
    """torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Normed(nn.Module):
    """Convolution and norms over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norms = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.GroupNorm(2, WIDTH), nn.Tanh())
        self.layer = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norms(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return torch.tanh(self.layer(out))


class Bare(nn.Module):
    """A bare parameter, one of no dimensions, and a weight that another module uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.zeros(WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(x @ self.layer.weight + self.shift)


class Places(nn.Module):
    """Position ids [1, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.mix = nn.Embedding(LENGTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x + self.place(torch.arange(x.shape[1])[None])))


class Adapter(nn.Module):
    """A frozen layer with a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


class Reparametrised(nn.Module):
    """weight_norm of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.old = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.old(self.new(x)))


class MaxBag(nn.Module):
    """The largest entries of a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, WIDTH, mode="max")

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].detach() * 5).long().remainder(6)
        return x + self.bag(tokens)[:, None]


ROWS: dict[str, Callable[[], nn.Module]] = {
    "Linear, convolutions, embeddings, batch, group and layer norms": Normed,
    "frozen layers, LoRA": Adapter,
    "a layer called many times (a cell in a loop over time)": PIECES["cell"],
    "position embeddings, looked up once for the whole batch": Places,
    "attention: `nn.MultiheadAttention`, `nn.TransformerEncoderLayer`": Attention,
    "bare parameters; weights used outside their module": Bare,
    "`weight_norm`, `spectral_norm`, parametrizations, pruning": Reparametrised,
    "convolutions over samples and frames merged": PIECES["frames"],
    "hypernetworks": PIECES["hyper"],
    "prompt vectors put in front": PIECES["prompt in front"],
    "`nn.RNN`, `nn.GRU`, `nn.LSTM` and their cells": PIECES["time first"],
    "the same on packed sequences": PIECES["packed lstm"],
    "mixture of experts, a head a task, early exit": PIECES["experts"],
    "samples sorted, or looped over, in forward": PIECES["sorted"],
    "`torch.utils.checkpoint`": PIECES["checkpoint"],
    "`torch.utils.checkpoint(use_reentrant=True)`": PIECES["reentrant checkpoint"],
    "`torch.autograd.Function` of your own": PIECES["custom"],
    "the same, `@once_differentiable`": PIECES["once differentiable"],
    "buffers that forward updates, activations that it stores": PIECES["counting"],
    "`nn.EmbeddingBag`; `sparse=True`": PIECES["bag"],
    '`nn.EmbeddingBag(mode="max")`': MaxBag,
    "`torch.cdist`": PIECES["distances"],
}


def how(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Where per-sample gradients and Newton's products come from."""
    torch.manual_seed(0)
    model = nn.Sequential(Inside(build()), nn.Linear(WIDTH, 3)).to(dtype).eval()
    batch = Batch((torch.randn(8, LENGTH, WIDTH, dtype=dtype),), {}, torch.zeros(8).long())
    tape = Tape(model)
    tape.verify(batch)
    way = RULES if not tape.stray else VMAP if tape._vectorised else SINGLE
    return way, "direct" if hidden_from_products(tape.model, tape.params, batch) else "exact"


class Inside(nn.Module):
    """A piece [B, T, D], and the mean over its steps."""

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.piece(torch.tanh(x)).mean(1)
        return out


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown, its text left-aligned."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def supported_table() -> str:
    """What is supported."""
    rows = [[name, *how(build)] for name, build in ROWS.items()]
    return table(["model", "per-sample gradients", "Newton steps"], rows)


def refusals() -> dict[str, tuple[Any, Any]]:
    """Models and data that are refused."""
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    data, plain = TensorDataset(x, y), nn.Linear(4, 3)
    meta, lazy = nn.Linear(4, 3, device="meta"), nn.LazyLinear(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Linear(4, 3), x)
        mixing = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    return {
        "TorchScript": (script, data),
        "parameters that were never made (`nn.LazyLinear`)": (lazy, data),
        'weights on the device "meta"': (meta, data),
        "half precision": (nn.Linear(4, 3).bfloat16(), data),
        "complex parameters": (nn.Linear(4, 3, dtype=torch.complex64), data),
        "NaN among the weights": (broken(), data),
        "Dropout or BatchNorm in training mode": (
            nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train(),
            data,
        ),
        "outputs that depend on the rest of the batch": (mixing.eval(), data),
        "outputs that differ between two calls": (Noisy(), data),
        "a softmax at the end": (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), data),
        "a data set without length": (plain, Stream()),
        "a loader that yields whole batches (`batch_size=None`)": (
            plain,
            DataLoader([(x, y)], batch_size=None),
        ),
        "a collate function that drops samples": (plain, DataLoader(data, 4, collate_fn=drops)),
        "batches (ids, mask, labels)": (plain, TensorDataset(y, y, y)),
    }


def broken() -> nn.Module:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, float("nan"))
    return model


def drops(samples: list[Any]) -> Any:
    return default_collate(samples[1:])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Noisy(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def refused_table() -> str:
    """What is refused, and what to do instead, as the errors say it."""
    rows = []
    for name, (model, data) in refusals().items():
        try:
            forget(model, data, [0], progress=False)
        except FisherForgetError as error:
            rows.append([name, error.fix])
        else:
            raise AssertionError(f"{name} is not refused")
    return table(["refused", "what to do instead"], rows)


if __name__ == "__main__":
    print(supported_table(), refused_table(), sep="\n\n")
