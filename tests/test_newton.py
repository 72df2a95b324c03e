"""Newton laws: closed-form retraining, controls without forgetting, the flow's guards."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from conftest import blobs_data, small_net
from problems import problem_of, regression, ridge, softmax_minimiser
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    Categorical,
    CurvatureError,
    ForgetOptions,
    Gaussian,
    NumericalError,
    Problem,
    estimate_curvature,
    forget,
    newton_step,
)
from fisher_forget import params as P
from fisher_forget.curvature.products import DataProduct
from fisher_forget.curvature.solvers import Directions, conjugate_gradient
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.data.split import resolve_split, some
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.params import add, flatten, norm, randn_like
from fisher_forget.unlearn.newton import flow as flow_module
from fisher_forget.unlearn.newton.flow import Flow, LinearSolver
from fisher_forget.unlearn.newton.guard import Guard, HeldOut
from fisher_forget.unlearn.newton.path import Path
from fisher_forget.unlearn.objective import Objective

DECAY = 0.01
FEW = 5  # held-out samples, whose loss is another than that of all


class TestRidge:
    @pytest.mark.parametrize("solver", ["direct", "cg"])
    def test_one_newton_step_equals_retraining(self, solver: str) -> None:
        x, y = regression()
        gone = np.array([3, 17, 20, 41, 59])
        kept = np.setdiff1d(np.arange(60), gone)
        result = forget(
            ridge(x, y, DECAY),
            TensorDataset(x, y),
            gone,
            likelihood=Gaussian(),
            structure="dense",
            steps=1,
            damping=0.0,
            solver=solver,
            weight_decay=DECAY,
            noise=None,
            progress=False,
        )
        retrained = ridge(x[kept], y[kept], DECAY)
        for found, truth in zip(result.model.parameters(), retrained.parameters(), strict=True):
            assert float((found - truth).abs().max()) < 1e-8

    def test_the_default_call_comes_close(self) -> None:
        x, y = regression()
        gone = np.arange(10)
        original, retrained = ridge(x, y, DECAY), ridge(x[10:], y[10:], DECAY)
        result = forget(
            original,
            TensorDataset(x, y),
            gone,
            likelihood="gaussian",
            weight_decay=DECAY,
            noise=None,
            progress=False,
        )
        before = norm(add(oracle.start(original), oracle.start(retrained), -1))
        after = norm(add(oracle.start(result.model), oracle.start(retrained), -1))
        assert after < 0.05 * before


@pytest.mark.parametrize(("steps", "residual"), [(1, 1e-3), (2, 1e-6), (3, 1e-11)])
def test_logistic_regression_converges_quadratically_to_the_retrained_minimum(
    steps: int, residual: float
) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(300, 3, generator=g, dtype=torch.float64),
        torch.randint(0, 3, (300,), generator=g),
    )
    torch.manual_seed(0)
    model = softmax_minimiser(nn.Linear(3, 3).double(), x, y, DECAY).eval()
    result = forget(
        model,
        TensorDataset(x, y),
        range(6),
        structure="dense",
        steps=steps,
        damping=0.0,
        weight_decay=DECAY,
        noise=None,
        solver="cg",
        progress=False,
    )
    scrubbed = Objective(result.model, Categorical())
    gradient = scrubbed.gradient(result.split.batches("retain"), scrubbed.start).mean()
    assert norm(add(gradient, scrubbed.start, DECAY)) < residual


class TestControls:
    @pytest.fixture
    def few_held_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fisher_forget.unlearn.newton.step.HELD_OUT", FEW)

    def flow(
        self, model: nn.Module, data: TensorDataset, idx: list[int], **options: object
    ) -> object:
        split = resolve_split(data, idx, allow_empty=True)
        curvature = estimate_curvature(model, split)
        problem = problem_of(model, split, curvature, weight_decay=DECAY)
        return newton_step(problem, ForgetOptions(**options))

    def data(self) -> tuple[nn.Module, TensorDataset]:
        g = torch.Generator().manual_seed(2)
        x, y = (
            torch.randn(70, 4, generator=g, dtype=torch.float64),
            torch.randint(0, 3, (70,), generator=g),
        )
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
        ).double().eval(), TensorDataset(x, y)

    def test_nothing_to_forget_changes_nothing(self) -> None:
        """Far from a minimum: the plain flow would train on; what is owed to nobody is exactly
        zero."""
        model, data = self.data()
        for options in ({}, {"damping": 0.01}, {"steps": 2}, {"solver": "direct"}):
            step = self.flow(model, data, [], **options)
            assert step.drift_removed
            assert step.norm == 0.0
        assert self.flow(model, data, [], drift=False).norm > 0.1

    def test_nothing_to_forget_changes_nothing_at_a_minimum(self) -> None:
        model, data = self.data()
        model = softmax_minimiser(model, *data.tensors, DECAY)
        assert self.flow(model, data, []).norm == 0.0
        assert self.flow(model, data, [], drift=False).norm < 1e-5

    @pytest.mark.usefixtures("few_held_out")
    def test_a_step_outside_the_budget_is_never_returned(self) -> None:
        model, data = self.data()
        model = softmax_minimiser(model, *data.tensors, DECAY)
        step = self.flow(model, data, list(range(20)), budget=0.0, seed=1)
        assert step.norm == 0.0
        assert not step.accepted
        assert [s.share for s in step.path] == [2.0**-7]  # it was shortened before giving up

    @pytest.mark.usefixtures("few_held_out")
    def test_a_step_that_leaves_the_budget_is_halved_and_the_last(self) -> None:
        model, data = self.data()
        model, forgotten = softmax_minimiser(model, *data.tensors, DECAY), list(range(20))
        whole = self.flow(model, data, forgotten, budget=10.0, seed=1, damping=0.05)
        budget = 0.3 * (whole.path[0].loss + whole.path[0].shift - whole.loss_before)
        (first,) = self.flow(model, data, forgotten, budget=budget, seed=1, damping=0.05).path
        assert budget > 0
        assert first.accepted
        assert first.share < 1
        assert first.norm == pytest.approx(first.share * whole.path[0].norm)
        assert first.loss + first.shift <= whole.loss_before + budget
        # to a quarter of itself: what is longer by more leaves the budget
        longer = self.flow(model, data, forgotten, budget=1.6 * budget, seed=1, damping=0.05).path[
            0
        ]
        assert longer.share > first.share

    def test_what_some_lose_is_not_hidden_by_what_others_gain(self) -> None:
        """Moves of the predictions to the worse are added to the change of the mean loss."""
        model, data = self.data()
        objective, likelihood = Objective(model, Categorical()), Categorical()
        split = resolve_split(data, list(range(20)))
        held = split.retain[:FEW]
        there = self.flow(model, data, list(range(20)), steps=1, damping=0.1, drift=False).params
        ((before, y),) = objective.forward(split.batches(held), objective.start)
        ((after, _),) = objective.forward(split.batches(held), there)
        gains = likelihood.losses(before, y) - likelihood.losses(after, y)
        assert 0 < (gains < 0).sum() < FEW
        shift = float((-gains).clamp(min=0).mean())
        needed = shift - float(gains.mean())
        held_out = HeldOut(objective, split, held)
        for budget, fits in ((needed - 1e-9, False), (needed + 1e-9, True)):
            guard = Guard(held_out, held_out.look(objective.start), budget)
            assert guard.fits(held_out.look(there)) == fits

    @pytest.mark.usefixtures("few_held_out")
    def test_the_held_out_loss_stays_within_the_budget(self) -> None:
        model, data = self.data()
        for budget in (0.03, 0.1):
            step = self.flow(model, data, list(range(20)), drift=False, budget=budget, seed=1)
            losses = [step.loss_before, *(s.loss for s in step.accepted)]
            assert len(losses) > 2
            assert (
                min(losses) < step.loss_before
            )  # the budget is one from the lowest loss on the way
            assert all(
                s.loss + s.shift <= min(losses[:k]) + budget for k, s in enumerate(step.accepted, 1)
            )

    def test_moves_to_the_worse_are_counted_from_the_lowest_loss_on_the_way(self) -> None:
        model, data = self.data()
        objective, likelihood = Objective(model, Categorical()), Categorical()
        split = resolve_split(data, range(20))
        problem = problem_of(model, split, estimate_curvature(model, split), weight_decay=DECAY)
        flow = Flow(problem, split.retain, problem.retained, LinearSolver())
        held = some(split.retain, FEW, np.random.default_rng(1))
        guard = Guard.at(HeldOut(objective, split, held), flow.at, 0.5)
        path, places = Path(problem, flow, guard, split.forget), []
        for _ in range(2):
            assert path.follow([5.0], [flow.owed], progress=False)
            places.append(path.at)
        one, two = path.steps
        assert one.loss < guard.best.loss
        ((best, y),), ((after, _),) = (
            list(objective.forward(split.batches(held), at)) for at in places
        )
        rises = likelihood.losses(after, y) - likelihood.losses(best, y)
        shift = float(rises.clamp(min=0).mean())
        assert shift > 0
        assert two.shift == pytest.approx(shift)

    @pytest.mark.usefixtures("few_held_out")
    def test_a_flow_that_leaves_the_budget_is_followed_for_half_the_time(self) -> None:
        model, data = self.data()
        model = softmax_minimiser(model, *data.tensors, DECAY)
        free, bound = (
            self.flow(model, data, list(range(20)), budget=budget, seed=1)
            for budget in (math.inf, 0.1)
        )
        assert max(s.loss + s.shift for s in free.path) > free.loss_before + 0.1
        halvings = math.log2(free.horizon / bound.horizon)
        assert halvings == pytest.approx(round(halvings), abs=1e-6)
        assert 1 <= halvings < 7
        assert all(s.accepted and s.share == 1 for s in bound.path)
        lowest = bound.loss_before
        for s in bound.path:
            assert s.loss + s.shift <= lowest + 0.1
            lowest = min(lowest, s.loss)

    @pytest.mark.parametrize("steps", [4, 8])
    def test_a_given_number_of_steps_shares_the_same_time(self, steps: int) -> None:
        model, data = self.data()
        model = softmax_minimiser(model, *data.tensors, DECAY)
        step = self.flow(model, data, list(range(20)), steps=steps, budget=math.inf)
        assert len(step.accepted) == steps
        assert [s.damping for s in step.path] == pytest.approx([steps / step.horizon] * steps)
        auto = self.flow(model, data, list(range(20)), budget=math.inf)
        assert step.horizon == auto.horizon
        if steps == len(auto.path):
            torch.testing.assert_close(flatten(step.params), flatten(auto.params))

    def test_a_given_damping_that_explodes_is_an_error(self) -> None:
        _, data = self.data()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        blind = Diagonal(eigenvalues=P.detached(zeros))
        problem = problem_of(model, resolve_split(data, [0, 1]), blind)
        options = ForgetOptions(steps=1, damping=1e-35, solver="direct", drift=False)
        with pytest.raises(NumericalError, match="left the finite numbers"):
            newton_step(problem, options)


class TestGgn:
    @pytest.mark.parametrize("size", [2, 64])
    def test_equals_the_dense_ggn(self, size: int) -> None:
        from small_models import prepared

        for name in ("residual", "sequence", "patched"):
            model, data = prepared(name)
            truth = oracle.ggn(model, *data.tensors, Categorical())
            objective = Objective(model, Categorical())
            split = resolve_split(
                torch.utils.data.DataLoader(data, batch_size=size), [], allow_empty=True
            )
            count = float(Categorical().counts(data.tensors[1]).sum())
            product = objective.ggn(split, split.indices("all"), objective.start, count)
            v = randn_like(objective.start, torch.Generator().manual_seed(0))
            assert torch.allclose(flatten(product(v)), truth @ flatten(v), rtol=1e-8, atol=1e-10)
            assert isinstance(product, DataProduct)


class TestConjugateGradient:
    def system(self) -> tuple[Tensor, dict[str, Tensor]]:
        g = torch.Generator().manual_seed(0)
        a = torch.randn(12, 12, generator=g, dtype=torch.float64)
        return a @ a.T + 0.1 * torch.eye(12, dtype=torch.float64), {
            "x": torch.randn(12, generator=g).double()
        }

    def test_solves(self) -> None:
        a, b = self.system()
        found = conjugate_gradient(
            lambda v: {"x": a @ v["x"]}, b, dict, iterations=40, tolerance=1e-12
        )
        assert torch.allclose(found.x["x"], torch.linalg.solve(a, b["x"]), rtol=1e-8)
        assert found.residual < 1e-11

    def test_a_perfect_preconditioner_needs_one_product(self) -> None:
        a, b = self.system()
        found = conjugate_gradient(
            lambda v: {"x": a @ v["x"]},
            b,
            lambda r: {"x": torch.linalg.solve(a, r["x"])},
            tolerance=1e-8,
        )
        assert found.iterations == 1

    @pytest.mark.parametrize("room", [0, 5, 12])
    def test_directions_answer_for_their_part_of_the_next_system(self, room: int) -> None:
        """What is in their span needs no product; the rest is solved all the same."""
        a, b = self.system()
        other = {"x": torch.randn(12, generator=torch.Generator().manual_seed(1)).double()}
        known, products = Directions(room), []

        def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
            products.append(v)
            return {"x": a @ v["x"]}

        solve = partial(conjugate_gradient, product, precondition=dict, iterations=60, known=known)
        for right in (b, other):
            found = solve(right, tolerance=1e-12)
            truth = torch.linalg.solve(a, right["x"])
            torch.testing.assert_close(found.x["x"], truth, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(
                found.left["x"], right["x"] - a @ found.x["x"], rtol=0, atol=1e-9
            )
        products.clear()
        solve(b, tolerance=1e-8)
        assert (len(products) == 0) == (room == 12)

    def test_what_directions_leave_is_conjugate_to_them(self) -> None:
        a, b = self.system()
        known = Directions(4)
        conjugate_gradient(
            lambda v: {"x": a @ v["x"]}, b, dict, iterations=4, tolerance=0.0, known=known
        )
        z = {"x": torch.randn(12, generator=torch.Generator().manual_seed(2)).double()}
        left = a @ known.conjugate(z)["x"]
        x, r = known.solve(b)
        # the residual is orthogonal to the span, which the Krylov space of b is
        span, v = [], b["x"]
        for _ in range(4):
            span.append(v / v.norm())
            v = a @ v
        for v in span:
            assert abs(float(v @ r["x"])) < 1e-8 * float(b["x"].norm())
            assert abs(float(v @ left)) < 1e-8 * float((a @ z["x"]).norm())
        torch.testing.assert_close(r["x"], b["x"] - a @ x["x"])

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_is_no_solution(self, bad: float) -> None:
        a, b = self.system()
        with pytest.raises(NumericalError, match="more damping"):
            conjugate_gradient(lambda v: {"x": a @ v["x"]}, {"x": b["x"] * bad}, dict)

    def test_an_indefinite_operator_is_refused(self) -> None:
        _, b = self.system()
        with pytest.raises(NumericalError, match="positive definite"):
            conjugate_gradient(lambda v: {"x": -v["x"]}, b, dict)


def test_variance_reduction_is_exact_when_every_sample_is_in_the_working_set() -> None:
    g = torch.Generator().manual_seed(4)
    x, y = (
        torch.randn(200, 4, generator=g, dtype=torch.float64),
        torch.randint(0, 3, (200,), generator=g),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    split = resolve_split(TensorDataset(x, y), range(30))
    curvature = estimate_curvature(model, split)

    def weights(working_set: int) -> Tensor:
        problem = problem_of(model, split, curvature, weight_decay=DECAY)
        solver = LinearSolver(working_set=working_set)
        flow = Flow(problem, split.retain, problem.retained, solver)
        for _ in range(3):
            flow.solve(1.0)
            flow.go()
        return flatten(flow.at)

    all_samples, many, few = weights(170), weights(169), weights(20)
    start = flatten(oracle.start(model))
    assert float((all_samples - many).norm() / (all_samples - start).norm()) < 0.05
    assert float((all_samples - few).norm()) > float((all_samples - many).norm())
    assert math.isfinite(float(few.norm()))


def test_the_curvature_stands_for_samples_outside_the_working_set() -> None:
    """Every retained sample twice: the curvature of all is that of the copies, so backward Euler
    steps are exact."""
    x, y = regression()
    x, y = torch.cat([x[:50], x]), torch.cat([y[:50], y])
    split = resolve_split(TensorDataset(x, y), range(100, 110))
    model = ridge(x, y, DECAY)
    curvature = estimate_curvature(model, split, Gaussian(), structure="dense")
    problem = problem_of(model, split, curvature, Gaussian(), DECAY)
    flow = Flow(problem, split.retain, problem.retained, LinearSolver(working_set=50))
    for _ in range(2):
        flow.solve(0.05)
        flow.go()

    ones = torch.cat([x[:100], torch.ones(100, 1, dtype=x.dtype)], 1)
    b = ones.T @ ones / 100 + DECAY * torch.eye(6, dtype=x.dtype)
    w = torch.cat([model.weight.T, model.bias[None]]).detach()
    for _ in range(2):
        w = w - torch.linalg.solve(
            b + 0.05 * torch.eye(6, dtype=x.dtype), b @ w - ones.T @ y[:100] / 100
        )
    torch.testing.assert_close(
        torch.cat([flow.at["weight"].T, flow.at["bias"][None]]), w, rtol=0, atol=1e-7
    )


class TestLinear:
    """A flow is followed to first order as long as predictions stand still."""

    def flow(self, model: nn.Module, data: TensorDataset, straight: float, **more: object) -> Flow:
        split = resolve_split(data, range(10))
        likelihood = more.get("likelihood") or Categorical()
        curvature = estimate_curvature(model, split, likelihood, structure="dense")
        problem = problem_of(model, split, curvature, likelihood, DECAY)
        return Flow(problem, split.retain, problem.retained, LinearSolver(straight=straight))

    def follow(self, flow: Flow, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        """Where four sub-steps lead, the first of which is half of one."""
        for name in ("ROUGH", "CLOSE"):
            monkeypatch.setattr(flow_module, name, (200, 1e-12))
        places = []
        for share in (0.5, 1.0, 1.0, 1.0):
            flow.solve(0.05)
            flow.go(share)
            places.append(flatten(flow.at))
        return places

    def test_it_is_the_flow_where_the_loss_is_quadratic(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, y = regression()
        data, model = TensorDataset(x, y), ridge(x, y, DECAY)
        anew = self.flow(model, data, 0.0, likelihood=Gaussian())
        kept = self.flow(model, data, math.inf, likelihood=Gaussian())
        for one, other in zip(
            self.follow(anew, monkeypatch), self.follow(kept, monkeypatch), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("gone", [1, 10])
    def test_a_small_request_at_a_minimum_is_retraining(self, gone: int) -> None:
        """1,500 samples: the products are of 400 of them, the end is that of all."""
        g = torch.Generator().manual_seed(5)
        x = torch.randn(1500, 12, generator=g, dtype=torch.float64)
        y = x[:, :2] + 0.3 * torch.randn(1500, 2, generator=g, dtype=torch.float64)
        model, left = ridge(x, y, DECAY), ridge(x[gone:], y[gone:], DECAY)
        result = forget(
            model,
            TensorDataset(x, y),
            range(gone),
            likelihood="gaussian",
            weight_decay=DECAY,
            noise=None,
            progress=False,
        )
        start, found, truth = (flatten(oracle.start(m)) for m in (model, result.model, left))
        beside = float((found - truth).norm())
        assert beside < 1e-3 * float((start - truth).norm())
        # sigma_h is of a gradient taken at the end, and knows what is left
        assert result.newton.error * math.sqrt(len(found)) == pytest.approx(beside, rel=0.15)

    def test_it_is_taken_anew_where_predictions_have_moved(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By as much as the bound says, measured by hand on the working set."""
        model, data = TestControls().data()
        moves = []
        for bound in (0.2, 0.3):
            flow = self.flow(model, data, bound)
            for name in ("ROUGH", "CLOSE"):
                monkeypatch.setattr(flow_module, name, (200, 1e-12))
            flow.solve(0.5)
            flow.go()
            near, objective = flow._near, flow.problem.objective
            (before, _), (after, _) = (
                next(objective.forward(flow.problem.split.batches(near.samples), at))
                for at in (near.origin, flow.at)
            )
            p = before.softmax(1)
            kl = (p * (before.log_softmax(1) - after.log_softmax(1))).sum()
            curved = (1 - (p * p).sum(1)).sum()
            moves.append(float((2 * kl / curved) ** 0.5))
            assert flow._bent(near) == (moves[-1] > bound)
        assert 0.2 < moves[0] < 0.3  # both sides were seen

    def test_a_last_sub_step_that_fails_is_taken_back(self) -> None:
        model, data = TestControls().data()
        flow = self.flow(model, data, math.inf)
        nobody = HeldOut(flow.problem.objective, flow.problem.split, flow.samples[:0])
        guard = Guard.at(nobody, flow.at, None)
        path = Path(flow.problem, flow, guard, flow.problem.split.forget)
        assert path.follow([1.0], [flow.owed], progress=False)
        bad, seen = iter([False, True]), []

        def failed(at: P.Params) -> bool:
            seen.append(at)
            return next(bad)

        path.outlast([1.0, 1.0, 1.0], flow.owed, known=lambda at: True, failed=failed)
        assert [step.accepted for step in path.steps] == [True, True, False]
        assert path.at is seen[0]  # bit by bit as before the one that failed
        torch.testing.assert_close(flatten(flow.at), flatten(path.at), rtol=0, atol=0)
        assert next(bad, None) is None  # the third was not tried


