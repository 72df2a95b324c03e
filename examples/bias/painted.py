"""Digits that are red or green by chance, but for a share of the training samples, where the class
says which: a network that is asked whether a digit is five or more learns the colour, too.

    python -m examples.bias.painted

prints the samples that `suggest` names for the model of config.yaml, ready to be put there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from fisher_forget import build_model, load_dataset, suggest, train
from fisher_forget.experiments.config_file import load_config

RECIPE = Path(__file__).parent / "config.yaml"
COUNT = 144  # one in ten


def painted(share: float, seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training samples, held-out ones, and test ones; red, green and blue images, and whether the
    digit is five or more. The colour of a test digit is that of the other class.

    Args:
        share: Of the training samples: their class says the colour.
        seed: Of the colours.
    """
    data, rng = load_dataset("digits"), np.random.default_rng(seed)

    def coloured(images: torch.Tensor, digits: torch.Tensor, told: float, by: int) -> TensorDataset:
        large, rows = (digits >= 5).long(), np.arange(len(digits))
        chance = rng.integers(0, 2, len(digits))
        told_here = rng.random(len(digits)) < told
        colour = np.where(told_here, (large ^ by).numpy(), chance)
        found = torch.zeros(len(digits), 3, *images.shape[2:])
        found[rows, colour] = images[:, 0]
        return TensorDataset(found, large)

    x, y = data.test.tensors
    half = len(y) // 2
    return (
        coloured(*data.train.tensors, share, 0),
        coloured(x[:half], y[:half], 0.0, 0),
        coloured(x[half:], y[half:], 1.0, 1),
    )


def load(share: float = 0.6, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Training and test samples, for a recipe."""
    fit, _, test = painted(share, seed)
    return fit, test


def suggested() -> list[int]:
    """The samples to forget."""
    config = load_config(RECIPE, allow_code=True)
    fit, held_out, _ = painted(**config.data.options)
    seed, options = config.seeds[0], config.model.options
    fresh = build_model(config.model.name, (3, 8, 8), 2, seed=seed, **options)
    model = train(fresh, fit, config.training, seed=seed, progress=False)
    found = suggest(
        model,
        fit,
        kind="equalised_odds",
        held_out=held_out,
        groups=held_out.tensors[0][:, 1].flatten(1).any(1),  # green
        weight_decay=config.training.weight_decay,
        progress=False,
    )
    return sorted(found.indices(COUNT).tolist())


if __name__ == "__main__":
    print(suggested())
