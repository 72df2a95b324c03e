"""Every gradient-based method against a loop written out by hand, and the laws that all of them
keep."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fisher_forget.baselines.bad_teacher import BadTeacher
from fisher_forget.baselines.base import Training
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.l1_sparse import L1Sparse
from fisher_forget.baselines.last_layers import CFk, EUk, last_layers
from fisher_forget.baselines.neg_grad import NegGrad, NegGradPlus
from fisher_forget.baselines.protocol import Range, Unlearner
from fisher_forget.baselines.random_labels import Amnesiac, RandomLabels, Relabelling
from fisher_forget.baselines.retrain import Retrain, fresh
from fisher_forget.baselines.salun import SalUn, SalUn2023, saliency
from fisher_forget.baselines.scrub import Scrub
from fisher_forget.baselines.training_loop import Descent, descend, numbered
from fisher_forget.baselines.unsir import Unsir
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ConfigError, DataError, ModelError, NumericalError
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.likelihood import Categorical

IDX = [0, 5, 17, 30, 31]
N, M = 60, len(IDX)
R = N - M
X, Y = blobs_data().tensors
KEPT = np.setdiff1d(np.arange(N), IDX)
ALL = 1000  # more than there are samples: one batch
METHODS = [
    NegGrad(epochs=2, lr=1e-3, batch_size=2),
    NegGradPlus(epochs=2, batch_size=16),
    RandomLabels(epochs=2, batch_size=16),
    Amnesiac(epochs=2, batch_size=16),
    BadTeacher(epochs=2, batch_size=16, share=0.5),
    Scrub(epochs=3, max_epochs=2, batch_size=16, forget_batch_size=2),
    SalUn(epochs=2, batch_size=16),
    SalUn2023(epochs=2, batch_size=16),
    L1Sparse(epochs=2, batch_size=16),
    CFk(epochs=2, batch_size=16),
    EUk(epochs=2, batch_size=16),
    Unsir(noises=6, steps=3, batch_size=16, impair_epochs=2),
    Retrain(epochs=2, batch_size=16),
]
EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
LABELLED = (RandomLabels, Amnesiac, SalUn)


@pytest.fixture
def split():
    return resolve_split(TensorDataset(X, Y), IDX)


@pytest.fixture(scope="module")
def model(trained):
    return copy.deepcopy(trained).double()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def ce(model, rows, labels=None):
    """The mean cross-entropy of some samples, as a function of the weights."""
    x, y = X[rows].double(), Y[rows] if labels is None else labels
    return lambda w: F.cross_entropy(torch.func.functional_call(model, w, (x,)), y)


def by_hand(model, losses, lr, *, momentum=0.9, decay=0.0, adam=False, mask=None, held=True):
    """SGD with momentum or Adam, from their definitions; lr may be a number a step. Weights that
    are not held by the mask decay all the same."""
    w = weights(model)
    first, second = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    for t, loss in enumerate(losses, start=1):
        rate = lr[t - 1] if isinstance(lr, list) else lr
        at = {n: p.clone().requires_grad_() for n, p in w.items()}
        grads = torch.autograd.grad(loss(at), list(at.values()))
        for (n, p), g in zip(w.items(), grads, strict=True):
            m = 1 if mask is None else mask[n]
            g = m * (g + decay * p) if held else m * g + decay * p
            if adam:
                first[n] = 0.9 * first[n] + 0.1 * g
                second[n] = 0.999 * second[n] + 0.001 * g * g
                step = (first[n] / (1 - 0.9**t)) / ((second[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            else:
                step = first[n] = momentum * first[n] + g
            w[n] = p - rate * step
    return w


def assert_weights(found, expected, start, tolerance=1e-9):
    own = weights(found)
    assert (
        max(float((own[n] - p.detach()).abs().max()) for n, p in start.named_parameters())
        > 1e4 * tolerance
    )
    for n, p in expected.items():
        torch.testing.assert_close(own[n], p, rtol=0, atol=tolerance)


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


class Noisy(nn.Module):
    """BatchNorm and Dropout: everything random and everything with statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))


