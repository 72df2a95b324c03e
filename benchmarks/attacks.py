"""What attacks find in pairs of releases: the tables of docs/attacks.md, and its picture.

    python -m benchmarks.attacks [PART ...] [--only-table]

Parts are "classical", "requests", "shadow", "inversion" and "mnist" (which needs MNIST on disk);
all of them by default. Numbers are stored in benchmarks/attacks.json after each, so that a killed
run goes on, and written to docs/attacks.md. One thread; each part takes less than ten minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import forget, resolve_split
from fisher_forget._util.copies import copy_model
from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.attack import (
    FEATURES,
    DeletionInference,
    Finding,
    NewtonInversion,
    Pair,
    Reconstruction,
    Release,
    ShadowInference,
    shadow_pairs,
)
from fisher_forget.baselines import METHODS
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.report.plots import plot_reconstructions

FOLDER = Path(__file__).parent
STORED, PAGE = FOLDER / "attacks.json", FOLDER.parent / "docs" / "attacks.md"
PICTURE = FOLDER.parent / "docs" / "attacks.png"
BEGIN, END = "<!-- {} -->\n", "<!-- end of {} -->\n"
DECAY, GAMES = 1e-2, 300
Report = dict[str, Any]

# ---------------------------------------------------------------- classical models: games

# what is trained on how many samples (all: None) -> published rates of the two attacks
CLASSICAL: dict[str, tuple[str, Callable[[], Any], int | None, tuple[float, float] | None]] = {
    "diabetes, linear": ("diabetes", LinearRegression, None, (0.933, 1.000)),
    "iris, logistic": ("iris", partial(LogisticRegression, max_iter=300), 100, (0.895, 0.875)),
    "wine, logistic": ("wine", partial(LogisticRegression, max_iter=300), 100, (0.830, 0.775)),
    "breast cancer, logistic": (
        "breast_cancer", partial(LogisticRegression, max_iter=300), 100, (0.725, 0.565)
    ),
    "breast cancer, tree of depth 5": (
        "breast_cancer", partial(DecisionTreeClassifier, max_depth=5, random_state=0), None,
        (0.698, 0.703),
    ),
    "breast cancer, 5-NN": ("breast_cancer", KNeighborsClassifier, 100, (0.55, 0.55)),
}  # fmt: skip
RELEASES = {
    "all probabilities": Release(),
    "the largest": Release(top_k=1),
    "noise of .05": Release(noise=0.05),
    "labels": Release(labels_only=True),
}


def classical_games(
    case: str, games: int, *, batch: int = 1, deleted: bool = True
) -> Iterator[Pair]:
    """Games of Gao et al.: a model of S, and one of S without e_0 and `batch` - 1 others.

    Args:
        case: Of `CLASSICAL`.
        games: How many.
        batch: Samples that are deleted at once.
        deleted: Whether e_0 is one of them; else nothing can be found.
    """
    name, learner, size, _ = CLASSICAL[case]
    bundle = getattr(datasets, f"load_{name}")()
    x, y = StandardScaler().fit_transform(bundle.data), bundle.target
    y = y.astype(float) if name == "diabetes" else y.astype(int)
    rng = np.random.default_rng(0)
    while games:
        rows = rng.permutation(len(x))[:size]
        pair, rest = rows[:2], rows[2:]
        if (x[pair[0]] == x[pair[1]]).all():
            continue  # no one can tell these two apart
        gone = [pair[0], *rest[: batch - 1]] if deleted else rest[:batch]
        releases = [answering(learner, x[s], y[s]) for s in (rows, np.setdiff1d(rows, gone))]
        samples = [(torch.from_numpy(x[[e]]), torch.from_numpy(y[[e]])) for e in pair]
        games -= 1
        yield Pair(*releases, *samples)


def answering(learner: Callable[[], Any], x: Any, y: Any) -> Callable[[Any], Any]:
    """A function from inputs to what a trained model predicts."""
    model = learner().fit(x, y)
    answer = model.predict_proba if hasattr(model, "predict_proba") else model.predict
    return lambda inputs: answer(inputs)


def classical() -> Report:
    """Both attacks on all cases; defences and a control where nothing was deleted."""
    found: Report = {"cases": {}, "defences": {}}
    for case, (*_, published) in CLASSICAL.items():
        pairs = list(classical_games(case, GAMES))
        kept = list(classical_games(case, GAMES, deleted=False))
        found["cases"][case] = {
            "published": published,
            "found": both(pairs),
            "nothing deleted": both(kept),
        }
    case = "iris, logistic"
    pairs = list(classical_games(case, GAMES))
    for name, release in RELEASES.items():
        found["defences"][name] = both(pairs, release)
    for batch in (4, 16):
        pairs = list(classical_games(case, GAMES, batch=batch))
        found["defences"][f"all, of {batch} deletions at once"] = both(pairs)
    return found


def both(pairs: Sequence[Pair], release: Release | None = None) -> list[Any]:
    """Example and instance attack, as stored."""
    attacks = (DeletionInference(s, release or Release()) for s in ("loss", "output"))
    return [attack.run(pairs).to_dict() for attack in attacks]


# ---------------------------------------------------------------- networks: one request of many


def network(inputs: int, hidden: int) -> nn.Module:
    """Two layers; weights depend on nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        return nn.Sequential(nn.Flatten(), *layers)


