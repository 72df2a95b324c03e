"""Certified removal: the accounting against integrals, the model against scikit-learn, the removal
against training anew with the b that it stands for."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fisher_forget import ConfigError, DataError, Ledger, SplitError, StorageError
from fisher_forget.certify import CertifiedLogistic, delta_of, epsilon_of, mu_of

ACCOUNTINGS: Any = pytest.mark.parametrize("accounting", ["added", "corrected", "measured"])


class TestGaussian:
    @pytest.mark.parametrize(("mu", "epsilon"), [(0.3, 1.0), (1.0, 0.0), (2.0, 3.0), (0.05, 0.1)])
    def test_delta_is_the_integral(self, mu: float, epsilon: float) -> None:
        """delta = integral of max(0, p - e^eps q)."""

        def excess(z: float) -> float:
            return max(0.0, stats.norm.pdf(z - mu) - math.exp(epsilon) * stats.norm.pdf(z))

        start = mu / 2 + epsilon / mu  # p > e^eps q beyond
        whole, _ = integrate.quad(excess, start, start + 40, epsabs=1e-13)
        assert delta_of(mu, epsilon) == pytest.approx(whole, abs=1e-10)

    def test_published_values(self) -> None:
        assert mu_of(1.0, 1e-4) == pytest.approx(0.314, abs=5e-4)
        assert mu_of(1.0, 1e-4) / (1 / math.sqrt(2 * math.log(1.5e4))) == pytest.approx(
            1.38, abs=5e-3
        )

    @pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 8.0])
    @pytest.mark.parametrize("delta", [1e-10, 1e-4, 0.3])
    def test_inverses(self, epsilon: float, delta: float) -> None:
        mu = mu_of(epsilon, delta)
        assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-6)
        assert epsilon_of(mu, delta) == pytest.approx(epsilon, abs=1e-6)
        assert epsilon_of(0.0, delta) == 0.0

    def test_it_only_grows(self) -> None:
        values = [epsilon_of(mu, 1e-5) for mu in np.geomspace(1e-3, 100, 40)]
        assert all(a <= b for a, b in pairwise(values))
        assert epsilon_of(100.0, 1e-5) < math.inf

    @pytest.mark.parametrize("bad", [(-1.0, 0.1), (1.0, 0.0), (1.0, 1.0), (math.nan, 0.1)])
    def test_bad_input(self, bad: tuple[float, float]) -> None:
        with pytest.raises(ConfigError):
            mu_of(*bad)
        with pytest.raises(ConfigError):
            delta_of(-1.0, 1.0)


def rows(n: int = 300, d: int = 6, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1)
    pull = torch.randn(d, classes, generator=generator, dtype=torch.float64)
    y = (x @ pull + 0.3 * torch.randn(n, classes, generator=generator)).argmax(1)
    return x, y


def made(sigma: float = 1.0, classes: int = 2, **options: Any) -> CertifiedLogistic:
    generator = torch.Generator().manual_seed(1)
    settings = {"regularisation": 0.01, "generator": generator} | options
    return CertifiedLogistic(sigma=sigma, **settings).fit(*rows(classes=classes))


class TestModel:
    @pytest.mark.parametrize("classes", [2, 3])
    def test_without_b_it_is_logistic_regression(self, classes: int) -> None:
        x, y = rows(classes=classes)
        model = made(sigma=1e-9, classes=classes)
        for row, which in enumerate([1] if classes == 2 else range(classes)):
            theirs = LogisticRegression(C=1 / (0.01 * len(x)), fit_intercept=False, tol=1e-12)
            theirs.set_params(max_iter=10_000).fit(x.numpy(), (y == which).numpy())
            np.testing.assert_allclose(model.weights[row], theirs.coef_[0], atol=1e-5)

    def test_classes_have_any_names(self) -> None:
        data = load_iris()
        x, y = torch.tensor(data.data), torch.tensor(data.target) * 10 - 5
        model = CertifiedLogistic(1e-3, 1e-6).fit(x, y)
        assert float((model.predict(x) == y).double().mean()) > 0.9
        module = model.module()
        assert torch.equal(model.classes[module(x.float()).argmax(1)], model.predict(x))

    def test_of_two_classes_the_module_has_two_logits(self) -> None:
        model = made()
        logits = model.module()(model.x.float())
        torch.testing.assert_close(logits[:, 1] - logits[:, 0], model.scores(model.x)[:, 0].float())


class TestRemoval:
    @ACCOUNTINGS
    @pytest.mark.parametrize("classes", [2, 3])
    def test_it_is_training_anew_with_another_b(self, accounting: Any, classes: int) -> None:
        model = made(100.0, classes, accounting=accounting)
        model.remove([3])
        model.remove([14, 15])
        left = model.kept
        rest = model._gradient(model.weights, left)  # what is left of the gradient
        twin = made(100.0, classes)
        twin.kept = left.clone()
        twin._train()
        twin.b = model.b - rest
        for _ in range(30):
            twin.weights = twin.weights + twin._solve(left, -twin._gradient(twin.weights, left))
        torch.testing.assert_close(twin.weights, model.weights, rtol=1e-9, atol=1e-12)

    @ACCOUNTINGS
    def test_what_is_spent_bounds_what_is_left(self, accounting: Any) -> None:
        model = made(10.0, accounting=accounting)
        for at in range(0, 100, 5):
            removal = model.remove(range(at, at + 5))
            assert not removal.retrained
            assert model.residual() <= removal.spent * (1 + 1e-9) + 1e-12
            assert removal.spent == model.spent <= model.budget
            assert (accounting == "measured") == (not math.isnan(removal.residual))

    def test_bounds_add_up_only_where_nothing_mends(self) -> None:
        added, corrected, measured = (
            made(10.0, accounting=a) for a in ("added", "corrected", "measured")
        )
        told = []
        for at in range(20):
            told.append([m.remove([at]).spent for m in (added, corrected, measured)])
        assert all(a[0] < b[0] for a, b in pairwise(told))
        assert told[-1][0] > 5 * told[-1][1] > 5 * told[-1][2]

    def test_beyond_the_budget_it_is_trained_anew(self) -> None:
        model = made(0.05, accounting="added")
        b, retrained = model.b.clone(), []
        for at in range(40):
            removal = model.remove([at])
            retrained.append(removal.retrained)
            assert removal.spent <= model.budget
            if removal.retrained:
                assert model.residual() < 1e-6
                assert not torch.equal(model.b, b), "a fresh b"
        assert 0 < sum(retrained) < 40
        assert model.trainings == 1 + sum(retrained)

    def test_epsilon_is_what_was_spent(self) -> None:
        model = made(accounting="added", epsilon=2.0, delta=1e-5)
        assert model.epsilon() < 1e-6
        removal = model.remove([0, 1, 2])
        assert model.epsilon() == epsilon_of(removal.spent / model.sigma, 1e-5) < 2.0
        assert model.budget == mu_of(2.0, 1e-5)

    def test_the_worst_case_bounds_a_single_removal(self) -> None:
        model = made(10.0, accounting="added")
        assert model.remove([5]).bound < model.worst_case()

    def test_its_b_is_secret(self) -> None:
        one, other = (CertifiedLogistic(0.01).fit(*rows()) for _ in range(2))
        assert not torch.equal(one.b, other.b)

    def test_nothing_given_changes(self) -> None:
        x, y = rows()
        before = x.clone(), y.clone()
        CertifiedLogistic(0.01).fit(x, y).remove([1])
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])

    def test_again_is_no_error_and_a_class_stays(self) -> None:
        model = made()
        model.remove([1, 2])
        weights = model.weights.clone()
        model.remove([2])
        torch.testing.assert_close(model.weights, weights, atol=1e-6, rtol=1e-6)
        with pytest.raises(SplitError, match="class has no sample"):
            model.remove(torch.nonzero(model.y == 1)[:, 0])


class TestLedger:
    def test_requests_outlive_the_process(self, tmp_path: Path) -> None:
        model = made(ledger=Ledger(tmp_path))
        model.remove([3, 5], who="ticket 1")
        (request,) = Ledger(tmp_path).requests.values()
        assert request.state == "done"
        assert request.evidence["epsilon"] == model.epsilon()
        again = made(ledger=Ledger(tmp_path))
        assert not again.kept[[3, 5]].any()
        assert int(again.kept.sum()) == len(again.x) - 2
        assert again.residual() < 1e-6
        with pytest.raises(StorageError):
            made(ledger=Ledger(tmp_path), classes=3)

    def test_a_failure_stays_due(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = made(ledger=Ledger(tmp_path))
        monkeypatch.setattr(model, "_solve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.remove([3])
        assert [r.state for r in Ledger(tmp_path).pending()] == ["failed"]
        assert not made(ledger=Ledger(tmp_path)).kept[3]
        assert Ledger(tmp_path).pending() == []


@pytest.mark.parametrize(
    "change",
    [
        {"regularisation": 0.0},
        {"sigma": -1.0},
        {"sigma": math.inf},
        {"accounting": "none"},
        {"delta": 0.0},
        {"epsilon": -1.0},
    ],
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CertifiedLogistic(**({"regularisation": 0.1} | change))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.ones(4), torch.tensor([0, 1, 0, 1])),
        (torch.ones(4, 2), torch.tensor([0, 1, 0])),
        (torch.ones(4, 2), torch.tensor([0.0, 1.0, 0.0, 1.0])),
        (torch.ones(4, 2), torch.tensor([1, 1, 1, 1])),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1])),
        (torch.ones(2, 10_001), torch.tensor([0, 1])),
        ([[1.0], [2.0]], torch.tensor([0, 1])),
    ],
)
def test_bad_data(x: Any, y: Any) -> None:
    with pytest.raises(DataError):
        CertifiedLogistic(0.1).fit(x, y)


def test_before_fit() -> None:
    with pytest.raises(ConfigError, match="fit"):
        CertifiedLogistic(0.1).remove([1])
