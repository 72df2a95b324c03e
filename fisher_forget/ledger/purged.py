"""Where forgotten samples were purged nothing is trained again: it would bring them back."""

from __future__ import annotations

from pathlib import Path

from fisher_forget.errors import StorageError
from fisher_forget.ledger.ledger import LEDGER, Ledger


def check_not_purged(folder: str | Path) -> None:
    """Refuse a folder whose ledger says so.

    Raises:
        StorageError: If it does, or is damaged.
    """
    if not (Path(folder) / LEDGER).exists():
        return
    times = [entry.time for entry in Ledger(folder).entries if entry.event == "purged"]
    if times:
        got = f"{folder}, whose models of forgotten samples were purged on {times[-1][:10]}"
        expected = "a folder in which they may be trained again"
        fix = "Name another folder, and data without those samples."
        raise StorageError(got, expected, fix)