def without_forgetting(method, model, found):
    """What each method becomes without D_f: descent on all samples with their own labels."""
    loss, sgd, adam = ce(model, range(N)), {"decay": 5e-4}, {"adam": True}
    plain = {"momentum": 0.0}
    body = {name: torch.full_like(p, name[0] == "2") for name, p in weights(model).items()}
    if method.name == "neggrad+":
        return by_hand(model, [lambda w: 0.95 * loss(w)] * 2, 0.01, **plain)
    if method.name == "random-labels":
        return by_hand(model, [loss] * 2, 0.013, **sgd)
    if method.name == "salun":  # no weight is salient: any half of them
        mask = {n: (p != q).double() for (n, p), q in zip(*pairs(found, model), strict=True)}
        assert sum(float(m.sum()) for m in mask.values()) == round(0.5 * len(flat(model)))
        return by_hand(model, [loss] * 2, 0.013, mask=mask, **sgd)
    if method.name == "salun-2023":
        zero = {name: torch.zeros_like(p) for name, p in weights(model).items()}
        shrunk = by_hand(model, [loss] * 2, 0.1, mask=zero, held=False, **sgd)
        mask = {n: ((p - shrunk[n]).abs() > 1e-12).double() for n, p in weights(found).items()}
        assert sum(float(m.sum()) for m in mask.values()) == round(0.5 * len(flat(model)))
        return by_hand(model, [loss] * 2, 0.1, mask=mask, held=False, **sgd)
    if method.name == "amnesiac":
        return by_hand(model, [loss] * 2, 1e-4, **adam)
    if method.name == "scrub":
        x = X.double()
        taught = model(x).detach()
        follow = lambda w: 4 * kl(taught / 2, torch.func.functional_call(model, w, (x,)) / 2)  # noqa: E731
        both = [lambda w: loss(w) + 0.5 * follow(w)]
        return by_hand(model, both * 3, 5e-4, decay=0.1, **adam)
    if method.name == "l1-sparse":
        l1 = lambda w: sum(p.abs().sum() for p in w.values())  # noqa: E731
        losses = [lambda w: loss(w) + 5e-4 * l1(w), lambda w: loss(w) + 2.5e-4 * l1(w)]
        return by_hand(model, losses, 0.01, **sgd)
    if method.name == "cf-k":
        return by_hand(model, [loss] * 2, 0.01, mask=body, **plain)
    if method.name == "eu-k":
        start = copy.deepcopy(model)
        start[2] = seeded(lambda: nn.Linear(6, 3, dtype=torch.float64))
        return by_hand(start, [loss] * 2, 0.01, mask=body, **plain)
    if method.name == "unsir":
        impaired = copy.deepcopy(model)
        impaired.load_state_dict(by_hand(model, [loss] * 2, 0.02, **adam))
        return by_hand(impaired, [loss], 0.01, **adam)
    assert method.name == "retrain"
    wide = {"dtype": torch.float64}
    layers = lambda: nn.Sequential(nn.Linear(4, 6, **wide), nn.Tanh(), nn.Linear(6, 3, **wide))  # noqa: E731
    return by_hand(seeded(layers), [loss] * 2, 0.05, **sgd)


def pairs(found, model):
    return found.named_parameters(), model.parameters()


