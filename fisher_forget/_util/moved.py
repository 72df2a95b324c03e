"""Where the modules of version 0.1 are now, told to whoever imports one of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "fisher_forget"
MOVED = {
    "assess": "experiments.evaluate_run",
    "checks": "_util.checks",
    "compare": "experiments.compare",
    "config": "experiments.config",
    "correction": "unlearn.newton.guard",
    "ensemble": "evaluate.ensemble",
    "flow": "unlearn.newton.flow",
    "forget": "unlearn.forget",
    "forget_sets": "experiments.forget_sets",
    "lookup": "experiments.import_path",
    "models": "experiments.models",
    "newton": "unlearn.newton.step",
    "noise": "unlearn.noise",
    "objective": "unlearn.objective",
    "plan": "experiments.dry_run",
    "prepare": "unlearn.prepare",
    "progress": "_util.progress",
    "randomness": "_util.isolation",
    "recipe": "experiments.run",
    "result": "unlearn.result",
    "snapshot": "unlearn.data_sums",
    "starter": "experiments.init_config",
    "storage": "_util.files",
    "training": "experiments.training",
    "tuning": "experiments.tuning",
    "variants": "baselines.golatkar",
    "data.datasets": "experiments.datasets",
    "curvature.walk": "curvature.passes",
    "curvature.additive": "curvature.arithmetic",
    "curvature.persist": "curvature.storage",
    "curvature.lanczos": "curvature.solvers",
    "curvature.layers": "curvature.rules",
    "curvature.convolution": "curvature.rules.convolution",
    "curvature.diagonal": "curvature.structures.diagonal",
    "curvature.dense": "curvature.structures.dense",
    "curvature.low_rank": "curvature.structures.low_rank",
    "curvature.matrix_free": "curvature.structures.matrix_free",
    "curvature.hessian": "curvature.products",
    "curvature.mixed": "curvature.structures.mixed",
    "curvature.kronecker": "curvature.structures.kronecker",
    "baselines.rows": "baselines.jacobian_rows",
    "baselines.catastrophic": "baselines.last_layers",
    "baselines.descent": "baselines.training_loop",
    "baselines.sharded": "baselines.sisa.method",
    "baselines.sharding": "baselines.sisa.partition",
    "baselines.sisa_aggregate": "baselines.sisa.aggregate",
    "baselines.sisa_store": "baselines.sisa.store",
    "sweep.judge": "sweep.scorer",
    "report.html": "report.pages.html",
    "report.evaluation": "report.pages.evaluation",
    "report.comparison": "report.pages.comparison",
    "report.annotate": "report.plots.annotate",
    "report.hover": "report.plots.hover",
}
ELSEWHERE = {
    "config": {"load_config": "experiments.config_file"},
    "correction": {"SubStep": "unlearn.newton.path", "Correction": "unlearn.newton.path (Path)"},
    "checks": {"check_options": "unlearn.options (ForgetOptions)"},
    "curvature.kronecker": {"EkfacSum": "curvature.structures.ekfac"},
    "curvature.layers": {"LinearRule": "curvature.rules.linear", "Rule": "curvature.rules.base"},
    "curvature.matrix_free": {
        "conjugate_gradient": "curvature.solvers",
        "GgnProduct": "curvature.products (DataProduct)",
    },
    "data.datasets": {"read_idx": "experiments.data_sources"},
    "newton": {"newton_step(objective, split, ...)": "newton_step(Problem.of(...), options)"},
    "noise": {"NoiseTarget": "unlearn.noise_target", "power_trace": "Curvature.power_trace"},
    "result": {"refresh_buffers": "unlearn.batch_norm"},
    "snapshot": {"Snapshot": "unlearn.data_sums (DataSums)"},
    "variants": {"paper_forget": 'METHODS["golatkar-paper"](scale=...).unlearn(model, split)'},
}
"""What a module of version 0.1 held that is not in the new one of `MOVED`."""

RENAMED = {
    "paper_forget": 'METHODS["golatkar-paper"](scale=...).unlearn(model, split)',
    "reference_code_forget": 'METHODS["golatkar-code"](alpha=...).unlearn(model, split)',
    "VARIANTS": "METHODS",
    "Variant": "baselines.golatkar.Draws",
}


def renamed(name: str, module: str = PACKAGE, names: Mapping[str, str] = RENAMED) -> Any:
    """Stands for names that a module had in version 0.1.

    Raises:
        ImportError: If it is one of them, with the new name.
        AttributeError: If it is not.
    """
    if name in names:
        raise ImportError(f"{module}.{name} is {PACKAGE}.{names[name]} since version 0.2.0")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class MovedModules(MetaPathFinder):
    """Asked last, when no module of a name was found: says where that of version 0.1 is now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """No spec.

        Raises:
            ModuleNotFoundError: If the name is one of version 0.1, with the new one.
        """
        package, _, name = fullname.partition(".")
        if package == PACKAGE and name in MOVED:
            others = "".join(f"; {k} is {v}" for k, v in ELSEWHERE.get(name, {}).items())
            raise ModuleNotFoundError(
                f"{fullname} is {PACKAGE}.{MOVED[name]} since version 0.2.0{others}. Most scripts "
                f"need no more than `from {PACKAGE} import ...`"
            )  # named it would be hidden by `from fisher_forget import ...`
        return None


def announce() -> None:
    """Put the finder at the end of `sys.meta_path`, once."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
