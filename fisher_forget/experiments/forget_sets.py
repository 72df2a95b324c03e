"""Which samples a run forgets: a class, some of a class, random, mislabelled or memorised ones, or
what is known of a fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisher_forget.data.samples import samples
from fisher_forget.data.split import Indices, resolve_split
from fisher_forget.errors import ConfigError
from fisher_forget.evaluate.predictions import predict
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.experiments.datasets import DataBundle

# Of the models that tell what is memorised: how many, and the share of the data each sees.
SUBSETS, SHARE = 20, 0.7

Scores = NDArray[np.float64]


def choose(settings: ForgetSet, data: DataBundle, memorised: Callable[[], Scores]) -> Indices:
    """The sorted indices that a forget set names.

    Args:
        settings: The forget set.
        data: Its training samples are chosen from.
        memorised: Gives the score of every training sample, see `memorisation`; called for that
            kind alone.

    Raises:
        ConfigError: If label, count or indices do not fit the data.
    """
    candidates = check(settings, data)
    if settings.kind in ("class", "indices", "fault"):
        return candidates
    assert settings.count is not None
    if settings.kind == "memorised":
        return np.sort(np.argsort(-memorised(), kind="stable")[: settings.count])
    rng = np.random.default_rng(settings.seed)
    return np.sort(rng.choice(candidates, settings.count, replace=False))


def check(settings: ForgetSet, data: DataBundle) -> Indices:
    """The samples to choose from; for a class, for indices and for a fault, the choice itself.

    Raises:
        ConfigError: If label, count, indices or gamma do not fit the data.
    """
    targets = data.train.tensors[-1].numpy()
    where = f"forget set {settings.name!r}"
    if settings.kind == "fault":
        if data.injected is None or settings.gamma is None:
            lacks = "gamma" if data.injected else "a fault in the data"
            expected = "both: how much of which fault is known"
            fix = "Set gamma, and data: {fault: {kind: trigger, share: 0.01}}, say."
            raise ConfigError(f"{where} without {lacks}", expected, fix)
        return data.injected.known(settings.gamma, settings.seed)
    if settings.kind == "indices":
        wanted = np.asarray(settings.indices, dtype=np.int64)
        if not len(wanted) or wanted.min() < 0 or wanted.max() >= len(targets):
            got, expected = f"{len(wanted)} indices", f"indices from 0 to {len(targets) - 1}"
            raise ConfigError(f"{where} with {got}", expected, "Correct them.")
        return np.unique(wanted)
    if settings.kind in ("mislabelled", "memorised") and not data.classes:
        got = f"{where} of kind {settings.kind!r} for regression"
        raise ConfigError(got, "classes", "Choose another kind.")
    candidates = np.arange(len(targets))
    if settings.kind in ("class", "samples"):
        candidates = np.flatnonzero(targets.reshape(len(targets), -1)[:, 0] == settings.label)
        if settings.label is None or not len(candidates):
            labels = sorted(set(targets.ravel().tolist()))[:20]
            got = f"{where} with label {settings.label}"
            raise ConfigError(got, f"one of {labels}", "Set label.")
    if settings.kind == "class":
        return candidates
    if settings.count is None or not 0 < settings.count < len(candidates):
        expected = f"1 to {len(candidates) - 1} samples"
        raise ConfigError(f"{where} with count {settings.count}", expected, "Set count.")
    return candidates


def corrupted(data: DataBundle, settings: ForgetSet, chosen: Indices) -> DataBundle:
    """The data as the originals were trained on: mislabelled samples carry another class, drawn at
    random."""
    if settings.kind != "mislabelled":
        return data
    inputs, targets = data.train[:]
    wrong = targets.clone()
    wrong[chosen] = other_labels(targets[chosen], len(data.classes), settings.seed)
    return replace(data, train=samples(inputs, wrong))


def other_labels(targets: Tensor, classes: int, seed: int) -> Tensor:
    """Labels [N], each drawn uniformly from the other classes.

    Example:
        >>> other_labels(torch.tensor([0, 1, 1]), 2, seed=0)
        tensor([1, 0, 0])
    """
    steps = np.random.default_rng((seed, 1)).integers(1, classes, len(targets))
    return (targets + torch.from_numpy(steps)) % classes


def subset(total: int, seed: int) -> Indices:
    """The share of the training samples that the model of one seed sees."""
    return np.sort(np.random.default_rng((seed, 2)).permutation(total)[: round(SHARE * total)])


def memorisation(models: Sequence[nn.Module], seeds: Sequence[int], data: DataBundle) -> Scores:
    r"""How much a sample's own label owes to having been trained on, between -1 and 1.

    mem(i) = mean over models trained with i of p(y_i | x_i) - mean over models trained without i of
    p(y_i | x_i), with the probability of the label in place of whether it is the most likely one,
    which needs fewer models. Feldman and Zhang 2020, arXiv:2008.03703, section 2.

    Args:
        models: The one of seed s was trained on `subset(total, s)`.
        seeds: One a model.
        data: Its training samples.

    Returns:
        [N]; 0 where every model, or none, was trained on the sample.
    """
    targets = data.train.tensors[-1]
    split = resolve_split(data.train, [], allow_empty=True)
    inside = np.zeros((len(models), len(targets)), dtype=bool)
    right = np.zeros((len(models), len(targets)))
    for row, (model, seed) in enumerate(zip(models, seeds, strict=True)):
        outputs, _ = predict(model, split)
        right[row] = outputs.double().softmax(-1).gather(1, targets[:, None])[:, 0].numpy()
        inside[row, subset(len(targets), seed)] = True
    seen, unseen = inside.sum(0), (~inside).sum(0)
    with_sample = (right * inside).sum(0) / np.maximum(seen, 1)
    without = (right * ~inside).sum(0) / np.maximum(unseen, 1)
    return np.where((seen > 0) & (unseen > 0), with_sample - without, 0.0)
