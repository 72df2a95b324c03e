"""Fisher forgetting on PyTorch: a trained model forgets training samples without being retrained.

from fisher_forget import forget
result = forget(model, retain_loader, forget_idx)
result.model, print(result)
"""

from fisher_forget.baselines.golatkar import VARIANTS, Variant, paper_forget, reference_code_forget
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
    "VARIANTS",
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
    "Variant",
    "calibrate_noise",
    "draw_noise",
    "estimate_curvature",
    "evaluate",
    "forget",
    "newton_step",
    "paper_forget",
    "plot_tradeoff",
    "plots",
    "prepare",
    "reference_code_forget",
    "sweep",
]
