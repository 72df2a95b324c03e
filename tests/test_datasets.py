from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch

from fisher_forget.errors import ConfigError, DataError
from fisher_forget.experiments.data_sources import (
    CIFAR_FILES,
    DATASETS,
    MNIST_FILES,
    read_idx,
    read_pickled_arrays,
)
from fisher_forget.experiments.datasets import available, data_root, load_dataset

SHIPPED = ["digits", "breast_cancer", "diabetes"]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray, *, suffix: str = ".gz") -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in zip(MNIST_FILES, (images, labels, images[:4], labels[:4]), strict=True):
        content = idx(array)
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)


def two_images() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((2, 28, 28), np.uint8), np.arange(2, dtype=np.uint8)


def write_cifar10(root: Path, protocol: int) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in CIFAR_FILES[:-1]:
        (folder / name).write_bytes(
            pickle.dumps({"data": images, "labels": [0, 1, 2, 9]}, protocol)
        )
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, protocol)
    )
    return images


class TestShipped:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_shapes_and_dtypes(self, name):
        bundle = load_dataset(name)
        for part in (bundle.train, bundle.test):
            inputs, targets = part.tensors
            assert inputs.dtype == torch.float32
            if bundle.classes:
                assert targets.dtype == torch.int64
                assert targets.shape == inputs.shape[:1]
                assert set(targets.tolist()) == set(range(len(bundle.classes)))
            else:
                assert targets.dtype == torch.float32
                assert targets.shape == (len(inputs), 1)
        assert len(bundle.train) == pytest.approx(4 * len(bundle.test), abs=4)

    def test_digits_are_images_in_the_unit_interval(self):
        images = load_dataset("digits").train.tensors[0]
        assert images.shape[1:] == (1, 8, 8)
        assert (images.min().item(), images.max().item()) == (0, 1)

    @pytest.mark.parametrize("name", ["breast_cancer", "diabetes"])
    def test_standardised_on_the_training_samples(self, name):
        inputs, targets = load_dataset(name).train.tensors
        for values in [inputs] if name == "breast_cancer" else [inputs, targets]:
            torch.testing.assert_close(
                values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                values.std(0, correction=0), torch.ones(values.shape[1]), atol=1e-5, rtol=0
            )


class TestSubset:
    def test_class_shares_are_kept(self):
        every = load_dataset("breast_cancer").train.tensors[1]
        some = load_dataset("breast_cancer", max_train=91).train.tensors[1]
        assert len(some) == 91
        expected = every.bincount() * 91 / len(every)
        assert (some.bincount() - expected).abs().max() < 1

    @pytest.mark.parametrize("name", SHIPPED)
    def test_only_the_choice_depends_on_the_seed(self, name):
        a, b, c = (load_dataset(name, max_train=50, max_test=20, seed=seed) for seed in (3, 3, 4))
        every = {x.numpy().tobytes() for x in load_dataset(name).train.tensors[0]}
        assert torch.equal(a.train.tensors[0], b.train.tensors[0])
        assert not torch.equal(a.train.tensors[0], c.train.tensors[0])
        assert (len(a.train), len(a.test)) == (50, 20)
        assert {x.numpy().tobytes() for x in c.train.tensors[0]} <= every

    def test_split_does_not_depend_on_the_seed(self):
        a, b = load_dataset("digits", seed=0), load_dataset("digits", seed=1)
        assert torch.equal(a.test.tensors[0], b.test.tensors[0])

    def test_train_size_does_not_choose_the_test_samples(self):
        a, b = (
            load_dataset("digits", max_test=30),
            load_dataset("digits", max_train=100, max_test=30),
        )
        assert torch.equal(a.test.tensors[0], b.test.tensors[0])

    def test_a_larger_limit_takes_all(self):
        assert len(load_dataset("digits", max_train=10**6).train) == len(
            load_dataset("digits").train
        )

    def test_global_random_state_is_left_alone(self):
        before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 (the legacy state is meant)
        load_dataset("digits", max_train=10)
        assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
        assert torch.equal(before[1], torch.get_rng_state())

    def test_no_samples_are_refused(self):
        with pytest.raises(ConfigError, match="at least one sample"):
            load_dataset("digits", max_train=0)


