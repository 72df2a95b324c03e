"""Counts the work that is done on a model by code that does not count for itself."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from fisher_forget import params as P
from fisher_forget._util.copies import copy_model


class SampleGradients(list[float]):
    """One number, the sample gradients so far, to which all copies of a model add."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def metered(model: nn.Module) -> tuple[nn.Module, SampleGradients]:
    """A copy of the model that counts its work, and of which every further copy does.

    A forward pass of a sample is a third of a sample gradient, a backward pass from its outputs two
    thirds; a product with the curvature is two backward passes over a graph that is kept.

    Args:
        model: Untouched.

    Returns:
        The copy, and its work so far.
    """
    twin, work = copy_model(model), SampleGradients([0.0])

    def count(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs = P.logits(output)
        samples, twice = len(outputs), False

        def back(_gradient: torch.Tensor) -> None:
            nonlocal twice
            work[0] += samples * (4 if twice else 2) / 3
            # with a graph of the gradient, products are to come
            twice = twice or torch.is_grad_enabled()

        work[0] += samples / 3
        if outputs.requires_grad:
            outputs.register_hook(back)

    twin.register_forward_hook(count)
    return twin, work