class Digits:
    """Digits: 700 to train on, 700 that are public, the rest."""

    def __init__(self) -> None:
        whole = load_dataset("digits").train
        self.data = take(whole, range(700))
        self.public = take(whole, range(700, 1400))
        self.settings = TrainSettings(epochs=100, lr=0.1, batch_size=60, weight_decay=DECAY)
        self.start = network(64, 32)

    def fit(self, indices: Indices, seed: int, data: TensorDataset | None = None) -> nn.Module:
        """A network of some of the samples."""
        chosen = self.data if data is None else data
        return train(self.start, chosen, self.settings, seed=seed, indices=indices, progress=False)


def requests(originals: int = 3, deleted: int = 50) -> Report:
    """One request for fifty samples, by several methods, of several originals."""
    own, everyone = Digits(), np.arange(700)
    pairs: dict[str, list[Pair]] = {}
    for seed in range(originals):
        order = np.random.default_rng(seed).permutation(700)
        gone, kept = order[:deleted], order[deleted : 2 * deleted]
        before, split = own.fit(everyone, seed), resolve_split(own.data, gone)
        samples = take(own.data, gone), take(own.data, kept)
        exact = [own.fit(split.retain, 1000 + k) for k in range(3)]
        options = {"weight_decay": DECAY, "progress": False}
        after = {
            "fisher-forget": forget(before, own.data, gone, **options).model,
            "fisher-forget, without noise": forget(
                before, own.data, gone, noise=None, **options
            ).model,
            "fine-tuning": METHODS["finetune"]().unlearn(before, split).model,
            "SSD": METHODS["ssd"]().unlearn(before, split).model,
            "retrained": own.fit(split.retain, 1000 + 3),
            "control: trained on the same data": own.fit(everyone, 500 + seed),
        }
        for name, model in after.items():
            pairs.setdefault(name, []).append(Pair(before, model, *samples, exact))
    found: Report = {"methods": {name: both(x) for name, x in pairs.items()}, "defences": {}}
    for name, release in (RELEASES | {"the largest three": Release(top_k=3)}).items():
        found["defences"][name] = both(pairs["fisher-forget"], release)
    return found


# ---------------------------------------------------------------- shadow models


