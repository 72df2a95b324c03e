"""Fisher forgetting on PyTorch: a trained model forgets training samples without being retrained.

from fisher_forget import forget
result = forget(model, retain_loader, forget_idx)
result.model, print(result)
"""

from fisher_forget.curvature import Curvature, estimate_curvature
from fisher_forget.ensemble import RetrainedEnsemble
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
from fisher_forget.evaluate.evaluation import Evaluation, evaluate
from fisher_forget.forget import forget
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from fisher_forget.newton import NewtonStep, newton_step
from fisher_forget.noise import NoiseDraw, NoiseTarget, calibrate_noise, draw_noise
from fisher_forget.prepare import Prepared, prepare
from fisher_forget.report import plots
from fisher_forget.report.plots import plot_tradeoff
from fisher_forget.result import ForgetResult
from fisher_forget.sweep import SweepTable, sweep
from fisher_forget.variants import VARIANTS, Variant, paper_forget, reference_code_forget

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
    "ForgetResult",
    "Gaussian",
    "Likelihood",
    "ModelError",
    "NewtonStep",
    "NoiseDraw",
    "NoiseTarget",
    "NumericalError",
    "Prepared",
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
