r"""Faults that are put into training data on purpose, so that it is known what a repair must undo.

    trigger    some images get a patch of size x size bright pixels at the bottom right, and one
               label: whoever shows the patch gets that answer (BadNets, Gu et al. 2017,
               arXiv:1708.06733; 3 x 3 and the label 0 as in Goel et al. 2024, arXiv:2402.14015)
    swap       some samples of two classes get the label of the other one (Goel et al.'s
               interclass confusion)
    labels     some samples get another label at random

A repair is judged by true labels: on the test samples that the fault concerns (`Injected.affected`)
and on all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fisher_forget.data.samples import samples, take
from fisher_forget.data.split import Indices
from fisher_forget.errors import ConfigError, DataError


@dataclass(frozen=True)
class Fault:
    """A fault and how much of it there is.

    Attributes:
        kind: "trigger", "swap" or "labels"; see the module.
        share: Of the training samples; of those of the two classes for "swap". Above 0, below 1.
        label: That of the images with the trigger; they are of other classes.
        size: Side of the patch, pixels.
        classes: The two that are swapped.
        seed: Says which samples, and which labels.

    Raises:
        ConfigError: If one of them is out of range.

    Example:
        >>> x, y = torch.zeros(100, 1, 8, 8), torch.arange(100) % 10
        >>> data, found = Fault("trigger", 0.1).put(TensorDataset(x, y), 10)
        >>> len(found.samples), float(data.tensors[1][found.samples].max())
        (10, 0.0)
    """

    kind: Literal["trigger", "swap", "labels"]
    share: float
    label: int = 0
    size: int = 3
    classes: tuple[int, ...] = (3, 5)
    seed: int = 0

    def __post_init__(self) -> None:
        two = len(self.classes) == 2 == len(set(self.classes))
        for got, good, expected in (
            (f"share: {self.share}", 0 < self.share < 1, "above 0 and below 1"),
            (f"size: {self.size}", self.size >= 1, "at least one pixel"),
            (f"classes: {list(self.classes)}", two, "two different ones"),
            (f"seed: {self.seed}", self.seed >= 0, "at least 0"),
        ):
            if not good:
                raise ConfigError(f"a fault with {got}", expected, "Correct the fault.")

    def put(self, train: TensorDataset, classes: int) -> tuple[TensorDataset, Injected]:
        """Training data with the fault, and what it did. The data given stay as they are.

        Args:
            train: (inputs, labels).
            classes: How many classes there are.

        Raises:
            ConfigError: If a class is not there, or the share is no sample or more than there are.
            DataError: If there are no classes, or the trigger does not fit into images.
        """
        inputs, labels = train[:]
        if not classes or labels.dim() != 1:
            fix = "Choose other data: nothing can be mislabelled here."
            raise DataError("a fault for data without classes", "one class a sample", fix)
        concerned = self._concerned(labels, classes)
        whole = len(labels) if self.kind == "trigger" else len(concerned)
        rng, count = np.random.default_rng(self.seed), int(self.share * whole)
        if not 0 < count <= len(concerned):
            got = f"a fault with share: {self.share}, which is {count} of {whole:,} samples"
            raise ConfigError(got, f"1 to {len(concerned):,} samples", "Correct the share.")
        chosen = np.sort(rng.choice(concerned, count, replace=False))
        labels, brightest = labels.clone(), 0.0
        if self.kind == "trigger":
            self._check_images(inputs)
            inputs, brightest = inputs.clone(), float(inputs.max())
            inputs[chosen] = stamped(inputs[chosen], self.size, brightest)
            labels[chosen] = self.label
        elif self.kind == "swap":
            labels[chosen] = sum(self.classes) - labels[chosen]
        else:
            steps = torch.from_numpy(rng.integers(1, classes, count))
            labels[chosen] = (labels[chosen] + steps) % classes
        return samples(inputs, labels), Injected(self, chosen, brightest)

    def _concerned(self, labels: Tensor, classes: int) -> Indices:
        """Samples that the fault may change."""
        named = {"trigger": (self.label,), "swap": self.classes, "labels": ()}[self.kind]
        present = set(labels.unique().tolist())
        known = set(range(classes)) if self.kind == "trigger" else present
        if missing := [label for label in named if label not in known]:
            fix = "Correct the fault's label or classes."
            got = f"a fault with the class {missing[0]}"
            raise ConfigError(got, f"one of {sorted(known)}", fix)
        mask = torch.ones(len(labels), dtype=torch.bool)
        if named:
            mask = torch.isin(labels, torch.tensor(named)) ^ (self.kind == "trigger")
        return np.flatnonzero(mask.numpy())

    def _check_images(self, inputs: Any) -> None:
        shape = tuple(getattr(inputs, "shape", ()))[1:]
        if len(shape) < 2:
            what = f"inputs of shape {shape}" if shape else "named inputs"
            expected, fix = "images [..., height, width]", "Choose another fault."
            raise DataError(f"a trigger for {what}", expected, fix)
        if self.size > min(shape[-2:]):
            got = f"a trigger of {self.size} x {self.size} pixels for images of {shape[-2:]}"
            raise DataError(got, "one that is no larger than the image", "Set a smaller size.")


@dataclass(frozen=True)
class Injected:
    """What a fault did to training data.

    Attributes:
        fault: The fault.
        samples: Indices of the samples that were changed, sorted.
        brightest: Value of the trigger's pixels, the largest of the training images.
    """

    fault: Fault
    samples: Indices
    brightest: float = 0.0

    def known(self, gamma: float, seed: int = 0) -> Indices:
        """A part of them, drawn at random: gamma of all, one at least.

        Raises:
            ConfigError: If gamma is not above 0 and at most 1.
        """
        if not 0 < gamma <= 1:
            raise ConfigError(f"gamma: {gamma}", "above 0, and at most 1", "Correct gamma.")
        count = max(1, round(gamma * len(self.samples)))
        rng = np.random.default_rng((self.fault.seed, seed, 3))
        return np.sort(rng.choice(self.samples, count, replace=False))

    def affected(self, test: TensorDataset) -> TensorDataset:
        """Test samples that the fault concerns, with their true labels: those of other classes with
        the trigger, those of the swapped classes, or all.

        Raises:
            DataError: If there are none.
        """
        fault, labels = self.fault, test.tensors[-1]
        rows = torch.ones(len(labels), dtype=torch.bool)
        if fault.kind == "trigger":
            rows = labels != fault.label
        elif fault.kind == "swap":
            rows = torch.isin(labels, torch.tensor(fault.classes))
        if not bool(rows.any()):
            fix = "Load more test samples."
            raise DataError("no test sample that the fault concerns", "at least one", fix)
        found = take(test, rows)
        if fault.kind != "trigger":
            return found
        images, labels = found.tensors
        return TensorDataset(stamped(images, fault.size, self.brightest), labels)


def stamped(images: Tensor, size: int, value: float) -> Tensor:
    """Copies of images [..., height, width] with a square of that value at the bottom right."""
    images = images.clone()
    images[..., -size:, -size:] = value
    return images