def shadow(originals: int = 6, deletions: int = 25) -> Report:
    """Chen et al. on retrained models and on ours, feature by feature."""
    own, found = Digits(), Report()
    outside = partial(own.fit, data=own.public)
    options = {"weight_decay": DECAY, "progress": False}

    def unlearn(data: TensorDataset) -> Callable[[nn.Module, Indices, int], nn.Module]:
        def forgotten(before: nn.Module, trained: Indices, gone: int) -> nn.Module:
            (place,) = np.flatnonzero(trained == gone)
            return forget(before, take(data, trained), [int(place)], **options).model

        return forgotten

    plan = {"originals": originals, "deletions": deletions, "progress": False}
    for name, theirs, ours in (
        ("retrained", None, None),
        ("fisher-forget", unlearn(own.public), unlearn(own.data)),
    ):
        shadows = shadow_pairs(outside, own.public, template=own.start, forget_fn=theirs, **plan)
        targets = shadow_pairs(
            own.fit, own.data, template=own.start, forget_fn=ours, seed=500, **plan
        )
        for feature in FEATURES:
            found[f"{name}, {feature}"] = ShadowInference(shadows, feature).run(targets).to_dict()
        for release in ("the largest", "labels", "noise of .05"):
            attack = ShadowInference(shadows, "sorted_diff", RELEASES[release])
            found[f"{name}, sorted_diff, {release}"] = attack.run(targets).to_dict()
    return found


# ---------------------------------------------------------------- inversion of the step


def noisy(model: nn.Module, share: float, before: nn.Module) -> nn.Module:
    """With normal noise on all weights, of `share` times the length of the step."""
    twin, generator = copy_model(model), torch.Generator().manual_seed(0)
    start = [p.detach() for p in before.parameters()]
    step = torch.cat([(p - s).flatten() for p, s in zip(twin.parameters(), start, strict=True)])
    scale = share * float(step.norm()) / len(step) ** 0.5
    with torch.no_grad():
        for p in twin.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return twin


