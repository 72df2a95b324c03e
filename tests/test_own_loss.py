"""The likelihood that is used has the user's own loss: of `loss_fn`, or of the model itself."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import (
    METHODS,
    Bernoulli,
    Categorical,
    Gaussian,
    Reference,
    RetrainedEnsemble,
    estimate_curvature,
    evaluate,
    forget,
    prepare,
    sweep,
)
from fisher_forget.data.own_loss import LossFn
from fisher_forget.data.settle import settled_likelihood, trained_likelihood
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ConfigError, DataError, FisherForgetWarning, ModelError
from fisher_forget.evaluate.ensemble import Members
from fisher_forget.likelihood import LIKELIHOODS, Likelihood, resolve_likelihood

N = 40


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


class Shaped(nn.Module):
    """A linear model whose outputs have a given shape."""

    def __init__(self, *shape: int, scale: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        torch.manual_seed(0)
        self.layer = nn.Linear(4, math.prod(shape))
        with torch.no_grad():
            self.layer.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(len(x), *self.shape)


def settle(
    targets: Tensor,
    shape: tuple[int, ...],
    likelihood: Likelihood | str,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> Likelihood:
    data = TensorDataset(randn(len(targets), 4), targets)
    split = resolve_split(DataLoader(data, batch_size=16), [0], **options)
    return settled_likelihood(Shaped(*shape, scale=3.0).eval(), split, likelihood, loss_fn)


WEIGHT = torch.tensor([0.2, 1.0, 3.0])
LABELS = (randn(N, 5) > 0).float()
MASK = classes(N, 6, count=3).masked_fill(randn(N, 6) > 1, -100)

# what people trained with, targets, shape of the outputs, what was given: the likelihood of it
LOSSES: dict[str, tuple[LossFn, Tensor, tuple[int, ...], str, Likelihood]] = {
    "the same": (nn.CrossEntropyLoss(), classes(N, count=3), (3,), "categorical", Categorical()),
    "function": (F.cross_entropy, classes(N, count=3), (3,), "categorical", Categorical()),
    "by sample": (
        nn.CrossEntropyLoss(reduction="none"),
        classes(N, count=3),
        (3,),
        "categorical",
        Categorical(),
    ),
    "by position": (
        lambda f, y: F.cross_entropy(f.movedim(-1, 1), y, reduction="none"),
        MASK,
        (6, 3),
        "categorical",
        Categorical(),
    ),
    "flattened positions": (nn.CrossEntropyLoss(), MASK, (6, 3), "categorical", Categorical()),
    "weight": (
        nn.CrossEntropyLoss(WEIGHT),
        classes(N, count=3),
        (3,),
        "categorical",
        Categorical(weight=WEIGHT),
    ),
    "weight that few samples tell": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 5.0])),
        classes(N, count=2),
        (3,),
        "categorical",
        Categorical(weight=(1, 1, 5)),
    ),
    "smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        classes(N, count=3),
        (3,),
        "categorical",
        Categorical(label_smoothing=0.1),
    ),
    "smoothing within a function": (
        lambda f, y: F.cross_entropy(f, y, label_smoothing=0.05),
        classes(N, count=3),
        (3,),
        "categorical",
        Categorical(label_smoothing=0.05),
    ),
    "ignored index": (
        nn.CrossEntropyLoss(ignore_index=2),
        classes(N, count=3),
        (3,),
        "categorical",
        Categorical(ignore_index=2),
    ),
    "images": (
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
        classes(N, 2, 4, count=3),
        (3, 2, 4),
        "categorical",
        Categorical(weight=WEIGHT, label_smoothing=0.2, class_dim=1),
    ),
    "as many positions as classes": (
        lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()),
        classes(N, 3, count=3),
        (3, 3),
        "categorical",
        Categorical(class_dim=-1),
    ),
    "shifted": (
        lambda f, y: F.cross_entropy(f[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
        MASK,
        (6, 3),
        "categorical",
        LIKELIHOODS["next_token"],
    ),
    "not shifted": (
        lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()),
        MASK,
        (6, 3),
        "next_token",
        Categorical(),
    ),
    "log-probabilities": (
        lambda f, y: F.nll_loss(f.log_softmax(-1), y, WEIGHT),
        classes(N, count=3),
        (3,),
        "categorical",
        Categorical(weight=WEIGHT),
    ),
    "mse": (nn.MSELoss(), randn(N, 5), (5,), "gaussian", LIKELIHOODS["mse"]),
    "mse by the default": (nn.MSELoss(), randn(N, 5), (5,), "categorical", LIKELIHOODS["mse"]),
    "mse of one output": (nn.MSELoss(), randn(N), (1,), "mse", LIKELIHOODS["mse"]),
    "mse squeezed": (
        lambda f, y: F.mse_loss(f.squeeze(-1), y),
        randn(N),
        (1,),
        "mse",
        LIKELIHOODS["mse"],
    ),
    "half the squares": (
        lambda f, y: (f - y).square().sum(1).mean() / 2,
        randn(N, 5),
        (5,),
        "mse",
        Gaussian(),
    ),
    "bce": (nn.BCEWithLogitsLoss(), LABELS, (5,), "bernoulli", LIKELIHOODS["bce"]),
    "bce of whole numbers": (
        nn.BCEWithLogitsLoss(),
        LABELS.long(),
        (5,),
        "bce",
        LIKELIHOODS["bce"],
    ),
    "bce by the default": (
        nn.BCEWithLogitsLoss(),
        LABELS[:, 0].long(),
        (1,),
        "categorical",
        LIKELIHOODS["bce"],
    ),
    "multilabel": (nn.MultiLabelSoftMarginLoss(), LABELS, (5,), "categorical", LIKELIHOODS["bce"]),
    "pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 6)),
        LABELS,
        (5,),
        "bce",
        Bernoulli("mean", torch.arange(1.0, 6)),
    ),
}
UNREAD = ("log-probabilities",)  # weights that only the loss's own attributes could tell


class TestLossFn:
    @pytest.mark.parametrize("name", [name for name in LOSSES if name not in UNREAD])
    def test_a_name_gives_way(self, name: str) -> None:
        loss_fn, targets, shape, likelihood, expected = LOSSES[name]
        found = settle(targets, shape, likelihood, loss_fn)
        assert found == expected

    @pytest.mark.parametrize("name", LOSSES)
    def test_the_right_instance_is_kept(self, name: str) -> None:
        loss_fn, targets, shape, _, expected = LOSSES[name]
        assert settle(targets, shape, expected, loss_fn) is expected

    @pytest.mark.parametrize(
        ("name", "instance"),
        [
            ("mse", Gaussian()),
            ("bce", Bernoulli()),
            ("smoothing", Categorical(label_smoothing=0.2)),
            ("shifted", Categorical()),
            ("images", Categorical(class_dim=1)),
        ],
    )
    def test_a_wrong_instance_is_refused(self, name: str, instance: Likelihood) -> None:
        loss_fn, targets, shape, _, expected = LOSSES[name]
        with pytest.raises(ConfigError) as caught:
            settle(targets, shape, instance, loss_fn)
        assert repr(instance) in caught.value.got or name in ("mse", "bce", "shifted")
        passed = caught.value.fix.removeprefix("Pass likelihood=").removesuffix(".")
        space = {"Categorical": Categorical, "Gaussian": Gaussian, "Bernoulli": Bernoulli}
        assert resolve_likelihood(eval(passed, space)) == expected

    @example(count=2, smoothing=0.0156, weighted=False, seed=1)
    @given(
        count=st.integers(2, 6),
        smoothing=st.floats(0.01, 0.9).map(lambda e: float(f"{e:.3g}")),
        weighted=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=25, deadline=None)
    def test_any_cross_entropy(
        self, count: int, smoothing: float, weighted: bool, seed: int
    ) -> None:
        weight = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1
        loss_fn = nn.CrossEntropyLoss(weight if weighted else None, label_smoothing=smoothing)
        targets = classes(N, count=count, seed=seed)
        found = settle(targets, (count,), "categorical", loss_fn)
        assert found == Categorical(weight=loss_fn.weight, label_smoothing=smoothing)
        if not weighted:  # from its values alone
            found = settle(targets, (count,), "categorical", lambda f, y: loss_fn(f, y))
            assert isinstance(found, Categorical)
            # two digits are right where smoothing hardly matters to the loss
            assert found.label_smoothing == pytest.approx(smoothing, rel=0.02, abs=1e-4)

    @given(st.floats(0.01, 100), st.integers(2, 5), st.booleans())
    @settings(max_examples=25, deadline=None)
    def test_any_squared_error(self, factor: float, outputs: int, mean: bool) -> None:
        def loss_fn(f: Tensor, y: Tensor) -> Tensor:
            squares = (f - y).square()
            return factor * (squares.mean() if mean else squares.sum(1).mean())

        targets = randn(N, outputs, seed=3)
        found = settle(targets, (outputs,), "mse", loss_fn)
        f = randn(N, outputs, seed=4)
        assert float(found.mean_loss(f, targets)) == pytest.approx(
            float(loss_fn(f, targets)), rel=1e-3
        )


TABLE = Path(__file__).parents[1] / "docs/how-to/your-model.md"
VALUES = {"w": WEIGHT, "e": 0.1, "i": 2, "a": torch.arange(1.0, 6)}
CLASSES, POSITIONS, MEANS = classes(N, count=3), classes(N, 2, 4, count=3), randn(N, 5)


def summed(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1).mean()


# what the left column says: the loss, targets and the shape of the outputs
ROWS: dict[str, tuple[LossFn, Tensor, tuple[int, ...]]] = {
    "`CrossEntropyLoss()` over": (nn.CrossEntropyLoss(), CLASSES, (3,)),
    "`CrossEntropyLoss(weight": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1, ignore_index=2),
        CLASSES,
        (3,),
    ),
    "`CrossEntropyLoss()` on": (nn.CrossEntropyLoss(), POSITIONS, (3, 2, 4)),
    "next-token": (LOSSES["shifted"][0], MASK, (6, 3)),
    "`MSELoss()`": (nn.MSELoss(), MEANS, (5,)),
    "half the squared": (LOSSES["half the squares"][0], MEANS, (5,)),
    "`BCEWithLogitsLoss()`": (nn.BCEWithLogitsLoss(), LABELS, (5,)),
    "`BCEWithLogitsLoss(pos": (nn.BCEWithLogitsLoss(pos_weight=VALUES["a"]), LABELS, (5,)),
    "binary cross-entropy": (summed, LABELS, (5,)),
}


def test_the_table_of_the_docs_is_right() -> None:
    """Row by row, against torch's own functions."""
    lines = [line for line in TABLE.read_text().splitlines() if "| " in line]
    rows = [line.strip("| ").split(" | ") for line in lines if "`likelihood=" in line]
    assert len(rows) == len(ROWS)
    for trained, passed in rows:
        loss_fn, targets, shape = next(ROWS[key] for key in ROWS if trained.startswith(key))
        code = re.search("`likelihood=(.*)`", passed)
        assert code is not None
        space = VALUES | {"Categorical": Categorical, "Bernoulli": Bernoulli}
        likelihood = resolve_likelihood(eval(code[1], space))
        outputs = randn(N, *shape, seed=5)
        likelihood.check(outputs, targets)
        torch.testing.assert_close(
            likelihood.mean_loss(outputs, targets), loss_fn(outputs, targets), rtol=1e-5, atol=1e-6
        )
        assert settle(targets, shape, "categorical", loss_fn) == likelihood


