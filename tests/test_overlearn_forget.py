"""Models and attributes that forgetting must take as they are, or refuse with the true reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import DataError, ModelError, NumericalError
from fisher_forget.overlearn import AttributeForgotten, forget_attribute, leace
from fisher_forget.overlearn.attribute import codes, sensitive

N = 300
S = np.random.default_rng(0).integers(0, 2, N)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, N)
    x = rng.normal(size=(N, 5)) + np.outer(S, [1, 1, 0, 0, 0]) + 2 * np.eye(5)[y]
    return torch.tensor(x).float(), torch.tensor(y)


def network(*between: nn.Module) -> nn.Sequential:
    layers = nn.Linear(5, 5), *between, nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return nn.Sequential(*layers).eval()


def ours(model: nn.Module, layers: Any, **options: Any) -> AttributeForgotten:
    return forget_attribute(model, data(), S, layers, progress=False, **options)


def by_leace(model: nn.Module, layers: Any) -> AttributeForgotten:
    return leace(model, data(), S, layers)


def spread(model: nn.Sequential, upto: int) -> float:
    """Distance of the means of both values in the outputs of the first layers."""
    with torch.no_grad():
        z = model[: upto + 1](data()[0]).double()
    return float((z[S == 0].mean(0) - z[S == 1].mean(0)).norm())


@pytest.mark.parametrize("forget", [ours, by_leace])
def test_layers_go_in_the_order_of_the_model(forget: Callable[..., AttributeForgotten]) -> None:
    sorted_, turned = (forget(network(), names) for names in (["0", "2"], ["2", "0", "2"]))
    assert turned.layers == ("0", "2")
    assert turned.still == ()
    assert turned.leakage == sorted_.leakage
    for layer in (0, 2):
        assert spread(turned.model, layer) < 1e-6 < 1e-2 < spread(network(), layer)


def test_what_is_left_is_told() -> None:
    """The first layer's inputs are made with the second's weights: they change once more."""

    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = network()[0], network()[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(torch.tanh(x @ self.b.weight))))

    found = ours(Twisted().eval(), ["b", "a"])
    assert found.layers == ("a", "b")
    assert "a" in found.still
    assert "a still tells of it" in str(found)
    assert "probe of a" not in str(found)


@pytest.mark.parametrize("between", [nn.BatchNorm1d(5), nn.Dropout(0.5)])
def test_repair_leaves_what_feeds_the_layer_as_it_was(between: nn.Module) -> None:
    net = network(between)
    buffers = {name: x.clone() for name, x in net.named_buffers()}
    found = ours(net, ["3", "0", "5"], repair=3)
    assert all(found.leakage[name][1] < 1e-6 < found.leakage[name][0] for name in found.layers)
    for name, x in found.model.named_buffers():
        assert bool((x == buffers[name]).all())
    assert "train" not in vars(found.model)
    assert found.model.train().training
    assert all(m.training for m in found.model.modules())


def test_repair_keeps_hooks_of_the_model() -> None:
    net = network()
    net[2].register_forward_pre_hook(lambda _, args: (3 * args[0],))
    plain, repaired = (ours(net, "2", repair=k).model for k in (0, 1))
    for model in (plain, repaired):
        assert list(model[2]._forward_pre_hooks) == list(net[2]._forward_pre_hooks)
        assert spread(model, 2) < 1e-6
        with torch.no_grad():
            hidden = torch.relu(model[0](data()[0]))
            z = 3 * hidden @ model[2].weight.T + model[2].bias
            torch.testing.assert_close(model[:3](data()[0]), z)


@pytest.mark.parametrize("repair", [0, 1])
def test_a_frozen_layer_is_changed_and_stays_frozen(repair: int) -> None:
    free, frozen = network(), network()
    frozen[2].requires_grad_(False)
    one, other = (ours(net, "2").model for net in (free, frozen))
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    found = ours(frozen, "2", repair=repair).model
    assert [p.requires_grad for p in found.parameters()] == [True, True, False, False, True, True]
    assert spread(found, 2) < 1e-6


@pytest.mark.parametrize("forget", [ours, by_leace])
def test_shared_weights_are_refused(forget: Callable[..., AttributeForgotten]) -> None:
    for key in ("weight", "bias"):
        net = network()
        setattr(net[2], key, getattr(net[0], key))
        for layer in ("0", "2"):
            with pytest.raises(ModelError, match="shares its weights with"):
                forget(net, ["4", layer])


@pytest.mark.parametrize("forget", [forget_attribute, leace])
def test_numbers_that_are_not_finite(forget: Callable[..., AttributeForgotten]) -> None:
    x, y = data()
    broken = x.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(DataError, match="inputs in 1 of 300"):
        forget(network(), (broken, y), S, "2")

    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x)

    with pytest.raises(NumericalError, match="inputs of '2'"):
        forget(nn.Sequential(nn.Linear(5, 5), Log(), nn.Linear(5, 3)).eval(), (x, y), S, "2")
    with pytest.raises(DataError, match=r"DataLoader.*`dataset`"):
        forget(network(), DataLoader(TensorDataset(x, y)), S, "2")


@pytest.mark.parametrize("forget", [ours, by_leace])
def test_a_layer_that_gives_nothing(forget: Callable[..., AttributeForgotten]) -> None:
    net = network()
    nn.init.zeros_(net[2].weight)
    found = forget(net, "2")
    assert found.leakage["2"] == (0, 0)
    assert bool((found.model[2].weight == 0).all())


TEXTS = np.where(S, "a", "b")


@pytest.mark.parametrize(
    "attribute",
    [
        TEXTS.tolist(),
        TEXTS.astype(object),
        pd.Series(TEXTS),
        pd.Series(TEXTS, dtype="string"),
        pd.Categorical(TEXTS),
        pd.Series(1 - S, dtype="Int64"),
        pd.Series(S == 0),
        torch.tensor(1 - S).bfloat16(),
        [torch.tensor(1 - x) for x in S],
        [("town", int(1 - x)) for x in S],
    ],
)
def test_attributes_of_any_kind(attribute: Any) -> None:
    assert (codes(attribute, N) == 1 - S).all()


@pytest.mark.parametrize(
    ("attribute", "match"),
    [
        ([*TEXTS[1:], None], "for 1 of 300"),
        ([*TEXTS[1:], float("nan")], "for 1 of 300"),
        (pd.Series([*TEXTS[2:], pd.NA, pd.NA]), "for 2 of 300"),
        (pd.Categorical([*TEXTS[1:], None]), "for 1 of 300"),
        (np.where(np.arange(N) < 3, np.nan, S), "for 3 of 300"),
        (pd.Series([pd.NaT] * N), "for 300 of 300"),
        ([*TEXTS[1:], 5], "of type int, str, which have no order"),
        ([[1]] * N, "a list as a value"),
        (7, "shape"),
        (pd.DataFrame({"s": S}), "shape"),
    ],
)
def test_attributes_that_are_refused(attribute: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        codes(attribute, N)


def test_a_number_is_to_be_put_into_bins() -> None:
    with pytest.raises(DataError, match="Make bins of a number such as an age"):
        sensitive(np.random.default_rng(0).integers(18, 80, N), N)
