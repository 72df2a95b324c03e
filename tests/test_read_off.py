"""What a trained model says of its weight decay: scikit-learn, laws, and real trainings."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from small_models import prepared
from torch import Tensor, nn

from fisher_forget import TrainingTime
from fisher_forget.params import flatten
from fisher_forget.unlearn.weight_decay import ReadOff, contradiction, read_off


def read(model: nn.Module, x: Tensor, y: Tensor) -> ReadOff:
    loss = nn.functional.cross_entropy(model(x), y)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    at = {n: p.detach() for n, p in model.named_parameters()}
    return read_off(dict(zip(at, gradient, strict=True)), at, float(loss.detach()))


class TestReadOff:
    @pytest.mark.parametrize("wd", [2e-3, 0.05])
    def test_at_a_minimum_it_is_the_weight_decay(self, wd: float) -> None:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(300, 4, generator=draw, dtype=torch.float64)
        y = (x @ torch.randn(4, 3, generator=draw, dtype=torch.float64)).argmax(1)
        fit = LogisticRegression(C=1 / (wd * 300), tol=1e-12, fit_intercept=False, max_iter=10_000)
        fit.fit(x.numpy(), y.numpy())
        model = nn.Linear(4, 3, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(fit.coef_))
        found = read(model, x, y)
        assert found.value == pytest.approx(wd, rel=1e-6)
        assert found.time > 1e8
        assert not contradiction(wd, found)
        for wrong, word in ((0.0, "more"), (wd / 2, "2 times more"), (wd * 3, "3 times less")):
            assert word in contradiction(wrong, found)

    def test_of_all_decays_it_leaves_the_least_force(self) -> None:
        model, data = prepared("mlp")
        x, y = data.tensors
        found, at = read(model, x, y), oracle.start(model)
        loss = nn.functional.cross_entropy(model(x), y)
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, list(model.parameters()))])
        force = {wd: float((g + wd * flatten(at)).norm()) for wd in (0.0, found.value, 1.0)}
        best = float(loss.detach()) / found.time
        assert force[found.value] ** 2 == pytest.approx(best, rel=1e-6)
        steps = np.linspace(0, 1, 2001)
        least = min(steps, key=lambda wd: float((g + wd * flatten(at)).norm()))
        assert max(found.value, 0) == pytest.approx(least, abs=1e-3)

    def test_it_is_how_fast_the_weights_grow(self) -> None:
        """d ln|w| / dt = wd_hat - wd, by a small step of gradient flow."""
        model, data = prepared("residual")
        x, y = data.tensors
        found, at, wd, step = read(model, x, y), flatten(oracle.start(model)), 0.03, 1e-6
        loss = nn.functional.cross_entropy(model(x), y)
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, list(model.parameters()))])
        grown = math.log(float((at - step * (g + wd * at)).norm() / at.norm())) / step
        raw = float(-(g @ at) / (at @ at))  # of either sign
        assert grown == pytest.approx(raw - wd, rel=1e-3)
        assert found.value == pytest.approx(max(raw, 0))

    def test_nothing_can_be_read_off_weights_whose_length_nobody_sees(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=0), nn.Linear(8, 3)).double()
        x, y = torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 3, (50,))
        layers = read(model, x, y).layers
        assert abs(layers["0"]) < 1e-12
        assert abs(layers["2"]) > 1e-4

    def test_means(self) -> None:
        model, data = prepared("residual")
        found = read(model, *data.tensors)
        at = oracle.start(model)
        rates = {n: 0.1 * (1 + len(n)) for n in at}
        spread = flatten({n: torch.full_like(w, rates[n]) for n, w in at.items()})
        expected = (spread * flatten(at).square()).sum() / flatten(at).square().sum()
        assert found.mean_of(rates) == pytest.approx(float(expected))
        assert found.mean_of(0.3) == 0.3

    def test_weights_of_zero(self) -> None:
        model = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(model.weight)
        found = read(model, torch.randn(9, 3), torch.randint(0, 2, (9,)))
        assert found.value == 0
        assert math.isfinite(found.time)
        assert not contradiction(0.0, found)

    @pytest.mark.parametrize(
        ("name", "wd", "lr"),
        [("SGD", 0.0, 0.1), ("SGD", 5e-3, 0.1), ("Adam", 5e-3, 0.01), ("AdamW", 0.3, 0.01)],
    )
    @pytest.mark.parametrize("epochs", [3, 150])
    def test_after_a_training(self, name: str, wd: float, lr: float, epochs: int) -> None:
        """The true decay is never contradicted; others are where there was time to feel them: 0.3,
        which AdamW's own number is, and none at a minimum."""
        x, y = blobs()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3))
        more = {"momentum": 0.9} if name == "SGD" else {}
        kind = getattr(torch.optim, name)
        optimizer = kind(model.named_parameters(), lr=lr, weight_decay=wd, **more)
        steps = 8 * epochs
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(32):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cosine.step()
        found = read(model, x, y)
        known = TrainingTime.of(optimizer, steps=steps, scheduler=cosine)
        assert known.weight_decay is not None
        assert not contradiction(known.weight_decay, found, known.time)
        assert not contradiction(known.weight_decay, found)
        if epochs == 3:
            assert not contradiction(0.02, found)
            return
        assert "times less than the given 0.3" in contradiction(0.3, found)
        if wd == 5e-3:
            assert "more than the given 0" in contradiction(0.0, found)
        if known.time is not None and not wd:
            assert 0.3 < found.time / known.time < 3


def blobs() -> tuple[Tensor, Tensor]:
    """Three classes that overlap a little, 256 samples."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 3
    return torch.randn(3, 8, generator=draw)[y] + torch.randn(256, 8, generator=draw), y
