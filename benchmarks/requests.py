"""Deletion requests from prepared sums beside `forget` on all data: time, weights, KL to retrained
models.

    python -m benchmarks.requests CONFIG [--out FOLDER] [--few N]

Models are those of `fisher-forget run CONFIG`, trained where the run has not stored them. Prints
two Markdown tables: every forget set of the configuration with the default flow, and one literal
step without a few random samples by each structure. No noise is added, so that weights and KL can
be compared.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.calls import timed
from fisher_forget import ForgetOptions, ForgetResult, forget, prepare
from fisher_forget import params as P
from fisher_forget._util.markdown import markdown_table
from fisher_forget.experiments.cases import Case, prepare_case
from fisher_forget.experiments.config_file import load_config

STRUCTURES = ("diagonal", "ekfac")
DAMPING = 1e-2


def distance(a: ForgetResult, b: ForgetResult, start: nn.Module) -> float:
    """|a - b| / |b - start| of the weights."""
    origin = {name: p.detach() for name, p in start.named_parameters()}
    return P.norm(P.add(a.newton.params, b.newton.params, -1)) / P.norm(
        P.add(b.newton.params, origin, -1)
    )


def each_forget_set(cases: list[Case], train: TensorDataset, options: ForgetOptions) -> None:
    """Print the table of every forget set with the default flow."""
    model, rows = cases[0].originals.models[0], []
    for case in cases:
        prepared, once = timed(prepare, model, train, options, progress=False)
        direct, seconds = timed(forget, model, train, case.forget, options, progress=False)
        request, short = timed(prepared.forget, case.forget)
        models = (model, direct.model, request.model)
        near = [case.references[0].closeness(m).parts["forget"] for m in models]
        kl = [f"{part.kl_scrubbed:.3g}" for part in near]
        name = case.settings.name
        rows.append([name, f"{seconds:.1f}", f"{short:.1f}", *kl, f"{near[0].floor:.2g}"])
    columns = ["forget", "`forget`, s", "prepared, s", "KL before", "`forget`", "prepared", "floor"]
    print(f"{markdown_table(columns, rows)}\n\n`prepare` takes {once:.1f} s.")


def literal_step(
    model: nn.Module, train: TensorDataset, options: ForgetOptions, count: int
) -> None:
    """Print the table of one literal step without a few random samples, by each structure."""
    few = np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))
    options = options.changed(
        {
            "max_samples": None,
            "steps": 1,
            "damping": DAMPING,
            "solver": "direct",
            "drift": False,
        }
    )
    rows = []
    for structure in STRUCTURES:
        literal = options.changed({"structure": structure})
        prepared = prepare(model, train, literal, progress=False)
        direct, seconds = timed(forget, model, train, few, literal, progress=False)
        request, short = timed(prepared.forget, few)
        gap, ratio = f"{distance(request, direct, model):.1e}", f"{seconds / short:.0f}"
        rows.append([structure, f"{seconds:.1f}", f"{short:.2f}", ratio, gap])
    print(
        f"\n{count} random samples, one literal step at damping {DAMPING}, curvature of all "
        "samples\n"
    )
    columns = ["structure", "`forget`, s", "prepared, s", "ratio", "relative weight difference"]
    print(markdown_table(columns, rows))


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
    data, folder, seed = config.data.load(), Path(config.out) / config.name, config.seeds[0]
    cases = [prepare_case(config, data, settings, folder) for settings in config.forget_sets]
    options = config.forget_options(seed).changed({"noise": None})
    print(f"{config.name}, {len(data.train):,} samples, seed {seed}\n")
    each_forget_set(cases, data.train, options)
    literal_step(cases[0].originals.models[0], data.train, options, args.few)


if __name__ == "__main__":
    main()
