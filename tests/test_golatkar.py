"""Both published forms of Fisher forgetting against a loop over samples and classes, written from
their descriptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import (
    ConfigError,
    CurvatureError,
    FisherForgetError,
    ModelError,
    SplitError,
)
from fisher_forget.baselines.golatkar import Draws, GolatkarCode, GolatkarPaper
from fisher_forget.curvature.operator import Info
from fisher_forget.data.split import resolve_split

CLASSES, SAMPLES = 3, 15
CLASS_1, SOME = list(range(1, SAMPLES, CLASSES)), [0, 4, 5]  # samples take turns at the classes


def paper(model: nn.Module, data: Any, forgotten: Any, **settings: Any) -> Draws:
    return GolatkarPaper(**settings).draws(model, resolve_split(data, forgotten))


def code(model: nn.Module, data: Any, forgotten: Any, **settings: Any) -> Draws:
    return GolatkarCode(**settings).draws(model, resolve_split(data, forgotten))


def images(width: int = 6) -> tuple[nn.Module, TensorDataset]:
    """A small CNN in float64; with `width` = CLASSES a hidden layer is as wide as the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.3  # larger gradients, on both sides of every clamp
    x = torch.randn(SAMPLES, 1, 5, 5, dtype=torch.float64)
    return model.double().eval(), TensorDataset(x, torch.arange(SAMPLES) % CLASSES)


def fisher(model: nn.Module, data: TensorDataset, forgotten: list[int]) -> list[Tensor]:
    """(1/n_r) sum_n sum_y p_ny (d log p_ny / dw)^2 with batches of one sample and one backward pass
    a class."""
    retained = [n for n in range(SAMPLES) if n not in forgotten]
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for n in retained:
        logp = model(data.tensors[0][n : n + 1])[0].log_softmax(-1)
        for y in range(CLASSES):
            grads = torch.autograd.grad(logp[y], list(model.parameters()), retain_graph=True)
            for total, grad in zip(sums, grads, strict=True):
                total += logp[y].detach().exp() * grad**2
    return [total / len(retained) for total in sums]