class TestNames:
    def test_unknown_name_gets_a_suggestion(self):
        with pytest.raises(ConfigError, match="Did you mean 'mnist'"):
            load_dataset("minst")

    def test_every_name_says_whether_it_is_there(self, tmp_path):
        found = available(tmp_path)
        assert list(found) == list(DATASETS)
        assert {name for name, text in found.items() if text == "ready"} == set(SHIPPED)

    def test_root_is_the_argument_else_the_environment_else_the_users_folder(
        self, tmp_path, monkeypatch
    ):
        user = tmp_path / "user"
        monkeypatch.setenv("XDG_DATA_HOME", str(user))  # what platformdirs asks on Linux
        monkeypatch.delenv("FISHER_FORGET_DATA", raising=False)
        expected = Path(platformdirs.user_data_dir("fisher_forget"))
        assert data_root() == expected
        monkeypatch.setenv("FISHER_FORGET_DATA", str(tmp_path / "named"))
        assert data_root() == tmp_path / "named"
        assert data_root(tmp_path / "given") == tmp_path / "given"
        with pytest.raises(DataError) as caught:
            load_dataset("mnist", tmp_path / "given")
        for words in (str(tmp_path / "given"), "data.root", "FISHER_FORGET_DATA", str(expected)):
            assert words in caught.value.fix

    def test_the_place_that_a_program_runs_in_names_no_data(self, tmp_path, monkeypatch):
        write_mnist(tmp_path / "shared" / "data", *two_images())
        (tmp_path / "project").mkdir()
        monkeypatch.chdir(tmp_path / "project")
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
        monkeypatch.delenv("FISHER_FORGET_DATA", raising=False)
        assert available()["mnist"] != "ready"
        write_mnist(data_root(), *two_images())
        assert available()["mnist"] == "ready"

    def test_root_comes_from_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FISHER_FORGET_DATA", str(tmp_path))
        with pytest.raises(DataError, match=str(tmp_path)):
            load_dataset("mnist")
        write_mnist(tmp_path, np.zeros((5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8))
        assert available()["mnist"] == "ready"
        assert len(load_dataset("mnist").train) == 5


class TestIdx:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_reads_a_hand_made_file(self, tmp_path, suffix):
        content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])
        path = tmp_path / f"numbers{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)
        assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 255]]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0\0\x0d\x01\0\0\0\x01abcd",
            b"\0\0\x08\x03\0\0",
            b"\0\0\x08\x01\0\0\0\x05abc",
            b"\0\0\x08\x01\0\0\0\x01ab",
        ],
        ids=["empty", "floats", "cut header", "too short", "too long"],
    )
    def test_refuses_damage(self, tmp_path, content):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(DataError, match="bad"):
            read_idx(tmp_path / "bad")

    def test_refuses_a_cut_archive(self, tmp_path):
        (tmp_path / "bad.gz").write_bytes(gzip.compress(bytes(1000))[:-9])
        with pytest.raises(DataError, match=r"bad\.gz"):
            read_idx(tmp_path / "bad.gz")


class TestMnist:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_reads_images_in_the_unit_interval(self, tmp_path, suffix):
        images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
        labels = np.arange(20, dtype=np.uint8) % 10
        write_mnist(tmp_path, images, labels, suffix=suffix)
        bundle = load_dataset("mnist", tmp_path)
        inputs, targets = bundle.train.tensors
        torch.testing.assert_close(inputs, torch.from_numpy(images[:, None] / 255).float())
        assert targets.tolist() == labels.tolist()
        assert len(bundle.test) == 4

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(DataError, match=r"t10k-labels.*by root= .*FISHER_FORGET_DATA"):
            load_dataset("mnist", tmp_path)

    def test_images_and_labels_must_match(self, tmp_path):
        write_mnist(tmp_path, np.zeros((5, 28, 28), np.uint8), np.zeros(6, np.uint8))
        with pytest.raises(DataError, match="labels of shape"):
            load_dataset("mnist", tmp_path)

    def test_real_files(self):
        if available()["mnist"] != "ready":
            pytest.skip(f"no MNIST on this machine: {available()['mnist']}")
        bundle = load_dataset("mnist", max_train=200, max_test=100)
        assert bundle.train.tensors[0].shape == (200, 1, 28, 28)
        assert bundle.train.tensors[1].bincount(minlength=10).min() >= 17


