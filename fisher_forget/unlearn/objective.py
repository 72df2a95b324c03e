"""The training objective at any weights, mean loss + (wd / 2) |w|^2, its gradient and GGN.

Sums are kept apart from counts, so that parts of the data add up: L = sum of losses / scored
positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.curvature.double_backward import hidden_from_products
from fisher_forget.curvature.passes import default_memory
from fisher_forget.curvature.products import DataProduct, GgnProduct, ggn_chunk
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, NumericalError, StorageError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params


@dataclass(frozen=True)
class Gradient:
    """Sums over samples: gradient, loss in nats, scored positions, and targets of each class.

    `classes` is [C], or a scalar 0 without classes or samples: see `Likelihood.class_mass`.
    """

    sums: Params
    loss: float
    count: float
    classes: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __add__(self, other: Gradient) -> Gradient:
        return self._plus(other, 1)

    def __sub__(self, other: Gradient) -> Gradient:
        return self._plus(other, -1)

    def _plus(self, other: Gradient, sign: int) -> Gradient:
        sums, classes = P.add(self.sums, other.sums, sign), self.classes + sign * other.classes
        loss, count = self.loss + sign * other.loss, self.count + sign * other.count
        return Gradient(sums, loss, count, classes)

    def mean(self) -> Params:
        """Gradient of the mean loss."""
        return P.scale(self.sums, 1 / (self.count or 1.0))


class Objective:
    """The losses of a private copy of a model as functions of the parameters that move.

    Args:
        model: Copied, once; never touched.
        likelihood: Gives the loss of outputs.
        subset: Name patterns of the parameters that move; the others stay.
        device: Where the copy lies; by default where the model does.

    Attributes:
        tape: The copy, which curvature estimates share.
        start: The moving parameters at the original weights.

    Raises:
        ConfigError: If torch cannot use the device.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        subset: str | tuple[str, ...] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.likelihood = likelihood
        self.tape = Tape(model, subset)
        self.model = P.channels_last(self.tape.model)
        if device is not None:
            _move(self.model, device)
        self.start = P.detached(self.tape.params)
        self._hidden: str | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        got, expected = "a copy or pickle of an Objective or a Problem", "its result"
        fix = "Store the ForgetResult, or make the problem anew by Problem.of(...)."
        raise StorageError(got, expected, fix)

    def outputs(self, batch: Batch) -> Tensor:
        """Outputs at the weights that the model has now, checked against the targets."""
        out = P.call(self.model, {}, batch.args, batch.kwargs)
        self.likelihood.check(out.detach(), batch.targets)
        return out

    def gradient(
        self,
        batches: Iterable[Batch],
        at: Mapping[str, Tensor],
        output_curvature: list[Tensor] | None = None,
    ) -> Gradient:
        """Gradient sums of the loss, without weight decay; tr H_n of every sample is appended to
        the list, if given."""
        total, loss, count = P.zeros_like(at), 0.0, 0.0
        classes = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            batch = batch.on(self.model)
            outputs, batch_loss, grads = self._pulled(batch, at)
            for name, g in grads.items():
                total[name] += g
            if output_curvature is not None:
                output_curvature.append(
                    self.likelihood.output_curvature(outputs, batch.targets).cpu()
                )
            loss += batch_loss
            count += float(self.likelihood.counts(batch.targets).double().sum())
            classes = classes + self.likelihood.class_mass(outputs, batch.targets)
        if not math.isfinite(loss) or not P.finite(total):
            raise NumericalError(
                "a loss or gradient that is not finite", "finite losses", "Check the data for NaN."
            )
        return Gradient(total, loss, count, classes)

    def _pulled(self, batch: Batch, at: Mapping[str, Tensor]) -> tuple[Tensor, float, Params]:
        """Outputs, sum of losses and its gradient for one batch; the graph ends here."""
        with torch.enable_grad(), P.attached(self.model, at):
            outputs = self.outputs(batch)
            loss = self.likelihood.losses(outputs, batch.targets).sum()
            grads = P.pull(loss, self.tape.params) if loss.requires_grad else {}
        return outputs.detach(), float(loss.detach()), grads

    @torch.no_grad()
    def forward(
        self, batches: Iterable[Batch], at: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(outputs, targets) of each batch, without a graph."""
        for batch in batches:
            batch = batch.on(self.model)
            with P.attached(self.model, at):
                outputs = self.outputs(batch)
            yield outputs, batch.targets

    def mean_loss(self, batches: Iterable[Batch], at: Mapping[str, Tensor]) -> float:
        """Mean loss in nats; NaN without samples."""
        loss, positions = self.likelihood.loss_totals(self.forward(batches, at))
        return loss / positions if positions else math.nan

    def hidden_from_products(self, split: Split) -> str:
        """Why `ggn` would fail or be wrong for this model, looked at once; empty if it is right."""
        if self._hidden is None:
            few = split.few("retain").on(self.model)
            self.tape.verify(few)  # tells what else may be wrong with model and data
            self._hidden = hidden_from_products(self.model, self.tape.params, few)
        return self._hidden

    def ggn(self, batches: Iterable[Batch], at: Mapping[str, Tensor], count: float) -> GgnProduct:
        """The GGN of the given samples at given parameters, as products; `count` divides."""
        on = (batch.on(self.model) for batch in batches)
        return GgnProduct(self.model, at, self.tape.params, self.likelihood, on, count)

    def whole_ggn(self, split: Split, samples: Indices, at: Mapping[str, Tensor]) -> DataProduct:
        """The GGN of the mean loss of all given samples, as products in bounded memory."""

        def batches() -> Iterator[Batch]:
            return (batch.on(self.model) for batch in split.batches(samples))

        memory = default_memory(next(iter(self.start.values())).device)
        return DataProduct(
            self.model,
            batches,
            partial(ggn_chunk, self.model, self.tape.params, self.likelihood),
            self.likelihood,
            samples=len(samples),
            memory=memory,
            at=at,
        )


def _move(model: nn.Module, device: torch.device | str) -> None:
    """Move a private copy.

    Raises:
        ConfigError: If torch cannot compute there.
    """
    expected, fix = "a device that torch can use", "Try 'cpu'."
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise ConfigError("device='meta', where tensors have no values", expected, fix)
        model.to(place)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, or not built in
        why = str(error).splitlines()[0]
        raise ConfigError(f"device={device!r}: {why}", expected, fix) from error
