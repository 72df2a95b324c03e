"""Overlearning: probes by scikit-learn on hooks' activations, closed forms against dense
constrained least squares in float64, LEACE by SciPy, and controls where nothing or everything is
found."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import oracle
import pytest
import torch
from scipy import linalg
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import Categorical, ConfigError, DataError, ModelError, NumericalError
from fisher_forget.experiments.attributes import FAINT, load_attribute_data
from fisher_forget.overlearn import (
    Decensoring,
    Probe,
    Repurposing,
    forget_attribute,
    leace,
)
from fisher_forget.overlearn.activations import activations, fed_before
from fisher_forget.overlearn.attribute import beyond
from fisher_forget.overlearn.probe import best_guess, compared, halves
from fisher_forget.report import plots


def made_up(n: int = 400, seed: int = 0) -> tuple[TensorDataset, np.ndarray]:
    """Inputs [n, 5]: the task is in the first two, an attribute of three values in the others."""
    rng = np.random.default_rng(seed)
    y, s = rng.integers(0, 2, n), rng.integers(0, 3, n)
    x = rng.normal(size=(n, 5))
    x[:, 0] += 1.5 * y
    x[:, 2:] += 1.5 * np.eye(3)[s]
    x[:, 1] += 0.3 * s
    return TensorDataset(torch.tensor(x).float(), torch.tensor(y)), s


def network(seed: int = 0, double: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    return (net.double() if double else net).eval()


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    data, _ = made_up(2000)
    net = network()
    x, y = data.tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    return net.eval()


def test_activations_are_what_hooks_see_whatever_the_batches() -> None:
    data, _ = made_up(700)
    net, seen = network(), {}
    for name in ("0", "3"):
        hook = lambda _m, _x, z, name=name: seen.__setitem__(name, z)  # noqa: E731
        net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        net(data.tensors[0])
    found = activations(network(), data)
    assert list(found) == ["0", "1", "2", "3", "4"]
    for name, z in seen.items():
        torch.testing.assert_close(found[name], z)


class TestProbe:
    def test_is_scikit_learn_by_hand(self, trained: nn.Module) -> None:
        data, s = made_up(600, 1)
        probe = Probe(layers=["2"], strengths=(0.01, 1.0), seed=3)
        found = probe.run(trained, data, s)["2"]
        z = activations(trained, data, ["2"])["2"].numpy()
        train, test = halves(s, 3)
        folds = StratifiedKFold(3, shuffle=True, random_state=3)
        by_hand = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
            {"logisticregression__C": [0.01, 1.0]},
            cv=folds,
            scoring="neg_log_loss",
        ).fit(z[train], s[train])
        p = by_hand.predict_proba(z[test])
        assert found.accuracy == pytest.approx((by_hand.predict(z[test]) == s[test]).mean())
        shares = np.bincount(s[train]) / len(train)
        assert found.guess == pytest.approx((s[test] == np.bincount(s[train]).argmax()).mean())
        nats = np.log(p[np.arange(len(test)), s[test]]) - np.log(shares[s[test]])
        assert found.information.value == pytest.approx(nats.mean(), rel=1e-6)
        assert found.gain.value == pytest.approx(found.accuracy - found.guess)

    def test_nothing_in_a_random_attribute_and_all_of_the_task(self, trained: nn.Module) -> None:
        """A true 0 is outside of a 95 % interval in 5 % of seeds; of ten, in four or more with a
        chance of 1e-3."""
        data, _ = made_up(800, 2)
        outside = 0
        for seed in range(10):
            random = np.random.default_rng(seed).integers(0, 2, 800)
            probe = Probe(layers=["2"], strengths=(0.01,), seed=seed)
            gain = probe.run(trained, data, random)["2"].gain
            outside += not gain.low <= 0 <= gain.high
        assert outside < 4
        x, _ = data.tensors
        told = trained(x).argmax(1)  # what the outputs tell of themselves
        found = Probe(layers=["4"], strengths=(1.0,)).run(trained, data, told)["4"]
        assert found.accuracy > 0.98
        assert found.finds

    def test_given_labels_are_part_of_the_guess(self) -> None:
        s, labels = np.array([0, 1, 2, 3] * 30), np.array([0, 1, 0, 1] * 30)
        train, test = halves(s, 0)
        right, sure = compared(best_guess(s, labels, train)[labels[test]], s[test])
        assert right.mean() == pytest.approx(0.5, abs=0.05)
        assert sure.mean() == pytest.approx(-np.log(2), abs=0.08)
        data, s = made_up(600, 3)
        y = data.tensors[1].numpy()
        both = 2 * s + y  # of which the task's label is a part
        plain, given = (
            Probe(layers=["4"], strengths=(0.1,)).run(network(), data, both, g)["4"].guess
            for g in (None, y)
        )
        assert given > 1.5 * plain

    def test_a_network_reads_what_no_line_does(self) -> None:
        rng = np.random.default_rng(0)
        x = torch.tensor(rng.normal(size=(4000, 2))).float()
        s = ((x[:, 0] * x[:, 1]) > 0).long()
        net = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).eval()
        kinds: tuple[Any, ...] = ("linear", "nonlinear")
        gains = [
            Probe(layers=["0"], strengths=(1.0,), kind=kind).run(net, (x, s), s)["0"].gain
            for kind in kinds
        ]
        assert gains[0].high < 0.15 < 0.3 < gains[1].low

    def test_touches_nothing_and_repeats(self, trained: nn.Module) -> None:
        data, s = made_up(200, 4)
        held, state = [p.clone() for p in trained.parameters()], torch.random.get_rng_state()
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        probe = Probe(strengths=(0.1,))
        assert probe.run(trained, data, s) == probe.run(trained, data, s)
        assert all(bool((a == b).all()) for a, b in zip(held, trained.parameters(), strict=True))
        assert bool((state == torch.random.get_rng_state()).all())
        assert (before == np.random.get_state()[1]).all()  # noqa: NPY002
        assert not any(m._forward_hooks for m in trained.modules())


def test_beyond_is_centred_among_samples_of_a_label_and_orthonormal() -> None:
    rng = np.random.default_rng(0)
    s, labels = rng.integers(0, 5, 300), rng.integers(0, 3, 300)
    u = beyond(s, labels).numpy()
    assert u.shape == (300, 4)
    assert u.T @ u / 300 == pytest.approx(np.eye(4), abs=1e-10)
    for label in range(3):
        assert u[labels == label].mean(0) == pytest.approx(np.zeros(4), abs=1e-10)
    with pytest.raises(DataError, match="tell wholly"):
        beyond(labels, labels)


class TestForgetAttribute:
    @pytest.mark.parametrize("layer", ["0", "2", "4"])
    @pytest.mark.parametrize("given", [False, True])
    def test_is_the_dense_constrained_minimum(self, layer: str, given: bool) -> None:
        """KKT: [[H, K^T], [K, 0]] (d, m) = (0, -vec W C), with H by brute force."""
        data, s = made_up(120)
        x, y = data.tensors[0].double(), data.tensors[1]
        net, told = network(1, double=True), y.numpy() if given else None
        names = (f"{layer}.weight", f"{layer}.bias")
        rest = network(1, double=True)
        for name, p in rest.named_parameters():
            p.requires_grad_(name in names)
        found = forget_attribute(
            net, (x, y), s, layer, given=told, structure="dense", damping=0.01, progress=False
        )
        h = oracle.ggn(rest, x, y, Categorical()).numpy()
        h += 0.01 * np.trace(h) / len(h) * np.eye(len(h))
        into = x if layer == "0" else net[: int(layer)](x).detach()
        u = np.eye(3)[s]
        for label in np.unique(y) if given else [None]:
            rows = y.numpy() == label if given else np.ones(len(y), bool)
            u[rows] -= u[rows].mean(0)
        c = into.numpy().T @ u[:, :2] / len(u)
        w = net.get_parameter(names[0]).detach().numpy()
        k = np.hstack([np.kron(np.eye(len(w)), c.T), np.zeros((2 * len(w), len(w)))])
        top = np.hstack([h, k.T])
        system = np.vstack([top, np.hstack([k, np.zeros((len(k), len(k)))])])
        right = np.concatenate([np.zeros(len(h)), -(w @ c).reshape(-1)])
        d = np.linalg.lstsq(system, right, rcond=None)[0][: len(h)]
        moved = [found.model.get_parameter(n).detach() - net.get_parameter(n) for n in names]
        ours = torch.cat([m.detach().flatten() for m in moved]).numpy()
        assert ours == pytest.approx(d, rel=1e-5, abs=1e-7 * np.abs(d).max())
        h -= 0.01 * np.trace(h) / len(h) / 1.01 * np.eye(len(h))
        assert found.predicted[layer] == pytest.approx(d @ h @ d / 2, rel=1e-4)

    def test_leaves_no_covariance_and_touches_nothing(self, trained: nn.Module) -> None:
        data, s = made_up(2000)
        held = [p.clone() for p in trained.parameters()]
        for make in (forget_attribute, leace):
            options: Any = {"progress": False} if make is forget_attribute else {}
            found = make(trained, data, s, ["0", "2"], **options)
            z = activations(found.model, data, ["0", "2"])
            for name in ("0", "2"):
                means = [z[name][s == v].double().mean(0) for v in range(3)]
                assert torch.stack(means).std(0).max() < 1e-6
                assert found.leakage[name][1] < 1e-6 < found.leakage[name][0]
        assert all(bool((a == b).all()) for a, b in zip(held, trained.parameters(), strict=True))

    def test_a_fresh_linear_probe_finds_nothing_at_little_cost(self, trained: nn.Module) -> None:
        data, s = made_up(2000)
        test, of_test = made_up(1000, 7)
        found = forget_attribute(trained, data, s, "0", progress=False)
        probe = Probe(layers=["0"])
        assert probe.run(trained, test, of_test)["0"].gain.low > 0.1
        after = probe.run(found.model, test, of_test)["0"]
        assert after.information.low < 0.01
        assert after.gain.high < 0.1
        assert found.score[1] > found.score[0] - 0.02

    def test_repair_keeps_what_was_forgotten_and_lowers_the_loss(self, trained: nn.Module) -> None:
        data, s = made_up(2000)
        plain, repaired = (
            forget_attribute(trained, data, s, "2", repair=k, progress=False) for k in (0, 5)
        )
        assert repaired.leakage["2"][1] < 1e-6
        assert repaired.loss[1] < plain.loss[1] + 1e-4
        for name in ("0.weight", "0.bias"):  # what feeds the layer stays
            old, new = (m.get_parameter(name) for m in (trained, repaired.model))
            assert bool((old == new).all())
        assert all(p.requires_grad for p in repaired.model.parameters())
        assert not any(m._forward_pre_hooks for m in repaired.model.modules())

    def test_costs_no_more_than_leace_or_the_shortest_change(self) -> None:
        """To second order it is the least of all; here the output layer, of a minimum."""
        data, s = made_up(2000)
        x, y = data.tensors
        net = network(3)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        net.zero_grad(set_to_none=True)
        others = [
            leace(net, data, s, "4"),
            forget_attribute(net, data, s, "4", damping=1e6, progress=False),
        ]
        ours = forget_attribute(net, data, s, "4", structure="dense", damping=1e-4, progress=False)
        assert all(ours.loss[1] <= x.loss[1] + 1e-3 for x in others)

    def test_without_a_bias_and_where_more_is_told_than_goes_in(self) -> None:
        """Two inputs cannot hold an attribute of five dimensions: all outputs become constant."""
        data, s = made_up(600)
        y, six = data.tensors[1], 2 * s + np.random.default_rng(0).integers(0, 2, 600)
        x = torch.tensor(np.eye(6)[six] @ np.random.default_rng(1).normal(size=(6, 2))).float()
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2)).eval()
        found = forget_attribute(net, (x, y), six, "0", progress=False)
        z = activations(found.model, TensorDataset(x, y), ["0"])["0"]
        assert float(z.std(0).max()) < 1e-5
        with pytest.raises(ModelError, match="no bias"):
            leace(net, (x, y), six, "0")

    def test_fed_before(self) -> None:
        data, _ = made_up(10)
        assert fed_before(network(), data, "2") == ["0.weight", "0.bias"]

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"layers": "9"}, ModelError, "the layer '9'"),
            ({"layers": "1"}, ModelError, "an nn.Linear"),
            ({"layers": []}, ConfigError, "no layers"),
            ({"attribute": np.zeros(400)}, DataError, "one value"),
            ({"attribute": np.arange(399)}, DataError, "shape"),
            ({"attribute": np.arange(400)}, DataError, "at least 12"),
            ({"attribute": [None] * 400}, DataError, "without a value"),
            ({"damping": 0.0}, ConfigError, "damping"),
            ({"repair": -1}, ConfigError, "repair"),
            ({"dampin": 1.0}, ConfigError, "damping"),
            ({"structure": "low_rank"}, ConfigError, "structure"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], match: str) -> None:
        data, s = made_up()
        given: dict[str, Any] = {"attribute": s, "layers": "0", "progress": False}
        with pytest.raises(error, match=match):
            forget_attribute(network(), data, **(given | change))


def test_leace_is_scipys() -> None:
    data, s = made_up(500)
    net = network(2, double=True)
    x = data.tensors[0].double()
    found = leace(net, (x, data.tensors[1]), s, "2").model
    z = activations_double(net, x)
    cov = np.cov(z.T, bias=True)
    u = np.eye(3)[s] - np.eye(3)[s].mean(0)
    white = linalg.inv(linalg.sqrtm(cov))
    basis = linalg.orth(white @ z.T @ u / len(z), rcond=1e-8)
    p = linalg.sqrtm(cov) @ basis @ basis.T @ white
    expected = z - (z - z.mean(0)) @ p.T
    assert activations_double(found, x) == pytest.approx(expected.real, abs=1e-9)


def activations_double(net: nn.Sequential, x: torch.Tensor) -> np.ndarray:
    return net[:3](x).detach().numpy()


class TestRepurposing:
    def test_a_model_of_the_attribute_is_a_better_start(self) -> None:
        """The first layer has found the three of 50 inputs that matter."""
        data, s = made_up(1000)
        noise = np.random.default_rng(1).normal(size=(1000, 47))
        x = torch.cat([data.tensors[0][:, 2:], torch.tensor(noise).float()], 1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].weight[:3, :3] = torch.eye(3)
        found = Repurposing(layer="1", labels=30, draws=4).run(net, (x, torch.tensor(s)), s)
        assert found.gain.low > 0.05
        assert found.tuned - found.scratch == pytest.approx(found.gain.value)

    def test_refuses(self) -> None:
        data, s = made_up(100)
        with pytest.raises(DataError, match="labels of"):
            Repurposing(layer="1", labels=80).run(network(), data, s)
        with pytest.raises(ConfigError):
            Repurposing(layer="1", draws=1)

        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.w = network(), nn.Parameter(torch.ones(()))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x) * self.w

        with pytest.raises(ModelError, match="reset_parameters"):
            Repurposing(layer="inner.1", labels=20).run(Bare().eval(), data, s)


class TestDecensoring:
    def test_a_turn_is_undone_and_a_loss_is_not(self) -> None:
        data, s = made_up(1500)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain, turned, empty = (
                nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)).eval() for _ in range(3)
            )
        with torch.no_grad():
            turned[0].weight.copy_(torch.linalg.qr(turned[0].weight)[0] @ plain[0].weight)
            empty[0].weight.copy_(plain[0].weight)
            empty[0].weight[:, 1:] = 0  # the attribute's inputs
        attack = Decensoring(layer="0", probe=Probe(strengths=(1.0,)))
        found = attack.run(turned, plain, data, s)
        assert found.mapped.value > 0.8 * found.uncensored.value > 0.1
        lost = attack.run(empty, plain, data, s)
        assert lost.mapped.high < 0.1
        assert lost.censored.high < 0.1

    def test_refuses_the_same_model(self) -> None:
        data, s = made_up(100)
        with pytest.raises(ModelError, match="give the same"):
            Decensoring(layer="0").run(network(), network(), data, s)


class TestPicture:
    def test_shows_gains_in_points_and_refuses_other_layers(self, trained: nn.Module) -> None:
        data, s = made_up(200)
        probe, other = (Probe(layers=x, strengths=(0.1,)) for x in (["0", "2"], ["0"]))
        found = {"as trained": probe.run(trained, data, s)}
        ax = plots.plot_probes(found)
        (bars,) = ax.containers
        drawn = np.asarray(bars[0].get_ydata(), float)
        assert drawn == pytest.approx([100 * x.gain.value for x in found["as trained"].layers])
        low, high = np.array(bars[2][0].get_segments())[0][:, 1]
        gain = found["as trained"]["0"].gain
        assert (low, high) == pytest.approx((100 * gain.low, 100 * gain.high))
        plt.close("all")
        with pytest.raises(DataError, match="same layers"):
            plots.plot_probes(found | {"other": other.run(trained, data, s)})


class TestProbeRefuses:
    @pytest.mark.parametrize(
        "wrong",
        [{"kind": "tree"}, {"strengths": ()}, {"folds": 1}, {"strengths": (0.0,)}, {"seed": -1}],
    )
    def test_options(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            Probe(**wrong)

    def test_layers_and_attributes(self) -> None:
        data, s = made_up(100)
        with pytest.raises(ModelError, match="the layer 'x'"):
            Probe(layers=["x"]).run(network(), data, s)
        with pytest.raises(DataError, match="one value"):
            Probe().run(network(), data, np.ones(100))
        with pytest.raises(ConfigError, match="layers"):
            Probe(layers=[])
        broken = network()
        nn.init.constant_(broken[2].bias, float("nan"))
        with pytest.raises(NumericalError, match="outputs of '2'"):
            Probe(layers="2").run(broken, data, s)
        twice = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        whole = nn.Sequential(twice, twice)
        with pytest.raises(ModelError, match="called 2 times"):
            Probe(layers=["0.0"]).run(whole.eval(), data, s)


class TestData:
    def test_a_tint_is_a_fainter_channel(self) -> None:
        data = load_attribute_data("digits-tint", max_train=200, max_test=100)
        x, tint = data.train.tensors[0], data.train_attribute
        assert x.shape == (200, 2, 8, 8)
        faint = x[np.arange(200), 1 - tint]
        torch.testing.assert_close(faint, FAINT * x[np.arange(200), tint])
        assert data.without is not None
        grey = data.without.tensors[0]
        torch.testing.assert_close(grey[:, 0], x.mean(1))
        assert abs(np.corrcoef(tint, data.train.tensors[1].numpy())[0, 1]) < 0.2

    def test_names_are_told_once(self) -> None:
        data = load_attribute_data("names")
        every = torch.cat([data.train.tensors[0], data.test.tensors[0]])
        assert len(torch.unique(every, dim=0)) == len(every) > 8000
        assert (int(every.min()), int(every.max())) == (0, 26)
        assert set(data.train_attribute) == set(range(6))

    def test_unknown(self) -> None:
        with pytest.raises(ConfigError, match="one of"):
            load_attribute_data("names-and-tints")
