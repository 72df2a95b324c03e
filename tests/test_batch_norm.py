"""Running statistics: recomputed where this data set them, kept bit by bit where it did not."""

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import SISA, ForgetOptions, TrainSettings, forget, prepare, resolve_split, train
from fisher_forget import params as P
from fisher_forget.baselines import METHODS
from fisher_forget.baselines.retrain import fresh
from fisher_forget.baselines.sisa.method import Sharded
from fisher_forget.errors import ConfigError, FisherForgetWarning
from fisher_forget.likelihood import Categorical
from fisher_forget.unlearn.batch_norm import (
    FAR,
    foreign_statistics,
    frozen_statistics,
    norm_layers,
    refresh_statistics,
    train_mode,
)
from fisher_forget.unlearn.newton.guard import HeldOut
from fisher_forget.unlearn.objective import Objective

N, CLASSES = 240, 3
IDX = range(10)
PLAIN = {"steps": 1, "damping": 1.0, "noise": None, "progress": False, "drift": True}


def images():
    body = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    body += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 32, (1, 6, 6)


def vectors():
    body = [nn.Linear(12, 16), nn.BatchNorm1d(16, affine=False), nn.Tanh(), nn.Linear(16, 16)]
    return nn.Sequential(*body, nn.SyncBatchNorm(16, momentum=None), nn.ReLU()), 16, (12,)


def series():
    body = [nn.Conv1d(2, 8, 3, padding=1), nn.InstanceNorm1d(8, track_running_stats=True)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool1d(3), nn.Flatten()), 24, (2, 9)


KINDS = [images, vectors, series]


def set_statistics(body, draw, batches=120):
    """Let the norm layers see batches, as a training does."""
    body.train()
    with torch.no_grad():
        for _ in range(batches):
            body(draw())
    return body.eval()


