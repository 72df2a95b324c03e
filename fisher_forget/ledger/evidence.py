"""What a ledger keeps of how a request was done, whatever the method, and what that says."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

from torch import nn

from fisher_forget._util import files

Verdict = Literal["forgotten", "no trace found", "not shown", "NOT forgotten", "others harmed"]
WRONG: tuple[Verdict, ...] = ("NOT forgotten", "others harmed")
OTHERS = "retained samples"  # the finding of a self-check that is not of the forgotten ones


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights and buffers, the same on every machine: 16 hexadecimal digits."""
    return files.fingerprint(dict(model.state_dict()))


def evidence(
    method: str,
    before: nn.Module | None,
    after: nn.Module,
    *,
    retained: int,
    forgotten: int,
    **more: Any,
) -> dict[str, Any]:
    """What a ledger keeps of a model without some samples.

    Args:
        method: What made it.
        before: The model that held them; `None` where it is not there any more.
        after: The one without them.
        retained: Samples that are left in it.
        forgotten: Samples that it is without, those of earlier requests included.
        **more: What else shows it; `exact=True` of a model that never saw them, `self_check` as in
            `SelfCheck.summary`.
    """
    return {
        "method": method,
        "version": version("fisher-forget"),
        "model_before": None if before is None else model_fingerprint(before),
        "model_after": model_fingerprint(after),
        "retained": retained,
        "forgotten": forgotten,
        **more,
    }


def verdict(told: Mapping[str, Any]) -> Verdict:
    """What evidence says of whether samples are forgotten.

    "forgotten": the method is exact, so that the model never saw them. "no trace found": by the
    findings of its self-check, which is an estimate. "NOT forgotten": one of them says so, or the
    model is the one of before. "others harmed": none does, but the retained samples suffered. "not
    shown": nobody looked, or nobody can tell.
    """
    if told.get("exact") is True:
        return "forgotten"
    listed = told.get("self_check")
    findings = [f for f in listed if isinstance(f, Mapping)] if isinstance(listed, list) else []
    own = {str(f.get("verdict")) for f in findings if f.get("name") != OTHERS}
    before, after = told.get("model_before"), told.get("model_after")
    if "wrong" in own or (after is not None and before == after):
        return "NOT forgotten"
    if any(f.get("verdict") == "wrong" for f in findings):
        return "others harmed"
    return "no trace found" if own == {"fine"} else "not shown"
