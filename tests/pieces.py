"""Pieces of models that per-sample code finds hard, each [B, T, D] -> [B, T, D]: samples that are
routed, merged, sorted, fed one by one; layers that are fed once for the whole batch; kernels and
functions that vmap cannot trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

WIDTH, LENGTH = 4, 3


class Recurrent(nn.Module):
    """A recurrent layer, of any kind, packed or not."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool = False, **options: Any) -> None:
        super().__init__()
        sides = 2 if options.get("bidirectional") else 1
        size = options.pop("hidden", WIDTH // sides)
        self.rnn = kind(WIDTH, size, batch_first=True, **options)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            out = self.rnn(x)[0]
            return out if out.shape[-1] == WIDTH else out.repeat(1, 1, WIDTH // out.shape[-1])
        lengths = 1 + (x[:, 0, 0] > 0).long() * (x.shape[1] - 1)
        rows = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(rows)[0], batch_first=True, total_length=x.shape[1])[0]


class TimeFirst(nn.Module):
    """Two layers in both directions, time before samples, with an initial state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH // 2, num_layers=2, bidirectional=True)
        self.start = nn.Linear(WIDTH, 4 * WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.start(x[:, 0])).view(len(x), 4, -1).transpose(0, 1).contiguous()
        given = (state, state) if isinstance(self.rnn, nn.LSTM) else state
        out, end = self.rnn(x.transpose(0, 1), given)
        last = end[1] if isinstance(end, tuple) else end
        return out.transpose(0, 1) + last.sum(0).repeat(1, 2)[:, None]


class TiedRecurrent(nn.Module):
    """Two recurrent layers with one weight in common, and each its own biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0] + self.first(x.flip(1))[0]


class FormedWeight(nn.Module):
    """A recurrent layer one of whose weights is no parameter: forward forms it of one."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)
        weight = self.rnn.weight_hh_l0
        del self.rnn.weight_hh_l0
        self.raw = nn.Parameter(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = torch.tanh(self.raw)
        return self.rnn(x)[0]


class Cells(nn.Module):
    """torch's own cells in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(WIDTH, WIDTH), nn.LSTMCell(WIDTH, WIDTH, bias=False)
        self.rnn = nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        state, pair, states = x.new_zeros(len(x), WIDTH), None, []
        for step in range(x.shape[1]):
            state = self.gru(x[:, step], state)
            pair = self.lstm(state, pair)
            states.append(self.rnn(pair[0], pair[1]))
        return torch.stack(states, 1)


class Cell(nn.Module):
    """A cell in a loop over time: its layers are called once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.over = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), WIDTH), []
        for step in range(x.shape[1]):
            state = torch.tanh(self.into(x[:, step]) + self.over(state))
            states.append(state)
        return torch.stack(states, 1)


class Experts(nn.Module):
    """Tokens are routed to experts, which see the rows of any sample."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] * 7).long().remainder(len(self.experts))
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).nonzero().flatten()
            if len(mine):
                out = out.index_add(0, mine, torch.tanh(expert(rows[mine])))
        return x + out.view_as(x)


class HeadATask(nn.Module):
    """Whole samples go to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out, task = torch.zeros_like(x), (x[:, 0, 1] > 0.5).long()
        for index, head in enumerate(self.heads):
            mine = (task == index).nonzero().flatten()
            out = out.index_copy(0, mine, head(x[mine]))
        return torch.tanh(out)


class EarlyExit(nn.Module):
    """Sure samples leave early."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.early(x))
        unsure = first[:, 0, 0].detach().abs() < 0.4
        if not unsure.any():
            return first
        return first.masked_scatter(unsure[:, None, None], torch.tanh(self.late(first[unsure])))


class Sorted(nn.Module):
    """Sorts its samples, and sorts them back: each layer sees as many rows as there are samples,
    in another order; the two layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort()
        inside = torch.tanh(self.first(x[order]))
        return torch.tanh(self.second(inside[order.argsort()]))


class Hyper(nn.Module):
    """A layer that is fed one row makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.randn(1, 2))
        self.make = nn.Linear(2, WIDTH * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.make(self.seed).view(WIDTH, WIDTH))


