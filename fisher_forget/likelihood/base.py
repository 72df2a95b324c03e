"""What the package asks of a model's outputs, and the helpers that the likelihoods share."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisher_forget._util.numbers import MISSING, plus_minus
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.likelihood.streams import Streams

# what may be lost against a reference and still counts as nothing lost
SHARE_LOSS = 0.01  # of a share in [0, 1]: one point of accuracy
ERROR_LOSS = 0.05  # of an error, relative to the reference's


@dataclass(frozen=True)
class Score:
    """Quality of predictions: what it is called, how it is shown and which direction is better.

    Attributes:
        name: As written in tables and files.
        unit: "%" for a share in [0, 1], which is shown times 100; "" for all else, shown as it is.
        higher_is_better: Direction.
    """

    name: str
    unit: str
    higher_is_better: bool

    @property
    def factor(self) -> float:
        """Shown number over stored number."""
        return 100.0 if self.unit == "%" else 1.0

    def format(self, value: float, std: float = math.nan, *, unit: bool = True) -> str:
        """A value, with its spread where there is one: a share in % with one decimal.

        Args:
            value: As stored: a share in [0, 1], or a number in its own unit.
            std: Its standard deviation; NaN leaves it out.
            unit: Whether to append the unit.

        Example:
            >>> ACCURACY.format(0.953, 0.002), SQUARED_ERROR.format(1.152)
            ('95.3 ± 0.2 %', '1.15')
        """
        if not self.unit:
            return plus_minus(value, std)
        if not math.isfinite(value):
            return MISSING
        spread = f" ± {self.factor * std:.1f}" if math.isfinite(std) else ""
        return f"{self.factor * value:.1f}{spread}{f' {self.unit}' if unit else ''}"

    def title(self, what: str = "") -> str:
        """Heading of a column or an axis: "accuracy on test data (%)".

        Args:
            what: Follows the name.
        """
        return f"{self.name}{f' {what}' if what else ''}{f' ({self.unit})' if self.unit else ''}"

    def loss(self, value: float, reference: float) -> float:
        """How much worse a value is than a reference; negative where it is better."""
        return reference - value if self.higher_is_better else value - reference

    def allowed_loss(self, reference: float) -> float:
        """The loss that still counts as nothing lost: one point of a share, 5 % of an error."""
        return SHARE_LOSS if self.unit == "%" else ERROR_LOSS * abs(reference)

    def stored(self) -> dict[str, Any]:
        """The entries of a JSON file, read again by `read`."""
        return {
            "score_name": self.name,
            "score_unit": self.unit,
            "score_higher_is_better": self.higher_is_better,
        }

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Score:
        """A score from what `stored` gave, or from a name alone, as in files of version 0.1."""
        name = entry["score_name"]
        if "score_unit" in entry:
            return cls(name, entry["score_unit"], entry["score_higher_is_better"])
        return next((score for score in SCORES if score.name == name), cls(name, "", False))


ACCURACY = Score("accuracy", "%", True)
LABEL_ACCURACY = Score("label accuracy", "%", True)
SQUARED_ERROR = Score("squared error", "", False)
SCORES = (ACCURACY, LABEL_ACCURACY, SQUARED_ERROR)


class Likelihood(ABC):
    """What a stage may ask about outputs [B, ...] and targets; B counts samples, everything after B
    is one sample."""

    name: ClassVar[str]
    score: ClassVar[Score]

    def __repr__(self) -> str:
        """The call that makes it; arguments at their defaults are left out."""
        arguments: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        values = {f.name: getattr(self, f.name) for f in arguments}
        changed = [f"{f.name}={values[f.name]!r}" for f in arguments if values[f.name] != f.default]
        return f"{type(self).__name__}({', '.join(changed)})"

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
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        """Low-variance sketch [draws, *outputs]: S = H^{1/2} xi / sqrt(draws) with random signs xi
        (Sun 2505.13614), those of the samples' streams."""

    @abstractmethod
    def sampled(
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        """Score at sampled labels [draws, *outputs] / sqrt(draws): the Monte-Carlo Fisher."""

    @abstractmethod
    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        """KL(p || q) of the predictive distributions, nats per scored position: [B], float64."""

    @abstractmethod
    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """tr H_n: [B]. Samples whose output curvature vanishes do not move the GGN."""

    @abstractmethod
    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Quality per sample (`score` says which): [B], float64."""

    def counts(self, targets: Tensor) -> Tensor:
        """Scored positions per sample [B], the denominator of the mean loss; 1 with one target."""
        return torch.ones(len(targets), device=targets.device)

    def scored(self, targets: Tensor) -> bool:
        """Whether any of the targets counts in the loss, be they right or not."""
        return True

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the scored positions of a batch, in nats: a scalar to differentiate."""
        total, count = self.losses(outputs, targets).sum(), self.counts(targets).sum()
        return total / count.where(count > 0, torch.ones_like(count)).to(total.dtype)

    def loss_totals(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Sum of the losses in nats, and number of scored positions, over batches.

        Args:
            pairs: Outputs and targets of each batch.
        """
        total = positions = 0.0
        for outputs, targets in pairs:
            # float64, so that the sum does not depend on how samples are cut into batches
            total += float(self.losses(outputs, targets).double().sum())
            positions += float(self.counts(targets).double().sum())
        return total, positions

    def class_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets of each class, over all positions: [C], float64; scalar 0 without classes."""
        return torch.zeros((), dtype=torch.float64)

    def mask(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """1 where an output is scored, else 0; broadcasts to outputs; `None` if all are scored."""
        return None

    def aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs with the classes last, each position beside its own target."""
        return outputs, targets

    @property
    def of_aligned(self) -> Likelihood:
        """The same likelihood for what `aligned` gives."""
        return self


def check_finite(outputs: Tensor) -> None:
    """Refuse NaN and infinite outputs."""
    # one quick pass; only a sum that is not finite (it may have overflowed) asks for a closer look
    if bool(torch.isfinite(outputs.detach().sum())):
        return
    if not bool(torch.isfinite(outputs).all()):
        bad = int((~torch.isfinite(outputs.detach()).flatten(1).all(1)).sum())
        got = f"NaN or infinite logits for {bad} of {len(outputs)} samples of a batch"
        fix = "Check the weights and the inputs: a diverged training run cannot be scrubbed."
        raise NumericalError(got, "finite logits", fix)


def weights_of(name: str, given: Any) -> tuple[float, ...] | None:
    """Weights as a tuple, which can be compared, hashed and stored.

    Raises:
        ConfigError: If they are not numbers of at least 0, one of them above.
    """
    if given is None:
        return None
    values = torch.as_tensor(given, dtype=torch.float64).detach()
    if (
        values.dim() > 1
        or not len(values := values.reshape(-1))
        or not bool(((values >= 0) & values.isfinite()).all() and values.sum() > 0)
    ):
        got = f"{name}={given!r}"
        raise ConfigError(got, "finite numbers of at least 0, one above 0", "Correct the weights.")
    return tuple(values.tolist())


def signed(magnitude: Tensor, draws: int, streams: Streams) -> Tensor:
    """Magnitudes / sqrt(draws) with random signs [draws, *outputs]."""
    signs = streams.signs(draws, *magnitude.shape[1:]).to(magnitude)
    signed = torch.copysign(magnitude, signs)
    return signed if draws == 1 else signed / math.sqrt(draws)


def masked(value: Tensor, mask: Tensor | None) -> Tensor:
    """The value where it is scored, 0 elsewhere."""
    return value if mask is None else value * mask


def positions(outputs: Tensor, last: int) -> Iterator[tuple[Any, Tensor]]:
    """Every index into the dims 1 ... last - 1, for all samples, and zeros like the outputs."""
    for index in itertools.product(*(range(size) for size in outputs.shape[1:last])):
        yield (slice(None), *index), torch.zeros_like(outputs)
