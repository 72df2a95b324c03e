"""Who is retained and who is forgotten, and what a batch is."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from fisher_forget.data.batches import TARGET_KEYS, Batch, default_unpack, make_batch
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import DataError, SplitError

N = 23
X, Y = torch.arange(2.0 * N).view(N, 2), torch.arange(N)  # a sample's target is its index
BASE = TensorDataset(X, Y)


class Plain(Dataset):
    """The same samples, but not a TensorDataset."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], Y[index]


def seen(split, part):
    return [target for batch in split.batches(part) for target in batch.targets.tolist()]


class TestResolve:
    @pytest.mark.parametrize("seed", range(20))
    def test_partition(self, seed):
        """D_r and D_f are disjoint, sorted, and together what the loader holds and what is
        forgotten."""
        rng = np.random.default_rng(seed)
        outer = rng.permutation(N)[: rng.integers(8, N + 1)]
        inner = rng.permutation(len(outer))[: rng.integers(4, len(outer) + 1)]
        held = outer[inner]
        forget = rng.permutation(N)[: rng.integers(1, 4)]
        loader = DataLoader(
            Subset(Subset(BASE, outer.tolist()), inner.tolist()),
            batch_size=5,
            shuffle=bool(seed % 2),
        )
        split = resolve_split(loader, forget)
        assert split.base is BASE
        assert split.retain.dtype == split.forget.dtype == np.int64
        assert split.forget.tolist() == sorted(forget.tolist())
        assert split.retain.tolist() == sorted(set(held.tolist()) - set(forget.tolist()))
        assert split.indices("all").tolist() == sorted({*held.tolist(), *forget.tolist()})
        assert split.batch_size == 5

    @pytest.mark.parametrize("seed", range(10))
    def test_a_sampler_counts_in_the_loaders_own_data_set(self, seed):
        rng = np.random.default_rng(seed)
        members = rng.permutation(N)[:12]
        positions = rng.permutation(12)[:7]
        loader = DataLoader(
            Subset(BASE, members.tolist()), batch_size=3, sampler=SubsetRandomSampler(positions)
        )
        yielded = sorted(int(i) for _, y in loader for i in y)
        forget = yielded[:2]
        assert resolve_split(loader, forget).retain.tolist() == yielded[2:]

    def test_repeated_members_count_once(self):
        assert resolve_split(Subset(BASE, [4, 4, 2, 9, 2]), [9]).retain.tolist() == [2, 4]

    def test_a_bare_data_set(self):
        split = resolve_split(BASE, [0])
        assert (split.batch_size, split.collate, split.workers) == (256, default_collate, 0)

    def test_what_is_taken_from_the_loader(self):
        collate = lambda samples: default_collate(samples)  # noqa: E731
        split = resolve_split(
            DataLoader(BASE, batch_size=4, collate_fn=collate, num_workers=2), [0]
        )
        assert (split.batch_size, split.collate, split.workers) == (4, collate, 2)

    def test_control_run(self):
        split = resolve_split(BASE, [], allow_empty=True)
        assert len(split.forget) == 0
        assert seen(split, "retain") == list(range(N))
        assert seen(Split(split.base, split.retain, split.forget), "all") == list(range(N))
        assert list(split.batches("forget")) == []
        with pytest.raises(SplitError, match="empty"):
            resolve_split(BASE, [])

    def test_plain_samplers_are_silent(self):
        for loader in (
            DataLoader(BASE, shuffle=True),
            DataLoader(BASE, sampler=RandomSampler(BASE)),
        ):
            assert len(resolve_split(loader, [0]).retain) == N - 1

    def test_the_loader_is_not_consumed(self):
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        split = resolve_split(
            DataLoader(BASE, batch_size=4, shuffle=True, generator=generator), [0]
        )
        state = torch.get_rng_state()
        seen(split, "all"), seen(Split(Plain(), split.retain, split.forget), "all")
        assert torch.equal(generator.get_state(), before)
        assert torch.equal(torch.get_rng_state(), state)

    def test_repr(self):
        assert repr(resolve_split(BASE, [1, 2])) == f"Split({N - 2} retained, 2 forgotten)"