class TestCifar10:
    @pytest.mark.parametrize("protocol", [4, 5])
    def test_reads_normalised_images(self, tmp_path, protocol):
        images = write_cifar10(tmp_path, protocol)
        bundle = load_dataset("cifar10", tmp_path)
        inputs, targets = bundle.train.tensors
        mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
        expected = (images.reshape(-1, 3, 32, 32) / 255 - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(inputs[:4].numpy(), expected, atol=1e-5)
        assert (len(bundle.train), len(bundle.test)) == (20, 4)
        assert targets[:4].tolist() == [0, 1, 2, 9]
        assert bundle.classes == tuple(f"c{i}" for i in range(10))

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(DataError, match=r"data_batch_1.*by root= .*FISHER_FORGET_DATA"):
            load_dataset("cifar10", tmp_path)

    def test_archive_is_to_be_unpacked(self, tmp_path):
        (tmp_path / "cifar10-images.tar.xz").touch()
        with pytest.raises(DataError, match=r"unpack_cifar10.py DESTINATION.*as root"):
            load_dataset("cifar10", tmp_path)
        assert "unpack_cifar10.py" in available(tmp_path)["cifar10"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("data_batch_3", {"pixels": []}, "KeyError"),
            (
                "data_batch_3",
                {"data": [[0] * 3072], "labels": [1]},
                "data of no array for 1 labels",
            ),
            ("test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "for 1 labels"),
            ("test_batch", {"data": np.zeros((1, 9), np.uint8), "labels": [1]}, r"shape \(1, 9\)"),
            ("test_batch", {"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "from 0 to 9"),
            ("test_batch", {"data": np.zeros((1, 3072), np.uint8), "labels": "1"}, "from 0 to 9"),
            ("batches.meta", {"label_names": [["a"]]}, "label_names that are no text"),
        ],
    )
    def test_another_layout_is_refused(self, tmp_path, name, content, words):
        write_cifar10(tmp_path, 4)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=f"another layout.*{words}"):
            load_dataset("cifar10", tmp_path)

    def test_real_files(self):
        if available()["cifar10"] != "ready":
            pytest.skip(f"no CIFAR-10 on this machine: {available()['cifar10']}")
        bundle = load_dataset("cifar10", max_train=500, max_test=100)
        assert bundle.train.tensors[0].shape == (500, 3, 32, 32)
        assert bundle.train.tensors[1].bincount().tolist() == [50] * 10
        assert bundle.train.tensors[0].mean().abs() < 0.2


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


class TestRestrictedPickle:
    @pytest.mark.parametrize("protocol", range(6))
    def test_refuses_to_run_code(self, tmp_path, protocol):
        mark = tmp_path / "mark"
        (tmp_path / "evil").write_bytes(pickle.dumps({"data": Evil(os.mkdir, str(mark))}, protocol))
        with pytest.raises(DataError, match=r"mkdir, which no array needs"):
            read_pickled_arrays(tmp_path / "evil")
        assert not mark.exists()

    @pytest.mark.parametrize("call", [eval, getattr, np.load, np.frombuffer, type])
    def test_refuses_every_other_name(self, tmp_path, call):
        (tmp_path / "evil").write_bytes(pickle.dumps(Evil(call, "1")))
        with pytest.raises(DataError, match="which no array needs"):
            read_pickled_arrays(tmp_path / "evil")

    def test_refuses_object_arrays_that_hold_code(self, tmp_path):
        hidden = np.array([Evil(os.getcwd)], dtype=object)
        (tmp_path / "evil").write_bytes(pickle.dumps(hidden))
        with pytest.raises(DataError, match="'O8', where uint8 is expected"):
            read_pickled_arrays(tmp_path / "evil")

    def test_reads_what_python_2_wrote(self, tmp_path):
        # {'data': array([[1, 200]], dtype=uint8), 'labels': [7]}, protocol 2, with NumPy's old
        # module names
        (tmp_path / "old").write_bytes(
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x01K\x02\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
            b"K\x00tb\x89U\x02\x01\xc8tbU\x06labels]K\x07au."
        )
        found = read_pickled_arrays(tmp_path / "old")
        assert found["data"].tolist() == [[1, 200]]
        assert found["labels"] == [7]

    def test_refuses_damage(self, tmp_path):
        (tmp_path / "cut").write_bytes(pickle.dumps(np.arange(100))[:-30])
        with pytest.raises(DataError, match="cannot be read"):
            read_pickled_arrays(tmp_path / "cut")
