"""Sweeps over noise scales and seeds from one curvature estimate and one Newton correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from fisher_forget.errors import ConfigError
from fisher_forget.evaluate import Evaluation, Reference
from fisher_forget.forget import ForgetResult
from fisher_forget.noise import EXPONENT
from fisher_forget.progress import bar

PARTS = ("forget", "retain", "test")


@dataclass(frozen=True)
class SweepTable:
    """A tidy table of scores, one row a draw, and the marks to read it against.

    Attributes:
        rows: scale, exponent, seed, kl_<part> (nats), score_<part>, gap_closed.
        marks: "original", "newton" (no noise), "retrained" (whose kl_<part> is the floor) and "retrained_std".
        score_name: What score_<part> is.
    """

    rows: tuple[dict[str, float], ...]
    marks: dict[str, dict[str, float]]
    score_name: str

    def to_pandas(self) -> pd.DataFrame:
        """One row a draw."""
        return pd.DataFrame(list(self.rows))


def sweep(
    result: ForgetResult,
    reference: Reference,
    scales: Sequence[float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    exponents: Sequence[float] = (EXPONENT,),
    progress: bool = True,
) -> SweepTable:
    """Score noise draws of many scales; curvature and Newton step are those of `result`.

    Args:
        result: From `forget`; its own noise does not matter.
        reference: Retrained models to compare with, on parts "forget", "retain" and "test".
        scales: Noise scales s, non-negative.
        seeds: Draws per scale.
        exponents: p of s (B + tau I)^-p.
        progress: Show a progress bar.

    Raises:
        ConfigError: If a part is missing from the reference, or there is nothing to sweep.
    """
    missing = [part for part in PARTS if part not in reference.targets]
    if missing:
        raise ConfigError(f"a reference without {missing}", f"the parts {PARTS}", "Give them to Reference(parts=...).")
    grid = [(s, p, seed) for p in exponents for s in scales for seed in seeds]
    if not grid:
        raise ConfigError("an empty grid", "at least one scale, seed and exponent", "Pass scales=[1e-3, 1e-2].")
    newton = reference.evaluate(result.with_noise(0.0))
    rows = []
    for scale, exponent, seed in bar(grid, len(grid), "sweep", progress):
        scored = reference.evaluate(result.with_noise(scale, seed=seed, exponent=exponent))
        gap = scored.parts["forget"].gap_closed
        rows.append(
            {"scale": float(scale), "exponent": float(exponent), "seed": seed}
            | _columns(scored, "kl_scrubbed", "score_scrubbed")
            | {"gap_closed": float("nan") if gap is None else gap}
        )
    marks = {
        "original": _columns(newton, "kl_original", "score_original"),
        "newton": _columns(newton, "kl_scrubbed", "score_scrubbed"),
        "retrained": _columns(newton, "floor", "score_retrained"),
        "retrained_std": _columns(newton, "floor_std", "score_retrained_std"),
    }
    return SweepTable(tuple(rows), marks, newton.score_name)


def _columns(evaluation: Evaluation, kl: str, score: str) -> dict[str, float]:
    parts = {part: asdict(evaluation.parts[part]) for part in PARTS}
    return {f"kl_{part}": parts[part][kl] for part in PARTS} | {f"score_{part}": parts[part][score] for part in PARTS}
