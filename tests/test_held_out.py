"""What held-out samples say of a model: against fairlearn, autograd and retraining."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    equalized_odds_difference,
    selection_rate,
)
from problems import softmax_minimiser
from scipy.stats import permutation_test, spearmanr
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import ConfigError, DataError, Influence, harm_by_group, suggest
from fisher_forget.data.split import resolve_split
from fisher_forget.influence.held_out import GAPS, gap_between, mean_loss
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian
from fisher_forget.unlearn.objective import Objective

QUIET = {"progress": False}


def world(scale: float = 1.0):
    """A model of two classes, samples and groups."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=g, dtype=torch.float64)
    groups = np.array(list("abc"))[np.arange(90) % 3]
    y = (x[:, 0] + 0.3 * torch.from_numpy(groups == "a") + 0.2 * x[:, 1] > 0.1).long()
    model = nn.Linear(4, 2).double().eval()
    with torch.no_grad():
        model.weight.copy_(scale * torch.randn(2, 4, generator=g))
        model.bias.zero_()
    return model, TensorDataset(x, y), groups


def opened(model, data, likelihood=None):
    split = resolve_split(DataLoader(data, 7), [], allow_empty=True)
    return Objective(model, likelihood or Categorical()), split


def by_hand(gap, model, data, groups):
    """The gap of probabilities by fairlearn, as a differentiable number by plain torch."""
    x, y = data.tensors
    outputs = model(x)
    if gap == "worst_group":
        losses = nn.functional.cross_entropy(outputs, y, reduction="none")
        return max(losses[torch.from_numpy(groups == a)].mean() for a in np.unique(groups))
    p, gaps = outputs.softmax(1)[:, 1], []
    for label in (0, 1) if gap == "equalised_odds" else (None,):
        inside = torch.ones(len(y), dtype=bool) if label is None else y == label
        rates = [p[inside & torch.from_numpy(groups == a)].mean() for a in np.unique(groups)]
        gaps.append(max(rates) - min(rates))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("gap", GAPS)
def test_values_and_gradients_are_those_of_autograd(gap):
    model, data, groups = world()
    objective, split = opened(model, data)
    measure = gap_between(gap, objective, split, groups)
    wanted = by_hand(gap, model, data, groups)
    assert measure.gap.value == pytest.approx(float(wanted.detach()))
    gradient = torch.autograd.grad(wanted, list(model.parameters()))
    found, _ = measure.gradients(objective, split, 8, 0)
    torch.testing.assert_close(tuple(found.values()), gradient, rtol=1e-9, atol=1e-12)


def test_of_sure_decisions_the_gaps_are_those_of_fairlearn():
    model, data, groups = world(scale=1e4)
    objective, split = opened(model, data)
    y, said = data.tensors[1].numpy(), model(data.tensors[0]).argmax(1).numpy()
    named = {"sensitive_features": groups}
    wanted = {
        "demographic_parity": demographic_parity_difference(y, said, **named),
        "equalised_odds": equalized_odds_difference(y, said, agg="mean", **named),
    }
    for gap, value in wanted.items():
        assert gap_between(gap, objective, split, groups).gap.value == pytest.approx(
            value, abs=1e-6
        )
    rates = MetricFrame(metrics=selection_rate, y_true=y, y_pred=said, **named).by_group
    told = gap_between("demographic_parity", objective, split, groups).groups
    assert told == f"{rates.idxmax()} and {rates.idxmin()}"


def test_one_output_and_two_are_the_same_model():
    model, data, groups = world()
    one = nn.Linear(4, 1).double().eval()
    with torch.no_grad():
        one.weight.copy_(model.weight[1:] - model.weight[:1])
        one.bias.copy_(model.bias[1:] - model.bias[:1])
    binary = TensorDataset(data.tensors[0], data.tensors[1].double()[:, None])
    for gap in GAPS:
        values = [
            gap_between(gap, *opened(*pair), groups).gap.value
            for pair in ((model, data, Categorical()), (one, binary, Bernoulli()))
        ]
        assert values[0] == pytest.approx(values[1])


