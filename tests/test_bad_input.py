"""Whatever is wrong with what was given: the package's own exception, and nothing given is
changed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from fisher_forget import NoiseTarget, forget
from fisher_forget.cli import main
from fisher_forget.errors import (
    ConfigError,
    CurvatureError,
    DataError,
    FisherForgetError,
    FisherForgetWarning,
    ModelError,
    NumericalError,
    SplitError,
)

PLAIN = {"drift": True, "steps": 1, "damping": 0.1, "noise": None, "progress": False}
X, Y = blobs_data().tensors


@pytest.fixture
def refused(untouched):
    """refused(error, words, model=, data=, idx=, **options): forget() raises exactly that, and
    changes nothing."""

    def check(error, *words, model=None, data=None, idx=(0, 5), **options):
        model = seeded(small_net) if model is None else model
        data = TensorDataset(X, Y) if data is None else data
        with untouched(model), pytest.raises(error) as caught:
            forget(model, data, idx, **(PLAIN | options))
        raised = caught.value
        assert type(raised) is error
        assert raised.got
        assert raised.expected
        assert raised.fix
        assert "\n" not in raised.fix
        for word in words:
            assert word in str(raised), str(raised)

    return check


class TestForgetIdx:
    @pytest.mark.parametrize(
        ("idx", "word"),
        [
            ([], "empty"),
            (torch.zeros(0, dtype=torch.int64), "empty"),
            ([60], "60"),
            ([1_000_000], "Subset"),
            ([1, 2, 1], "repeats [1]"),
            ([-1], "negative"),
            ([0.0, 1.0], "float64"),
            (torch.tensor([0.5]), "float32"),
            ([True, False], "mask over the 60 samples"),
            (torch.arange(63) < 3, "make 63"),
            ([59, 60, 62], "make 63"),
            ([True, 4], "mixes"),
            (["a", "b"], "flat list of int"),
            ("abc", "flat list of int"),
            ([[0, 1], [2, 3]], "(2, 2)"),
            ([[0], [1, 2]], "flat list of int"),
            (np.array([[0, 1]]), "(1, 2)"),
            (3, "flat list of int"),
            (torch.tensor(3), "flat list of int"),
            (None, "flat list of int"),
            (range(60), "every sample"),
        ],
    )
    def test_refused(self, refused, idx, word):
        refused(SplitError, word, idx=idx)

    def test_nothing_left_in_the_loader(self, refused):
        loader = DataLoader(Subset(TensorDataset(X, Y), [4, 7, 9]), batch_size=2)
        refused(SplitError, "no retained sample", data=loader, idx=[4, 7, 9, 11])


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class NoLength(Dataset):
    def __getitem__(self, index):
        return X[index], Y[index]


class TestDataSet:
    @pytest.mark.parametrize(
        "data",
        [
            Endless(),
            DataLoader(Endless(), batch_size=4),
            NoLength(),
            DataLoader(NoLength(), batch_size=4),
        ],
    )
    def test_without_length(self, refused, data):
        refused(SplitError, "without length", data=data)

    def test_whole_batches(self, refused):
        refused(
            SplitError, "batch_size=None", data=DataLoader(TensorDataset(X, Y), batch_size=None)
        )

    def test_nan_inputs(self, refused):
        for row in (1, 40):  # among the first samples, which are read more than once, and later
            broken = X.clone()
            broken[row, 2] = float("nan")
            refused(NumericalError, "NaN", data=TensorDataset(broken, Y))

    def test_nan_in_a_forgotten_sample(self, refused):
        broken = X.clone()
        broken[5] = float("inf")
        refused(NumericalError, "NaN or infinite", data=TensorDataset(broken, Y))

    def test_nan_regression_targets(self, refused):
        targets = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
        targets[30, 1] = float("nan")
        refused(DataError, "targets", data=TensorDataset(X, targets), likelihood="gaussian")
        targets[:, 1] = float("nan")
        refused(
            DataError,
            "NaN or infinite targets",
            data=TensorDataset(X, targets),
            likelihood="gaussian",
        )

    def test_a_bad_forgotten_target(self, refused):
        targets = Y.clone()
        targets[5] = 3
        refused(DataError, "0 to 2", data=TensorDataset(X, targets))

    @pytest.mark.parametrize(
        ("targets", "word"),
        [
            (Y + 1, "from 1 to 3"),
            (Y - 1, "from -1 to 1"),
            (Y.float(), "gaussian"),
            (torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), "sum to 1"),
            (torch.full((60, 3), 0.5), "sum to 1"),
            (torch.full((60, 3), float("nan")), "sum to 1"),
            (Y[:, None], "(60, 1)"),
            (Y[:, None].repeat(1, 3), "(58, 3)"),
        ],
    )
    def test_categorical_targets(self, refused, targets, word):
        refused(DataError, word.replace("(60", "(58"), data=TensorDataset(X, targets))

    @pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
    def test_bernoulli_targets(self, refused, value):
        targets = torch.ones(60, 3)
        targets[20, 0] = value
        refused(DataError, "[0, 1]", data=TensorDataset(X, targets), likelihood="bernoulli")

    @pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
    def test_target_shape(self, refused, likelihood):
        refused(
            DataError, "[batch, 1]", data=TensorDataset(X, torch.ones(60)), likelihood=likelihood
        )

    def test_string_targets(self, refused):
        samples = [(x, "cat" if y else "dog") for x, y in zip(X, Y, strict=True)]
        refused(DataError, "Map the labels to numbers", data=samples)


class TestBatches:
    def test_bare_tensor(self, refused):
        refused(DataError, "unpack", data=list(X))
        refused(DataError, "unpack", data=TensorDataset(X))

    def test_dict_without_targets(self, refused):
        refused(
            DataError,
            "['inputs', 'truth']",
            data=[{"inputs": x, "truth": y} for x, y in zip(X, Y, strict=True)],
        )

    def test_unpack_that_raises(self, refused):
        refused(
            DataError,
            "KeyError from unpack: 'pixels'",
            unpack=lambda batch: {"batch": batch}["pixels"],
        )

    def test_unpack_that_returns_too_little(self, refused):
        refused(
            DataError, "unpack(batch) to return (inputs, targets)", unpack=lambda batch: batch[:1]
        )

    def test_lengths_that_differ(self, refused):
        refused(
            DataError, "as many targets as inputs", unpack=lambda batch: (batch[0], batch[1][:-1])
        )


class Forward(nn.Module):
    """A linear layer, and then whatever a test puts behind it."""

    def __init__(self, after):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.after = after

    def forward(self, x):
        return self.after(self.layer(x))


def diverging(value):
    model = seeded(small_net)
    with torch.no_grad():
        model[2].weight[1, 3] = value
    return model


class TestModel:
    @pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.AlphaDropout()])
    def test_training_mode(self, refused, layer):
        refused(ModelError, "eval()", model=nn.Sequential(layer, nn.Linear(4, 3)).train())

    def test_training_mode_of_one_layer(self, refused):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)))
        model[1].train()
        refused(ModelError, "(1)", model=model)

    def test_training_mode_without_these_works(self, net, untouched):
        expected = forget(net, TensorDataset(X, Y), [0, 5], **PLAIN)
        with untouched(net.train()):
            found = forget(net, TensorDataset(X, Y), [0, 5], **PLAIN)
        assert not found.model.training
        for name, value in expected.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_broken_weights(self, refused, value):
        refused(ModelError, "2.weight", "NaN or infinite", model=diverging(value))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, refused, dtype):
        refused(ModelError, "model.float()", str(dtype), model=seeded(small_net).to(dtype))

    def test_nothing_trainable(self, refused):
        refused(ModelError, "trainable", model=seeded(small_net).requires_grad_(False))
        refused(ModelError, "trainable", model=nn.Flatten().eval())

    def test_no_module(self, refused):
        refused(ModelError, "torch.nn.Module", model=lambda x: x)

    def test_some_frozen_works(self, net, untouched):
        net[0].requires_grad_(False)
        with untouched(net):
            result = forget(net, TensorDataset(X, Y), [0, 5], **(PLAIN | {"noise": 0.01}))
        after = result.model.state_dict()
        for name, value in net.state_dict().items():
            assert torch.equal(after[name], value) == name.startswith("0.")
        assert {n: p.requires_grad for n, p in result.model.named_parameters()} == {
            n: p.requires_grad for n, p in net.named_parameters()
        }

    def test_forward_that_raises(self, refused):
        refused(
            ModelError,
            "RuntimeError",
            ", 4] float32",
            "unpack",
            model=seeded(lambda: nn.Linear(5, 3)),
        )

    @pytest.mark.parametrize(
        ("after", "word"),
        [
            (lambda f: (f, f), "tuple"),
            (lambda f: None, "NoneType"),
            (lambda f: SimpleNamespace(scores=f), "SimpleNamespace"),
            (lambda f: SimpleNamespace(logits=None), "NoneType"),
        ],
    )
    def test_what_forward_returns(self, refused, after, word):
        refused(ModelError, word, "logits", model=seeded(lambda: Forward(after)))

    def test_one_number_a_sample(self, refused):
        refused(
            DataError, "[batch, ..., classes]", model=seeded(lambda: Forward(lambda f: f[:, 0]))
        )

    @pytest.mark.parametrize("after", [lambda f: f.mean(), lambda f: f.detach()])
    def test_outputs_that_cannot_be_used(self, refused, after):
        refused(ModelError, model=seeded(lambda: Forward(after)))

    @pytest.mark.parametrize(
        "after",
        [
            lambda f: f - f.mean(0),
            lambda f: f.flip(0),
            lambda f: f + 0.1 * torch.randn_like(f),
            lambda f: f + 0.1 * random.random(),
            lambda f: f * (1 + np.random.rand()),  # noqa: NPY002 - as user code does
        ],
    )
    def test_outputs_that_depend_on_more_than_the_sample(self, refused, after):
        refused(
            ModelError,
            "one output a sample, the same at every call",
            model=seeded(lambda: Forward(after)),
        )

    def test_subset_that_matches_nothing(self, refused):
        refused(ModelError, "head.*", "2.weight", subset="head.*")


class TestOptions:
    @pytest.mark.parametrize(
        ("error", "options"),
        [
            (CurvatureError, {"structure": "kfac"}),
            (CurvatureError, {"kind": "hessian"}),
            (ConfigError, {"likelihood": "poisson"}),
            (ConfigError, {"likelihood": ["categorical"]}),
            (ConfigError, {"draws": 0}),
            (ConfigError, {"draws": 1.5}),
            (ConfigError, {"steps": 0}),
            (ConfigError, {"steps": 1.0}),
            (ConfigError, {"steps": True}),
            (ConfigError, {"steps": "many"}),
            (ConfigError, {"damping": -1}),
            (ConfigError, {"damping": float("nan")}),
            (ConfigError, {"damping": "some"}),
            (ConfigError, {"damping": 0.0, "steps": "auto"}),
            (ConfigError, {"noise": -1}),
            (ConfigError, {"noise": float("inf")}),
            (ConfigError, {"noise": "some"}),
            (ConfigError, {"noise": True}),
            (ConfigError, {"noise": {"loss": 0.1}}),
            (ConfigError, {"noise": NoiseTarget}),
            (ConfigError, {"weight_decay": -1}),
            (ConfigError, {"weight_decay": "5e-4"}),
            (ConfigError, {"budget": -0.1}),
            (ConfigError, {"exponent": float("nan")}),
            (ConfigError, {"solver": "lbfgs"}),
            (ConfigError, {"drift": "yes"}),
            (ConfigError, {"seed": -1}),
            (ConfigError, {"seed": 0.5}),
            (ConfigError, {"device": "abacus"}),
        ],
        ids=str,
    )
    def test_refused(self, refused, error, options):
        refused(error, next(iter(options)), **options)


class Augmented(Dataset):
    def __init__(self, to=lambda x: x):
        self.to = to

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return self.to(X[index] + 0.1 * torch.randn(4)), Y[index]


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(59, -1, -1))

    def __len__(self):
        return 60


class TestWarnings:
    """Legal, and probably a surprise: the run goes on."""

    @pytest.mark.parametrize(
        ("build", "word"),
        [
            (lambda: DataLoader(TensorDataset(X, Y), batch_size=7, drop_last=True), "drop_last"),
            (Augmented, "at random"),
            (lambda: Augmented(lambda x: x.numpy()), "at random"),
            (lambda: DataLoader(TensorDataset(X, Y), sampler=Backwards()), "Backwards"),
            (
                lambda: DataLoader(
                    TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 60, 60)
                ),
                "Weighted",
            ),
            (
                lambda: DataLoader(
                    TensorDataset(X, Y), batch_sampler=BatchSampler(Backwards(), 7, False)
                ),
                "Backwards",
            ),
        ],
    )
    def test_warned(self, net, untouched, build, word):
        data = build()
        with untouched(net), pytest.warns(FisherForgetWarning, match=word):
            result = forget(net, data, [0, 5], **PLAIN)
        assert len(result.split.retain) == 58

    def test_drop_last_that_drops_nothing(self, net):
        forget(net, DataLoader(TensorDataset(X, Y), batch_size=6, drop_last=True), [0, 5], **PLAIN)


class Interrupted(Dataset):
    """Draws from every global generator, and gives up after `reads` reads."""

    def __init__(self, reads):
        self.left = reads

    def __len__(self):
        return 60

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        return X[index], Y[index]


class TestInterrupt:
    def test_propagates_from_anywhere(self, net, untouched):
        counter = Interrupted(10**9)
        forget(net, counter, [0, 5], **PLAIN)
        total = 10**9 - counter.left
        assert total > 300
        for reads in (0, 3, 20, *range(50, total, total // 7), total - 1):
            with untouched(net), pytest.raises(KeyboardInterrupt):
                forget(net, Interrupted(reads), [0, 5], **PLAIN)

    def test_random_data_set_leaves_the_states_alone(self, net, untouched):
        with untouched(net):
            forget(net, Interrupted(10**9), [0, 5], **(PLAIN | {"noise": "auto"}))


CONFIG = """
name: bad
data: {name: digits, max_train: 60, max_test: 30}
model: {name: linear}
training: {epochs: 1}
forget_sets: [{name: some, kind: random, count: 3}]
retrained: 2
"""


class TestCommandLine:
    """Exit code 2, one message on stderr that says what to do, no traceback."""

    @pytest.fixture
    def fails(self, tmp_path, capsys):
        def check(content, *words, flags=()):
            path = tmp_path / "bad.yaml"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            assert (
                main(
                    [
                        "run",
                        str(path),
                        "--out",
                        str(tmp_path / "runs"),
                        "--progress",
                        "false",
                        *flags,
                    ]
                )
                == 2
            )
            captured = capsys.readouterr()
            assert captured.err.startswith("fisher-forget: Got ")
            assert "Traceback" not in captured.err + captured.out
            assert captured.out == ""
            for word in words:
                assert word in captured.err, captured.err
            assert not list((tmp_path / "runs").rglob("*.safetensors"))  # nothing was trained

        return check

    def test_folder_below_a_file(self, fails, tmp_path):
        (tmp_path / "file").write_text("")
        fails(CONFIG, str(tmp_path / "file"), flags=["--out", str(tmp_path / "file" / "runs")])

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (b"\xff\xfe\x00", "readable YAML"),
            ("name: [", "valid YAML"),
            ("", "NoneType"),
            ("- a\n- b", "list"),
            ("just text", "str"),
        ],
    )
    def test_unreadable(self, fails, content, word):
        fails(content, word)

    def test_missing(self, capsys, tmp_path):
        assert main(["run", str(tmp_path / "absent.yaml")]) == 2
        assert "absent.yaml" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            ("retrained: 2", "retraind: 2", ("'retraind'", "'retrained'")),
            ("epochs: 1", "epoch: 1", ("'epoch'", "'training'", "'epochs'")),
            ("count: 3", "cuont: 3", ("'cuont'", "forget_sets[0]", "'count'")),
            ("epochs: 1", "epochs: many", ("training", "many")),
            ("retrained: 2", "retrained: [2]", ("retrained",)),
            ("kind: random", "kind: all", ("kind",)),
            ("retrained: 2", "retrained: 1", ("at least 2",)),
            ("epochs: 1", "epochs: -1", ("epochs",)),
            ("retrained: 2", "forget: {noise: -1}", ("noise", "-1")),
            ("retrained: 2", "forget: {solver: lbfgs}", ("solver", "lbfgs")),
            ("retrained: 2", "likelihood: poisson", ("likelihood", "poisson")),
            ("name: digits", "name: digit", ("digit", "digits")),
            ("name: linear", "name: linaer", ("linaer",)),
            ("count: 3", "count: 60", ("count 60",)),
            ("name: bad", "name: ../bad", ("folder name",)),
        ],
    )
    def test_wrong_values(self, fails, before, after, words):
        assert before in CONFIG
        fails(CONFIG.replace(before, after), *words)

    def test_debug_shows_the_traceback(self, tmp_path):
        with pytest.raises(FisherForgetError, match=r"absent\.yaml: .*No such file"):
            main(["run", str(tmp_path / "absent.yaml"), "--debug"])
