"""What forgetting did to groups: numbers by hand, intervals by simulation, and a request that is
chosen to hurt a minority."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs_data
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import ConfigError, DataError, NumericalError, TrainSettings, forget, train
from fisher_forget.evaluate.groups import harm_by_group
from fisher_forget.evaluate.intervals import paired_interval


class Fixed(nn.Module):
    """Answers that are given, by the sample's number in its only feature."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0].long()]


def pair(n: int = 60, classes: int = 3) -> tuple[Fixed, Fixed, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, classes, generator=generator) for _ in range(2))
    y = torch.randint(classes, (n,), generator=generator)
    return Fixed(first), Fixed(second), TensorDataset(torch.arange(n)[:, None].float(), y)


def test_numbers_are_those_of_scikit_learn() -> None:
    before, after, data = pair()
    groups = np.array(["a", "b", "b"])[np.arange(60) % 3]
    harm = harm_by_group(before, after, data, groups)
    assert {g.name for g in harm.groups} == {"a", "b"}
    y = data.tensors[1].numpy()
    for group in harm.groups:
        rows = np.flatnonzero(groups == group.name)
        assert group.samples == len(rows)
        for model, score, loss in zip((before, after), group.score, group.loss, strict=True):
            p = model.logits.detach().double().softmax(1).numpy()[rows]
            assert score == pytest.approx(accuracy_score(y[rows], p.argmax(1)))
            assert loss == pytest.approx(log_loss(y[rows], p, labels=[0, 1, 2]), rel=1e-5)
        assert group.drop.value == pytest.approx(group.score[0] - group.score[1])
        assert group.drop.low < group.drop.value < group.drop.high
    assert harm.groups[0].drop.value >= harm.groups[1].drop.value
    frame = harm.to_pandas()
    assert frame["drop"].tolist() == [g.drop.value for g in harm.groups]


def test_classes_are_the_groups_by_default_and_others_may_overlap() -> None:
    before, after, data = pair()
    harm = harm_by_group(before, after, data)
    assert {g.name for g in harm.groups} == {"0", "1", "2"}
    both = harm_by_group(before, after, data, {"all": range(60), "some": [3, 5, 9]})
    assert {g.name: g.samples for g in both.groups} == {"all": 60, "some": 3}


def test_the_interval_covers() -> None:
    """3,000 draws of 40 pairs; 95 % of intervals hold the truth, within 4 standard errors (.984 to
    .934 would be 4; a false alarm once in 16,000), or more, since pairs are few and discrete."""
    rng = np.random.default_rng(0)
    lost, won, hits = 0.15, 0.05, 0
    for _ in range(3000):
        worse = rng.choice([1.0, -1.0, 0.0], 40, p=[lost, won, 1 - lost - won])
        found = paired_interval(worse)
        hits += found.low <= lost - won <= found.high
    assert 0.934 < hits / 3000 < 0.99


def test_a_request_against_a_minority_is_shown_and_refused() -> None:
    data = blobs_data(200)
    x, y = data.tensors
    minority = np.flatnonzero(y.numpy() == 2)
    keep = np.sort(np.concatenate([np.flatnonzero(y.numpy() != 2), minority[:12]]))
    data = TensorDataset(x[keep], y[keep])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Linear(x.shape[1], 3)
    settings = TrainSettings(epochs=60, lr=0.2, weight_decay=1e-3)
    model = train(start, data, settings, seed=0, progress=False)
    own = np.flatnonzero(data.tensors[1].numpy() == 2)
    options: Any = {"weight_decay": 1e-3, "noise": None, "progress": False}
    harmless = forget(model, data, [0, 1], **options).model
    harmful = forget(model, data, own[:-2], **options).model
    unseen = TensorDataset(x[minority[12:]], y[minority[12:]])
    stays = TensorDataset(*(t[:40] for t in data.tensors))
    everyone = TensorDataset(
        *(torch.cat([a, b]) for a, b in zip(stays.tensors, unseen.tensors, strict=True))
    )
    harm_by_group(model, harmless, everyone).check(0.02)
    harm = harm_by_group(model, harmful, everyone)
    assert harm.worst.name == "2"
    assert harm.worst.drop.low > 0
    with pytest.raises(NumericalError, match=r"harms groups .* '2' from .* Do not publish"):
        harm.check(0.02)
    assert "| 2" in str(harm)
    assert harm.to_dict()["groups"][0]["name"] == "2"


