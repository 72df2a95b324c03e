"""Fisher forgetting on PyTorch: a trained model forgets training samples without being retrained.

from fisher_forget import forget
result = forget(model, retain_loader, forget_idx)
result.model, print(result)
"""

from fisher_forget.curvature import Curvature, estimate_curvature
from fisher_forget.errors import (
    ConfigError,
    CurvatureError,
    DataError,
    FisherForgetError,
    FisherForgetWarning,
    ModelError,
    NumericalError,
    SplitError,
    StorageError,
)
from fisher_forget.evaluate import Evaluation, Reference
from fisher_forget.forget import ForgetResult, forget
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from fisher_forget.newton import NewtonStep, newton_step
from fisher_forget.noise import NoiseDraw, calibrate_noise, draw_noise
from fisher_forget.report.plots import plot_tradeoff
from fisher_forget.sweep import SweepTable, sweep

__all__ = [
    "Bernoulli",
    "Categorical",
    "ConfigError",
    "Curvature",
    "CurvatureError",
    "DataError",
    "Evaluation",
    "FisherForgetError",
    "FisherForgetWarning",
    "ForgetResult",
    "Gaussian",
    "Likelihood",
    "ModelError",
    "NewtonStep",
    "NoiseDraw",
    "NumericalError",
    "Reference",
    "SplitError",
    "StorageError",
    "SweepTable",
    "calibrate_noise",
    "draw_noise",
    "estimate_curvature",
    "forget",
    "newton_step",
    "plot_tradeoff",
    "sweep",
]
