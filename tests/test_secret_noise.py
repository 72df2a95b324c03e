"""Noise that nobody can draw again: the attacks that seeded noise falls to, and who draws it."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from scipy import stats
from torch import nn

from fisher_forget import ForgetResult, Problem, estimate_curvature, forget, newton_step, prepare
from fisher_forget.baselines import METHODS
from fisher_forget.data.split import resolve_split
from fisher_forget.params import Params, add, flatten, size
from fisher_forget.unlearn import noise_draw
from fisher_forget.unlearn.noise import noise_step
from fisher_forget.unlearn.noise_draw import draw_noise, secret_normals

DATA = blobs_data()
OPTIONS: dict[str, Any] = {"weight_decay": WEIGHT_DECAY, "drift": True, "noise": 0.05}
QUIET: dict[str, Any] = OPTIONS | {"progress": False}


def known(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(result: ForgetResult) -> Params:
    return {name: p.detach() for name, p in result.model.named_parameters()}


def r_squared(found: Params, guess: Params) -> float:
    """Of a regression through the origin: the share of the noise that the guess explains."""
    a, b = flatten(found).double(), flatten(guess).double()
    return float((a @ b).square() / ((a @ a) * (b @ b)))


def wide_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(wide_net)


pytestmark = pytest.mark.filterwarnings("ignore:Retained samples suffered")  # by the noise
# R^2 of independent directions in d = 1,603 dimensions is about a Beta(1/2, (d - 1)/2): above .02
# with probability 1e-8.
CHANCE = 0.02


class TestAttacks:
    """Released less recomputed weights, regressed on noise that the attacker draws from seeds."""

    def guesses(self, result: ForgetResult, like: Params) -> list[Params]:
        """By all that is known but the randomness: seeds, options, and the curvature itself."""
        curvature = result.noise_curvature()
        return [draw_noise(curvature, like, 1.0, known(seed)) for seed in range(5)]

    def test_one_release(self, model: nn.Module) -> None:
        recomputed = forget(model, DATA, [0, 5], **(QUIET | {"noise": None}))
        for generator, certain in ((None, False), (known(0), True)):
            result = forget(model, DATA, [0, 5], generator=generator, **QUIET)
            assert result.noise is not None
            assert result.noise.secret is not certain
            found = add(weights(result), weights(recomputed), -1)
            best = max(r_squared(found, guess) for guess in self.guesses(result, found))
            assert (best > 0.999) if certain else (best < CHANCE)

    def test_the_curvature_of_other_data_is_enough_for_seeded_noise(self, model: nn.Module) -> None:
        public = blobs_data(60, seed=9)
        result = forget(model, DATA, [0, 5], generator=known(0), **QUIET)
        near = estimate_curvature(result.model, public).damped(result.noise_curvature().tau)
        found = add(weights(result), result.corrected, -1)
        assert r_squared(found, draw_noise(near, found, 1.0, known(0))) > 0.9
        secret = forget(model, DATA, [0, 5], **QUIET)
        found = add(weights(secret), secret.corrected, -1)
        assert r_squared(found, draw_noise(near, found, 1.0, known(0))) < CHANCE

    def test_two_requests_to_one_prepared_model(self, model: nn.Module) -> None:
        """With one noise for both, the difference of the releases is that of the corrections."""
        prepared = prepare(model, DATA, progress=False, **OPTIONS)
        first, second = prepared.forget([0]), prepared.forget([5])
        one, two = (add(weights(r), r.corrected, -1) for r in (first, second))
        assert r_squared(one, two) < CHANCE
        assert first.noise is not None
        for guess in self.guesses(first, one):
            assert r_squared(one, guess) < CHANCE
        # bare is what the noise leaves as it is; independent noises add up to |noise|^2 times 2
        bare = add(first.corrected, second.corrected, -1)
        released = add(weights(first), weights(second), -1)
        hidden = flatten(add(released, bare, -1)).square().sum()
        both = first.noise.norm**2 + second.noise.norm**2  # type: ignore[union-attr]
        assert 0.5 * both < float(hidden) < 2 * both

    def test_known_generators_repeat_a_prepared_models_noise(self, model: nn.Module) -> None:
        again = [
            prepare(model, DATA, progress=False, **OPTIONS).forget([0], generator=known(3))
            for _ in range(2)
        ]
        assert torch.equal(*(flatten(weights(r)) for r in again))
        assert not any(r.noise.secret for r in again)  # type: ignore[union-attr]


class TestFresh:
    def test_every_call_draws_its_own(self, model: nn.Module) -> None:
        problem = Problem.of(model, DATA, [0, 5], weight_decay=WEIGHT_DECAY)
        newton = newton_step(problem, drift=True)
        result = forget(model, DATA, [0, 5], **QUIET)
        for draw in (
            lambda: noise_step(problem, newton, noise=0.05)[0],
            lambda: add(weights(forget(model, DATA, [0, 5], **QUIET)), result.corrected, -1),
            lambda: dict(result.with_noise(0.05).named_parameters()),
        ):
            one, two = (flatten(draw()) for _ in range(2))  # type: ignore[no-untyped-call]
            assert not (one == two).any()

    def test_seeds_change_nothing(self, model: nn.Module) -> None:
        draws = []
        for _ in range(2):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            draws.append(flatten(weights(forget(model, DATA, [0, 5], seed=0, **QUIET))))
        assert not torch.equal(*draws)

    def test_global_states_stay(self, untouched: Any, model: nn.Module) -> None:
        with untouched(model):
            forget(model, DATA, [0, 5], **QUIET)
            secret_normals(10)

    def test_a_generator_goes_on(self, model: nn.Module) -> None:
        generator = known(0)
        one, two = (forget(model, DATA, [0, 5], generator=generator, **QUIET) for _ in range(2))
        assert not torch.equal(flatten(weights(one)), flatten(weights(two)))

    def test_methods_that_are_compared_repeat_their_noise(self) -> None:
        method = METHODS["fisher-forget"](weight_decay=WEIGHT_DECAY, drift=True, noise=0.05)
        split = resolve_split(DATA, [0, 5])
        one, two = (method.unlearn(seeded(small_net), split).model for _ in range(2))
        assert all(
            torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)
        )


class TestNormals:
    def test_they_are_standard_normal(self) -> None:
        """Kolmogorov-Smirnov; the randomness cannot be seeded, so that one run in a million fails
        by chance."""
        drawn = secret_normals(200_000)
        assert drawn.dtype == torch.float64
        assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
        assert len(drawn.unique()) == len(drawn)

    @pytest.mark.parametrize(("byte", "sign"), [(b"\x00", -1), (b"\xff", 1)])
    def test_the_ends_are_finite(
        self, byte: bytes, sign: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "urandom", lambda count: byte * count)
        end = float(secret_normals(1))
        assert end == pytest.approx(sign * -stats.norm.ppf(2.0**-53), rel=1e-12)

    def test_pieces_are_drawn_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(noise_draw, "CHUNK", 3)
        plain = os.urandom
        monkeypatch.setattr(os, "urandom", lambda count: asked.append(count) or plain(count))
        assert len(secret_normals(7).unique()) == 7
        assert asked == [24, 24, 8]
        assert len(secret_normals(0)) == 0

    @pytest.mark.parametrize("generator", [None, known()])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_drawn_in_double_and_rounded(self, generator: Any, dtype: torch.dtype) -> None:
        net = seeded(small_net).to(dtype)
        like = dict(net.named_parameters())
        flat = estimate_curvature(
            net, [(x.to(dtype), y) for x, y in DATA], structure="diagonal"
        ).damped(0.1)
        drawn = draw_noise(flat, like, 1.0, generator)
        assert all(p.dtype == dtype for p in drawn.values())
        assert size(drawn) == size(like)

    def test_a_generators_draw_is_the_double_one_rounded(self) -> None:
        single, double = ({"w": torch.zeros(50, dtype=t)} for t in (torch.float32, torch.float64))
        one, two = (noise_draw._normals(x["w"], known()) for x in (single, double))
        assert torch.equal(one, two.float())
