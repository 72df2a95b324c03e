"""Deletion requests from prepared sums beside `forget` on all data: time, weights, KL to retrained
models.

    python -m benchmarks.requests CONFIG [--out FOLDER] [--few N]

Models are those of `fisher-forget run CONFIG`, trained where the run has not stored them. Prints
two Markdown tables: every forget set of the recipe with the default flow, and one literal step
without a few random samples by each structure. No noise is added, so that weights and KL can be
compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from fisher_forget import forget, prepare
from fisher_forget import params as P
from fisher_forget.experiments import run as recipe
from fisher_forget.experiments.config import load_config
from fisher_forget.unlearn.result import ForgetResult

T = TypeVar("T")
STRUCTURES = ("diagonal", "ekfac")
DAMPING = 1e-2


def timed(function: Callable[..., T], *args: Any, **options: Any) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    begun = time.perf_counter()
    found = function(*args, **options)
    return found, time.perf_counter() - begun


def distance(a: ForgetResult, b: ForgetResult, start: nn.Module) -> float:
    """|a - b| / |b - start| of the weights."""
    origin = {name: p.detach() for name, p in start.named_parameters()}
    return P.norm(P.add(a.newton.params, b.newton.params, -1)) / P.norm(
        P.add(b.newton.params, origin, -1)
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", default="runs", help="folder of the runs")
    parser.add_argument("--few", type=int, default=100, help="random samples of the literal step")
    args = parser.parse_args()
    config = replace(load_config(args.config), out=args.out)
    data, folder = config.data.load(), Path(config.out) / config.name
    cases = [recipe.prepare_case(config, data, settings, folder) for settings in config.forget_sets]
    model, seed, train = cases[0].originals.models[0], config.seeds[0], data.train
    common: dict[str, Any] = {"likelihood": config.likelihood, "seed": seed, "progress": False}
    common["weight_decay"] = recipe.forget_options(config)["weight_decay"]

    print(f"{config.name}, {len(train):,} samples, seed {seed}\n")
    print(
        "| forget | `forget`, s | prepared, s | KL before | `forget` | prepared | floor |\n"
        + 7 * "|---"
        + "|"
    )
    for case in cases:
        prepared, once = timed(prepare, model, train, **common)
        direct, long = timed(forget, model, train, case.forget, noise=None, **common)
        asked, short = timed(prepared.forget, case.forget, noise=None)
        near = [
            case.references[0].closeness(m).parts["forget"]
            for m in (model, direct.model, asked.model)
        ]
        kl = " | ".join(f"{part.kl_scrubbed:.3g}" for part in near)
        print(
            f"| {case.settings.name} | {long:.1f} | {short:.1f} | {kl} | {near[0].floor:.2g} |",
            flush=True,
        )
    print(f"\n`prepare` takes {once:.1f} s.")

    few = np.sort(np.random.default_rng(0).choice(len(train), args.few, replace=False))
    literal: dict[str, Any] = {
        "steps": 1,
        "damping": DAMPING,
        "solver": "direct",
        "drift": False,
        "noise": None,
    }
    print(
        f"\n{args.few} random samples, one literal step at damping {DAMPING}, curvature of all samples\n"
    )
    print(
        "| structure | `forget`, s | prepared, s | ratio | relative weight difference |\n"
        + 5 * "|---"
        + "|"
    )
    for structure in STRUCTURES:
        whole: dict[str, Any] = {"structure": structure, "max_samples": None, **common}
        ready = prepare(model, train, **whole)
        direct, long = timed(forget, model, train, few, **whole, **literal)
        asked, short = timed(ready.forget, few, **literal)
        gap = f"{distance(asked, direct, model):.1e}"
        print(
            f"| {structure} | {long:.1f} | {short:.2f} | {long / short:.0f} | {gap} |", flush=True
        )


if __name__ == "__main__":
    main()
