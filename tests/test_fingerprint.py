"""A restart knows its data, whatever the samples are, and no other data."""

from __future__ import annotations

import os
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fisher_forget import DataError, FisherForgetWarning
from fisher_forget.data.split import Split, resolve_split

N = 23
X, Y = torch.arange(2.0 * N).view(N, 2), torch.arange(N)
BASE = TensorDataset(X, Y)


class Plain(Dataset):
    """The same samples, but not a TensorDataset."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], Y[index]


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


class Record:
    """A sample that tells nothing of its content; its repr is an address."""

    def __init__(self, value):
        self.value = value


class Made(Dataset):
    def __init__(self, make, size=N):
        self.make, self.size = make, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.make(index)


def image(index):
    return Image.fromarray(np.full((4, 4), index, np.uint8))


def stacked(rows):
    x = torch.stack([torch.tensor(np.array(row[0])).float() for row in rows])
    return x, torch.tensor([row[1] for row in rows])


class Box:
    """A batch of a class of the user's own."""

    def __init__(self, value):
        self.value = value


def boxed(rows):
    return Box(torch.utils.data.default_collate(rows))


def moved(shift, index):
    return X[index] + shift, Y[index]


def noted(folder, worker):
    (folder / str(os.getpid())).touch()


def unboxed(rows):
    return torch.tensor([[float(row.value)] for row in rows]), torch.tensor([0] * len(rows))


KINDS = {
    "images, made to tensors in the collate function": (lambda i: (image(i), i), stacked),
    "objects": (Record, unboxed),
    "words": (lambda i: {"x": X[i], "name": f"scan {i}", "label": i}, None),
    "half precision": (lambda i: (X[i].bfloat16(), i), None),
    "numbers": (lambda i: (X[i], float(i)), None),
    "arrays of words": (lambda i: (np.array([f"{i}"]), i), list),
    "expanded": (lambda i: (X[i, :1].expand(3), i), list),
    "compressed": (lambda i: (torch.diag(X[i]).to_sparse_csr(), i), list),
    "ragged": (lambda i: (torch.nested.nested_tensor([X[i], X[i, :1]]), i), list),
    "images that nothing collates": (lambda i: (image(i), i), None),
}


