"""Classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.likelihood.base import (
    ACCURACY,
    Likelihood,
    Score,
    check_finite,
    masked,
    positions,
    signed,
    weights_of,
)
from fisher_forget.likelihood.streams import Streams

ONE_OUTPUT = (
    "One output a sample: for labels of 0 and 1 pass likelihood='bce' "
    "(nn.BCEWithLogitsLoss), for regression 'mse'."
)
LEAST = -1e4  # log-probability below which a class counts as impossible: exp of it is 0


@dataclass(frozen=True, repr=False)
class Categorical(Likelihood):
    """Softmax of logits [B, ..., C]; targets are classes [B, ...] or probabilities [B, ..., C].

    With p = softmax(f) and t_c = w_c ((1 - e) y_c + e / C), where y is one-hot or a distribution,
    w are the class weights and e is the label smoothing (t = y by default), and m = sum_c t_c:
    l = -sum_c t_c log p_c, r = m p - t, H = m (diag(p) - p p^T). Mean losses, and what is left out,
    are those of `torch.nn.CrossEntropyLoss` with the arguments of the same names. KL and accuracy
    are of the predictions alone, without weights. Logits of -inf mask classes out.

    Args:
        ignore_index: Target of positions that are not scored (padding).
        weight: Of each class [C], a tuple, a tensor or an array; `None` is 1 for all. With classes
            as targets, the mean loss divides by the sum of the targets' weights.
        label_smoothing: e, in [0, 1].
        class_dim: Dimension of the classes in logits and probabilities: -1, or 1 as in
            `torch.nn.CrossEntropyLoss` (logits [B, C, H, W], classes [B, H, W]). `None` is the
            last; where sizes would allow for both, they are not guessed, and it must be said.
        shift: Position t of [B, T, C] is scored against target t + 1, as causal language models do
            inside: the last position has no target, and the first target no position.

    Raises:
        ConfigError: If an argument is out of range.
    """

    ignore_index: int = -100
    weight: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    class_dim: Literal[1, -1] | None = None
    shift: bool = False
    name: ClassVar[str] = "categorical"
    score: ClassVar[Score] = ACCURACY

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", weights_of("weight", self.weight))
        smoothing, dim = self.label_smoothing, self.class_dim
        good_dim = dim is None or (dim == -1 or (dim == 1 and not self.shift))
        for name, good, expected in (
            ("label_smoothing", 0 <= smoothing <= 1, "a number in [0, 1]"),
            ("class_dim", good_dim, "None, -1, or without shift=True 1"),
        ):
            if not good:
                got = f"{name}={getattr(self, name)!r}"
                raise ConfigError(got, expected, f"Pass Categorical({name}=...).")

    # outputs and targets of any layout as rows [B, ..., C] and labels [B, ...], and back

    def rows(self, outputs: Tensor) -> Tensor:
        """Logits with the classes last [B, ..., C], of the positions that have a target."""
        rows = outputs.movedim(1, -1) if self.class_dim == 1 else outputs
        return rows[:, :-1] if self.shift else rows

    def labels(self, targets: Tensor) -> Tensor:
        """Targets in the layout of `rows`: classes [B, ...] or probabilities [B, ..., C]."""
        if self.class_dim == 1 and targets.is_floating_point():
            targets = targets.movedim(1, -1)
        return targets[:, 1:] if self.shift else targets

    def aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows(outputs), self.labels(targets)

    @property
    def of_aligned(self) -> Categorical:
        return replace(self, class_dim=-1, shift=False)

    def _laid(self, rows: Tensor) -> Tensor:
        """Rows in the layout of the outputs; 0 where there is no target."""
        if self.shift:
            rows = F.pad(rows, (0, 0, 0, 1))
        return rows.movedim(-1, 1) if self.class_dim == 1 else rows

    def _all_laid(self, draws: Tensor) -> Tensor:
        if not self.shift and self.class_dim != 1:
            return draws
        return torch.stack([self._laid(rows) for rows in draws])

    # checks

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2 or (self.shift and outputs.dim() != 3):
            got = f"logits of shape {tuple(outputs.shape)}"
            expected = "[batch, positions, classes]" if self.shift else "[batch, ..., classes]"
            fix = "For classes return one row a sample."
            fix = f"{ONE_OUTPUT} {fix}" if outputs.dim() == 1 else fix
            raise DataError(got, expected, fix)
        if targets.is_floating_point():
            self._check_probabilities(outputs, targets)
        else:
            self._check_classes(outputs, targets)
        classes = self.rows(outputs).shape[-1]
        if self.weight is not None and len(self.weight) not in (1, classes):
            got = f"weight of {len(self.weight)} classes for logits of {classes}"
            raise DataError(got, "one weight a class", "Pass Categorical(weight=...) as trained.")
        self._check_logits(*self.aligned(outputs.detach(), targets))

    def _check_probabilities(self, outputs: Tensor, targets: Tensor) -> None:
        fix = "For regression pass likelihood='mse' or 'gaussian', for several labels a sample "
        fix += "'bce' or 'bernoulli'."
        if outputs.shape[-1] == 1:
            fix = ONE_OUTPUT
        elif targets.shape == outputs.shape[:-1]:
            fix += " Numbers of classes must be integers: targets.long()."
        if targets.shape != outputs.shape:
            got = f"floating-point targets {tuple(targets.shape)} for logits {tuple(outputs.shape)}"
            raise DataError(got, "class indices, or probabilities of the shape of the logits", fix)

        def sums_to_one(dim: int) -> bool:
            total = targets.sum(dim)
            return torch.allclose(total, torch.ones_like(total), atol=1e-4)

        last = sums_to_one(-1)
        if self.class_dim is None and targets.dim() > 2 and sums_to_one(1):
            self._ask_for_class_dim(f"probability targets {tuple(targets.shape)}", last)
        if self.class_dim == 1:
            last = sums_to_one(1)
        if not last or bool((targets < 0).any()):
            got = "probability targets that are negative or do not sum to 1"
            raise DataError(got, "a distribution over the classes for each sample", fix)

    def _check_classes(self, outputs: Tensor, targets: Tensor) -> None:
        shape, got = tuple(targets.shape), f"targets of shape {tuple(targets.shape)}"
        got += f" for logits {tuple(outputs.shape)}"
        last = shape == tuple(outputs.shape[:-1])
        first = shape == (len(outputs), *outputs.shape[2:])
        if first and outputs.dim() > 2 and self.class_dim is None and not self.shift:
            self._ask_for_class_dim(got, last)
        if not (first if self.class_dim == 1 else last):
            expected = (len(outputs), *outputs.shape[2:])
            expected = expected if self.class_dim == 1 else tuple(outputs.shape[:-1])
            fix = "Return logits for every target, with the classes last (or in dimension 1: "
            fix += "Categorical(class_dim=1)); unpack= can reshape the targets."
            if targets.shape == outputs.shape:
                fix = "One-hot targets are floats; for several labels a sample pass likelihood="
                fix += "'bce' or 'bernoulli'."
            raise DataError(got, f"class indices of shape {expected}", fix)
        classes, scored = self.rows(outputs).shape[-1], self.labels(targets)
        scored = scored[scored != self.ignore_index]
        if len(scored) and (int(scored.min()) < 0 or int(scored.max()) >= classes):
            fix = "Map the labels to 0..C-1, give the model an output for each class, or say which "
            fix += "label does not count: Categorical(ignore_index=...)."
            raise DataError(
                f"targets from {int(scored.min())} to {int(scored.max())}",
                f"class indices from 0 to {classes - 1} (or ignore_index={self.ignore_index})",
                ONE_OUTPUT if classes == 1 else fix,
            )

    @staticmethod
    def _ask_for_class_dim(got: str, both: bool) -> None:
        """Refuse a layout that was not said: classes along dimension 1, or along either."""
        expected, fix = "the classes in the last dimension", "class_dim=1"
        if both:
            expected = "to be told which dimension holds the classes"
            fix += ", or class_dim=-1"
        raise DataError(got, expected, f"Pass likelihood=Categorical({fix}).")

    def _check_logits(self, rows: Tensor, labels: Tensor) -> None:
        """Refuse NaN, +inf, and -inf where that makes the loss infinite."""
        if bool(torch.isfinite(rows.sum())):
            return
        impossible = rows.isneginf()
        check_finite(rows.masked_fill(impossible & ~impossible.all(-1, keepdim=True), 0))
        if bool((self._target(rows, labels)[impossible] > 0).any()):
            true = "logits of -inf at the true class"
            got = "logits of -inf with label smoothing" if self.label_smoothing else true
            fix = "Correct the labels or the model's mask: these classes are masked out."
            if self.label_smoothing:
                fix = "Pass label_smoothing=0: smoothing gives every class a part."
            raise NumericalError(got, "finite logits of classes that targets have", fix)

    # targets

    def _kept(self, labels: Tensor | None) -> Tensor | None:
        """True at scored positions [B, ...]; `None` where all are."""
        if labels is None or labels.is_floating_point():
            return None
        kept = labels != self.ignore_index
        return None if bool(kept.all()) else kept

    def _weights(self, rows: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        return torch.tensor(self.weight, dtype=rows.dtype, device=rows.device).expand(
            rows.shape[-1]
        )

    def _target(self, rows: Tensor, labels: Tensor) -> Tensor:
        """t [B, ..., C], 0 at positions that are not scored."""
        classes, kept = rows.shape[-1], self._kept(labels)
        if labels.is_floating_point():
            target = labels.to(rows.dtype)
        else:
            safe = labels if kept is None else labels.masked_fill(~kept, 0)
            target = F.one_hot(safe, classes).to(rows.dtype)
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + self.label_smoothing / classes
        weights = self._weights(rows)
        if weights is not None:
            target = target * weights
        return masked(target, None if kept is None else kept.unsqueeze(-1))

    def _mass(self, rows: Tensor, labels: Tensor | None) -> Tensor | None:
        """m = sum_c t_c [B, ..., 1]; `None` where it is 1 everywhere."""
        if labels is not None and self.weight is not None:
            return self._target(rows, labels).sum(-1, keepdim=True)
        kept = self._kept(labels)
        return None if kept is None else kept.to(rows.dtype).unsqueeze(-1)

    def _root_mass(self, rows: Tensor, targets: Tensor | None) -> Tensor | None:
        mass = self._mass(rows, None if targets is None else self.labels(targets))
        return None if mass is None else mass.sqrt()

    def mask(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        kept = None if targets is None else self._kept(self.labels(targets))
        if self.shift:  # the last position is never scored
            one = self.rows(outputs)[..., :1]
            return self._laid(torch.ones_like(one) if kept is None else kept.unsqueeze(-1).to(one))
        return None if kept is None else self._laid(kept.to(outputs.dtype).unsqueeze(-1))

    def _scored(self, targets: Tensor) -> Tensor:
        """Scored positions per sample [B]."""
        labels = self.labels(targets)
        if labels.is_floating_point():
            return torch.full(
                (len(labels),), float(labels[0, ..., 0].numel()), device=labels.device
            )
        kept = (labels != self.ignore_index).reshape(len(labels), -1)
        return kept.sum(1).to(torch.get_default_dtype())

    def scored(self, targets: Tensor) -> bool:
        labels = targets[..., 1:] if self.shift else targets
        return labels.is_floating_point() or bool((labels != self.ignore_index).any())

    def counts(self, targets: Tensor) -> Tensor:
        """Scored positions per sample [B]; with class weights the sum of the targets' weights."""
        if self.weight is None or targets.is_floating_point():
            return self._scored(targets)
        labels = self.labels(targets)
        kept = labels != self.ignore_index
        weights = torch.tensor(self.weight, dtype=torch.float64, device=labels.device)
        if len(weights) == 1:
            return weights * self._scored(targets)
        return (weights[labels.masked_fill(~kept, 0)] * kept).reshape(len(labels), -1).sum(1)

    def class_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows, labels = self.aligned(outputs, targets)
        if labels.is_floating_point():
            return labels.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
        scored = labels[labels != self.ignore_index]
        return scored.bincount(minlength=rows.shape[-1]).double().cpu()

    # losses and their derivatives

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows, labels = self.aligned(outputs, targets)
        if labels.is_floating_point():
            target = self._target(rows, labels)
            # 0 log 0 = 0 where a class is masked out
            logp = rows.log_softmax(-1).masked_fill(target == 0, 0)
            per_position = -(target * logp).sum(-1)
        else:
            per_position = F.cross_entropy(
                rows.reshape(-1, rows.shape[-1]),
                labels.reshape(-1),
                self._weights(rows),
                ignore_index=self.ignore_index,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
        return per_position.reshape(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows, labels = self.aligned(outputs, targets)
        p = masked(rows.softmax(-1), self._mass(rows, labels))
        return self._laid(p - self._target(rows, labels))

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        rows, v = self.rows(outputs), self.rows(vector)
        p, mass = (
            rows.softmax(-1),
            self._mass(rows, None if targets is None else self.labels(targets)),
        )
        return self._laid(masked(p * (v - (p * v).sum(-1, keepdim=True)), mass))

    @staticmethod
    def _factor(rows: Tensor, k: int) -> Tensor:
        """Column k of the closed-form Cholesky factor of diag(p) - p p^T: C - 1 columns, not C.

        With tails r_k = sum_{j >= k} p_j: s_k = sqrt(p_k r_{k+1} / r_k) (e_k - sum_{j > k} (p_j /
        r_{k+1}) e_j).
        """
        # in logarithms: tails of confident predictions underflow
        logp = rows.log_softmax(-1).clamp(min=LEAST)
        tail = logp.flip(-1).logcumsumexp(-1).flip(-1)
        column = torch.zeros_like(rows)
        weight = ((logp[..., k] + tail[..., k + 1] - tail[..., k]) / 2).exp()
        column[..., k] = weight
        below = (logp[..., k + 1 :] - tail[..., k + 1, None]).exp()
        column[..., k + 1 :] = -below * weight[..., None]
        return column

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        rows = self.rows(outputs)
        root = self._root_mass(rows, targets)
        for k in range(rows.shape[-1] - 1):
            column = masked(self._factor(rows, k), root)
            if rows.dim() == 2:
                yield column
                continue
            for at, zero in positions(rows, -1):
                zero[at] = column[at]
                yield self._laid(zero)

    def column_count(self, outputs: Tensor) -> int:
        rows = self.rows(outputs)
        return (rows.shape[-1] - 1) * math.prod(rows.shape[1:-1])

    def sketch(
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        # sum_y sqrt(p_y) xi_y (e_y - p): one backward pass, no variance on diagonal terms of a
        # single class
        rows = self.rows(outputs)
        p = rows.softmax(-1)
        weighted = signed(p.sqrt(), draws, streams)
        centred = weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        return self._all_laid(masked(centred, self._root_mass(rows, targets)))

    def sampled(
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        rows = self.rows(outputs)
        p = rows.softmax(-1)
        # inverse of the cumulative distribution; rounding may leave its end below 1, so the last
        # class takes what is beyond
        u = streams.uniform(draws, *rows.shape[1:-1]).to(rows.device)
        y = (p.double().cumsum(-1) < u.unsqueeze(-1)).sum(-1).clamp_(max=rows.shape[-1] - 1)
        score = p - F.one_hot(y, rows.shape[-1]).to(rows.dtype)
        return self._all_laid(masked(score, self._root_mass(rows, targets)) / math.sqrt(draws))

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        logp, logq = (self.rows(x).double().log_softmax(-1) for x in (p, q))
        difference, impossible = logp - logq, logp.isneginf()
        if bool(impossible.any()):  # 0 log 0 = 0 where a class is masked out
            difference = difference.masked_fill(impossible, 0)
        per_position = (logp.exp() * difference).sum(-1)
        kept = None if targets is None else self._kept(self.labels(targets))
        per_position = masked(per_position, kept).reshape(len(p), -1).sum(1)
        count = per_position.new_tensor(logp[0, ..., 0].numel())
        if targets is not None:
            count = self._scored(targets).double()
        return (per_position / count.clamp(min=1)).clamp_(min=0.0)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        rows = self.rows(outputs)
        p, mass = (
            rows.softmax(-1),
            self._mass(rows, None if targets is None else self.labels(targets)),
        )
        return masked(p * (1 - p), mass).reshape(len(outputs), -1).sum(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows, labels = self.aligned(outputs, targets)
        truth = labels.argmax(-1) if labels.is_floating_point() else labels
        hit = masked((rows.argmax(-1) == truth).double(), self._kept(labels))
        return hit.reshape(len(outputs), -1).sum(1) / self._scored(targets).double().clamp(min=1)
