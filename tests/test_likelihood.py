"""Likelihoods against autograd in float64, against distributions of SciPy and torch, and against
their own chunks.

Random columns are tested with a fixed seed: a test that passes goes on passing. The stated
false-alarm rates say how likely a *correct* implementation would have been to fail at the seed that
was picked first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.likelihood import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    named,
    resolve_likelihood,
)
from fisher_forget.likelihood.streams import Streams

SIGMAS = 5.0  # standard errors; two-sided normal tail 5.7e-7 for each entry looked at
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams(outputs: Tensor, seed: int = 0) -> Streams:
    """Those of the first samples of a data set."""
    return Streams(seed, torch.arange(len(outputs)))


def classes(*shape: int, count: int, ignored: tuple[tuple[int, ...], ...] = ()) -> Tensor:
    targets = torch.randint(0, count, shape, generator=torch.Generator().manual_seed(1))
    for at in ignored:
        targets[at] = -100
    return targets


def fractions(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# name: likelihood, outputs, targets
CASES: dict[str, tuple[Likelihood, Tensor, Tensor]] = {
    "classes": (Categorical(), 2 * randn(4, 5), classes(4, count=5)),
    "two classes": (Categorical(), 2 * randn(3, 2), classes(3, count=2)),
    "probabilities": (Categorical(), randn(3, 4), randn(3, 4, seed=1).softmax(-1)),
    "sequences": (Categorical(), randn(3, 4, 3), classes(3, 4, count=3)),
    "padded": (
        Categorical(),
        randn(3, 4, 3),
        classes(3, 4, count=3, ignored=((0, 3), (1, 0), (1, 1), (2, 2))),
    ),
    "all padding": (
        Categorical(),
        randn(2, 2, 3),
        classes(2, 2, count=3, ignored=((0, 0), (0, 1))),
    ),
    "padded with a class": (Categorical(ignore_index=1), randn(3, 4, 3), classes(3, 4, count=3)),
    "images of classes": (
        Categorical(),
        randn(2, 2, 2, 3),
        classes(2, 2, 2, count=3, ignored=((1, 0, 1),)),
    ),
    "sequences of probabilities": (
        Categorical(),
        randn(2, 3, 3),
        randn(2, 3, 3, seed=1).softmax(-1),
    ),
    "confident": (
        Categorical(),
        torch.tensor([[50.0, -50, 0], [-50, 50, 50], [0, 0, -50]]).double(),
        torch.arange(3),
    ),
    "labels": (Bernoulli(), 2 * randn(4, 3), (fractions(4, 3) < 0.5).double()),
    "soft labels": (Bernoulli(), randn(3, 2), fractions(3, 2)),
    "boolean labels": (Bernoulli(), randn(3, 2), fractions(3, 2) < 0.5),
    "sequences of labels": (Bernoulli(), randn(2, 3, 2), (fractions(2, 3, 2) < 0.5).double()),
    "confident labels": (
        Bernoulli(),
        torch.tensor([[50.0, -50], [-50, 0]]).double(),
        torch.eye(2).double(),
    ),
    "means": (Gaussian(), randn(4, 3), randn(4, 3, seed=1)),
    "narrow means": (Gaussian(0.2), randn(4, 1), randn(4, 1, seed=1)),
    "sequences of means": (Gaussian(3.0), randn(2, 3, 2), randn(2, 3, 2, seed=1)),
    "mean of means": (LIKELIHOODS["mse"], randn(4, 3), randn(4, 3, seed=1)),
    "mean of narrow means": (Gaussian(0.2, "mean"), randn(2, 3, 2), randn(2, 3, 2, seed=1)),
    "targets without the single output": (Gaussian(), randn(4, 1), randn(4, seed=1)),
    "masks without the single channel": (
        Bernoulli(reduction="mean"),
        randn(3, 1, 2, 2),
        (fractions(3, 2, 2) < 0.5).double(),
    ),
    "mean of labels": (LIKELIHOODS["bce"], randn(4, 3), (fractions(4, 3) < 0.5).double()),
    "weighted labels": (
        Bernoulli(pos_weight=(0.5, 3.0, 1.0)),
        randn(4, 3),
        (fractions(4, 3) < 0.5).double(),
    ),
    "mean of weighted soft labels": (Bernoulli("mean", 4.0), randn(2, 3, 2), fractions(2, 3, 2)),
    "weighted classes": (
        Categorical(weight=(0.5, 2, 0, 1.5, 1)),
        2 * randn(4, 5),
        classes(4, count=5),
    ),
    "smoothed": (Categorical(label_smoothing=0.1), 2 * randn(4, 5), classes(4, count=5)),
    "weighted, smoothed and padded": (
        Categorical(weight=(0.2, 1, 3), label_smoothing=0.3),
        randn(3, 4, 3),
        classes(3, 4, count=3, ignored=((0, 3), (1, 0), (1, 1), (2, 2))),
    ),
    "weighted and smoothed probabilities": (
        Categorical(weight=(0.2, 1, 3, 2), label_smoothing=0.3),
        randn(3, 4),
        randn(3, 4, seed=1).softmax(-1),
    ),
    "classes first": (
        Categorical(class_dim=1),
        randn(2, 3, 2, 2),
        classes(2, 2, 2, count=3, ignored=((1, 0, 1),)),
    ),
    "classes first, as many as positions": (
        Categorical(class_dim=1, weight=(1, 2, 3)),
        randn(2, 3, 3),
        classes(2, 3, count=3, ignored=((1, 0),)),
    ),
    "probabilities of classes first": (
        Categorical(class_dim=1, label_smoothing=0.2),
        randn(2, 3, 2),
        randn(2, 3, 2, seed=1).softmax(1),
    ),
    "next token": (LIKELIHOODS["next_token"], randn(3, 4, 3), classes(3, 4, count=3)),
    "next token, padded": (
        Categorical(shift=True, weight=(0.2, 1, 3), label_smoothing=0.1),
        randn(3, 4, 3),
        classes(3, 4, count=3, ignored=((0, 3), (1, 0), (1, 1), (2, 2))),
    ),
    "masked classes": (
        Categorical(),
        randn(4, 5).index_fill(1, torch.tensor([1, 4]), -math.inf),
        torch.tensor([0, 2, 3, 0]),
    ),
    "masked classes of a sequence": (
        Categorical(weight=(1, 0.5, 2), class_dim=-1),
        randn(2, 3, 3).index_fill(2, torch.tensor([2]), -math.inf),
        torch.tensor([[0, 1, 1], [1, -100, 0]]),
    ),
    "probabilities with masked classes": (
        Categorical(),
        randn(2, 3).index_fill(1, torch.tensor([0]), -math.inf),
        torch.tensor([[0, 0.3, 0.7], [0, 1, 0]]).double(),
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[Likelihood, Tensor, Tensor]:
    return CASES[request.param]


def plain_loss(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """-log p(y | f) of one sample, written from the definition; constants as documented."""
    if isinstance(likelihood, Gaussian):
        loss = (y - f.view(y.shape)) ** 2 / (2 * likelihood.sigma**2)
        return loss.sum() / (y.numel() if likelihood.reduction == "mean" else 1)
    if isinstance(likelihood, Bernoulli):
        y = y.double()
        a = torch.tensor(likelihood.pos_weight or 1.0, dtype=torch.float64)
        loss = a * y * torch.log1p(torch.exp(-f)) + (1 - y) * torch.log1p(torch.exp(f))
        return loss.sum() / (y.numel() if likelihood.reduction == "mean" else 1)
    if likelihood.class_dim == 1:  # a sample has no batch dimension
        f, y = f.movedim(0, -1), y.movedim(0, -1) if y.is_floating_point() else y
    if likelihood.shift:
        f, y = f[:-1], y[1:]
    f = f.reshape(-1, f.shape[-1])
    w = torch.tensor(likelihood.weight or (1.0,) * f.shape[-1], dtype=torch.float64)
    e = likelihood.label_smoothing
    total = f.new_zeros(())
    labels = y.reshape(f.shape) if y.is_floating_point() else y.flatten()
    for row, label in zip(f, labels, strict=True):
        if label.dim() or label != likelihood.ignore_index:
            one = label if label.dim() else torch.eye(len(row)).double()[label]
            t = w * ((1 - e) * one + e / len(row))
            there = row.isfinite()  # a class that is masked out has no part in the softmax
            total = total + t.sum() * row[there].logsumexp(0) - (t * row)[there].sum()
    return total


def hessians(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Autograd's Hessian [d, d] of each sample's loss."""
    found = []
    for f, y in zip(outputs, targets, strict=True):
        h = torch.autograd.functional.hessian(lambda f, y=y: plain_loss(likelihood, f, y), f)
        found.append(h.reshape(f.numel(), f.numel()))
    return found


