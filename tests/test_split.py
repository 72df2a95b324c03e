"""Who is retained and who is forgotten."""

from __future__ import annotations

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

from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import SplitError

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

    def test_a_bare_data_set(self):
        split = resolve_split(BASE, [0])
        assert split.batch_size == 256
        assert split.reader.settings == {"collate_fn": default_collate, "num_workers": 0}

    def test_what_is_taken_from_the_loader(self):
        kept = {"collate_fn": lambda x: default_collate(x), "num_workers": 2}
        kept |= {"worker_init_fn": print, "prefetch_factor": 3, "timeout": 7}
        kept |= {"multiprocessing_context": torch.multiprocessing.get_context("spawn")}
        split = resolve_split(DataLoader(BASE, batch_size=4, **kept), [0])
        assert split.batch_size == 4
        assert split.reader.settings.items() >= kept.items()

    def test_a_split_is_read_as_it_was(self):
        given = resolve_split(DataLoader(Subset(BASE, range(9)), batch_size=3), [1])
        split = resolve_split(given, [2, 15])
        assert split.retain.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
        assert (split.batch_size, split.reader) == (3, given.reader)

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
