"""The readout of the other samples' features: against scikit-learn, fitted without each sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import Gaussian, TrainSettings, build_model, load_dataset, suggest, train

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def wrong():
    x, y = load_dataset("digits", max_train=600).train.tensors
    bad = np.sort(np.random.default_rng(0).choice(600, 60, replace=False))
    y = y.clone()
    y[bad] = (y[bad] + 1 + torch.from_numpy(bad) % 9) % 10
    data, settings = TensorDataset(x, y), TrainSettings(epochs=30, batch_size=50, lr=0.1)
    fresh = build_model("mlp", (1, 8, 8), 10, seed=0, hidden=[32])
    return train(fresh, data, settings, seed=0, **QUIET), data, bad


@pytest.mark.parametrize("classes", [True, False])
def test_the_readout_is_the_one_fitted_without_the_sample(classes):
    """Against scikit-learn's ridge, fitted anew without each sample."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    model = nn.Sequential(body, nn.Linear(6, 3)).double().eval()
    y = torch.arange(30) % 3 if classes else torch.randn(30, 3, generator=g, dtype=torch.float64)
    options = {} if classes else {"likelihood": Gaussian(reduction="sum")}
    found = suggest(model, TensorDataset(x, y), kind="mislabelled", **options, **QUIET)
    features = body(x).detach().numpy()
    targets = np.eye(3)[y] if classes else y.numpy()
    strength = 30 * 0.1 * np.trace(np.cov(features.T, bias=True)) / 6
    scores = []
    for i in range(30):
        keep = np.delete(np.arange(30), i)
        fitted = Ridge(alpha=strength).fit(features[keep], targets[keep])
        f = fitted.predict(features[i : i + 1])[0]
        margin = np.delete(f, int(y[i])).max() - f[int(y[i])] if classes else 0
        scores.append(margin if classes else ((f - targets[i]) ** 2).sum())
    # scikit-learn centres by the mean of the 29, at the same strength: that is exact
    by_sample = found.table.sort_values("sample")["score"]
    np.testing.assert_allclose(by_sample, scores, rtol=1e-8, atol=1e-10)


def test_without_a_linear_layer_at_the_end_the_outputs_are_the_features(wrong):
    model, data, bad = wrong
    last = nn.Conv1d(32, 10, 1)
    with torch.no_grad():
        last.weight.copy_(model[-1].weight[:, :, None])
        last.bias.copy_(model[-1].bias)
    twin = nn.Sequential(model[:-1], nn.Unflatten(1, (32, 1)), last, nn.Flatten()).eval()
    found = suggest(twin, data, kind="mislabelled", **QUIET)
    assert np.isin(found.indices(60), bad).mean() > 0.8


def test_where_features_do_not_fit_the_memory_the_outputs_stand_for_them():
    x, y = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    wide, same = nn.Linear(300, 4).eval(), nn.Linear(4, 4).eval()
    with torch.no_grad():
        same.weight.copy_(torch.eye(4))
        same.bias.zero_()
        outputs = TensorDataset(wide(x), y)
    tight = suggest(wide, TensorDataset(x, y), kind="mislabelled", memory=2**20, **QUIET)
    plain = suggest(same, outputs, kind="mislabelled", **QUIET)
    np.testing.assert_allclose(tight.table["score"], plain.table["score"], atol=1e-6)


def test_labels_that_are_not_scored_come_last(wrong):
    model, data, _ = wrong
    x, y = data.tensors
    y = y.clone()
    y[:5] = -100
    found = suggest(model, TensorDataset(x, y), kind="mislabelled", **QUIET).table
    assert sorted(found["sample"][-5:]) == list(range(5))
    assert np.isneginf(found["score"][-5:]).all()
    assert np.isfinite(found["score"][:-5]).all()
