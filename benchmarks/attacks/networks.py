"""Networks, and what is public of their data."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import forget
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.training import TrainSettings, train

DECAY = 1e-2


def network(inputs: int, hidden: int) -> nn.Module:
    """Two layers; weights depend on nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        return nn.Sequential(nn.Flatten(), *layers)


class Digits:
    """Digits: 700 to train on, 700 that are public."""

    options: ClassVar[dict[str, Any]] = {"weight_decay": DECAY, "progress": False}

    def __init__(self, start: nn.Module | None = None) -> None:
        whole = load_dataset("digits").train
        self.data = take(whole, range(700))
        self.public = take(whole, range(700, 1400))
        self.settings = TrainSettings(epochs=100, lr=0.1, batch_size=60, weight_decay=DECAY)
        self.start = network(64, 32) if start is None else start

    def fit(self, indices: Indices, seed: int, data: TensorDataset | None = None) -> nn.Module:
        """A network of some of the samples."""
        chosen = self.data if data is None else data
        return train(self.start, chosen, self.settings, seed=seed, indices=indices, progress=False)

    def forget(self, before: nn.Module, gone: Indices, **changes: Any) -> nn.Module:
        """Without some of the samples, by this package; its noise comes from a seed, so that the
        table can be made again."""
        generator = torch.Generator().manual_seed(int(gone[0]))
        options = self.options | {"generator": generator} | changes
        return forget(before, self.data, gone, **options).model


class Mnist(Digits):
    """Two thousand images to train on and as many that are public. One Newton step: the flow takes
    none here for a single sample, which is as well known as before."""

    options: ClassVar[dict[str, Any]] = Digits.options | {"steps": 1}

    def __init__(self) -> None:
        whole = load_dataset("mnist").train
        self.data, self.public = take(whole, range(2000)), take(whole, range(2000, 4000))
        self.settings = TrainSettings(epochs=60, lr=0.1, batch_size=100, weight_decay=DECAY)
        self.start = network(784, 64)
