"""Which samples a loader yields, and which ones `forget_idx` names."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import seeded
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from fisher_forget import estimate_curvature
from fisher_forget.data.indices import forget_indices, members_of
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import FisherForgetWarning, SplitError

N = 23
X, Y = torch.arange(2.0 * N).view(N, 2), torch.arange(N)
BASE = TensorDataset(X, Y)


class Doubled(Subset):
    """Gives a sample in a way of its own."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 2 * x, y

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class AtOnce(Subset):
    def __getitems__(self, indices):
        return [(x * 3, y) for x, y in super().__getitems__(indices)]


class Named(Subset):
    """A subset with nothing of its own but a name."""

    name = "mine"


class TestSubsets:
    @pytest.mark.parametrize("kind", [Doubled, AtOnce])
    def test_one_with_samples_of_its_own_is_a_data_set(self, kind):
        part = kind(BASE, [5, 9, 2, 7])
        split = resolve_split(DataLoader(part, batch_size=2), [1])
        assert split.base is part
        assert split.retain.tolist() == [0, 2, 3]
        truth = torch.cat([x for x, _ in DataLoader(part, batch_size=2)])
        found = torch.cat([batch.args[0] for batch in split.batches("all")])
        assert torch.equal(found, truth)

    @pytest.mark.parametrize("kind", [Subset, Named])
    def test_plain_ones_are_seen_through(self, kind):
        base, members = members_of(DataLoader(kind(kind(BASE, [5, 9, 2, 7]), [3, 0])))
        assert base is BASE
        assert members.tolist() == [5, 7]

    def test_a_plain_one_of_one_with_its_own(self):
        own = Doubled(BASE, [5, 9, 2, 7])
        base, members = members_of(Subset(own, [3, 1]))
        assert base is own
        assert members.tolist() == [1, 3]

    def test_a_random_split(self):
        parts = random_split(BASE, [15, 8], torch.Generator().manual_seed(0))
        assert [members_of(part)[0] for part in parts] == [BASE, BASE]
        together = np.concatenate([members_of(part)[1] for part in parts])
        assert sorted(together) == list(range(N))

    def test_a_concatenation_is_a_data_set(self):
        joined = ConcatDataset([Subset(BASE, [1, 2]), Doubled(BASE, [3])])
        assert members_of(joined)[0] is joined

    @pytest.mark.parametrize(
        ("part", "members"),
        [
            (Subset(BASE, [-1, 0]), [0, N - 1]),
            (Subset(BASE, range(-3, 0)), [N - 3, N - 2, N - 1]),
            (Subset(BASE, torch.tensor([-N, 4])), [0, 4]),
            (Subset(Subset(BASE, [5, -2, 7]), [-2, -1]), [7, N - 2]),
            (Subset(ConcatDataset([BASE, BASE]), [-1, -N]), [N, 2 * N - 1]),
            (DataLoader(Subset(BASE, [-4, 5, -2]), sampler=[-1, 0]), [N - 4, N - 2]),
            (DataLoader(BASE, batch_sampler=[[-1, 0], [3]]), [0, 3, N - 1]),
            (Subset(BASE, []), []),
        ],
    )
    def test_indices_from_the_end(self, part, members):
        assert members_of(part)[1].tolist() == members

    @pytest.mark.filterwarnings("ignore::fisher_forget.errors.FisherForgetWarning")
    @given(st.lists(st.integers(-N, N - 1), min_size=5), st.data())
    def test_who_is_forgotten_is_not_retained(self, outer, data):
        inner = data.draw(st.lists(st.integers(-len(outer), len(outer) - 1), min_size=3))
        part = Subset(Subset(BASE, outer), inner)
        forgotten = int(part[0][1])
        labels = {int(y) for _, y in DataLoader(part, batch_size=None)} - {forgotten}
        assume(labels)
        for source in (part, DataLoader(part)):
            assert set(resolve_split(source, [forgotten]).retain.tolist()) == labels

    @pytest.mark.parametrize(
        ("indices", "words"),
        [
            ([N], f"the index {N} in Subset.indices"),
            ([0, -N - 1], f"the index -{N + 1} in Subset.indices"),
            ([True, False], "dtype bool"),
            (torch.ones(N, dtype=torch.bool), "dtype bool"),
            ([1, True], "mixes numbers and truth values"),
            ([1.0, 2.0], "dtype float64"),
            (["1"], "dtype <U1"),
            ([[1], [2]], "shape (2, 1)"),
            ([[1], [2, 3]], "Subset.indices of type list"),
            ([2**70], "dtype object"),
        ],
    )
    def test_what_is_no_index_is_refused(self, indices, words):
        for part in (Subset(BASE, indices), Subset(Subset(BASE, range(N)), indices)):
            with pytest.raises(SplitError, match=re.escape(words)):
                resolve_split(DataLoader(part), [0])

    def test_a_sampler_beyond_the_data_is_refused(self):
        with pytest.raises(SplitError, match="the index 3 in the sampler's list"):
            members_of(DataLoader(Subset(BASE, [1, 2, 3]), sampler=[3]))

    @pytest.mark.parametrize("kind", [Doubled, AtOnce])
    def test_the_curvature_is_of_what_the_loader_yields(self, kind):
        model = seeded(lambda: torch.nn.Linear(2, N)).double()
        part = kind(BASE, range(N))
        x, y = next(iter(DataLoader(part, batch_size=N)))
        options = {"structure": "dense", "kind": "exact"}
        expected = estimate_curvature(model, TensorDataset(x, y), **options).trace()
        found = estimate_curvature(model, DataLoader(part, batch_size=4), **options).trace()
        assert found == pytest.approx(expected, rel=1e-6)


