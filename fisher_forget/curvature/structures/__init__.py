"""What is accumulated of the curvature: one file a structure, one line a structure here."""

from __future__ import annotations

from typing import Literal

from fisher_forget.curvature.structures.dense import DENSE
from fisher_forget.curvature.structures.diagonal import DIAGONAL
from fisher_forget.curvature.structures.ekfac import EKFAC
from fisher_forget.curvature.structures.low_rank import LOW_RANK
from fisher_forget.curvature.structures.matrix_free import MATRIX_FREE
from fisher_forget.curvature.structures.spec import StructureSpec

Structure = Literal["ekfac", "diagonal", "dense", "low_rank", "matrix_free"]
"""The names below, for type checkers."""

STRUCTURES: dict[str, StructureSpec] = {
    spec.name: spec for spec in (EKFAC, DIAGONAL, DENSE, LOW_RANK, MATRIX_FREE)
}
