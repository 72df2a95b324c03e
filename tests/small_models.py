"""Small models with made-up data, one for each way in which layers are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

MODELS = ["mlp", "residual", "sequence", "patched", "merged"]


class Residual(nn.Module):
    """Convolutions of several kinds, BatchNorm, a shared layer, an in-place ReLU and a bare
    parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", groups=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shared = nn.Linear(16, 16)
        self.group = nn.GroupNorm(2, 16)
        self.head = nn.Linear(16, 3)
        self.temperature = nn.Parameter(torch.tensor([0.7, 1.1, 1.3]))
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.relu(self.mix(torch.tanh(x))) + x
        x = self.shared(torch.tanh(self.shared(x.flatten(1))))
        return self.head(self.group(x)) * self.temperature


class Sequence(nn.Module):
    """Tied embedding, position ids fed once a batch, LayerNorm, a Linear over positions that mixes
    them."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.token = nn.Embedding(classes, 4)
        self.place = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device)[None])
        return self.head(self.norm(x + torch.cumsum(self.mlp(x), 1)))


class Patched(nn.Module):
    """A weight used outside its module, and attention whose projections never run as modules: rules
    can't see these."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) + F.linear(x, self.inner.weight.T)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.out(x.mean(1))


class Merged(nn.Module):
    """Merges batch and positions into one dimension before its Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.conv = nn.Conv1d(4, 2, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        return self.conv(
            torch.tanh(self.a(x.reshape(n * t, d))).view(n, t, 4).transpose(1, 2)
        ).flatten(1)


def data_for(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    if name == "residual":
        return Residual(), torch.randn(7, 2, 4, 4), torch.randint(0, 3, (7,))
    if name == "sequence":
        targets = torch.randint(0, 5, (5, 4))
        targets[0, 2:] = -100
        return Sequence(), torch.randint(0, 5, (5, 4)), targets
    if name == "patched":
        return Patched(), torch.randn(5, 3, 4), torch.randint(0, 3, (5,))
    if name == "merged":
        return Merged(), torch.randn(5, 5, 3), torch.randint(0, 6, (5,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, torch.randn(9, 3), torch.randint(0, 4, (9,))


def prepared(name: str) -> tuple[nn.Module, TensorDataset]:
    """A model of `MODELS` in float64 and eval mode, and its data."""
    model, x, y = data_for(name)
    return model.double().eval(), TensorDataset(x.double() if x.is_floating_point() else x, y)
