"""How often the verdicts of `evaluate` are wrong, on networks that were really trained.

    python -m benchmarks.levels [--worlds N] [--only-table]

Trains 240 digits networks without 60 of the samples of a class, 60 on everything (the originals)
and 60 without half of these samples (half-way), all at once. A world draws M retrained models and K
of a method by chance: retrained ones, originals or half-way ones. Its rows are made by
`score_metric`, the code of `evaluate`, from numbers that are computed once. Shares over the worlds
are stored in benchmarks/levels.json after each design (M, K), so that a killed run goes on, and
written to docs/metrics.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.evaluate.evaluation import Evaluation
from fisher_forget.evaluate.metric import Context, Metric, Subject
from fisher_forget.evaluate.metrics import METRICS
from fisher_forget.evaluate.scoring import EvaluationRow, score_metric
from fisher_forget.evaluate.verdict import AS_RETRAINED, DIFFERENT
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.likelihood import Categorical

FOLDER = Path(__file__).parent
STORED, PAGE = FOLDER / "levels.json", FOLDER.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- levels -->\n", "<!-- end of levels -->\n"
RETRAINED, ORIGINAL, HALFWAY = 240, 60, 60  # networks
CLASS, FORGOTTEN = 8, 60
MODELS, RUNS = (3, 5, 10, 20), (1, 3, 5)
FEWER = 10  # worlds per one of a group metric, whose test takes 100 relabellings
EPOCHS, BATCH, RATE, DECAY, HIDDEN = 40, 60, 0.1, 5e-4, 32
ROWS = (
    ("kl", "forget"),
    ("kl", "retain"),
    ("loss", "forget"),
    ("membership_auc", "forget"),
    ("membership_features", "forget"),
    ("membership_entropy", "forget"),
    ("score", "forget"),
    ("score", "test"),
    ("klom_mean", "forget"),
    ("u_lira", "forget"),
)
TOGETHER = "primary rows together"
NAMES = {  # what the models of a method are -> the heading of their table
    "retrained": "Retrained models called different",
    "halfway": "Networks without half of the samples called different",
    "original": "Originals called different",
    "same": "Retrained models called as retrained",
}


def networks(x: Tensor, y: Tensor, sets: list[Tensor], parts: Mapping[str, Tensor]) -> Any:
    """Train a network of one hidden layer on each set, all at once, and predict.

    Args:
        x: All samples [N, D].
        y: Their classes [N].
        sets: Samples that each network is trained on; as many batches as the smallest allows.
        parts: Name -> samples to predict.

    Returns:
        Name -> outputs [networks, n, classes].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(sets))]

    def layer(inputs: int, outputs: int) -> list[Tensor]:
        draws = [torch.rand(inputs, outputs, generator=g) for g in generators]
        weight = (2 * torch.stack(draws) - 1) / inputs**0.5
        return [weight.requires_grad_(), torch.zeros(len(sets), 1, outputs, requires_grad=True)]

    def outputs(x: Tensor) -> Tensor:
        hidden = torch.baddbmm(first[1], x.expand(len(sets), *x.shape[-2:]), first[0]).relu()
        return torch.baddbmm(second[1], hidden, second[0])

    first, second = layer(x.shape[1], HIDDEN), layer(HIDDEN, 10)
    batches = min(map(len, sets)) // BATCH
    optimizer = torch.optim.SGD([*first, *second], RATE, momentum=0.9, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * batches)
    for _ in range(EPOCHS):
        orders = [
            s[torch.randperm(len(s), generator=g)] for s, g in zip(sets, generators, strict=True)
        ]
        for batch in torch.stack([o[: batches * BATCH] for o in orders]).split(BATCH, 1):
            logits = outputs(x[batch]).flatten(0, 1)
            loss = F.cross_entropy(logits, y[batch].flatten(), reduction="sum") / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return {name: outputs(x[idx]) for name, idx in parts.items()}