def moments(columns: Tensor) -> Tensor:
    """sum_k S_k S_k^T of columns [K, B, ...]: [B, d, d]."""
    flat = columns.flatten(2)
    return torch.einsum("kbi,kbj->bij", flat, flat)


class TestDerivatives:
    def test_losses(self, case):
        likelihood, outputs, targets = case
        truth = torch.stack(
            [plain_loss(likelihood, f, y) for f, y in zip(outputs, targets, strict=True)]
        )
        found = likelihood.losses(outputs, targets)
        assert found.shape == (len(outputs),)
        torch.testing.assert_close(found, truth, **FLOAT64)

    def test_residual_is_the_gradient(self, case):
        likelihood, outputs, targets = case
        leaf = outputs.clone().requires_grad_()
        (truth,) = torch.autograd.grad(likelihood.losses(leaf, targets).sum(), leaf)
        torch.testing.assert_close(likelihood.residual(outputs, targets), truth, **FLOAT64)

    def test_hessian_product(self, case):
        likelihood, outputs, targets = case
        vector = randn(*outputs.shape, seed=3)
        found = likelihood.hessian_product(outputs, vector, targets)
        for h, v, hv in zip(hessians(likelihood, outputs, targets), vector, found, strict=True):
            torch.testing.assert_close(hv.flatten(), h @ v.flatten(), **FLOAT64)

    def test_columns(self, case):
        likelihood, outputs, targets = case
        columns = torch.stack(list(likelihood.columns(outputs, targets)))
        assert len(columns) == likelihood.column_count(outputs)
        assert columns.shape[1:] == outputs.shape
        torch.testing.assert_close(
            moments(columns), torch.stack(hessians(likelihood, outputs, targets)), **FLOAT64
        )

    def test_output_curvature_is_the_trace(self, case):
        likelihood, outputs, targets = case
        truth = torch.stack([h.trace() for h in hessians(likelihood, outputs, targets)])
        found = likelihood.output_curvature(outputs, targets).double()
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-12)

    def test_one_column_fewer_than_classes(self):
        assert Categorical().column_count(randn(2, 7)) == 6
        assert Categorical().column_count(randn(2, 5, 7)) == 30
        assert Bernoulli().column_count(randn(2, 7)) == Gaussian().column_count(randn(2, 7)) == 7

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_logits_stay_finite(self, dtype):
        for f in itertools.product((-50.0, 0.0, 50.0), repeat=3):
            outputs = torch.tensor([f], dtype=dtype)
            for likelihood, targets in (
                (Categorical(), torch.tensor([1])),
                (Bernoulli(), torch.tensor([[1.0, 0, 1]])),
            ):
                everything = [
                    likelihood.losses(
                        outputs, targets.to(dtype) if targets.is_floating_point() else targets
                    ),
                    likelihood.residual(outputs, targets),
                    *likelihood.columns(outputs, targets),
                    likelihood.sketch(outputs, 2, streams(outputs), targets),
                    likelihood.sampled(outputs, 2, streams(outputs), targets),
                    likelihood.kl(outputs, -outputs),
                ]
                assert all(bool(torch.isfinite(t).all()) for t in everything), f
                exact = moments(torch.stack(list(likelihood.columns(outputs, targets))))
                truth = torch.stack(hessians(likelihood, outputs.double(), targets))
                torch.testing.assert_close(exact.double(), truth, rtol=1e-5, atol=1e-7)