REFUSED: dict[str, tuple[LossFn, str]] = {
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum'"),
    "factor": (lambda f, y: F.cross_entropy(f, y) / math.log(2), "1.443 times"),
    "penalty": (lambda f, y: F.cross_entropy(f, y) + 0.02, "likelihood and 0.02, whatever"),
    "focal": (
        lambda f, y: (
            (1 - f.softmax(-1).gather(1, y[:, None])[:, 0]) ** 2
            * F.cross_entropy(f, y, reduction="none")
        ).mean(),
        r"focal loss \(gamma 2\)",
    ),
    "weighted focal": (
        lambda f, y: (
            0.25
            * (
                (1 - f.softmax(-1).gather(1, y[:, None])[:, 0]) ** 1.5
                * F.cross_entropy(f, y, reduction="none")
            ).mean()
        ),
        r"focal loss \(gamma 1.5\)",
    ),
    "weights": (lambda f, y: F.cross_entropy(f, y, WEIGHT), r"Categorical\(weight=\.\.\.\)"),
    "further terms": (
        lambda f, y: F.cross_entropy(f, y) + 0.1 * f.square().mean(),
        "further terms",
    ),
    "margin": (F.multi_margin_loss, "subclass of Likelihood"),
    "not finite": (lambda f, y: F.cross_entropy(f, y) * math.nan, "not finite"),
    "fails": (lambda f, y: F.cross_entropy(f, y[:, None]), "which may reshape"),
}


