"""What `estimate_curvature` must know of a structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.passes import Walk


@dataclass(frozen=True)
class StructureSpec:
    """A structure, as data.

    Attributes:
        name: What it is called.
        operators: Classes of the operators that it makes, which files of them need.
        estimate: Walk over the data -> the curvature, and the scored positions it is the mean over.
        cost: What that would cost.
        refused: Kinds that it can't hold, and why.
        additive: Whether it is a sum over samples, so that the part of some can be taken away.
        by_products: Whether it needs no columns, so that the kind "auto" is exact.
        takes_basis: Whether it can start from the bases of an earlier estimate.
    """

    name: str
    operators: tuple[type[Curvature], ...]
    estimate: Callable[[Walk], tuple[Curvature, float]]
    cost: Callable[[Walk], CostEstimate]
    refused: Mapping[str, str] = field(default_factory=dict)
    additive: bool = False
    by_products: bool = False
    takes_basis: bool = False