RANDOM = (
    "classes",
    "two classes",
    "padded",
    "labels",
    "sequences of labels",
    "means",
    "narrow means",
    "mean of narrow means",
    "mean of weighted soft labels",
    "weighted, smoothed and padded",
    "classes first",
    "next token, padded",
    "masked classes",
)


class TestRandomColumns:
    @pytest.mark.parametrize("name", RANDOM)
    @pytest.mark.parametrize("kind", ["sketch", "sampled"])
    def test_unbiased(self, name, kind):
        """The mean of S S^T over draws is H, entry by entry.

        At most 3 x 12 x 13 / 2 = 234 different entries a case at 5 standard errors: a false-alarm
        rate below 1.4e-4 a case under normality, 2e-3 for all 14. An entry without variance (a sign
        squared) must be right to rounding.
        """
        likelihood, outputs, targets = CASES[name]
        draws = 20_000
        drawn = getattr(likelihood, kind)(outputs, draws, streams(outputs, 5), targets)
        assert drawn.shape == (draws, *outputs.shape)
        flat = drawn.flatten(2) * math.sqrt(draws)  # every draw alone
        truth = torch.stack(hessians(likelihood, outputs, targets))
        mean = torch.einsum("kbi,kbj->bij", flat, flat) / draws
        square = torch.einsum("kbi,kbj->bij", flat**2, flat**2) / draws
        error = ((square - mean**2).clamp(min=0) / draws).sqrt()
        excess = (mean - truth).abs() - SIGMAS * error
        assert float(excess.max()) < 1e-6, float(excess.max())

    def test_the_check_above_can_fail(self):
        """A sketch whose mean is 5 % too large is noticed at this number of draws."""
        likelihood, outputs, targets = CASES["classes"]
        flat = (
            1.025 * likelihood.sampled(outputs, 20_000, streams(outputs, 5), targets) * 20_000**0.5
        )
        mean, square = torch.einsum("kbi,kbi->bi", flat, flat) / 20_000, (flat**4).mean(0)
        error = ((square - mean**2) / 20_000).sqrt()
        truth = torch.stack([h.diagonal() for h in hessians(likelihood, outputs, targets)])
        assert float(((mean - truth).abs() - SIGMAS * error).max()) > 0

    def test_variance_of_the_sketch(self):
        """Var[(S^T j)^2] = 2 F^2 - 2 sum_y b_y^4 with b_y = sqrt(p_y) d ln p_y, for any direction j
        of one sample.

        Sixteen sign patterns exhaust the distribution, so nothing is random here but the order they
        come in: each is seen, and the mean over the *different* columns is exact.
        """
        logits, j = 2 * randn(1, 4), randn(4, seed=4)
        p = logits.softmax(-1)[0]
        b = p.sqrt() * (j - p @ j)  # d ln p_y / dw for f = f_0 + w j
        fisher = float((b**2).sum())
        drawn = Categorical().sketch(logits, 400, streams(logits), None)[:, 0] * 20
        patterns = torch.unique((drawn @ torch.eye(4).double()).round(decimals=10), dim=0)
        assert (
            len(patterns) == 16
        )  # a miss of any in 400 draws has probability 16 (15/16)^400 = 1e-10
        squares = (patterns @ j) ** 2
        assert float(squares.mean()) == pytest.approx(fisher, rel=1e-8)
        assert float(squares.var(unbiased=False)) == pytest.approx(
            2 * fisher**2 - 2 * float((b**4).sum()), rel=1e-7
        )

    def test_sampled_labels_follow_the_model(self):
        """Chi-square of label frequencies; false-alarm rate 1e-6."""
        logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]]).double()
        scores = Categorical().sampled(logits, 50_000, streams(logits), None)[:, 0] * 50_000**0.5
        labels = (logits.softmax(-1) - scores).argmax(-1)
        seen = torch.bincount(labels, minlength=4).numpy()
        assert stats.chisquare(seen, 50_000 * logits.softmax(-1)[0].numpy()).pvalue > 1e-6

    def test_gaussian_scores_are_normal(self):
        """Kolmogorov-Smirnov against N(0, 1/sigma^2); false-alarm rate 1e-6."""
        scores = (
            Gaussian(0.5).sampled(torch.zeros(1, 1), 20_000, streams(torch.zeros(1)), None)
            * 20_000**0.5
        )
        assert (
            stats.kstest(scores.flatten().double().numpy(), stats.norm(scale=2).cdf).pvalue > 1e-6
        )

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("kind", ["sketch", "sampled"])
    @pytest.mark.parametrize("size", [1, 2])
    def test_the_batch_size_does_not_matter(self, name, kind, size):
        likelihood, outputs, targets = CASES[name]
        draw = getattr(likelihood, kind)
        whole, rows = draw(outputs, 60, streams(outputs, 7), targets), torch.arange(len(outputs))
        chunks = zip(outputs.split(size), targets.split(size), rows.split(size), strict=True)
        parts = [draw(f, 60, Streams(7, at), y) for f, y, at in chunks]
        assert torch.equal(whole, torch.cat(parts, 1))
        other = draw(outputs, 60, streams(outputs, 8), targets)
        assert not torch.equal(whole, other)

    @pytest.mark.parametrize("kind", ["sketch", "sampled"])
    def test_nothing_at_ignored_positions(self, kind):
        likelihood, outputs, targets = CASES["padded"]
        drawn = getattr(likelihood, kind)(outputs, 4, streams(outputs), targets)
        at_rest = (drawn == 0).all(-1)
        assert torch.equal(at_rest, (targets == -100).expand_as(at_rest))


