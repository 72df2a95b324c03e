"""What a method is to the rest of the package: one call, model and split in, another model out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from fisher_forget.data.split import Split

Grid = dict[str, tuple[Any, ...]]  # hyper-parameter -> values that a comparison may choose from


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
