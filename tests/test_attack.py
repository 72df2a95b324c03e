"""Attacks on pairs of releases: closed forms, scikit-learn, SciPy, published success rates, and
controls where nothing or everything must be found."""

from __future__ import annotations

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.attacks.classical import classical_games
from fisher_forget import (
    SISA,
    ConfigError,
    DataError,
    FisherForgetWarning,
    ModelError,
    NumericalError,
)
from fisher_forget.attack import (
    ChangedAnswers,
    DeletionInference,
    Finding,
    NewtonInversion,
    Pair,
    Release,
    ShadowInference,
    shadow_pairs,
)
from fisher_forget.attack.shadow import FEATURES
from fisher_forget.evaluate.roc import auc, needed_pairs, share_interval
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.report import plots

CLASSES = 4


def made_up(seed: int, n: int, width: int = 6) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g)
    return TensorDataset(x, torch.randint(0, CLASSES, (n,), generator=g))


def linear(seed: int, width: int = 6, scale: float = 1.0) -> nn.Module:
    layer = nn.Linear(width, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(
            scale * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(seed))
        )
        layer.bias.zero_()
    return layer.eval()


class Memory:
    """Answers its members' labels with a certainty of its own, and everything else evenly."""

    def __init__(self, data: TensorDataset, members: range, sure: float = 0.9) -> None:
        x, y = (t.numpy() for t in data.tensors)
        self.known = {x[i].tobytes(): int(y[i]) for i in members}
        self.sure = sure

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        p = np.full((len(inputs), CLASSES), 1 / CLASSES)
        for row, x in enumerate(inputs):
            if (label := self.known.get(x.tobytes())) is not None:
                p[row] = (1 - self.sure) / (CLASSES - 1)
                p[row, label] = self.sure
        return p


def part(data: TensorDataset, rows: range) -> TensorDataset:
    return TensorDataset(*(t[list(rows)] for t in data.tensors))


def memory_pair(seed: int = 0, count: int = 20) -> Pair:
    data = made_up(seed, 3 * count)
    before, after = Memory(data, range(2 * count)), Memory(data, range(count, 2 * count))
    unseen = part(data, range(2 * count, 3 * count))
    return Pair(before, after, part(data, range(count)), unseen)


class TestInterval:
    def test_of_whole_games_it_is_scipys(self) -> None:
        for wins, games in ((0, 9), (5, 9), (9, 9), (170, 200)):
            found = share_interval(wins / games, games)
            exact = stats.binomtest(wins, games).proportion_ci(0.95, method="exact")
            assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)

    @pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
    @pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
    def test_covers_the_auc_whatever_the_distributions(self, shift: float, spread: float) -> None:
        """At least 95 % of the time; 2,000 worlds fall below 93.5 % with a chance of 1e-3."""
        rng, truth = np.random.default_rng(0), stats.norm.cdf(shift / np.hypot(1, spread))
        p, q = rng.normal(shift, spread, (2000, 15)), rng.normal(size=(2000, 40))
        bounds = [share_interval(a, 15) for a in auc(p, q)]
        assert np.mean([b.low <= truth <= b.high for b in bounds]) > 0.935

    def test_the_fewest_pairs_are_those_that_tell_a_perfect_attack(self) -> None:
        for level in (0.9, 0.95, 0.99):
            n = needed_pairs(level)
            assert share_interval(1.0, n, level).low > 0.5
            assert share_interval(1.0, n - 1, level).low <= 0.5


