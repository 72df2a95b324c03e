"""Figures: what forgetting gained and what it cost, always beside the retrained models.

Every function draws into the axes it is given, or into a new pyplot figure (so that notebooks show
it), and returns the axes. Colours are Okabe and Ito's; marker shapes, hatches and line styles say
the same again for a print in grey. Text stays text in the SVG, and numbers on the axes are plain
text, not mathematics.
"""

from fisher_forget.report.plots.attacks import plot_reconstructions
from fisher_forget.report.plots.layers import plot_path, plot_spectrum, plot_steps
from fisher_forget.report.plots.methods import plot_cost, plot_methods, plot_shards
from fisher_forget.report.plots.parts import plot_parts, plot_scores
from fisher_forget.report.plots.probes import plot_probes
from fisher_forget.report.plots.samples import (
    plot_classes,
    plot_margins,
    plot_resistant,
    plot_samples,
    plot_suggestions,
)
from fisher_forget.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    STYLES,
    VERMILLION,
    save_figure,
)
from fisher_forget.report.plots.sweeps import plot_damping, plot_noise, plot_tradeoff

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "LABELS",
    "ORANGE",
    "STYLES",
    "VERMILLION",
    "plot_classes",
    "plot_cost",
    "plot_damping",
    "plot_margins",
    "plot_methods",
    "plot_noise",
    "plot_parts",
    "plot_path",
    "plot_probes",
    "plot_reconstructions",
    "plot_resistant",
    "plot_samples",
    "plot_scores",
    "plot_shards",
    "plot_spectrum",
    "plot_steps",
    "plot_suggestions",
    "plot_tradeoff",
    "save_figure",
]