@EVERY
class TestEveryMethod:
    def test_protocol(self, method):
        assert isinstance(method, Unlearner)
        assert set(method.grid) <= {f.name for f in dataclasses.fields(method)}
        for key, values in method.grid.items():
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                assert getattr(dataclasses.replace(method, **{key: value}), key) == value

    def test_untouched_deterministic_and_seeded(self, method, split, untouched):
        given = seeded(Noisy)
        with untouched(given):
            first = method.unlearn(given, split).model
        again = method.unlearn(given, split).model
        other = dataclasses.replace(method, seed=method.seed + 1).unlearn(given, split).model
        assert not first.training
        assert all(p.requires_grad and p.grad is None for p in first.parameters())
        assert all(
            torch.equal(a, b)
            for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
        )
        assert not torch.equal(flat(first), flat(other))
        assert not torch.equal(flat(first), flat(given))
        memory = {p.data_ptr() for p in given.state_dict().values()}
        assert memory.isdisjoint(p.data_ptr() for p in first.state_dict().values())

    def test_passes_count_what_the_model_saw(self, method, split):
        seen = []

        class Counting(nn.Sequential):
            def forward(self, x):
                seen.append(len(x) * (1 if torch.is_grad_enabled() else 1 / 3))
                return super().forward(x)

        given = seeded(lambda: Counting(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
        # an instance, since a name is held against the model's own loss first
        passes = dataclasses.replace(method, likelihood=Categorical()).unlearn(given, split).passes
        probe = 1 / 3 if isinstance(method, LABELLED) else 0  # how many classes there are
        if isinstance(method, SalUn):  # and how much memory a sample takes
            probe += 1 + 1 / 3
        assert passes == pytest.approx((sum(seen) - probe) / R, rel=1e-9)

    def test_dict_batches_of_several_inputs_and_regression(self, method):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.hidden, self.out = nn.Linear(4, 2), nn.Linear(2, 2)

            def forward(self, left, right, scale):
                return self.out(torch.tanh(self.hidden(torch.cat([left, right], -1)) * scale))

        class Joined(Pair):
            def forward(self, x):
                return super().forward(x[:, :1], x[:, 1:], 1)

        class Samples(Dataset):
            def __len__(self):
                return N

            def __getitem__(self, i):
                return {
                    "left": X[i, :1],
                    "right": X[i, 1:],
                    "scale": torch.tensor([1, 1]),
                    "y": X[i, 2:] ** 2,
                }

        class Labelled(Samples):
            def __getitem__(self, i):
                return super().__getitem__(i) | {"y": Y[i] % 2}

        given = seeded(Pair, 1)
        regression = dataclasses.replace(method, likelihood="gaussian")
        if isinstance(method, LABELLED):
            with pytest.raises(ConfigError, match="gaussian likelihood"):
                regression.unlearn(given, resolve_split(Samples(), IDX))
            samples, targets, same = Labelled(), Y % 2, method
        else:
            samples, targets, same = Samples(), X[:, 2:] ** 2, regression
        found = same.unlearn(given, resolve_split(samples, IDX)).model
        assert not torch.equal(flat(found), flat(given))
        if isinstance(method, Unsir):  # it draws noise for each input
            assert torch.isfinite(flat(found)).all()
            return
        joined = seeded(Joined, 1)
        assert torch.equal(flat(joined), flat(given))
        expected = same.unlearn(joined, resolve_split(TensorDataset(X, targets), IDX)).model
        assert torch.equal(flat(found), flat(expected))

    def test_frozen_weights_stay(self, method, split):
        given = seeded(small_net)
        given[0].requires_grad_(False)
        found = method.unlearn(given, split).model
        assert torch.equal(found[0].weight, given[0].weight)
        assert not torch.equal(found[2].weight, given[2].weight)
        assert [p.requires_grad for p in found.parameters()] == [False, False, True, True]

    def test_an_empty_forget_set_is_training_on_all_data(self, method, model):
        """Or nothing at all, where there is nothing to climb or to learn."""
        whole = dataclasses.replace(method, batch_size=ALL)
        control = resolve_split(TensorDataset(X, Y), [], allow_empty=True)
        found = whole.unlearn(model, control).model
        if isinstance(whole, NegGrad | BadTeacher):
            torch.testing.assert_close(flat(found), flat(model), rtol=0, atol=1e-9)
        else:
            assert_weights(found, without_forgetting(whole, model, found), model, 1e-8)

    def test_a_data_set_that_draws_leaves_no_trace(self, method, untouched):
        class Drawing(Dataset):
            def __len__(self):
                return N

            def __getitem__(self, i):
                torch.rand(1), np.random.rand(1)  # noqa: NPY002
                return X[i], Y[i]

        drawing, given = resolve_split(Drawing(), IDX), seeded(small_net)
        with untouched(given):
            method.unlearn(given, drawing)

    def test_settings_are_checked(self, method, split):
        for name in {"lr", "impair_lr"} & set(vars(method)):
            with pytest.raises(ConfigError, match="lr=-1"):
                dataclasses.replace(method, **{name: -1.0}).unlearn(seeded(small_net), split)
        with pytest.raises(ConfigError, match="batch_size=0"):
            dataclasses.replace(method, batch_size=0).unlearn(seeded(small_net), split)


class TestDescent:
    def test_learning_rate_falls_at_the_milestones(self):
        net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(net.weight)
        settings = Descent(4, 1.0, momentum=0.0, milestones=(1, 3))
        found = descend(net, settings, lambda *_: [lambda m: -m.weight.sum()], seed=0)
        assert float(found.weight.detach()) == pytest.approx(1 + 0.1 + 0.1 + 0.01)

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_masked_weights_feel_no_weight_decay(self, model, optimizer):
        generator = torch.Generator().manual_seed(0)
        mask = {
            n: (torch.rand(p.shape, generator=generator) < 0.5).double()
            for n, p in model.named_parameters()
        }
        loss = lambda m: ce(m, KEPT)(dict(m.named_parameters()))  # noqa: E731
        settings = Descent(3, 0.05, weight_decay=0.1, optimizer=optimizer)
        found = descend(model, settings, lambda *_: [loss], seed=0, mask=mask)
        expected = by_hand(
            model, [ce(model, KEPT)] * 3, 0.05, decay=0.1, adam=optimizer == "adam", mask=mask
        )
        assert_weights(found, expected, model)
        for (n, p), q in zip(model.named_parameters(), found.parameters(), strict=True):
            assert torch.equal(p[mask[n] == 0], q[mask[n] == 0])

    def test_a_single_sample_is_normalised_by_the_running_statistics(self):
        given = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        given[1].running_mean.fill_(0.5)
        given[1].running_var.fill_(2.0)
        settings = {"epochs": 1, "lr": 0.1, "weight_decay": 0.0}
        found = NegGrad(**settings).unlearn(given, resolve_split(TensorDataset(X, Y), [7])).model
        w = weights(given)
        at = {n: p.clone().requires_grad_() for n, p in w.items()}
        hidden = (X[[7]] @ at["0.weight"].T + at["0.bias"] - 0.5) / math.sqrt(2 + 1e-5)
        loss = F.cross_entropy(hidden * at["1.weight"] + at["1.bias"], Y[[7]])
        for (n, p), g in zip(
            found.named_parameters(), torch.autograd.grad(loss, list(at.values())), strict=True
        ):
            torch.testing.assert_close(p.detach(), w[n] + 0.1 * g)
        assert found[1].running_mean.tolist() == [0.5] * 3
        with torch.no_grad():  # statistics that this data set, so that training follows it
            inputs = given[0](X)
        given[1].running_mean.copy_(inputs.mean(0))
        given[1].running_var.copy_(inputs.var(0))
        mixed = (
            NegGrad(epochs=2, batch_size=2)
            .unlearn(given, resolve_split(TensorDataset(X, Y), IDX))
            .model
        )
        assert mixed[1].num_batches_tracked == 4  # an epoch has batches of 2, 2 and 1

    def test_numbered_names_the_samples_of_a_batch(self, split):
        seen = []
        for rows, batch in numbered(split, split.retain, 16, np.random.default_rng(3)):
            assert torch.equal(batch.args[0], X[rows])
            assert torch.equal(batch.targets, Y[rows])
            seen += [rows]
        assert sorted(np.concatenate(seen)) == sorted(KEPT)
        assert [len(rows) for rows in seen] == [14, 14, 14, 13]


class TestNegGrad:
    def test_by_hand(self, model, split):
        found = (
            NegGrad(epochs=3, lr=0.01, batch_size=ALL, weight_decay=0.1).unlearn(model, split).model
        )
        up = ce(model, IDX)
        assert_weights(found, by_hand(model, [lambda w: -up(w)] * 3, 0.01, decay=0.1), model)
        assert float(up(weights(found))) > float(up(weights(model)))

    def test_divergence_is_said(self, model, split):
        data = TensorDataset(X, X[:, :1] * 100)
        given = seeded(lambda: nn.Linear(4, 1))
        with pytest.raises(NumericalError, match="learning rate"):
            NegGrad(epochs=200, lr=1e3, likelihood="gaussian").unlearn(
                given, resolve_split(data, IDX)
            )


class TestNegGradPlus:
    def test_by_hand(self, model, split):
        found = (
            NegGradPlus(epochs=3, alpha=0.8, batch_size=ALL, weight_decay=0.1)
            .unlearn(model, split)
            .model
        )
        down, up = ce(model, KEPT), ce(model, IDX)
        losses = [lambda w: 0.8 * down(w) - 0.2 * up(w)] * 3
        expected = by_hand(model, losses, 0.01, momentum=0.0, decay=0.1)
        assert_weights(found, expected, model)

    def test_without_forgotten_samples_it_is_fine_tuning(self, model):
        control = resolve_split(TensorDataset(X, Y), [], allow_empty=True)
        found = (
            NegGradPlus(epochs=2, alpha=1.0, batch_size=16, weight_decay=0.0)
            .unlearn(model, control)
            .model
        )
        assert torch.equal(
            flat(found), flat(FineTune(epochs=2, batch_size=16).unlearn(model, control).model)
        )

    def test_alpha_out_of_range(self):
        with pytest.raises(ConfigError, match=r"alpha=1\.5"):
            NegGradPlus(alpha=1.5)


def relabel(batch, rows, forget, key, least=0, classes=3):
    return Relabelling(forget, classes, Categorical(), least)(batch, rows, key)


def labels(key, least=0):
    """(y + k) mod 3 with the documented draw of k."""
    shifts = [int(np.random.default_rng((*key, i)).integers(least, 3)) for i in IDX]
    return (Y[IDX] + torch.tensor(shifts)) % 3


class TestRandomLabels:
    def test_by_hand(self, model, split):
        found = (
            RandomLabels(epochs=2, batch_size=ALL, weight_decay=0.1, seed=4)
            .unlearn(model, split)
            .model
        )
        losses = []
        for epoch in range(2):
            losses += [ce(model, IDX, labels((4, epoch))), ce(model, KEPT)]
        assert_weights(found, by_hand(model, losses, 0.013, decay=0.1), model)

    def test_amnesiac_by_hand(self, model, split):
        found = Amnesiac(epochs=3, lr=1e-3, batch_size=ALL, seed=4).unlearn(model, split).model
        mixed = Y.clone()
        mixed[IDX] = labels((4,), least=1)
        assert (mixed != Y).nonzero().flatten().tolist() == IDX
        expected = by_hand(model, [ce(model, range(N), mixed)] * 3, 1e-3, adam=True)
        assert_weights(found, expected, model)

    @pytest.mark.parametrize("least", [0, 1])
    def test_draws_are_uniform(self, least):
        """Pearson's chi-square at a false-alarm rate of 1e-4; all samples have label 2 of 5."""
        rows = np.arange(3000)
        batch = Batch((), {}, torch.full((3000,), 2))
        found = relabel(batch, rows, rows, (7,), least, classes=5).targets
        counts = np.bincount(found.numpy(), minlength=5)
        drawn = np.delete(counts, 2) if least else counts
        assert counts[2] == 0 or not least
        assert stats.chisquare(drawn).pvalue > 1e-4

    def test_a_draw_belongs_to_the_sample(self):
        targets = torch.arange(40) % 5
        rows = np.arange(40)
        whole = relabel(Batch((), {}, targets), rows, rows, (1,), classes=5).targets
        some = [9, 3, 30]
        part = relabel(Batch((), {}, targets[some]), rows[some], rows, (1,), classes=5)
        assert torch.equal(part.targets, whole[some])
        assert not torch.equal(
            relabel(Batch((), {}, targets), rows, rows, (2,), classes=5).targets, whole
        )

    def test_padding_and_retained_samples_keep_their_labels(self):
        targets = torch.tensor([[0, 1, -100], [2, 2, 2], [1, -100, 0]])
        found = relabel(
            Batch((), {}, targets), np.array([8, 3, 9]), np.array([8, 9]), (0,), 1
        ).targets
        assert torch.equal(found[1], targets[1])
        assert torch.equal(found == -100, targets == -100)
        assert ((found != targets) == (targets != -100))[[0, 2]].all()

    def test_probability_targets(self):
        classes = torch.arange(6) % 3
        soft = 0.8 * F.one_hot(classes, 3) + 0.2 / 3
        rows, forget = np.arange(6), np.array([1, 4])
        found = relabel(Batch((), {}, soft), rows, forget, (0,), 1).targets
        hard = relabel(Batch((), {}, classes), rows, forget, (0,), 1).targets
        assert torch.equal(found[forget], F.one_hot(hard[forget], 3).to(soft.dtype))
        assert torch.equal(found[[0, 2, 3, 5]], soft[[0, 2, 3, 5]])

    def test_targets_that_are_no_classes(self, model):
        with pytest.raises(DataError, match="floating-point targets"):
            RandomLabels().unlearn(model, resolve_split(TensorDataset(X, X[:, :2]), IDX))


class TestSalUn:
    def test_mask_keeps_the_largest_gradients(self, model, split):
        gradients = torch.autograd.grad(
            ce(model, IDX)(at := dict(model.named_parameters())), list(at.values())
        )
        size = torch.cat([g.abs().reshape(-1) for g in gradients]).numpy()
        few = dataclasses.replace(split, batch_size=2)
        mask = torch.cat(
            [m.reshape(-1) for m in saliency(model, few, Categorical(), 0.3).values()]
        ).numpy()
        assert set(mask) == {0.0, 1.0}
        assert mask.sum() == round(0.3 * len(size))
        assert size[mask == 1].min() > size[mask == 0].max()

    def test_by_hand(self, model, split):
        found = (
            SalUn(share=0.4, epochs=2, batch_size=ALL, weight_decay=0.1, seed=4)
            .unlearn(model, split)
            .model
        )
        mask = saliency(model, split, Categorical(), 0.4)
        losses = []
        for epoch in range(2):
            losses += [ce(model, IDX, labels((4, epoch))), ce(model, KEPT)]
        assert_weights(found, by_hand(model, losses, 0.013, decay=0.1, mask=mask), model)
        moved = flat(found) != flat(model)
        assert torch.equal(moved, torch.cat([m.reshape(-1) for m in mask.values()]) == 1)

    def test_all_weights_is_random_labels(self, model, split):
        found = SalUn(share=1.0, epochs=2, batch_size=16).unlearn(model, split).model
        torch.testing.assert_close(
            flat(found),
            flat(RandomLabels(epochs=2, batch_size=16).unlearn(model, split).model),
            rtol=0,
            atol=1e-12,
        )

    @pytest.mark.parametrize("share", [0.0, 1.1])
    def test_share_out_of_range(self, share):
        with pytest.raises(ConfigError, match="share="):
            SalUn(share=share)


class TestSalUn2023:
    def climbed(self, model, method, batches):
        """Sums of the gradients of L_f along an ascent by torch's SGD."""
        twin = copy.deepcopy(model)
        ascent = torch.optim.SGD(
            twin.parameters(), method.mask_lr, momentum=0.9, weight_decay=method.weight_decay
        )
        sums = [torch.zeros_like(p) for p in twin.parameters()]
        for rows in batches:
            ascent.zero_grad()
            (-F.cross_entropy(twin(X[rows].double()), Y[rows])).backward()
            sums = [s + p.grad for s, p in zip(sums, twin.parameters(), strict=True)]
            ascent.step()
        return torch.cat([s.abs().reshape(-1) for s in sums])

    def test_mask_keeps_the_smallest_gradients_of_an_ascent(self, model, split):
        method = SalUn2023(share=0.3, batch_size=2, mask_lr=0.5, seed=3)
        training = Training(model, split, Categorical(), 2)
        mask = torch.cat([m.reshape(-1) for m in method.mask(training).values()])
        plan = np.random.default_rng(3).permutation(IDX)
        size = self.climbed(model, method, np.array_split(plan, 3))
        assert mask.sum() == round(0.3 * len(size))
        assert size[mask == 1].max() < size[mask == 0].min()
        assert training.gradients == M

    def test_by_hand(self, model, split):
        """Both sets in one batch, labels drawn anew in every epoch, and decay for all weights."""
        method = SalUn2023(share=0.4, epochs=2, batch_size=ALL, weight_decay=0.1, seed=4)
        found = method.unlearn(model, split).model
        mask = method.mask(Training(model, split, Categorical(), ALL))
        losses = []
        for epoch in range(2):
            mixed = Y.clone()
            mixed[IDX] = labels((4, epoch))
            losses.append(ce(model, range(N), mixed))
        expected = by_hand(model, losses, 0.1, decay=0.1, mask=mask, held=False)
        assert_weights(found, expected, model)


class TestL1Sparse:
    def test_by_hand(self, model, split):
        found = (
            L1Sparse(epochs=5, alpha=0.02, free=2, batch_size=ALL, weight_decay=0.1)
            .unlearn(model, split)
            .model
        )
        loss = ce(model, KEPT)

        def penalised(alpha):
            return lambda w: loss(w) + alpha * sum(p.abs().sum() for p in w.values())

        losses = [penalised(0.02 * share) for share in (1, 2 / 3, 1 / 3, 0, 0)]
        assert_weights(found, by_hand(model, losses, 0.01, decay=0.1), model)

    @pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"free": 11}, {"free": -1}])
    def test_bad_settings(self, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            L1Sparse(**wrong)


class TestScrub:
    def test_by_hand(self, model, split):
        found = (
            Scrub(
                epochs=3,
                max_epochs=2,
                alpha=0.7,
                gamma=0.6,
                temperature=3.0,
                milestones=(2,),
                batch_size=ALL,
            )
            .unlearn(model, split)
            .model
        )

        def leave(rows):
            x = X[rows].double()
            with torch.no_grad():
                taught = model(x)
            return lambda w: 9 * kl(taught / 3, torch.func.functional_call(model, w, (x,)) / 3)

        up, follow, loss = leave(IDX), leave(KEPT), ce(model, KEPT)
        both = [lambda w: -up(w), lambda w: 0.6 * loss(w) + 0.7 * follow(w)]
        rates = [5e-4] * 4 + [5e-5]
        assert_weights(
            found, by_hand(model, both * 2 + both[1:], rates, decay=0.1, adam=True), model, 1e-8
        )

    def test_it_leaves_the_teacher_on_forgotten_samples_alone(self, model, split):
        found = Scrub(lr=0.05, batch_size=ALL, weight_decay=0.0, milestones=())
        found = found.unlearn(model, split).model
        away = lambda rows: float(kl(model(X[rows].double()), found(X[rows].double())).detach())  # noqa: E731
        assert away(IDX) > 3 * away(KEPT)

    def test_the_first_step_alone_does_nothing(self, model, split):
        one = Scrub(
            epochs=1, alpha=1.0, gamma=0.0, optimizer="sgd", weight_decay=0.0, batch_size=ALL
        )
        found = dataclasses.replace(one, forget_batch_size=ALL).unlearn(model, split).model
        torch.testing.assert_close(flat(found), flat(model), rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        "wrong", [{"alpha": -1.0}, {"gamma": -1.0}, {"temperature": 0.0}, {"max_epochs": -1}]
    )
    def test_bad_settings(self, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            Scrub(**wrong)


class TestBadTeacher:
    def test_by_hand(self, model, split):
        method = BadTeacher(epochs=3, share=1.0, temperature=2.0, lr=1e-3, batch_size=ALL, seed=8)
        untrained = seeded(lambda: small_net().double(), 8)
        init = lambda: small_net().double()  # noqa: E731
        found = dataclasses.replace(method, init=init).unlearn(model, split).model
        x = X.double()
        with torch.no_grad():
            taught = model(x)
            taught[IDX] = untrained(x[IDX])
        loss = lambda w: 4 * kl(taught / 2, torch.func.functional_call(model, w, (x,)) / 2)  # noqa: E731
        assert_weights(found, by_hand(model, [loss] * 3, 1e-3, adam=True), model, 1e-8)

    def test_regression_by_hand(self):
        """KL between Gaussians of variance 1 is half the squared distance, at any temperature."""
        data = TensorDataset(X, X[:, :1])
        given = seeded(lambda: nn.Linear(4, 1).double())
        method = BadTeacher(
            epochs=3, share=1.0, temperature=2.0, lr=1e-2, batch_size=ALL, likelihood="gaussian"
        )
        found = method.unlearn(given, resolve_split(data, IDX)).model
        untrained = fresh(given, 0)
        x = X.double()
        with torch.no_grad():
            taught = given(x)
            taught[IDX] = untrained(x[IDX])

        def loss(w):
            outputs = torch.func.functional_call(given, w, (x,))
            return (taught - outputs).square().sum(-1).mean() / 2

        assert_weights(found, by_hand(given, [loss] * 3, 1e-2, adam=True), given, 1e-8)

    def test_only_a_share_of_the_retained_samples_is_used(self, model, split):
        used = 11 + M  # a fifth of 55
        assert BadTeacher(share=0.2).unlearn(model, split).passes == pytest.approx(used * 5 / 3 / R)

    @pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.5}, {"temperature": -1.0}])
    def test_bad_settings(self, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            BadTeacher(**wrong)


class TestLastLayers:
    def test_cfk_by_hand(self, model, split):
        found = CFk(k=1, epochs=3, batch_size=ALL, weight_decay=0.1).unlearn(model, split).model
        head = copy.deepcopy(model[2])
        features = model[:2](X[KEPT].double()).detach()
        loss = lambda w: F.cross_entropy(features @ w["weight"].T + w["bias"], Y[KEPT])  # noqa: E731
        assert_weights(found[2], by_hand(head, [loss] * 3, 0.01, momentum=0.0, decay=0.1), head)
        assert torch.equal(found[0].weight, model[0].weight)

    def test_all_layers_are_fine_tuning_and_retraining(self, model, split):
        plain = {"epochs": 2, "batch_size": 16, "lr": 0.02, "weight_decay": 0.01}
        cfk, tuned = CFk(k=2, **plain), FineTune(**plain)
        assert torch.equal(
            flat(cfk.unlearn(model, split).model), flat(tuned.unlearn(model, split).model)
        )
        euk, retrained = EUk(k=2, **plain), Retrain(momentum=0.0, **plain)
        assert torch.equal(
            flat(euk.unlearn(model, split).model), flat(retrained.unlearn(model, split).model)
        )

    def test_euk_starts_the_head_anew(self, model, split):
        found = EUk(k=1, epochs=0, seed=3).unlearn(model, split).model
        assert torch.equal(found[0].weight, model[0].weight)
        expected = seeded(lambda: nn.Linear(6, 3, dtype=torch.float64), 3)
        torch.testing.assert_close(found[2].weight, expected.weight, rtol=0, atol=0)

    @pytest.mark.parametrize("kind", [CFk, EUk])
    def test_a_frozen_weight_of_a_last_layer_stays(self, kind, split):
        given = seeded(small_net)
        given[2].bias.requires_grad_(False)
        found = kind(k=1, epochs=1).unlearn(given, split).model
        assert torch.equal(found[2].bias, given[2].bias)
        assert not torch.equal(found[2].weight, given[2].weight)

    def test_layers_take_the_norms_after_them(self):
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), nn.LayerNorm(4)
        )
        assert last_layers(net, 1) == ("3", "4")
        assert last_layers(net, 2) == ("0", "1", "3", "4")
        with pytest.raises(ConfigError, match=r"k=3.*2 layers"):
            last_layers(net, 3)
        net[3].requires_grad_(False)
        net[4].requires_grad_(False)
        assert last_layers(net, 1) == ("0", "1")

    @pytest.mark.parametrize("kind", [CFk, EUk])
    def test_k_below_one(self, kind):
        with pytest.raises(ConfigError, match="k=0"):
            kind(k=0)