class TestRelease:
    P = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])

    def test_what_is_cut(self) -> None:
        rng = np.random.default_rng(0)
        assert Release().of(self.P, rng) == pytest.approx(self.P)
        top = [[0.5, 0.3, 0.1, 0.1], [0.15, 0.15, 0.3, 0.4]]
        assert Release(top_k=2).of(self.P, rng) == pytest.approx(np.array(top))
        labels = Release(labels_only=True).of(self.P, rng)
        assert (labels == [[1, 0, 0, 0], [0, 0, 0, 1]]).all()

    def test_noise_has_its_size_and_repeats(self) -> None:
        p = np.full((20_000, 4), 0.25)
        a, b = (Release(noise=0.1).of(p, np.random.default_rng(3)) for _ in range(2))
        assert (a == b).all()
        assert np.std(a - p) == pytest.approx(0.1, rel=0.02)

    @pytest.mark.parametrize(
        "wrong", [{"top_k": 0}, {"top_k": 1.5}, {"noise": -1}, {"noise": float("nan")},
                  {"top_k": 2, "labels_only": True}, {"seed": -1}],
    )  # fmt: skip
    def test_what_cannot_be(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ConfigError):
            Release(**wrong)

    def test_of_numbers_only_noise_can_be_published(self) -> None:
        x = torch.randn(10, 3)
        pair = Pair(lambda z: z[:, 0], lambda z: z[:, 1], (x, x[:, 0]), (x + 1, x[:, 0]))
        DeletionInference(release=Release(noise=0.1)).run(pair)
        with pytest.raises(ConfigError, match="regression"):
            DeletionInference(release=Release(labels_only=True)).run(pair)


class TestDeletionInference:
    def test_is_the_auc_of_its_statistics(self) -> None:
        deleted, others = made_up(1, 30), made_up(2, 50)
        before, after = linear(3), linear(4)
        with torch.no_grad():
            rows = torch.cat([deleted.tensors[0], others.tensors[0]])
            y = torch.cat([deleted.tensors[1], others.tensors[1]])
            p, q = (m(rows).double().softmax(1) for m in (before, after))
        scores = {
            "loss": (p.log() - q.log()).gather(1, y[:, None])[:, 0],
            "output": (p - q).norm(dim=1),
        }
        for name, score in scores.items():
            found = DeletionInference(name).run(Pair(before, after, deleted, others)).found.value
            assert found == pytest.approx(roc_auc_score([1] * 30 + [0] * 50, score), abs=1e-12)

    def test_games_are_pairs_of_one_sample_each(self) -> None:
        games = [
            Pair(linear(k), linear(k + 1), made_up(k, 1), made_up(99 + k, 1)) for k in range(9)
        ]
        attack = DeletionInference()
        won = [
            attack.scores(g.before, g.after, g.deleted) > attack.scores(g.before, g.after, g.others)
            for g in games
        ]
        assert attack.run(games).found == share_interval(float(np.mean(won)), 9)

    @pytest.mark.parametrize("statistic", ["loss", "output"])
    def test_two_models_of_the_same_data_show_nothing(self, statistic: str) -> None:
        """Exchangeable samples: of 100 pairs more than 13 miss 1/2 with a chance below 1e-3."""
        missed = 0
        for seed in range(100):
            pair = Pair(
                linear(seed), linear(1000 + seed), made_up(seed, 15), made_up(5000 + seed, 25)
            )
            found = DeletionInference(statistic).run(pair).found
            missed += not found.low <= 0.5 <= found.high
        assert missed <= 13

    @pytest.mark.parametrize("statistic", ["loss", "output"])
    def test_a_memory_shows_everything_until_there_is_noise(self, statistic) -> None:
        found = DeletionInference(statistic).run(memory_pair())
        assert found.found.value == 1
        assert found.leaks
        assert "More than 0.50" in str(found)
        # one that is never sure of anything says the same class of all
        data = made_up(0, 60)
        unsure = [Memory(data, rows, 0.2501) for rows in (range(40), range(20, 40))]
        pair = Pair(*unsure, part(data, range(20)), part(data, range(40, 60)))
        assert DeletionInference(statistic).run(pair).found.value == 1
        coarse = replace(DeletionInference(statistic), release=Release(noise=0.1))
        assert not coarse.run(pair).leaks

    def test_the_yardstick_is_the_retrained_model(self) -> None:
        pair = memory_pair()
        fresh = Memory(made_up(0, 60), range(20, 40))
        found = DeletionInference().run(replace(pair, retrained=[fresh]))
        assert found.retrained == found.found
        assert found.against_retraining == "as much"
        kept = Memory(made_up(0, 60), range(40))  # nothing was deleted
        found = DeletionInference().run(replace(pair, after=kept, retrained=[fresh]))
        assert found.against_retraining == "less"
        assert json.loads(json.dumps(found.to_dict()))["found"]["value"] == 0.5

    @pytest.mark.parametrize(
        ("case", "games", "published"),
        [("diabetes, linear", 200, (0.933, 1.0)), ("iris, logistic", 60, (0.895, 0.875)),
         ("wine, logistic", 60, (0.830, 0.775)), ("breast cancer, logistic", 60, (0.725, 0.565)),
         ("breast cancer, 5-NN", 60, (0.55, 0.55))],
    )  # fmt: skip
    def test_rates_known_of_classical_models(self, case, games, published) -> None:
        """Within 3.5 standard errors of both runs (200 to 300 games there)."""
        pairs = list(classical_games(case, games))
        for statistic, rate in zip(("loss", "output"), published, strict=True):
            found = DeletionInference(statistic).run(pairs).found.value
            error = (rate * (1 - rate) * (1 / games + 1 / 200)) ** 0.5
            assert abs(found - rate) <= 3.5 * error + 1e-9, (statistic, found)


