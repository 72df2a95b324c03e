"""However the data is laid out, the same samples give the same weights; and a result is
complete."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from fisher_forget import Categorical, Gaussian, forget
from fisher_forget._util import copies

PLAIN = {"drift": True, "steps": 1, "damping": 0.1, "noise": None, "progress": False}
IDX = [0, 5, 17, 30]
X, Y = blobs_data().tensors
BASE = TensorDataset(X, Y)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # sums in another order, float32


def weights(result, prefix=""):
    return {name.removeprefix(prefix): p.detach() for name, p in result.model.named_parameters()}


def assert_same(found, expected, prefix="", **tolerance):
    found, expected = weights(found, prefix), weights(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, **(tolerance or CLOSE))


@pytest.fixture(scope="module")
def expected(trained):
    result = forget(trained, DataLoader(BASE, batch_size=16), IDX, **PLAIN)
    before = dict(trained.named_parameters())
    assert (
        max(float((p - before[n].detach()).abs().max()) for n, p in weights(result).items()) > 1e-3
    )  # a hundred times the tolerance
    return result


class Samples(Dataset):
    """Whatever a test makes of input and target."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        return self.make(X[index], Y[index])


class Wrapped(nn.Module):
    """The same network behind another signature or another return value."""

    def __init__(self, net):
        super().__init__()
        self.net = net


class WithLogits(Wrapped):
    def forward(self, x):
        return SimpleNamespace(loss=None, logits=self.net(x))


class TwoInputs(Wrapped):
    def forward(self, left, right, scale=None):
        return self.net(torch.cat([left, right], -1))


class Nested(Wrapped):
    def forward(self, parts):
        return self.net(torch.cat([parts["a"], parts["b"]], -1))


class TestBatchLayouts:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x, y: (x, y),
            lambda x, y: [x, y],
            lambda x, y: (x, y, "name", 7.0),
            lambda x, y: (x, int(y)),
            lambda x, y: (x.numpy(), y.numpy()),
            lambda x, y: {"x": x, "label": y},
            lambda x, y: {"targets": y, "image": x},
        ],
    )
    def test_understood(self, trained, expected, make):
        assert_same(
            forget(trained, DataLoader(Samples(make), batch_size=16), IDX, **PLAIN), expected
        )

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
    def test_integer_targets(self, trained, expected, dtype):
        assert_same(forget(trained, TensorDataset(X, Y.to(dtype)), IDX, **PLAIN), expected)

    def test_probability_targets(self, trained, expected):
        assert_same(forget(trained, TensorDataset(X, F.one_hot(Y).float()), IDX, **PLAIN), expected)

    def test_unpack(self, trained, expected):
        loader = DataLoader(Samples(lambda x, y: {"meta": {"y": y}, "pixels": x}), batch_size=16)
        unpack = lambda batch: (batch["pixels"], batch["meta"]["y"])  # noqa: E731
        assert_same(forget(trained, loader, IDX, unpack=unpack, **PLAIN), expected)

    @pytest.mark.parametrize(
        ("make", "model"),
        [
            (lambda x, y: {"right": x[3:], "left": x[:3], "labels": y}, TwoInputs),
            (lambda x, y: ((x[:3], x[3:]), y), TwoInputs),
            (lambda x, y: {"parts": {"a": x[:1], "b": x[1:]}, "y": y, "parts_": 0}, None),
        ],
    )
    def test_several_inputs(self, trained, expected, make, model):
        if model is None:
            loader, unpack = (
                DataLoader(Samples(make), batch_size=16),
                lambda b: ({"parts": b["parts"]}, b["y"]),
            )
            found = forget(
                Nested(copy.deepcopy(trained)).eval(), loader, IDX, unpack=unpack, **PLAIN
            )
        else:
            found = forget(
                model(copy.deepcopy(trained)).eval(), DataLoader(Samples(make)), IDX, **PLAIN
            )
        assert_same(found, expected, "net.")

    def test_object_with_logits(self, trained, expected):
        assert_same(
            forget(WithLogits(copy.deepcopy(trained)).eval(), BASE, IDX, **PLAIN), expected, "net."
        )

    def test_custom_collate(self, trained, expected):
        def collate(samples):
            xs, ys = zip(*samples, strict=True)
            return {"labels": torch.tensor([int(y) for y in ys]), "x": torch.stack(xs)}

        assert_same(
            forget(trained, DataLoader(BASE, batch_size=7, collate_fn=collate), IDX, **PLAIN),
            expected,
        )

    def test_workers(self, trained, expected):
        data = Samples(lambda x, y: (x, y))
        assert_same(
            forget(trained, DataLoader(data, batch_size=60, num_workers=1), IDX, **PLAIN), expected
        )

    def test_float64_model(self, trained, expected):
        found = forget(copy.deepcopy(trained).double(), BASE, IDX, **PLAIN)
        assert {p.dtype for p in found.model.parameters()} == {torch.float64}
        assert_same(found, expected)


