"""`fisher-forget evaluate`: a finished run held against its retrained models, metric by metric,
method by method."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fisher_forget._util import files
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import StorageError
from fisher_forget.evaluate.evaluation import Evaluation
from fisher_forget.experiments import run as recipe
from fisher_forget.experiments.config import RunConfig
from fisher_forget.experiments.run import Case
from fisher_forget.report.pages import evaluation as page

OURS, TUNED, NOISED = "fisher-forget", "fine-tuning", "diagonal Fisher (public code)"


def assess(config: RunConfig) -> Path:
    """Evaluate every forget set of a finished run: the default, fine-tuning, the public code where
    the run has it.

    Returns:
        The page's path; beside it lies evaluation.json, and a Markdown table in every forget set's
        folder.

    Raises:
        StorageError: If the run has not finished.
    """
    folder = Path(config.out) / config.name
    metrics = files.read_json(folder / "metrics.json")
    data = config.data.load()
    found: dict[str, Evaluation] = {}
    for settings, described in zip(config.forget_sets, metrics["cases"], strict=True):
        case = recipe.prepare_case(config, data, settings, folder)
        found[settings.name] = _assess(config, case, noised="reference_code" in described)
        (case.folder / "evaluation.md").write_text(found[settings.name].to_markdown() + "\n")
    files.write_json(
        folder / "evaluation.json", {name: table.to_dict() for name, table in found.items()}
    )
    return page.write_page(config.name, found, folder, metrics)


def _assess(config: RunConfig, case: Case, noised: bool) -> Evaluation:
    methods = {OURS: _stored(config, case, recipe.SCRUBBED)}
    methods[TUNED] = [_fine_tuned(config, case, i) for i in range(len(case.originals.models))]
    if noised:
        methods[NOISED] = _stored(config, case, recipe.REFERENCE)
    return recipe.evaluate_case(config, case, methods)


def _stored(config: RunConfig, case: Case, name: str) -> list[nn.Module]:
    """The models that the run has made of the originals."""
    found = []
    for seed, original in zip(config.seeds, case.originals.models, strict=True):
        path = case.folder / f"seed-{seed}" / f"{name}.safetensors"
        if not path.exists():
            raise StorageError(
                f"no {path}",
                "a finished run",
                "Run `fisher-forget run` with this configuration first.",
            )
        found.append(files.load_model(path, original))
    return found


def _fine_tuned(config: RunConfig, case: Case, index: int) -> nn.Module:
    method = FineTune(
        epochs=max(1, round(0.1 * config.training.epochs)),
        weight_decay=config.training.weight_decay,
        likelihood=config.likelihood,
        seed=config.seeds[index],
    )
    return method.unlearn(
        case.originals.models[index], resolve_split(case.data.train, case.forget)
    ).model