class TestKl:
    def test_categorical(self):
        p, q = 3 * randn(5, 4), 3 * randn(5, 4, seed=1)
        truth = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
        )
        torch.testing.assert_close(Categorical().kl(p, q), truth, **FLOAT64)
        entropy = [
            stats.entropy(a, b)
            for a, b in zip(p.softmax(-1).numpy(), q.softmax(-1).numpy(), strict=True)
        ]
        assert Categorical().kl(p, q).tolist() == pytest.approx(entropy)

    def test_bernoulli_sums_over_labels(self):
        p, q = 3 * randn(5, 4), 3 * randn(5, 4, seed=1)
        truth = torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(logits=p), torch.distributions.Bernoulli(logits=q)
        )
        torch.testing.assert_close(Bernoulli().kl(p, q), truth.sum(1), rtol=1e-7, atol=1e-9)

    def test_gaussian_sums_over_outputs(self):
        p, q = randn(5, 4), randn(5, 4, seed=1)
        normal = torch.distributions.Normal
        truth = torch.distributions.kl_divergence(normal(p, 0.7), normal(q, 0.7))
        torch.testing.assert_close(Gaussian(0.7).kl(p, q), truth.sum(1), **FLOAT64)

    def test_sequences_average_over_scored_positions(self):
        likelihood, p, targets = CASES["padded"]
        q = randn(*p.shape, seed=1)
        each = Categorical().kl(p.reshape(-1, 3), q.reshape(-1, 3)).view(3, 4)
        scored = (targets != -100).double()
        torch.testing.assert_close(
            likelihood.kl(p, q, targets), (each * scored).sum(1) / scored.sum(1), **FLOAT64
        )
        torch.testing.assert_close(likelihood.kl(p, q), each.mean(1), **FLOAT64)

    @pytest.mark.parametrize(
        "name", ["weighted, smoothed and padded", "next token, padded", "weighted labels"]
    )
    def test_weights_are_no_part_of_the_predictions(self, name):
        likelihood, p, targets = CASES[name]
        plain = {"weight": None, "label_smoothing": 0.0}
        if isinstance(likelihood, Bernoulli):
            plain = {"pos_weight": None}
        plain, q = dataclasses.replace(likelihood, **plain), randn(*p.shape, seed=1)
        assert torch.equal(likelihood.kl(p, q, targets), plain.kl(p, q, targets))
        assert torch.equal(likelihood.scores(p, targets), plain.scores(p, targets))

    def test_none_scored(self):
        likelihood, p, targets = CASES["all padding"]
        assert likelihood.kl(p, -p, targets)[0] == 0

    def test_between_equals_is_zero_and_otherwise_positive(self, case):
        likelihood, outputs, _ = case
        assert torch.equal(
            likelihood.kl(outputs, outputs.clone()), torch.zeros(len(outputs), dtype=torch.float64)
        )
        assert bool((likelihood.kl(outputs, outputs + randn(*outputs.shape, seed=9)) > 0).all())

    def test_float64_whatever_comes_in(self):
        for likelihood in (Categorical(), Bernoulli(), Gaussian()):
            assert likelihood.kl(torch.zeros(2, 3), torch.ones(2, 3)).dtype == torch.float64

    def test_curvature_is_its_second_order(self, case):
        """KL(f || f + e v) = e^2/2 v^T H v + O(e^3), times the scored positions.

        Without the weights of the loss, which are no part of the predictions.
        """
        likelihood, outputs, targets = case
        if not isinstance(likelihood, Gaussian):
            weight = "weight" if isinstance(likelihood, Categorical) else "pos_weight"
            likelihood = dataclasses.replace(likelihood, **{weight: None})
        v, e = randn(*outputs.shape, seed=6), 1e-4
        quadratic = (v * likelihood.hessian_product(outputs, v, targets)).flatten(1).sum(1)
        kl = likelihood.kl(outputs, outputs + e * v, targets)
        if isinstance(likelihood, Categorical):
            kl = kl * likelihood.counts(targets).clamp(min=1)
        torch.testing.assert_close(2 * kl / e**2, quadratic, rtol=2e-3, atol=1e-6)


