"""Outputs of all samples, also where every batch is padded to a length of its own, and parts of
which no target counts."""

from __future__ import annotations

import pytest
import torch
from conftest import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import METHODS, Categorical, Reference, estimate_curvature, forget, prepare
from fisher_forget.data.split import check_scored, resolve_split
from fisher_forget.errors import DataError
from fisher_forget.evaluate.predictions import predict
from fisher_forget.evaluate.relearn import relearn_time
from fisher_forget.likelihood import Gaussian

N, LONGEST = 24, 5
PLAIN = {"drift": True, "noise": None, "progress": False}


class Tagger(nn.Module):
    """Classes for every position, each from its own token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


def sentences() -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of 2 to 5 positions."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + i % 4 for i in range(N)]
    return [
        (
            torch.randint(1, 7, (length,), generator=generator),
            torch.randint(0, 8, (length,), generator=generator),
        )
        for length in lengths
    ]


def padded(rows, length=None, ignored=-100):
    """All to one length, or to the longest of the batch."""
    pad = nn.utils.rnn.pad_sequence
    if length is not None:  # a sentence more, which is taken away again
        rows = [*rows, (torch.zeros(length, dtype=torch.int64),) * 2]
    x, y = (pad([row[i] for row in rows], True, value) for i, value in enumerate((0, ignored)))
    return (x, y) if length is None else (x[:-1], y[:-1])


@pytest.fixture(params=[1, 3, 7])
def loaders(request):
    """Padded by batch, and all to one length."""
    data, size = sentences(), request.param
    return (
        DataLoader(data, batch_size=size, collate_fn=padded),
        DataLoader(data, batch_size=size, collate_fn=lambda rows: padded(rows, LONGEST)),
    )


class TestPaddedByBatch:
    def test_is_padded_to_the_longest(self, loaders):
        model = seeded(Tagger)
        outputs, targets = predict(model, resolve_split(loaders[0], [0]))
        expected, labels = predict(model, resolve_split(loaders[1], [0]))
        assert torch.equal(targets, labels)
        scored = targets != -100
        assert torch.equal(outputs[scored], expected[scored])

    def test_closeness(self, loaders):
        models = [seeded(Tagger, seed) for seed in range(4)]
        of = [
            Reference(models[0], models[1:3], {"test": loader}).closeness(models[3])
            for loader in loaders
        ]
        found, expected = (vars(closeness.parts["test"]) for closeness in of)
        for name, value in expected.items():
            if name != "gap":  # too few retrained models for one
                assert found[name] == pytest.approx(value, rel=1e-6)

    def test_forget(self, loaders):
        options = PLAIN | {"structure": "dense", "kind": "exact"}
        found, expected = (forget(seeded(Tagger), x, [0, 5], **options) for x in loaders)
        for name, value in expected.model.state_dict().items():
            torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)

    def test_numbers_of_other_lengths_are_refused(self):
        data = [(torch.rand(n, 2), torch.rand(n, 2)) for n in (2, 3)]
        split = resolve_split(DataLoader(data, batch_size=1), [0])
        with pytest.raises(DataError, match="one length"):
            predict(seeded(lambda: nn.Linear(2, 2)), split)


def ignored(rows, shape=()):
    """Data of which some samples have no scored target."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, *shape, 4, generator=generator)
    y = torch.randint(0, 3, (20, *shape), generator=generator)
    y[list(rows)] = -100
    return TensorDataset(x, y)


CALLS = {
    "forget": lambda model, data: forget(model, data, [0, 1, 2], **PLAIN),
    "prepare": lambda model, data: prepare(model, data, progress=False).forget([0, 1, 2]),
    "finetune": lambda model, data: METHODS["finetune"]().unlearn(model, _split(data)),
    "influence": lambda model, data: METHODS["influence"]().unlearn(model, _split(data)),
    "relearn_time": lambda model, data: relearn_time(model, _split(data), 1.0),
    "reference": lambda model, data: Reference(
        model,
        [model, model],
        {"forget": Subset(data, range(3)), "retain": Subset(data, range(3, 20))},
    ),
}


def _split(data):
    return resolve_split(data, [0, 1, 2])


class TestWithoutScoredTargets:
    @pytest.mark.parametrize("shape", [(), (5,)])
    @pytest.mark.parametrize("call", CALLS)
    def test_a_forget_set(self, call, shape):
        with pytest.raises(DataError, match=r"3 .*without a scored target"):
            CALLS[call](seeded(lambda: nn.Linear(4, 3)), ignored(range(3), shape))

    @pytest.mark.parametrize("shape", [(), (5,)])
    @pytest.mark.parametrize(
        "call", [name for name in CALLS if name not in ("prepare", "relearn_time")]
    )
    def test_a_retained_set(self, call, shape):
        with pytest.raises(DataError, match=r"17 .*without a scored target"):
            CALLS[call](seeded(lambda: nn.Linear(4, 3)), ignored(range(3, 20), shape))

    def test_nothing_left_after_a_request(self):
        prepared = prepare(seeded(lambda: nn.Linear(4, 3)), ignored(range(3, 20)), progress=False)
        with pytest.raises(DataError, match="17 retained samples without"):
            prepared.forget([0, 1, 2])

    def test_a_curvature(self):
        model, data = seeded(lambda: nn.Linear(4, 3)), ignored(range(3))
        with pytest.raises(DataError, match="3 samples without a scored target"):
            estimate_curvature(model, _split(data), part="forget")
        assert estimate_curvature(model, _split(data)).trace() > 0

    def test_one_scored_target_is_enough(self):
        split = _split(ignored([0, 1]))
        check_scored(split, Categorical())
        check_scored(_split(ignored(range(20))), Gaussian())
        check_scored(resolve_split(ignored(range(3)), [], allow_empty=True), Categorical())

    def test_class_weights_of_fewer_classes_than_labels(self):
        check_scored(_split(ignored([0])), Categorical(weight=(1.0, 2.0)))
