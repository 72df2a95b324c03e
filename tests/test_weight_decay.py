"""Weight decay by patterns of names: a float64 oracle for every structure, scikit-learn, which
never penalises the intercept, and everywhere that a number is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from laws import claim, relative
from sklearn.linear_model import LogisticRegression, Ridge
from small_models import prepared
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    Categorical,
    ConfigError,
    ForgetOptions,
    Limits,
    Problem,
    StorageError,
    estimate_curvature,
    forget,
    newton_step,
    prepare,
)
from fisher_forget.baselines import METHODS
from fisher_forget.curvature.structures import STRUCTURES
from fisher_forget.data.split import resolve_split
from fisher_forget.experiments.config import RunConfig, to_plain
from fisher_forget.experiments.config_file import load_config
from fisher_forget.params import flatten, randn_like, unflatten
from fisher_forget.unlearn.noise import calibrate_noise, draw_noise
from fisher_forget.unlearn.noise_target import NoiseTarget
from fisher_forget.unlearn.weight_decay import by_name, decayed

PATTERNS = {"*bias": 0.0, "[h2]*": 0.3, "*": 0.05}
EXACT = ("diagonal", "dense", "matrix_free")


def rates(model: nn.Module) -> dict[str, float]:
    """PATTERNS by hand."""
    return {
        name: 0.0 if name.endswith("bias") else 0.3 if name[0] in "h2" else 0.05
        for name, _ in model.named_parameters()
    }


def diagonal(model: nn.Module) -> Tensor:
    names = rates(model)
    return flatten({n: torch.full_like(p, names[n]) for n, p in oracle.start(model).items()})


class TestPatterns:
    def found(self, weight_decay: Any, names: list[str] | None = None) -> Any:
        model = prepared("residual")[0]
        moving = [name for name, _ in model.named_parameters()] if names is None else names
        return by_name(weight_decay, model, moving)

    def test_the_first_match_wins_and_others_have_none(self) -> None:
        assert self.found(PATTERNS) == rates(prepared("residual")[0])
        found = self.found({"head.weight": 1, "h*": 2})
        assert found["head.weight"] == 1
        assert found["head.bias"] == 2
        assert found["first.weight"] == 0

    def test_the_same_for_all_is_a_number(self) -> None:
        assert self.found(0.3) == self.found({"*": 0.3}) == 0.3
        assert self.found({"*bias": 0.3, "*": 0.3}) == 0.3
        assert self.found({"first*": 0.1, "head*": 0.2}, ["head.weight", "head.bias"]) == 0.2
        assert self.found({"head*": 0.1}, ["first.weight"]) == 0

    def test_by_name_twice_is_once(self) -> None:
        assert self.found(self.found(PATTERNS)) == self.found(PATTERNS)

    @pytest.mark.parametrize(
        ("patterns", "word"),
        [
            ({"heat.*": 0.1}, "Did you mean 'head"),
            ({"head.wieght": 0.1}, "'head.weight'"),
            ({"*": 0.1, "*bias": 0.0}, "special patterns before general"),
            ({"zzz": 0.1}, "Correct the pattern"),
        ],
    )
    def test_a_pattern_of_nothing(self, patterns: dict[str, float], word: str) -> None:
        model, data = prepared("residual")
        for call in (
            lambda: self.found(patterns),
            lambda: forget(model, data, [0], weight_decay=patterns),
            lambda: prepare(model, data, weight_decay=patterns, progress=False),
        ):
            with pytest.raises(ConfigError, match=r"in weight_decay=.*" + word):
                call()

    @pytest.mark.parametrize(
        "value",
        [-1, math.nan, "0.1", True, {}, {"*": -1}, {"*": "0.1"}, {1: 0.1}, {"*": None}, [0.1]],
    )
    def test_out_of_range(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="weight_decay="):
            ForgetOptions(weight_decay=value)

    def test_what_was_given_is_copied(self) -> None:
        given = {"*bias": np.float64(0), "*": 1}
        options = ForgetOptions(weight_decay=given)
        given["*"] = 7
        assert json.loads(json.dumps(options.weight_decay)) == {"*bias": 0.0, "*": 1.0}


@pytest.mark.parametrize("name", ["mlp", "residual"])
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_every_structure_is_what_the_oracle_says(structure: str, name: str) -> None:
    model, data = prepared(name)
    like, names = oracle.start(model), rates(model)
    curvature = estimate_curvature(model, data, structure=structure, rank=5)
    exact = oracle.ggn(model, *data.tensors, Categorical())
    b = exact if structure == "low_rank" else claim(curvature, exact, like)
    if structure == "low_rank":
        b = torch.stack([flatten(curvature.power(unflatten(e, like), 1.0)) for e in unit(b)], 1)
    found, v = decayed(curvature, names, 0.2), randn_like(like, torch.Generator().manual_seed(0))
    whole = b + torch.diag(diagonal(model)) + 0.2 * unit(b)
    held = torch.stack([flatten(found.power(unflatten(e, like), 1.0)) for e in unit(b)], 1)
    if structure in EXACT:
        assert relative(held, whole) < 1e-8
    else:  # the nearest: what is left out is orthogonal to every operator of that basis
        assert float((held - whole).norm()) > 1e-3
        missed = float(((held - whole) * held).sum()) / float((held * held).sum())
        assert abs(missed) < 1e-9
    for p in (-1.0, -0.25):
        expected = oracle.power(held, p) @ flatten(v)
        assert relative(flatten(found.power(v, p)), expected) < 1e-5
    free = structure == "matrix_free"  # whose traces are estimates
    assert found.trace() == pytest.approx(float(whole.trace()), rel=0.02 if free else 1e-9)
    if free:
        return
    root = oracle.power(held, -0.5)
    assert found.power_trace(-0.5) == pytest.approx(float(root.trace()), rel=1e-6)
    traced = found.power_trace(-0.5, times_curvature=True, probes=400)
    assert traced == pytest.approx(float((root @ b).trace()), rel=0.1)


def unit(b: Tensor) -> Tensor:
    return torch.eye(len(b)).to(b)


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_a_newton_step_is_exact(structure: str, solver: str) -> None:
    """Whatever the structure can hold: its own matrix, or the exact GGN, plus diag(wd) + tau I."""
    model, data = prepared("residual")
    like, gone = oracle.start(model), [0, 2]
    kept = [i for i in range(len(data)) if i not in gone]
    options = {"structure": structure, "solver": solver, "steps": 1, "damping": 0.1}
    options |= {"drift": False, "weight_decay": PATTERNS, "max_samples": None, "kind": "exact"}
    problem = Problem.of(model, data, gone, ForgetOptions(**options))
    x, y = (t[kept] for t in data.tensors)
    b = oracle.ggn(model, x, y, Categorical())
    if solver == "direct":
        plain = problem.curvature
        b = torch.stack([flatten(plain.power(unflatten(e, like), 1.0)) for e in unit(b)], 1)
    loss = Categorical().losses(model(x), y).mean()
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    force = torch.cat([g.reshape(-1) for g in gradient]) + diagonal(model) * flatten(like)
    matrix = b + torch.diag(diagonal(model)) + 0.1 * unit(b)
    expected = flatten(like) - torch.linalg.solve(matrix, force)
    found = newton_step(problem, ForgetOptions(**options))
    assert relative(flatten(found.params), expected) < 1e-6


class TestScikitLearn:
    """No decay on the intercept: Newton steps end at the solution of scikit-learn."""

    DECAY = 0.05
    NONE_ON_BIAS = {"*weight": DECAY}  # noqa: RUF012 - never changed

    def step(
        self, model: nn.Module, x: Tensor, y: Tensor, steps: int, likelihood: str
    ) -> nn.Module:
        result = forget(
            model.eval(),
            TensorDataset(x, y),
            range(8),
            likelihood=likelihood,
            weight_decay=self.NONE_ON_BIAS,
            steps=steps,
            damping=0.0,
            drift=False,
            noise=None,
        )
        return result.model

    def test_ridge(self) -> None:
        """A quadratic: one step from anywhere."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(60, 5, generator=draw, dtype=torch.float64)
        y = x[:, :1] * 2 + 3 + torch.randn(60, 1, generator=draw, dtype=torch.float64)
        found = self.step(nn.Linear(5, 1).double(), x, y, 1, "gaussian")
        truth = Ridge(alpha=self.DECAY * 52).fit(x[8:].numpy(), y[8:, 0].numpy())
        assert np.abs(found.weight.detach().numpy()[0] - truth.coef_).max() < 1e-6
        assert abs(float(found.bias.detach()) - truth.intercept_) < 1e-6

    def test_logistic(self) -> None:
        """From the solution of all samples: two steps."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(300, 4, generator=draw, dtype=torch.float64)
        y = (x[:, 0] + 1 + torch.randn(300, generator=draw, dtype=torch.float64) > 0).double()
        fits = [
            LogisticRegression(C=1 / (self.DECAY * len(rows)), tol=1e-12, max_iter=10_000).fit(
                x[rows].numpy(), y[rows].numpy()
            )
            for rows in (np.arange(300), np.arange(8, 300))
        ]
        model = nn.Linear(4, 1).double()
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(fits[0].coef_))
            model.bias.copy_(torch.from_numpy(fits[0].intercept_))
        found = self.step(model, x, y[:, None], 2, "bernoulli")
        assert np.abs(found.weight.detach().numpy() - fits[1].coef_).max() < 1e-6
        assert abs(float(found.bias.detach()) - fits[1].intercept_[0]) < 1e-6


class TestEverywhere:
    def test_noise_has_the_covariance_of_what_is_held(self) -> None:
        """10,000 draws of (B + diag(wd) + tau I)^-1/4 xi; each variance within 5 standard errors, a
        false-alarm rate of 1e-4."""
        model, data = prepared("mlp")
        result = forget(
            model, data, [0], weight_decay=PATTERNS, noise=0.1, structure="dense", drift=True
        )
        shape, like = result.noise_curvature(), oracle.start(model)
        b = torch.stack(
            [
                flatten(result.curvature.power(unflatten(e, like), 1.0))
                for e in unit(torch.zeros(len(flatten(like)), len(flatten(like))).double())
            ],
            1,
        )
        whole = b + torch.diag(diagonal(model)) + result.noise.damping * unit(b)
        expected = oracle.power(whole, -0.5).diag()
        draw = torch.Generator().manual_seed(0)
        draws = torch.stack([flatten(draw_noise(shape, like, 1.0, draw)) for _ in range(10_000)])
        error = expected * math.sqrt(2 / 10_000)
        assert float(((draws.square().mean(0) - expected).abs() / error).max()) < 5

    def test_trade_off_is_of_the_loss_alone(self) -> None:
        """tr(B (B + D)^-2p) without D, which the retained loss does not have."""
        model, data = prepared("mlp")
        problem = Problem.of(model, data, [0], weight_decay=PATTERNS, structure="dense")
        shape = decayed(problem.curvature, problem.weight_decay, 0.1)
        found = calibrate_noise(
            problem.objective,
            problem.split,
            shape,
            problem.objective.start,
            target=NoiseTarget(trade_off=0.1),
            error=0.01,
        )
        like = oracle.start(model)
        size = len(flatten(like))
        b = torch.stack(
            [
                flatten(problem.curvature.power(unflatten(e, like), 1.0))
                for e in torch.eye(size).double()
            ],
            1,
        )
        whole = b + torch.diag(diagonal(model)) + 0.1 * unit(b)
        root = oracle.power(whole, 0.5).trace(), (b @ oracle.power(whole, -0.5)).trace()
        expected = (0.1 * 0.01**2 * float(root[0]) / float(root[1])) ** 0.25
        assert found.scale == pytest.approx(expected, rel=0.1)

    def test_prepare_and_its_folder(self, tmp_path: Path) -> None:
        model, data = prepared("residual")
        quiet: Any = {"steps": 1, "damping": 0.1, "noise": None, "drift": False}
        shared: Any = {"weight_decay": PATTERNS, "progress": False, "max_samples": None}
        ready = prepare(model, data, folder=tmp_path, limits=Limits(1.0, 1.0), **shared)
        found = ready.forget([0, 2], **quiet).newton.params
        plain = forget(model, data, [0, 2], **shared, **quiet).newton.params
        assert relative(flatten(found), flatten(plain)) < 1e-6
        assert prepare(model, data, folder=tmp_path, **shared).forgotten.tolist() == [0, 2]
        turned = {"[h2]*": 0.3, "*bias": 0.0, "*": 0.05}
        with pytest.raises(StorageError):
            prepare(model, data, folder=tmp_path, weight_decay=turned, progress=False)

    def test_influence(self) -> None:
        """The fixed point of the series: (H + gamma I + diag(wd))^-1 v."""
        model, data = prepared("mlp")
        split = resolve_split(data, [0])
        kept = len(data) - 1
        method = METHODS["influence-lissa"](
            weight_decay=PATTERNS,
            damping=0.5,
            scale=5.0,
            steps=600,
            repeats=1,
            batch_size=kept,
            curvature="ggn",
        )
        found, like = method.unlearn(model, split).model, oracle.start(model)
        x, y = data.tensors
        b = oracle.ggn(model, x[1:], y[1:], Categorical())
        losses = Categorical().losses(model(x), y)
        pull = torch.autograd.grad(losses.mean() - losses[1:].mean(), list(model.parameters()))
        matrix = b + torch.diag(diagonal(model)) + 0.5 * unit(b)
        step = torch.linalg.solve(matrix, torch.cat([g.reshape(-1) for g in pull]))
        moved = flatten(oracle.start(found)) - flatten(like)
        assert relative(moved, step) < 1e-4

    @pytest.mark.parametrize("name", ["ntk", "finetune", "retrain"])
    def test_methods_that_take_a_number_say_so(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"weight_decay=.*expected a number"):
            METHODS[name](weight_decay=PATTERNS)

    def test_a_recipe(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(
            "name: decay\nforget_sets: [{name: some, kind: random, count: 2}]\n"
            'forget: {weight_decay: {"*.weight": 5e-4, "*.bias": 0}}\n'
        )
        expected = {"*.weight": 5e-4, "*.bias": 0.0}
        config = load_config(path)
        assert config.forget_options(0).weight_decay == expected
        assert to_plain(config)["forget"]["weight_decay"] == expected
        by_flag = load_config(path, ["--forget.weight_decay", '{"*": 0.1}'])
        assert by_flag.forget_options(0).weight_decay == {"*": 0.1}
        assert isinstance(config, RunConfig)
        path.write_text(path.read_text().replace("5e-4", "-1"))
        with pytest.raises(ConfigError, match="weight_decay"):
            load_config(path)