class TestPairs:
    DATA = (torch.eye(6), torch.arange(6) % CLASSES)

    def test_the_same_model_twice(self) -> None:
        model = linear(0)
        for after in (model, linear(0)):
            with pytest.raises(ModelError, match=r"the same model|same weights"):
                Pair(model, after, self.DATA)

    def test_another_architecture(self) -> None:
        with pytest.raises(ModelError, match=r"'weight': \(4, 6\) and \(4, 5\)"):
            Pair(linear(0), linear(0, width=5), self.DATA)
        with pytest.raises(ModelError, match="architecture"):
            Pair(linear(0), linear(1), self.DATA, retrained=[nn.Sequential(linear(2))])
        bent = [nn.Sequential(linear(0), layer) for layer in (nn.ReLU(), nn.Tanh())]
        with pytest.raises(ModelError, match="with a ReLU, and one with a Tanh"):
            Pair(*bent, self.DATA)

    def test_another_set_of_labels(self) -> None:
        models = [lambda x, c=c: np.full((len(x), c), 1 / c) for c in (4, 5)]
        with pytest.raises(ModelError, match="4 and 5 classes"):
            DeletionInference().run(Pair(*models, made_up(0, 9), made_up(1, 9)))
        few = [lambda x: np.full((len(x), 2), 0.5), lambda x: np.full((len(x), 2), 0.5)]
        with pytest.raises(DataError, match="from 0 to 3 of 2 classes"):
            DeletionInference().run(Pair(*few, made_up(0, 9), made_up(1, 9)))

    def test_a_sample_on_both_sides(self) -> None:
        x, y = self.DATA
        with pytest.raises(DataError, match="2 samples that are deleted as well as not"):
            Pair(linear(0), linear(1), (x, y), (x[4:], y[4:]))
        assert Pair(linear(0), linear(1), (x, y), (x, y + 1)).others is not None

    def test_too_few_and_none(self) -> None:
        with pytest.raises(DataError, match="at least 6"):
            DeletionInference().run(Pair(linear(0), linear(1), made_up(0, 5), made_up(1, 50)))
        with pytest.raises(DataError, match="without others"):
            DeletionInference().run(Pair(linear(0), linear(1), made_up(0, 9)))
        with pytest.raises(DataError, match="no pair"):
            DeletionInference().run([])
        with pytest.raises(ConfigError, match="statistic"):
            DeletionInference("entropy")

    def test_answers_that_are_none(self) -> None:
        def ask(answer) -> Finding:
            models = [lambda x: answer(x), lambda x: answer(x)]
            return DeletionInference().run(Pair(*models, made_up(0, 9), made_up(1, 9)))

        with pytest.raises(DataError, match="sum to"):
            ask(lambda x: np.ones((len(x), CLASSES)))
        with pytest.raises(DataError, match="shape"):
            ask(lambda x: np.ones((len(x) + 1, CLASSES)))
        with pytest.raises(NumericalError):
            ask(lambda x: np.full((len(x), CLASSES), np.nan))
        estimators = LinearRegression(), LinearRegression()
        with pytest.raises(ModelError, match="cannot be called"):
            DeletionInference().run(Pair(*estimators, made_up(0, 9), made_up(1, 9)))