class Every(Sampler):
    """A sampler of a user's, whose order no one can tell without asking."""

    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        raise AssertionError("asked for its order, which may draw random numbers")

    def __len__(self):
        return len(self.indices)


class Buckets(BatchSampler):
    def __iter__(self):
        raise AssertionError


class TestSamplers:
    @pytest.mark.parametrize(
        ("sampler", "members"),
        [
            ([4, 1, 7], [1, 4, 7]),
            (range(3, 9), list(range(3, 9))),
            (np.array([2, 0]), [0, 2]),
            (torch.tensor([2, 0]), [0, 2]),
            (SubsetRandomSampler([4, 1]), [1, 4]),
            (SequentialSampler(range(5)), list(range(5))),
            (RandomSampler(range(5)), list(range(5))),
            (RandomSampler(BASE), list(range(N))),
        ],
    )
    def test_known_without_asking(self, sampler, members):
        assert members_of(DataLoader(BASE, batch_size=2, sampler=sampler))[1].tolist() == members

    def test_listed_batches(self):
        batches = [[4, 1], [7], [0, 2, 3]]
        assert members_of(DataLoader(BASE, batch_sampler=batches))[1].tolist() == [0, 1, 2, 3, 4, 7]
        inner = BatchSampler(SubsetRandomSampler([4, 1, 9]), 2, False)
        split = resolve_split(DataLoader(BASE, batch_sampler=inner), [4])
        assert split.retain.tolist() == [1, 9]
        assert split.batch_size == 2

    @pytest.mark.parametrize(
        ("sampler", "words"),
        [
            (WeightedRandomSampler([1.0] * N, 40), "WeightedRandomSampler (40 indices a pass)"),
            (RandomSampler(BASE, replacement=True), "RandomSampler (23 indices"),
            (RandomSampler(BASE, num_samples=9), "RandomSampler (9 indices"),
            (RandomSampler(BASE, num_samples=50), "RandomSampler (50 indices"),
            (DistributedSampler(BASE, 3, 0), "DistributedSampler (8 indices"),
            (Every(range(5)), "Every (5 indices"),
        ],
    )
    def test_not_used(self, sampler, words):
        with pytest.warns(FisherForgetWarning, match=re.escape(words)) as told:
            members = members_of(DataLoader(BASE, batch_size=4, sampler=sampler))[1]
        assert members.tolist() == list(range(N))
        assert "each of the 23 samples" in str(told[0].message)

    def test_batch_samplers_of_a_users_own(self):
        loader = DataLoader(BASE, batch_sampler=Buckets(SequentialSampler(BASE), 4, False))
        with pytest.warns(FisherForgetWarning, match=re.escape("Buckets (6 batches a pass)")):
            split = resolve_split(loader, [0])
        assert split.batch_size == 4

    @pytest.mark.parametrize(
        "source",
        [
            Subset(BASE, [4, 4, 2, 9, 2]),
            DataLoader(BASE, sampler=[4, 4, 2, 9, 2]),
            DataLoader(BASE, sampler=SubsetRandomSampler([4, 4, 2, 9, 2])),
            DataLoader(BASE, batch_sampler=[[4, 4, 2], [9, 2]]),
        ],
    )
    def test_repeats(self, source):
        with pytest.warns(FisherForgetWarning, match="5 indices of 3 distinct samples"):
            assert members_of(source)[1].tolist() == [2, 4, 9]

    def test_samples_that_are_dropped(self):
        with pytest.warns(FisherForgetWarning, match="drop_last=True: another 3 samples"):
            members_of(DataLoader(BASE, batch_size=5, drop_last=True))

    def test_loaders_that_change_batches(self):
        class Scaled(DataLoader):
            def __iter__(self):
                return ((x / 255, y) for x, y in super().__iter__())

        with pytest.warns(FisherForgetWarning, match="Scaled with an __iter__ of its own"):
            members_of(Scaled(BASE))


