"""What examples of the documentation stand on where a page does not show it: a small trained model
and its data."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import TrainSettings, train

bundle = load_dataset("digits", max_train=500, max_test=200)
data, test = bundle.train, bundle.test
loader = DataLoader(data, batch_size=250)
forget_idx = torch.nonzero(data.tensors[1] == 3).flatten().tolist()
settings = TrainSettings(epochs=60, batch_size=50, lr=0.1, weight_decay=5e-4)


def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
    """A model of one seed, trained on some of the samples."""
    fresh = build_model("mlp", (1, 8, 8), 10, seed=seed, hidden=[32])
    return train(fresh, data, settings, seed=seed, indices=indices, progress=False)


def part(indices: list[int] | np.ndarray) -> TensorDataset:
    """Some of the training samples."""
    return TensorDataset(*(x[indices] for x in data.tensors))


model = train_fn(np.arange(len(data)), 0)
d_f, d_r = part(forget_idx), part(np.setdiff1d(np.arange(len(data)), forget_idx))
