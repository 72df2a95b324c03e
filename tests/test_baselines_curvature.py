"""Curvature-based methods against dense float64 closed forms, written from their equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget import (
    Categorical,
    ConfigError,
    Gaussian,
    ModelError,
    NumericalError,
    SplitError,
    forget,
)
from fisher_forget.baselines import delta_grad
from fisher_forget.baselines.delta_grad import DeltaGrad, Plan, Trajectory, lbfgs_product, record
from fisher_forget.baselines.fisher import FisherForget
from fisher_forget.baselines.golatkar import GolatkarCode, GolatkarPaper
from fisher_forget.baselines.influence import Lissa, WoodFisher
from fisher_forget.baselines.meter import metered
from fisher_forget.baselines.ntk import Ntk, NtkFisher, stretch
from fisher_forget.baselines.protocol import Unlearner
from fisher_forget.baselines.rewind_to_delete import RewindToDelete
from fisher_forget.baselines.ssd import Ssd
from fisher_forget.baselines.variational import START, Variational
from fisher_forget.data.split import Split, resolve_split, some
from fisher_forget.experiments.training import TrainSettings
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.params import flatten, load, unflatten
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.options import ForgetOptions

N, GONE = 24, [1, 5, 6, 20]
KEPT = [n for n in range(N) if n not in GONE]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(0, 3, (N,), generator=GENERATOR)
VALUES = torch.randn(N, 3, dtype=torch.float64, generator=GENERATOR)
TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def net(seed: int = 1) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed).double()


def linear(seed: int = 2) -> nn.Module:
    return seeded(lambda: nn.Linear(4, 3), seed).double()


def split_of(y: Tensor = CLASSES, x: Tensor = X, gone: list[int] = GONE) -> Split:
    return resolve_split(DataLoader(TensorDataset(x, y), batch_size=7), gone, allow_empty=True)


def vector(model: nn.Module) -> Tensor:
    return flatten(oracle.start(model))


def gradient(model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """Of the mean loss per scored position [d]."""
    loss = likelihood.losses(model(x), y).sum() / likelihood.counts(y).sum()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def pull(model: nn.Module, y: Tensor, likelihood: Likelihood, x: Tensor = X) -> Tensor:
    """grad L_D - grad L_r."""
    return gradient(model, x, y, likelihood) - gradient(model, x[KEPT], y[KEPT], likelihood)


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return record(net(), split_of(), Plan(epochs=12, lr=0.2, batch_size=N, weight_decay=0.01))


CASES: list[Any] = [
    Ssd(alpha=1.0),
    Ssd(alpha=1.0, importance="batch", batch_size=3),
    Ntk(),
    NtkFisher(alpha=1e-5),
    WoodFisher(samples=9),
    Lissa(steps=20, repeats=2, scale=20.0, batch_size=6),
    Variational(epochs=2, batch_size=8),
    DeltaGrad(burn_in=3),
    RewindToDelete(steps=2),
    FisherForget(drift=True),
    GolatkarPaper(),
    GolatkarCode(),
]


def ready(method: Any, trajectory: Trajectory) -> tuple[Any, nn.Module]:
    """The method, and the model that it can work on."""
    if isinstance(method, DeltaGrad):
        return dataclasses.replace(method, trajectory=trajectory), load(trajectory.model, {}).eval()
    return method, net()


@pytest.mark.parametrize("method", CASES, ids=lambda m: m.name)
class TestProtocol:
    def test_another_model_and_nothing_touched(
        self,
        method: Any,
        trajectory: Trajectory,
        untouched: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        method, model = ready(method, trajectory)
        assert isinstance(method, Unlearner)
        with untouched(model):
            found = method.unlearn(model, split_of())
        assert not torch.equal(vector(found.model), vector(model))
        assert bool(torch.isfinite(vector(found.model)).all())
        assert not found.model.training
        assert found.seconds > 0
        assert found.passes > 0
        assert {p.data_ptr() for p in found.model.parameters()}.isdisjoint(
            p.data_ptr() for p in model.parameters()
        )
        assert all(p.grad is None for p in found.model.parameters())
        assert not found.model._forward_hooks

    def test_settings_give_the_same_bits_again(self, method: Any, trajectory: Trajectory) -> None:
        method, model = ready(method, trajectory)
        first, second = (method.unlearn(model, split_of()) for _ in range(2))
        assert torch.equal(vector(first.model), vector(second.model))
        assert first.passes == second.passes

    def test_layout_of_batches_does_not_matter(self, method: Any, trajectory: Trajectory) -> None:
        class Samples(Dataset[Any]):
            def __len__(self) -> int:
                return N

            def __getitem__(self, index: int) -> Any:
                return {"right": X[index, 2:], "left": X[index, :2], "labels": CLASSES[index]}

        class TwoInputs(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, left: Tensor, right: Tensor) -> Tensor:
                out: Tensor = self.inner(torch.cat([left, right], -1))
                return out

        method, model = ready(method, trajectory)
        expected = method.unlearn(model, split_of())
        wrapped = TwoInputs(model).eval()
        if isinstance(method, DeltaGrad):
            method = dataclasses.replace(
                method,
                trajectory=dataclasses.replace(
                    trajectory, model=TwoInputs(trajectory.model).eval()
                ),
            )
        found = method.unlearn(wrapped, resolve_split(DataLoader(Samples(), batch_size=5), GONE))
        torch.testing.assert_close(
            vector(found.model), vector(expected.model), rtol=1e-6, atol=1e-8
        )
        # rules are verified, and the loss is, on samples of the first batch, which count
        assert found.passes == pytest.approx(expected.passes, rel=0.2)

    def test_frozen_parameters_stay(self, method: Any, trajectory: Trajectory) -> None:
        model = net()
        model[0].requires_grad_(False)
        if isinstance(method, DeltaGrad):
            trajectory = record(model, split_of(), trajectory.plan)
            method, model = ready(method, trajectory)
        found = method.unlearn(model, split_of())
        assert torch.equal(found.model[0].weight, model[0].weight)
        assert not torch.equal(found.model[2].weight, model[2].weight)

    def test_training_mode_is_refused(self, method: Any, trajectory: Trajectory) -> None:
        method, _ = ready(method, trajectory)
        with pytest.raises(ModelError, match="eval"):
            method.unlearn(
                nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train(), split_of()
            )


@pytest.mark.parametrize(
    "method", [Ssd(alpha=1.0), Ntk(), WoodFisher(), Lissa(steps=3)], ids=lambda m: m.name
)
def test_nothing_to_forget_moves_nothing(method: Any) -> None:
    assert torch.equal(vector(method.unlearn(net(), split_of(gone=[])).model), vector(net()))


def test_nothing_to_forget_replays_the_training(trajectory: Trajectory) -> None:
    model = load(trajectory.model, {}).eval()
    found = DeltaGrad(trajectory, burn_in=3).unlearn(model, split_of(gone=[]))
    torch.testing.assert_close(vector(found.model), vector(model), **TIGHT)


@pytest.mark.parametrize(
    "method",
    [
        Ssd(alpha=1.0),
        Ntk(),
        WoodFisher(),
        Lissa(steps=3),
        FisherForget(drift=True, structure="dense", noise=None),
    ],
    ids=lambda m: m.name,
)
def test_weights_outside_of_layers_are_weights_like_others(method: Any) -> None:
    class Bare(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(inner.weight.detach()), nn.Parameter(inner.bias.detach())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T + self.b

    found, expected = (
        method.unlearn(model, split_of()).model for model in (Bare(linear()).eval(), linear())
    )
    torch.testing.assert_close(vector(found), vector(expected), **TIGHT)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        (Ssd, "alpha", -1.0),
        (Ssd, "lam", float("nan")),
        (Ssd, "importance", "mean"),
        (Ssd, "batch_size", 0),
        (Ntk, "weight_decay", 0.0),
        (Ntk, "linearise", "initial"),
        (Ntk, "form", "dense"),
        (NtkFisher, "tau", 0.0),
        (NtkFisher, "weight_decay", -1.0),
        (WoodFisher, "damping", 0.0),
        (WoodFisher, "samples", 0),
        (WoodFisher, "recursion", "none"),
        (Lissa, "scale", 0.0),
        (Lissa, "steps", 0),
        (Lissa, "curvature", "fisher"),
        (Variational, "trade_off", 0.0),
        (Variational, "epochs", -1),
        (DeltaGrad, "period", 0),
        (DeltaGrad, "history", 0),
        (Plan, "lr", 0.0),
        (Plan, "epochs", 0),
    ],
)
def test_settings_out_of_range_are_named(method: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        method(**{field: value})


class TestSsd:
    @pytest.mark.parametrize("importance", ["sample", "batch"])
    def test_by_hand(self, importance: Any) -> None:
        model, categorical = net(), Categorical()
        one = [gradient(model, X[n : n + 1], CLASSES[n : n + 1], categorical) for n in range(N)]
        if importance == "sample":
            everyone = torch.stack(one).square().mean(0)
            forgotten = torch.stack([one[n] for n in GONE]).square().mean(0)
        else:  # one batch
            everyone, forgotten = (
                torch.stack(one).mean(0) ** 2,
                torch.stack([one[n] for n in GONE]).mean(0) ** 2,
            )
        expected = vector(model).clone()
        changed = kept_whole = 0
        for i in range(len(expected)):
            if forgotten[i] > 0.5 * everyone[i]:
                expected[i] *= min(0.8 * float(everyone[i]) / float(forgotten[i]), 1.0)
                changed += 1
                kept_whole += 0.8 * float(everyone[i]) > float(forgotten[i])
        assert 0 < kept_whole < changed < len(expected)  # every branch is taken
        found = Ssd(alpha=0.5, lam=0.8, importance=importance, batch_size=N).unlearn(
            model, split_of()
        )
        torch.testing.assert_close(vector(found.model), expected, **TIGHT)
        assert found.passes == pytest.approx((N + len(GONE)) / len(KEPT))

    def test_batches_change_the_published_importance_alone(self) -> None:
        def at(importance: Any, size: int) -> Tensor:
            return vector(
                Ssd(1.0, importance=importance, batch_size=size).unlearn(net(), split_of()).model
            )

        assert torch.equal(at("sample", 1), at("sample", N))
        assert not torch.equal(at("batch", 2), at("batch", N))
        torch.testing.assert_close(
            at("batch", 1), at("sample", 1), **TIGHT
        )  # batches of one are samples


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """Three positions a sample, some of them ignored."""
    y = torch.randint(0, 3, (N, 3), generator=torch.Generator().manual_seed(1))
    y[::3, 1:] = -100
    return net(), X[:, None, :] * torch.tensor([1.0, -0.5, 2.0])[:, None], y


LIKELIHOODS = [
    ("categorical", X, CLASSES),
    ("categorical", X, F.one_hot(CLASSES, 3).double() * 0.9 + 1 / 30),
    ("bernoulli", X, (VALUES > 0).double()),
    (Gaussian(sigma=0.7), X, VALUES),
    (Categorical(class_dim=-1), *tokens()[1:]),  # as many classes as positions
]


class TestWoodFisher:
    @pytest.mark.parametrize(("likelihood", "x", "y"), LIKELIHOODS)
    @pytest.mark.parametrize("memory", [1 << 30, 3 * 8 * len(KEPT) ** 2])
    def test_is_the_inverse_of_the_damped_empirical_fisher(
        self, likelihood: Any, x: Tensor, y: Tensor, memory: int
    ) -> None:
        model, kind = net(), resolve_likelihood(likelihood)
        fisher = oracle.ggn(model, x[KEPT], y[KEPT], kind, empirical=True)
        damped = fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64)
        step = 2.0 * torch.linalg.solve(damped, pull(model, y, kind, x))
        method = WoodFisher(alpha=2.0, damping=0.05, likelihood=likelihood, memory=memory)
        found = method.unlearn(model, split_of(y, x))
        torch.testing.assert_close(vector(found.model), vector(model) + step, rtol=1e-7, atol=1e-9)

    def test_is_what_the_recursion_over_samples_leads_to(self) -> None:
        model, kind = net(), Categorical()
        inverse = torch.eye(len(vector(model)), dtype=torch.float64) / 0.1
        for n in KEPT:
            g = gradient(model, X[n : n + 1], CLASSES[n : n + 1], kind)
            inverse -= torch.outer(inverse @ g, inverse @ g) / (len(KEPT) + g @ inverse @ g)
        found = WoodFisher(damping=0.1).unlearn(model, split_of())
        expected = vector(model) + inverse @ pull(model, CLASSES, kind)
        torch.testing.assert_close(vector(found.model), expected, rtol=1e-7, atol=1e-9)

    def test_blocks_cost_more_and_change_nothing(self) -> None:
        small = WoodFisher(memory=3 * 8 * len(KEPT) ** 2).unlearn(
            net(), split_of()
        )  # rows of 7 samples
        large = WoodFisher().unlearn(net(), split_of())
        torch.testing.assert_close(vector(small.model), vector(large.model), **TIGHT)
        assert large.passes == pytest.approx((N + len(KEPT)) / len(KEPT))
        assert small.passes > large.passes
        with pytest.raises(ConfigError, match="memory"):
            WoodFisher(memory=1000).unlearn(net(), split_of())

    def test_published_recursion_stays_in_the_span_of_two_vectors(self) -> None:
        model, kind = net(), Categorical()
        v = pull(model, CLASSES, kind)
        g = [gradient(model, X[n : n + 1], CLASSES[n : n + 1], kind) for n in KEPT]
        x, o = v.clone(), g[0].clone()
        for row in g[1:]:
            inner = float(o @ row)
            x, o = x - float(x @ row) / (len(g) + inner) * o, o * (1 - inner / (len(g) + inner))
        found = vector(WoodFisher(recursion="published").unlearn(model, split_of()).model) - vector(
            model
        )
        torch.testing.assert_close(found, x, **TIGHT)
        basis = torch.stack([v, g[0]], 1)
        left = found - basis @ torch.linalg.lstsq(basis, found[:, None]).solution[:, 0]
        assert float(left.norm()) < 1e-8 * float(found.norm())
        exact = vector(WoodFisher().unlearn(model, split_of()).model) - vector(model)
        assert float((exact - found).norm()) > 0.01 * float(exact.norm())

    def test_fewer_samples_are_drawn_from_the_seed(self) -> None:
        found = [
            vector(WoodFisher(samples=5, seed=s).unlearn(net(), split_of()).model) for s in (0, 1)
        ]
        assert not torch.equal(*found)


class TestLissa:
    @pytest.mark.parametrize(("likelihood", "x", "y"), LIKELIHOODS)
    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_converges_to_the_inverse(
        self, likelihood: Any, x: Tensor, y: Tensor, curvature: Any
    ) -> None:
        model, kind = net(), resolve_likelihood(likelihood)
        dense = (oracle.hessian if curvature == "hessian" else oracle.ggn)(
            model, x[KEPT], y[KEPT], kind
        )
        values = torch.linalg.eigvalsh(dense)
        damping = 0.5 * float(values[-1]) + max(0.0, -float(values[0]))
        method = Lissa(
            alpha=0.5,
            scale=float(values[-1]) + damping,
            damping=damping - 0.01,
            weight_decay=0.01,
            steps=60,
            repeats=1,
            batch_size=N,
            curvature=curvature,
            likelihood=likelihood,
        )
        damped = dense + damping * torch.eye(len(dense), dtype=torch.float64)
        step = 0.5 * torch.linalg.solve(damped, pull(model, y, kind, x))
        found = vector(method.unlearn(model, split_of(y, x)).model) - vector(model)
        torch.testing.assert_close(found, step, rtol=1e-5, atol=1e-9)

    def test_series_of_random_batches_are_unbiased(self) -> None:
        # Batches are independent of what they multiply, so the mean series is that of the mean
        # Hessian, term by term.
        model, kind, repeats = net(), Categorical(), 40
        dense = oracle.hessian(model, X[KEPT], CLASSES[KEPT], kind)
        v = pull(model, CLASSES, kind)
        h = v
        for _ in range(8):
            h = v + h - (dense @ h + 0.1 * h) / 3.0
        settings = {"scale": 3.0, "damping": 0.1, "weight_decay": 0.0, "steps": 8, "batch_size": 4}
        found = torch.stack(
            [
                vector(Lissa(repeats=1, seed=s, **settings).unlearn(model, split_of()).model)
                - vector(model)
                for s in range(repeats)
            ]
        )
        along = found @ v / v.norm()
        deviation = float(along.mean() - h @ v / v.norm() / 3.0)
        assert float(along.std()) > 0
        assert (
            abs(deviation) < 4 * float(along.std()) / repeats**0.5
        )  # false alarm about 1 in 10,000
        both = vector(Lissa(repeats=2, **settings).unlearn(model, split_of()).model) - vector(model)
        assert not torch.allclose(both, found[0])

    def test_divergence_is_an_error(self) -> None:
        with pytest.raises(NumericalError, match="scale"):
            Lissa(scale=0.01, steps=800, repeats=1).unlearn(net(), split_of())

    def test_passes(self) -> None:
        found = Lissa(steps=3, repeats=2, batch_size=5).unlearn(net(), split_of())
        assert found.passes == pytest.approx((N + 2 * 3 * 2 * 5) / len(KEPT))


def fit(jacobian: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """-(J^T J + rho I)^-1 J^T r: the primal form."""
    return -torch.linalg.solve(
        jacobian.T @ jacobian + ridge * torch.eye(jacobian.shape[1]).double(), jacobian.T @ residual
    )


def jacobian_of(model: nn.Module, x: Tensor) -> Tensor:
    """[N, outputs, d]."""
    like = oracle.start(model)

    def outputs(w: Tensor) -> Tensor:
        return torch.func.functional_call(model, unflatten(w, like), (x,)).flatten(1)

    found: Tensor = torch.func.jacrev(outputs)(flatten(like))
    return found


class TestNtk:
    @pytest.mark.parametrize(("likelihood", "x", "y"), LIKELIHOODS)
    @pytest.mark.parametrize("form", ["block", "difference"])
    def test_is_the_difference_of_two_primal_ridge_fits(
        self, likelihood: Any, x: Tensor, y: Tensor, form: Any
    ) -> None:
        model, kind = net(), resolve_likelihood(likelihood)
        outputs = model(x).detach()
        sigma = kind.sigma if isinstance(kind, Gaussian) else 1.0
        j = jacobian_of(model, x) / sigma
        r = kind.residual(outputs, y).flatten(1) * sigma
        if x.dim() == 3:  # positions without a target are no data
            scored = (y != -100).repeat_interleave(3, 1)
            j = j * scored[..., None]
        counts = kind.counts(y).double()
        ridges = {
            "block": 2 * [float(counts.sum())],
            "difference": [float(counts[KEPT].sum()), float(counts.sum())],
        }
        kept, every = (0.3 * count for count in ridges[form])
        expected = fit(j[KEPT].flatten(0, 1), r[KEPT].flatten(), kept) - fit(
            j.flatten(0, 1), r.flatten(), every
        )
        method = Ntk(weight_decay=0.3, form=form, likelihood=likelihood)
        found = vector(method.unlearn(model, split_of(y, x)).model) - vector(model)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    def test_retrains_a_linear_model_exactly(self) -> None:
        start, wd, sigma = linear(), 0.2, 0.5
        wide = torch.cat(
            [X, torch.ones(N, 1).double()], 1
        )  # one weight a feature and one bias, for each output
        origin = torch.cat([start.weight.detach(), start.bias.detach()[:, None]], 1).T

        def trained(chosen: list[int]) -> nn.Module:
            """Least sum of losses + (n wd / 2) |w - w_0|^2, n of all samples."""
            x, y = wide[chosen], VALUES[chosen]
            left = x.T @ x / sigma**2 + N * wd * torch.eye(5).double()
            w = torch.linalg.solve(left, x.T @ y / sigma**2 + N * wd * origin)
            return load(start, {"weight": w.T[:, :4], "bias": w.T[:, 4]}).eval()

        method = Ntk(
            weight_decay=wd, initial=start, linearise="initial", likelihood=Gaussian(sigma)
        )
        found = method.unlearn(trained(list(range(N))), split_of(VALUES))
        torch.testing.assert_close(vector(found.model), vector(trained(KEPT)), **TIGHT)

    def test_stretch(self) -> None:
        step, missing = {"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([3.0, 4.0])}
        assert stretch(step, missing) == pytest.approx(7.0)  # cos = 0.6, (1 + 2 * 0.6 * 5) / 1
        assert stretch(step, {"a": torch.tensor([-3.0, 4.0])}) == pytest.approx(7.0)
        assert stretch({"a": torch.tensor([2.0, 0.0])}, missing) == pytest.approx(4.0)
        assert stretch({"a": torch.zeros(2)}, missing) == 1.0

    def test_initial_weights_lengthen_the_step(self) -> None:
        model, start = net(), net(5)
        j, r = (
            jacobian_of(model, X).flatten(0, 1),
            Categorical().residual(model(X).detach(), CLASSES).flatten(),
        )
        rows = [3 * n + k for n in KEPT for k in range(3)]
        retained = fit(j[rows], r[rows], N * 0.1)
        step = retained - fit(j, r, N * 0.1)
        missing = vector(model) - vector(start) - retained
        cosine = float(step @ missing) / float(step.norm() * missing.norm())
        expected = step * (1 + 2 * abs(cosine) * float(missing.norm() / step.norm()))
        found = vector(Ntk(initial=start).unlearn(model, split_of()).model) - vector(model)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        with pytest.raises(ModelError, match="initial"):
            Ntk(initial=linear()).unlearn(model, split_of())

    def test_blocks_cost_more_and_change_nothing(self) -> None:
        small, large = Ntk(memory=3 * 8 * (3 * N) ** 2), Ntk()  # 4 samples at a time, or all
        wide = seeded(
            lambda: nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 3))
        ).double()
        found, expected = small.unlearn(wide, split_of()), large.unlearn(wide, split_of())
        torch.testing.assert_close(vector(found.model), vector(expected.model), **TIGHT)
        assert found.passes > expected.passes

    @pytest.mark.parametrize(
        "options", [{"samples": 7}, {"memory": 3 * 8 * (3 * (7 + len(GONE))) ** 2}]
    )
    def test_some_samples_stand_for_all(self, options: dict[str, int]) -> None:
        """Weighted ridge fits; where all fit, all are taken."""
        model, wd = net(), 0.3
        j, r = jacobian_of(model, X), Categorical().residual(model(X).detach(), CLASSES)
        few = some(np.array(KEPT), 7, 3)
        stand = (len(KEPT) / 7) ** 0.5
        jr, rr = stand * j[few].flatten(0, 1), stand * r[few].flatten()
        jf, rf = j[GONE].flatten(0, 1), r[GONE].flatten()
        expected = fit(jr, rr, wd * N) - fit(torch.cat([jr, jf]), torch.cat([rr, rf]), wd * N)
        found = vector(
            Ntk(weight_decay=wd, seed=3, **options).unlearn(model, split_of()).model
        ) - vector(model)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    def test_a_forget_set_that_is_too_large(self) -> None:
        with pytest.raises(ConfigError, match=r"15 rows.*memory"):
            Ntk(memory=3 * 8 * (3 * (len(GONE) + 1)) ** 2 - 1).unlearn(net(), split_of())

    def test_fisher_noise(self) -> None:
        moved = Ntk().unlearn(net(), split_of()).model
        fisher = oracle.ggn(moved, X[KEPT], CLASSES[KEPT], Categorical()).diag()
        generator = torch.Generator().manual_seed(4)
        xi = torch.cat(
            [
                torch.randn(p.shape, generator=generator, dtype=p.dtype).reshape(-1)
                for p in moved.parameters()
            ]
        )
        found = NtkFisher(alpha=1e-4, tau=0.01, seed=4).unlearn(net(), split_of())
        expected = vector(moved) + (1e-4 / (fisher + 0.01)).sqrt() * xi
        torch.testing.assert_close(vector(found.model), expected, rtol=1e-6, atol=1e-9)


def replayed(start: nn.Module, trajectory: Trajectory, gone: list[int]) -> Tensor:
    """Training without the forgotten samples, in batches as recorded: autograd and nothing else."""
    plan, w, like = trajectory.plan, vector(start).clone(), oracle.start(start)
    for rows in trajectory.batches:
        kept = [n for n in rows.tolist() if n not in gone]
        if not kept:
            continue
        leaf = w.clone().requires_grad_()
        outputs = torch.func.functional_call(start, unflatten(leaf, like), (X[kept],))
        (g,) = torch.autograd.grad(F.cross_entropy(outputs, CLASSES[kept]), leaf)
        w = w - plan.lr * (g + plan.weight_decay * w)
    return w


class TestDeltaGrad:
    PLAN = Plan(epochs=30, lr=0.3, batch_size=9, weight_decay=0.02, seed=3)

    def test_record_is_plain_descent(self) -> None:
        found = record(net(), split_of(), self.PLAN)
        torch.testing.assert_close(vector(found.model), replayed(net(), found, []), **TIGHT)
        epoch = np.concatenate(found.batches[:3])
        assert sorted(epoch.tolist()) == list(range(N))
        assert found.batches[0].tolist() != list(range(8))
        assert torch.equal(found.weights[0], vector(net()))

    @pytest.mark.parametrize(
        "settings", [{"period": 1, "burn_in": 0}, {"period": 7, "burn_in": 1000}]
    )
    @pytest.mark.parametrize("size", [1, 9, N])
    def test_full_gradients_are_retraining(self, settings: Any, size: int) -> None:
        trajectory = record(
            net(),
            split_of(),
            dataclasses.replace(self.PLAN, epochs=30 if size == N else 4, batch_size=size),
        )
        found = DeltaGrad(trajectory, **settings).unlearn(trajectory.model, split_of())
        expected = replayed(net(), trajectory, GONE)
        torch.testing.assert_close(vector(found.model), expected, **TIGHT)
        assert float((expected - vector(trajectory.model)).norm()) > 1e-3

    def test_corrected_gradients_come_close_to_retraining_and_cost_less(self) -> None:
        trajectory = record(
            linear(), split_of(), Plan(epochs=100, lr=0.5, batch_size=N, weight_decay=0.02)
        )
        found = DeltaGrad(trajectory, burn_in=10).unlearn(trajectory.model, split_of())
        expected = replayed(linear(), trajectory, GONE)
        error = float((vector(found.model) - expected).norm())
        assert error < 0.05 * float((vector(trajectory.model) - expected).norm())
        full = 10 + 90 // 5
        cost = full * N + (100 - full) * len(GONE)
        assert found.passes == pytest.approx(cost / len(KEPT))

    @pytest.mark.parametrize(("factor", "full"), [(1.01, True), (0.99, False)])
    def test_a_curvature_that_descent_could_not_follow_is_not_used(
        self, factor: float, full: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trajectory = record(net(), split_of(), self.PLAN)
        monkeypatch.setattr(delta_grad, "lbfgs_product", lambda _, v: factor / self.PLAN.lr * v)
        method = DeltaGrad(trajectory, burn_in=3, tolerance=None)
        found = method.unlearn(trajectory.model, split_of())
        every = DeltaGrad(trajectory, period=1).unlearn(trajectory.model, split_of())
        assert torch.equal(vector(found.model), vector(every.model)) == full
        assert (found.passes == every.passes) == full

    def test_steps_before_the_first_forgotten_sample_are_known(self) -> None:
        trajectory = record(
            net(), split_of(), dataclasses.replace(self.PLAN, batch_size=1, epochs=1)
        )
        last = trajectory.batches[-1].tolist()
        found = DeltaGrad(trajectory, burn_in=0, period=100).unlearn(
            trajectory.model, split_of(gone=last)
        )
        torch.testing.assert_close(vector(found.model), trajectory.weights[-1], **TIGHT)
        assert found.passes == pytest.approx(1 / (N - 1))  # the first step alone is taken in full

    def test_product_is_that_of_sequential_updates(self) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        hessian = root @ root.T + torch.eye(6).double()
        pairs = []
        for _ in range(3):
            s = torch.randn(6, generator=generator, dtype=torch.float64)
            pairs.append((s, hessian @ s))
        s, y = pairs[-1]
        b = (y @ s) / (s @ s) * torch.eye(6).double()
        for s, y in pairs:
            b = b - torch.outer(b @ s, b @ s) / (s @ b @ s) + torch.outer(y, y) / (y @ s)
        for v in torch.eye(6).double():
            torch.testing.assert_close(lbfgs_product(pairs, v), b @ v, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            lbfgs_product(pairs, s), y, rtol=1e-8, atol=1e-8
        )  # the last pair is met
        assert torch.equal(lbfgs_product([], s), torch.zeros(6).double())

    def test_without_a_trajectory_it_trains_and_records_a_model_of_its_own(self) -> None:
        momentum = TrainSettings(epochs=30, lr=0.03, momentum=0.9, batch_size=4, weight_decay=0.02)
        settings = {
            "initial": net(),
            "training": momentum,
            "seed": self.PLAN.seed,
            "batch_size": self.PLAN.batch_size,
        }
        ready, model = DeltaGrad(burn_in=3, **settings).prepare(net(7), split_of())
        # the rate that momentum adds up to, and at least this many samples a step
        own = record(net(), split_of(), dataclasses.replace(self.PLAN, lr=0.03 / (1 - 0.9)))
        assert torch.equal(vector(model), vector(own.model))
        assert ready.prepare(model, split_of()) == (ready, model)  # once is enough
        expected = DeltaGrad(own, burn_in=3).unlearn(own.model, split_of())
        for found in (
            ready.unlearn(model, split_of()),
            DeltaGrad(burn_in=3, **settings).unlearn(net(7), split_of()),
        ):
            assert torch.equal(vector(found.model), vector(expected.model))
            assert found.passes == expected.passes  # the recording is not counted

    def test_refusals(self, trajectory: Trajectory) -> None:
        method = DeltaGrad(trajectory)
        with pytest.raises(ConfigError, match="no trajectory"):
            DeltaGrad().unlearn(net(), split_of())
        with pytest.raises(ModelError, match="trajectory"):
            method.unlearn(net(), split_of())
        with pytest.raises(SplitError, match="trajectory"):
            method.unlearn(trajectory.model, split_of().subset(np.array(KEPT[1:])))
        with pytest.raises(ConfigError, match="memory"):
            record(net(), split_of(), Plan(epochs=10, memory=2 * 10 * 43 * 8 - 1))
        record(net(), split_of(), Plan(epochs=10, memory=2 * 10 * 43 * 8))
        with pytest.raises(NumericalError):
            record(linear(), split_of(VALUES), Plan(epochs=600, lr=50.0, likelihood="gaussian"))


class TestVariational:
    def test_variance_of_a_quadratic_loss(self) -> None:
        # 60 weights a filter, inputs of unequal size in two outputs of unequal precision
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(N, 60, generator=generator, dtype=torch.float64)
        y = torch.randn(N, 2, generator=generator, dtype=torch.float64)
        model = seeded(lambda: nn.Linear(60, 2), 0).double()
        split, sigma, lam = split_of(y, x), 0.5, 1e-4
        trace = float(x[KEPT].square().sum(1).mean()) / sigma**2
        method = Variational(
            trade_off=lam, epochs=400, lr=0.05, batch_size=N, likelihood=Gaussian(sigma)
        )
        objective = Objective(model, Gaussian(sigma))
        found = method.log_variances(objective, split, torch.Generator().manual_seed(0))
        assert list(found) == ["weight"]
        assert found["weight"].shape == (2, 1)
        # relative deviation of a mean of 60 squares is 0.18; Adam averages over tens of steps
        for value in found["weight"].exp().flatten().tolist():
            assert value == pytest.approx(2 * lam * 60 / trace, rel=0.2)

    def test_start_and_draw(self) -> None:
        model = net()
        found = Variational(epochs=0, seed=5).unlearn(model, split_of()).model
        generator = torch.Generator().manual_seed(5)
        for k in (0, 2):
            w = model[k].weight.detach()
            deviation = (START * w.var(1, keepdim=True) + 1e-8).sqrt()
            noise = torch.randn(w.shape, generator=generator, dtype=w.dtype)
            torch.testing.assert_close(found[k].weight.detach(), w + deviation * noise, **TIGHT)
            assert torch.equal(found[k].bias, model[k].bias)

    def test_variance_never_exceeds_its_limit(self) -> None:
        objective = Objective(net(), Categorical())
        method = Variational(trade_off=10.0, epochs=40, lr=1.0)
        found = method.log_variances(objective, split_of(), torch.Generator().manual_seed(0))
        assert all(bool((x == -3.0).all()) for x in found.values())

    def test_refusal_and_cost(self) -> None:
        class Shift(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(4).double())

            def forward(self, x: Tensor) -> Tensor:
                return x + self.bias

        with pytest.raises(ModelError, match="two dimensions"):
            Variational().unlearn(Shift().eval(), split_of())
        assert Variational(epochs=3).unlearn(net(), split_of()).passes == 6.0


class TestFisher:
    def test_it_is_forget(self) -> None:
        loader = DataLoader(TensorDataset(X, CLASSES), batch_size=7)
        options = {
            "drift": True,
            "noise": 1e-3,
            "weight_decay": 0.01,
            "structure": "diagonal",
            "seed": 2,
        }
        found = FisherForget(**options).unlearn(net(), split_of()).model
        public = torch.Generator().manual_seed(2)
        expected = forget(net(), loader, GONE, progress=False, generator=public, **options).model
        assert torch.equal(vector(found), vector(expected))

    @pytest.mark.parametrize(
        "method",
        [
            GolatkarPaper(scale=0.01, tau=1e-4, seed=3),
            GolatkarCode(alpha=1e-4, forgotten_class=1, seed=3),
        ],
        ids=lambda m: m.name,
    )
    def test_published_forms_are_their_draws_at_the_defaults(self, method: Any) -> None:
        found = method.unlearn(net(), split_of()).model
        assert torch.equal(vector(found), vector(method.draws(net(), split_of()).model()))

    @pytest.mark.filterwarnings("ignore:Retained samples suffered")
    def test_buffers_follow(self) -> None:
        model = seeded(
            lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        ).double()
        options = ForgetOptions(drift=True, noise=None, batch_norm="refresh")
        expected = forget(model, TensorDataset(X, CLASSES), GONE, options, progress=False).model
        method = FisherForget(drift=True, noise=None, batch_norm="refresh")
        found = method.unlearn(model, split_of()).model
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(found[1].running_mean, model[1].running_mean)

    def test_retained_samples_outside_the_split_are_not_used(self) -> None:
        few = split_of().subset(np.array(KEPT[:10]))
        found = GolatkarPaper().unlearn(net(), few)
        chosen = KEPT[:10] + GONE
        data = TensorDataset(X[chosen], CLASSES[chosen])
        expected = GolatkarPaper().draws(net(), resolve_split(data, range(10, 14))).model()
        torch.testing.assert_close(vector(found.model), vector(expected), **TIGHT)

    def test_work_is_counted(self) -> None:
        twin, work = metered(net())
        with torch.no_grad():
            twin(X)
        assert work[0] == pytest.approx(N / 3)
        twin(X).sum().backward()
        assert work[0] == pytest.approx(N * 4 / 3)
        leaves = list(twin.parameters())
        grads = torch.autograd.grad(twin(X).square().sum(), leaves, create_graph=True)
        assert work[0] == pytest.approx(N * 7 / 3)
        torch.autograd.grad(grads, leaves, [torch.ones_like(p) for p in leaves])
        assert work[0] == pytest.approx(N * 11 / 3)

    def test_passes_of_the_published_forms(self) -> None:
        # exact diagonal of 3 classes: a forward and two backward passes; the check of layers adds a
        # few samples
        for method in (GolatkarPaper(), GolatkarCode()):
            assert method.unlearn(net(), split_of()).passes == pytest.approx(5 / 3, abs=2)
        assert FisherForget(drift=True).unlearn(net(), split_of()).passes > 2