def trained(kind, *, foreign, seed=0):
    """A frozen backbone with a trained head, and its data; the backbone's statistics are of other
    data, or of these."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body, width, shape = kind()
        head = nn.Linear(width, CLASSES)
        y = torch.randint(CLASSES, (N,), generator=g)
        centers = torch.randn(CLASSES, *shape, generator=g)
        x = centers[y] + 1.2 * torch.randn(N, *shape, generator=g) + 2
        other = lambda: torch.randn(64, *shape, generator=g) * 0.5 - 1  # noqa: E731
        own = lambda: x[torch.randperm(N, generator=g)[:80]]  # noqa: E731
        set_statistics(body, other if foreign else own)
    body.requires_grad_(False)
    with torch.no_grad():
        features = body(x)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in head.parameters())
        loss = F.cross_entropy(head(features), y) + 5e-3 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return SimpleNamespace(model=nn.Sequential(body, head).eval(), x=x, y=y)


def accuracy(model, case):
    with torch.no_grad():
        return float((model(case.x).argmax(1) == case.y).double().mean())


def statistics(model):
    """(mean, variance) of every norm layer, by name."""
    return {n: (m.running_mean, m.running_var) for n, m in norm_layers(model).items()}


def same(first, second):
    """Names of the layers whose statistics are the same bits."""
    a, b = statistics(first), statistics(second)
    return [n for n in a if all(map(torch.equal, a[n], b[n]))]


def by_hand(model, x, kept=()):
    """Statistics of one batch of all samples in float64, layer by layer: a layer not in `kept`
    normalises by those of its input."""
    twin, found = copy.deepcopy(model).double().eval(), {}
    for name, layer in norm_layers(twin).items():

        def replaced(module, args, _, name=name):
            (a,) = args
            instance = isinstance(module, nn.InstanceNorm1d)
            within = [d for d in range(a.dim()) if d > 1 or (d == 0 and not instance)]
            mean, var = a.mean(within, keepdim=True), a.var(within, unbiased=True, keepdim=True)
            pooled = [s.mean(0).reshape(-1) if instance else s.reshape(-1) for s in (mean, var)]
            found[name] = tuple(pooled)
            if name in kept:
                return None
            biased = a.var(within, unbiased=False, keepdim=True)
            out = (a - mean) / torch.sqrt(biased + module.eps)
            if module.weight is None:
                return out
            shape = [1, -1, *[1] * (a.dim() - 2)]
            return out * module.weight.view(shape) + module.bias.view(shape)

        layer.register_forward_hook(replaced)
    with torch.no_grad():
        twin(x.double())
    return found


def loader(case, batch_size=N):
    return DataLoader(TensorDataset(case.x, case.y), batch_size=batch_size)


@pytest.mark.parametrize("kind", KINDS)
class TestForget:
    def test_foreign_statistics_stay(self, kind, untouched):
        case = trained(kind, foreign=True)
        with untouched(case.model):
            result = forget(case.model, loader(case, 64), IDX, weight_decay=1e-2, progress=False)
        assert result.statistics.kept == tuple(norm_layers(case.model))
        assert not result.buffers_refreshed
        assert same(result.model, case.model) == list(norm_layers(case.model))
        assert accuracy(result.model, case) >= accuracy(case.model, case) - 0.02
        assert "BatchNorm statistics kept" in str(result)
        noisy = result.with_noise(1e-4)
        assert same(noisy, case.model) == list(norm_layers(case.model))

    def test_own_statistics_are_recomputed(self, kind):
        case = trained(kind, foreign=False)
        result = forget(case.model, loader(case), IDX, **PLAIN)
        assert result.statistics.refreshed == tuple(norm_layers(case.model))
        expected = by_hand(result.model, case.x[10:])
        for name, pair in statistics(result.model).items():
            for found, truth in zip(pair, expected[name], strict=True):
                torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
        assert not same(result.model, case.model)
        assert result.summary()["batch_norm"]["refreshed"] == tuple(norm_layers(case.model))

    def test_the_guard_looks_at_the_model_that_comes_out(self, kind):
        """Losses with the statistics of the moved weights, as torch's own train mode sets them."""
        case = trained(kind, foreign=False)
        split = resolve_split(loader(case), IDX)
        objective = Objective(case.model.requires_grad_(True), Categorical())
        names, rows = tuple(norm_layers(case.model)), split.retain
        at = {name: 0.8 * w for name, w in objective.start.items()}
        twin = copy.deepcopy(case.model)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(at[name])
        stale = F.cross_entropy(twin(case.x[rows]), case.y[rows])
        for layer in norm_layers(twin).values():
            layer.reset_running_stats()
            layer.momentum = 1.0  # of this one batch
        with torch.no_grad():
            twin.train()(case.x[rows])
            new = F.cross_entropy(twin.eval()(case.x[rows]), case.y[rows])
        assert abs(float(new - stale)) > 0.01
        with_new = HeldOut(objective, replace(split, batch_size=len(rows)), rows)
        assert with_new.look(at).loss == pytest.approx(float(new), rel=1e-4)
        kept = HeldOut(objective, split, rows, names)
        assert kept.look(at).loss == pytest.approx(float(stale), rel=1e-5)
        assert not same(twin, case.model)  # and nothing of the model given was changed

    @pytest.mark.filterwarnings("ignore:Retained samples suffered")
    def test_by_hand(self, kind):
        case = trained(kind, foreign=True)
        with pytest.warns(FisherForgetWarning, match=r"raised the retained loss by .*'keep'"):
            refreshed = forget(case.model, loader(case), IDX, **PLAIN, batch_norm="refresh")
        assert refreshed.statistics.refreshed == tuple(norm_layers(case.model))
        before = forget(case.model, loader(case), IDX, **PLAIN).losses["retain_after"]
        rise = refreshed.losses["retain_after"] - before
        assert refreshed.statistics.rise == pytest.approx(rise, rel=1e-5)
        own = trained(kind, foreign=False)
        kept = forget(own.model, loader(own), IDX, **PLAIN, batch_norm="keep")
        assert same(kept.model, own.model) == list(norm_layers(own.model))
        assert not kept.buffers_refreshed

    def test_prepared_decides_the_same(self, kind, tmp_path):
        for foreign in (True, False):
            case = trained(kind, foreign=foreign)
            data, folder = TensorDataset(case.x, case.y), tmp_path / str(foreign)
            options = {"weight_decay": 1e-2, "folder": folder, "progress": False}
            prepare(case.model, data, **options).forget([3, 4])
            again = prepare(case.model, data, **options)
            assert again.made.sums.foreign == (tuple(norm_layers(case.model)) if foreign else ())
            result = again.forget([7])
            assert result.buffers_refreshed is not foreign

    def test_the_product_of_a_refresh_is_refreshed_again(self, kind):
        """Its statistics are no moving average, though few batches were counted in training."""
        case = trained(kind, foreign=False)
        first = forget(case.model, loader(case, 64), IDX, **PLAIN).model
        assert foreign_statistics(first, resolve_split(loader(case), range(10, 20))) == ()