def test_the_mean_loss_is_over_scored_positions():
    model, data, _ = world()
    objective, split = opened(model, data)
    loss = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1])
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    found, _ = mean_loss(objective, split).gradients(objective, split, 8, 0)
    torch.testing.assert_close(tuple(found.values()), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", GAPS)
def test_of_logistic_regression_it_predicts_the_gap_without_each_sample(gap):
    _, data, groups = world()
    (x, y), decay = data.tensors, 0.02

    def fit(keep):
        rate = decay * 45 / len(keep)
        return softmax_minimiser(nn.Linear(4, 2).double(), x[:45][keep], y[:45][keep], rate)

    unseen = TensorDataset(x[45:], y[45:])
    full = fit(np.arange(45))
    before = float(by_hand(gap, full, unseen, groups[45:]))
    falls = [
        before - float(by_hand(gap, fit(np.delete(np.arange(45), i)), unseen, groups[45:]))
        for i in range(45)
    ]
    train = TensorDataset(x[:45], y[:45])
    options = {"held_out": unseen, "groups": groups[45:], "weight_decay": decay, "damping": 1e-12}
    found = suggest(full, train, kind=gap, **options, **QUIET)
    scores = found.table.sort_values("sample")["score"]
    assert spearmanr(scores, falls)[0] > 0.9
    assert found.gap[0] == pytest.approx(before)
    assert f"It is {before:.3g} now" in str(found)
    assert (found.table["standard_error"] > 0).all()


@pytest.mark.parametrize("gap", GAPS)
def test_names_are_those_of_the_held_out_samples_in_their_order(gap):
    """Of a `Subset` in any order, of a loader's data set, of pandas, and of the samples alone."""
    model, data, groups = world()
    train, rows = Subset(data, range(30)), np.random.default_rng(0).permutation(np.arange(30, 90))
    part = Subset(Subset(data, rows.tolist()), range(59, -1, -1))
    own = rows[::-1].copy()
    x, y = data[own]
    sampler = torch.utils.data.SubsetRandomSampler(own.tolist())
    pairs = [
        (TensorDataset(x, y), groups[own]),
        (part, groups[own]),
        (DataLoader(part, 7, shuffle=True), pd.Series(groups[own], index=own)),
        (DataLoader(data, 7, sampler=sampler), [*[None] * 30, *groups[30:]]),
    ]
    found = [
        suggest(model, train, kind=gap, held_out=held_out, groups=names, **QUIET)
        for held_out, names in pairs
    ]
    for other in found[1:]:
        assert other.gap[:2] == pytest.approx(found[0].gap[:2])
        order = [t.table.sort_values("sample")["score"].to_numpy() for t in (other, found[0])]
        np.testing.assert_allclose(*order, rtol=1e-8, atol=1e-12)


def test_a_sample_that_is_held_out_twice_has_one_group():
    model, data, _ = world()
    held_out = Subset(data, [40, 41, 42, 43, 40])
    options = {"kind": "worst_group", "held_out": held_out, **QUIET}
    with pytest.warns(UserWarning, match="counts once"):
        found = suggest(model, Subset(data, range(30)), groups=list("ababa"), **options)
    assert 0 < found.gap.p_value <= 1
    with (
        pytest.warns(UserWarning, match="counts once"),
        pytest.raises(ConfigError, match="the sample 4 a second time, in another group"),
    ):
        suggest(model, Subset(data, range(30)), groups=list("abaab"), **options)


@pytest.mark.parametrize("kind", [*GAPS, "harmful"])
def test_samples_without_a_target_that_counts_are_as_if_left_out(kind):
    model, data, groups = world()
    x, y = (t[30:] for t in data.tensors)
    ignored = torch.arange(60) % 5 == 1
    unseen = (
        TensorDataset(x, torch.where(ignored, -100, y)),
        TensorDataset(x[~ignored], y[~ignored]),
    )
    names = groups[30:], groups[30:][~ignored.numpy()]
    found = [
        suggest(
            model,
            Subset(data, range(30)),
            kind=kind,
            held_out=held_out,
            groups=None if kind == "harmful" else own,
            **QUIET,
        )
        for held_out, own in zip(unseen, names, strict=True)
    ]
    assert found[0].gap == (None if kind == "harmful" else pytest.approx(found[1].gap))
    scores = [f.table.sort_values("sample")["score"].to_numpy() for f in found]
    np.testing.assert_allclose(*scores, rtol=1e-8, atol=1e-12)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, x):
        return self.out(self.table(x))