class TestCountsAndScores:
    def test_counts(self):
        likelihood, _, targets = CASES["padded"]
        assert likelihood.counts(targets).tolist() == [3, 2, 3]
        assert Categorical().counts(CASES["sequences of probabilities"][2]).tolist() == [3, 3]
        assert Categorical().counts(torch.tensor([0, 1, -100])).tolist() == [1, 1, 0]
        for likelihood in (Bernoulli(), Gaussian()):
            assert likelihood.counts(torch.zeros(3, 4)).tolist() == [1, 1, 1]

    def test_scores(self):
        likelihood, outputs, targets = CASES["padded"]
        right = ((outputs.argmax(-1) == targets) & (targets != -100)).sum(1)
        torch.testing.assert_close(
            likelihood.scores(outputs, targets), right / torch.tensor([3.0, 2, 3]).double()
        )
        assert Bernoulli().scores(
            torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
        ).tolist() == [0.5]
        assert Gaussian().scores(
            torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
        ).tolist() == [5.0]

    def test_checks_pass(self, case):
        likelihood, outputs, targets = case
        likelihood.check(outputs, targets)


MASK = classes(4, 6, count=3, ignored=((0, 1), (2, 5), (3, 0)))
WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()
LABELS = (fractions(4, 3) < 0.5).double()

