r"""Categorical, Bernoulli and Gaussian likelihoods: everything the package needs to know about a
model's outputs.

Notation: a sample n has outputs f_n (logits or means; all positions of a sequence together), loss
l_n = -log p(y_n | f_n) in nats, output gradient r_n = dl_n/df_n and output Hessian H_n = d^2
l_n/df_n^2. All three are exponential families in their natural parameter, so H_n is also the Fisher
information of f_n: generalised Gauss-Newton (GGN) and Fisher coincide (Martens 2020,
arXiv:1412.1193, section 9.2).

A *column* is a tensor S of the shape of the outputs; a set of columns represents H when sum_k E[S_k
S_k^T] = H_n for every sample n. Random columns are drawn sample after sample from one stream, so
they do not depend on the batch size.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fisher_forget.errors import ConfigError, DataError, NumericalError


class Likelihood(ABC):
    """What a stage may ask about outputs [B, ...] and targets; B counts samples, everything after B
    is one sample."""

    name: ClassVar[str]
    score_name: ClassVar[str]

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that do not fit the outputs, and outputs that are not finite."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-log p(y_n | f_n) in nats, summed over the positions of a sample: [B]."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """dl_n/df_n: the shape of the outputs. Its outer product is the empirical Fisher."""

    @abstractmethod
    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """H_n v_n: the shape of the outputs."""

    @abstractmethod
    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """Exact columns, one at a time: sum_k S_k S_k^T = H_n."""

    @abstractmethod
    def column_count(self, outputs: Tensor) -> int:
        """How many columns `columns` yields."""

    @abstractmethod
    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        """Low-variance sketch [draws, *outputs]: S = H^{1/2} xi / sqrt(draws) with random signs xi
        (Sun 2505.13614)."""

    @abstractmethod
    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        """Score at labels sampled from the model [draws, *outputs], over sqrt(draws): the
        Monte-Carlo Fisher."""

    @abstractmethod
    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        """KL(p || q) between predictive distributions with these outputs, nats per scored position:
        [B], float64."""

    @abstractmethod
    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """tr H_n: [B]. Samples whose output curvature vanishes do not move the GGN."""

    @abstractmethod
    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Quality per sample (`score_name` says which): [B], float64."""

    def counts(self, targets: Tensor) -> Tensor:
        """Scored positions per sample [B], the denominator of the mean loss; 1 where a sample has
        one target."""
        return torch.ones(len(targets), device=targets.device)

    def class_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the targets of each class, over samples and positions: [C], float64; a scalar 0
        without classes."""
        return torch.zeros((), dtype=torch.float64)

    def mask(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """1 where an output is scored, 0 where it is ignored; broadcasts to outputs; `None` if all
        are scored."""
        return None


def _finite(outputs: Tensor) -> None:
    if bool(
        torch.isfinite(outputs.detach().sum())
    ):  # one quick pass; only an infinite sum asks for a closer look
        return
    if not bool(torch.isfinite(outputs).all()):
        bad = int((~torch.isfinite(outputs.detach()).flatten(1).all(1)).sum())
        raise NumericalError(
            f"NaN or infinite logits for {bad} of {len(outputs)} samples of a batch",
            "finite logits",
            "Check the weights and the inputs: a diverged training run cannot be scrubbed.",
        )


def _signed(magnitude: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Magnitudes / sqrt(draws) with random signs [draws, *outputs].

    A sample's signs are the bits of its own random words, so batches may be split, and 64 signs
    cost one draw.
    """
    n, entries = len(magnitude), magnitude[:1].numel()
    words = torch.empty(n, draws, -(-entries // 64), dtype=torch.int64, device=generator.device)
    words = words.random_(-(2**63), None, generator=generator).to(magnitude.device)
    shifts = torch.arange(32, dtype=torch.int32, device=magnitude.device)
    bits = words.view(torch.int32).unsqueeze(-1) << shifts  # each bit in turn becomes the sign
    signs = bits.flatten(2)[..., :entries].transpose(0, 1).to(magnitude.dtype)
    signed = torch.copysign(magnitude.reshape(n, entries), signs).view(draws, *magnitude.shape)
    return signed if draws == 1 else signed / math.sqrt(draws)


def _uniform(outputs: Tensor, draws: int, generator: torch.Generator, shape: torch.Size) -> Tensor:
    u = torch.rand(
        len(outputs),
        draws,
        *shape[1:],
        generator=generator,
        dtype=torch.float64,
        device=generator.device,
    )
    return u.to(outputs.device).transpose(0, 1)


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else value * mask


def _positions(outputs: Tensor, last: int) -> Iterator[tuple[Any, Tensor]]:
    """Every index into the dims 1 ... last - 1, for all samples, with a zero tensor like the
    outputs to fill."""
    for index in itertools.product(*(range(size) for size in outputs.shape[1:last])):
        yield (slice(None), *index), torch.zeros_like(outputs)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax classification. Outputs are logits [B, ..., C]; targets classes [B, ...] or
    probabilities [B, ..., C].

    With p = softmax(f): l = -sum_c y_c log p_c, r = p - y, H = diag(p) - p p^T.

    Args:
        ignore_index: Target value of positions that are not scored (padding), as in
            `F.cross_entropy`.
    """

    ignore_index: int = -100
    name: ClassVar[str] = "categorical"
    score_name: ClassVar[str] = "accuracy"

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2:
            raise DataError(
                f"logits of shape {tuple(outputs.shape)}",
                "[batch, ..., classes]",
                "Return one row a sample.",
            )
        classes = outputs.shape[-1]
        if targets.is_floating_point():
            if targets.shape != outputs.shape:
                raise DataError(
                    f"floating-point targets of shape {tuple(targets.shape)} for logits {tuple(outputs.shape)}",
                    "class indices, or probabilities of the shape of the logits",
                    "For regression pass likelihood='gaussian', for several labels a sample likelihood='bernoulli'.",
                )
            total = targets.sum(-1)
            if bool((targets < 0).any()) or not bool(
                torch.allclose(total, torch.ones_like(total), atol=1e-4)
            ):
                raise DataError(
                    "probability targets that are negative or do not sum to 1",
                    "a distribution over the classes for each sample",
                    "For regression pass likelihood='gaussian', for several labels a sample likelihood='bernoulli'.",
                )
        else:
            if targets.shape != outputs.shape[:-1]:
                raise DataError(
                    f"targets of shape {tuple(targets.shape)} for logits {tuple(outputs.shape)}",
                    f"class indices of shape {tuple(outputs.shape[:-1])}",
                    "Classes are the last dimension of the logits; pass unpack= to reshape the targets.",
                )
            scored = targets[targets != self.ignore_index]
            if len(scored) and (int(scored.min()) < 0 or int(scored.max()) >= classes):
                raise DataError(
                    f"targets from {int(scored.min())} to {int(scored.max())}",
                    f"class indices from 0 to {classes - 1} (or ignore_index={self.ignore_index})",
                    "Map the labels to 0..C-1, or give the model as many outputs as there are classes.",
                )
        _finite(outputs)

    def mask(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        if targets is None or targets.is_floating_point():
            return None
        kept = targets != self.ignore_index
        return None if bool(kept.all()) else kept.to(outputs.dtype).unsqueeze(-1)

    def counts(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():  # probabilities carry the class dimension last
            return torch.full(
                (len(targets),), float(targets[0, ..., 0].numel()), device=targets.device
            )
        return (
            (targets != self.ignore_index)
            .reshape(len(targets), -1)
            .sum(1)
            .to(torch.get_default_dtype())
        )

    def class_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return targets.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
        return (
            targets[targets != self.ignore_index]
            .bincount(minlength=outputs.shape[-1])
            .double()
            .cpu()
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        flat = outputs.reshape(-1, outputs.shape[-1])
        if targets.is_floating_point():
            each = F.cross_entropy(flat, targets.reshape(flat.shape), reduction="none")
        else:
            each = F.cross_entropy(
                flat, targets.reshape(-1), reduction="none", ignore_index=self.ignore_index
            )
        return each.reshape(len(outputs), -1).sum(1)

    def _one_hot(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return targets.to(outputs.dtype)
        safe = targets.masked_fill(targets == self.ignore_index, 0)
        return F.one_hot(safe, outputs.shape[-1]).to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _masked(
            outputs.softmax(-1) - self._one_hot(outputs, targets), self.mask(outputs, targets)
        )

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        p = outputs.softmax(-1)
        return _masked(
            p * (vector - (p * vector).sum(-1, keepdim=True)), self.mask(outputs, targets)
        )

    def _factor(self, outputs: Tensor, k: int) -> Tensor:
        """Column k of the closed-form Cholesky factor of diag(p) - p p^T, so C - 1 columns are
        exact, not C.

        With tails r_k = sum_{j >= k} p_j: s_k = sqrt(p_k r_{k+1} / r_k) (e_k - sum_{j > k} (p_j /
        r_{k+1}) e_j).
        """
        logp = outputs.log_softmax(-1)
        tail = logp.flip(-1).logcumsumexp(-1).flip(-1)
        column = torch.zeros_like(outputs)
        weight = ((logp[..., k] + tail[..., k + 1] - tail[..., k]) / 2).exp()
        column[..., k] = weight
        column[..., k + 1 :] = (
            -(logp[..., k + 1 :] - tail[..., k + 1, None]).exp() * weight[..., None]
        )
        return column

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        mask = self.mask(outputs, targets)
        for k in range(outputs.shape[-1] - 1):
            column = _masked(self._factor(outputs, k), mask)
            if outputs.dim() == 2:
                yield column
                continue
            for at, zero in _positions(outputs, -1):
                zero[at] = column[at]
                yield zero

    def column_count(self, outputs: Tensor) -> int:
        return (outputs.shape[-1] - 1) * math.prod(outputs.shape[1:-1])

    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        # sum_y sqrt(p_y) xi_y (e_y - p): one backward pass, no variance on diagonal terms of a
        # single class
        p = outputs.softmax(-1)
        weighted = _signed(p.sqrt(), draws, generator)
        centred = weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        return _masked(centred, self.mask(outputs, targets))

    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        p = outputs.softmax(-1)
        u = _uniform(outputs, draws, generator, outputs.shape[:-1])
        y = (p.double().cumsum(-1) < u.unsqueeze(-1)).sum(-1).clamp_(max=outputs.shape[-1] - 1)
        score = p - F.one_hot(y, outputs.shape[-1]).to(outputs.dtype)
        return _masked(score, self.mask(outputs, targets)) / math.sqrt(draws)

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
        each = (logp.exp() * (logp - logq)).sum(-1, keepdim=True)
        mask = self.mask(each, targets)
        each = _masked(each, mask).reshape(len(p), -1).sum(1)
        count = (
            self.counts(targets).double()
            if targets is not None
            else each.new_tensor(p[0, ..., 0].numel())
        )
        return (each / count.clamp(min=1)).clamp_(min=0.0)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        p = outputs.softmax(-1)
        return _masked(p * (1 - p), self.mask(outputs, targets)).reshape(len(outputs), -1).sum(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        truth = targets.argmax(-1) if targets.is_floating_point() else targets
        hit = (outputs.argmax(-1) == truth).double().reshape(len(outputs), -1).sum(1)
        return hit / self.counts(targets).double().clamp(min=1)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent binary labels. Outputs are logits [B, ...]; targets in [0, 1] of the same shape.

    With p = sigmoid(f): l = -sum_c y_c log p_c + (1 - y_c) log(1 - p_c), r = p - y, H = diag(p (1 -
    p)).
    """

    name: ClassVar[str] = "bernoulli"
    score_name: ClassVar[str] = "label accuracy"

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _same_shape(outputs, targets, "bernoulli")
        if not bool(((targets >= 0) & (targets <= 1)).all()):  # NaN fails, too
            raise DataError(
                f"targets from {float(targets.min()):g} to {float(targets.max()):g}",
                "labels in [0, 1]",
                "Encode each label as 0 or 1; for regression pass likelihood='gaussian'.",
            )
        _finite(outputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="none"
        )
        return each.reshape(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets.to(outputs.dtype)

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p) * vector

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        p = outputs.sigmoid()
        yield from _coordinates((p * (1 - p)).sqrt())

    def column_count(self, outputs: Tensor) -> int:
        return outputs[0].numel()

    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        p = outputs.sigmoid()
        return _signed((p * (1 - p)).sqrt(), draws, generator)

    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        p = outputs.sigmoid()
        y = (_uniform(outputs, draws, generator, outputs.shape) < p.double()).to(p.dtype)
        return (p - y) / math.sqrt(draws)

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        p, q = p.double(), q.double()
        each = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (
            F.logsigmoid(-p) - F.logsigmoid(-q)
        )
        return each.reshape(len(p), -1).sum(1).clamp_(min=0.0)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).reshape(len(outputs), -1).sum(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) == (targets > 0.5)).double().reshape(len(outputs), -1).mean(1)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression with known noise. Outputs are means [B, ...]; targets of the same shape.

    l = |y - f|^2 / (2 sigma^2), the constant log(2 pi sigma^2)/2 left out; r = (f - y)/sigma^2; H =
    I/sigma^2.

    Args:
        sigma: Standard deviation of the targets around the mean, in the targets' units.
    """

    sigma: float = 1.0
    name: ClassVar[str] = "gaussian"
    score_name: ClassVar[str] = "squared error"

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ConfigError(
                f"sigma={self.sigma}", "a positive standard deviation", "Pass Gaussian(sigma=...)."
            )

    @property
    def variance(self) -> float:
        """sigma^2."""
        return self.sigma * self.sigma

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _same_shape(outputs, targets, "gaussian")
        if not bool(torch.isfinite(targets).all()):
            raise DataError(
                "NaN or infinite targets", "finite targets", "Drop or impute these samples."
            )
        _finite(outputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() / (2 * self.variance)).reshape(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.variance

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        return vector / self.variance

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        yield from _coordinates(torch.full_like(outputs, 1 / self.sigma))

    def column_count(self, outputs: Tensor) -> int:
        return outputs[0].numel()

    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        return _signed(torch.full_like(outputs, 1 / self.sigma), draws, generator)

    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        u = _uniform(outputs, draws, generator, outputs.shape)
        z: Tensor = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        return -z.to(outputs.dtype) / (self.sigma * math.sqrt(draws))

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        return ((p.double() - q.double()).square() / (2 * self.variance)).reshape(len(p), -1).sum(1)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return torch.full(
            (len(outputs),), outputs[0].numel() / self.variance, device=outputs.device
        )

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).double().square().reshape(len(outputs), -1).sum(1)


def _same_shape(outputs: Tensor, targets: Tensor, name: str) -> None:
    if targets.shape != outputs.shape:
        raise DataError(
            f"targets of shape {tuple(targets.shape)} for outputs {tuple(outputs.shape)}",
            f"the same shape for both with likelihood={name!r}",
            "Reshape the targets (a single output usually needs [batch, 1]), or pass unpack=.",
        )


def _coordinates(weight: Tensor) -> Iterator[Tensor]:
    """Columns of a diagonal H^{1/2}: one coordinate of every sample at a time."""
    for at, zero in _positions(weight, weight.dim()):
        zero[at] = weight[at]
        yield zero


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def resolve_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """A likelihood from its name, or itself."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in LIKELIHOODS:
        raise ConfigError(
            f"likelihood={likelihood!r}",
            f"one of {sorted(LIKELIHOODS)}",
            "Pass a name or an instance.",
        )
    return LIKELIHOODS[likelihood]()