def test_the_worst_of_groups_of_sequences_is_that_of_harm_by_group():
    """Mean nats a scored position, however many of these a sample has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens().double().eval()
        x = torch.randint(0, 7, (100, 5))
    y = (x + 1) % 7
    y[50:75, 1:] = -100  # one position a sample, five in the other group
    unseen, names = TensorDataset(x[50:], y[50:]), ["a"] * 25 + ["b"] * 25
    train = TensorDataset(x[:50], y[:50])
    found = suggest(model, train, kind="worst_group", held_out=unseen, groups=names, **QUIET)
    harm = harm_by_group(model, model, unseen, names)
    worst = max(harm.groups, key=lambda g: g.loss[0])
    assert f"The groups: {worst.name}." in found.meaning
    assert found.gap.value == pytest.approx(worst.loss[0])


@pytest.mark.parametrize("size", [5, 12, 41])
def test_the_standard_error_of_a_score_is_unbiased_in_lots_of_unequal_size(size):
    """Against the closed form of a mean's variance, far from 0. One draw of lots has the spread of
    chi-squared of at most 7 degrees of freedom, sqrt(2 / 7); 300 draws are given four of their
    standard errors, .12. Of 5 samples there is one lot each, and nothing is left to chance."""
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(size)).double()
    y = 0.3 * x.sum(1, keepdim=True) + 5
    model = nn.Linear(2, 1).double().eval()
    objective, split = opened(model, TensorDataset(x, y), Gaussian())
    residual = (model(x) - y).detach()
    each = residual[:, 0]  # along the bias
    measure, squares = mean_loss(objective, split), []
    for seed in range(300):
        _, lots = measure.gradients(objective, split, 8, seed)
        squares.append(sum(float(g["bias"].sum()) ** 2 for g in lots))
    wanted = float(each.var()) / size
    assert np.mean(squares) == pytest.approx(wanted, rel=1e-6 if size == 5 else 0.12)


def test_the_standard_error_of_a_gaps_score_is_that_of_two_means():
    """Groups of 5 and 26, means far from 0 and apart; over 300 draws of lots, as above."""
    g = torch.Generator().manual_seed(0)
    x, names = torch.randn(31, 4, generator=g).double(), np.array(["a"] * 5 + ["b"] * 26)
    x = 0.3 * x + torch.from_numpy(np.where(names == "a", 2.0, 1.0))[:, None]
    model, _, _ = world()
    objective, split = opened(model, TensorDataset(x, torch.arange(31) % 2))
    measure, squares = gap_between("demographic_parity", objective, split, names), []
    p = model(x).softmax(1)[:, 1].detach()
    each = (p * (1 - p))[:, None] * x  # dp_n/dw of the second class
    wanted = float(sum(each[names == a].sum(1).var() / (names == a).sum() for a in "ab"))
    for seed in range(300):
        _, lots = measure.gradients(objective, split, 8, seed)
        squares.append(sum(float(g["weight"][1].sum()) ** 2 for g in lots))
    assert np.mean(squares) == pytest.approx(wanted, rel=0.12)


@pytest.mark.parametrize("groups", [2, 5])
@pytest.mark.parametrize("gap", GAPS)
def test_of_groups_by_chance_one_in_twenty_gaps_is_beyond_it(gap, groups, monkeypatch):
    """200 draws with 99 shuffles, which are exact at .05: more than 21 of them (four standard
    deviations) have a probability of 1e-4."""
    monkeypatch.setattr("fisher_forget.influence.held_out.SHUFFLES", 99)
    model, data, _ = world()
    objective, split = opened(model, data)
    rng, beyond = np.random.default_rng(0), 0
    for seed in range(200):
        names = rng.permutation(np.arange(90) % groups)
        beyond += not gap_between(gap, objective, split, names, seed).gap.within_chance
    assert beyond <= 22


def test_groups_that_only_the_labels_tell_have_no_gap_in_odds(monkeypatch):
    """Drawn given the label alone: a gap in parity, and none of odds beyond chance, as above."""
    monkeypatch.setattr("fisher_forget.influence.held_out.SHUFFLES", 99)
    model = nn.Linear(4, 2).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-2.0, 0, 0, 0], [2.0, 0, 0, 0]]))
    _, data, _ = world()
    objective, split = opened(model, data)
    rng, beyond, label = np.random.default_rng(0), 0, data.tensors[1].numpy()
    for seed in range(200):
        names = np.where(rng.random(90) < 0.8, label, 1 - label)
        parity, odds = (gap_between(g, objective, split, names, seed).gap for g in GAPS[:2])
        assert not parity.within_chance
        beyond += not odds.within_chance
    assert beyond <= 22


def test_shuffles_are_those_of_scipy():
    """Of two groups, against `scipy.stats.permutation_test`: 4 standard errors of 999 shuffles."""
    model, data, _ = world()
    names = np.arange(90) % 2
    p = model(data.tensors[0]).softmax(1)[:, 1].detach().numpy()
    wanted = permutation_test(
        (p[names == 0], p[names == 1]),
        lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)),
        vectorized=True,
        alternative="greater",
        n_resamples=20000,
        rng=np.random.default_rng(0),
    ).pvalue
    found = gap_between("demographic_parity", *opened(model, data), names).gap
    assert found.p_value == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 999) ** 0.5)


def test_what_is_printed_says_where_there_is_nothing_to_find():
    model, data, _ = world()
    x = data.tensors[0] + 0.5
    train, names = Subset(data, range(30)), np.arange(90) % 2
    for shift, told in ((0.0, True), (3.0, False)):
        moved = x + shift * torch.from_numpy(names)[:, None]
        for gap in ("demographic_parity", "worst_group"):
            held_out = TensorDataset(moved, data.tensors[1])
            found = suggest(model, train, kind=gap, held_out=held_out, groups=names, **QUIET)
            assert found.gap.within_chance is told
            assert ("within chance, nothing to find" in str(found)) is told


def test_a_random_attribute_has_as_many_sure_samples_as_chance():
    """Of a gap between groups that were drawn at random a score is above two standard errors, by
    Student's t of 7 degrees of freedom, with a probability of .043. If the scores of a draw were
    above or below it together, more than .15 in forty draws would have one of .1 %."""
    model, data, _ = world()
    unseen = TensorDataset(torch.randn(400, 4).double(), torch.arange(400) % 2)
    influence = Influence.of(model, data)
    split = resolve_split(unseen, [], allow_empty=True)
    shares = []
    for seed in range(40):
        names = np.random.default_rng(seed).integers(0, 2, 400)
        measure = gap_between("demographic_parity", influence.objective, split, names)
        whole, lots = measure.gradients(influence.objective, split, 8, seed)
        along = influence.read([whole, *lots]).products
        error = along[:, 1:].square().sum(1).sqrt()
        shares.append(float((-along[:, 0] > 2 * error).double().mean()))
    assert np.mean(shares) < 0.15


@pytest.mark.parametrize("gap", GAPS)
def test_the_standard_error_is_the_spread_over_held_out_samples(gap, monkeypatch):
    """Against 400 draws of other held-out samples with the same c_n: their spread is known to 4 %,
    and three such errors are allowed."""
    monkeypatch.setattr("fisher_forget.influence.held_out.SHUFFLES", 1)
    model, _, _ = world()
    g = torch.Generator().manual_seed(1)
    names, values, errors = np.arange(600) % 2, [], []
    for _ in range(400):
        x = torch.randn(600, 4, generator=g, dtype=torch.float64)
        x[:, 1] += 3 * torch.from_numpy(names)  # far apart: always the same groups
        y = torch.randint(2, (600,), generator=g)
        measure = gap_between(gap, *opened(model, TensorDataset(x, y)), names)
        values.append(measure.gap.value)
        errors.append(measure.gap.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        (["a"] * 50, ConfigError, "the one group 'a'.*at least two"),
        (["a", "b"] * 20, ConfigError, "40 names of groups.*50 names"),
        ([["a"]] * 50, ConfigError, "groups as a list, which is no flat list"),
        ([None, *["a", "b"] * 24, "a"], ConfigError, r"no group of 1 samples, such as \[0\]"),
        ([float("nan"), *["a", "b"] * 24, "a"], ConfigError, r"no group of 1 samples"),
        (np.array([["a"]] * 50), ConfigError, r"ndarray of shape \[50, 1\]"),
        ("gender", ConfigError, "a str, which is no flat list"),
        ({"a": range(25)}, ConfigError, "a dict, which is no flat list"),
        (["x", *["a", "b"] * 24, "a"], DataError, "'x' with [01] held-out samples of the label"),
        (None, ConfigError, "without groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, error, match):
    model, data, _ = world()
    held_out = TensorDataset(*(t[40:] for t in data.tensors))
    train = TensorDataset(*(t[:40] for t in data.tensors))
    with pytest.raises(error, match=match):
        suggest(model, train, kind="equalised_odds", held_out=held_out, groups=groups, **QUIET)


def test_a_group_without_members_of_a_label_is_refused():
    model, data, _ = world()
    x, y = data.tensors
    unseen, names = TensorDataset(x[40:], y[40:]), np.where(y[40:] == 1, "a", "b")
    with pytest.raises(DataError, match="'a' with 0 held-out samples of the label 0"):
        suggest(
            model,
            TensorDataset(x[:40], y[:40]),
            kind="equalised_odds",
            held_out=unseen,
            groups=names,
            **QUIET,
        )


def test_more_classes_than_two_have_a_worst_group_alone():
    x = torch.randn(30, 4)
    train, unseen = (
        TensorDataset(x, torch.arange(30) % 3),
        TensorDataset(x + 1, torch.arange(30) % 3),
    )
    model, options = nn.Linear(4, 3).eval(), {"held_out": unseen, "groups": [0, 1] * 15}
    with pytest.raises(ConfigError, match=r"two classes.*worst_group"):
        suggest(model, train, kind="demographic_parity", **options, **QUIET)
    assert len(suggest(model, train, kind="worst_group", **options, **QUIET).table) == 30
    with pytest.raises(ConfigError, match="does not look at"):
        suggest(model, train, kind="harmful", **options, **QUIET)