class TestWhateverSamplesAre:
    @pytest.mark.parametrize("kind", KINDS)
    def test_known_again(self, kind):
        make, collate = KINDS[kind]

        def mark(batch_size=5):
            loader = DataLoader(Made(make), batch_size=batch_size, collate_fn=collate)
            return resolve_split(loader, [1]).fingerprint()

        assert mark() == mark() == mark(batch_size=2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_other_samples(self, kind):
        make, collate = KINDS[kind]
        few = range(9)
        marks = [
            resolve_split(
                DataLoader(Made(lambda i, s=shift: make(i + s)), collate_fn=collate, sampler=few),
                [1],
            ).fingerprint()
            for shift in (0, 1)
        ]
        assert marks[0] != marks[1]

    def test_objects_that_tell_nothing_count_by_type(self):
        with pytest.warns(FisherForgetWarning, match="known by their type alone"):
            marks = [
                resolve_split(DataLoader(Made(make), collate_fn=list), [1]).fingerprint()
                for make in (Record, Record, lambda i: (Record(i), i))
            ]
        assert marks[0] == marks[1] != marks[2]

    def test_objects_that_the_data_set_holds(self):
        held = [[Record(i) for i in range(N)] for _ in range(2)]
        with pytest.warns(FisherForgetWarning, match="known by their type alone"):
            marks = [
                resolve_split(DataLoader(records, collate_fn=list), [1]).fingerprint()
                for records in held
            ]
        assert marks[0] == marks[1]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_objects_tell_what_unpack_takes_out_of_them(self, workers):
        def mark(shift):
            loader = DataLoader(
                Made(partial(moved, shift)), collate_fn=boxed, batch_size=4, num_workers=workers
            )
            return resolve_split(loader, [1], unpack=lambda batch: batch.value).fingerprint()

        assert mark(0) == mark(0) != mark(1)


AUGMENTED = {
    "noise": lambda i: (X[i] + torch.rand(2), Y[i]),
    "flips": lambda i: (X[i].flip(0) if random.random() < 0.5 else X[i], Y[i]),
    "crops of random size": lambda i: (torch.rand(random.randint(1, 9)), Y[i]),
    "words": lambda i: {"x": X[i], "id": str(random.random()), "labels": Y[i]},
}


def test_the_order_of_a_dict_does_not_count():
    """That of a set of words is another one in every process."""
    marks = [
        resolve_split(Made(lambda i, names=names: dict.fromkeys(names, X[i])), [1]).fingerprint()
        for names in (("x", "label"), ("label", "x"))
    ]
    assert marks[0] == marks[1]


class TestSpeed:
    def test_rows_of_tensors_are_hashed_as_samples_are(self):
        """Many at a time or one by one, of every type and shape."""
        g = torch.Generator().manual_seed(0)
        kinds = [
            torch.randn(150, 3, 2, generator=g),
            torch.randn(150, generator=g).bfloat16(),
            torch.randn(150, 4, generator=g, dtype=torch.complex64),
            torch.rand(150, 5, generator=g) > 0.5,
            torch.zeros(150, 0),
            torch.randn(7, 150, generator=g).T,
            torch.randn(1, 2, generator=g).expand(150, 2),
            torch.arange(150, dtype=torch.uint8),
        ]
        for x in kinds:
            rows = TensorDataset(x, torch.arange(150))
            alone = Made(lambda i, x=x: (x[i], i), 150)
            marks = [resolve_split(d, [], allow_empty=True).hashes for d in (rows, alone)]
            assert np.array_equal(*marks), x.dtype
            assert len(np.unique(marks[0], axis=0)) == 150

    def test_a_collate_function_sees_one_sample_at_a_time(self):
        """A batch that pads would hash a sample by its neighbours."""
        seen = []

        def padded(rows):
            seen.append(len(rows))
            return torch.nn.utils.rnn.pad_sequence(rows)

        ragged = Made(lambda i: torch.full((1 + i % 5,), float(i)))
        split = resolve_split(DataLoader(ragged, batch_size=8, collate_fn=padded), [1])
        some = np.array([3, 9, 20])
        assert np.array_equal(split.hashes[some], split.hasher(some))
        assert set(seen) == {1}

    def test_workers_hash_and_start_once_a_call(self, tmp_path):
        data = DataLoader(
            Plain(), batch_size=4, num_workers=2, worker_init_fn=partial(noted, tmp_path)
        )
        split = resolve_split(data, [1])
        assert split.fingerprint() == resolve_split(BASE, [1]).fingerprint()
        assert len(list(tmp_path.iterdir())) == 2

    def test_what_cannot_be_read_is_said(self):
        def broken(index):
            if index == 17:
                raise KeyError(index)
            return X[index]

        with pytest.raises(DataError, match="KeyError while a batch of the samples"):
            resolve_split(Made(broken), [1]).fingerprint()


class TestRandomData:
    @pytest.mark.parametrize("kind", AUGMENTED)
    def test_what_does_not_change_counts(self, kind):
        make = AUGMENTED[kind]
        mark = resolve_split(Made(make), [1]).fingerprint()
        assert all(resolve_split(Made(make), [1]).fingerprint() == mark for _ in range(5))
        assert resolve_split(Made(make), [2]).fingerprint() != mark

    def test_shape_and_type_still_count(self):
        makes = [
            lambda i: (torch.rand(2), 0),
            lambda i: (torch.rand(3), 0),
            lambda i: (torch.rand(2).double(), 0),
            lambda i: (torch.rand(random.randint(1, 9)), 0),
            lambda i: (torch.rand(random.randint(1, 9)).double(), 0),
        ]
        assert len({resolve_split(Made(make), [1]).fingerprint() for make in makes}) == len(makes)

    def test_targets_still_count(self):
        one, other = (
            resolve_split(Made(lambda i, k=k: (torch.rand(2), (i + k) % 3)), [1]).fingerprint()
            for k in (0, 1)
        )
        assert one != other