@pytest.mark.filterwarnings("ignore:Recomputing")
class TestLayers:
    def test_layer_after_layer(self):
        """The second layer saw what the first makes of this data by statistics of other data."""
        g = torch.Generator().manual_seed(3)
        x = torch.randn(N, 6, generator=g) * 3 + 5
        model = nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        )
        train_mode(model, ["0"])
        with torch.no_grad():
            for _ in range(100):
                model(x[torch.randperm(N, generator=g)[:80]])
        split = resolve_split(TensorDataset(x, torch.arange(N) % 3), [0, 1])
        assert foreign_statistics(model.eval(), split) == ("0",)
        assert refresh_statistics(model, split, ["0"]) == ("2",)
        expected = by_hand(model, x[2:], kept=["0"])["2"]
        for found, truth in zip(statistics(model)["2"], expected, strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=0.02, atol=0.02)

    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 999), st.integers(2, 4), st.data())
    def test_partly_frozen(self, seed, depth, data):
        """The first blocks are frozen and in eval mode, the others trained."""
        frozen = data.draw(st.integers(0, depth))
        g = torch.Generator().manual_seed(seed)
        x = 2 * torch.randn(N, 6, generator=g) + 1
        y = (x[:, 0] + x[:, 1] > 2).long()
        blocks = [
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(depth)
        ]
        model = nn.Sequential(*blocks, nn.Linear(6, 2))
        for p in model.parameters():
            nn.init.normal_(p, 0, 0.5, generator=g)
        set_statistics(model, lambda: 0.5 * torch.randn(64, 6, generator=g) - 2)
        names = [f"{i}.1" for i in range(depth)]
        for block in blocks[:frozen]:
            block.requires_grad_(False)
        train_mode(model, names[:frozen])
        optimizer = torch.optim.SGD(P.trainable(model).values(), 0.01)
        for _ in range(60):
            rows = torch.randperm(N, generator=g)[:60]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        result = forget(model.eval(), TensorDataset(x, y), IDX, **PLAIN)
        assert result.statistics.kept == tuple(names[:frozen])
        assert result.statistics.refreshed == tuple(names[frozen:])
        assert same(result.model, model) == names[:frozen]

    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(0, 99), st.floats(-1, 1), st.floats(0.3, 3), st.sampled_from([1e-5, 1e-2, 1.0])
    )
    def test_the_distance(self, seed, shift, scale, eps):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 4, generator=g).double()
        norm = nn.BatchNorm1d(4, eps=eps, momentum=None)
        model = nn.Sequential(norm, nn.Linear(4, 2)).double().eval()
        mean, var = x.mean(0), x.var(0)
        norm.running_mean.copy_(mean + shift)
        norm.running_var.copy_(var * scale)
        a = torch.distributions.Normal(mean, (var + eps).sqrt())
        b = torch.distributions.Normal(mean + shift, (var * scale + eps).sqrt())
        kl = float(torch.distributions.kl_divergence(a, b).mean())
        split = resolve_split(DataLoader(TensorDataset(x, torch.arange(100) % 2), 100), [0])
        if abs(kl - FAR) > 1e-6:
            assert foreign_statistics(model, split) == (("0",) if kl > FAR else ())

    @pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5])
    @pytest.mark.parametrize("batches", [2, 5, 40])
    def test_few_batches_leave_a_share_of_the_initial_statistics(self, momentum, batches):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(N, 4, generator=g) * 5 + 3
        norm = nn.BatchNorm1d(4, momentum=momentum).train()
        for _ in range(batches):
            norm(x[torch.randperm(N, generator=g)[:120]])
        model = nn.Sequential(norm, nn.Linear(4, 2)).eval()
        split = resolve_split(TensorDataset(x, torch.arange(N) % 2), [0])
        assert foreign_statistics(model, split) == ()

    def test_update_bn_sets_them(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(N, 4, generator=g) * 5 + 3
        model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.01), nn.Linear(4, 2))
        torch.optim.swa_utils.update_bn(DataLoader(TensorDataset(x), 60), model)
        split = resolve_split(TensorDataset(x, torch.arange(N) % 2), [0])
        assert foreign_statistics(model.eval(), split) == ()

    def test_a_shared_layer_has_the_statistics_of_all_its_places(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

            def forward(self, x):
                return self.head(self.norm(input=x) + self.norm(3 * x + 1))

        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        model = Twice().eval()
        split = resolve_split(DataLoader(TensorDataset(x, torch.arange(60) % 3), 64), [0, 1])
        assert refresh_statistics(model, split) == ("norm",)
        kept = x[2:]
        mean = (kept.mean(0) + (3 * kept + 1).mean(0)) / 2
        var = (kept.var(0) + (3 * kept + 1).var(0)) / 2
        torch.testing.assert_close(model.norm.running_mean, mean)
        torch.testing.assert_close(model.norm.running_var, var)

    def test_what_no_sample_reaches_and_what_has_no_variance_stays(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.spare, self.one = (nn.BatchNorm1d(4) for _ in range(3))
                self.head = nn.Linear(4, 3)

            def forward(self, x):
                return self.head(self.used(x) + self.one(x.mean(0, keepdim=True).detach() * 0))

        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        model = Odd().eval()
        given_ = copy.deepcopy(model)
        split = resolve_split(TensorDataset(x, torch.arange(60) % 3), [0, 1])
        assert refresh_statistics(model, split) == ("used",)
        assert same(model, given_) == ["spare", "one"]
        assert {"spare", "one"} <= set(foreign_statistics(model, split))

    def test_other_buffers_and_modes_stay(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3))
                self.head = nn.Linear(4, 3)
                self.register_buffer("calls", torch.zeros(()))
                self.register_buffer("average", torch.zeros(4))

            def forward(self, x):
                h = self.net(x)
                self.calls += 1
                self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
                return self.head(h)

        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        model = Counting()
        set_statistics(model, lambda: x)
        before = copy.deepcopy(model)
        split = resolve_split(TensorDataset(x, torch.arange(60) % 3), [0, 1])
        assert foreign_statistics(model, split) == ()
        assert refresh_statistics(model, split) == ("net.1",)
        changed = [
            name
            for (name, a), b in zip(model.named_buffers(), before.buffers(), strict=True)
            if not torch.equal(a, b)
        ]
        assert changed == ["net.1.running_mean", "net.1.running_var"]
        assert model.net[1].momentum == 0.3
        assert not any(m.training or m._forward_hooks for m in model.modules())

    def test_without_running_statistics_there_is_nothing_to_do(self):
        model = nn.Sequential(nn.InstanceNorm1d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
        split = resolve_split(TensorDataset(torch.randn(20, 2, 4), torch.arange(20) % 3), [0])
        assert norm_layers(model) == {}
        assert foreign_statistics(model, split) == refresh_statistics(model, split) == ()

    def test_an_unknown_choice(self):
        with pytest.raises(ConfigError, match=r"batch_norm='all'.*'refresh'"):
            ForgetOptions(batch_norm="all")


def fit(model, data, rows, seed):
    options = TrainSettings(epochs=80, lr=0.1, optimizer="adam", weight_decay=1e-3)
    return train(model, data, options, seed=seed, indices=rows, progress=False)


SETTINGS = {
    "finetune": {"epochs": 5, "lr": 0.01},
    "cf-k": {"epochs": 5, "lr": 0.01},
    "scrub": {"epochs": 2},
    "unsir": {"noises": 8, "steps": 2, "impair_lr": 1e-5, "repair_lr": 1e-5},
    "l1-sparse": {"epochs": 2},
    "retrain": {"train": fit},
}


def careless(model, data, rows, seed):
    """A training function that puts all in train mode, on a copy of its own."""
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    rows = torch.as_tensor(rows)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(
            twin.train(mode=True)(data.tensors[0][rows]), data.tensors[1][rows]
        ).backward()
        optimizer.step()
    return twin


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_methods_keep_foreign_statistics(self, kind, name):
        case = trained(kind, foreign=True)
        split = resolve_split(loader(case, 64), IDX)
        found = METHODS[name](**SETTINGS[name]).unlearn(case.model, split).model
        assert same(found, case.model) == list(norm_layers(case.model))
        assert accuracy(found, case) >= accuracy(case.model, case) - 0.03

    def test_retrained_by_a_careless_function(self, kind):
        case = trained(kind, foreign=True)
        split = resolve_split(loader(case, 64), IDX)
        found = METHODS["retrain"](train=careless).unlearn(case.model, split).model
        assert same(found, case.model) == list(norm_layers(case.model))
        assert accuracy(found, case) >= accuracy(case.model, case) - 0.05
        assert all(m.training for m in found.train().modules())

    def test_wrapped(self, kind):
        case = trained(kind, foreign=True)
        split = resolve_split(loader(case, 64), IDX)
        wrapped = nn.DataParallel(case.model).eval()
        found = METHODS["finetune"](epochs=1).unlearn(wrapped, split).model
        assert same(found, case.model) == list(norm_layers(case.model))
        result = forget(wrapped, loader(case), IDX, **PLAIN)
        assert result.statistics.kept == tuple(norm_layers(case.model))

    def test_methods_follow_the_data_elsewhere(self, kind):
        case = trained(kind, foreign=False)
        split = resolve_split(loader(case, 64), IDX)
        found = METHODS["finetune"](epochs=2).unlearn(case.model, split).model
        assert not same(found, case.model)

    def test_retrained_from_what_this_data_did_not_set(self, kind):
        case = trained(kind, foreign=False)
        names = tuple(norm_layers(case.model))
        for mean, var in statistics(fresh(case.model, 0, foreign=())).values():
            assert not mean.any()
            assert (var == 1).all()
        assert same(fresh(case.model, 0, foreign=names), case.model) == list(names)

    @pytest.mark.parametrize("fit", [fit, careless])
    @pytest.mark.parametrize("slices", [1, 2])
    def test_shards_keep_foreign_statistics(self, kind, slices, fit):
        case = trained(kind, foreign=True)
        names = list(norm_layers(case.model))

        split = resolve_split(loader(case, 64), IDX)
        done = Sharded(train=fit, shards=2, slices=slices).unlearn(case.model, split).model
        assert accuracy(done, case) >= accuracy(case.model, case) - 0.05
        sisa = SISA(lambda: copy.deepcopy(case.model), fit, shards=2, slices=slices)
        sisa.fit(TensorDataset(case.x, case.y))
        sisa.forget([0, 1])
        for member in sisa.module().members:
            assert same(member, case.model) == names

    def test_training_follows_the_data_where_the_layer_is_trained_or_new(self, kind):
        case = trained(kind, foreign=True)
        split = resolve_split(loader(case), IDX)
        names = list(norm_layers(case.model))
        assert frozen_statistics(case.model, split) == names
        free = copy.deepcopy(case.model).requires_grad_()
        own = [n for n, m in norm_layers(free).items() if m.weight is not None]
        assert not set(frozen_statistics(free, split)) & set(own)
        for layer in norm_layers(case.model).values():
            layer.reset_running_stats()
        assert frozen_statistics(case.model, split) == []


def test_nobody_is_warned_without_cause():
    case = trained(images, foreign=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FisherForgetWarning)
        result = forget(case.model, loader(case, 64), IDX, weight_decay=1e-2, progress=False)
    assert abs(result.statistics.rise) < 0.01
