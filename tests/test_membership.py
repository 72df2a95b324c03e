"""Membership attacks: SciPy, scikit-learn, closed forms, and null distributions at a stated
false-alarm rate."""

from __future__ import annotations

import math
from dataclasses import astuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import KernelDensity
from sklearn.svm import SVC

from fisher_forget import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.membership import (
    ATTACKS,
    SIGNS,
    attack_features,
    population_attack,
    ruli,
    shadow_attack,
    u_lira,
)
from fisher_forget.evaluate.roc import auc, tpr_at_fpr

Z = 4.4172  # two-sided false-alarm rate of 1e-5 for a normal statistic


def features(seed: int, n: int, shift: float) -> dict[str, np.ndarray]:
    """Features of n samples of 4 classes; the larger the shift, the surer and more often right the
    model is."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (n,), generator=generator)
    logits = torch.randn(n, 4, generator=generator)
    logits[torch.arange(n), targets] += shift
    return attack_features(logits, targets)


def shadows(seed: int, models: int, samples: int, shift: float = 0.0) -> np.ndarray:
    """Margins N(sample's mean + shift, 1); the sample's mean is the same for every seed."""
    centers = np.random.default_rng(99).normal(scale=3.0, size=samples)
    return centers + shift + np.random.default_rng(seed).normal(size=(models, samples))


class TestFeatures:
    def test_equal_their_definitions(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(3, 50, 5, generator=generator)
        targets = torch.randint(0, 5, (50,), generator=generator)
        found = attack_features(logits, targets)
        p = special.softmax(logits.double().numpy(), axis=-1)
        for m in range(3):
            for n in range(50):
                q, y = p[m, n], int(targets[n])
                modified = -(1 - q[y]) * math.log(q[y]) - sum(
                    q[c] * math.log(1 - q[c]) for c in range(5) if c != y
                )
                expected = (-math.log(q[y]), q[y], float(special.entr(q).sum()), modified)
                assert [found[name][m, n] for name in SIGNS] == pytest.approx(expected, rel=1e-9)

    def test_by_hand(self) -> None:
        # p = (3/4, 1/4). Right class 0: -(1/4) ln(3/4) - (1/4) ln(3/4); wrong class 1: twice (3/4)
        # ln 4.
        logits = torch.tensor([[math.log(3.0), 0.0]] * 2, dtype=torch.float64)
        found = attack_features(logits, torch.tensor([0, 1]))
        assert found["modified_entropy"] == pytest.approx(
            [0.5 * math.log(4 / 3), 1.5 * math.log(4)]
        )
        assert found["entropy"] == pytest.approx([0.25 * math.log(4) + 0.75 * math.log(4 / 3)] * 2)

    def test_survive_certainty(self) -> None:
        # Logits 100 apart: 1 - p is 3.7e-44, which 1 - softmax rounds to 0, and its logarithm is
        # -100.
        logits = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
        right, wrong = attack_features(logits, torch.tensor([0, 1]))["modified_entropy"]
        assert right == pytest.approx(2 * math.exp(-100))
        assert wrong == pytest.approx(200.0)

    def test_the_models_of_an_ensemble_are_independent(self) -> None:
        logits, targets = (
            torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1)),
            torch.arange(6) % 3,
        )
        together = attack_features(logits, targets)
        for m in range(2):
            alone = attack_features(logits[m], targets)
            assert all(np.array_equal(together[name][m], alone[name]) for name in SIGNS)


class TestRoc:
    @pytest.mark.parametrize("decimals", [0, 1, 8])  # 0: almost all scores are tied
    def test_auc_equals_scikit_learn(self, decimals: int) -> None:
        rng = np.random.default_rng(decimals)
        a, b = np.round(rng.normal(0.4, 1, 70), decimals), np.round(rng.normal(size=50), decimals)
        labels, scores = np.repeat([1, 0], [70, 50]), np.concatenate([a, b])
        assert auc(a, b) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert auc(b, a) == pytest.approx(1 - auc(a, b))

    @pytest.mark.parametrize("fpr", [0.01, 0.02, 0.05, 0.29, 1.0])
    @pytest.mark.parametrize("decimals", [0, 1, 8])
    def test_tpr_is_the_best_of_all_thresholds(self, fpr: float, decimals: int) -> None:
        rng = np.random.default_rng(7)
        a, b = np.round(rng.normal(1, 1, 70), decimals), np.round(rng.normal(size=100), decimals)
        rates = roc_curve(
            np.repeat([1, 0], [70, 100]), np.concatenate([a, b]), drop_intermediate=False
        )
        limit = Fraction(str(fpr))
        best = max(
            t for f, t, _ in zip(*rates, strict=True) if Fraction(round(f * 100), 100) <= limit
        )
        assert tpr_at_fpr(a, b, fpr).value == pytest.approx(best)

    def test_by_hand(self) -> None:
        assert auc([2.0, 1.0], [1.0, 0.0]) == pytest.approx(3.5 / 4)
        assert tpr_at_fpr([3.0, 1.0], [4.0, 2.0, 0.0], 0.49).value == 0.5
        assert tpr_at_fpr([3.0, 1.0], [2.0, 0.0], 0.5).value == 1.0
        assert tpr_at_fpr([math.inf, 1.0], [2.0, 1.0, -math.inf], 0.4).value == 0.5

    def test_rows_are_separate_problems(self) -> None:
        rng = np.random.default_rng(8)
        a, b = rng.normal(size=(3, 9)), rng.normal(size=(3, 40))
        assert auc(a, b) == pytest.approx([float(auc(x, y)) for x, y in zip(a, b, strict=True)])
        each = [astuple(tpr_at_fpr(x, y, 0.1)) for x, y in zip(a, b, strict=True)]
        assert astuple(tpr_at_fpr(a, b, 0.1)) == pytest.approx(np.mean(each, 0))

    @pytest.mark.parametrize(("fpr", "negatives"), [(0.001, 1000), (0.01, 300), (0.1, 40)])
    def test_the_interval_of_a_rate_covers_it(self, fpr: float, negatives: int) -> None:
        """Normal scores, whose rate is known. At least 95 % of 200 intervals cover it: with a
        coverage of 95 % fewer than 182 do with a chance below 1 % (binomial)."""
        rng = np.random.default_rng(4)
        truth = stats.norm.sf(stats.norm.isf(fpr) - 2.0)
        found = [
            tpr_at_fpr(rng.normal(2, 1, 200), rng.normal(size=negatives), fpr) for _ in range(200)
        ]
        assert sum(i.low <= truth <= i.high for i in found) >= 182
        assert all(0 <= i.low <= i.value <= i.high <= 1 for i in found)

    def test_the_interval_is_clopper_and_pearsons_where_the_threshold_is_known(self) -> None:
        """With a million negatives in steps of 1e-6 only the positives are random."""
        a, b = np.repeat([0.95, 0.5], [30, 70]), np.arange(1e6) / 1e6
        exact = stats.binomtest(30, 100).proportion_ci(0.975, method="exact")
        found = tpr_at_fpr(a, b, 0.1)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=1e-9)

    def test_fewer_negatives_than_one_over_the_rate_are_refused(self) -> None:
        scores = np.linspace(0, 1, 999)
        with pytest.raises(DataError, match=r"999 negatives .* 0.001.*at least 1000"):
            tpr_at_fpr(scores, scores, 0.001)
        assert tpr_at_fpr(scores, np.linspace(0, 1, 1000), 0.001).value < 0.01
        assert tpr_at_fpr(scores, scores[:7], 1 / 7).value > 0  # 7 * (1 / 7) is 1

    @pytest.mark.parametrize("distance", [0.0, 1.0, 2.5])
    def test_normal_scores_have_the_closed_form(self, distance: float) -> None:
        rng = np.random.default_rng(9)
        n = 4000
        expected = stats.norm.cdf(distance / math.sqrt(2))
        # The variance of an AUC is at most A (1 - A) / min(P, Q) (Birnbaum & Klose 1957).
        tolerance = Z * math.sqrt(expected * (1 - expected) / n)
        assert auc(rng.normal(distance, 1, n), rng.normal(size=n)) == pytest.approx(
            expected, abs=tolerance
        )


class TestPopulation:
    @pytest.mark.parametrize("attack", ATTACKS)
    def test_members_are_told_from_strangers(self, attack: str) -> None:
        member, nonmember = features(1, 400, 4.0), features(2, 300, 1.0)
        as_members = population_attack(member, nonmember, features(3, 300, 4.0), attack)
        as_strangers = population_attack(member, nonmember, features(4, 300, 1.0), attack)
        assert as_members.called_members > 0.65
        assert as_strangers.called_members < 0.45
        assert auc(as_members.member, as_members.nonmember) > 0.75
        # An exchangeable queried set: AUC 1/2 within 1e-5 (variance at most (P + Q + 1) / 12 P Q,
        # here 300 and 150).
        assert auc(as_strangers.queried, as_strangers.nonmember) == pytest.approx(
            0.5, abs=Z * math.sqrt(451 / (12 * 300 * 150))
        )

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_without_a_difference_nothing_is_found(self, attack: str) -> None:
        # Scores of samples that were not fitted on are exchangeable: false alarm 1e-5.
        found = population_attack(
            features(5, 600, 1.0), features(6, 600, 1.0), features(7, 200, 1.0), attack
        )
        deviation = Z * math.sqrt(601 / (12 * 300 * 300))
        assert auc(found.member, found.nonmember) == pytest.approx(0.5, abs=deviation)

    @pytest.mark.parametrize("attack", list(SIGNS))
    def test_the_threshold_is_the_best(self, attack: str) -> None:
        member, nonmember = features(8, 60, 2.0), features(9, 90, 1.0)
        found = population_attack(member, nonmember, member, attack, published=True)
        a, b = SIGNS[attack] * member[attack], SIGNS[attack] * nonmember[attack]
        best = max(np.mean(a >= c) - np.mean(b >= c) for c in (*a, *b))
        assert np.mean(a >= found.cutoff) - np.mean(b >= found.cutoff) == pytest.approx(best)
        assert found.called_members == np.mean(a >= found.cutoff)

    def test_published_svc_is_the_published_one(self) -> None:
        member, nonmember, queried = (
            features(10, 120, 3.0),
            features(11, 80, 1.0),
            features(12, 40, 2.0),
        )
        entropies = np.concatenate([member["entropy"], nonmember["entropy"]])[:, None]
        svc = SVC(C=3, kernel="rbf", gamma="auto").fit(entropies, np.repeat([1, 0], [120, 80]))
        found = population_attack(member, nonmember, queried, "svc", published=True)
        assert found.called_members == svc.predict(queried["entropy"][:, None]).mean()

    def test_sides_weigh_the_same(self) -> None:
        # Twenty times as many members: the unweighted rule calls everything a member, ours does
        # not.
        data = features(13, 2000, 1.2), features(14, 100, 1.0), features(15, 200, 1.0)
        for attack in ("all", "svc"):
            assert population_attack(*data, attack, published=True).called_members > 0.99
            assert population_attack(*data, attack).called_members < 0.9

    def test_is_reproducible_and_fits_apart_from_what_it_scores(self) -> None:
        data = features(19, 50, 2.0), features(20, 41, 1.0), features(21, 9, 1.5)
        first = population_attack(*data, seed=3)
        assert np.array_equal(first.nonmember, population_attack(*data, seed=3).nonmember)
        assert not np.array_equal(first.nonmember, population_attack(*data, seed=4).nonmember)
        assert (len(first.member), len(first.nonmember), len(first.queried)) == (25, 21, 9)


class TestShadow:
    def test_u_lira_equals_scipy(self) -> None:
        u, o, x = shadows(1, 5, 8, 1.0), shadows(2, 7, 8), shadows(3, 2, 8)
        found = u_lira(u, o, x)
        for k in range(2):
            for n in range(8):
                near = stats.norm.logpdf(x[k, n], u[:, n].mean(), u[:, n].std(ddof=1))
                far = stats.norm.logpdf(x[k, n], o[:, n].mean(), o[:, n].std(ddof=1))
                assert found[k, n] == pytest.approx(near - far)
        assert u_lira(u, o, torch.tensor(x[0])) == pytest.approx(found[0])

    def test_pooled_variance_and_floor(self) -> None:
        u, o, x = shadows(1, 5, 8, 1.0), shadows(2, 7, 8), shadows(3, 1, 8)[0]
        su, so = (math.sqrt(np.mean([s[:, n].var(ddof=1) for n in range(8)])) for s in (u, o))
        expected = stats.norm.logpdf(x, u.mean(0), su) - stats.norm.logpdf(x, o.mean(0), so)
        assert u_lira(u, o, x, pooled=True) == pytest.approx(expected)
        same = np.zeros((3, 1))
        assert u_lira(same, same + 1, [0.0], floor=0.5) == pytest.approx([2.0])  # (1 / 0.5)^2 / 2

    def test_ruli_equals_scikit_learn(self) -> None:
        u, o, x = shadows(4, 5, 6, 1.0), shadows(5, 7, 6), shadows(6, 2, 6)
        for width in (1.0, 0.3):
            found = ruli(u, o, x, bandwidth=width)
            for k in range(2):
                for n in range(6):
                    a, b = (
                        math.exp(
                            KernelDensity(bandwidth=width).fit(s[:, n : n + 1]).score([[x[k, n]]])
                        )
                        for s in (u, o)
                    )
                    assert found[k, n] == pytest.approx(a / (a + b), rel=1e-7)
        far = (u.max(0) > o.max(0)).astype(
            float
        )  # where both densities underflow the nearest kernel decides
        assert ruli(u, o, np.full(6, 1e4)) == pytest.approx(far, abs=1e-9)

    @pytest.mark.parametrize("attack", [u_lira, ruli])
    def test_swapped_sides_swap_the_score(self, attack: object) -> None:
        u, o, x = shadows(7, 4, 10, 1.0), shadows(8, 4, 10), shadows(9, 1, 10)[0]
        forward, backward = attack(u, o, x), attack(o, u, x)  # type: ignore[operator]
        assert backward == pytest.approx(-forward if attack is u_lira else 1 - forward)

    @pytest.mark.parametrize("attack", [u_lira, ruli])
    def test_null_is_one_half(self, attack: object) -> None:
        # 200 ensembles of 3 models: within an ensemble the left-out models are exchangeable, so its
        # mean AUC has expectation 1/2. The mean over the independent ensembles is normal: false
        # alarm 1e-5.
        found = [
            shadow_attack(shadows(2 * s, 3, 40), shadows(2 * s + 1, 3, 40), attack).auc()  # type: ignore[arg-type]
            for s in range(100, 300)
        ]
        assert np.mean(found) == pytest.approx(0.5, abs=Z * np.std(found, ddof=1) / math.sqrt(200))
        assert np.std(found) < 0.1

    def test_the_auc_reaches_the_optimum_with_many_shadows(self) -> None:
        # Known N(d, 1) and N(0, 1): the ratio is d (x - d/2), so AUC = Phi(d / sqrt 2). 400
        # shadows: 1 % of slack.
        distance = 1.5
        found = shadow_attack(shadows(31, 400, 30, distance), shadows(32, 400, 30))
        assert found.auc() == pytest.approx(stats.norm.cdf(distance / math.sqrt(2)), abs=0.015)

    def test_no_model_takes_part_in_the_fit_that_scores_it(self) -> None:
        u, o = shadows(33, 4, 5), shadows(34, 6, 5)
        found = shadow_attack(u, o)
        assert found.unlearned.shape == found.out.shape == (4, 5)
        for k in range(4):
            rest_u, rest_o = u[[i for i in range(4) if i != k]], o[[i for i in range(6) if i != k]]
            assert found.unlearned[k] == pytest.approx(u_lira(rest_u, rest_o, u[k]))
            assert found.out[k] == pytest.approx(u_lira(rest_u, rest_o, o[k]))
        rates = [
            roc_auc_score(np.repeat([1, 0], 5), [*a, *b])
            for a, b in zip(found.unlearned, found.out, strict=True)
        ]
        assert found.auc() == pytest.approx(np.mean(rates))
        best = [
            max(np.mean(a > c) for c in b if np.mean(b > c) <= 0.2)
            for a, b in zip(found.unlearned, found.out, strict=True)
        ]
        assert found.tpr_at_fpr(0.2).value == pytest.approx(np.mean(best))


class TestRefusals:
    def test_of_features(self) -> None:
        with pytest.raises(DataError, match=r"\[N, C\]"):
            attack_features(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
        with pytest.raises(DataError, match=r"\[N, C\]"):
            attack_features(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
        with pytest.raises(DataError, match="0 to 3"):
            attack_features(torch.zeros(3, 4), torch.tensor([0, 1, 4]))
        with pytest.raises(DataError, match="0 to 3"):
            attack_features(torch.zeros(3, 4), torch.zeros(3))
        with pytest.raises(NumericalError, match="NaN"):
            attack_features(torch.full((3, 4), math.nan), torch.zeros(3, dtype=torch.long))

    def test_of_scores(self) -> None:
        with pytest.raises(DataError, match="either side"):
            auc([], [1.0])
        with pytest.raises(NumericalError, match="NaN"):
            auc([math.nan], [1.0])
        for fpr in (1.5, 0.0, math.nan):
            with pytest.raises(ConfigError, match="fpr="):
                tpr_at_fpr([1.0], [0.0], fpr)

    def test_of_populations(self) -> None:
        few, many = features(1, 3, 1.0), features(2, 10, 1.0)
        with pytest.raises(ConfigError, match="'lira'"):
            population_attack(many, many, many, "lira")
        with pytest.raises(DataError, match="at least 4"):
            population_attack(few, many, many)
        with pytest.raises(DataError, match="at least 1"):
            population_attack(many, many, {name: value[:0] for name, value in many.items()})
        with pytest.raises(DataError, match="entropy"):
            population_attack({"loss": many["loss"]}, many, many)
        with pytest.raises(NumericalError, match="NaN"):
            population_attack({**many, "loss": many["loss"] * math.nan}, many, many)

    def test_of_shadows(self) -> None:
        one, two, three = (shadows(m, m, 4) for m in (1, 2, 3))
        for attack in (u_lira, ruli):
            with pytest.raises(DataError, match="at least 2"):
                attack(one, two, two)
            with pytest.raises(DataError, match="at least 2"):
                attack(two, one, two)
            with pytest.raises(DataError, match="same samples"):
                attack(two, two, two[0, :3])
            with pytest.raises(NumericalError, match="NaN"):
                attack(two, two * math.nan, two)
        with pytest.raises(DataError, match="at least 3"):
            shadow_attack(three, two)
        with pytest.raises(ConfigError, match="floor"):
            u_lira(two, two, two, floor=0.0)
        with pytest.raises(ConfigError, match="bandwidth"):
            ruli(two, two, two, bandwidth=-1.0)
