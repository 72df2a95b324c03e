"""Deletion requests of people, over time, to a tabular, an image and a text model: what each costs,
whether it is done, and what the officer can show. The table of docs/how-to/compliance.md.

    python -m benchmarks.compliance [MODEL ...] [--only-table]

Models are "tumours" (a table), "images" (MNIST, on disk) and "names" (text). Who owns which samples
is made up: ten people own as many samples each. Numbers are stored in benchmarks/compliance.json
after each model. One thread, three minutes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.parts import asked_for, write_tables
from fisher_forget import Ledger, audit, build_model, load_dataset, prepare, train
from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data.samples import take
from fisher_forget.evaluate.closeness import Reference
from fisher_forget.experiments.attributes import LENGTH, LETTERS, load_attribute_data
from fisher_forget.experiments.training import TrainSettings
from fisher_forget.ledger import new_keys, verify

STORED = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "compliance.md"
PEOPLE, MEMBERS = 10, 5  # who ask, one after the other; retrained models
EMBEDDED = 8  # numbers of a letter


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        kind: What the data are.
        train: To train on.
        test: Unseen samples.
        build: Makes the network of a seed.
        settings: Of the training.
        each: Samples that one person owns.
    """

    kind: str
    train: TensorDataset
    test: TensorDataset
    build: Callable[[int], nn.Module]
    settings: TrainSettings
    each: int

    def fit(self, seed: int, rows: Any = None) -> nn.Module:
        """A model of all samples or some."""
        start, settings = self.build(seed), self.settings
        return train(start, self.train, settings, seed=seed, indices=rows, progress=False)


def tumours() -> Case:
    """Breast cancer Wisconsin: 30 measurements of a tumour, benign or malignant."""
    data = load_dataset("breast_cancer")
    settings = TrainSettings(epochs=60, batch_size=32, lr=0.05, weight_decay=1e-3)
    return Case("table", data.train, data.test, _mlp(data.train, 2, 16), settings, 4)


def images() -> Case:
    """MNIST, 10,000 images."""
    data = load_dataset("mnist")
    some = take(data.train, range(10_000))
    settings = TrainSettings(epochs=8, batch_size=64, lr=0.05, weight_decay=5e-4)
    return Case("images", some, take(data.test, range(2000)), _mlp(some, 10, 64), settings, 20)


def names() -> Case:
    """First names, letter by letter: the gender."""
    data = load_attribute_data("names")
    settings = TrainSettings(epochs=10, batch_size=64, lr=0.05, weight_decay=5e-4)

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            letters = nn.Embedding(LETTERS, EMBEDDED), nn.Flatten()
            return nn.Sequential(
                *letters, nn.Linear(EMBEDDED * LENGTH, 32), nn.ReLU(), nn.Linear(32, 2)
            )

    return Case("text", data.train, data.test, build, settings, 10)


def _mlp(data: TensorDataset, classes: int, hidden: int) -> Callable[[int], nn.Module]:
    shape = tuple(data.tensors[0].shape[1:])
    return lambda seed: build_model("mlp", shape, classes, seed=seed, hidden=[hidden])


MODELS: dict[str, Callable[[], Case]] = {"tumours": tumours, "images": images, "names": names}


def served(case: Case) -> dict[str, Any]:
    """Ten requests, one after the other, and what is known at the end."""
    model = case.fit(0)
    owned = np.random.default_rng(0).permutation(len(case.train))
    people = np.sort(owned[: PEOPLE * case.each].reshape(PEOPLE, case.each), axis=1)
    with tempfile.TemporaryDirectory() as place:
        public = new_keys(Path(place) / "officer.pem")
        ledger = Ledger(Path(place) / "erasure", key=Path(place) / "officer.pem")
        begun = time.perf_counter()
        prepared = prepare(
            model,
            case.train,
            weight_decay=case.settings.weight_decay,
            folder=ledger,
            progress=False,
        )
        once = time.perf_counter() - begun
        seconds, came = [], datetime.now(UTC) - timedelta(days=2 * PEOPLE)
        for number, samples in enumerate(people):
            begun = time.perf_counter()
            result = prepared.forget(
                samples,
                who=f"ticket {number}",
                received=came + timedelta(days=2 * number),
                held_out=case.test,
            )
            seconds.append(time.perf_counter() - begun)
        for request in ledger.requests.values():
            ledger.serve(request.name, told="by mail")
        begun = time.perf_counter()
        exact = [case.fit(100 + i, result.split.retain) for i in range(MEMBERS)]
        retraining = (time.perf_counter() - begun) / MEMBERS
        found = audit(result, model, unseen=case.test, retrained=exact, progress=False)
        found.record(ledger)
        requests = list(ledger.requests.values())
        intact = verify(ledger.folder, public) == []
    gone, kept = (take(case.train, x) for x in (result.split.forget, result.split.retain))
    parts = {"forget": gone, "retain": kept, "test": case.test}
    close = Reference(model, exact, parts, "categorical").closeness(result.model).parts
    return {
        "kind": case.kind,
        "samples": len(case.train),
        "each": case.each,
        "once": once,
        "seconds": seconds,
        "retraining": retraining,
        "KL": [close["forget"].kl_original, close["forget"].kl_scrubbed, close["forget"].floor],
        "accuracy": [
            [getattr(close[part], f"score_{x}") for x in ("original", "scrubbed", "retrained")]
            for part in ("forget", "test")
        ],
        "checks": [request.verdict for request in requests],
        "in time": not any(request.late() for request in requests),
        "intact": intact,
        "audit": found.to_dict(),
    }


def table(report: dict[str, Any]) -> str:
    """The stored numbers, as Markdown."""
    first, second = [], []
    for name, told in report.items():
        before, after, floor = told["KL"]
        forgot, test = (
            " / ".join(f"{100 * x:.1f}" for x in numbers) for numbers in told["accuracy"]
        )
        first.append(
            [f"{name} ({told['kind']})", f"{told['samples']:,}", told["each"],
             f"{told['once']:.1f}", f"{np.median(told['seconds']):.2f}",
             f"{told['retraining']:.1f}", f"{before:.3f} / {after:.3f} / {floor:.3f}"]
        )  # fmt: skip
        checks = told["checks"]
        audited = told["audit"]["findings"]
        more = [f["attack"] for f in audited if f["verdict"] == "more than after retraining"]
        second.append(
            [name, forgot, test,
             ", ".join(f"{checks.count(x)} {x}" for x in dict.fromkeys(checks)),
             "yes" if told["in time"] else "no", "yes" if told["intact"] else "no",
             f"{len(more)} of {len(audited)}" + (f": {', '.join(more)}" if more else "")]
        )  # fmt: skip
    return "\n\n".join(
        [
            markdown_table(
                ["model", "samples", "each person's", "prepare (s)", "a request (s)",
                 "retraining (s)", "KL before / after / between retrained"], first),
            markdown_table(
                ["model", "accuracy on the forgotten, before / after / retrained (%)",
                 "on unseen samples", "what the checks say", "in time", "record intact",
                 "attacks that find more than after retraining"], second),
        ]
    )  # fmt: skip


def main() -> None:
    """The command line."""
    report = read_json(STORED) if STORED.exists() else {}
    for name in asked_for(__doc__, MODELS, "MODEL"):
        report[name] = served(MODELS[name]())
        write_json(STORED, report)
        print(table({name: report[name]}), flush=True)
    write_tables(PAGE, {"requests": table(report)})


if __name__ == "__main__":
    main()
