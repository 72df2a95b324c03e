"""What someone who may ask a model sees of it, and what its owner can hold back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util.checks import is_number, is_whole
from fisher_forget.errors import ConfigError, DataError, ModelError, NumericalError
from fisher_forget.evaluate.intervals import Array, as_array
from fisher_forget.evaluate.predictions import predict, settled_by, whole_splits
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian, Likelihood

# A module; or a function from inputs (an array [N, ...]) to probabilities [N, C] or numbers [N],
# such as `predict_proba` or `predict` of scikit-learn.
Model = nn.Module | Callable[[Any], Any]
ROUNDING = 1e-3  # by which probabilities may miss a sum of 1


@dataclass(frozen=True)
class Release:
    """What is published of a classifier's probabilities; by default all of them.

    Noise comes first, then the cut, so that a cut hides what the noise has made of the rest.

    Attributes:
        top_k: Only the k largest probabilities. The attacker spreads what is missing to 1 evenly
            over the other classes.
        labels_only: Only the class that is predicted: 1 for it, 0 for the others.
        noise: Standard deviation of normal noise on each published probability, drawn anew for
            each answer.
        seed: Of this noise, so that an experiment can be repeated.

    Raises:
        ConfigError: If a value is out of range, or `top_k` is given with `labels_only`.
    """

    top_k: int | None = None
    labels_only: bool = False
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k is not None and not is_whole(self.top_k, 1):
            got = f"top_k={self.top_k!r}"
            raise ConfigError(got, "a whole number of at least 1, or None", "Pass top_k=3, say.")
        if not is_number(self.noise):
            got = f"noise={self.noise!r}"
            raise ConfigError(got, "a standard deviation of at least 0", "Pass noise=0.01, say.")
        if not is_whole(self.seed, 0):
            got = f"seed={self.seed!r}"
            raise ConfigError(got, "a whole number of at least 0", "Pass seed=0, say.")
        if self.labels_only and self.top_k is not None:
            got = f"labels_only=True and top_k={self.top_k}"
            raise ConfigError(got, "one of them", "Labels alone are less than the largest k.")

    def of(self, answers: Array, rng: np.random.Generator) -> Array:
        """What is published of probabilities [N, C], as the attacker completes it [N, C].

        Raises:
            ConfigError: If there are not more than `top_k` classes.
        """
        if self.noise:
            answers = answers + rng.normal(scale=self.noise, size=answers.shape)
        classes = answers.shape[1]
        if self.labels_only:
            return as_array(np.eye(classes)[answers.argmax(1)])
        if self.top_k is None:
            return answers
        if self.top_k >= classes:
            got = f"top_k={self.top_k} of {classes} classes"
            raise ConfigError(got, "fewer than there are classes", "Leave top_k out.")
        hidden = np.argsort(-answers, axis=1, kind="stable")[:, self.top_k :]
        shown = answers.copy()
        np.put_along_axis(shown, hidden, 0.0, axis=1)
        rest = (1 - shown.sum(1, keepdims=True)) / (classes - self.top_k)
        np.put_along_axis(shown, hidden, np.broadcast_to(rest, hidden.shape), axis=1)
        return shown


WHOLE = Release()


@dataclass(frozen=True)
class Observer:
    """Someone who asks models and sees what is released, with new noise at each answer.

    Attributes:
        release: What is published.
        likelihood: What modules were trained with; functions give predictions themselves.
        stream: Observers of other streams see other noise.
    """

    release: Release
    likelihood: Likelihood | str
    stream: int = 0

    @cached_property
    def _rng(self) -> np.random.Generator:
        """One stream: the same noise on both releases would cancel."""
        return np.random.default_rng([self.release.seed, self.stream])

    def sees(self, model: Model, samples: TensorDataset) -> Array:
        """Published answers [N, C] to samples: probabilities, or numbers where targets are.

        Raises:
            ModelError, DataError, NumericalError: If the model cannot be asked, or its answers are
                no predictions.
            ConfigError: If something is held back of numbers, which have no classes.
        """
        targets = samples.tensors[-1]
        if isinstance(model, nn.Module):
            answers = _module_answers(model, samples, self.likelihood)
        else:
            answers = _function_answers(model, samples)
        if not np.isfinite(answers).all():
            got = "answers that are NaN or infinite"
            raise NumericalError(got, "finite predictions", "Check the model.")
        if targets.is_floating_point():
            if self.release.labels_only or self.release.top_k is not None:
                got = "a regression of which labels or the largest k are published"
                raise ConfigError(got, "noise, or nothing held back", "Leave the others out.")
        else:
            _check_probabilities(answers, int(targets.max()), type(model).__name__)
        return self.release.of(answers, self._rng)


def losses(answers: Array, samples: TensorDataset) -> Array:
    """-ln p_y of the class, or the squared error of a number, by sample: [N]."""
    targets = samples.tensors[-1]
    if targets.is_floating_point():
        return as_array(np.square(answers - as_array(targets).reshape(answers.shape)).sum(1))
    p = answers[np.arange(len(answers)), targets.numpy()]
    return as_array(-np.log(np.maximum(p, np.finfo(float).tiny)))


def _module_answers(
    model: nn.Module, samples: TensorDataset, likelihood: Likelihood | str
) -> Array:
    splits = whole_splits({"asked": samples})
    settled = settled_by(model, splits, likelihood)
    outputs, _ = predict(model, splits["asked"])
    if outputs.dim() == 1:
        outputs = outputs[:, None]
    if outputs.dim() != 2:
        got = f"outputs of shape {tuple(outputs.shape)}"
        raise DataError(got, "one prediction a sample [N, C]", "Attack a model of single targets.")
    outputs = outputs.double()
    if isinstance(settled, Categorical):
        return as_array(torch.softmax(outputs, 1))
    if isinstance(settled, Bernoulli) and outputs.shape[1] == 1:
        p = torch.sigmoid(outputs)
        return as_array(torch.cat([1 - p, p], 1))
    if isinstance(settled, Gaussian):
        return as_array(outputs)
    fix = "Pass a function from inputs to probabilities [N, C] in place of the module."
    raise ConfigError(f"a module of {settled}", "one class or one number a sample", fix)


def _function_answers(model: Callable[[Any], Any], samples: TensorDataset) -> Array:
    if not callable(model):
        fix = "Pass its predict_proba (classes) or predict (numbers)."
        got = f"a model of type {type(model).__name__}, which cannot be called"
        raise ModelError(got, "a module, or a function from inputs to predictions", fix)
    inputs = samples.tensors[0].numpy()
    answers = np.asarray(model(inputs), dtype=np.float64)
    if answers.ndim == 1:
        answers = answers[:, None]
    if answers.ndim != 2 or len(answers) != len(inputs):
        got = f"answers of shape {answers.shape} to {len(inputs)} samples"
        raise DataError(got, "[N, C] or [N]", "Let the function give a row for each sample.")
    return answers


def _check_probabilities(answers: Array, largest: int, name: str) -> None:
    if answers.shape[1] <= largest:
        got = f"{answers.shape[1]} classes of a {name}, and the target {largest}"
        raise DataError(
            got, "targets from 0 to C - 1", "Check the targets, and the model's classes."
        )
    sums = answers.sum(1)
    if answers.min() < -ROUNDING or np.abs(sums - 1).max() > ROUNDING:
        got = f"answers that sum to {sums.min():.3g} ... {sums.max():.3g}"
        fix = "Pass predict_proba, or a module with its likelihood; float targets for numbers."
        raise DataError(got, "probabilities, as targets are classes", fix)