class Shell:
    """A loader of another library around torch's."""

    def __init__(self):
        self.dataset = BASE

    def __len__(self):
        return 3


class Module:
    """Loaders of a training library."""

    def train_dataloader(self):
        return DataLoader(BASE)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(BASE)

    def __len__(self):
        return N


class Bare(Dataset):
    def __getitem__(self, index):
        return X[index]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"train": BASE, "test": BASE}, r"data\['train'\]"),
        ((X, Y), "TensorDataset"),
        ([DataLoader(BASE), DataLoader(BASE)], "one of them"),
        ((BASE, BASE), "one of them"),
        (pd.DataFrame({"x": [1.0], "label": [0]}), "TensorDataset"),
        (Module(), r"train_dataloader\(\)"),
        (Endless(), "without an index"),
        (Shell(), "DataLoader within it"),
        (Bare(), "length"),
        (iter([]), "length"),
        (DataLoader(BASE, batch_size=None), "batch_size=None"),
    ],
)
def test_no_data_set(data, word):
    with pytest.raises(SplitError, match=word):
        members_of(data)


class Device:
    """An array of another library."""

    def __init__(self, values):
        self.values = np.array(values)

    def __array__(self, dtype=None, copy=None):
        return self.values


MASK = np.isin(np.arange(N), [3, 8])


class TestForgetIndices:
    @pytest.mark.parametrize(
        "given",
        [
            [8, 3],
            {3, 8},
            (i for i in (8, 3)),
            np.array([3, 8], dtype=np.uint8),
            [np.int32(3), np.int64(8)],
            [torch.tensor(3), torch.tensor(8)],
            torch.tensor([8, 3], dtype=torch.int16),
            pd.Series([3, 8], index=[7, 9]),
            pd.Index([3, 8]),
            pd.array([3, 8], dtype="Int64"),
            {3: "a", 8: "b"}.keys(),
            Device([3, 8]),
            MASK,
            MASK.tolist(),
            torch.from_numpy(MASK),
            pd.Series(MASK, index=range(100, 100 + N)),
            pd.array(MASK, dtype="boolean"),
            Device(MASK),
            [np.bool_(flag) for flag in MASK],
        ],
    )
    def test_understood(self, given):
        assert forget_indices(given, N).tolist() == [3, 8]

    @given(st.lists(st.booleans(), min_size=2, max_size=50))
    def test_a_mask_is_its_indices(self, mask):
        if not 0 < sum(mask) < len(mask):
            with pytest.raises(SplitError):
                forget_indices(mask, len(mask))
        else:
            found = forget_indices(torch.tensor(mask), len(mask))
            assert found.tolist() == [i for i, flag in enumerate(mask) if flag]

    @pytest.mark.parametrize(
        ("given", "word"),
        [
            (3, "flat list"),
            (np.int64(3), "flat list"),
            (torch.tensor(3), "flat list"),
            (np.array(3), "flat list"),
            (torch.zeros(2, 2, dtype=torch.int64), r"\(2, 2\)"),
            (pd.Series([3.0, 8.0]), "float64"),
            ([None, 3], "object"),
            ([3, [4, 5]], "flat list"),
            (MASK[:-2], "length 21"),
            (np.zeros(N, dtype=bool), "empty"),
            (np.ones(N, dtype=bool), "every sample"),
            ([True, 3], "mixes"),
            ([np.True_, 3], "mixes"),
            ({"a": 1}, "dtype <U1"),
            (MASK.astype(int), "booleans"),
            (torch.from_numpy(MASK).to(torch.uint8), "booleans"),
            (Subset(BASE, [3, 8]), "subset.indices"),
            (b"ab", "index 98"),
        ],
    )
    def test_refused(self, given, word):
        with pytest.raises(SplitError, match=word) as caught:
            forget_indices(given, N)
        assert caught.value.fix

    @given(st.integers(2, 40), st.data())
    def test_a_copy_without_the_forgotten_is_recognised(self, full, data):
        """Where the numbers show it: a mask always does, indices where one is beyond the copy."""
        few = st.sets(st.integers(0, full - 1), min_size=1, max_size=full - 1)
        forgotten = sorted(data.draw(few))
        total = full - len(forgotten)
        mask = np.isin(np.arange(full), forgotten)
        words = f"{total} samples and the {len(forgotten)} of forget_idx make {full}"
        with pytest.raises(SplitError, match=words):
            forget_indices(mask, total)
        if forgotten[-1] >= total:
            with pytest.raises(SplitError, match=words):
                forget_indices(forgotten, total)

    @pytest.mark.parametrize("given", [[3, 900], np.arange(60) < 3])
    def test_other_data(self, given):
        with pytest.raises(SplitError) as caught:
            forget_indices(given, N)
        assert "copy" not in caught.value.fix
