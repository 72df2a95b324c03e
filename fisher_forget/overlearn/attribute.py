"""A sensitive attribute of each sample, and what the task's own labels tell of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        attribute: One value a sample: numbers, texts, or what else can be put in order.
        samples: How many there must be.
        name: Of the argument, for messages.

    Raises:
        DataError: If there are not as many values as samples, a value is missing, or they have no
            order.
    """
    values = _array(attribute, name)
    if values.shape != (samples,):
        got = f"{name} of shape {values.shape} for {samples:,} samples"
        raise DataError(got, f"one value a sample [{samples}]", "Pass a flat list or array.")
    missing = sum(map(_is_missing, values)) if values.dtype == object else (values != values).sum()
    if missing:
        got = f"{name} without a value (None or NaN) for {missing:,} of {samples:,} samples"
        fix = "Leave these samples out, or give the missing a name of its own."
        raise DataError(got, "a value for each", fix)
    try:
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    except TypeError as error:
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        got = f"{name} with values of type {kinds}, which have no order ({error})"
        raise DataError(got, "numbers alone, or texts alone", "Turn them into texts.") from error


def _array(attribute: Attribute, name: str) -> NDArray[Any]:
    """The values as they are. NumPy would make texts of a list of texts and numbers, or None."""
    if isinstance(attribute, Tensor):
        x = attribute.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()
    if hasattr(attribute, "__array__") or not isinstance(attribute, Iterable):
        return np.asarray(attribute)
    for x in attribute:
        if isinstance(x, (list, Tensor, np.ndarray)) and np.ndim(x):
            got = f"{name} with a {type(x).__name__} as a value"
            raise DataError(got, "one value a sample", "Pass a flat list or array.")
    plain = (x.item() if isinstance(x, (Tensor, np.ndarray, np.generic)) else x for x in attribute)
    return np.fromiter(plain, dtype=object)


def _is_missing(value: Any) -> bool:
    """None, and what is not equal to itself: NaN, and pandas' NaT and NA."""
    same = value == value
    return value is None or not (isinstance(same, (bool, np.bool_)) and bool(same))


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
        few = (counts < fewest).sum()
        got = (
            f"an attribute of {len(counts):,} values, {few:,} of them rare (down to {counts.min()})"
        )
        expected = f"at least {fewest} samples with each value"
        fix = "Make bins of a number such as an age (np.digitize); join or leave out rare values."
        raise DataError(got, expected, fix)
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