def test_regression() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    one, other = (nn.Linear(2, 1) for _ in range(2))
    groups = ["low" if v < 0 else "high" for v in x[:, 0]]
    harm = harm_by_group(one, other, data, groups, likelihood="gaussian")
    errors = [((m(x) - data.tensors[1]) ** 2).detach()[:, 0].double() for m in (one, other)]
    rows = torch.tensor([g == "low" for g in groups])
    low = next(g for g in harm.groups if g.name == "low")
    assert low.drop.value == pytest.approx(float((errors[1] - errors[0])[rows].mean()), rel=1e-4)
    with pytest.raises(ConfigError, match="groups="):
        harm_by_group(one, other, data, likelihood="gaussian")


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        (["a"] * 59, ConfigError),
        ({"a": [60, 1]}, ConfigError),
        ({"a": [-1, 1]}, ConfigError),
        ({"a": [0.5, 1.0]}, ConfigError),
        ({"a": []}, DataError),
        ({"a": [1]}, DataError),
        ({}, ConfigError),
        (["a"] * 59 + ["b"], DataError),
    ],
)
def test_bad_groups(groups: Any, error: type[Exception]) -> None:
    before, after, data = pair()
    with pytest.raises(error):
        harm_by_group(before, after, data, groups)


@pytest.mark.parametrize("limit", [-0.1, float("nan"), "x"])
def test_bad_limits(limit: Any) -> None:
    before, after, data = pair()
    with pytest.raises(ConfigError):
        harm_by_group(before, after, data).check(limit)


@pytest.mark.parametrize("by_index", [False, True])
def test_names_are_in_the_order_of_the_data(by_index: bool) -> None:
    """Samples of a `Subset` are read by their indices: names stay with them."""
    before, after, data = pair()
    rows = np.random.default_rng(0).permutation(60)[:30]
    part = Subset(Subset(data, rows.tolist()), range(29, -1, -1))
    own = rows[::-1]
    names = np.where(own < 20, "low", "high")
    groups: Any = {n: np.flatnonzero(names == n) for n in ("low", "high")} if by_index else names
    found = {g.name: g.score for g in harm_by_group(before, after, part, groups).groups}
    for name in ("low", "high"):
        x, y = (t[own[names == name].copy()] for t in data.tensors)
        expected = [accuracy_score(y, model(x).argmax(1)) for model in (before, after)]
        assert found[name] == pytest.approx(expected)


def test_samples_without_a_target_that_counts_are_as_if_left_out() -> None:
    before, after, data = pair()
    x, y = data.tensors
    ignored = torch.arange(60) % 4 == 1
    labels, names = torch.where(ignored, -100, y), np.arange(60) % 2
    kept = ~ignored
    assert str(harm_by_group(before, after, TensorDataset(x, labels))) == str(
        harm_by_group(before, after, TensorDataset(x[kept], y[kept]))
    )
    named = harm_by_group(before, after, TensorDataset(x, labels), names)
    assert named == harm_by_group(before, after, TensorDataset(x[kept], y[kept]), names[kept])
    with pytest.raises(DataError, match="'b' with 0 samples"):
        harm_by_group(before, after, TensorDataset(x, labels), {"b": np.flatnonzero(ignored)})


def test_a_loader_has_the_names_of_its_data_set_and_an_index_counts_once() -> None:
    before, after, data = pair()
    names = np.arange(60) % 2
    loader = DataLoader(data, 7, shuffle=True)
    assert harm_by_group(before, after, loader, names) == harm_by_group(before, after, data, names)
    twice = harm_by_group(before, after, data, {"a": [3, 5, 3, 5, 9]})
    assert twice == harm_by_group(before, after, data, {"a": [3, 5, 9]})


@pytest.mark.parametrize("first", [False, True])
def test_models_that_do_not_answer_are_refused(first: bool) -> None:
    before, after, data = pair()
    broken, fewer = Fixed(after.logits.detach().clone()), Fixed(after.logits.detach()[:, :2])
    broken.logits.data[3, 1] = torch.nan
    models = [broken, before] if first else [before, broken]
    with pytest.raises(NumericalError, match="NaN or infinite logits for 1"):
        harm_by_group(*models, data)
    with pytest.raises(DataError, match=r"shape \[3\] a sample before and \[2\] after"):
        harm_by_group(before, fewer, data)
    with pytest.raises(DataError, match=r"targets from 0 to 2.* class indices from 0 to 1"):
        harm_by_group(fewer, fewer, data)


def test_names_may_be_of_any_type_but_not_missing() -> None:
    before, after, data = pair()
    mixed: Any = ["a", 1] * 30
    assert {g.name for g in harm_by_group(before, after, data, mixed).groups} == {"1", "a"}
    for none in (None, float("nan"), np.nan):
        names: Any = [none, "a"] * 30
        for given in (names, np.array(names, dtype=object)):
            with pytest.raises(ConfigError, match=r"no group of 30 samples, such as \[0, 2, 4"):
                harm_by_group(before, after, data, given)
