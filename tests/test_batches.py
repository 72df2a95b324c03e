"""What a batch is: inputs and targets of any layout, and which tensors have a row for every
sample."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate
from transformers import BatchEncoding

from fisher_forget.data.batches import (
    TARGET_KEYS,
    Batch,
    default_unpack,
    layout_of,
    make_batch,
    unpacked,
)
from fisher_forget.errors import DataError

N = 23
X, Y = torch.arange(2.0 * N).view(N, 2), torch.arange(N)  # a sample's target is its index
Pair = namedtuple("Pair", "image label")
Turned = namedtuple("Turned", "label image")
Triple = namedtuple("Triple", "x1 x2 y")


@dataclass
class Sample:
    ids: Any
    mask: Any
    labels: Any


class TestUnpack:
    @pytest.mark.parametrize("kind", [tuple, list])
    def test_sequences(self, kind):
        assert default_unpack(kind(["inputs", "targets"])) == ("inputs", "targets")
        assert default_unpack(kind(["inputs", "targets", "weights", 3])) == ("inputs", "targets")

    @pytest.mark.parametrize("key", TARGET_KEYS)
    @pytest.mark.parametrize("kind", [dict, UserDict])
    def test_dicts(self, key, kind):
        assert default_unpack(kind({key: "targets", "pixels": "inputs"})) == ("inputs", "targets")
        inputs, targets = default_unpack(kind({"ids": 1, key: "targets", "mask": 2}))
        assert (inputs, targets) == ({"ids": 1, "mask": 2}, "targets")

    def test_the_first_key_wins(self):
        assert default_unpack({"y": 1, "labels": 2, "x": 3}) == ({"y": 1, "x": 3}, 2)

    @pytest.mark.parametrize("batch", [torch.zeros(3), (X,), [], {"x": X}, {}, "text", None])
    def test_refused(self, batch):
        with pytest.raises(DataError, match="unpack"):
            default_unpack(batch)


class TestMakeBatch:
    def test_layouts(self):
        batch = make_batch((X, Y))
        assert (len(batch), len(batch.args), batch.kwargs) == (N, 1, {})
        batch = make_batch(((X, X + 1), Y))
        assert len(batch.args) == 2
        batch = make_batch({"ids": X, "mask": X, "labels": Y})
        assert (batch.args, sorted(batch.kwargs)) == ((), ["ids", "mask"])
        assert make_batch(X, lambda x: (x, x[:, 0])).targets.tolist() == X[:, 0].tolist()

    def test_targets(self):
        assert make_batch((X, Y.tolist())).targets.dtype == torch.int64
        assert make_batch((X, Y.numpy())).targets.tolist() == list(range(N))
        assert make_batch((X[:1], 3)).targets.tolist() == [3]
        for dtype in (torch.int32, torch.uint8, torch.bool, torch.int16):
            assert make_batch((X, Y.to(dtype))).targets.dtype == torch.int64
        for dtype in (torch.float32, torch.float64):
            assert make_batch((X, Y.to(dtype))).targets.dtype == dtype

    @pytest.mark.parametrize(
        ("raw", "unpack", "word"),
        [
            ((X, Y[:-1]), None, "as many targets as inputs"),
            (("text", Y), None, "as many targets as inputs"),
            ((X, ["a"] * N), None, "not numbers"),
            ((X, None), None, "not numbers"),
            ((X, Y), lambda raw: raw[2], "IndexError"),
            ((X, Y), lambda raw: 3, "TypeError"),
        ],
    )
    def test_refused(self, raw, unpack, word):
        with pytest.raises(DataError, match=word) as caught:
            make_batch(raw, unpack)
        assert caught.value.fix


class TestBatch:
    @pytest.fixture
    def batch(self):
        """Two inputs, one of them nested, a constant that does not lead with the batch, and a
        flag."""
        return Batch(
            (X, {"deep": [X + 1]}),
            {"table": torch.zeros(4, 2), "scale": torch.tensor(2.0), "flag": True},
            Y,
        )

    @pytest.mark.parametrize("size", [1, 4, N, 100])
    def test_chunks_put_together_are_the_batch(self, batch, size):
        pieces = list(batch.chunks(size))
        assert [len(piece) for piece in pieces] == [size] * (N // size) + [N % size] * (
            N % size > 0
        )
        assert torch.equal(torch.cat([p.targets for p in pieces]), Y)
        assert torch.equal(torch.cat([p.args[0] for p in pieces]), X)
        assert torch.equal(torch.cat([p.args[1]["deep"][0] for p in pieces]), X + 1)
        for piece in pieces:
            assert piece.kwargs["table"].shape == (4, 2)
            assert piece.kwargs["scale"] == 2
            assert piece.kwargs["flag"] is True

    def test_take(self, batch):
        taken = batch.take(slice(3, 9, 2))
        assert taken.targets.tolist() == [3, 5, 7]
        assert torch.equal(taken.args[0], X[3:9:2])
        assert taken.kwargs["table"].shape == (4, 2)

    def test_on_a_model_takes_its_type(self, batch):
        moved = batch.on(torch.nn.Linear(2, 2).double())
        assert moved.args[0].dtype == moved.args[1]["deep"][0].dtype == torch.float64
        assert moved.targets.dtype == torch.int64
        assert batch.args[0].dtype == torch.float32


class TestFurtherElements:
    @pytest.mark.parametrize("kind", [tuple, list])
    @pytest.mark.parametrize(
        "further",
        [
            [Y],
            [Y > 3],
            [Y.to(torch.uint8), torch.rand(N)],
            [torch.rand(N), Y],
            [Y.numpy()],
        ],
    )
    def test_what_may_be_targets_is_asked_for(self, kind, further):
        batch = kind([X, Y, *further])
        with pytest.raises(DataError, match=f"batch of {len(batch)} elements") as caught:
            default_unpack(batch)
        assert "unpack=lambda batch: (batch[0], batch[1])" in caught.value.fix
        assert f"batch[{len(batch) - 1}])." in caught.value.fix

    def test_floats_behind_floats(self):
        with pytest.raises(DataError, match=r"float32 \[23, 2\], float32 \[23, 2\]"):
            default_unpack((X, X, torch.rand(N)))

    @pytest.mark.parametrize("further", [["a"] * N, torch.rand(N), None, 3, {"id": "a"}])
    def test_what_is_no_target_is_left_out(self, further):
        assert default_unpack((X, Y, further)) == (X, Y)

    def test_the_unpack_that_is_shown_works(self):
        batch = (Y, Y > 3, Y % 3)
        with pytest.raises(DataError) as caught:
            default_unpack(batch)
        shown = caught.value.fix.split("unpack=")[-1].rstrip(".")
        made = make_batch(batch, eval(shown))
        assert len(made.args) == 2
        assert torch.equal(made.targets, Y % 3)


class TestLayouts:
    @pytest.mark.parametrize(
        "raw",
        [
            Pair(X, Y),
            Turned(Y, X),
            BatchEncoding({"x": X, "labels": Y}),
            UserDict(x=X, label=Y),
            {"x": X.numpy(), "y": Y.numpy()},
            [X.numpy()[::-1].copy()[::-1], Y.tolist()],
        ],
    )
    def test_one_input(self, raw):
        batch = make_batch(raw)
        assert torch.equal(batch.args[0], X)
        assert batch.kwargs == {}
        assert torch.equal(batch.targets, Y)

    @pytest.mark.parametrize(
        "raw",
        [
            Sample(X, X > 3, Y),
            BatchEncoding({"ids": X, "mask": X > 3, "labels": Y}),
            (UserDict(ids=X, mask=X > 3), Y),
            (BatchEncoding({"ids": X, "mask": X > 3}), Y),
        ],
    )
    def test_inputs_by_name(self, raw):
        batch = make_batch(raw)
        assert batch.args == ()
        assert torch.equal(batch.kwargs["ids"], X)
        assert torch.equal(batch.kwargs["mask"], X > 3)

    @pytest.mark.parametrize("inner", [dict, UserDict, BatchEncoding])
    def test_nested(self, inner):
        raw = {"text": inner({"ids": X, "mask": X.numpy() > 3}), "image": X + 1, "labels": Y}
        piece = make_batch(raw).take(slice(2, 5))
        assert torch.equal(piece.kwargs["text"]["ids"], X[2:5])
        assert torch.equal(piece.kwargs["text"]["mask"], X[2:5] > 3)
        assert torch.equal(piece.kwargs["image"], X[2:5] + 1)

    def test_a_named_tuple_without_a_target_key_goes_by_position(self):
        assert default_unpack(namedtuple("Row", "a b")(X, Y)) == (X, Y)
        assert default_unpack(Triple(X, Y, Y)) == ({"x1": X, "x2": Y}, Y)

    @pytest.mark.parametrize("size", [1, 2])
    def test_targets_without_a_dimension(self, size):
        if size == 1:
            assert make_batch((X[:1], torch.tensor(3)), size=1).targets.tolist() == [3]
        else:
            with pytest.raises(
                DataError, match=r"1 targets for inputs of length .2., of 2 samples"
            ):
                make_batch((X[:2], torch.tensor(3)), size=2)

    @pytest.mark.parametrize(
        ("raw", "word"),
        [
            ((X, {"a": Y}), "not numbers"),
            ((X, [{"boxes": X}] * N), "not numbers"),
            ((X, [Y, Y]), "with_format"),
            ((["a"] * N, Y), "without a tensor"),
            (default_collate([{"ids": [1, 2, 3], "labels": 0}] * 4), r"'ids' as a list of 3"),
            (default_collate([{"ids": X[0], "labels": [0, 1]}] * 4), "with_format"),
            ((X.T.repeat(2, 1), Y), r"23 targets for inputs of length \[4\]"),
            ({"x": X, "z": Y}, "targets under one of"),
            (Sample, "type"),
            ((X.T.repeat(6, 1)[:N], Y[:20]), "of which none counts the samples"),
            (([X[:3], X[:5]], Y), "pad what is merged"),
            ((pack_sequence([X[:3], X[:2]]), Y[:2]), "pack_padded_sequence in forward"),
            ({"x": pack_sequence([X[:3]]), "z": X[:1], "y": Y[:1]}, "pack_padded_sequence"),
        ],
    )
    def test_refused(self, raw, word):
        with pytest.raises(DataError, match=word):
            make_batch(raw)


class TestNumbers:
    """What a collate function makes of 23 samples."""

    @pytest.mark.parametrize("kept", [0, 1, 20])
    def test_dropped_samples(self, kept):
        with pytest.raises(DataError, match=rf"{kept} targets .* of 23 samples") as caught:
            make_batch((X[:kept], Y[:kept]), size=N)
        assert "collate" in caught.value.fix

    def test_several_views_of_a_sample(self):
        with pytest.raises(DataError, match=r"46 targets .* of 23 samples") as caught:
            make_batch((X.repeat(2, 1), Y.repeat(2)), size=N)
        assert "views" in caught.value.fix
        with pytest.raises(DataError, match=r"23 targets for inputs of length \[46\]"):
            make_batch((X.repeat(2, 1), Y), size=N)

    def test_an_input_that_has_other_rows_than_before(self):
        layout = layout_of([unpacked((X[:n], Y[:n]))[0] for n in (3, 5)], (3, 5))
        with pytest.raises(DataError, match="4 rows in a batch of 5"):
            make_batch((X[:4], Y[:5]), layout=layout, size=5)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=0, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_rows_that_follow_the_batch_are_samples(
    inputs: list[tuple[bool, int]], size: int, step: int
) -> None:
    """A shared tensor goes along whole, also where it has as many rows as the batch samples."""

    def raw(count: int) -> Any:
        named = {
            f"x{i}": torch.randn(count if by_sample else rows, rows)
            for i, (by_sample, rows) in enumerate(inputs)
        }
        return {"first": torch.randn(count, 2), **named}, torch.arange(count)

    layout = layout_of([unpacked(raw(n))[0] for n in (size, size + 1)], (size, size + 1))
    batch = make_batch(raw(size), layout=layout, size=size).map(lambda x: x + 0)
    assert batch.sample_shapes()[0] == (2,)
    for name, dim in batch.dims()[1].items():
        assert (dim == 0) is (name == "first" or inputs[int(name[1:])][0])
    for start, piece in zip(range(0, size, step), batch.chunks(step), strict=True):
        for name, x in batch.kwargs.items():
            expected = x if batch.dims()[1][name] is None else x[start : start + step]
            assert torch.equal(piece.kwargs[name], expected)
        single = next(piece.chunks(1))
        assert single.dims() == batch.dims()


def test_collated_strings_and_names_go_along() -> None:
    rows = [{"x": x, "name": f"scan {i}", "label": i} for i, x in enumerate(X)]
    batch = make_batch(default_collate(rows))
    assert batch.take(slice(1, 3)).targets.tolist() == [1, 2]
    assert np.shape(batch.kwargs["name"]) == (N,)