class Prompt(nn.Module):
    """Prompt vectors through a layer, the same for all samples, added or put in front."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.prompt, self.front = nn.Parameter(torch.randn(1, WIDTH)), front
        self.encode = nn.Linear(WIDTH, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.encode(self.prompt)[None].expand(len(x), -1, -1)
        place = self.place(torch.arange(x.shape[1])[None])
        x = torch.tanh(self.mix(torch.cat([prompt, x + place], 1)) if self.front else x + place)
        return x[:, 1:] + x[:, :1] if self.front else x + prompt


class Frames(nn.Module):
    """A convolution over samples and time steps merged, sample by sample or step by step."""

    def __init__(self, steps_first: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 1, 3, padding=1), nn.GroupNorm(1, 1)
        self.steps_first = steps_first

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1) if self.steps_first else x
        out = torch.tanh(self.norm(self.conv(y.flatten(0, 1)[:, None])))[:, 0].view_as(y)
        return out.transpose(0, 1) if self.steps_first else out


class Loop(nn.Module):
    """One sample at a time, with or without a batch dimension of one."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.layer, self.keep = nn.Linear(WIDTH, WIDTH), keep

    def forward(self, x: Tensor) -> Tensor:
        rows = [x[i : i + 1] if self.keep else x[i] for i in range(len(x))]
        out = [torch.tanh(self.layer(row)) for row in rows]
        return torch.cat(out) if self.keep else torch.stack(out)


class Squash(torch.autograd.Function):
    """tanh, of the kind that vmap knows no rule for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class OnceSquash(Squash):
    """The same, whose backward cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Custom(nn.Module):
    """A layer behind a custom function, beside a bare parameter and one without dimensions."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(WIDTH, WIDTH), function
        self.shift, self.scale = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.function.apply(self.layer(x) + self.shift)


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, self.before(x), use_reentrant=self.reentrant)
        return out


class Counting(nn.Module):
    """Counts its calls in a buffer, and stores its last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.tanh(self.layer(input=x))
        return self.last


class Distances(nn.Module):
    """Distances to prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.prototypes)


class Bag(nn.Module):
    """Tokens read off the input: a bag of embeddings, and embeddings with sparse gradients."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, WIDTH, mode="mean", sparse=sparse)
        self.words = nn.Embedding(6, WIDTH, sparse=sparse)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].detach() * 5).long().remainder(6)
        return x + self.bag(tokens)[:, None] + self.words(tokens)


class Normalised(nn.Module):
    """Norms of every kind, one after a layer that it has in common with another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batch = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.group, self.last = nn.GroupNorm(2, WIDTH), nn.RMSNorm(WIDTH)
        self.instance = nn.InstanceNorm1d(WIDTH, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.layer(x).transpose(1, 2))
        x = torch.tanh(self.instance(x) + self.group(x)).transpose(1, 2)
        return torch.tanh(self.layer(self.last(x)))


class Dead(nn.Module):
    """A layer that no gradient passes through yet (a low-rank adapter as it starts), and one that
    only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.rare = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        seldom = (x[:, :1, 0] > 1.3).to(x)[..., None]
        return x + self.up(self.down(x)) + seldom * torch.tanh(self.rare(x))


PIECES: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "rnn": lambda: Recurrent(nn.RNN, num_layers=2, nonlinearity="relu"),
    "projected": lambda: Recurrent(nn.LSTM, bidirectional=True, proj_size=1, hidden=3),
    "time first": lambda: TimeFirst(nn.LSTM),
    "time first gru": lambda: TimeFirst(nn.GRU),
    "cells": Cells,
    "tied gru": TiedRecurrent,
    "formed gru": lambda: FormedWeight(nn.GRU),
    "formed lstm": lambda: FormedWeight(nn.LSTM),
    "packed": lambda: Recurrent(nn.GRU, packed=True),
    "packed lstm": lambda: Recurrent(nn.LSTM, packed=True),
    "cell": Cell,
    "experts": Experts,
    "four experts": lambda: Experts(4),
    "head a task": HeadATask,
    "early exit": EarlyExit,
    "sorted": Sorted,
    "hyper": Hyper,
    "prompt": lambda: Prompt(False),
    "prompt in front": lambda: Prompt(True),
    "frames": lambda: Frames(False),
    "frames by step": lambda: Frames(True),
    "loop": lambda: Loop(True),
    "loop without batch": lambda: Loop(False),
    "custom": lambda: Custom(Squash),
    "once differentiable": lambda: Custom(OnceSquash),
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "counting": Counting,
    "distances": Distances,
    "bag": Bag,
    "sparse bag": lambda: Bag(sparse=True),
    "normalised": Normalised,
    "dead": Dead,
}


class Net(nn.Module):
    """Pieces after each other, and a head on their mean over the steps."""

    def __init__(self, *names: str, outputs: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(*(PIECES[name]() for name in names))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean(1))


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """d f_nk / d w [N, K, d], one sample and one output at a time, by backward() alone."""
    model.zero_grad(set_to_none=True)
    parameters, rows = [p for p in model.parameters() if p.requires_grad], []
    for n in range(len(x)):
        for k in range(model(x[n : n + 1]).shape[1]):
            model(x[n : n + 1])[0, k].backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            rows.append(torch.cat([g.to_dense().reshape(-1) for g in grads]))
            model.zero_grad(set_to_none=True)
    return torch.stack(rows).view(len(x), -1, len(rows[0]))
