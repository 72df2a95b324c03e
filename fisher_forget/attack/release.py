"""What someone who may ask a model sees of it, and what its owner can hold back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util.checks import is_number, is_whole
from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Array, as_array
from fisher_forget.evaluate.predictions import predict, settled_by, whole_splits
from fisher_forget.likelihood import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    resolve_likelihood,
)

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

    def __post_init__(self) -> None:
        if not isinstance(self.release, Release):
            got = f"release={self.release!r}"
            raise ConfigError(got, "a Release", "Pass Release(labels_only=True), say.")

    def sees(self, model: Model, samples: TensorDataset) -> Array:
        """Published answers [N, C] to samples: probabilities, or numbers where targets are.

        Raises:
            ModelError, DataError, NumericalError: If the model cannot be asked, or its answers are
                no predictions.
            ConfigError: If something is held back of numbers, which have no classes.
        """
        classes = self.classes(samples)
        if isinstance(model, nn.Module):
            answers = _module_answers(model, samples, self.likelihood, classes is not None)
        else:
            answers = _function_answers(model, samples)
        if not np.isfinite(answers).all():
            got = "answers that are NaN or infinite"
            raise NumericalError(got, "finite predictions", "Check the model.")
        if classes is not None:
            _check_probabilities(answers, classes)
        elif self.release.labels_only or self.release.top_k is not None:
            got = "a regression of which labels or the largest k are published"
            raise ConfigError(got, "noise, or nothing held back", "Leave the others out.")
        return self.release.of(answers, self._rng)

    def classes(self, samples: TensorDataset) -> NDArray[np.int64] | None:
        """Targets as classes [N]; `None` for numbers.

        Raises:
            DataError: If there are several classes a sample.
        """
        targets = samples.tensors[-1]
        binary = isinstance(resolve_likelihood(self.likelihood), Bernoulli)
        if targets.is_floating_point() and not binary:
            return None
        classes = targets.long()
        if classes.numel() != len(classes) or not bool((classes == targets).all()):
            got = f"targets of shape {tuple(targets.shape)}, or between two classes"
            raise DataError(got, "one class a sample [N]", "Attack a model of single targets.")
        return classes.flatten().numpy()

    def losses(self, answers: Array, samples: TensorDataset) -> Array:
        """-ln p_y of the class, or the squared error of numbers, by sample: [N].

        Raises:
            DataError: If there are not as many targets as answers.
        """
        classes, targets = self.classes(samples), as_array(samples.tensors[-1])
        if classes is not None:
            p = answers[np.arange(len(answers)), classes]
            return as_array(-np.log(np.maximum(p, np.finfo(float).tiny)))
        if targets.size != answers.size:
            got = f"answers of shape {answers.shape} to targets of shape {targets.shape}"
            raise DataError(got, "as many of each", "Pass integer targets if they are classes.")
        return as_array(np.square(answers - targets.reshape(answers.shape)).sum(1))


def _module_answers(
    model: nn.Module, samples: TensorDataset, likelihood: Likelihood | str, classes: bool
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
    if classes and isinstance(settled, Categorical):
        return as_array(torch.softmax(outputs, 1))
    if classes and isinstance(settled, Bernoulli) and outputs.shape[1] == 1:
        p = torch.sigmoid(outputs)
        return as_array(torch.cat([1 - p, p], 1))
    if not classes and isinstance(settled, Gaussian):
        return as_array(outputs)
    kind = "classes" if classes else "numbers"
    got = f"targets that are {kind}, and a module of {settled} with {outputs.shape[1]} outputs"
    fix = "Correct `likelihood`, or pass a function from inputs to predictions."
    raise DataError(got, "one class a sample, or numbers of a regression", fix)


def _function_answers(model: Callable[[Any], Any], samples: TensorDataset) -> Array:
    inputs = samples.tensors[0].numpy()
    answers = np.asarray(model(inputs), dtype=np.float64)
    if answers.ndim == 1:
        answers = answers[:, None]
    if answers.ndim != 2 or len(answers) != len(inputs):
        got = f"answers of shape {answers.shape} to {len(inputs)} samples"
        raise DataError(got, "[N, C] or [N]", "Let the function give a row for each sample.")
    return answers


def _check_probabilities(answers: Array, classes: NDArray[np.int64]) -> None:
    if classes.min() < 0 or classes.max() >= answers.shape[1]:
        got = f"targets from {classes.min()} to {classes.max()} of {answers.shape[1]} classes"
        raise DataError(got, "targets from 0 to C - 1", "Check targets and the model's classes.")
    sums = answers.sum(1)
    if answers.min() < -ROUNDING or np.abs(sums - 1).max() > ROUNDING:
        got = f"answers that sum to {sums.min():.3g} ... {sums.max():.3g}"
        fix = "Pass predict_proba, or a module with its likelihood; float targets for numbers."
        raise DataError(got, "probabilities, as targets are classes", fix)