class TestShadow:
    def test_features_equal_their_definitions(self) -> None:
        p, q = (torch.rand(5, 4).double().numpy() for _ in range(2))
        for name, feature in FEATURES.items():
            for row, x in enumerate(feature(p, q)):
                a, b = p[row], q[row]
                order = sorted(range(4), key=lambda c, a=a: -a[c])
                if "sorted" in name:
                    a, b = a[order], b[order]
                expected = {
                    "diff": b - a,
                    "concat": [*a, *b],
                    "distance": [sum((b - a) ** 2) ** 0.5],
                }[name.split("_")[1]]
                assert x == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("feature", "attacker"),
        [(name, "logistic") for name in FEATURES if not name.startswith("direct")]
        + [(name, "tree") for name in FEATURES],
    )
    def test_a_memory_shows_everything(self, feature: str, attacker: str) -> None:
        found = ShadowInference([memory_pair(1)], feature, attacker).run(memory_pair(2))
        assert found.found.value == 1
        assert found.leaks
        # known of the first release alone, too, so the second adds nothing but certainty
        assert found.details["AUC from the first release alone"] == 1

    def test_where_nothing_was_deleted_nothing_is_found(self) -> None:
        """5 % are missed by the interval; more than 9 of 60 with a chance of 1e-3."""
        missed, shadows = 0, [memory_pair(1)]
        for seed in range(60):
            samples = made_up(100 + seed, 20), made_up(300 + seed, 20)
            pair = Pair(linear(seed, scale=0.3), linear(1000 + seed, scale=0.3), *samples)
            found = ShadowInference(shadows, "direct_diff").run(pair).found
            missed += not found.low <= 0.5 <= found.high
        assert missed <= 9

    def test_noise_is_not_known_from_the_shadow_models(self) -> None:
        """What is learned from noise alone does not help with the noise under attack."""
        missed = 0
        for seed in range(40):
            flat = [Memory(made_up(0, 1), range(0)) for _ in range(4)]
            sides = [made_up(1000 * seed + k, 20) for k in range(4)]
            shadow, target = Pair(*flat[:2], *sides[:2]), Pair(*flat[2:], *sides[2:])
            release = Release(noise=0.1, seed=seed)
            found = ShadowInference([shadow], "direct_concat", release=release).run(target).found
            missed += not found.low <= 0.5 <= found.high
        assert missed <= 6  # 5 % each: with a chance of 3e-3 more

    def test_degradation_is_what_the_second_release_adds(self) -> None:
        """Membership alone is hidden (all answers of the first release are alike)."""

        def pair(seed: int) -> Pair:
            data = made_up(seed, 40)
            flat = Memory(data, range(0))
            return Pair(
                flat, Memory(data, range(20)), part(data, range(20)), part(data, range(20, 40))
            )

        found = ShadowInference([pair(1)], "l2_distance").run(pair(2))
        assert found.details["AUC from the first release alone"] == 0.5
        assert found.details["DegCount"] == 1
        assert 0.4 < found.details["DegRate"] <= 0.5

    def test_what_cannot_be(self) -> None:
        with pytest.raises(ConfigError, match="feature"):
            ShadowInference([memory_pair()], "all")
        with pytest.raises(ConfigError, match="attacker"):
            ShadowInference([memory_pair()], attacker="svm")
        with pytest.raises(DataError, match="attacked as well as"):
            ShadowInference([memory_pair(0)]).run(memory_pair(0))
        with pytest.raises(DataError, match="at least 6"):
            ShadowInference([memory_pair(0, 5)]).run(memory_pair(1))
        five = [lambda x: np.full((len(x), 5), 0.2), lambda x: np.full((len(x), 5), 0.2)]
        with pytest.raises(ModelError, match="5 classes"):
            ShadowInference([memory_pair(0)]).run(Pair(*five, made_up(3, 9), made_up(4, 9)))


