"""The built-in data sets: what scikit-learn ships, and readers for MNIST and CIFAR-10 on disk.

Nothing is downloaded. A pickle may hold arrays of uint8, lists and strings, and nothing that runs.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from platformdirs import user_data_dir
from torch import Tensor

from fisher_forget.errors import DataError
from fisher_forget.experiments import plain_pickle

ROOT_VARIABLE = "FISHER_FORGET_DATA"
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
# Of the 50,000 training images, in [0, 1].
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Array = NDArray[Any]
Samples = tuple[Array, Array]  # inputs, targets


class RawData(NamedTuple):
    """Samples as they are stored; `scale` makes model inputs of those that are used, to save
    memory."""

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    scale: Callable[[Tensor], Tensor]


class Source(NamedTuple):
    """Where a data set comes from.

    Attributes:
        about: What it is, in a line.
        read: Reads it, given the root folder.
        missing: What is wrong with the files below a root folder; `None` if nothing.
        folder: Of the files, below the root; empty where there are none.
        origin: Where to get the files.
    """

    about: str
    read: Callable[[Path], RawData]
    missing: Callable[[Path], DataError | None] = lambda root: None
    folder: str = ""
    origin: str = ""


def user_folder() -> Path:
    """Where data are looked for if nothing else is named."""
    return Path(user_data_dir("fisher_forget"))


# scikit-learn is imported late, because that takes a second.
def _four_fifths(inputs: Array, targets: Array, *, stratify: bool) -> tuple[Samples, Samples]:
    """Training and test samples, the same ones always."""
    from sklearn.model_selection import train_test_split

    by = targets if stratify else None
    a, b, y, z = train_test_split(inputs, targets, test_size=0.2, random_state=0, stratify=by)
    return (a, y), (b, z)


def _standardiser(train: Array) -> Callable[[Array], Array]:
    mean, std = train.mean(0), train.std(0)
    return lambda x: ((x - mean) / std).astype(np.float32)


def _digits(root: Path) -> RawData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, targets = digits.images[:, None].astype(np.float32), digits.target.astype(np.int64)
    train, test = _four_fifths(images, targets, stratify=True)
    return RawData(train, test, tuple(map(str, range(10))), lambda x: x / 16)


def _breast_cancer(root: Path) -> RawData:
    from sklearn.datasets import load_breast_cancer

    tumours = load_breast_cancer()
    targets = tumours.target.astype(np.int64)
    (a, y), (b, z) = _four_fifths(tumours.data, targets, stratify=True)
    inputs = _standardiser(a)
    classes = tuple(map(str, tumours.target_names))
    return RawData((inputs(a), y), (inputs(b), z), classes, lambda x: x)


def _diabetes(root: Path) -> RawData:
    from sklearn.datasets import load_diabetes

    patients = load_diabetes()
    (a, y), (b, z) = _four_fifths(patients.data, patients.target[:, None], stratify=False)
    inputs, target = _standardiser(a), _standardiser(y)
    return RawData((inputs(a), target(y)), (inputs(b), target(z)), (), lambda x: x)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of unsigned bytes from an IDX file (raw, or compressed with the suffix .gz).

    Layout, big-endian: bytes 0, 0, 8 (unsigned byte), number of dimensions; each size as uint32;
    then the values.

    Raises:
        DataError: If the file is truncated or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise _damaged(path, f"the header {content[:4].hex()}")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise _damaged(path, f"{len(content) - start} values for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _damaged(path: Path, why: str) -> DataError:
    expected = "a complete file of this data set"
    return DataError(f"{path} with {why}", expected, "Fetch the file again.")


def _missing(root: Path, folder: Path, absent: list[str], expected: str) -> DataError:
    fix = (
        f"Put them into {folder}, or name another root than {root}: by root= (data.root in a "
        f"configuration, --root) or {ROOT_VARIABLE}; without either it is {user_folder()}."
    )
    return DataError(f"no {', '.join(absent)} in {folder}", expected, fix)


def _idx_file(root: Path, name: str) -> Path | None:
    paths = (root / "MNIST" / "raw" / f"{name}{end}" for end in (".gz", ""))
    return next((path for path in paths if path.is_file()), None)


def _missing_mnist(root: Path) -> DataError | None:
    absent = [name for name in MNIST_FILES if _idx_file(root, name) is None]
    if not absent:
        return None
    expected = "the four IDX files of MNIST, raw or .gz"
    return _missing(root, root / "MNIST" / "raw", absent, expected)


def _mnist(root: Path) -> RawData:
    if (problem := _missing_mnist(root)) is not None:
        raise problem
    images, labels, test_images, test_labels = (
        read_idx(path) for name in MNIST_FILES if (path := _idx_file(root, name))
    )
    for x, y in ((images, labels), (test_images, test_labels)):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            why = f"images of shape {x.shape} for labels of shape {y.shape}"
            raise _damaged(root / "MNIST" / "raw", why)
    train, test = (
        (x[:, None], y.astype(np.int64)) for x, y in ((images, labels), (test_images, test_labels))
    )
    return RawData(train, test, tuple(map(str, range(10))), lambda x: x.float() / 255)


def read_pickled_arrays(path: Path) -> dict[str, Any]:
    """The arrays of uint8, lists, numbers and strings in a pickled dictionary; nothing in it is
    run.

    Raises:
        DataError: If the file is damaged, or holds or asks for anything else.
    """
    try:
        return plain_pickle.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        got = f"the pickle {path}, which cannot be read: {error}"
        expected = "a pickled dictionary of uint8 arrays, lists and strings"
        raise DataError(got, expected, "Fetch the file again, from a source you trust.") from error


def _missing_cifar10(root: Path) -> DataError | None:
    folder, expected = root / "cifar-10-batches-py", "the python version of CIFAR-10"
    absent = [name for name in CIFAR_FILES if not (folder / name).is_file()]
    if not absent:
        return None
    if (root / "cifar10-images.tar.xz").is_file():
        unpack = f"python {root / 'unpack_cifar10.py'} DESTINATION"
        fix = f"Run `{unpack}` and pass that destination as root."
        return DataError(f"no {', '.join(absent)} in {folder}", expected, fix)
    return _missing(root, folder, absent, expected)


def _cifar10_batch(batch: dict[str, Any]) -> Samples:
    """Images [N, 3, 32, 32] and as many labels."""
    pixels, labels = batch["data"], batch["labels"]
    if not isinstance(labels, list) or not all(type(x) is int and 0 <= x < 10 for x in labels):
        raise ValueError("labels that are no list of numbers from 0 to 9")
    if not isinstance(pixels, np.ndarray) or pixels.shape != (len(labels), 3 * 32 * 32):
        got = f"shape {pixels.shape}" if isinstance(pixels, np.ndarray) else "no array"
        raise ValueError(f"data of {got} for {len(labels)} labels")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _cifar10(root: Path) -> RawData:
    if (problem := _missing_cifar10(root)) is not None:
        raise problem
    folder = root / "cifar-10-batches-py"
    *batches, meta = (read_pickled_arrays(folder / name) for name in CIFAR_FILES)
    try:
        parts = [_cifar10_batch(batch) for batch in batches]
        classes = tuple(meta["label_names"])
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("label_names that are no text")
        images, labels = (np.concatenate(pieces) for pieces in zip(*parts[:-1], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"another layout ({type(error).__name__}: {error})") from error
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    scale: Callable[[Tensor], Tensor] = lambda x: (x.float() / 255 - mean) / std  # noqa: E731
    return RawData((images, labels), parts[-1], classes, scale)


DATASETS: dict[str, Source] = {
    "digits": Source("1,797 handwritten digits of 8 x 8 pixels, ten classes", _digits),
    "mnist": Source(
        "70,000 handwritten digits of 28 x 28 pixels, ten classes",
        _mnist,
        _missing_mnist,
        "MNIST/raw",
        "http://yann.lecun.com/exdb/mnist/ "
        "(mirror: https://ossci-datasets.s3.amazonaws.com/mnist/), four files *.gz",
    ),
    "cifar10": Source(
        "60,000 colour images of 32 x 32 pixels, ten classes",
        _cifar10,
        _missing_cifar10,
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu/~kriz/cifar.html, the python version, "
        "cifar-10-python.tar.gz, unpacked",
    ),
    "breast_cancer": Source("569 tumours, 30 features, two classes", _breast_cancer),
    "diabetes": Source("442 patients, 10 features, regression", _diabetes),
}
