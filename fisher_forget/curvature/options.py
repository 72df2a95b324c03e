"""The options of a curvature estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fisher_forget._util.checks import is_whole
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Indices, Part
from fisher_forget.errors import CurvatureError


@dataclass(frozen=True)
class CurvatureOptions:
    """The keyword arguments of `estimate_curvature`, which documents them.

    Raises:
        CurvatureError: If a number is out of range, or no structure is given.
    """

    structure: str | Mapping[str, str] = "ekfac"
    kind: Kind = "auto"
    draws: int = 1
    part: Part | Indices = "retain"
    subset: str | tuple[str, ...] | None = None
    seed: int = 0
    rank: int = 32
    preconditioner: Curvature | None = None
    basis: Curvature | None = None
    max_samples: int | None = None
    memory: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        optional = ("max_samples", "memory")
        for name in ("draws", "rank", *optional):
            value = getattr(self, name)
            if not is_whole(value, 1) and not (value is None and name in optional):
                raise CurvatureError(
                    f"{name}={value!r}", "a whole number of at least 1", f"Pass {name}=1 or more."
                )
        if not is_whole(self.seed, 0):
            raise CurvatureError(
                f"seed={self.seed!r}", "a whole number of at least 0", "Pass 0, say."
            )
        if isinstance(self.structure, Mapping) and not self.structure:
            raise CurvatureError(
                "an empty structure=", "at least one pattern", "Pass {'*': 'ekfac'}, say."
            )