def test_an_indefinite_hessian_is_damped_or_refused() -> None:
    """Away from a minimum a Hessian curves downwards: the flow finds a time that is short enough, a
    given damping may not be enough."""
    x, y = regression()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    data = TensorDataset(x, y / 3)
    options = {
        "likelihood": "gaussian",
        "structure": "dense",
        "kind": "hessian",
        "noise": None,
        "progress": False,
    }
    found = forget(model, data, [1, 2], steps=1, drift=True, budget=math.inf, **options)
    assert found.newton.accepted
    with pytest.raises(CurvatureError, match="indefinite"):
        forget(model, data, [1, 2], steps=1, damping=0.0, drift=True, **options)


class TestLinearModels:
    """scikit-learn's data and solvers: what retraining would give, in closed form or to the
    optimiser's last digit."""

    def test_ridge_regression_on_diabetes(self) -> None:
        x, y = (t.double() for t in load_dataset("diabetes").train.tensors)
        kept = np.arange(50, len(x))
        model = ridge(x, y, DECAY)
        result = forget(
            model,
            TensorDataset(x, y),
            range(50),
            likelihood="gaussian",
            weight_decay=DECAY,
            structure="dense",
            steps=1,
            damping=0.0,
            noise=None,
            progress=False,
        )
        ones = np.hstack([x[kept].numpy(), np.ones((len(kept), 1))])
        retrained = (
            Ridge(alpha=DECAY * len(kept), fit_intercept=False)
            .fit(ones, y[kept].numpy())
            .coef_.ravel()
        )
        found = np.append(result.model.weight.detach().numpy(), result.model.bias.detach().numpy())
        np.testing.assert_allclose(found, retrained, rtol=0, atol=1e-6)
        assert (
            np.abs(
                found - np.append(model.weight.detach().numpy(), model.bias.detach().numpy())
            ).max()
            > 1e-3
        )

    @pytest.mark.parametrize(("gone", "steps"), [(10, 2), (40, 2)])
    def test_logistic_regression_on_breast_cancer(self, gone: int, steps: int) -> None:
        x, y = load_dataset("breast_cancer").train.tensors
        x = x.double()
        kept = np.arange(gone, len(x))
        torch_model = softmax_minimiser(nn.Linear(30, 2).double(), x, y, DECAY).eval()
        result = forget(
            torch_model,
            TensorDataset(x, y),
            range(gone),
            weight_decay=DECAY,
            structure="dense",
            solver="cg",  # the GGN anew at every step; "direct" keeps the curvature of the start
            steps=steps,
            damping=0.0,
            noise=None,
            progress=False,
        )
        w = {name: p.detach().requires_grad_() for name, p in result.model.named_parameters()}
        loss = (
            Categorical()
            .losses(torch.func.functional_call(result.model, w, (x[kept],)), y[kept])
            .mean()
        )
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in w.values())
        residual = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(w.values()))]
        ).norm()
        assert float(residual) <= 1e-6
        # softmax over two classes with decay wd is a logistic regression of the difference with
        # decay wd / 2
        ones = np.hstack([x[kept].numpy(), np.ones((len(kept), 1))])
        theirs = LogisticRegression(
            C=2 / (DECAY * len(kept)), fit_intercept=False, tol=1e-10, max_iter=10_000
        )
        theirs.fit(ones, y[kept].numpy())
        ours = torch.cat([w["weight"], w["bias"][:, None]], 1)
        np.testing.assert_allclose((ours[1] - ours[0]).detach().numpy(), theirs.coef_[0], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_samples_have_scored_targets(seed: int) -> None:
    """Where few are scored, as of partly labelled data, a guard sees some of those."""
    data = blobs_data()
    targets = torch.full_like(data.tensors[1], -100)
    targets[[0, 20, 59]] = data.tensors[1][[0, 20, 59]]
    problem = Problem.of(small_net(), TensorDataset(data.tensors[0], targets), [0], seed=seed)
    result = newton_step(problem, steps=1, drift=True, seed=seed)
    assert math.isfinite(result.loss_before)