class TestShadowModels:
    def test_deletes_members_resumes_and_forgets_as_told(self, tmp_path) -> None:
        data, calls = made_up(0, 30), []
        rows = {x.numpy().tobytes(): i for i, x in enumerate(data.tensors[0])}

        def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
            calls.append(indices)
            model = linear(seed)
            with torch.no_grad():
                model.bias.fill_(float(indices.sum()))
            return model

        def forget_fn(model: nn.Module, trained: np.ndarray, deleted: int) -> nn.Module:
            assert deleted in trained
            after = linear(0)
            with torch.no_grad():
                after.weight.copy_(model.weight)
                after.bias.copy_(model.bias - deleted - 1)
            return after

        options = {"template": linear(0), "originals": 2, "deletions": 3, "progress": False}
        pairs = shadow_pairs(train_fn, data, **options, folder=tmp_path, fingerprint="a")
        assert len(pairs) == 6
        assert [len(c) for c in calls] == [15] * 2 + [14] * 6
        for k, pair in enumerate(pairs):
            deleted, unseen = (
                rows[x.tensors[0][0].numpy().tobytes()] for x in (pair.deleted, pair.others)
            )
            original = calls[k // 3]
            assert deleted in original
            assert unseen not in original
            assert set(calls[2 + k]) == set(original) - {deleted}
            assert pair.before.bias[0] - pair.after.bias[0] == deleted

        (tmp_path / "shadow" / "seed-4.safetensors").unlink()
        again = shadow_pairs(train_fn, data, **options, folder=tmp_path, fingerprint="a")
        assert len(calls) == 9  # the one that was gone
        assert all(
            torch.equal(a.after.weight, b.after.weight) for a, b in zip(pairs, again, strict=True)
        )

        with pytest.warns(FisherForgetWarning, match="trained anew"):
            shadow_pairs(train_fn, data, **options, seed=1, folder=tmp_path, fingerprint="a")
        assert len(calls) == 17  # other samples are deleted

        told = shadow_pairs(train_fn, data, **options, forget_fn=forget_fn)
        assert len(calls) == 19  # the originals alone
        assert all(torch.equal(p.before.weight, p.after.weight) for p in told)

    def test_what_cannot_be(self) -> None:
        for wrong in ({"originals": 0}, {"deletions": 2.5}, {"seed": -1}):
            with pytest.raises(ConfigError):
                shadow_pairs(lambda i, s: linear(s), made_up(0, 30), template=linear(0), **wrong)
        with pytest.raises(DataError, match="20 deletions"):
            shadow_pairs(lambda i, s: linear(s), made_up(0, 30), template=linear(0))


def newton_pair(seed: int, public: TensorDataset, tau: float, count: int = 1) -> Pair:
    """A network in float64, and after an exact Newton step by a dense Gauss-Newton matrix."""
    torch.manual_seed(seed)
    before = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double().eval()
    params = list(before.parameters())
    deleted = TensorDataset(torch.randn(count, 6).double(), torch.randint(0, CLASSES, (count,)))

    def gradients(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])

    ggn = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    ggn = torch.diag(ggn)
    for x in public.tensors[0].double():
        p = before(x).softmax(0).detach()
        rows = torch.stack([gradients(before(x)[c]) for c in range(CLASSES)])
        ggn += rows.T @ (torch.diag(p) - torch.outer(p, p)) @ rows / len(public)
    force = gradients(nn.functional.cross_entropy(before(deleted.tensors[0]), deleted.tensors[1]))
    step = torch.linalg.solve(ggn + tau * torch.eye(len(force)).double(), force)
    after = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double().eval()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params) + step, after.parameters())
    return Pair(before, after, deleted)