class TestRetrain:
    def test_against_the_trainer_of_the_recipes(self, split):
        given = seeded(small_net, 5)
        found = (
            Retrain(epochs=20, batch_size=ALL, weight_decay=0.01, seed=2)
            .unlearn(given, split)
            .model
        )
        settings = TrainSettings(
            epochs=20, batch_size=ALL, lr=0.05, weight_decay=0.01, schedule="constant"
        )
        expected = train(
            seeded(small_net, 2),
            TensorDataset(X, Y),
            settings,
            seed=0,
            indices=KEPT,
            progress=False,
        )
        torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-5)

    def test_forgotten_samples_do_not_matter(self, model, split):
        elsewhere = X.clone()
        elsewhere[IDX] = 100.0
        other = resolve_split(TensorDataset(elsewhere, Y), IDX)
        method = Retrain(epochs=2)
        assert torch.equal(
            flat(method.unlearn(model, split).model), flat(method.unlearn(model, other).model)
        )

    def test_own_training_function(self, split, untouched):
        given, called = seeded(Noisy), []

        def own(start, data, indices, seed):
            called.append((flat(start), indices, seed))
            torch.rand(1), np.random.rand(1)  # noqa: NPY002
            with torch.no_grad():
                start.head.bias.fill_(float(data.tensors[1][indices].sum()))
            return start.train()

        with untouched(given):
            done = Retrain(train=own, seed=6).unlearn(given, split)
        ((start, indices, seed),) = called
        torch.testing.assert_close(start, flat(seeded(Noisy, 6)), rtol=0, atol=0)
        assert indices.tolist() == KEPT.tolist()
        assert seed == 6
        assert float(done.model.head.bias.detach()[0]) == float(Y[KEPT].sum())
        assert not done.model.training
        assert math.isnan(done.passes)
        with pytest.raises(ConfigError, match="train to return NoneType"):
            Retrain(train=lambda *_: None).unlearn(given, split)

    def test_fresh_statistics_and_frozen_parts(self):
        given = seeded(Noisy)
        given.body[1].running_mean.fill_(7.0)
        found = fresh(given, 1)
        assert float(found.body[1].running_mean.abs().max()) == 0
        assert torch.equal(flat(found), flat(seeded(Noisy, 1)))
        assert float(fresh(given, 1, Noisy).body[1].running_mean.abs().max()) == 0
        given.body[1].requires_grad_(False)
        given.head.bias.requires_grad_(False)
        for init in (None, Noisy):
            part = fresh(given, 1, init)
            assert torch.equal(part.body[1].running_mean, given.body[1].running_mean)
            assert torch.equal(part.head.bias, given.head.bias)
            assert torch.equal(part.body[0].weight, found.body[0].weight)

    def test_modules_that_cannot_be_reset(self, split):
        class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.scale = small_net(), nn.Parameter(torch.ones(4))

            def forward(self, x):
                return self.net(x * self.scale)

        given = seeded(Scale)
        with torch.no_grad():
            given.scale.fill_(3.0)
        for method in (Retrain(), EUk(k=3), BadTeacher()):
            with pytest.raises(ModelError, match="no reset_parameters"):
                method.unlearn(given, split)
            done = dataclasses.replace(method, init=Scale).unlearn(given, split)
            assert torch.isfinite(flat(done.model)).all()
        assert torch.equal(fresh(given, 2, Scale).scale, torch.ones(4))
        with pytest.raises(ConfigError, match=r"init to return Sequential without scale"):
            Retrain(init=small_net).unlearn(given, split)
        with pytest.raises(ConfigError, match="init to return int"):
            Retrain(init=lambda: 3).unlearn(given, split)
        normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        with pytest.raises(ModelError, match="ParametrizationList"):
            fresh(normed, 0)


