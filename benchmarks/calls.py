"""Seconds of `forget` and of prepared requests as shares of a retraining, all in one process; on
the GPU, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import forget, prepare
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import train

T = TypeVar("T")
CONFIGS = Path(__file__).parents[1] / "configs"
TRAINED = {"digits": 10, "mnist": 2, "cifar10": 4}  # recipe -> epochs, of which the others follow
REQUESTS = (1, 10, 100, 1000)  # samples
DIRECT = 100
QUICK = 4  # a part of the samples


def measure(recipe: str, *, quick: bool = False) -> dict[str, Any]:
    """Train by a recipe for a few epochs, then forget random samples.

    Args:
        recipe: A key of `TRAINED`.
        quick: On a quarter of the samples.

    Returns:
        "retraining_s", the epochs of the recipe times the seconds of one; "forget_s" without
        `DIRECT` samples, "prepare_s", and "prepared_s", size of a request -> seconds.
    """
    config = load_config(CONFIGS / f"{recipe}.yaml")
    bundle = config.data.load()
    count = len(bundle.train) // (QUICK if quick else 1)
    data = TensorDataset(*(tensor[:count] for tensor in bundle.train.tensors))
    shape, outputs = tuple(data.tensors[0].shape[1:]), len(bundle.classes)
    model = build_model(config.model.name, shape, outputs, seed=0, **config.model.options)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    few = replace(config.training, epochs=TRAINED[recipe])
    look: dict[str, Any] = {"seed": 0, "progress": False}
    train(model, data, replace(few, epochs=1), **look)  # pays for what is done once
    trained, seconds = timed(train, model, data, few, **look)
    loader = DataLoader(data, batch_size=config.training.batch_size)
    order = np.random.default_rng(0).permutation(count)
    _, direct = timed(forget, trained, loader, order[:DIRECT], progress=False)
    prepared, once = timed(prepare, trained, loader, progress=False)
    requests = {
        size: timed(prepared.forget, order[:size])[1] for size in REQUESTS if size <= count // 2
    }
    return {
        "samples": count,
        "epochs": config.training.epochs,
        "retraining_s": seconds / few.epochs * config.training.epochs,
        "forget_s": direct,
        "prepare_s": once,
        "prepared_s": requests,
    }


def timed(function: Callable[..., T], *args: Any, **options: Any) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    begun = perf_counter()
    result = function(*args, **options)
    return result, perf_counter() - begun