def inverted(
    own: Any, data: TensorDataset, count: int, batches: Sequence[int], seed: int = 0
) -> dict[str, Reconstruction]:
    """What is recovered of `count` deletions, by who made the second release."""
    everyone = np.arange(len(data))
    before = own.fit(everyone, seed)
    options: dict[str, Any] = {"weight_decay": DECAY, "progress": False}
    order = np.random.default_rng(seed).permutation(len(data))
    attack, found = NewtonInversion(own.public), {}

    def pairs(
        make: Callable[[Indices], nn.Module], batch: int = 1, exact: bool = False
    ) -> list[Pair]:
        rows = []
        for k in range(max(count // batch, 3)):
            gone = order[k * batch : (k + 1) * batch]
            yard = [own.fit(np.setdiff1d(everyone, gone), seed)] if exact else []
            rows.append(Pair(before, make(gone), take(data, gone), retrained=yard))
        return rows

    def step(gone: Indices) -> nn.Module:
        return forget(before, data, gone, noise=None, **options).model

    ours = pairs(step, exact=True)
    found["the step, no noise"] = attack.run(ours)
    for share in (0.1, 1.0, 10.0):
        moved = [Pair(before, noisy(p.after, share, before), p.deleted) for p in ours]
        found[f"the step, noise of {share:g} times its length"] = attack.run(moved)
    found["fisher-forget, its own noise"] = attack.run(
        pairs(lambda gone: forget(before, data, gone, **options).model)
    )
    for batch in batches:
        found[f"the step, of {batch} at once"] = attack.run(pairs(step, batch))
    same = [Pair(before, own.fit(everyone, 500 + k), p.deleted) for k, p in enumerate(ours)]
    found["control: nothing deleted"] = attack.run(same)
    fresh = [Pair(before, own.fit(np.setdiff1d(everyone, order[[k]]), 100 + k), p.deleted)
             for k, p in enumerate(ours)]  # fmt: skip
    found["retrained, from another seed"] = attack.run(fresh)
    return found


def inversion(count: int = 16) -> Report:
    """Digits."""
    own = Digits()
    return stored(inverted(own, own.data, count, (4, 16)))


class Mnist(Digits):
    """Two thousand images to train on and as many that are public."""

    def __init__(self) -> None:
        whole = load_dataset("mnist").train
        self.data, self.public = take(whole, range(2000)), take(whole, range(2000, 4000))
        self.settings = TrainSettings(epochs=60, lr=0.1, batch_size=100, weight_decay=DECAY)
        self.start = network(784, 64)


def mnist(count: int = 8) -> Report:
    """MNIST, with the picture."""
    own = Mnist()
    found = inverted(own, own.data, count, (4,))
    figure = plot_reconstructions(
        found["the step, no noise"],
        (28, 28),
        others={
            name: found[name].recovered
            for name in ("fisher-forget, its own noise", "retrained, from another seed")
        },
    ).figure
    figure.savefig(PICTURE, dpi=110)
    return stored(found)


def stored(found: Mapping[str, Finding]) -> Report:
    """Findings as they are stored."""
    return {name: finding.to_dict() for name, finding in found.items()}


# ---------------------------------------------------------------- tables

PARTS: dict[str, Callable[[], Report]] = {
    "classical": classical,
    "requests": requests,
    "shadow": shadow,
    "inversion": inversion,
    "mnist": mnist,
}


def shown(interval: Mapping[str, float] | None) -> str:
    """A number and its interval."""
    if interval is None:
        return "–"
    value, low, high = (f"{interval[k]:.2f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def tables(part: str, found: Report) -> str:
    """A part's numbers, as Markdown."""
    if part == "classical":
        rows = [
            [case, "{} / {}".format(*row["published"]),
             *(shown(f["found"]) for f in (*row["found"], *row["nothing deleted"]))]
            for case, row in found["cases"].items()
        ]  # fmt: skip
        heads = ["model", "known rates", "example", "instance"]
        kept = ["example, nothing deleted", "instance, nothing deleted"]
        return f"{markdown_table(heads + kept, rows)}\n\n{_defences(found)}"
    if part == "requests":
        rows = [
            [name, *(shown(f["found"]) for f in pair), *(shown(f["retrained"]) for f in pair)]
            for name, pair in found["methods"].items()
        ]
        heads = ["second release", "example", "instance"]
        yard = ["example, retrained", "instance, retrained"]
        return f"{markdown_table(heads + yard, rows)}\n\n{_defences(found)}"
    if part == "shadow":
        heads = [
            "second release and feature",
            "AUC",
            "AUC of the first alone",
            "DegCount",
            "DegRate",
        ]
        names = ("AUC from the first release alone", "DegCount", "DegRate")
        rows = [
            [name, shown(f["found"]), *(f"{f['details'][key]:.2f}" for key in names)]
            for name, f in found.items()
        ]
        return markdown_table(heads, rows)
    heads = ["second release", "cosine", "with the mean", "PSNR (dB)", "retrained, same seed"]
    names = ("cosine with the mean left in", "PSNR (dB)")
    rows = [
        [name, shown(f["found"]), *(f"{f['details'][key]:.2f}" for key in names),
         shown(f["retrained"])]
        for name, f in found.items()
    ]  # fmt: skip
    return markdown_table(heads, rows)


def _defences(found: Report) -> str:
    rows = [[name, *(shown(f["found"]) for f in pair)] for name, pair in found["defences"].items()]
    return markdown_table(["what is published", "example", "instance"], rows)


def write_page(report: Report) -> None:
    """Put the tables between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for part in PARTS:
        if part in report:
            begin, end = BEGIN.format(part), END.format(part)
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{tables(part, report[part])}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: Report = read_json(STORED) if STORED.exists() else {}
    for part in () if options.only_table else options.parts:
        begun = time.perf_counter()
        report[part] = PARTS[part]()
        write_json(STORED, report)
        print(f"{part}: {time.perf_counter() - begun:.0f} s\n{tables(part, report[part])}")
    write_page(report)


if __name__ == "__main__":
    main()
