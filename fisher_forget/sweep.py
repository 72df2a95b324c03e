"""Sweeps over noise scales and seeds from one curvature estimate and one Newton correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
from scipy.stats import t as student

from fisher_forget.errors import ConfigError
from fisher_forget.evaluate.closeness import Closeness, Outputs, Reference, closeness
from fisher_forget.noise import EXPONENT
from fisher_forget.progress import bar
from fisher_forget.result import ForgetResult

CONFIDENCE = 0.95  # of the bands of `SweepTable.frontier`
PARTS = ("forget", "retain", "test")


@dataclass(frozen=True)
class SweepTable:
    """A tidy table of scores, one row a draw, and the marks to read it against.

    Attributes:
        rows: scale, exponent, seed, information (local forgetting bound, nats; see `fisher_forget.noise`), kl_<part>
            (nats), score_<part>, loss_<part> (nats), gap_closed.
        marks: kl_<part>, score_<part>, loss_<part> of "original", "newton" (no noise), "retrained" (whose kl_<part> is
            the floor) and "retrained_std".
        score_name: What score_<part> is.
    """

    rows: tuple[dict[str, float], ...]
    marks: dict[str, dict[str, float]]
    score_name: str

    def to_pandas(self) -> pd.DataFrame:
        """One row a draw."""
        return pd.DataFrame(list(self.rows))

    def frontier(self) -> pd.DataFrame:
        r"""What each scale costs and what it hides: one row an exponent and scale, means over the draws.

        <column>_low and <column>_high bound the 95 % confidence interval of the mean, mean -+ t std / sqrt(draws), t of
        Student's distribution with draws - 1 degrees of freedom; NaN with a single draw.
        """
        frame = self.to_pandas()
        columns = [name for name in frame if str(name).startswith(("kl_", "score_", "loss_"))]
        groups = frame.groupby(["exponent", "scale"])
        mean, draws = groups[columns].mean(), groups.size()
        half = groups[columns].sem().mul(student.ppf((1 + CONFIDENCE) / 2, draws - 1), axis=0)
        table = pd.DataFrame({"draws": draws, "information": groups["information"].mean()})
        for name in columns:
            table[name] = mean[name]
            table[f"{name}_low"], table[f"{name}_high"] = mean[name] - half[name], mean[name] + half[name]
        return table.reset_index()


def sweep(
    result: ForgetResult,
    reference: Reference,
    scales: Sequence[float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    exponents: Sequence[float] = (EXPONENT,),
    error: float | None = None,
    progress: bool = True,
) -> SweepTable:
    """Score noise draws of many scales; curvature and Newton step are those of `result`.

    Args:
        result: From `forget`; its own noise does not matter.
        reference: Retrained models to compare with, on parts "forget", "retain" and "test".
        scales: Noise scales s, non-negative.
        seeds: Draws per scale.
        exponents: p of s (B + tau I)^-p.
        error: sigma_h of the local forgetting bound, in units of the weights; by default an estimate from the Newton
            step, see `ForgetResult.information`.
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
    unit = {p: result.information(1.0, exponent=p, error=error) for p in exponents}  # falls as 1 / s^2
    quiet = reference.outputs(result.with_noise(0.0))
    newton = _scored(reference, quiet)
    rows = []
    for scale, exponent, seed in bar(grid, len(grid), "sweep", progress):
        outputs = reference.outputs(result.with_noise(scale, seed=seed, exponent=exponent))
        scored = _scored(reference, outputs)
        gap = scored.parts["forget"].gap_closed
        rows.append(
            {"scale": float(scale), "exponent": float(exponent), "seed": seed}
            | {"information": unit[exponent] / scale**2 if scale else math.inf}
            | _columns(scored, "kl_scrubbed", "score_scrubbed")
            | _losses(reference, outputs)
            | {"gap_closed": math.nan if gap is None else gap}
        )
    members = pd.DataFrame([_losses(reference, outputs) for outputs in reference.retrained])
    marks = {
        "original": _columns(newton, "kl_original", "score_original") | _losses(reference, reference.original),
        "newton": _columns(newton, "kl_scrubbed", "score_scrubbed") | _losses(reference, quiet),
        "retrained": _columns(newton, "floor", "score_retrained") | _plain(members.mean()),
        "retrained_std": _columns(newton, "floor_std", "score_retrained_std") | _plain(members.std()),
    }
    return SweepTable(tuple(rows), marks, newton.score_name)


def _plain(values: pd.Series[float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _scored(reference: Reference, outputs: Outputs) -> Closeness:
    return closeness(reference.likelihood, reference.targets, reference.original, outputs, reference.retrained)


def _losses(reference: Reference, outputs: Outputs) -> dict[str, float]:
    """loss_<part>: mean loss, nats a scored position."""
    sums = {
        part: (reference.likelihood.losses(outputs[part], y).double().sum(), reference.likelihood.counts(y).sum())
        for part, y in reference.targets.items()
        if part in PARTS
    }
    return {f"loss_{part}": float(loss / count) for part, (loss, count) in sums.items()}


def _columns(evaluation: Closeness, kl: str, score: str) -> dict[str, float]:
    parts = {part: asdict(evaluation.parts[part]) for part in PARTS}
    return {f"kl_{part}": parts[part][kl] for part in PARTS} | {f"score_{part}": parts[part][score] for part in PARTS}