class TestLoaders:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: BASE,
            lambda: list(zip(X, Y, strict=True)),
            lambda: ConcatDataset([Subset(BASE, range(20)), Subset(BASE, range(20, 60))]),
            lambda: DataLoader(BASE, batch_size=1),
            lambda: DataLoader(BASE, batch_size=7),
            lambda: DataLoader(BASE, batch_size=60),
            lambda: DataLoader(BASE, batch_size=16, shuffle=True),
            lambda: DataLoader(Subset(BASE, range(60)), batch_size=16),
            lambda: DataLoader(BASE, batch_size=16, sampler=SubsetRandomSampler(range(60))),
            lambda: DataLoader(
                BASE, batch_size=16, collate_fn=lambda samples: default_collate(samples)
            ),
        ],
    )
    def test_same_samples(self, trained, expected, build):
        assert_same(forget(trained, build(), IDX, **PLAIN), expected)

    @pytest.mark.parametrize(
        "build",
        [
            # the same 40 samples: 59, 57, 55, ... and then 0, 2, 4, ...; positions count in the
            # given order
            lambda order: DataLoader(Subset(BASE, order), batch_size=16),
            lambda order: DataLoader(
                Subset(Subset(BASE, range(59, -1, -1)), [59 - i for i in order]), shuffle=True
            ),
            lambda order: DataLoader(BASE, sampler=SubsetRandomSampler(order), batch_size=16),
            lambda order: DataLoader(
                Subset(BASE, [*order, 1, 3, 5]),
                sampler=SubsetRandomSampler(range(len(order))),
                batch_size=16,
            ),
            lambda order: DataLoader(
                BASE, batch_sampler=BatchSampler(SubsetRandomSampler(order), 16, False)
            ),
        ],
    )
    def test_forget_idx_counts_in_the_base(self, trained, build):
        order = [*range(59, 19, -2), *range(0, 40, 2)]
        found = forget(trained, build(order), IDX, **PLAIN)
        assert found.split.base is BASE
        assert found.split.retain.tolist() == sorted(set(order) - set(IDX))
        assert found.split.forget.tolist() == IDX
        kept = TensorDataset(X[found.split.retain], Y[found.split.retain])
        reference = forget(
            trained,
            ConcatDataset([kept, Subset(BASE, IDX)]),
            range(len(kept), len(kept) + 4),
            **PLAIN,
        )
        assert_same(found, reference)

    @pytest.mark.parametrize(
        "idx",
        [
            IDX,
            tuple(reversed(IDX)),
            np.array(IDX),
            np.array(IDX, dtype=np.int32),
            torch.tensor(IDX),
            torch.tensor(IDX, dtype=torch.int32),
            set(IDX),
            dict.fromkeys(IDX).keys(),
        ],
        ids=lambda idx: type(idx).__name__,
    )
    def test_forget_idx(self, trained, expected, idx):
        assert_same(forget(trained, BASE, idx, **PLAIN), expected)

    def test_range(self, trained):
        assert_same(
            forget(trained, BASE, range(10, 20), **PLAIN),
            forget(trained, BASE, list(range(10, 20)), **PLAIN),
        )

    def test_the_forgotten_need_not_be_in_the_loader(self, trained, expected):
        rest = sorted(set(range(60)) - set(IDX))
        assert_same(
            forget(trained, DataLoader(Subset(BASE, rest), batch_size=16), IDX, **PLAIN), expected
        )


