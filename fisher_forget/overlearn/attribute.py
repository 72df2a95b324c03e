"""A sensitive attribute of each sample, and what the task's own labels tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisher_forget.errors import DataError

FEWEST = 12  # samples with each value: half to train on, half to test, of three folds

Attribute = Sequence[Any] | NDArray[Any] | Tensor
Codes = NDArray[np.int64]


def codes(attribute: Attribute, samples: int, name: str = "attribute") -> Codes:
    """The values as numbers from 0 [N].

    Args:
        attribute: One value a sample: numbers or texts.
        samples: How many there must be.
        name: Of the argument, for messages.

    Raises:
        DataError: If there are not as many values as samples, or a value is missing.
    """
    values = np.asarray(attribute.cpu() if isinstance(attribute, Tensor) else attribute)
    if values.shape != (samples,):
        got = f"{name} of shape {values.shape} for {samples:,} samples"
        raise DataError(got, f"one value a sample [{samples}]", "Pass a flat list or array.")
    if values.dtype == object or (values.dtype.kind == "f" and np.isnan(values).any()):
        got = f"{name} with missing or mixed values"
        raise DataError(got, "numbers, or texts", "Leave samples without a value out.")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def sensitive(attribute: Attribute, samples: int, fewest: int = FEWEST) -> Codes:
    """The codes of an attribute that can be asked about.

    Raises:
        DataError: If it has one value only, too many, or a value with too few samples.
    """
    found = codes(attribute, samples)
    counts = np.bincount(found)
    if len(counts) < 2:
        got = "an attribute with one value"
        raise DataError(got, "at least two", "Pass samples that differ in it.")
    if counts.min() < fewest:
        got = f"a value of the attribute with {counts.min()} samples, of {len(counts)} values"
        expected = f"at least {fewest} samples with each value"
        raise DataError(got, expected, "Pass more samples, leave rare values out, or join them.")
    return found


def beyond(attribute: Codes, given: Codes) -> Tensor:
    r"""The attribute without what the given labels tell of it: a basis [N, r] of

        1(s_n = v) - mean over samples with the same label of 1(s = v),    for all values v,

    orthonormal in the mean over samples, in float64. With a single label it is the centred
    attribute.

    Raises:
        DataError: If the labels tell all of it.
    """
    s = torch.nn.functional.one_hot(torch.from_numpy(attribute)).double()
    for label in np.unique(given):
        rows = torch.from_numpy(given == label)
        s[rows] -= s[rows].mean(0)
    basis, sizes, _ = torch.linalg.svd(s, full_matrices=False)
    told = sizes > 1e-8 * len(s) ** 0.5
    if not bool(told.any()):
        got = "an attribute that the given labels tell wholly"
        raise DataError(got, "one that differs among samples of a label", "Leave `given` out.")
    kept: Tensor = basis[:, told] * len(s) ** 0.5
    return kept
