"""What may be found where nothing is: guesses by SciPy's Dirichlet-multinomial, false alarms of
noise, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import dirichlet_multinomial
from torch import nn

from fisher_forget import ConfigError, DataError
from fisher_forget.overlearn import Decensoring, Probe, Repurposing
from fisher_forget.overlearn.probe import STRENGTHS, best_guess


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).eval()


def test_guess_averages_dirichlet_priors_by_their_evidence() -> None:
    rng = np.random.default_rng(0)
    labels, values = rng.integers(0, 6, 90), rng.integers(0, 3, 90)
    labels[labels == 4] = 5
    values[labels == 2] = 1  # a label that tells the value
    train = np.arange(0, 90, 2)
    n = np.array([[((labels == k) & (values == v))[train].sum() for v in range(3)]
                  for k in range(6)])  # fmt: skip
    shares = n.sum(0) / n.sum()
    evidence = np.array([
        sum(dirichlet_multinomial.logpmf(row, a * shares, row.sum()) for row in n if row.sum())
        for a in STRENGTHS
    ])  # fmt: skip
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    for k in range(6):
        drawn = [(n[k] + a * shares) / (n[k].sum() + a) for a in STRENGTHS]
        assert best_guess(values, labels, train)[k] == pytest.approx(weights @ drawn)
    assert best_guess(values, labels, train)[4] == pytest.approx(shares)  # without samples
    one = best_guess(values, 0 * labels, train)[0]
    assert one == pytest.approx(shares)


@pytest.mark.parametrize(
    ("samples", "share", "labels"),
    [(400, 0.2, 50), (400, 0.4, 30), (1000, 0.1, 100), (300, 0.3, 10)],
)
def test_labels_of_few_samples_make_no_information_of_noise(
    samples: int, share: float, labels: int
) -> None:
    """An interval is above 0 in 2.5 % of runs where nothing is told; of 40, in five or more with a
    chance of 3e-3. What there is to tell is found in each."""
    gains = informed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = torch.tensor(rng.normal(size=(samples, 8))).float()
        s = (rng.random(samples) < share).astype(int)
        given, probe = rng.integers(0, labels, samples), Probe(layers=["0"], strengths=(0.01,))
        found = probe.run(model(), (x, torch.zeros(samples)), s, given=given)["0"]
        gains += found.gain.low > 0
        informed += found.information.low > 0
        if seed < 5:
            x[:, 0] += 5 * torch.tensor(s)
            told = Probe(layers=["0"], strengths=(10.0,)).run(
                model(), (x, torch.zeros(samples)), s, given=given
            )["0"]
            assert told.finds
            assert told.information.low > 0.1
    assert gains < 5
    assert informed < 5


@pytest.mark.parametrize(
    ("samples", "options", "error", "match"),
    [
        (40, {"folds": 50}, ConfigError, "at most 10 folds"),
        (24, {"kind": "nonlinear"}, DataError, "more than 10"),
    ],
)
def test_too_few_samples(
    samples: int, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    x, s = torch.randn(samples, 8), np.arange(samples) % 2
    with pytest.raises(error, match=match):
        Probe(layers=["0"], **options).run(model(), (x, torch.zeros(samples)), s)
    if "folds" in options:  # with a single strength nothing is chosen
        Probe(layers=["0"], strengths=(1.0,), **options).run(model(), (x, torch.zeros(samples)), s)


def test_inputs_that_are_not_finite_are_named() -> None:
    x, s = torch.randn(60, 8), np.arange(60) % 2
    x[5, 1], x[7, 0] = float("nan"), float("inf")
    data = x, torch.zeros(60).long()
    asks = (
        lambda: Probe().run(model(), data, s),
        lambda: Repurposing(layer="0", labels=20).run(model(), data, s),
        lambda: Decensoring(layer="0").run(model(), model(), data, s),
    )
    for ask in asks:
        with pytest.raises(DataError, match="inputs in 2 of 60 samples"):
            ask()
