"""Classical models: the games of Gao et al. 2022, after exact retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from fisher_forget.attack import ChangedAnswers, DeletionInference, Pair, Release

GAMES = 300
Report = dict[str, Any]

LOGISTIC = partial(LogisticRegression, max_iter=300)
# what is trained on how many samples (all: None) -> published rates of the two attacks
CLASSICAL: dict[str, tuple[str, Callable[[], Any], int | None, tuple[float, float] | None]] = {
    "diabetes, linear": ("diabetes", LinearRegression, None, (0.933, 1.000)),
    "iris, logistic": ("iris", LOGISTIC, 100, (0.895, 0.875)),
    "wine, logistic": ("wine", LOGISTIC, 100, (0.830, 0.775)),
    "breast cancer, logistic": (
        "breast_cancer", LOGISTIC, 100, (0.725, 0.565)
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
    found: Report = {"cases": {}, "defences": {}, "labels": {}}
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
    one = partial(KNeighborsClassifier, n_neighbors=1)
    learners = {"1-NN": one, "5-NN": KNeighborsClassifier, "logistic": LOGISTIC}
    for name in ("iris", "wine"):
        found["labels"] |= {f"{name}, {k}": nearest(name, v) for k, v in learners.items()}
    return found


def nearest(name: str, learner: Callable[[], Any], games: int = 100) -> Any:
    """What changed labels tell of a deleted sample: 100 standardised samples, 5,000 normal queries
    of their covariance."""
    bundle, rng = getattr(datasets, f"load_{name}")(), np.random.default_rng(0)
    x, y = StandardScaler().fit_transform(bundle.data), bundle.target
    queries = rng.multivariate_normal(np.zeros(x.shape[1]), np.cov(x.T), 5000)
    pairs = []
    for _ in range(games):
        rows = rng.permutation(len(x))[:100]
        releases = [answering(learner, x[s], y[s]) for s in (rows, rows[1:])]
        gone = torch.from_numpy(x[rows[:1]]), torch.from_numpy(y[rows[:1]])
        pairs.append(Pair(*releases, gone))
    attack = ChangedAnswers((queries, np.zeros(len(queries), int)), Release(labels_only=True))
    return attack.run(pairs).to_dict()


def both(pairs: Sequence[Pair], release: Release | None = None) -> list[Any]:
    """Example and instance attack, as stored."""
    attacks = (DeletionInference(s, release or Release()) for s in ("loss", "output"))
    return [attack.run(pairs).to_dict() for attack in attacks]
