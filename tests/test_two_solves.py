"""The textbook step without drift: the difference of two Newton steps, in closed form."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from laws import relative
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    CurvatureError,
    ForgetOptions,
    Gaussian,
    Problem,
    estimate_curvature,
    newton_step,
)
from fisher_forget import params as P
from fisher_forget.curvature.structures import STRUCTURES
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.data.split import resolve_split
from fisher_forget.params import flatten, unflatten
from fisher_forget.unlearn.data_sums import take_data_sums
from fisher_forget.unlearn.newton.two_solves import curvature_of_all
from fisher_forget.unlearn.problem import curvature_of, objective_of

DECAY, GONE, N = 0.01, np.arange(10), 60
KEPT = np.arange(10, N)
STRUCTURED = [*STRUCTURES, {"*bias": "diagonal", "*": "ekfac"}]


def away_from_the_minimum() -> tuple[nn.Module, TensorDataset]:
    """Forgotten samples with other inputs and targets, and weights far from any fit."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=draw, dtype=torch.float64)
    y = x @ torch.randn(5, 2, generator=draw, dtype=torch.float64)
    x[GONE], y[GONE] = 4 * x[GONE], y[GONE] + 3
    model = nn.Linear(5, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-9, 9, 10).view(2, 5))
        model.bias.fill_(4.0)
    return model.eval(), TensorDataset(x, y)


def solved(model: nn.Module, data: TensorDataset, rows: np.ndarray, tau: float) -> Tensor:
    """(C + (wd + tau) I)^-1 (grad L + wd w) of some samples, by brute force."""
    x, y = (t[torch.from_numpy(rows)] for t in data.tensors)
    like = oracle.start(model)
    losses = Gaussian().losses(model(x), y)
    pulled = torch.autograd.grad(losses.mean(), list(model.parameters()))
    force = torch.cat([g.reshape(-1) for g in pulled]) + DECAY * flatten(like)
    c = oracle.ggn(model, x, y, Gaussian())
    return torch.linalg.solve(c + (DECAY + tau) * torch.eye(len(c)).to(c), force)


def problem_and_options(
    gone: np.ndarray, structure: object = "dense", **more: object
) -> tuple[Problem, ForgetOptions]:
    model, data = away_from_the_minimum()
    given = {"likelihood": "gaussian", "weight_decay": DECAY, "steps": 1, "drift": True}
    options = ForgetOptions(**given | {"structure": structure, "max_samples": None} | more)
    split = resolve_split(data, gone, allow_empty=True)
    objective = objective_of(model, split, options, None)
    curvature = curvature_of(objective, split, options, *options.curvature_plan(split))
    sums = take_data_sums(objective, split)
    return Problem(objective, split, curvature, sums, options.weight_decay), options


@pytest.mark.parametrize("tau", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_the_difference_of_two_newton_steps(solver: str, tau: float) -> None:
    """Without damping it is the retrained ridge regression, shifted by the excess that the weights
    have over that of all samples."""
    problem, options = problem_and_options(GONE, solver=solver, damping=tau)
    model, data = away_from_the_minimum()
    d_r, d_all = solved(model, data, KEPT, tau), solved(model, data, np.arange(N), tau)
    start = flatten(oracle.start(model))
    found = newton_step(problem, options)
    assert found.drift_removed
    assert relative(flatten(found.params) - start, d_all - d_r) < 1e-8
    assert found.norm == pytest.approx(float((d_all - d_r).norm()), rel=1e-8)
    if tau == 0:  # one Newton step reaches a quadratic's minimum: w - d
        retrained, trained = start - d_r, start - d_all
        assert relative(flatten(found.params) - retrained, start - trained) < 1e-7


@pytest.mark.parametrize("drift", [True, False])
def test_the_textbook_step_is_of_all_samples(drift: bool) -> None:
    """However few the working set takes, and however rough the estimated curvature is."""
    problem, options = problem_and_options(GONE, "diagonal", solver="cg", damping=0.1, drift=drift)
    model, data = away_from_the_minimum()
    step = -solved(model, data, KEPT, 0.1)
    if drift:
        step = step + solved(model, data, np.arange(N), 0.1)
    found = newton_step(problem, options, working_set=10)
    assert relative(flatten(found.params) - flatten(oracle.start(model)), step) < 1e-7


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("structure", STRUCTURED, ids=str)
def test_nobody_forgotten_is_exactly_zero(structure: object, solver: str) -> None:
    for changes in ({"steps": 1}, {"steps": 3}, {"weight_decay": {"*bias": 0, "*": 0.1}}):
        problem, options = problem_and_options(
            np.zeros(0, np.int64), structure, solver=solver, damping=0.1, **changes
        )
        found, start = newton_step(problem, options), problem.objective.start
        assert found.norm == 0
        assert all(torch.equal(found.params[name], w) for name, w in start.items())


def test_several_steps_are_two_paths() -> None:
    """Quadratic: each path is that of its own samples, and the motions are subtracted."""
    problem, options = problem_and_options(GONE, solver="direct", damping=0.5, steps=3)
    model, data = away_from_the_minimum()
    like = oracle.start(model)
    ends = []
    for rows in (KEPT, np.arange(N)):
        walker = away_from_the_minimum()[0]
        for _ in range(3):
            step = unflatten(solved(walker, data, rows, 0.5), like)
            with torch.no_grad():
                for name, p in walker.named_parameters():
                    p -= step[name]
        ends.append(flatten(oracle.start(walker)))
    found = flatten(newton_step(problem, options).params)
    assert relative(found - flatten(like), ends[0] - ends[1]) < 1e-8


@pytest.mark.parametrize("structure", STRUCTURED, ids=str)
@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_the_curvature_of_all_samples(structure: object, kind: str) -> None:
    """What an estimate of all says, EKFAC in the basis of the retained."""
    problem, options = problem_and_options(GONE, structure, kind=kind, solver="direct")
    found = curvature_of_all(problem, options)
    basis = {"basis": problem.curvature} if structure == "ekfac" else {}
    model, data = away_from_the_minimum()
    truth = estimate_curvature(
        model,
        resolve_split(data, GONE),
        Gaussian(),
        structure=structure,
        kind=kind,
        part="all",
        **basis,
    )
    v = P.randn_like(problem.objective.start, torch.Generator().manual_seed(0))
    assert relative(flatten(found.power(v, 1.0)), flatten(truth.power(v, 1.0))) < 1e-8


def test_a_curvature_put_together_by_hand_says_nothing_of_the_forgotten() -> None:
    problem, options = problem_and_options(GONE, solver="direct", damping=0.1)
    ones = {name: torch.ones_like(w) for name, w in problem.objective.start.items()}
    by_hand = Problem(
        problem.objective, problem.split, Diagonal(ones), problem.sums, problem.weight_decay
    )
    with pytest.raises(CurvatureError, match="put together by hand"):
        newton_step(by_hand, options)
    assert newton_step(by_hand, options, solver="cg").norm > 0
