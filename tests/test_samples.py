"""Samples in memory, with inputs by name: what is read is what a loader over the user's data set
yields."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget.data.batches import make_batch
from fisher_forget.data.samples import KeywordDataset, read_samples, samples, take
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import DataError

IDS = torch.arange(300 * 5).reshape(300, 5)
MASK = (IDS % 3 > 0).long()
LABELS = torch.arange(300) % 4


class Dicts(Dataset[dict[str, Tensor]]):
    """As `transformers` code has it: one dict a sample."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "attention_mask": MASK[index], "labels": LABELS[index]}


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IDS[index].float(), int(LABELS[index])


BY_NAME = {
    "data set of dicts": Dicts(),
    "list of dicts": [Dicts()[i] for i in range(300)],
    "one dict": {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS},
    "arrays": {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy(), "labels": LABELS.numpy()},
    "tuple": ({"input_ids": IDS.tolist(), "attention_mask": MASK}, LABELS.int()),
    "what a tokenizer returns": (UserDict(input_ids=IDS, attention_mask=MASK), LABELS),
    "itself": KeywordDataset({"input_ids": IDS, "attention_mask": MASK}, LABELS),
}
BY_PLACE = {
    "data set of pairs": Pairs(),
    "tensors": TensorDataset(IDS.float(), LABELS),
    "tuple": (IDS.float(), LABELS),
    "arrays": (IDS.float().numpy(), LABELS.numpy().astype(np.uint8)),
}


class TestRead:
    @pytest.mark.parametrize("source", BY_NAME.values(), ids=BY_NAME)
    def test_inputs_by_name(self, source):
        data = read_samples(source)
        assert isinstance(data, KeywordDataset)
        assert data.names == ("input_ids", "attention_mask")
        inputs, targets = data[:]
        assert torch.equal(inputs["input_ids"], IDS)
        assert torch.equal(inputs["attention_mask"], MASK)
        assert torch.equal(targets, LABELS)
        assert targets.dtype == torch.int64

    @pytest.mark.parametrize("source", BY_PLACE.values(), ids=BY_PLACE)
    def test_one_input(self, source):
        data = read_samples(source)
        assert type(data) is TensorDataset
        assert torch.equal(data[:][0], IDS.float())
        assert torch.equal(data[:][1], LABELS)
        assert data.tensors[-1].dtype == torch.int64

    def test_regression_keeps_its_numbers(self):
        targets = torch.linspace(0, 1, 8)[:, None]
        assert torch.equal(read_samples((torch.randn(8, 2), targets)).tensors[-1], targets)

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        read_samples(Dicts())
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            (3, "int"),
            ([], "list"),
            ((["a sentence", "another"], [0, 1]), "token ids"),
            (([[1, 2], [3]], [0, 1]), "pad them"),
            ((IDS, LABELS[:-1]), "299"),
            (({"a": IDS, "b": MASK[:7]}, LABELS), "'b': 7"),
            ((IDS[:0], LABELS[:0]), "at least one"),
            ([(IDS[0], 1), (IDS[0, :2], 0)], "one shape"),
            ([{"input_ids": IDS[0]}], "labels"),
            (TensorDataset(IDS), "pairs (inputs, targets)"),
            (TensorDataset(IDS, MASK.long(), LABELS), "batch of 3 elements"),
            (list(zip(IDS, MASK.long(), LABELS, strict=True)), "batch of 3 elements"),
        ],
        ids=[
            "number",
            "empty",
            "words",
            "ragged",
            "short",
            "unequal",
            "none",
            "shapes",
            "no targets",
            "inputs alone",
            "three tensors",
            "three of a sample",
        ],
    )
    def test_refused(self, source, words):
        with pytest.raises(DataError) as caught:
            read_samples(source)
        assert words in str(caught.value)


class TestKeywordDataset:
    def test_a_loader_yields_what_the_rows_are(self):
        """The quick way that `Split` and training take, against PyTorch's own loader over plain
        samples."""
        data = samples({"input_ids": IDS, "attention_mask": MASK}, LABELS)
        split = resolve_split(data, [0, 7])
        loader = DataLoader([data[i] for i in range(300) if i not in (0, 7)], batch_size=256)
        for quick, raw in zip(split.batches("retain"), loader, strict=True):
            plain = make_batch(raw)
            assert quick.args == plain.args == ()
            assert torch.equal(quick.targets, plain.targets)
            assert quick.kwargs.keys() == plain.kwargs.keys()
            assert all(torch.equal(x, plain.kwargs[name]) for name, x in quick.kwargs.items())

    @pytest.mark.parametrize(
        "rows",
        [np.array([5, 2, 2]), torch.arange(300) > 290, slice(3, 9)],
        ids=["rows", "mask", "slice"],
    )
    def test_take(self, rows):
        for data in (samples({"input_ids": IDS}, LABELS), samples(IDS, LABELS)):
            part = take(data, rows)
            assert type(part) is type(data)
            assert torch.equal(part.tensors[0], IDS[rows])
            assert torch.equal(part.tensors[-1], LABELS[rows])
