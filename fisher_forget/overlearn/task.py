"""A model, samples of its task, and an attribute that its linear layers are to forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget._util.copies import copy_model
from fisher_forget.errors import ModelError
from fisher_forget.evaluate.predictions import predict, settled_by, whole_splits
from fisher_forget.likelihood import Likelihood
from fisher_forget.overlearn.activations import finite_samples, inputs_of, layer_of
from fisher_forget.overlearn.attribute import Attribute, beyond, codes, sensitive

INDEPENDENT = 1e-7  # of a direction of C, relative to the largest: activations are float32


@dataclass(frozen=True)
class Task:
    """A model, samples of its task, and the attribute to be forgotten.

    Attributes:
        model: As it is by now.
        samples: With the task's targets.
        hidden: u of every sample [N, r].
        likelihood: Of the task.
    """

    model: nn.Module
    samples: TensorDataset
    hidden: Tensor
    likelihood: Likelihood

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        attribute: Attribute,
        given: Attribute | None,
        likelihood: Likelihood | str,
    ) -> Task:
        check_model(model)
        samples = finite_samples(data)
        values = sensitive(attribute, len(samples))
        told = codes(np.zeros(len(samples)) if given is None else given, len(samples), "given")
        settled = settled_by(model, whole_splits({"task": samples}), likelihood)
        return cls(copy_model(model).eval(), samples, beyond(values, told), settled)

    def covariance(self, layer: str) -> Tensor:
        """C = E[x u^T] of a layer's inputs [I, r]."""
        x = inputs_of(self.model, self.samples, layer).double()
        return x.T @ self.hidden / len(x)

    def told(self, layer: str) -> Tensor:
        """Orthonormal basis of the columns of C [I, rank of C]; W C = 0 where it is 0 times it."""
        basis, sizes, _ = torch.linalg.svd(self.covariance(layer), full_matrices=False)
        found: Tensor = basis[:, beyond_rounding(sizes, INDEPENDENT)]
        return found

    def leakage(self, layer: str) -> float:
        """|Cov(z, u)| of a layer's outputs."""
        return float((matrix(self.model, layer)[0] @ self.covariance(layer)).norm())

    def size(self, layer: str) -> float:
        """|W| |x|, |x| the root mean square of a layer's inputs: what rounding is relative to."""
        x = inputs_of(self.model, self.samples, layer).double()
        return float(matrix(self.model, layer)[0].norm() * x.square().sum(1).mean().sqrt())

    def performance(self) -> tuple[float, float]:
        """Mean loss and mean score."""
        outputs, targets = predict(self.model, whole_splits({"task": self.samples})["task"])
        loss = float(self.likelihood.mean_loss(outputs, targets))
        return loss, float(self.likelihood.scores(outputs, targets).mean())


def beyond_rounding(sizes: Tensor, least: float) -> Tensor:
    """Which sizes are more than `least` of the largest; none, where all are 0."""
    return sizes > least * sizes.max() if len(sizes) else sizes > 0


def matrix(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """W and b of a linear layer, in float64.

    Raises:
        ModelError: If it is another one, or shares them with another.
    """
    layer = layer_of(model, name)
    if not isinstance(layer, nn.Linear) or "weight" not in layer._parameters:
        got, expected = f"{name!r}, a {type(layer).__name__}", "an nn.Linear with a weight"
        linear = [k for k, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ModelError(got, expected, f"Take the next one, or the one before, of {linear}.")
    own = {id(p) for p in layer.parameters()}
    for other, m in model.named_modules():
        if m is not layer and own & {id(p) for p in m.parameters(recurse=False)}:
            got = f"{name!r}, which shares its weights with {other!r}"
            fix = "Give the layer a copy of them, or name another layer."
            raise ModelError(got, "weights of its own", fix)
    bias = None if layer.bias is None else layer.bias.detach().cpu().double()
    return layer.weight.detach().cpu().double(), bias


def loaded(model: nn.Module, layer: str, change: Mapping[str, Tensor]) -> nn.Module:
    """A copy with other weights in one layer."""
    return P.load(model, {f"{layer}.{key}": value for key, value in change.items()})