class TestBatchesOfASplit:
    @pytest.fixture(
        params=[BASE, Plain(), ConcatDataset([Subset(BASE, range(9)), Subset(BASE, range(9, N))])]
    )
    def split(self, request):
        return resolve_split(DataLoader(request.param, batch_size=4), [3, 11, 20])

    def test_parts_in_index_order(self, split):
        assert seen(split, "forget") == [3, 11, 20]
        assert seen(split, "retain") == [i for i in range(N) if i not in (3, 11, 20)]
        assert seen(split, "all") == list(range(N))

    def test_given_indices_in_the_given_order(self, split):
        assert seen(split, np.array([5, 1, 22, 3])) == [5, 1, 22, 3]
        assert seen(split, np.zeros(0, dtype=np.int64)) == []

    def test_sizes(self, split):
        for part in ("retain", "forget", "all"):
            sizes = [len(batch) for batch in split.batches(part)]
            assert all(size == 4 for size in sizes[:-1])
            assert len(sizes) == split.steps(part)
            assert sum(sizes) == len(split.indices(part))
        assert split.steps(np.arange(8)) == 2

    def test_both_paths_yield_the_same_tensors(self, split):
        fast = Split(BASE, split.retain, split.forget, 4)
        for a, b in zip(split.batches("retain"), fast.batches("retain"), strict=True):
            assert torch.equal(a.args[0], b.args[0])
            assert torch.equal(a.targets, b.targets)
            assert a.args[0].dtype == b.args[0].dtype
            assert a.targets.dtype == b.targets.dtype

    def test_twice_the_same(self, split):
        assert seen(split, "retain") == seen(split, "retain")

    def test_subset(self, split):
        fewer = split.subset(np.array([0, 1]))
        assert seen(fewer, "retain") == [0, 1]
        assert seen(fewer, "forget") == [3, 11, 20]


class Arrays(Dataset):
    """Large NumPy samples with one entry that a test changes."""

    def __init__(self, value):
        self.value = value

    def __len__(self):
        return N

    def __getitem__(self, index):
        image = np.zeros(5000)
        image[2500] = self.value
        return image, index


class TestFingerprint:
    def test_says_the_same_twice(self):
        assert (
            resolve_split(BASE, [1, 2]).fingerprint()
            == resolve_split(DataLoader(BASE, batch_size=3), [2, 1]).fingerprint()
        )
        assert (
            resolve_split(BASE, [1, 2]).fingerprint()
            == resolve_split(Plain(), [1, 2]).fingerprint()
        )

    @pytest.mark.parametrize(
        "other",
        [
            resolve_split(BASE, [1, 3]),
            resolve_split(BASE, [1]),
            resolve_split(BASE, [1, 2, 3]),
            resolve_split(Subset(BASE, range(N - 1)), [1, 2]),
            resolve_split(TensorDataset(X + 1e-6, Y), [1, 2]),
            resolve_split(TensorDataset(X, Y.flip(0)), [1, 2]),
            resolve_split(TensorDataset(X.double(), Y), [1, 2]),
        ],
    )
    def test_changes_with_the_split_and_the_data(self, other):
        assert other.fingerprint() != resolve_split(BASE, [1, 2]).fingerprint()

    def test_swapped_roles(self):
        a, b = np.array([0, 1]), np.array([2, 3])
        assert Split(BASE, a, b).fingerprint() != Split(BASE, b, a).fingerprint()

    def test_equal_samples_are_told_apart(self):
        alike = TensorDataset(torch.ones(6, 2), torch.ones(6))
        kept = np.array([0, 1])
        assert (
            Split(alike, kept, np.array([2])).fingerprint()
            != Split(alike, kept, np.array([3])).fingerprint()
        )

    def test_any_single_sample_of_a_small_data_set(self):
        small = TensorDataset(X[:16], Y[:16])
        before = resolve_split(small, [0]).fingerprint()
        for row in range(16):
            changed = X[:16].clone()
            changed[row, 1] += 1
            assert resolve_split(TensorDataset(changed, Y[:16]), [0]).fingerprint() != before

    def test_the_middle_of_large_arrays(self):
        assert (
            resolve_split(Arrays(1.0), [0]).fingerprint()
            != resolve_split(Arrays(2.0), [0]).fingerprint()
        )
        assert (
            resolve_split(Arrays(1.0), [0]).fingerprint()
            == resolve_split(Arrays(1.0), [0]).fingerprint()
        )


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