# name: likelihood, torch's own mean loss, outputs, targets
TORCH = {
    "classes": (Categorical(), nn.CrossEntropyLoss(), randn(4, 3), classes(4, count=3)),
    "weight": (
        Categorical(weight=WEIGHT),
        nn.CrossEntropyLoss(WEIGHT),
        randn(4, 3),
        classes(4, count=3, ignored=((1,),)),
    ),
    "small weights": (
        Categorical(weight=WEIGHT / 100, label_smoothing=0.2),
        nn.CrossEntropyLoss(WEIGHT / 100, label_smoothing=0.2),
        randn(4, 3),
        classes(4, count=3),
    ),
    "weight and smoothing": (
        Categorical(weight=WEIGHT, label_smoothing=0.2, class_dim=1),
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
        randn(4, 3, 6),
        MASK,
    ),
    "ignored class": (
        Categorical(ignore_index=2, class_dim=1),
        nn.CrossEntropyLoss(ignore_index=2),
        randn(4, 3, 6),
        classes(4, 6, count=3),
    ),
    "probabilities": (
        Categorical(weight=WEIGHT, label_smoothing=0.2, class_dim=1),
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
        randn(4, 3, 6),
        randn(4, 3, 6, seed=1).softmax(1),
    ),
    "next token": (
        LIKELIHOODS["next_token"],
        lambda f, y: F.cross_entropy(f[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
        randn(4, 6, 3),
        MASK,
    ),
    "mse": (LIKELIHOODS["mse"], nn.MSELoss(), randn(4, 3), randn(4, 3, seed=1)),
    "mse of images": (LIKELIHOODS["mse"], nn.MSELoss(), randn(4, 3, 2), randn(4, 3, 2, seed=1)),
    "bce": (LIKELIHOODS["bce"], nn.BCEWithLogitsLoss(), randn(4, 3), LABELS),
    "pos_weight": (
        Bernoulli("mean", WEIGHT),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        randn(4, 3),
        LABELS,
    ),
    "bernoulli": (
        Bernoulli(),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1).mean(),
        randn(4, 3),
        LABELS,
    ),
    "gaussian": (
        Gaussian(2.0),
        lambda f, y: (f - y).square().sum(1).mean() / 8,
        randn(4, 3),
        randn(4, 3, seed=1),
    ),
}


class TestTorch:
    @pytest.mark.parametrize("name", TORCH)
    def test_mean_loss(self, name):
        likelihood, loss, outputs, targets = TORCH[name]
        torch.testing.assert_close(
            likelihood.mean_loss(outputs, targets), loss(outputs, targets), **FLOAT64
        )

    @given(
        st.integers(2, 5),
        st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
        st.floats(0, 1),
        st.integers(0, 2**31),
    )
    @settings(max_examples=30, deadline=None)
    def test_any_weights_and_smoothing(self, count, weights, smoothing, seed):
        outputs, weight = randn(4, count, 2, seed=seed), torch.tensor(weights[:count]).double()
        targets = torch.randint(0, count, (4, 2), generator=torch.Generator().manual_seed(seed))
        targets[0, 1] = -100
        loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
        found = Categorical(weight=weight, label_smoothing=smoothing, class_dim=1)
        torch.testing.assert_close(
            found.mean_loss(outputs, targets), loss(outputs, targets), **FLOAT64
        )


class TestLayout:
    """Logits with the classes first, or shifted, are those with the classes last, moved."""

    @pytest.mark.parametrize("kind", ["kl", "scores", "counts", "class_mass"])
    @pytest.mark.parametrize(
        "name",
        [
            "classes first",
            "classes first, as many as positions",
            "probabilities of classes first",
            "next token",
            "next token, padded",
        ],
    )
    def test_same_as_aligned(self, name, kind):
        likelihood, outputs, targets = CASES[name]
        rows, labels = likelihood.aligned(outputs, targets)
        assert labels.shape == (rows.shape if labels.is_floating_point() else rows.shape[:-1])
        other = randn(*outputs.shape, seed=4)

        def value(of, f, g, y):
            arguments = {"kl": (f, g, y), "counts": (y,)}.get(kind, (f, y))
            return getattr(of, kind)(*arguments)

        found = value(likelihood, outputs, other, targets)
        expected = value(likelihood.of_aligned, rows, likelihood.rows(other), labels)
        torch.testing.assert_close(found, expected)

    def test_next_token_scores(self):
        """Predictions of position t are held against the token at t + 1."""
        tokens = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])
        outputs = F.one_hot(tokens.roll(-1, 1), 3).double() * 9
        likelihood = LIKELIHOODS["next_token"]
        assert likelihood.scores(outputs, tokens).tolist() == [1, 1]
        assert likelihood.counts(tokens).tolist() == [3, 3]
        assert Categorical().scores(outputs, tokens).tolist() != [1, 1]

    @pytest.mark.parametrize(
        ("outputs", "targets", "word"),
        [
            (randn(2, 3, 4, 5), classes(2, 4, 5, count=3), r"class_dim=1\)"),
            (randn(2, 3, 5), classes(2, 5, count=3), r"class_dim=1\)"),
            (randn(2, 3, 3), classes(2, 3, count=3), "class_dim=1, or class_dim=-1"),
            (randn(2, 5, 5, 5), classes(2, 5, 5, count=3), "class_dim=1, or class_dim=-1"),
            (randn(2, 3, 4), randn(2, 3, 4).softmax(1), r"class_dim=1\)"),
            (randn(2, 3, 3), torch.full((2, 3, 3), 1 / 3), "class_dim=1, or class_dim=-1"),
        ],
    )
    def test_a_layout_is_asked_for(self, outputs, targets, word):
        with pytest.raises(DataError, match=word):
            Categorical().check(outputs, targets)

    def test_what_does_not_fit(self):
        with pytest.raises(DataError, match=r"\(2, 4, 5\)"):
            Categorical(class_dim=1).check(randn(2, 3, 4, 5), classes(2, 3, 4, count=3))
        with pytest.raises(DataError, match="positions, classes"):
            Categorical(shift=True).check(randn(2, 3), classes(2, count=3))
        with pytest.raises(DataError, match="weight of 2 classes"):
            Categorical(weight=(1, 2)).check(randn(2, 3), classes(2, count=3))
        with pytest.raises(DataError, match="pos_weight of 2 labels"):
            Bernoulli(pos_weight=(1, 2)).check(randn(2, 3), torch.ones(2, 3))


