"""What a method is to the rest of the package: one call, model and split in, another model out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError
from fisher_forget.ledger import evidence


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included.

    Attributes:
        low: Least.
        high: Largest.
        log: Whether equal ratios, not equal differences, are equally likely.
        whole: Whether they are integers.

    Raises:
        ConfigError: If low is not below high, or, with log, not above 0; ends that are not whole.
    """

    low: float
    high: float
    log: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in ends)
        if not numbers or not self.low < self.high or (self.log and self.low <= 0):
            expected = "two finite numbers, low below high" + ", above 0" * self.log
            raise ConfigError(f"the range {self!r}", expected, "Correct its ends.")
        if self.whole and not all(float(x).is_integer() for x in ends):
            raise ConfigError(f"the range {self!r}", "whole ends", "Correct its ends.")

    def __contains__(self, value: object) -> bool:
        fits = isinstance(value, int if self.whole else int | float)
        return fits and self.low <= value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        scale = "" if self.log else ", linear"
        kind = "whole, " * self.whole
        return f"{kind}{self.low:g} to {self.high:g}{scale}"


# hyper-parameter -> what a comparison may choose from: values, or all numbers of a range
Grid = dict[str, tuple[Any, ...] | Range]


@dataclass(frozen=True)
class Unlearned:
    """What a method returns.

    Attributes:
        model: In eval mode; shares no memory with the given one.
        seconds: Wall time.
        passes: Sample gradients (forward and backward) that were computed, over the number of
            retained samples; a forward pass alone counts a third.
    """

    model: nn.Module
    seconds: float
    passes: float

    def evidence(self, method: Unlearner, model: nn.Module, split: Split) -> dict[str, Any]:
        """What a ledger keeps of it, where this method forgot the split's samples from the
        model."""
        return evidence(
            method.name,
            model,
            self.model,
            retained=len(split.retain),
            forgotten=len(split.forget),
            passes=self.passes,
        )


@runtime_checkable
class Unlearner(Protocol):
    """A method with its settings: a frozen dataclass whose fields are hyper-parameters, all with
    the authors' defaults. `base.Method` satisfies it, and has hooks for what is done before a
    request.

    Attributes:
        name: Key in the registry, as people write it in tables.
        grid: What a comparison may choose, on validation data alone.
        seed: Of everything random.
    """

    name: ClassVar[str]
    grid: ClassVar[Grid]

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        ...


def settings_of(method: Any) -> dict[str, Any]:
    """Setting -> default of a method's class; none if it is no dataclass."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {field.name: field.default for field in fields}
