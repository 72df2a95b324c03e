"""Fisher forgetting on PyTorch: a trained model forgets training samples without being retrained.

from fisher_forget import forget
result = forget(model, retain_loader, forget_idx)
result.model, print(result)
"""

from typing import Any

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
from fisher_forget.evaluate.closeness import Closeness, Reference
from fisher_forget.evaluate.ensemble import RetrainedEnsemble
from fisher_forget.evaluate.evaluation import Evaluation, evaluate
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from fisher_forget.report import plots
from fisher_forget.report.plots import plot_tradeoff
from fisher_forget.sweep import SweepTable, sweep
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.newton.step import NewtonStep, newton_step
from fisher_forget.unlearn.noise import NoiseDraw, calibrate_noise, draw_noise
from fisher_forget.unlearn.noise_target import NoiseTarget
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.prepare import Prepared, prepare
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.result import ForgetResult

__all__ = [
    "Bernoulli",
    "Categorical",
    "Closeness",
    "ConfigError",
    "Curvature",
    "CurvatureError",
    "DataError",
    "Evaluation",
    "FisherForgetError",
    "FisherForgetWarning",
    "ForgetOptions",
    "ForgetResult",
    "Gaussian",
    "Likelihood",
    "ModelError",
    "NewtonStep",
    "NoiseDraw",
    "NoiseTarget",
    "NumericalError",
    "Prepared",
    "Problem",
    "Reference",
    "RetrainedEnsemble",
    "SplitError",
    "StorageError",
    "SweepTable",
    "calibrate_noise",
    "draw_noise",
    "estimate_curvature",
    "evaluate",
    "forget",
    "newton_step",
    "plot_tradeoff",
    "plots",
    "prepare",
    "sweep",
]

_RENAMED = {
    "paper_forget": 'baselines.METHODS["golatkar-paper"]',
    "reference_code_forget": 'baselines.METHODS["golatkar-code"]',
    "VARIANTS": "baselines.METHODS",
    "Variant": "baselines.golatkar.Draws",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise ImportError(f"fisher_forget.{name} is now fisher_forget.{_RENAMED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