def test_a_function_that_works_in_place() -> None:
    def emptied(f: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(f, y, WEIGHT.clone())
        f.zero_()
        y.fill_(-100)
        return loss

    settled = settle(classes(N, count=3), (3,), Categorical(weight=WEIGHT), emptied)  # type: ignore[arg-type]
    assert settled == Categorical(weight=WEIGHT)  # type: ignore[arg-type]


class TestRefused:
    @pytest.mark.parametrize("name", REFUSED)
    def test_the_reason(self, name: str) -> None:
        loss_fn, reason = REFUSED[name]
        with pytest.raises(ConfigError, match=reason):
            settle(classes(N, count=3), (3,), "categorical", loss_fn)

    @pytest.mark.parametrize("name", ["mse", "categorical"])
    @pytest.mark.parametrize("loss_fn", [nn.L1Loss(), nn.HuberLoss(), nn.SmoothL1Loss()])
    def test_other_regressions(self, name: str, loss_fn: nn.Module) -> None:
        """Whatever the name: the loss is what is wrong, not that targets do not fit a default."""
        with pytest.raises(ConfigError, match="subclass of Likelihood"):
            settle(randn(N, 3), (3,), name, loss_fn)

    @pytest.mark.parametrize(
        ("loss_fn", "factor"),
        [(nn.MSELoss(reduction="sum"), 2), (lambda f, y: 3 * (f - y).square().sum(), 6)],
    )
    def test_sums_of_squares(self, loss_fn: LossFn, factor: int) -> None:
        with pytest.raises(ConfigError, match=f"It is {factor} times a sum over the batch"):
            settle(randn(N, 3), (3,), "categorical", loss_fn)

    @pytest.mark.parametrize("shape", [(), (1,), (4,)])
    def test_a_loss_of_probabilities(self, shape: tuple[int, ...]) -> None:
        targets = classes(N, *shape, count=2).float()
        loss_fn = lambda f, y: F.binary_cross_entropy(f.sigmoid(), y)  # noqa: E731
        assert settle(targets, shape, "categorical", loss_fn).name == "bernoulli"
        model = nn.Sequential(Shaped(*shape), nn.Sigmoid()).eval()
        split = resolve_split(TensorDataset(randn(N, 4), targets), [0])
        with pytest.raises(ConfigError, match="a sigmoid within the model"):
            settled_likelihood(model, split, "categorical", nn.BCELoss())

    def test_a_layout_that_torchs_loss_leaves_open(self) -> None:
        targets = classes(N, 3, count=3)
        with pytest.raises(DataError, match="class_dim=1, or class_dim=-1"):
            settle(targets, (3, 3), "categorical", nn.CrossEntropyLoss())
        for dim in (-1, 1):
            likelihood = Categorical(class_dim=dim)
            assert settle(targets, (3, 3), likelihood, nn.CrossEntropyLoss()) == likelihood

    def test_what_the_data_lack_comes_first(self) -> None:
        with pytest.raises(DataError, match="class indices from 0 to 2"):
            settle(classes(N, count=5), (3,), "categorical", lambda f, y: f.sum())

    def test_a_mean_of_means(self) -> None:
        def own(f: Tensor, y: Tensor) -> Tensor:
            losses = F.cross_entropy(f.movedim(-1, 1), y, reduction="none")
            return (losses.sum(1) / (y != -100).sum(1)).mean()

        targets = MASK.index_fill(1, torch.tensor([0]), 1)
        with pytest.raises(ConfigError, match="of their own means is not supported"):
            settle(targets, (6, 3), "categorical", own)

    def test_sorted_data(self) -> None:
        """Samples are looked at all over the data: a batch of one class tells no weights."""
        targets = classes(200, count=3).sort().values
        loss_fn = lambda f, y: F.cross_entropy(f, y, WEIGHT)  # noqa: E731
        with pytest.raises(ConfigError, match="weight"):
            settle(targets, (3,), "categorical", loss_fn)


class Tokens(nn.Module):
    """Predicts the token after one, or the token itself, and does not tell how it was trained."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(5 * torch.eye(11).roll(ahead, 1), freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class TestShift:
    def settled(self, ahead: int, likelihood: str, scale: float = 1.0) -> Likelihood:
        ids = (torch.arange(6) + classes(N, 1, count=11)) % 11
        model = Tokens(ahead)
        model.table.weight.data *= scale
        return settled_likelihood(model, resolve_split(TensorDataset(ids, ids), [0]), likelihood)

    def test_targets_that_the_outputs_are_a_step_ahead_of(self) -> None:
        with pytest.warns(FisherForgetWarning, match="pass likelihood='next_token'"):
            assert self.settled(1, "categorical") == Categorical()

    @pytest.mark.parametrize(
        ("ahead", "likelihood", "scale"),
        [(1, "next_token", 1.0), (0, "categorical", 1.0), (1, "categorical", 0.0)],
    )
    def test_no_false_alarm(self, ahead: int, likelihood: str, scale: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.settled(ahead, likelihood, scale)


class Softmax(Shaped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class TestProbabilities:
    def probabilities(self, loss_fn: LossFn | None = None, model: nn.Module | None = None) -> Any:
        data = TensorDataset(randn(N, 4), classes(N, count=3))
        split = resolve_split(data, [0])
        model = model or Softmax(3)
        return settled_likelihood(model.eval(), split, "categorical", loss_fn)

    def test_a_softmax_within_the_model_is_refused(self) -> None:
        with pytest.raises(ModelError, match="softmax within the model"):
            self.probabilities()
        with pytest.raises(ConfigError, match="softmax within the model"):
            self.probabilities(lambda f, y: F.nll_loss(f.log(), y))

    def test_unless_the_loss_takes_it_as_logits(self) -> None:
        assert self.probabilities(nn.CrossEntropyLoss()) == Categorical()

    @pytest.mark.parametrize("name", ["logits", "log-probabilities", "zeros"])
    def test_no_false_alarm(self, name: str) -> None:
        class LogSoftmax(Shaped):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).log_softmax(-1)

        model = (LogSoftmax if name == "log-probabilities" else Shaped)(3)
        if name == "zeros":
            model = Shaped(3, scale=0.0)
        assert self.probabilities(None, model) == Categorical()

    def test_a_sigmoid_is_warned_of(self) -> None:
        class Sigmoid(Shaped):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).sigmoid()

        split = resolve_split(TensorDataset(randn(N, 4), LABELS), [0])
        with pytest.warns(FisherForgetWarning, match="sigmoid"):
            settled_likelihood(Sigmoid(5).eval(), split, "bce")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            settled_likelihood(Shaped(5).eval(), split, "bce")


class TestForget:
    def data(self) -> TensorDataset:
        return TensorDataset(randn(N, 4), randn(N, 5, seed=1))

    def trained(self, keep: list[int], decay: float) -> nn.Linear:
        """The minimiser of nn.MSELoss() + decay/2 |w|^2."""
        x, y = (t.double()[keep] for t in self.data().tensors)
        k = 2 / (5 * len(keep))
        w = torch.linalg.solve(k * x.T @ x + decay * torch.eye(4), k * x.T @ y)
        model = nn.Linear(4, 5, bias=False).double().eval()
        model.weight.data = w.T.contiguous()
        return model

    @pytest.mark.parametrize(
        "arguments", [{"likelihood": "mse"}, {"loss_fn": nn.MSELoss()}, {"loss_fn": F.mse_loss}]
    )
    def test_mean_squared_error_is_retrained_exactly(self, arguments: dict[str, Any]) -> None:
        full, retrained = self.trained(list(range(N)), 0.1), self.trained(list(range(6, N)), 0.1)
        result = forget(
            full, self.data(), range(6), weight_decay=0.1, noise=None, progress=False, **arguments
        )
        before = float((full.weight - retrained.weight).norm())
        assert float((result.model.weight - retrained.weight).norm()) < 1e-4 * before
        assert result.likelihood == "mse"
        assert "  objective  mse, weight decay 0.1\n" in str(result)
        assert result.summary()["likelihood"] == "mse"

    def test_the_warning_names_it(self) -> None:
        """With a fit as tight as this, the other objective shows itself."""
        x, w = randn(N, 4).double(), randn(8, 4, seed=1).double()
        y = x @ w.T + 0.3 * randn(N, 8, seed=2)
        full = nn.Linear(4, 8, bias=False).double().eval()
        full.weight.data = torch.linalg.solve(
            x.T @ x / (4 * N) + 0.1 * torch.eye(4), x.T @ y / (4 * N)
        ).T.contiguous()
        with pytest.warns(FisherForgetWarning, match="likelihood='mse'"):
            forget(
                full,
                TensorDataset(x, y),
                range(6),
                likelihood="gaussian",
                weight_decay=0.1,
                noise=None,
                progress=False,
            )

    def test_prepare_and_its_folder(self, tmp_path: Any) -> None:
        full = self.trained(list(range(N)), 0.1)
        options = {"weight_decay": 0.1, "folder": tmp_path, "progress": False}
        first = prepare(full, self.data(), loss_fn=nn.MSELoss(), **options)
        assert first.options.likelihood == LIKELIHOODS["mse"]
        again = prepare(full, self.data(), likelihood="mse", **options)
        assert again.made.sums.total.loss == first.made.sums.total.loss
        assert again.forget([1, 2]).likelihood == "mse"


# ---- models of transformers, which know their own loss

transformers = pytest.importorskip("transformers", reason="not installed")

SMALL = {"vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
BERT: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}
T5: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
IDS = classes(N, 6, count=9) + 2
MASKED = IDS.masked_fill(randn(N, 6) > 0, -100)


def gpt2(**options: Any) -> nn.Module:
    config = transformers.GPT2Config(**SMALL, bos_token_id=0, eos_token_id=0, **options)
    return transformers.GPT2LMHeadModel(config)


def bert(task: str, **options: Any) -> nn.Module:
    return getattr(transformers, f"BertFor{task}")(transformers.BertConfig(**BERT, **options))


# build, labels, the likelihood that has its loss
MODELS: dict[str, tuple[Any, Tensor, Likelihood]] = {
    "causal": (gpt2, IDS, LIKELIHOODS["next_token"]),
    "causal, padded": (gpt2, MASKED, LIKELIHOODS["next_token"]),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**BERT, num_key_value_heads=2)
        ),
        IDS,
        LIKELIHOODS["next_token"],
    ),
    "classes": (
        lambda: bert("SequenceClassification", num_labels=3),
        classes(N, count=3),
        Categorical(),
    ),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        randn(N),
        LIKELIHOODS["mse"],
    ),
    "several labels": (
        lambda: bert(
            "SequenceClassification", num_labels=5, problem_type="multi_label_classification"
        ),
        LABELS,
        LIKELIHOODS["bce"],
    ),
    "token classes": (
        lambda: bert("TokenClassification", num_labels=4),
        classes(N, 6, count=4).masked_fill(randn(N, 6) > 1, -100),
        Categorical(),
    ),
    "as many token classes as tokens": (
        lambda: bert("TokenClassification", num_labels=6),
        classes(N, 6, count=6),
        Categorical(class_dim=-1),
    ),
    "masked tokens": (lambda: bert("MaskedLM"), MASKED, Categorical()),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        MASKED[:, :4],
        Categorical(),
    ),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        IDS[:, :4],
        Categorical(),
    ),
}


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[i], "labels": self.labels[i]}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:No step was taken")  # these models are not trained
class TestModelsOfTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_the_loss_is_the_models_own(self, name: str) -> None:
        build, labels, expected = MODELS[name]
        torch.manual_seed(0)
        model = build().eval()
        config = model.config.to_dict()
        result = forget(
            model,
            DataLoader(Texts(labels), batch_size=10),
            range(3),
            noise=None,
            drift=True,
            max_samples=20,
            progress=False,
        )
        assert resolve_likelihood(result.options.likelihood) == expected
        assert model.config.to_dict() == config
        for part, rows in (("retain", range(3, N)), ("forget", range(3))):
            batch = {"input_ids": IDS[rows], "labels": labels[rows]}
            for which, scrubbed in (("before", model), ("after", result.model)):
                with torch.no_grad():
                    own = float(scrubbed(**batch).loss)
                assert result.losses[f"{part}_{which}"] == pytest.approx(own, rel=1e-4)

    def test_an_instance_that_contradicts_is_refused(self) -> None:
        model = gpt2().eval()
        with pytest.raises(ConfigError, match="Pass likelihood='next_token'"):
            forget(model, Texts(IDS), [0], likelihood=Categorical(), progress=False)

    def test_labels_that_were_shifted_by_hand(self) -> None:
        """`loss_fn` has the last word, and what it settles is taken at its word from then on."""
        model, labels = gpt2().eval(), IDS.roll(-1, 1)
        loss_fn = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
        options = {"noise": None, "drift": True, "max_samples": 20, "progress": False}
        result = forget(model, Texts(labels), [0, 1], loss_fn=loss_fn, **options)
        assert result.options.likelihood == Categorical()
        parts = {name: Texts(labels[:12]) for name in ("forget", "retain", "test")}
        pair = [result.model, model]
        reference = Reference(model, pair, parts, result.options.likelihood)
        assert reference.likelihood == Categorical()
        assert Reference(model, pair, parts).likelihood == LIKELIHOODS["next_token"]

    def test_entries_without_loss_fn(self) -> None:
        model, data = gpt2().eval(), Texts(IDS[:12])
        split = resolve_split(data, [0])
        trace = estimate_curvature(model, data, structure="diagonal").trace()
        named = estimate_curvature(model, data, "next_token", structure="diagonal").trace()
        plain = estimate_curvature(model, data, Categorical(), structure="diagonal").trace()
        assert trace == named != plain
        assert trained_likelihood(model, split, "categorical") == LIKELIHOODS["next_token"]
        assert trained_likelihood(model, split, Categorical()) == Categorical()
        method = METHODS["neggrad+"]
        found, same, other = (
            method(epochs=1, lr=0.1, likelihood=likelihood).unlearn(model, split).model
            for likelihood in ("categorical", "next_token", Categorical())
        )
        for a, b, c in zip(found.parameters(), same.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)

    def test_evaluation_and_sweeps(self) -> None:
        torch.manual_seed(0)
        model, members = gpt2().eval(), tuple(gpt2().eval() for _ in range(4))
        data = Texts(IDS)
        options = {"drift": True, "max_samples": 20, "noise": None, "progress": False}
        result = forget(model, data, range(3), **options)
        ensemble = RetrainedEnsemble(
            Members((model,), (0,), (0.0,)),
            Members(members, (1, 2, 3, 4), (0.0,) * 4),
            np.arange(3),
        )
        parts = {"forget": Subset(data, range(3)), "retain": Subset(data, range(3, N))}
        split = resolve_split(data, range(3))
        settled = {"likelihood": result.options.likelihood}
        for said in ({}, {"likelihood": "categorical"}, settled):
            table = evaluate(
                result,
                ensemble,
                parts,
                split=split,
                metrics=["loss", "score", "entropy", "efficacy"],
                **said,
            )
            for part, rows in (("forget", range(3)), ("retain", range(3, N))):
                with torch.no_grad():
                    out = result.model(input_ids=IDS[rows], labels=IDS[rows])
                right = (out.logits[:, :-1].argmax(-1) == IDS[rows][:, 1:]).double().mean()
                assert table.get("loss", part, "scrubbed").value == pytest.approx(float(out.loss))
                assert table.get("score", part, "scrubbed").value == pytest.approx(
                    100 * float(right)
                )
                logp = out.logits[:, :-1].log_softmax(-1).double()
                assert table.get("entropy", part, "scrubbed").value == pytest.approx(
                    -float((logp.exp() * logp).sum(-1).mean()), rel=1e-5
                )
        parts["test"] = parts["retain"]
        reference = Reference(model, members, parts)
        swept = sweep(model, data, range(3), {"damping": [1.0]}, reference=reference, **options)
        alone = forget(model, data, range(3), damping=1.0, **options)
        scores = reference.closeness(alone.model).to_dict()["parts"]
        found = swept.to_pandas().iloc[-1]["kl_retain"]
        assert found == pytest.approx(scores["retain"]["kl_scrubbed"], rel=1e-4)

    def test_further_terms_of_the_models_loss(self) -> None:
        class Penalised(Shaped):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
                out = super().forward(x)
                loss = None if labels is None else F.cross_entropy(out, labels) + out.abs().mean()
                return transformers.modeling_outputs.SequenceClassifierOutput(loss, out)

        data = TensorDataset(randn(N, 4), classes(N, count=3))
        with pytest.raises(ConfigError, match="further terms"):
            forget(Penalised(3).eval(), data, [0], progress=False)
        found = forget(
            Penalised(3).eval(),
            data,
            [0],
            loss_fn=nn.CrossEntropyLoss(),
            drift=True,
            progress=False,
        )
        assert found.likelihood == "categorical"

    @pytest.mark.parametrize("named", [False, True])
    def test_wrappers_that_pass_keywords_on(self, named: bool) -> None:
        class Wrapped(nn.Module):
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base = base

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self.base(*args, **kwargs)

        data = TensorDataset(randn(N, 4), randn(N, 3))

        class Regression(Shaped):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
                out = super().forward(x)
                loss = None if labels is None else F.mse_loss(out, labels)
                return transformers.modeling_outputs.SequenceClassifierOutput(loss, out)

        with warnings.catch_warnings():
            warnings.simplefilter("error", FisherForgetWarning)
            split = resolve_split(data, [0])
            if named:  # the model within knows its loss
                found = settled_likelihood(Wrapped(Regression(3)).eval(), split, "categorical")
                assert found == LIKELIHOODS["mse"]
            else:
                found = settled_likelihood(Wrapped(Shaped(3)).eval(), split, "gaussian")
                assert found == LIKELIHOODS["gaussian"]

    def test_a_loss_that_cannot_be_asked_for(self) -> None:
        class Broken(Shaped):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
                if labels is not None:
                    raise RuntimeError("not like this")
                return super().forward(x)

        data = TensorDataset(randn(N, 4), classes(N, count=3))
        with pytest.warns(FisherForgetWarning, match="not like this"):
            forget(Broken(3).eval(), data, [0], drift=True, progress=False)


class TestLossesBesideTheLikelihood:
    """The reason is told, also where the default likelihood takes no such targets."""

    X = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    MODEL = nn.Linear(4, 3)

    @pytest.mark.parametrize(
        ("loss_fn", "reason"),
        [
            (nn.MSELoss(reduction="sum"), "a sum over the batch"),
            (nn.L1Loss(), "Only the losses of"),
            (nn.MSELoss, r"Pass loss_fn=MSELoss\(\)"),
        ],
    )
    def test_of_numbers(self, loss_fn: Any, reason: str) -> None:
        data = TensorDataset(self.X, self.X @ torch.ones(4, 3) + 2)
        with pytest.raises(ConfigError, match=reason):
            forget(self.MODEL, data, [0], loss_fn=loss_fn, progress=False)

    def test_of_a_sigmoid_within_the_model(self) -> None:
        model = nn.Sequential(self.MODEL, nn.Sigmoid())
        data = TensorDataset(self.X, (self.X[:, :3] > 0).float())
        for loss_fn in (nn.BCELoss(), lambda f, y: nn.functional.binary_cross_entropy(f, y)):
            with pytest.raises(ConfigError, match="a sigmoid within the model"):
                forget(model, data, [0], loss_fn=loss_fn, progress=False)
