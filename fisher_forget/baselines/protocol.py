"""What every unlearning method is to the rest of the package: one call, model and split in, another
model out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from fisher_forget.data.split import Split


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


@runtime_checkable
class Unlearner(Protocol):
    """A method with its settings: a frozen dataclass whose fields are hyper-parameters, all with
    the authors' defaults.

    Attributes:
        name: Key in the registry, as people write it in tables.
        grid: Hyper-parameter -> values that a comparison may choose from, on validation data alone.
        seed: Of everything random.

    A method that returns another architecture than the given model's has a method `template(model)
    -> nn.Module` as well, which returns such a module with any weights.
    """

    name: ClassVar[str]
    grid: ClassVar[dict[str, tuple[Any, ...]]]

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        ...