@pytest.fixture(scope="module")
def automatic(trained):
    """With every default: nothing tuned, no warning."""
    return forget(
        trained, DataLoader(BASE, batch_size=16), IDX, weight_decay=WEIGHT_DECAY, progress=False
    )


class TestResult:
    def test_frozen(self, automatic):
        for field in dataclasses.fields(automatic):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(automatic, field.name, None)

    def test_complete(self, automatic):
        assert [
            f.name for f in dataclasses.fields(automatic) if getattr(automatic, f.name) is None
        ] == []
        assert automatic.versions.keys() == {"fisher_forget", "torch", "python"}
        assert automatic.seconds.keys() == {"curvature", "gradient", "newton", "noise", "check"}
        assert all(value >= 0 for value in automatic.seconds.values())
        assert automatic.losses.keys() == {
            "retain_before",
            "retain_after",
            "forget_before",
            "forget_after",
        }
        assert automatic.newton.accepted
        assert automatic.newton.drift_removed
        assert automatic.weight_decay == WEIGHT_DECAY
        assert not automatic.model.training

    def test_its_repr_is_its_text_and_no_tensors(self, automatic):
        assert repr(automatic) == str(automatic)

    def test_losses(self, automatic, trained):
        for part, rows in (("retain", automatic.split.retain), ("forget", automatic.split.forget)):
            for when, model in (("before", trained), ("after", automatic.model)):
                loss = float(F.cross_entropy(model(X[rows]), Y[rows]))
                assert automatic.losses[f"{part}_{when}"] == pytest.approx(loss, rel=1e-5)

    def test_forgetting_raises_the_forget_loss(self, trained):
        result = forget(
            trained, BASE, range(0, 60, 3), weight_decay=WEIGHT_DECAY, noise=None, progress=False
        )
        assert result.losses["forget_after"] > 1.5 * result.losses["forget_before"]

    def test_str(self, automatic):
        text = str(automatic)
        for word in (
            "Forgot 4 samples",
            "retained 56",
            "seed 0",
            "ekfac",
            "damping",
            f"{min(s.damping for s in automatic.newton.accepted):.1e}",
            f"noise      {automatic.noise.scale:.2e}",
            *(f"{value:.4g}" for value in automatic.losses.values()),
            "not a certificate",
        ):
            assert word in text, text
        assert max(map(len, text.splitlines())) <= 100

    def test_str_without_noise_or_steps(self, expected):
        assert "noise      none" in str(expected)
        held = dataclasses.replace(expected, newton=dataclasses.replace(expected.newton, path=()))
        assert "weights are unchanged" in str(held)

    @pytest.mark.parametrize("noise", ["auto", 0.01, None])
    def test_summary(self, trained, noise):
        result = forget(trained, BASE, IDX, **(PLAIN | {"noise": noise}))
        summary = json.loads(json.dumps(result.summary()))
        assert (summary["forgotten"], summary["retained"]) == (4, 56)
        assert summary["newton"]["damping"] == 0.1
        assert (summary["noise"] is None) == (noise is None)
        assert summary["losses"] == result.losses

    def test_deterministic_by_seed_but_for_the_noise(self, trained, automatic):
        again, other = (
            forget(
                trained,
                DataLoader(BASE, batch_size=16),
                IDX,
                weight_decay=WEIGHT_DECAY,
                seed=s,
                progress=False,
            )
            for s in (0, 1)
        )
        assert again.noise == automatic.noise  # what is said of it, and its scale
        for name, p in automatic.newton.params.items():
            assert torch.equal(again.newton.params[name], p)
            noisy = (r.model.get_parameter(name) for r in (again, automatic))
            assert not torch.equal(*noisy)
        assert other.noise != automatic.noise

    def test_nothing_shared_with_the_given_model(self, automatic, trained):
        given = {p.data_ptr() for p in trained.parameters()}
        assert not given & {p.data_ptr() for p in automatic.model.parameters()}
        assert not given & {p.data_ptr() for p in automatic.newton.params.values()}


