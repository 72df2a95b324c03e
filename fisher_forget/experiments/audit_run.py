"""`fisher-forget audit`: what attacks find in the models of a finished run."""

from __future__ import annotations

from pathlib import Path

from fisher_forget._util import files
from fisher_forget.attack.audit import audit
from fisher_forget.attack.findings import Audit
from fisher_forget.errors import StorageError
from fisher_forget.experiments.cases import prepare_case
from fisher_forget.experiments.config import RunConfig
from fisher_forget.experiments.evaluate_run import scrubbed_models
from fisher_forget.experiments.run import AUDIT, write_again
from fisher_forget.experiments.run_folder import opened
from fisher_forget.ledger import Ledger


def audit_run(config: RunConfig, limit: float | None = None) -> tuple[Path, dict[str, Audit]]:
    """Audit every forget set of a finished run: its scrubbed models, with its test data as unseen
    ones and its retrained models as the yardstick. What is found enters the run's ledger where it
    has one, and its report.

    Args:
        config: Of the run.
        limit: By how much the score of a group may fall at most.

    Returns:
        The report's path, beside which audit.json lies, and a Markdown table in every forget set's
        folder; and the audits by forget set.

    Raises:
        StorageError: If the run has not finished.
        DataError, ConfigError: As for `audit`.
    """
    with opened(config) as folder:
        if not (folder / "metrics.json").exists():
            fix = "Run `fisher-forget run` with this configuration first."
            raise StorageError(f"no {folder / 'metrics.json'}", "a finished run", fix)
        data = config.data.load()
        ledger = Ledger(folder)
        audits = {}
        for settings in config.forget_sets:
            case = prepare_case(config, data, settings, folder)
            found = audit(
                scrubbed_models(config, case),
                case.originals.models,
                unseen=case.data.test,
                split=case.split,
                retrained=case.retrained.models,
                likelihood=config.likelihood,
                limit=limit,
                progress=config.progress,
            )
            files.write_text(case.folder / "audit.md", found.to_markdown() + "\n")
            if ledger.exists:
                found.record(ledger, forget_set=settings.name)
            audits[settings.name] = found
        files.write_json(folder / AUDIT, {name: found.to_dict() for name, found in audits.items()})
        return write_again(config), audits
