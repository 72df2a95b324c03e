"""The flow that `forget` follows: how far, since when samples push, and where it ends, against
closed forms and independent minimisers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from laws import relative
from problems import problem_of, regression, ridge, softmax_minimiser
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fisher_forget import (
    ForgetOptions,
    Problem,
    TrainingTime,
    estimate_curvature,
    forget,
    newton_step,
)
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.data.split import resolve_split
from fisher_forget.params import flatten
from fisher_forget.unlearn.newton.guard import Descent, HeldOut
from fisher_forget.unlearn.newton.horizon import DEPTH, OF_TRAINING, STEPS, Horizon, Owed

N, GONE = 60, np.arange(10)
LEFT = np.arange(10, N)


def linear_regression(wd: float, shift: float) -> tuple[nn.Module, TensorDataset]:
    """Ridge regression at its minimum, or beside it."""
    x, y = regression()
    model = ridge(x, y, wd)
    with torch.no_grad():
        for p in model.parameters():
            p += shift * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double()
    return model, TensorDataset(x, y)


def quadratic(data: TensorDataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """A and b of the mean loss (1/2) tr(W A W^T) - tr(b W) of some samples, bias as last column."""
    x, y = (t[torch.from_numpy(rows)] for t in data.tensors)
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    return x.T @ x / len(x), x.T @ y / len(x)


def matrix(weights: Any) -> Tensor:
    """Weights and bias of a linear model as one: [inputs + 1, outputs]."""
    return torch.cat([weights["weight"], weights["bias"][:, None]], 1).detach().T


class TestQuadratic:
    @pytest.mark.parametrize("shift", [0.0, 0.1])
    @pytest.mark.parametrize("drift", ["auto", False])
    @pytest.mark.parametrize("wd", [0.1, 0.01])
    def test_eight_backward_euler_steps(self, wd: float, drift: Any, shift: float) -> None:
        """w_8 = w* + (I + (T/8) (A_r + wd))^-8 (w_0 - w*), w* where the force vanishes."""
        model, data = linear_regression(wd, shift)
        options = ForgetOptions(
            likelihood="gaussian", weight_decay=wd, drift=drift, structure="dense"
        )
        step = newton_step(Problem.of(model, data, GONE, options), options)
        (a_r, b_r), (a_d, b_d) = quadratic(data, LEFT), quadratic(data, np.arange(N))
        start = matrix(oracle.start(model))
        h = a_r + wd * torch.eye(6).double()
        force = h @ start - b_r
        if drift == "auto":  # what is owed to the forget set alone
            force = (a_r - a_d) @ start - b_r + b_d
        end = start - torch.linalg.solve(h, force)
        sub_step = torch.linalg.inv(torch.eye(6).double() + step.horizon / STEPS * h)
        expected = end + torch.linalg.matrix_power(sub_step, STEPS) @ (start - end)
        assert relative(matrix(step.params), expected) < 1e-9
        assert len(step.accepted) == STEPS

    @pytest.mark.parametrize("wd", [0.1, 0.01, 0.001])
    def test_the_default_call_retrains_at_a_minimum(self, wd: float) -> None:
        """The decay is read off, and of the way (1 + 10/8)^-8 = 0.0015 is left at most."""
        model, data = linear_regression(wd, 0.0)
        step = newton_step(Problem.of(model, data, GONE, likelihood="gaussian"))
        assert step.acts_like == pytest.approx(wd)
        assert step.horizon == pytest.approx(10 / wd)
        retrained = matrix(dict(ridge(*(t[10:] for t in data.tensors), wd).named_parameters()))
        before = float((matrix(oracle.start(model)) - retrained).norm())
        assert float((matrix(step.params) - retrained).norm()) <= 2.25**-8 * before

    def test_what_the_flow_descends(self) -> None:
        """phi = L_r + (wd/2)|w|^2 - drift^T w, whoever of the retained is held out."""
        wd = 0.01
        model, data = linear_regression(wd, 0.3)
        problem = Problem.of(model, data, GONE, likelihood="gaussian", weight_decay=wd)
        force = Owed(problem, Horizon.of(problem)).all()
        held_out = HeldOut(problem.objective, problem.split, LEFT)
        own = problem.objective.gradient(held_out.batches(), problem.objective.start).mean()
        start = held_out.look(problem.objective.start)
        descent = Descent(held_out, start, own, force, wd, all=True)
        there = {name: 1.5 * w for name, w in problem.objective.start.items()}
        (a_r, b_r), (a_d, b_d) = quadratic(data, LEFT), quadratic(data, np.arange(N))
        w0, w1 = matrix(problem.objective.start), matrix(there)
        drift = (a_d @ w0 - b_d) + wd * w0

        def phi(w: Tensor) -> float:
            loss = (w * (a_r @ w)).sum() / 2 - (w * b_r).sum()
            return float(loss + wd / 2 * w.square().sum() - (drift * w).sum())

        assert descent.change(held_out.look(there)) == pytest.approx(phi(w1) - phi(w0))


@pytest.mark.parametrize("wd", [0.01, 0.003])
@pytest.mark.parametrize("gone", ["class", "half"])
def test_logistic_regression_is_retrained(gone: str, wd: float) -> None:
    """From scikit-learn's minimum, with nothing passed, to SciPy's of the retained samples."""
    data = blobs_data(300)
    x, y = torch.cat([data.tensors[0], torch.ones(300, 1)], 1).double(), data.tensors[1]
    trained = LogisticRegression(
        C=1 / (300 * wd), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(x.numpy(), y.numpy())
    model = nn.Linear(5, 3, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(trained.coef_))
    forgotten = y == 0 if gone == "class" else torch.arange(300) < 150
    x_r, y_r = x[~forgotten], y[~forgotten]
    truth = softmax_minimiser(nn.Linear(5, 3, bias=False).double(), x_r, y_r, wd).weight.detach()

    def objective(w: Tensor) -> float:
        return float(F.cross_entropy(x_r @ w.T, y_r) + wd / 2 * w.square().sum())

    result = forget(model, TensorDataset(x, y), forgotten, noise=None, progress=False)
    before, after = model.weight.detach(), result.model.weight.detach()
    assert result.newton.acts_like == pytest.approx(wd, rel=1e-3)
    assert float((after - truth).norm()) < 5e-3 * float((before - truth).norm())
    assert objective(truth) <= objective(after) < objective(before)
    assert objective(after) - objective(truth) < 1e-5 * (objective(before) - objective(truth))


class TestHorizon:
    def gradient(self, model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
        """grad L_D and w, flat."""
        loss = F.cross_entropy(model(data.tensors[0]), data.tensors[1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten() for g in grads]), flatten(oracle.start(model))

    def test_by_hand(self) -> None:
        """min(1 / (4 rho^2 wd_hat), 10 / wd_hat), rho^2 the share of |grad L_D|^2 beside w."""
        data = blobs_data()
        model = softmax_minimiser(
            nn.Linear(4, 3).double(), data.tensors[0].double(), Y := data.tensors[1], 0.02
        )
        data = TensorDataset(data.tensors[0].double(), Y)
        for shift in (0.0, 0.003, 0.3):
            with torch.no_grad():
                model.weight[0, 0] += shift
            g, w = self.gradient(model, data)
            wd = -float(g @ w / (w @ w))
            rho2 = 1 - float((g @ w) ** 2 / ((w @ w) * (g @ g)))
            found = Horizon.of(Problem.of(model, data, [0]))
            beside = 1 / (DEPTH * max(rho2, 1e-12) * wd)  # 0 but for rounding at the minimum
            assert found.time == pytest.approx(min(beside, 10 / wd), rel=1e-4)
            assert (found.time < 9.9 / wd) == (shift > 0.1)
            assert found.times == (found.time / STEPS,) * STEPS

    def test_weights_that_were_hardly_trained_do_not_count(self, trained: nn.Module) -> None:
        """A large layer drawn at random, which the outputs hardly use, changes no time."""
        data = blobs_data()

        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.table = copy.deepcopy(trained), nn.Linear(4, 3000, bias=False)
                nn.init.normal_(self.table.weight)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x) + 1e-7 * self.table(x)[:, :3]

        plain = Horizon.of(Problem.of(trained, data, GONE))
        wide = Horizon.of(Problem.of(Wide().eval(), data, GONE))
        assert plain.time / 2 < wide.time < 2 * plain.time

    @pytest.mark.parametrize("structure", ["ekfac", "diagonal"])
    @pytest.mark.parametrize("units", [0.25, 4.0])
    def test_units_do_not_matter(self, units: float, structure: Any) -> None:
        """Inputs in other units: weights scale by 1/c, times by 1/c^2, predictions not at all."""
        data = blobs_data()
        x, y = data.tensors[0].double(), data.tensors[1]
        model = seeded(lambda: nn.Linear(4, 3, bias=False).double(), 3)
        softmax_minimiser(model, x, y, 0.05)
        with torch.no_grad():
            model.weight += 0.05 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        scaled = nn.Linear(4, 3, bias=False).double().eval()
        with torch.no_grad():
            scaled.weight.copy_(model.weight / units)
        options = ForgetOptions(structure=structure)
        one = newton_step(Problem.of(model, TensorDataset(x, y), GONE, options), options)
        other = newton_step(Problem.of(scaled, TensorDataset(x * units, y), GONE, options), options)
        assert other.acts_like == pytest.approx(units**2 * one.acts_like)
        assert other.horizon == pytest.approx(one.horizon / units**2)
        assert one.norm > 1e-3
        assert relative(units * other.params["weight"], one.params["weight"]) < 1e-6

    def test_of_a_known_training(self, trained: nn.Module) -> None:
        """Half its time is an e-folding; the end stays that of the decay."""
        for time in (3.0, 1e9):
            options = ForgetOptions(training=TrainingTime(time=time))
            problem = Problem.of(trained, blobs_data(), GONE, options)
            longest = 10 / problem.found.typical
            assert Horizon.of(problem).time == pytest.approx(
                min(STEPS * OF_TRAINING * time, longest)
            )

    def test_without_any_decay(self) -> None:
        """Weights that shrink by themselves hold to nothing: the loss's own time is an end."""
        data, model = blobs_data(), seeded(small_net)
        with torch.no_grad():  # sure of what is wrong
            for p in model.parameters():
                p *= 10
        g, w = self.gradient(model, data)
        assert float(g @ w) > 0
        step = newton_step(Problem.of(model, data, GONE), budget=math.inf)
        loss = float(F.cross_entropy(model(data.tensors[0]), data.tensors[1]).detach())
        assert step.acts_like == 0
        assert step.horizon == pytest.approx(STEPS * loss / float(g @ g) / 2, rel=1e-4)

    def test_a_given_damping_is_that_of_every_sub_step(self, trained: nn.Module) -> None:
        step = newton_step(Problem.of(trained, blobs_data(), GONE), damping=0.5)
        assert [s.damping for s in step.path] == [0.5] * STEPS


