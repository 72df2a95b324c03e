"""Sweeps: what other options, methods and noise scales would have done, from as few curvature
estimates as possible."""

from fisher_forget.sweep.run import SweepSettings, sweep
from fisher_forget.sweep.table import SweepTable

__all__ = ["SweepSettings", "SweepTable", "sweep"]