class TestInversion:
    def test_finds_everything_of_a_newton_step_with_its_own_curvature(self) -> None:
        """The image itself, with sign and size."""
        public = made_up(7, 40)
        pairs = [newton_pair(seed, public, 0.01) for seed in range(4)]
        found = NewtonInversion(public, damping=0.01).run(pairs)
        assert torch.allclose(found.recovered, found.truth, rtol=1e-5, atol=1e-5)
        assert found.found.low > 0.999
        assert found.warning
        assert found.details["PSNR (dB)"] > 60 or found.truth.abs().max() > public.tensors[0].max()
        json.dumps(found.to_dict())

    def test_a_linear_regression_by_its_closed_form(self) -> None:
        """x ~ A (beta - beta') with A = X^T X of public data."""
        rng = np.random.default_rng(0)
        x, public = rng.normal(size=(40, 5)), rng.normal(size=(60, 5)) @ np.diag([1, 2, 1, 3, 1])
        y = x @ rng.normal(size=5) + rng.normal(size=40)

        def fitted(rows: slice) -> tuple[np.ndarray, nn.Module]:
            beta = np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
            model = nn.Linear(5, 1, bias=False).double().eval()
            with torch.no_grad():
                model.weight.copy_(torch.from_numpy(beta)[None])
            return beta, model

        (beta, before), (rest, after) = fitted(slice(0, 40)), fitted(slice(1, 40))
        data = TensorDataset(torch.from_numpy(public), torch.zeros(60, 1).double())
        attack = NewtonInversion(data, damping=0.0, likelihood="gaussian")
        recovered = attack.recover(before, after)[0].numpy()
        expected = public.T @ public @ (beta - rest)
        cosine = recovered @ expected / np.linalg.norm(recovered) / np.linalg.norm(expected)
        assert abs(cosine) == pytest.approx(1, abs=1e-9)

    def test_of_random_steps_nothing_is_found(self) -> None:
        public, pairs = made_up(7, 40, 20), []
        for k in range(40):
            pairs.append(Pair(linear(k, 20), linear(1000 + k, 20), made_up(2000 + k, 1, 20)))
        found = NewtonInversion(public).run(pairs)
        assert found.found.low < 0 < found.found.high  # 95 %, one fixed seed
        assert abs(found.nothing) < 0.05
        assert not found.leaks
        assert not found.warning

    def test_of_random_steps_and_batches_chance_is_what_is_nothing(self) -> None:
        """Of several directions one is like any sample: .4 here."""
        public = made_up(7, 40)
        pairs = [Pair(linear(k), linear(1000 + k), made_up(2000 + k, 8)) for k in range(10)]
        found = NewtonInversion(public).run(pairs)
        assert found.nothing > 0.3
        assert not found.leaks

    def test_of_a_batch_less_is_found(self) -> None:
        public = made_up(7, 40)
        one = NewtonInversion(public).run([newton_pair(k, public, 0.01) for k in range(4)])
        many = NewtonInversion(public).run([newton_pair(k, public, 0.01, 4) for k in range(4)])
        assert many.samples == 16
        assert many.found.high < one.found.low

    def test_without_a_bias_the_public_data_tell_sign_and_size(self) -> None:
        public = TensorDataset(torch.rand(50, 6) + 1, torch.zeros(50).long())
        before, after = (nn.Linear(6, CLASSES, bias=False).eval() for _ in range(2))
        (x,) = NewtonInversion(public).recover(before, after)
        assert x.norm() == pytest.approx(float(public.tensors[0].norm(dim=1).mean()), rel=1e-6)
        assert x @ public.tensors[0].double().mean(0) > 0

    def test_leaves_models_alone(self) -> None:
        public = made_up(7, 40)
        pair = newton_pair(0, public, 0.01)
        states = [
            {k: v.clone() for k, v in m.state_dict().items()} for m in (pair.before, pair.after)
        ]
        NewtonInversion(public).recover(pair.before, pair.after)
        for model, state in zip((pair.before, pair.after), states, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            assert all(p.grad is None for p in model.parameters())

    def test_what_cannot_be(self) -> None:
        public = made_up(7, 40)
        pair = Pair(linear(0), linear(1), made_up(0, 2))
        with pytest.raises(DataError, match="at least 3"):
            NewtonInversion(public).run(pair)
        with pytest.raises(DataError, match="deleted as well as public"):
            NewtonInversion(public).run(Pair(linear(0), linear(1), part(public, range(4))))
        with pytest.raises(ModelError, match="functions"):
            NewtonInversion(public).run(memory_pair())
        with pytest.raises(ModelError, match="layer='head'"):
            NewtonInversion(public, layer="head").run(Pair(linear(0), linear(1), made_up(0, 4)))
        with pytest.raises(ConfigError, match="damping"):
            NewtonInversion(public, damping=-1)
        convs = [nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten()).eval() for _ in range(2)]
        images = TensorDataset(torch.randn(4, 1, 3), torch.zeros(4).long())
        with pytest.raises(ModelError, match="without a Linear layer"):
            NewtonInversion(images).run(Pair(*convs, (images.tensors[0] + 1, images.tensors[1])))


