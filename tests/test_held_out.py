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
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import ConfigError, DataError, Influence, suggest
from fisher_forget.data.split import resolve_split
from fisher_forget.influence.held_out import GAPS, gap_between, mean_loss
from fisher_forget.likelihood import Bernoulli, Categorical
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
    assert measure.value == pytest.approx(float(wanted))
    gradient = torch.autograd.grad(wanted, list(model.parameters()))
    found = measure.gradient(objective, split, np.arange(90))
    torch.testing.assert_close(tuple(found.values()), gradient, rtol=1e-9, atol=1e-12)
    lots = list(measure.lots(8, 0))
    assert sorted(np.concatenate(lots)) == list(range(90))
    parts = [measure.gradient(objective, split, lot)["weight"] for lot in lots]
    torch.testing.assert_close(sum(parts), found["weight"], rtol=1e-9, atol=1e-12)


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
        assert gap_between(gap, objective, split, groups).value == pytest.approx(value, abs=1e-6)
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
            gap_between(gap, *opened(*pair), groups).value
            for pair in ((model, data, Categorical()), (one, binary, Bernoulli()))
        ]
        assert values[0] == pytest.approx(values[1])


def test_the_mean_loss_is_over_scored_positions():
    model, data, _ = world()
    objective, split = opened(model, data)
    measure = mean_loss(objective, split)
    loss = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1])
    assert measure.value == pytest.approx(float(loss))


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


def test_groups_are_those_of_the_data_set_that_held_out_samples_are_of():
    model, data, groups = world()
    train, rows = Subset(data, range(40)), [80, 41, 60, 56, 43, 70, 89, 63]
    found = [
        suggest(model, train, kind="worst_group", held_out=held_out, groups=names, **QUIET).table
        for held_out, names in (
            (Subset(data, rows), groups),
            (TensorDataset(*data[sorted(rows)]), pd.Series(groups[sorted(rows)])),
        )
    ]
    pd.testing.assert_frame_equal(*found)


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
        read = influence.read(
            [measure.gradient(influence.objective, split, lot) for lot in measure.lots(8, seed)]
        )
        error = read.products.std(1) * 8**0.5
        shares.append(float((-read.products.sum(1) > 2 * error).double().mean()))
    assert np.mean(shares) < 0.15


@pytest.mark.parametrize("gap", GAPS)
def test_the_standard_error_is_the_spread_over_held_out_samples(gap):
    """Against 400 draws of other held-out samples with the same c_n: their spread is known to 4 %,
    and three such errors are allowed."""
    model, _, _ = world()
    g = torch.Generator().manual_seed(1)
    names, values, errors = np.arange(600) % 2, [], []
    for _ in range(400):
        x = torch.randn(600, 4, generator=g, dtype=torch.float64)
        x[:, 1] += 3 * torch.from_numpy(names)  # far apart: always the same groups
        y = torch.randint(2, (600,), generator=g)
        measure = gap_between(gap, *opened(model, TensorDataset(x, y)), names)
        values.append(measure.value)
        errors.append(measure.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        (["a"] * 50, ConfigError, "the one group 'a'.*at least two"),
        (["a", "b"] * 20, ConfigError, r"groups of shape \[40\].*50 names"),
        ([["a"]] * 50, ConfigError, r"groups of shape \[50, 1\]"),
        ([None, *["a", "b"] * 24, "a"], ConfigError, "no group of the held-out sample 0"),
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
    with pytest.raises(DataError, match="'a' without a held-out sample of the label 0"):
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
