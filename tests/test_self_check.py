"""What a result says of itself: held against counts by hand, SciPy, and its own false alarms."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from problems import problem_of
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fisher_forget import (
    Categorical,
    ConfigError,
    FisherForgetWarning,
    ForgetOptions,
    Gaussian,
    Limits,
    estimate_curvature,
    forget,
    prepare,
)
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params, detached
from fisher_forget.unlearn.forget import scrub
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.self_check import (
    LEVEL,
    RELABELLINGS,
    Answers,
    Finding,
    SelfCheck,
    _retained,
    compared,
    self_check,
    still_recognised,
)

QUIET: dict[str, Any] = {"progress": False, "weight_decay": WEIGHT_DECAY, "drift": True}


def answers(losses: Any, labels: Any = 0.0, likelihood: Likelihood | None = None) -> Answers:
    """Made-up ones; who loses less than ln 2 is right."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    labels = torch.as_tensor(labels, dtype=torch.float64).expand(len(losses))
    right = (losses < math.log(2)).double()
    return Answers(likelihood or Categorical(), losses, torch.ones_like(losses), right, labels)


class TestCompared:
    def test_scipy(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.exponential(1.0, 25), rng.exponential(1.6, 40)
        found = compared(answers(a), answers(b))
        theirs = stats.permutation_test(
            (a, b), lambda x, y: x.mean() - y.mean(), n_resamples=20_000, rng=rng
        )
        assert found is not None
        assert (found.ours, found.others) == pytest.approx((a.mean(), b.mean()))
        # two estimates of one p-value, to four standard errors of the coarser one
        p = float(theirs.pvalue)
        assert abs(found.p_value - p) < 4 * 2 * math.sqrt(p / 2 / RELABELLINGS)
        limit = np.quantile(np.abs(theirs.null_distribution), 1 - LEVEL)
        assert found.visible == pytest.approx(limit, rel=0.1)

    @pytest.mark.parametrize("worse", [0.0, 1.5, -1.5])
    def test_false_alarms_and_power(self, worse: float) -> None:
        """Classes of very different losses, and shares of them that differ between the groups."""
        rng, alarms, runs = np.random.default_rng(1), 0, 40
        for run in range(runs):
            a, b = rng.choice(2, 40, p=[0.2, 0.8]), rng.choice(2, 60, p=[0.7, 0.3])
            ours, others = (np.exp(rng.normal(3 * x)) for x in (a, b))
            found = compared(answers(ours * math.exp(worse), a), answers(others, b), run)
            assert found is not None
            alarms += found.p_value <= LEVEL
        if worse:
            assert alarms > 0.8 * runs
        else:  # more with a probability of 3e-4, if the level is LEVEL
            assert alarms <= stats.binom.isf(1e-3, runs, LEVEL)

    def test_no_class_in_common(self) -> None:
        assert compared(answers([1.0], 1.0), answers([1.0], 2.0)) is None

    def test_all_alike(self) -> None:
        """Saturated losses, which differ by nothing or by rounding, are no difference."""
        found = compared(answers([0.1] * 7), answers([0.1 + 1e-17] * 9))
        assert found is not None
        assert found.p_value == 1


class TestAnswers:
    @pytest.mark.parametrize("size", [3, 8])
    def test_means_are_those_of_torch(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 5, (8, 6), generator=generator)
        ids[3:, 4:], ids[7] = -100, -100  # padding, and a sample without any target
        data = TensorDataset(torch.randn(8, 6, 4, generator=generator), ids)
        split = Split(data, np.arange(8), np.zeros(0, np.int64), size)
        net = seeded(lambda: nn.Linear(4, 5))
        found = Answers.of(Objective(net, Categorical()), split, "retain", {}, 0)
        logits = net(data.tensors[0]).detach()
        assert found.loss == pytest.approx(
            float(F.cross_entropy(logits.flatten(0, 1), ids.view(-1)))
        )
        hits = (logits.argmax(-1) == ids).double()[:7]
        assert found.score == pytest.approx(float((hits.sum(1) / (ids[:7] >= 0).sum(1)).mean()))
        assert found.labels.tolist() == [0.0] * 8

    def test_labels(self, blobs: TensorDataset) -> None:
        x, y = blobs.tensors
        soft = TensorDataset(x, F.one_hot(y, 3).float())
        for data in (blobs, soft):
            split = resolve_split(data, [], allow_empty=True)
            found = Answers.of(Objective(small_net(), Categorical()), split, "retain", {}, 0)
            assert found.labels.tolist() == y.tolist()


class TestStillRecognised:
    def test_count(self, blobs: TensorDataset, trained: nn.Module) -> None:
        x, y = blobs.tensors
        objective, split = Objective(trained, Categorical()), resolve_split(blobs, range(40))
        found = still_recognised(objective, split.batches("forget"), objective.start, (0, 2))
        guess, wanted = trained(x[:40]).argmax(1), y[:40] != 1
        assert found == pytest.approx(float((guess == y[:40])[wanted].float().mean()))
        assert math.isnan(still_recognised(objective, split.batches("forget"), {}, (7,)))

    def test_tokens(self) -> None:
        """Each position counts, against the token that follows it."""
        ids = torch.tensor([[0, 3, 1, 3], [3, 2, 3, 0]])
        data = TensorDataset(ids, ids)
        net = nn.Embedding.from_pretrained(torch.eye(4).roll(-1, 1))  # predicts token + 3 mod 4
        objective = Objective(nn.Sequential(net).requires_grad_(True), Categorical(shift=True))
        batches = list(resolve_split(data, [0]).batches("all"))
        # 0 -> 3 is right, 1 -> 3 and 2 -> 3 are not
        assert still_recognised(objective, batches, objective.start, (3,)) == pytest.approx(1 / 3)


def check_of(
    model: nn.Module, at: Params, data: TensorDataset, idx: Any, **options: Any
) -> SelfCheck:
    """Of weights that replace the model's."""
    problem = Problem.of(model, data, idx, **QUIET)
    objective, split = problem.objective, problem.split
    before, after = (
        {part: Answers.of(objective, split, part, w, 0) for part in ("retain", "forget")}
        for w in (objective.start, at)
    )
    return self_check(problem, (before, after), at, **options)  # type: ignore[arg-type]


def named(check: SelfCheck, name: str) -> Finding:
    return next(finding for finding in check.findings if finding.name == name)


def weights(model: nn.Module) -> Params:
    return detached(dict(model.named_parameters()))


def overfitted(data: TensorDataset, idx: Any, seed: int = 0) -> nn.Module:
    """A wide network without weight decay, on some samples, until it knows them by heart."""
    x, y = (t[torch.as_tensor(idx)] for t in data.tensors)
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)), seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(True)


