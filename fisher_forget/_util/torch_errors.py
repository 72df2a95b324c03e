"""What torch's own errors mean for who called this package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fisher_forget.errors import CurvatureError, FisherForgetError, ModelError

Reason = tuple[type[FisherForgetError], str, str, str]  # error, got, expected, fix

MEMORY = (
    ModelError,
    "a computation that ran out of memory",
    "a batch, a graph and a curvature that fit the device",
    "Lower the loader's batch_size, or structure='diagonal', or choose fewer parameters by "
    "subset=.",
)
REASONS: dict[str, Reason] = {
    r"out of memory|can't allocate memory": MEMORY,
    r"on the same device|not on the expected device|different from other tensors on": (
        ModelError,
        "tensors on different devices within forward",
        "a model whose parameters, buffers and own tensors lie on one device",
        "Call model.to(device), and register constants as buffers, which move with the model.",
    ),
    r"same dtype|expected scalar type|dtypes? (of|to be|don't) .*match|must match the dtype": (
        ModelError,
        "tensors of different types within forward",
        "one type: floating inputs are cast to that of the first parameter, integers are not",
        "Call model.float(), cast what forward makes itself, and integer inputs in unpack=.",
    ),
    r"derivative for .* is not implemented|does not support double backward|"
    r"[Dd]ouble.backward.* not (yet )?(supported|implemented)|once_differentiable": (
        CurvatureError,
        "an operation whose backward pass has no derivative of its own",
        "operations that can be differentiated twice, which products with the curvature need",
        "Pass solver='direct' with structure='ekfac', 'diagonal' or 'dense', or write the "
        "operation in plain torch.",
    ),
}


def reason_of(error: BaseException) -> Reason | None:
    """What a known error of torch means; `None` for any other."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return MEMORY
    text = str(error)
    found = (reason for pattern, reason in REASONS.items() if re.search(pattern, text))
    return next(found, None) if isinstance(error, (RuntimeError, NotImplementedError)) else None


@contextmanager
def explained() -> Iterator[None]:
    """Known errors of torch from within become the package's own; all others go through.

    Raises:
        ModelError: Out of memory; tensors on different devices or of different types.
        CurvatureError: An operation without a second derivative.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = reason_of(error)
        if reason is None:
            raise
        kind, got, expected, fix = reason
        raise kind(f"{got} ({str(error).splitlines()[0]})", expected, fix) from error