class TestMaskedLogits:
    def test_refused_where_the_loss_would_be_infinite(self):
        outputs = randn(2, 3).index_fill(1, torch.tensor([1]), -math.inf)
        with pytest.raises(NumericalError, match="at the true class"):
            Categorical().check(outputs, torch.tensor([0, 1]))
        with pytest.raises(NumericalError, match="label_smoothing=0"):
            Categorical(label_smoothing=0.1).check(outputs, torch.tensor([0, 2]))
        with pytest.raises(NumericalError, match="at the true class"):
            Categorical().check(outputs, torch.full((2, 3), 1 / 3))

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_others_are_refused(self, value):
        outputs = randn(2, 3)
        outputs[0, 1] = value
        with pytest.raises(NumericalError, match="1 of 2 samples"):
            Categorical().check(outputs, torch.tensor([0, 2]))
        with pytest.raises(NumericalError, match="1 of 2 samples"):
            Categorical().check(
                outputs.index_fill(1, torch.tensor([2]), -math.inf), torch.zeros(2).long()
            )

    def test_no_class_left(self):
        outputs = torch.full((2, 3), -math.inf)
        with pytest.raises(NumericalError, match="2 of 2 samples"):
            Categorical().check(outputs, torch.tensor([-100, -100]))

    def test_same_as_without_these_classes(self):
        likelihood, outputs, targets = CASES["masked classes"]
        there = [0, 2, 3]
        fewer, moved = outputs[:, there], torch.tensor([0, 1, 2, 0])
        other = randn(*outputs.shape, seed=3).masked_fill(outputs.isneginf(), -math.inf)
        for found, expected in (
            (likelihood.losses(outputs, targets), likelihood.losses(fewer, moved)),
            (likelihood.kl(outputs, other), likelihood.kl(fewer, other[:, there])),
            (likelihood.output_curvature(outputs), likelihood.output_curvature(fewer)),
        ):
            torch.testing.assert_close(found, expected)


