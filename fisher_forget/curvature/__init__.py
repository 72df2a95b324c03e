"""Curvature of the retained loss: kinds (what is back-propagated) x structures (what is accumulated)."""

from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.operator import Curvature

__all__ = ["Curvature", "estimate_curvature"]
