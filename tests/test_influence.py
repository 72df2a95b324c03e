"""Influence: each sample's gradient along directions and its length, against autograd, retraining
and known faults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from problems import regression, ridge, softmax_minimiser
from scipy.stats import binom, spearmanr
from small_models import MODELS, prepared
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import suggest as measured
from fisher_forget import (
    ConfigError,
    CurvatureError,
    DataError,
    Gaussian,
    Influence,
    ModelError,
    SplitError,
    TrainSettings,
    build_model,
    estimate_curvature,
    load_dataset,
    suggest,
    train,
)
from fisher_forget import params as P
from fisher_forget._util.files import read_json
from fisher_forget.data.split import resolve_split
from fisher_forget.influence import Suggestions
from fisher_forget.influence.influence import drawn
from fisher_forget.influence.products import mean_gradient, read_gradients
from fisher_forget.likelihood import Categorical
from fisher_forget.report import plots
from fisher_forget.unlearn.objective import Objective

QUIET = {"progress": False}


def one_by_one(objective: Objective, split) -> list[P.Params]:
    """Gradients by plain autograd, a sample at a time."""
    model, found = objective.model, []
    for i in split.retain:
        (batch,) = split.batches(np.array([i]))
        out = P.call(model, {}, batch.args, batch.kwargs)
        loss = objective.likelihood.losses(out, batch.targets).sum()
        found.append(P.zeros_like(objective.start) | P.pull(loss, objective.tape.params))
    return found


def opened(name: str, batch_size: int = 4):
    model, data = prepared(name)
    split = resolve_split(DataLoader(data, batch_size), [], allow_empty=True)
    return Objective(model, Categorical()), split


# the primitive


@pytest.mark.parametrize("structure", ["ekfac", "diagonal"])
@pytest.mark.parametrize("name", MODELS)
def test_products_and_lengths_are_those_of_autograd(name, structure):
    objective, split = opened(name)
    curvature = estimate_curvature(
        objective.tape, split, objective.likelihood, structure=structure
    ).damped(0.1)
    generator = torch.Generator().manual_seed(0)
    directions = [P.randn_like(objective.start, generator) for _ in range(3)]
    read = read_gradients(objective, split, split.retain, directions, curvature)
    gradients = one_by_one(objective, split)
    products = np.array([[P.dot(g, v) for v in directions] for g in gradients])
    squares = np.array([P.dot(g, curvature.power(g, -1)) for g in gradients])
    np.testing.assert_allclose(read.products, products, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(read.squares, squares, rtol=1e-9, atol=1e-9)
    counts = [float(objective.likelihood.counts(b.targets).sum()) for b in split.batches("all")]
    assert read.positions == sum(counts)


@pytest.mark.parametrize("name", MODELS)
def test_weighted_gradients_are_sums_of_those_of_autograd(name):
    objective, split = opened(name)
    gradients = one_by_one(objective, split)
    weights = torch.linspace(-1, 2, len(gradients), dtype=torch.float64)
    found = mean_gradient(objective, split, split.retain, weights)
    wanted = P.zeros_like(found)
    for c, g in zip(weights.tolist(), gradients, strict=True):
        wanted = P.add(wanted, g, c / len(gradients))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_well_fitted_sample_has_its_gradient_in_single_precision_too():
    """p - 1 of the label is 0 in float32, though the other entries are not."""
    model = nn.Linear(3, 4).eval()
    data = TensorDataset(30 * torch.eye(3), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        model.weight.copy_(torch.eye(4)[:, :3])
        model.bias.copy_(torch.tensor([0.0, 0.1, 0.2, 0.3]))
    read = {}
    for dtype in (torch.float32, torch.float64):
        twin = nn.Linear(3, 4).to(dtype).eval()
        twin.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()})
        split = resolve_split(
            TensorDataset(data.tensors[0].to(dtype), data.tensors[1]), [], allow_empty=True
        )
        objective = Objective(twin, Categorical())
        along = {"weight": torch.eye(4, 3, dtype=dtype), "bias": torch.zeros(4, dtype=dtype)}
        read[dtype] = read_gradients(objective, split, split.retain, [along]).products
    assert float(read[torch.float64].abs().max()) < 1e-10
    torch.testing.assert_close(read[torch.float32], read[torch.float64], rtol=1e-4, atol=0.0)


def test_neither_batches_nor_memory_change_the_result():
    found = []
    for size, memory in ((2, 2**20), (7, 2**30)):
        model, data = prepared("residual")
        influence = Influence.of(model, DataLoader(data, size), memory=memory, damping=0.1)
        found.append(torch.stack([influence.on(data), influence.own()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-12)


# against retraining


def test_of_ridge_regression_it_is_the_derivative_of_the_minimum():
    """dw/de of (1/N) (sum_n l_n - e l_i) + (wd/2)|w|^2 in closed form. Of one layer with this
    loss, EKFAC is exact."""
    (x, y), decay = regression(), 0.1
    data, target = TensorDataset(x[:50], y[:50]), TensorDataset(x[50:], y[50:])
    model = ridge(*data.tensors, decay)
    influence = Influence.of(
        model, data, likelihood=Gaussian(reduction="sum"), weight_decay=decay, damping=1e-12
    )
    ones = torch.cat([x, torch.ones(60, 1).double()], 1)
    a, b = ones[:50], ones[50:]
    inverse = torch.linalg.inv(a.T @ a / 50 + decay * torch.eye(6).double())
    left = a @ torch.cat([model.weight.detach().T, model.bias.detach()[None]]) - y[:50]
    beside = b @ torch.cat([model.weight.detach().T, model.bias.detach()[None]]) - y[50:]
    # g_i = a_i left_i^T, so that g . H^-1 g_i = (b_j^T H^-1 a_i) (beside_j . left_i)
    wanted = ((b @ inverse @ a.T) * (beside @ left.T)).mean(0) / 50
    torch.testing.assert_close(influence.on(target), wanted, rtol=1e-6, atol=1e-12)
    own = (a @ inverse * a).sum(1) * left.square().sum(1) / 50
    torch.testing.assert_close(influence.own(), own, rtol=1e-6, atol=1e-12)


def test_of_logistic_regression_it_predicts_leaving_one_out():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    y = (x[:, 0] + 0.7 * torch.randn(60, generator=g) > 0).long()
    train_x, train_y, decay = x[:40], y[:40], 0.02

    def fit(keep: np.ndarray) -> nn.Module:
        rate = decay * 40 / len(keep)  # the sum of losses keeps its weight beside the decay
        return softmax_minimiser(nn.Linear(3, 2).double(), train_x[keep], train_y[keep], rate)

    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(x[40:]), y[40:]))

    full = fit(np.arange(40))
    actual = [loss(fit(np.delete(np.arange(40), i))) - loss(full) for i in range(40)]
    data = TensorDataset(train_x, train_y)
    influence = Influence.of(full, data, weight_decay=decay, damping=1e-12)
    found = influence.on(TensorDataset(x[40:], y[40:])).numpy()
    assert spearmanr(found, actual)[0] > 0.95
    assert np.polyfit(found, actual, 1)[0] == pytest.approx(1, abs=0.25)


# suggestions


@pytest.fixture(scope="module")
def digits():
    bundle = load_dataset("digits", max_train=600)
    return bundle.train.tensors, bundle.test


def trained(x, y, seed: int = 0) -> nn.Module:
    settings = TrainSettings(epochs=30, batch_size=50, lr=0.1, weight_decay=5e-4)
    fresh = build_model("mlp", (1, 8, 8), 10, seed=seed, hidden=[32])
    return train(fresh, TensorDataset(x, y), settings, seed=seed, **QUIET)


def share(found, bad: np.ndarray) -> float:
    return float(np.isin(found.indices(len(bad)), bad).mean())


@pytest.fixture(scope="module")
def wrong(digits):
    (x, y), _ = digits
    bad = np.sort(np.random.default_rng(0).choice(600, 60, replace=False))
    y = y.clone()
    y[bad] = (y[bad] + 1 + torch.from_numpy(bad) % 9) % 10
    return trained(x, y), TensorDataset(x, y), bad


@pytest.mark.parametrize(
    ("kind", "least"), [("mislabelled", 0.8), ("memorised", 0.8), ("harmful", 0.6)]
)
def test_wrong_labels_come_first(wrong, digits, kind, least):
    model, data, bad = wrong
    held_out = {"held_out": digits[1]} if kind == "harmful" else {}
    found = suggest(model, data, kind=kind, **held_out, **QUIET)
    assert share(found, bad) > least
    assert sorted(found.table["sample"]) == list(range(600))
    assert found.table["score"].is_monotonic_decreasing
    assert ("standard_error" in found.table) == (kind == "harmful")
    assert (
        found.table["label"].to_numpy() == data.tensors[1][found.table["sample"].tolist()].numpy()
    ).all()
    assert found.meaning in str(found)


def test_right_labels_come_as_chance_has_it(digits):
    """Of samples drawn at random with nothing wrong, the share among the first is hypergeometric;
    the bound has a false-alarm rate of 1 %."""
    (x, y), _ = digits
    drawn = np.random.default_rng(0).choice(600, 60, replace=False)
    hits = 60 * share(
        suggest(trained(x, y), TensorDataset(x, y), kind="mislabelled", **QUIET), drawn
    )
    assert hits <= binom.ppf(0.99, 60, 0.1)


def test_the_crowd_is_not_drawn_as_the_faults_were():
    """Of 20,000 samples with the same seed. One in ten is faulty; that one in five of a crowd of
    1,000 is has a probability below 1e-20."""
    bad = np.random.default_rng(0).choice(20_000, 2000, replace=False)
    assert np.isin(drawn(np.arange(20_000), 1000, 0), bad).mean() < 0.2


@pytest.fixture(scope="module")
def poisoned(digits):
    (x, y), _ = digits
    bad = np.sort(np.random.default_rng(1).choice(np.flatnonzero(y != 0), 60, replace=False))
    x, y = x.clone(), y.clone()
    x[bad, :, -3:, -3:], y[bad] = x.max(), 0
    return trained(x, y), TensorDataset(x, y), bad


@pytest.mark.parametrize("count", [6, 30])
def test_the_rest_of_the_poison_comes_first(poisoned, count):
    model, data, bad = poisoned
    known = np.random.default_rng(0).choice(bad, count, replace=False)
    found = suggest(model, data, kind="poisoned", known=known, **QUIET)
    rest = np.setdiff1d(bad, known)
    assert share(found, rest) > 0.85
    assert not np.isin(known, found.table["sample"]).any()
    assert 0.9 * len(rest) <= found.likely <= 1.1 * len(rest)


def test_clean_samples_have_no_rest(poisoned):
    """One half of clean samples drawn at random does not tell the other; false-alarm rate 1 %."""
    model, data, bad = poisoned
    clean = np.random.default_rng(2).permutation(np.setdiff1d(np.arange(600), bad))[:120]
    found = suggest(model, data, kind="poisoned", known=clean[:60], **QUIET)
    assert 60 * share(found, clean[60:]) <= binom.ppf(0.99, 60, 60 / 540)


def test_harm_is_the_influence_on_the_mean_held_out_loss(wrong, digits):
    model, data, _ = wrong
    influence = Influence.of(model, data)
    assert influence.on(digits[1]).shape == (600,)
    table = suggest(model, data, kind="harmful", held_out=digits[1], **QUIET).table
    scores = table.sort_values("sample")["score"].to_numpy()
    np.testing.assert_allclose(scores, -influence.on(digits[1]).numpy(), rtol=1e-3, atol=1e-7)


def test_other_losses_and_layouts():
    x, y = regression()
    found = suggest(ridge(x, y, 0.1), TensorDataset(x, y), likelihood="mse", **QUIET)
    assert list(found.table) == ["sample", "score", "loss"]
    model, data = prepared("sequence")
    found = suggest(model, data, **QUIET)
    assert list(found.table) == ["sample", "score", "loss"]
    with pytest.raises(DataError, match="one row of outputs"):
        suggest(model, data, kind="mislabelled", **QUIET)
    pairs = [{"a": a, "b": b} for a, b in zip(*data.tensors, strict=True)]
    twin = suggest(model, DataLoader(pairs, 2), unpack=lambda d: (d["a"], d["b"]), **QUIET)
    np.testing.assert_allclose(twin.table["score"], found.table["score"], rtol=1e-9)


def test_nothing_given_is_changed(wrong):
    model, data, _ = wrong
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (suggest(model, data, kind="mislabelled", **QUIET).table for _ in range(2))
    assert first.equals(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_pictures_of_the_first(poisoned):
    model, data, bad = poisoned
    found = suggest(model, data, kind="poisoned", known=bad[:10], **QUIET)
    ax = plots.plot_suggestions(found, data.tensors[0], count=7)
    assert len(ax.images) == 7
    said = [text.get_text() for text in ax.texts]
    assert [int(text[1:].split(":")[0]) for text in said] == found.indices(7).tolist()
    with pytest.raises(DataError, match="600 samples"):
        plots.plot_suggestions(found, data.tensors[0][:20])
    with pytest.raises(DataError, match=r"x\.reshape\(-1, 1, 8, 8\).*table"):
        plots.plot_suggestions(found, data.tensors[0].flatten(1))


def test_a_label_that_the_loss_ignores_leaves_the_others_in_the_table(wrong):
    model, data, _ = wrong
    x, y = data.tensors
    y = torch.where(torch.arange(len(y)) == 3, -100, y)
    found = suggest(model, TensorDataset(x, y), **QUIET)
    assert found.table.set_index("sample")["label"].sort_index().tolist() == y.tolist()
    found = replace(found, table=found.table.sort_values("label"))
    ax = plots.plot_suggestions(found, x.reshape(-1, 1, 8, 8), 3, classes=list("abcdefghij"))
    assert ax.texts[0].get_text().startswith("#3: -100 →")


@pytest.mark.parametrize(("count", "said"), [(20, False), (21, True)])
def test_a_poison_like_everything_is_said_to_be_none(count, said):
    table = pd.DataFrame({"sample": range(100), "score": 0.0})
    found = Suggestions("poisoned", "How much.", table, likely=count)
    assert f"{count} score like the known ones." in str(found)
    assert ("the known ones have little in common that others lack" in str(found)) is said


# bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kind": "bad"}, ConfigError, "one of .*poisoned"),
        ({"kind": "harmful"}, ConfigError, "without held_out"),
        ({"kind": "poisoned"}, ConfigError, "without known"),
        ({"kind": "memorised", "known": [1]}, ConfigError, "does not look at"),
        ({"kind": "poisoned", "known": []}, SplitError, "an empty known"),
        ({"kind": "poisoned", "known": range(600)}, SplitError, "every sample.*Nothing is left"),
        ({"kind": "poisoned", "known": [600]}, SplitError, "the index 600 in known"),
        ({"kind": "poisoned", "known": [3, 3]}, SplitError, "known that repeats"),
        ({"kind": "poisoned", "known": [-1]}, SplitError, "negative index -1 in known"),
        ({"dampening": 1.0}, ConfigError, "damping"),
        ({"damping": -1.0}, ConfigError, "damping"),
    ],
)
def test_wrong_requests_say_what_is_wrong(wrong, options, error, match):
    model, data, _ = wrong
    with pytest.raises(error, match=match):
        suggest(model, data, **options, **QUIET)


def test_held_out_samples_must_be_unseen_and_some(wrong, digits):
    model, data, _ = wrong
    seen = TensorDataset(
        *(torch.cat([a, b[:3]]) for a, b in zip(digits[1].tensors, data.tensors, strict=True))
    )
    with pytest.raises(SplitError, match="3 held-out samples that are training samples"):
        suggest(model, data, kind="harmful", held_out=seen, **QUIET)
    one = TensorDataset(*(x[:1] for x in digits[1].tensors))
    with pytest.raises(SplitError, match="1 held-out samples"):
        suggest(model, data, kind="harmful", held_out=one, **QUIET)


def test_models_and_data_that_cannot_be_used():
    data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
    with pytest.raises(ModelError, match="trainable"):
        suggest(nn.Flatten(), data, **QUIET)
    single = TensorDataset(torch.eye(3)[:1], torch.tensor([0]))
    with pytest.raises(SplitError, match="1 training samples"):
        suggest(nn.Linear(3, 2).eval(), single, **QUIET)
    objective, split = opened("mlp")
    dense = estimate_curvature(objective.tape, split, objective.likelihood, structure="dense")
    with pytest.raises(CurvatureError, match="EKFAC"):
        read_gradients(objective, split, split.retain, metric=dense.damped(0.1))


def test_a_class_without_samples_is_no_error(wrong):
    model, data, _ = wrong
    few = TensorDataset(*(x[data.tensors[1] != 4] for x in data.tensors))
    assert len(suggest(model, few, kind="mislabelled", **QUIET).table) == len(few)


def test_asking_for_more_samples_than_there_are(wrong):
    found = suggest(*wrong[:2], **QUIET)
    for k in (0, 601, 2.5):
        with pytest.raises(ConfigError, match="from 1 to 600"):
            found.indices(k)


def test_the_tables_of_the_page_are_those_that_were_measured():
    stored, page = read_json(measured.STORED), measured.PAGE.read_text(encoding="utf-8")
    assert set(stored) == set(measured.TABLES)
    for name, table in stored.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        assert page.split(begin)[1].split(end)[0] == f"\n{table}\n\n"