def seeded_noise(result, scale, seed):
    return result.with_noise(scale, generator=torch.Generator().manual_seed(seed))


class TestWithNoise:
    def test_zero_is_newton_alone(self, automatic):
        silent = automatic.with_noise(0.0)
        for name, p in silent.named_parameters():
            assert torch.equal(p, automatic.newton.params[name])

    def test_the_drawn_noise_again(self, trained):
        one, two = (torch.Generator().manual_seed(5) for _ in range(2))
        result = forget(trained, BASE, IDX, generator=one, **(PLAIN | {"noise": 0.01}))
        drawn = result.with_noise(0.01, generator=two)
        for name, p in drawn.named_parameters():
            assert torch.equal(p, result.model.get_parameter(name))

    def test_generator(self, automatic):
        first, again, other = (seeded_noise(automatic, 0.1, s).state_dict() for s in (3, 3, 4))
        for name in first:
            assert torch.equal(first[name], again[name])
            assert not torch.equal(first[name], other[name])

    def test_scale(self, automatic):
        """The draw is the same and its length follows the scale."""
        center = automatic.newton.params
        small, large = (seeded_noise(automatic, s, 1) for s in (0.01, 0.04))
        for name, p in small.named_parameters():
            torch.testing.assert_close(
                4 * (p - center[name]),
                large.get_parameter(name) - center[name],
                rtol=1e-3,
                atol=1e-5,
            )

    def test_leaves_the_result_and_the_random_state_alone(self, automatic, untouched):
        with untouched(automatic.model):
            automatic.with_noise(0.5)


def norm_net():
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )


def normalised(model, x):
    """(mean, unbiased variance) of both BatchNorm inputs in training mode, layer by layer, on one
    batch."""
    found = []
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            mean, var = x.mean(0), x.var(0, unbiased=True)
            found.append((mean, var))
            x = (x - mean) / torch.sqrt(
                x.var(0, unbiased=False) + layer.eps
            ) * layer.weight + layer.bias
        else:
            x = layer(x)
    return found