class TestForces:
    def each(self, model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
        """Loss and gradient of every sample."""
        losses, grads = [], []
        for x, y in zip(*data.tensors, strict=True):
            loss = F.cross_entropy(model(x), y)
            losses.append(float(loss.detach()))
            pulled = torch.autograd.grad(loss, list(model.parameters()))
            grads.append(torch.cat([g.flatten() for g in pulled]))
        return torch.tensor(losses), torch.stack(grads)

    def test_of_every_sub_step(self, trained: nn.Module) -> None:
        """A sample with the loss l begins 1 + ln(L_0 / l) e-foldings ago, to a quarter of a
        sub-step: (1/n_r) sum over n of part_n (grad L_D - grad l_n)."""
        data, gone = blobs_data(), np.arange(0, 60, 5)
        problem = Problem.of(trained, data, gone)
        losses, grads = self.each(trained, data)
        horizon = Horizon(e_fold=12.0, time=60.0)
        forces = list(Owed(problem, horizon).steps())
        masses = torch.bincount(data.tensors[1]) / 60
        guess = -(masses * masses.log()).sum()
        ago = 12.0 * (1 + (guess / losses[gone]).log().clamp(min=0))
        since = (ago / (60 / STEPS)).clamp(1, STEPS)
        assert len({*since.tolist()}) > 4
        assert 1 < float(since.min()) < float(since.max()) == STEPS
        since = (since * 4).round() / 4
        for k, force in enumerate(forces):
            part = (since - (STEPS - 1 - k)).clamp(0, 1)
            truth = part @ (grads.mean(0) - grads[gone]) / (60 - len(gone))
            torch.testing.assert_close(flatten(force), truth, rtol=1e-4, atol=1e-7)
        kept = np.setdiff1d(np.arange(60), gone)
        last = grads[kept].mean(0) - grads.mean(0)
        for force in (forces[-1], Owed(problem, horizon).all()):
            torch.testing.assert_close(flatten(force), last, rtol=1e-4, atol=1e-7)

    def test_nobody_is_owed_nothing(self, net: nn.Module) -> None:
        """And a call that forgets nobody moves nothing, far from a minimum, by any solver."""
        data = blobs_data()
        for options in ({}, {"solver": "direct"}, {"steps": 2}, {"damping": 0.1}):
            given = ForgetOptions(**options)
            split = resolve_split(data, [], allow_empty=True)
            problem = problem_of(net, split, estimate_curvature(net, split), weight_decay="auto")
            step = newton_step(problem, given)
            assert step.norm == 0
            assert not any(flatten(f).any() for f in Owed(problem, Horizon(10.0, 60.0)).steps())

    def test_all_samples_of_a_regression_push_from_the_start(self) -> None:
        model, data = linear_regression(0.1, 0.1)
        problem = Problem.of(model, data, GONE, likelihood="gaussian")
        first, *others = Owed(problem, Horizon(e_fold=1.0, time=8.0)).steps()
        for force in others:
            torch.testing.assert_close(force, first)


def test_a_flow_that_ends_above_its_start_is_followed_for_half_the_time() -> None:
    """A curvature that is far too small makes every sub-step too long: whole ones diverge, shorter
    ones lead down."""
    wd = 0.1
    model, data = linear_regression(wd, 0.0)
    problem = Problem.of(model, data, GONE, likelihood="gaussian", weight_decay=wd)
    tiny = {name: torch.full_like(w, 0.05) for name, w in problem.objective.start.items()}
    problem = replace(problem, curvature=Diagonal(eigenvalues=tiny))
    step = newton_step(problem, solver="direct", budget=math.inf)
    (a, b), retrained = quadratic(data, LEFT), ridge(*(t[10:] for t in data.tensors), wd)

    def objective(w: Tensor) -> float:
        return float((w * (a @ w)).sum() / 2 - (w * b).sum() + wd / 2 * w.square().sum())

    truth = matrix(dict(retrained.named_parameters()))
    before, after = matrix(problem.objective.start), matrix(step.params)
    assert step.horizon < Horizon.of(problem).time / 1.9
    assert all(s.accepted for s in step.path)
    assert objective(truth) < objective(after) < objective(before)
    assert float((after - truth).norm()) < float((before - truth).norm())