class TestOptions:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Categorical(label_smoothing=1.5),
            lambda: Categorical(class_dim=2),
            lambda: Categorical(class_dim=1, shift=True),
            lambda: Categorical(weight=(1, -1)),
            lambda: Categorical(weight=(0, 0)),
            lambda: Categorical(weight=[]),
            lambda: Categorical(weight=((1, 2), (1, 2))),
            lambda: Bernoulli(pos_weight=(math.nan,)),
            lambda: Bernoulli("max"),
            lambda: Gaussian(1.0, "none"),
        ],
    )
    def test_out_of_range(self, make):
        with pytest.raises(ConfigError):
            make()

    def test_weights_of_any_kind_are_equal_hashed_and_shown(self):
        kinds = (1.0, 0.5), [1, 0.5], torch.tensor([1, 0.5]), np.array([1, 0.5])
        made = [Categorical(weight=kind) for kind in kinds]
        assert len(set(made)) == 1
        assert repr(made[2]) == "Categorical(weight=(1.0, 0.5))"
        assert eval(repr(made[2])) == made[0]
        assert repr(LIKELIHOODS["bce"]) == "Bernoulli(reduction='mean')"
        assert json.loads(json.dumps(dataclasses.asdict(made[0])))["weight"] == [1, 0.5]


class TestResolve:
    def test_names_and_instances(self):
        for name, likelihood in LIKELIHOODS.items():
            assert resolve_likelihood(name) is likelihood
            assert named(dataclasses.replace(likelihood)) == name
        assert named(Gaussian(2.0)) == Gaussian(2.0)
        assert resolve_likelihood(mine := Gaussian(2.0)) is mine

    @pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
    def test_sigma(self, sigma):
        with pytest.raises(ConfigError, match="positive"):
            Gaussian(sigma)

    @pytest.mark.parametrize("what", ["normal", Gaussian, None, ["gaussian"]])
    def test_unknown(self, what):
        with pytest.raises(ConfigError, match="gaussian"):
            resolve_likelihood(what)


def test_a_likelihood_of_ones_own_needs_a_score():
    class Mine(Gaussian):
        pass

    assert isinstance(resolve_likelihood(Mine()), Mine)
    methods = {name: getattr(Gaussian, name) for name in Likelihood.__abstractmethods__}
    bare = type("Bare", (Likelihood,), methods | {"name": "bare", "score_name": "squared error"})
    with pytest.raises(ConfigError, match=r"Bare without `score`.*score = Score\("):
        resolve_likelihood(bare())
