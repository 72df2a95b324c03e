"""Made-up runs and sweeps, whose numbers are known, for tests of tables, figures and pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fisher_forget.evaluate import closeness as evaluate
from fisher_forget.evaluate.gap import Gap
from fisher_forget.likelihood import Categorical, Score
from fisher_forget.sweep import SweepTable

# kl_original, kl_scrubbed, floor, score_original, score_scrubbed, score_retrained
CLASS_3 = {
    "forget": (12.3, 1.2, 0.55, 1.0, 0.021, 0.0),
    "retain": (0.011, 0.0042, 0.0021, 1.0, 0.998, 1.0),
    "test": (1.31, 0.18, 0.094, 0.972, 0.871, 0.876),
    "test, retained classes": (0.048, 0.029, 0.022, 0.968, 0.966, 0.969),
}
RANDOM = {
    "forget": (0.021, 0.019, 0.02, 0.99, 0.968, 0.965),
    "retain": (0.0024, 0.0022, 0.0021, 1.0, 1.0, 1.0),
    "test": (0.022, 0.021, 0.0205, 0.968, 0.966, 0.967),
}


def part_scores(numbers: tuple[float, ...], samples: int, jitter: float) -> evaluate.PartScores:
    kl_original, kl_scrubbed, floor, *scores = numbers
    kl_scrubbed *= 1 + jitter
    wave = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / math.sqrt(2.5)  # mean 0, standard deviation 1
    original_each, scrubbed_each = kl_original * (1 + 0.05 * wave), kl_scrubbed * (1 + 0.2 * wave)
    to_each, from_each = floor * (1 + 0.1 * wave), floor * (1 + 0.1 * np.roll(wave, 2))
    return evaluate.PartScores(
        samples=samples,
        kl_original=kl_original,
        kl_scrubbed=kl_scrubbed,
        kl_scrubbed_std=0.2 * kl_scrubbed,
        floor=floor,
        floor_std=0.1 * floor,
        gap=Gap.of(original_each[None], scrubbed_each[None], to_each, from_each),
        score_original=scores[0],
        score_scrubbed=scores[1],
        score_retrained=scores[2],
        score_retrained_std=0.004,
        original_each=tuple(original_each.tolist()),
        scrubbed_each=tuple(scrubbed_each.tolist()),
        to_each=tuple(to_each.tolist()),
        from_each=tuple(from_each.tolist()),
    )


def summary_of_forget(seed: int) -> dict[str, Any]:
    return {
        "forgotten": 146,
        "retained": 1291,
        "curvature": {"structure": "ekfac", "kind": "exact"},
        "newton": {
            "substeps": 6,
            "rejected": seed,
            "damping": 0.001,
            "norm": 3.21,
            "gradient_norm": 0.087,
            "acts_like": 6.2e-4,
            "horizon": 1.61e4,
            "drift_removed": True,
            "held_out": 258,
            "budget": 0.0031,
        },
        "noise": {
            "scale": 2.4e-4,
            "exponent": 0.25,
            "damping": 1.5e-3,
            "norm": 0.31,
            "rise": 9.8e-5,
            "drop": 0.0,
            "information": 310.0,
            "error": 2e-3,
            "target": {
                "loss": 1e-4,
                "accuracy": None,
                "information": None,
                "trade_off": None,
                "error": None,
            },
        },
        "losses": {
            "retain_before": 4.4e-3,
            "retain_after": 6.1e-3,
            "forget_before": 3.9e-3,
            "forget_after": 7.62,
        },
        "buffers_refreshed": False,
        "seconds": {"curvature": 0.4, "newton": 1.7, "noise": 0.2, "check": 0.1},
        "seed": seed,
        "versions": {"fisher_forget": "0.1.0", "torch": "2.9.1", "python": "3.11.9"},
    }


def make_case(
    name: str,
    numbers: dict[str, tuple[float, ...]],
    seeds: int = 3,
    score: Score = Categorical.score,
) -> dict[str, Any]:
    sizes = {"forget": 146, "retain": 1291, "test": 360, "test, retained classes": 323}
    evaluations = [
        evaluate.Closeness(
            {
                part: part_scores(values, sizes[part], 0.05 * (seed - 1))
                for part, values in numbers.items()
            },
            5,
            score,
        )
        for seed in range(seeds)
    ]
    return {
        "name": name,
        "forgotten": 146,
        "retained": 1291,
        "members": 5,
        **score.stored(),
        "seconds": {"train_original": 3.1, "retrain_one": 2.9, "forget": 2.4},
        "runs": [
            {
                "seed": seed,
                "folder": f"{name.replace(' ', '-')}/seed-{seed}",
                "forget": summary_of_forget(seed),
                "evaluation": evaluation.to_dict(),
            }
            for seed, evaluation in enumerate(evaluations)
        ],
        "summary": evaluate.summarise(evaluations),
    }


def make_metrics(*cases: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 2,
        "name": "digits",
        "created": "2026-03-01T12:00:00+00:00",
        "command": "fisher-forget run configs/digits.yaml",
        "config": {
            "data": {"name": "digits", "test_share": 0.2},
            "model": {"name": "mlp", "hidden": [64, 64]},
            "training": {"epochs": 60, "lr": 0.1, "weight_decay": 5e-4},
            "forget": {"steps": "auto", "noise": None},
        },
        "environment": {
            "fisher_forget": "0.1.0",
            "torch": "2.9.1",
            "python": "3.11.9",
            "threads": 2,
            "processor": "a processor",
        },
        "cases": list(cases),
    }


def make_sweep(
    scales: Sequence[float] | None = None, exponents: Sequence[float] = (0.25,), seeds: int = 4
) -> SweepTable:
    """KL on the forgotten data falls with the scale, then the model is ruined."""
    columns = ("kl_forget", "kl_retain", "kl_test", "score_forget", "score_retain", "score_test")
    marks = {
        "original": dict(zip(columns, (12.3, 0.011, 1.31, 1.0, 1.0, 0.972), strict=True)),
        "retrained": dict(zip(columns, (0.55, 0.0021, 0.094, 0.0, 1.0, 0.876), strict=True)),
        "retrained_std": dict(zip(columns, (0.06, 3e-4, 0.01, 0.0, 0.0, 0.004), strict=True)),
    }
    for name, loss in (("original", 0.004), ("retrained", 0.005), ("retrained_std", 1e-3)):
        marks[name] |= {"loss_forget": 7 * loss, "loss_retain": loss, "loss_test": 2 * loss}
    rng = np.random.default_rng(0)
    rows = []
    levels = (0.0, *np.logspace(-5, -1.5, 11)) if scales is None else scales
    for exponent, scale, seed in itertools.product(exponents, levels, range(seeds)):
        if scale == 0 and seed:
            continue
        strength = scale / 1e-3 * (1 if exponent == 0.25 else 4)
        wobble = 1 + 0.15 * rng.standard_normal() * (scale > 0)
        row = {
            "noise": scale,
            "exponent": exponent,
            "seed": seed,
            "scale": scale,
            "information": 1.0,
            "seconds": 2.0,
        }
        row |= {
            "status": "ruined" if strength > 10 else "done",
            "kl_forget": (1.2 / (1 + 0.6 * strength**0.7) + 0.3 * strength) * wobble,
            "kl_retain": (0.0042 + 0.02 * strength**1.6) * wobble,
            "kl_test": 0.18 + 0.05 * strength,
            "score_forget": 0.02,
            "score_retain": max(0.1, 0.998 - 0.02 * strength),
            "score_test": max(0.1, 0.871 - 0.03 * strength * wobble),
            "loss_forget": 7 + strength,
            "loss_retain": (0.01 + 0.1 * strength) * wobble,
            "loss_test": 0.02 + strength,
            "gap_closed": 0.9,
            "gap_low": 0.8,
            "gap_high": 0.95,
        }
        rows.append({"method": "fisher-forget"} | row)
    axes = ("method", "noise", *(("exponent",) if len(exponents) > 1 else ()))
    return SweepTable(pd.DataFrame(rows), axes, marks, Categorical.score, 1.0)