def noise(method, model, split):
    return method.noise(Training(model, split, Categorical(), method.batch_size), method.noises)


class TestUnsir:
    def test_noise_by_hand(self, split):
        """One linear layer, for which the gradient is (2 penalty x - W^T (p - y)) / noises."""
        given = seeded(lambda: nn.Linear(4, 3).double())
        method = Unsir(noises=5, steps=0, penalty=0.3, noise_lr=0.2)
        start = noise(method, given, split)
        made = noise(dataclasses.replace(method, steps=3), given, split)
        x, first, second = start.args[0], 0, 0
        assert start.targets.tolist() == Y[np.random.default_rng(0).choice(IDX, 5)].tolist()
        for t in range(1, 4):
            residual = given(x).softmax(-1).detach() - F.one_hot(start.targets, 3)
            g = (0.6 * x - residual @ given.weight.detach()) / 5
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            x = x - 0.2 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(made.args[0], x, rtol=0, atol=1e-9)

    def test_impair_and_repair_by_hand(self, model, split):
        method = Unsir(
            noises=4,
            noise_share=10 / (R + 10),
            impair_epochs=2,
            repair_epochs=2,
            batch_size=ALL,
            impair_lr=0.01,
        )
        found = method.unlearn(model, split).model
        made = noise(method, model, split)
        turns = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
        x = torch.cat([made.args[0][turns], X[KEPT].double()])
        y = torch.cat([made.targets[turns], Y[KEPT]])
        impair = lambda w: F.cross_entropy(torch.func.functional_call(model, w, (x,)), y)  # noqa: E731
        impaired = copy.deepcopy(model)
        impaired.load_state_dict(by_hand(model, [impair] * 2, 0.01, adam=True))
        assert_weights(
            found, by_hand(impaired, [ce(model, KEPT)] * 2, 0.01, adam=True), model, 1e-7
        )

    @pytest.mark.parametrize("kept", [1, 55, 1291, 9000, 48_000])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.36, 0.9])
    def test_share_of_noise_whatever_the_size(self, kept, share):
        turns = Unsir(noise_share=share).turns(kept)
        assert abs(len(turns) - share * (len(turns) + kept)) <= 0.5  # rounded
        shown = np.bincount(turns, minlength=1)
        assert len(shown) <= 256
        assert shown.max() - shown.min() <= 1

    def test_the_epoch_of_the_authors(self):
        """One of ten classes of CIFAR-10: 20 batches of 256 noise inputs, 9,000 other samples."""
        shown = np.bincount(Unsir(noise_share=5120 / 14_120).turns(9000))
        assert shown.tolist() == [20] * 256
        assert Unsir().noise_share == pytest.approx(5120 / 14_120, abs=0.005)

    def test_noise_is_made_in_eval_mode(self, split):
        given, method = seeded(Noisy), Unsir(noises=5, steps=3)
        expected = noise(method, given, split).args[0]
        torch.testing.assert_close(
            noise(method, given.train(), split).args[0], expected, rtol=0, atol=0
        )

    def test_token_ids_cannot_be_noise(self):
        given = seeded(lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 3)))
        data = TensorDataset(
            torch.randint(9, (N, 2), generator=torch.Generator().manual_seed(0)), Y
        )
        with pytest.raises(ConfigError, match="without a floating-point tensor"):
            Unsir().unlearn(given, resolve_split(data, IDX))

    def test_samples_of_different_shape(self):
        class Ragged(Dataset):
            def __len__(self):
                return N

            def __getitem__(self, i):
                return torch.full((3 if i in IDX else 5, 4), 1.0), Y[i]

        class Mean(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(4, 3)

            def forward(self, x):
                return self.out(x.mean(1))

        with pytest.raises(ConfigError, match="differ in shape"):
            Unsir(noises=4).unlearn(seeded(Mean), resolve_split(Ragged(), IDX))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"noises": 0},
            {"retained": 0},
            {"noise_share": 1.0},
            {"noise_share": -0.1},
            {"steps": -1},
            {"noise_lr": 0.0},
            {"penalty": -1.0},
        ],
    )
    def test_bad_settings(self, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            Unsir(**wrong)
