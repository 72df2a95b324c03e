"""`fisher-forget evaluate`: a finished run held against its retrained models, metric by metric,
method by method."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fisher_forget._util import files
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.fisher import FisherForget
from fisher_forget.errors import StorageError
from fisher_forget.evaluate.evaluation import Evaluation
from fisher_forget.experiments.cases import Case, evaluate_case, prepare_case
from fisher_forget.experiments.config import RunConfig
from fisher_forget.experiments.run import SCRUBBED
from fisher_forget.experiments.run_folder import opened
from fisher_forget.report.pages import evaluation as page

FINE_TUNING = 0.1  # of the epochs of a training


def evaluate_run(config: RunConfig) -> Path:
    """Evaluate every forget set of a finished run: its scrubbed models, and fine-tuning beside
    them. Prints what each case concludes.

    Returns:
        The page's path; beside it lies evaluation.json, and a Markdown table in every forget set's
        folder.

    Raises:
        StorageError: If the run has not finished.
        ConfigError: If it has too few retrained models.
    """
    with opened(config) as folder:
        return _evaluate(config, folder)


def _evaluate(config: RunConfig, folder: Path) -> Path:
    metrics = files.read_json(folder / "metrics.json")
    config.check_evaluable()
    data = config.data.load()
    tables: dict[str, Evaluation] = {}
    for settings in config.forget_sets:
        case = prepare_case(config, data, settings, folder)
        methods = {
            FisherForget.name: scrubbed_models(config, case),
            FineTune.name: [_fine_tuned(config, case, i) for i in range(len(config.seeds))],
        }
        table = evaluate_case(config, case, methods)
        files.write_text(case.folder / "evaluation.md", table.to_markdown() + "\n")
        print("\n".join([settings.name, *(f"  {line}" for line in table.conclusions()), ""]))
        tables[settings.name] = table
    scores = {name: table.to_dict() for name, table in tables.items()}
    files.write_json(folder / "evaluation.json", scores)
    return page.write_page(config.name, tables, folder, metrics)


def scrubbed_models(config: RunConfig, case: Case) -> list[nn.Module]:
    """The scrubbed models of a run, one a seed.

    Raises:
        StorageError: If it has not finished.
    """
    models = []
    for seed, original in zip(config.seeds, case.originals.models, strict=True):
        path = case.folder / f"seed-{seed}" / f"{SCRUBBED}.safetensors"
        if not path.exists():
            fix = "Run `fisher-forget run` with this configuration first."
            raise StorageError(f"no {path}", "a finished run", fix)
        models.append(files.load_model(path, original))
    return models


def _fine_tuned(config: RunConfig, case: Case, index: int) -> nn.Module:
    method = FineTune(
        epochs=max(1, round(FINE_TUNING * config.training.epochs)),
        weight_decay=config.training.weight_decay,
        likelihood=config.likelihood,
        seed=config.seeds[index],
    )
    return method.unlearn(case.originals.models[index], case.split).model
