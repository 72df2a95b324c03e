"""The training objective at any weights, mean loss + (wd / 2) |w|^2, its gradient and GGN.

Sums are kept apart from counts, so that parts of the data add up: L = sum of losses / scored
positions.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.curvature.double_backward import hidden_from_products
from fisher_forget.curvature.products import DataProduct, ggn_chunk
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.pieces import MEMORY, PIECE, Pieces
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, NumericalError, StorageError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params

HELD = 16  # of the memory, one part in so many for the data of samples that are looked at often
Batches = Callable[[], Iterable[Batch]]  # of the same samples at every call


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
        memory: Bytes that graphs and outputs may take at a time: half for the graphs of products, a
            quarter for the piece of a batch that is at work, a quarter for the data of samples that
            are looked at often and the products of a curvature. A piece has one sample at least.

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
        memory: int = MEMORY,
    ) -> None:
        self.likelihood, self.memory = likelihood, memory
        self.tape = Tape(model, subset)
        self.model = P.channels_last(self.tape.model)
        if device is not None:
            _move(self.model, device)
        self.start = P.detached(self.tape.params)
        self._hidden: str | None = None
        self._pieces = Pieces(self.model, self._traced)
        self._keeps_graphs: Callable[[], DataProduct | None] = lambda: None

    def __reduce_ex__(self, protocol: Any) -> Any:
        got, expected = "a copy or pickle of an Objective or a Problem", "its result"
        fix = "Store the ForgetResult, or make the problem anew by Problem.of(...)."
        raise StorageError(got, expected, fix)

    def outputs(self, batch: Batch) -> Tensor:
        """Outputs at the weights that the model has now, checked against the targets."""
        out = P.call(self.model, {}, batch.args, batch.kwargs)
        self.likelihood.check(out.detach(), batch.targets)
        return out

    @torch.enable_grad()
    def _traced(self, batch: Batch) -> Tensor:
        """Outputs with their graph."""
        return P.call(self.model, {}, batch.args, batch.kwargs)

    def pieces(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on the model's device, cut into pieces that fit."""
        for batch in batches:
            yield from self._pieces(batch.on(self.model), self.memory // PIECE)

    def sample_bytes(self, batch: Batch) -> int:
        """Bytes that a sample of the batch takes in a pass: its graph, copies of its outputs."""
        return self._pieces.sample_bytes(batch.on(self.model))

    def reader(self, split: Split, samples: Indices) -> Batches:
        """The batches of some samples at every call: held where they are few, else read again."""
        held, room = [], self.memory // HELD
        for batch in split.batches(samples):
            room -= batch.nbytes
            if room < 0:
                return partial(split.batches, samples)
            held.append(batch)
        return lambda: held

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
        for batch in self.pieces(batches):
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
    def _outputs_at(self, batch: Batch, at: Mapping[str, Tensor]) -> Tensor:
        with P.attached(self.model, at):
            return self.outputs(batch)

    def forward(
        self, batches: Iterable[Batch], at: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(outputs, targets) piece by piece, without a graph; who keeps them all keeps all."""
        for piece in self.pieces(batches):
            yield self._outputs_at(piece, at), piece.targets

    def losses_and_counts(
        self, batches: Iterable[Batch], at: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss of every sample, summed over its scored positions, nats, and how many these are:
        [samples] both, float64, on the CPU."""
        likelihood, losses, counts = self.likelihood, [], []
        for f, y in self.forward(batches, at):
            losses.append(likelihood.losses(f, y).double().cpu())
            counts.append(likelihood.counts(y).double().cpu())
        return _joined(losses), _joined(counts)

    def class_mass(self, batches: Iterable[Batch], at: Mapping[str, Tensor]) -> Tensor:
        """Targets of each class over the samples: [C], or a scalar 0 without classes."""
        mass = torch.zeros((), dtype=torch.float64)
        for f, y in self.forward(batches, at):
            mass = mass + self.likelihood.class_mass(f, y)
        return mass

    def divergence(
        self, batches: Iterable[Batch], at: Mapping[str, Tensor], to: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(p(at) || p(to)) of every sample's predictions, nats a scored position: [samples],
        float64, on the CPU."""
        found = []
        for piece in self.pieces(batches):
            before, after = (self._outputs_at(piece, weights) for weights in (at, to))
            found.append(self.likelihood.kl(before, after, piece.targets).cpu())
        return _joined(found)

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

    def ggn(
        self,
        split: Split,
        samples: Indices,
        at: Mapping[str, Tensor],
        count: float | None = None,
    ) -> DataProduct:
        """The GGN of the given samples at given parameters, as products in bounded memory.

        Graphs are kept of one product at a time: earlier ones rebuild theirs from then on.

        Args:
            split: The data.
            samples: Indices of the samples.
            at: The parameters.
            count: Divisor, by default the scored positions of these samples.
        """
        if (earlier := self._keeps_graphs()) is not None:
            earlier.release()
        read = self.reader(split, samples)
        product = DataProduct(
            self.model,
            lambda: (batch.on(self.model) for batch in read()),
            partial(ggn_chunk, self.model, self.tape.params, self.likelihood),
            self.likelihood,
            memory=self.memory // 2,
            at=at,
            count=count,
        )
        self._keeps_graphs = weakref.ref(product)
        return product


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


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