@pytest.fixture(scope="module")
def crowded() -> TensorDataset:
    """360 samples of classes that overlap: who was seen is known, who was not is guessed."""
    return blobs_data(360, seed=3)


class TestVerdicts:
    def test_class(self, blobs: TensorDataset, trained: nn.Module) -> None:
        idx = np.flatnonzero(blobs.tensors[1] == 1)
        rest = np.setdiff1d(np.arange(60), idx)
        original = check_of(trained, weights(trained), blobs, idx)
        assert named(original, "absent classes").verdict == "wrong"
        assert "still recognised: not forgotten" in named(original, "absent classes").says
        x, y = (t[rest] for t in blobs.tensors)
        net = seeded(small_net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=WEIGHT_DECAY)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        retrained = check_of(trained, weights(net), blobs, idx)
        assert not retrained.wrong
        assert named(retrained, "absent classes").value == 0
        assert [finding.name for finding in retrained.findings] == [
            "absent classes",
            "retained samples",
        ]

    def test_label_smoothing_leaves_no_class(self, blobs: TensorDataset) -> None:
        idx = np.flatnonzero(blobs.tensors[1] == 1)
        net, smooth = seeded(small_net), Categorical(label_smoothing=0.1, weight=(1.0, 2.0, 1.0))
        problem = Problem.of(net, blobs, idx, likelihood=smooth, progress=False)
        assert problem.retained.classes.tolist() == [20, 0, 20]

    def test_samples(self, crowded: TensorDataset) -> None:
        """The original remembers them, retrained models do not, one that was led away is ruined."""
        held_out = resolve_split(blobs_data(720, seed=3), range(360))
        idx, rest = np.arange(0, 120), np.arange(120, 360)
        model = overfitted(crowded, np.arange(360))
        found = {}
        for name, net in {
            "original": model,
            "retrained": overfitted(crowded, rest, 1),
        }.items():
            check = check_of(model, weights(net), crowded, idx, held_out=held_out)
            found[name] = named(check, "unseen samples")
        assert found["original"].verdict == "wrong"
        assert "better known than unseen ones" in found["original"].says
        assert found["retrained"].verdict == "fine"
        worse = answers([3.0] * 30), answers([1.0, 2.0] * 30)
        assert compared(*worse).p_value <= LEVEL  # type: ignore[union-attr]

    def test_where_there_was_nothing_to_see_it_cannot_tell(self, crowded: TensorDataset) -> None:
        """A model that remembers nobody is not told from one that forgot."""
        held_out = resolve_split(blobs_data(720, seed=3), range(360))
        x, y = crowded.tensors
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Linear(x.shape[1], 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        check = check_of(net.eval(), weights(net), crowded, range(40), held_out=held_out)
        found = named(check, "unseen samples")
        assert found.verdict == "unknown"
        assert "neither were they by the given model" in found.says

    @pytest.mark.parametrize("damping", [1e9, 1e14])
    def test_a_step_that_rounds_away_is_none(
        self, blobs: TensorDataset, trained: nn.Module, damping: float
    ) -> None:
        options: dict[str, Any] = {"noise": None, "damping": damping, "steps": 1}
        with pytest.warns(FisherForgetWarning, match="No step was taken"):
            result = forget(trained, blobs, [1, 2], weight_decay=0.01, progress=False, **options)
        assert named(result.check, "step").verdict == "wrong"

    def test_outliers_are_not_judged(self, crowded: TensorDataset) -> None:
        """Wrong labels: held-out samples do not say what to expect of them."""
        x, y = crowded.tensors
        y = torch.where(torch.arange(360) < 60, (y + 1) % 3, y)
        data = TensorDataset(x, y)
        net = seeded(small_net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        held_out = resolve_split(crowded, [], allow_empty=True)
        check = check_of(net, weights(net), data, np.arange(60), held_out=held_out)
        assert named(check, "unseen samples").verdict == "unknown"
        assert "no chance selection" in named(check, "unseen samples").says

    def test_without_held_out_samples_it_does_not_know(
        self, blobs: TensorDataset, trained: nn.Module
    ) -> None:
        check = check_of(trained, weights(trained), blobs, range(6))
        assert named(check, "unseen samples").verdict == "unknown"
        assert "held_out=" in named(check, "unseen samples").says

    def test_no_step(self, blobs: TensorDataset, trained: nn.Module) -> None:
        check = check_of(trained, weights(trained), blobs, range(6), moved=0.0)
        assert named(check, "step").verdict == "wrong"

    @pytest.mark.parametrize(("factor", "verdict"), [(1.0, "fine"), (0.0, "wrong")])
    def test_retained(
        self, blobs: TensorDataset, trained: nn.Module, factor: float, verdict: str
    ) -> None:
        at = {name: factor * w for name, w in weights(trained).items()}
        finding = named(check_of(trained, at, blobs, range(6)), "retained samples")
        assert finding.verdict == verdict
        assert (finding.value > finding.expected) is (verdict == "wrong")
        asked = check_of(trained, at, blobs, range(6), allowed=1e9)
        assert not asked.wrong


@pytest.mark.parametrize(
    ("spread", "verdict", "says"),
    [(0.01, "wrong", "suffered"), (2.0, "unknown", "may have suffered")],
)
def test_a_rise_within_the_error_of_a_sample_is_not_called_none(
    spread: float, verdict: str, says: str
) -> None:
    rises = spread * np.random.default_rng(0).standard_normal(1000)
    rises += 0.03 - rises.mean()
    before = answers(np.full(1000, 0.1))
    found = _retained(before, answers(before.losses + torch.from_numpy(rises)), 0.1, 0.0)
    assert found.verdict == verdict
    assert found.says.startswith(f"Retained samples {says}:")
    assert found.value == pytest.approx(0.03)
    whole = _retained(before, answers(before.losses + torch.from_numpy(rises)), 1.0, 0.0)
    assert whole.verdict == "wrong"  # all were looked at: no sample, no error


class TestForget:
    def test_result_and_print_out(self, blobs: TensorDataset, trained: nn.Module) -> None:
        result = forget(trained, blobs, range(6), held_out=blobs_data(60, seed=0), **QUIET)
        assert {f.name for f in result.check.findings} == {"unseen samples", "retained samples"}
        assert json.loads(json.dumps(result.summary()["check"]))[0]["name"] == "unseen samples"
        assert "check" in str(result)
        x, y = (t[6:] for t in blobs.tensors)
        with torch.no_grad():
            expected = float(F.cross_entropy(result.model(x), y))
        assert result.losses["retain_after"] == pytest.approx(expected)

    def test_nobody_forgotten(self, blobs: TensorDataset, trained: nn.Module) -> None:
        split = resolve_split(blobs, [], allow_empty=True)
        problem = problem_of(trained, split, estimate_curvature(trained, split))
        result = scrub(trained, problem, ForgetOptions(noise=None, drift=True))
        assert [finding.name for finding in result.check.findings] == ["retained samples"]
        assert not result.check.wrong

    def test_a_class_that_stays_warns(self, blobs: TensorDataset, trained: nn.Module) -> None:
        idx = np.flatnonzero(blobs.tensors[1] == 1)
        prepared = prepare(trained, blobs, limits=Limits(1.0, 1.0), **QUIET)
        with pytest.warns(FisherForgetWarning, match="still recognised: not forgotten"):
            result = prepared.forget(idx, steps=1, damping=100.0)
        assert result.check.wrong

    def test_a_budget_that_cut_it_short_is_named(self, crowded: TensorDataset) -> None:
        idx = np.flatnonzero(crowded.tensors[1] == 1)
        model = overfitted(crowded, idx)
        with pytest.warns(FisherForgetWarning, match=r"would have lost 0 nats: a larger budget="):
            forget(model, crowded, idx, budget=0.0, noise=None, progress=False)

    def test_held_out_samples_that_are_none(self, blobs: TensorDataset, trained: nn.Module) -> None:
        with pytest.raises(ConfigError, match="held_out=3; expected a loader or data set"):
            forget(trained, blobs, range(6), held_out=3, **QUIET)

    def test_a_model_destroyed_by_a_given_damping_warns(
        self, blobs: TensorDataset, trained: nn.Module
    ) -> None:
        with pytest.warns(FisherForgetWarning, match=r"Retained samples suffered: loss .* -> "):
            result = forget(
                trained, blobs, range(50), steps=3, damping=1e-9, solver="direct", **QUIET
            )
        assert result.losses["retain_after"] > 2 * result.losses["retain_before"]

    def test_regression(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(80, 3, generator=generator)
        y: Tensor = x.sum(1, keepdim=True) + 0.1 * torch.randn(80, 1, generator=generator)
        net = nn.Linear(3, 1)
        net.weight.data, net.bias.data = torch.ones(1, 3), torch.zeros(1)
        result = forget(
            net.eval(),
            TensorDataset(x[:60], y[:60]),
            range(5),
            held_out=TensorDataset(x[60:], y[60:]),
            likelihood=Gaussian(),
            progress=False,
            drift=True,
        )
        assert not result.check.wrong