class TestBatchNorm:
    @pytest.fixture
    def model(self):
        model = seeded(norm_net)
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(X)  # statistics of all data, as training leaves them
        return model.eval()

    # these weights were never trained, and a third of the samples go
    @pytest.mark.filterwarnings("ignore:Recomputing")
    @pytest.mark.parametrize("batch_size", [1, 8, 60])
    def test_statistics_of_the_retained_data_alone(self, model, untouched, batch_size):
        with untouched(model):
            result = forget(
                model,
                DataLoader(BASE, batch_size=batch_size),
                range(0, 60, 3),
                **(PLAIN | {"noise": 0.01}),
            )
        assert result.buffers_refreshed
        assert "BatchNorm" in str(result)
        norms = [m for m in result.model if isinstance(m, nn.BatchNorm1d)]
        given = [m for m in model if isinstance(m, nn.BatchNorm1d)]
        with torch.no_grad():
            truth = normalised(result.model, X[result.split.retain])
        for norm, old, (mean, var) in zip(norms, given, truth, strict=True):
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)
            assert norm.momentum == old.momentum
            assert not norm.training
            assert not torch.allclose(norm.running_mean, old.running_mean, atol=1e-2)

    def test_sorted_data_of_many_batches(self):
        """Neighbours are alike here: batches in index order would see no variance between the
        classes."""
        x, y = blobs_data(603).tensors
        order = torch.argsort(y, stable=True)
        data = TensorDataset(10 * x[order], y[order])
        loader, options = DataLoader(data, batch_size=100), PLAIN | {"batch_norm": "refresh"}
        result = forget(seeded(norm_net), loader, [0, 1], **options)
        norm, first = result.model[1], result.model[0]
        with torch.no_grad():
            inputs = first(data.tensors[0][result.split.retain])
        torch.testing.assert_close(norm.running_mean, inputs.mean(0), rtol=1e-4, atol=1e-3)
        # the mean of within-batch variances: unbiased for random batches; 3 % is four times its
        # spread here
        torch.testing.assert_close(norm.running_var, inputs.var(0), rtol=0.03, atol=0)

    @pytest.mark.filterwarnings("ignore:Recomputing")
    def test_with_noise_refreshes_too(self, model):
        result = forget(model, BASE, [0, 1], **PLAIN)
        noisy = seeded_noise(result, 0.1, 1)
        with torch.no_grad():
            (mean, var), _ = normalised(noisy, X[result.split.retain])
        torch.testing.assert_close(noisy[1].running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(noisy[1].running_var, var, rtol=1e-4, atol=1e-5)

    def test_a_single_retained_sample_keeps_them(self, model):
        result = forget(model, BASE, range(1, 60), **PLAIN)
        assert not result.buffers_refreshed
        assert torch.equal(result.model[1].running_var, model[1].running_var)

    def test_none_to_refresh(self, expected):
        assert not expected.buffers_refreshed


class Tagger(nn.Module):
    """Classes for every position, each from its own token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


class TestSequences:
    @pytest.mark.parametrize("ignored", [-100, 2])
    def test_equals_its_scored_positions_as_samples(self, ignored):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 7, (20, 5), generator=generator)
        targets = torch.randint(0, 2, (20, 5), generator=generator)
        scored = torch.rand(20, 5, generator=generator) < 0.7
        model = seeded(Tagger).double()
        options = PLAIN | {"structure": "dense"}
        padded = TensorDataset(tokens, targets.masked_fill(~scored, ignored))
        found = forget(
            model, padded, [3, 4], likelihood=Categorical(ignore_index=ignored), **options
        )
        owner = torch.arange(20)[:, None].expand(20, 5)[scored]
        flat = TensorDataset(tokens[scored][:, None], targets[scored][:, None])
        forgotten = torch.nonzero((owner == 3) | (owner == 4)).flatten()
        reference = forget(model, flat, forgotten, **options)
        assert_same(found, reference, rtol=1e-9, atol=1e-12)
        for name, value in reference.losses.items():
            assert found.losses[name] == pytest.approx(value, rel=1e-9)


GENERATOR = torch.Generator().manual_seed(1)
TARGETS = {
    "categorical": (Y, lambda f, y: F.cross_entropy(f, y)),
    "bernoulli": (
        (torch.rand(60, 3, generator=GENERATOR) < 0.4).double(),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1).mean(),
    ),
    "gaussian": (
        torch.randn(60, 3, generator=GENERATOR, dtype=torch.float64),
        lambda f, y: 0.5 * (f - y).square().sum(1).mean(),
    ),
}


class TestLikelihoods:
    @pytest.mark.parametrize("drift", [False, True])
    @pytest.mark.parametrize("likelihood", TARGETS)
    def test_textbook_newton_step_of_a_linear_model(self, likelihood, drift):
        """w - d_r, or w - (d_r - d_D) where the drift is subtracted, with d = (H + (wd + tau) I)^-1
        (grad L + wd w) of the retained samples and of all.

        Of a linear model the GGN is autograd's Hessian.
        """
        targets, loss = TARGETS[likelihood]
        model = seeded(lambda: nn.Linear(4, 3)).double()
        x, keep = X.double(), [i for i in range(60) if i not in IDX]
        start = torch.cat([model.weight.detach().flatten(), model.bias.detach()])

        def objective(w, rows):
            return (
                loss(x[rows] @ w[:12].view(3, 4).T + w[12:], targets[rows])
                + 0.05 / 2 * w.square().sum()
            )

        def newton(rows):
            def mine(w):
                return objective(w, rows)

            damped = torch.autograd.functional.hessian(mine, start) + 0.2 * torch.eye(15).double()
            return torch.linalg.solve(damped, torch.autograd.functional.jacobian(mine, start))

        truth = start - newton(keep) + (newton(range(60)) if drift else 0.0)
        options = PLAIN | {
            "structure": "dense",
            "drift": drift,
            "damping": 0.2,
            "weight_decay": 0.05,
        }
        result = forget(model, TensorDataset(x, targets), IDX, likelihood=likelihood, **options)
        found = torch.cat([result.model.weight.detach().flatten(), result.model.bias.detach()])
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("sigma", [1.0, 0.3])
    def test_ridge_regression_is_retrained_exactly(self, sigma):
        """The objective is quadratic, so one undamped step ends at the closed form without the
        forgotten samples."""
        targets = TARGETS["gaussian"][0]
        design = torch.cat([X.double(), torch.ones(60, 1, dtype=torch.float64)], 1)

        def ridge(rows):
            a = design[rows]
            left = a.T @ a / (len(rows) * sigma**2) + 0.1 * torch.eye(5, dtype=torch.float64)
            return torch.linalg.solve(left, a.T @ targets[rows] / (len(rows) * sigma**2)).T

        def model_of(w):
            model = nn.Linear(4, 3).double().eval()
            with torch.no_grad():
                model.weight.copy_(w[:, :4])
                model.bias.copy_(w[:, 4])
            return model

        everyone, keep = list(range(60)), [i for i in range(60) if i not in IDX]
        options = PLAIN | {
            "structure": "dense",
            "drift": "auto",
            "damping": 0.0,
            "weight_decay": 0.1,
        }
        data = TensorDataset(X, targets)
        result = forget(model_of(ridge(everyone)), data, IDX, likelihood=Gaussian(sigma), **options)
        truth = ridge(keep)
        torch.testing.assert_close(
            result.model.weight.detach(), truth[:, :4], rtol=1e-9, atol=1e-11
        )
        torch.testing.assert_close(result.model.bias.detach(), truth[:, 4], rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
    def test_every_default(self, likelihood):
        model = seeded(small_net)
        data = TensorDataset(X, TARGETS[likelihood][0].float())
        result = forget(model, data, IDX, likelihood=likelihood, drift=True, progress=False)
        assert all(math.isfinite(value) for value in result.losses.values())
        assert result.noise.rise <= result.noise.target.loss


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        h = self.norm(self.body(x)).relu()
        return self.head[0](h) + self.head[1](-h)


class TestSubset:
    @pytest.mark.parametrize(
        ("subset", "moves"),
        [
            ("head.*", {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}),
            (
                ("*.bias", "norm.*"),
                {"body.bias", "head.0.bias", "head.1.bias", "norm.weight", "norm.bias"},
            ),
            (["head.1.weight"], {"head.1.weight"}),
        ],
    )
    def test_only_these_move(self, untouched, subset, moves):
        model = seeded(Headed)
        with untouched(model):
            result = forget(model, BASE, IDX, subset=subset, **(PLAIN | {"noise": 0.01}))
        after = result.model.state_dict()
        assert {
            name
            for name, value in model.state_dict().items()
            if not torch.equal(after[name], value)
        } == moves
        assert result.newton.params.keys() == moves


@pytest.mark.parametrize("structure", ["ekfac", "dense"])
def test_a_model_is_copied_twice_once_to_work_on_and_once_to_return(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, copied = [], copies._copied
    monkeypatch.setattr(copies, "_copied", lambda *args: made.append(args) or copied(*args))
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval()
    forget(model, TensorDataset(X, Y), IDX, structure=structure, drift=True, progress=False)
    assert len(made) == 2