def trained() -> tuple[list[Subject], Context]:
    """All networks: retrained, originals, half-way."""
    data = load_dataset("digits")
    (x, y), (x_test, y_test) = data.train.tensors, data.test.tensors
    of_class = torch.nonzero(y == CLASS).flatten()[:FORGOTTEN]
    keep = torch.tensor(np.setdiff1d(np.arange(len(y)), of_class.numpy()))
    half = torch.cat([keep, of_class[: FORGOTTEN // 2]])
    sets = [keep] * RETRAINED + [torch.arange(len(y))] * ORIGINAL + [half] * HALFWAY
    test = torch.arange(len(y), len(y) + len(y_test))
    x, y = torch.cat([x, x_test]).flatten(1), torch.cat([y, y_test])
    parts = {"forget": of_class, "retain": keep, "test": test}
    outputs = networks(x, y, sets, parts)
    models: list[Any] = list(range(len(sets)))
    subjects = [Subject({p: z[i] for p, z in outputs.items()}, i, i) for i in models]
    targets = {part: y[idx] for part, idx in parts.items()}
    return subjects, Context(Categorical(), Categorical(), targets)


def known(metric: Metric, part: str, subjects: list[Subject], context: Context) -> Metric:
    """The metric with its numbers looked up, those of all networks and all pairs; KL is the only
    one of a pair here."""
    solo, pair = metric.solo, metric.pair
    if solo is not None:
        own = [solo(a, part, context) for a in subjects]
        return replace(metric, solo=lambda a, *_: own[a.model])  # type: ignore[call-overload]
    if pair is not None:
        log_p = torch.stack([a.outputs[part] for a in subjects]).double().log_softmax(-1).flatten(1)
        p, count = log_p.exp(), context.samples(part)
        beside = (((p * log_p).sum(1)[:, None] - p @ log_p.T) / count).tolist()
        # of a beside b: KL(b || a)
        return replace(metric, pair=lambda a, b, *_: beside[b.model][a.model])
    return metric


def world(
    rng: np.random.Generator, subjects: list[Subject], models: int, runs: int
) -> tuple[dict[str, list[Subject]], list[Subject]]:
    """Methods of K models each, the original first, and M retrained models."""
    drawn = rng.permutation(RETRAINED)[: models + runs]
    first = {"original": RETRAINED, "halfway": RETRAINED + ORIGINAL}
    groups = {
        name: [subjects[begin + i] for i in rng.permutation(ORIGINAL)[:runs]]
        for name, begin in first.items()
    }
    groups["retrained"] = [subjects[i] for i in drawn[models:]]
    return groups, [subjects[i] for i in drawn[:models]]


def shares(
    subjects: list[Subject],
    context: Context,
    rows: Mapping[tuple[str, str], Metric],
    design: tuple[int, int],
    worlds: int,
) -> dict[str, dict[str, float | None]]:
    """Heading of `NAMES` -> row -> share of the worlds."""
    rng = np.random.default_rng(design)
    found: dict[tuple[str, str], list[bool]] = {}
    for index in range(worlds):
        groups, retrained = world(rng, subjects, *design)
        scored: list[EvaluationRow] = []
        for (_, part), metric in rows.items():
            if metric.group is None or index < worlds // FEWER:
                scored += score_metric(metric, part, groups, retrained, context)
        for row in scored:
            if row.label != "undefined":
                name = f"{row.metric}, {row.part}"
                found.setdefault((row.method, name), []).append(row.label in DIFFERENT)
                if row.method == "retrained" and METRICS[row.metric].group is None:
                    found.setdefault(("same", name), []).append(row.label == AS_RETRAINED)
        table = Evaluation(tuple(scored), len(retrained), {})
        for method in groups:
            label = table.conclusion(method).label
            found.setdefault((method, TOGETHER), []).append(label in DIFFERENT)
            if method == "retrained":
                found.setdefault(("same", TOGETHER), []).append(label == AS_RETRAINED)
    result: dict[str, dict[str, float | None]] = {name: {} for name in NAMES}
    for (method, row_name), hits in found.items():
        result[method][row_name] = float(np.mean(hits))
    return result


def table(report: Mapping[str, Any]) -> str:
    """The tables of all designs in Markdown."""
    stars = {f"{name}, {part}": " *" * METRICS[name].is_primary(part) for name, part in ROWS}
    text = []
    for key, heading in NAMES.items():
        rows = []
        for name, star in (stars | {TOGETHER: ""}).items():
            cells = [
                " / ".join(_share(report["designs"][f"{m},{k}"][key].get(name)) for k in RUNS)
                for m in MODELS
            ]
            if any(cell.strip("–/ ") for cell in cells):
                rows.append([name + star, *cells])
        header = [heading, *(f"M = {m}" for m in MODELS)]
        text.append(markdown_table(header, rows))
    return "\n\n".join(text) + "\n"


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}".lstrip("0") if value < 0.1 else f"{value:.2f}".removeprefix("0")


def write_table(report: Mapping[str, Any]) -> None:
    """Put the tables between their marks in docs/metrics.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=1000)
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    report = read_json(STORED) if STORED.exists() else {}
    if report.get("worlds") != options.worlds and not options.only_table:
        report = {"worlds": options.worlds, "designs": {}}
    if not options.only_table:
        simulate(report, options.worlds)
    write_table(report)


def simulate(report: dict[str, Any], worlds: int) -> None:
    """Add the designs that are not stored yet, and store each."""
    begun = time.perf_counter()
    torch.set_num_threads(1)
    subjects, context = trained()
    rows = {(name, part): known(METRICS[name], part, subjects, context) for name, part in ROWS}
    print(f"{len(subjects)} networks and their scores: {time.perf_counter() - begun:.0f} s")
    for design in ((m, k) for m in MODELS for k in RUNS):
        key = f"{design[0]},{design[1]}"
        if key not in report["designs"]:
            report["designs"][key] = shares(subjects, context, rows, design, worlds)
            write_json(STORED, report)
            print(key, f"{time.perf_counter() - begun:.0f} s", report["designs"][key]["retrained"])


if __name__ == "__main__":
    main()