class TestChangedAnswers:
    def test_of_a_nearest_neighbour_the_cell_is_found(self) -> None:
        """Where it lay, to the width of its cell; of retrained models the same."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(30, 2)), np.arange(30) % 2

        def answers(keep: np.ndarray):
            def ask(z: np.ndarray) -> np.ndarray:
                near = ((z[:, None] - x[keep][None]) ** 2).sum(2).argmin(1)
                return np.eye(2)[y[keep][near]]

            return ask

        queries = TensorDataset(
            torch.from_numpy(rng.normal(size=(4000, 2))), torch.zeros(4000).long()
        )
        attack = ChangedAnswers(queries, Release(labels_only=True))
        everyone = np.arange(30)
        pairs = [
            Pair(
                answers(everyone), answers(everyone != i), (torch.from_numpy(x[i : i + 1]), [y[i]])
            )
            for i in range(30)
        ]
        found = attack.run(pairs)
        assert found.found.low > 0.7
        # with the queries' mean in place of a cell where nothing was changed
        same = Pair(answers(everyone), answers(everyone), pairs[0].deleted)
        assert torch.allclose(attack.recover(same.before, same.after), queries.tensors[0].mean(0))


def test_releases_of_sisa() -> None:
    """An ensemble before and after a request; a memory of the deleted shard's members is gone."""
    data = made_up(0, 60)

    def fit(model: nn.Module, data: TensorDataset, indices: np.ndarray, seed: int) -> nn.Module:
        x, y = (t[torch.from_numpy(indices)] for t in data.tensors)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    ensemble = SISA(lambda: linear(0), fit, shards=2, slices=1)
    ensemble.fit(data)
    before = ensemble.module()
    ensemble.forget(range(12))
    pair = Pair(before, ensemble.module(), part(data, range(12)), part(data, range(12, 60)))
    assert DeletionInference("loss").run(pair).leaks
    with pytest.raises(ModelError, match=r"same model|same weights"):
        Pair(before, before, pair.deleted)


def test_the_picture_shows_the_rows_there_are() -> None:
    public = made_up(7, 40)
    found = NewtonInversion(public).run([newton_pair(k, public, 0.01) for k in range(4)])
    ax = plots.plot_reconstructions(found, (2, 3), {"mine": found.truth})
    assert len(ax.images) == 3 * 4
    assert [t.get_text() for t in ax.texts] == ["deleted", "recovered", "mine"]
    assert np.allclose(ax.images[5].get_array(), found.recovered[1].view(2, 3))
    with pytest.raises(DataError, match="images of 2 x 2"):
        plots.plot_reconstructions(found, (2, 2))
    plt.close("all")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_networks_of_the_package(name: str) -> None:
    """Black and white box on real networks: shapes, and layers that are fed features."""
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(60, 1, 8, 8, generator=g), torch.arange(60) % 10)
    start = build_model(name, (1, 8, 8), 10, seed=0)
    settings = TrainSettings(epochs=2, batch_size=20)
    models = [train(start, data, settings, seed=s, progress=False) for s in range(2)]
    pair = Pair(*models, part(data, range(10)), part(data, range(10, 30)))
    assert 0 < DeletionInference("output", Release(top_k=3)).run(pair).found.value < 1
    found = NewtonInversion(part(data, range(30, 60))).run(pair)
    assert found.truth.shape == found.recovered.shape
