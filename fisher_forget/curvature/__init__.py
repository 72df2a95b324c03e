"""Curvature of the retained loss: kinds (what is propagated) x structures (what is accumulated)."""

from fisher_forget.curvature.arithmetic import merged, with_prior, without
from fisher_forget.curvature.estimate import estimate_curvature, support_table
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.storage import load_curvature, save_curvature

__all__ = [
    "Curvature",
    "estimate_curvature",
    "load_curvature",
    "merged",
    "save_curvature",
    "support_table",
    "with_prior",
    "without",
]
