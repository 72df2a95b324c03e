"""Fisher forgetting on PyTorch: a trained model forgets training samples without being retrained.

from fisher_forget import forget
result = forget(model, retain_loader, forget_idx)
result.model, print(result)
"""

from typing import TYPE_CHECKING, Any

from fisher_forget._util import moved
from fisher_forget.attack.audit import audit
from fisher_forget.attack.findings import Audit
from fisher_forget.baselines import METHODS, SISA, Unlearned, Unlearner
from fisher_forget.curvature import Curvature, estimate_curvature
from fisher_forget.data.samples import read_samples
from fisher_forget.data.split import Split, resolve_split
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
from fisher_forget.evaluate.groups import Harm, harm_by_group
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.influence import Influence, Suggestions, suggest
from fisher_forget.ledger import Ledger
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from fisher_forget.purge import artefacts, purge
from fisher_forget.rewind import (
    CheckpointKeeper,
    RewindResult,
    lightning_callback,
    list_checkpoints,
    rewind,
    trainer_callback,
)
from fisher_forget.sweep import SweepTable, sweep
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.limits import Limits
from fisher_forget.unlearn.newton.step import NewtonStep, newton_step
from fisher_forget.unlearn.noise import NoiseDraw, calibrate_noise
from fisher_forget.unlearn.noise_draw import draw_noise
from fisher_forget.unlearn.noise_target import NoiseTarget
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.prepare import Prepared, prepare
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.result import ForgetResult
from fisher_forget.unlearn.training_time import TrainingTime, logged_rates

if TYPE_CHECKING:
    from fisher_forget.report import plots
    from fisher_forget.report.plots import plot_tradeoff

moved.announce()


def __getattr__(name: str) -> Any:
    """Figures when they are asked for: Matplotlib takes a second, and writes to the home folder."""
    if name in ("plots", "plot_tradeoff"):
        from fisher_forget.report import plots

        return plots if name == "plots" else plots.plot_tradeoff
    return moved.renamed(name)


__all__ = [
    "METHODS",
    "SISA",
    "Audit",
    "Bernoulli",
    "Categorical",
    "CheckpointKeeper",
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
    "Harm",
    "Influence",
    "Ledger",
    "Likelihood",
    "Limits",
    "ModelError",
    "NewtonStep",
    "NoiseDraw",
    "NoiseTarget",
    "NumericalError",
    "Prepared",
    "Problem",
    "Reference",
    "RetrainedEnsemble",
    "RewindResult",
    "Split",
    "SplitError",
    "StorageError",
    "Suggestions",
    "SweepTable",
    "TrainSettings",
    "TrainingTime",
    "Unlearned",
    "Unlearner",
    "artefacts",
    "audit",
    "build_model",
    "calibrate_noise",
    "draw_noise",
    "estimate_curvature",
    "evaluate",
    "forget",
    "harm_by_group",
    "lightning_callback",
    "list_checkpoints",
    "load_dataset",
    "logged_rates",
    "newton_step",
    "plot_tradeoff",
    "plots",
    "prepare",
    "purge",
    "read_samples",
    "resolve_split",
    "rewind",
    "suggest",
    "sweep",
    "train",
    "trainer_callback",
]
