"""Forget sets that somebody asked for: on record in the ledger of the run's own folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_forget.data.split import Indices
from fisher_forget.errors import StorageError
from fisher_forget.evaluate.closeness import Closeness
from fisher_forget.experiments.cases import Case
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.ledger import Ledger
from fisher_forget.unlearn.result import ForgetResult

Scrubbed = Sequence[tuple[ForgetResult, Closeness]]
EACH = ("model_before", "model_after", "noise", "KL on the forgotten (nats)")


def ask(folder: Path, settings: ForgetSet, forget: Indices) -> str:
    """Record a forget set that has a `who`, before any work; of a run that was killed, or that is
    carried out again, the request is there already.

    Returns:
        Name of the request; empty where nobody asked.

    Raises:
        StorageError: If its model is in use: it must not be overwritten.
    """
    if not settings.who:
        return ""
    ledger = Ledger(folder)
    with ledger.owned():
        hashes = set(ledger.hashed(forget.tolist()))
        known = [
            request
            for request in ledger.requests.values()
            if request.who == settings.who and set(request.samples) == hashes
        ]
        if any(request.state == "served" for request in known):
            got = f"{folder}, whose request of {settings.who!r} was served with its present model"
            fix = "Name another folder."
            raise StorageError(got, "one that is not in use yet", fix)
        again = [request.name for request in known if request.state != "withdrawn"]
        name = again[-1] if again else ledger.ask(forget.tolist(), who=settings.who).name
        if ledger.requests[name].state != "done":
            ledger.begin(name)
        return name


def done(folder: Path, name: str, case: Case, scrubbed: Scrubbed) -> None:
    """Record what a run made of the request: of each original model what its result tells, and how
    close it came to retrained models."""
    told = []
    for model, (result, closeness) in zip(case.originals.models, scrubbed, strict=True):
        part = closeness.parts["forget"]
        distance = {"KL on the forgotten (nats)": part.kl_scrubbed}
        told.append(result.evidence(model) | distance)
    one: dict[str, Any] = told[0] | {
        "KL between retrained models (nats)": scrubbed[0][1].parts["forget"].floor,
        "self_check": [finding for evidence in told for finding in evidence["self_check"]],
    }
    if len(told) > 1:
        one |= {key: [evidence[key] for evidence in told] for key in EACH}
    Ledger(folder).done(name, **one)