def normals(model: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def assert_weights(found: nn.Module, expected: list[Tensor]) -> None:
    for (name, p), value in zip(found.named_parameters(), expected, strict=True):
        assert torch.allclose(p, value, rtol=1e-5, atol=1e-12), name


@pytest.mark.parametrize("forgotten", [CLASS_1, SOME])
def test_paper(forgotten: list[int]) -> None:
    model, data = images()
    draws = paper(model, DataLoader(data, batch_size=4), forgotten, scale=0.02, seed=3)
    roots = [(f + 1e-8) ** -0.25 for f in fisher(model, data, forgotten)]
    for scale, seed, found in ((0.02, 3, draws.model()), (0.3, 8, draws.model(0.3, 8))):
        xi = normals(model, seed)
        expected = [
            p + scale * r * z for p, r, z in zip(model.parameters(), roots, xi, strict=True)
        ]
        assert_weights(found, expected)


def test_tau_of_the_paper() -> None:
    model, data = images()
    draws = paper(model, data, SOME, scale=0.02, tau=0.01)
    parts = zip(model.parameters(), fisher(model, data, SOME), normals(model, 0), strict=True)
    assert_weights(draws.model(), [p + 0.02 * (f + 0.01) ** -0.25 * z for p, f, z in parts])


def by_the_code(
    model: nn.Module, fishers: list[Tensor], reset: int | None, alpha: float, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Row by row of every tensor, what the public code does to it: expected weights and
    variances."""
    weights, variances = [], []
    for p, f, xi in zip(model.parameters(), fishers, normals(model, seed), strict=True):
        last = p.shape[0] == CLASSES
        rows, spreads = [], []
        for row in range(p.shape[0]):
            var = (
                torch.minimum(
                    1 / (f[row] + 1e-8), torch.tensor(1e2 if last else 1e3, dtype=f.dtype)
                )
                * alpha
            )
            if p.dim() > 1:  # dimension 1 of the tensor is dimension 0 of its row
                var = torch.zeros_like(var) + sum(var) / len(var)
            mu = p[row].detach()
            if last and row == reset:
                mu, var = torch.zeros_like(mu), torch.full_like(var, 1e-4)
            if last or p.dim() == 1:
                var = 10 * var
            rows.append(mu + var**0.5 * xi[row])
            spreads.append(var)
        weights.append(torch.stack(rows))
        variances.append(torch.stack(spreads))
    return weights, variances


@pytest.mark.parametrize("width", [6, CLASSES])
@pytest.mark.parametrize(
    ("forgotten", "asked", "reset"),
    [(CLASS_1, "auto", 1), (SOME, "auto", None), (CLASS_1, None, None), (SOME, 2, 2)],
)
def test_the_public_code(forgotten: list[int], asked: Any, reset: int | None, width: int) -> None:
    model, data = images(width)
    loader = DataLoader(data, batch_size=4)
    draws = code(model, loader, forgotten, forgotten_class=asked, seed=3)
    assert (draws.classes, draws.method.forgotten_class) == (CLASSES, reset)
    fishers = fisher(model, data, forgotten)
    for alpha, seed, found in ((3e-6, 3, draws.model()), (1e-3, 8, draws.model(1e-3, 8))):
        expected, variances = by_the_code(model, fishers, reset, alpha, seed)
        assert_weights(found, expected)
    if reset is not None:
        assert all(
            bool((v[reset] == 1e-3).all()) for v in variances[-2:]
        )  # 1e-4, then the factor of the last layer


def test_every_clamp_of_the_public_code_matters_here() -> None:
    model, data = images()
    inverse = [1 / (f + 1e-8) for f in fisher(model, data, SOME)]
    for values in inverse[:3]:
        assert bool((values > 1e3).any())
        assert bool((values < 1e3).any())
    weight, _ = inverse[-2:]
    assert bool(((weight > 1e2) & (weight < 1e3)).any())
    assert bool((weight < 1e2).any())


@pytest.mark.parametrize("method", [GolatkarPaper(scale=1e-2), GolatkarCode(alpha=1e-4)], ids=str)
class TestLaws:
    def draws(self, method: Any, model: nn.Module, data: Any, forgotten: Any) -> Draws:
        found: Draws = method.draws(model, resolve_split(data, forgotten))
        return found

    def test_one_estimate_serves_every_scale(self, method: Any) -> None:
        model, data = images()
        draws = self.draws(method, model, data, CLASS_1)
        assert draws.fisher.info == Info(SAMPLES - len(CLASS_1), "exact", "diagonal")
        other = replace(method, **{method.scale_name: 0.5}, seed=4)
        again = self.draws(other, model, data, CLASS_1).model()
        assert_weights(draws.model(0.5, seed=4), list(again.parameters()))

    def test_nothing_given_is_changed(self, method: Any, untouched: Callable[..., Any]) -> None:
        model, data = images()
        with untouched(model):
            drawn = self.draws(method, model, data, SOME).model()
        assert all(p.grad is None and p.requires_grad for p in drawn.parameters())
        assert not {p.data_ptr() for p in drawn.parameters()} & {
            p.data_ptr() for p in model.parameters()
        }

    def test_draws_depend_on_scale_and_seed_alone(self, method: Any) -> None:
        model, data = images()
        draws = self.draws(method, model, data, SOME)
        first, again, other = (
            nn.utils.parameters_to_vector(draws.model(seed=s).parameters()) for s in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        none = draws.model(0)
        assert all(
            torch.equal(a, b) for a, b in zip(none.parameters(), model.parameters(), strict=True)
        )

    def test_later_changes_of_the_model_do_not_matter(self, method: Any) -> None:
        model, data = images()
        draws = self.draws(method, model, data, SOME)
        before = draws.model()
        with torch.no_grad():
            for p in model.parameters():
                p += 1
        assert_weights(draws.model(), list(before.parameters()))

    def test_running_statistics_and_frozen_parameters_stay(self, method: Any) -> None:
        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

        model, data = seeded(build), blobs_data()
        model[1].running_mean.fill_(0.3)
        model[0].weight.requires_grad_(False)
        drawn = self.draws(method, model, data, SOME).model()
        assert all(torch.equal(a, b) for a, b in zip(drawn.buffers(), model.buffers(), strict=True))
        moved = {
            n for n, p in drawn.named_parameters() if not torch.equal(p, model.get_parameter(n))
        }
        assert moved == {n for n, _ in model.named_parameters()} - {"0.weight"}
        assert not drawn.training


class TestForgottenClass:
    def found(self, data: Any, forgotten: Any) -> int | None:
        method: Any = code(seeded(small_net), data, forgotten).method
        found: int | None = method.forgotten_class
        return found

    def test_all_of_one_class(self) -> None:
        data = blobs_data()
        assert self.found(data, range(2, 60, 3)) == 2

    @pytest.mark.parametrize("forgotten", [range(2, 57, 3), [*range(2, 60, 3), 0], [0, 1]])
    def test_fewer_or_more(self, forgotten: Any) -> None:
        assert self.found(blobs_data(), forgotten) is None

    def test_of_what_the_loader_holds(self) -> None:
        """A sample that is neither retained nor forgotten is no sample of the class."""
        data = Subset(blobs_data(), [n for n in range(60) if n != 5])
        assert self.found(DataLoader(data), [n for n in range(2, 60, 3) if n != 5]) == 2

    def test_probabilities_have_no_class(self) -> None:
        x, y = blobs_data().tensors
        assert (
            self.found(TensorDataset(x, nn.functional.one_hot(y, 3).float()), range(2, 60, 3))
            is None
        )


@pytest.mark.parametrize(
    ("error", "word", "options"),
    [
        (ConfigError, "alpha=-1", {"alpha": -1}),
        (ConfigError, "alpha=nan", {"alpha": math.nan}),
        (ConfigError, "alpha=True", {"alpha": True}),
        (ConfigError, "alpha='big'", {"alpha": "big"}),
        (ConfigError, "seed=-1", {"seed": -1}),
        (ConfigError, "seed=0.5", {"seed": 0.5}),
        (ConfigError, "0 to 2", {"forgotten_class": 3}),
        (ConfigError, "0 to 2", {"forgotten_class": -1}),
        (ConfigError, "forgotten_class=True", {"forgotten_class": True}),
        (ConfigError, "forgotten_class='first'", {"forgotten_class": "first"}),
        (ConfigError, "golatkar-paper", {"likelihood": "gaussian"}),
        (ConfigError, "'categorical'", {"likelihood": "bernoulli"}),
        (SplitError, "empty", {"forget_idx": []}),
        (SplitError, "60", {"forget_idx": [60]}),
        (ModelError, "eval", {"model": nn.Sequential(nn.Linear(4, 3), nn.Dropout())}),
        (
            FisherForgetError,
            "logits",
            {"model": nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)).eval()},
        ),
    ],
)
def test_the_public_code_refuses(
    error: type[Exception], word: str, options: dict[str, Any], untouched: Callable[..., Any]
) -> None:
    model = options.pop("model", None) or seeded(small_net)
    with untouched(model), pytest.raises(error, match=word):
        code(model, blobs_data(), options.pop("forget_idx", [0, 5]), **options)


@pytest.mark.parametrize(
    ("error", "word", "options"),
    [
        (ConfigError, "scale=-0.1", {"scale": -0.1}),
        (ConfigError, "scale=inf", {"scale": math.inf}),
        (ConfigError, "tau=-1", {"tau": -1}),
        (ConfigError, "tau=nan", {"tau": math.nan}),
        (ConfigError, "seed=None", {"seed": None}),
        (ConfigError, "poisson", {"likelihood": "poisson"}),
        (SplitError, "every sample", {"forget_idx": range(60)}),
    ],
)
def test_the_paper_refuses(
    error: type[Exception], word: str, options: dict[str, Any], untouched: Callable[..., Any]
) -> None:
    model = seeded(small_net)
    asked: dict[str, Any] = {"scale": 1.0} | options
    with untouched(model), pytest.raises(error, match=word):
        paper(model, blobs_data(), asked.pop("forget_idx", [0, 5]), **asked)


def test_draws_refuse_too() -> None:
    draws = paper(seeded(small_net), blobs_data(), [0, 5], scale=np.float32(0.1))
    for scale, seed in ((-1, 0), (0.1, -1)):
        with pytest.raises(ConfigError):
            draws.model(scale, seed)


def test_without_tau_a_weight_that_nothing_uses_is_refused() -> None:
    model, data = seeded(small_net), blobs_data()
    with torch.no_grad():
        model[2].weight[:, 0] = 0  # what feeds this hidden unit gets no gradient
    with pytest.raises(CurvatureError, match="Damp it first"):
        paper(model, data, [0, 5], scale=0.1, tau=0.0).model()


def test_the_paper_takes_other_likelihoods() -> None:
    x, _ = blobs_data().tensors
    targets = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    for likelihood in ("gaussian", "bernoulli"):
        data = TensorDataset(x, targets)
        draws = paper(seeded(small_net), data, [0], scale=0.1, likelihood=likelihood)
        assert all(bool(torch.isfinite(p).all()) for p in draws.model().parameters())
