"""Data sets as plain tensors: what scikit-learn ships, readers for MNIST and CIFAR-10 on disk, the
user's own.

Nothing is downloaded. MNIST and CIFAR-10 are looked for under a root folder: the argument `root`,
else the environment variable `FISHER_FORGET_DATA`, else `../shared/data`. A data set of one's own
is a function: see `load_dataset`.
"""

from __future__ import annotations

import difflib
import gzip
import io
import math
import os
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from fisher_forget.data.samples import read_samples, take
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.experiments import import_path

DEFAULT_ROOT = "../shared/data"
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
CIFAR_MEAN, CIFAR_STD = (
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)  # of the 50,000 training images, in [0, 1]

Array = NDArray[Any]


@dataclass(frozen=True)
class DataBundle:
    """A data set, ready to train on.

    Attributes:
        name: The name it was loaded by.
        train: `train[rows]` is (inputs, targets): inputs [N, ...], or such tensors by name, and
            targets int64 [N], or float32 [N, outputs]; the targets are the last of `train.tensors`.
        test: The same of the test samples.
        classes: Class names in the order of the targets; empty where these are not one class a
            sample.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]


class _Raw(NamedTuple):
    """What a reader found; `scale` makes model inputs of raw ones, after the subset is taken, to
    save memory."""

    train: tuple[Array, Array]
    test: tuple[Array, Array]
    classes: tuple[str, ...]
    scale: Callable[[Tensor], Tensor]


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> DataBundle:
    """Load a data set by its name; scaling and the train/test split do not depend on `seed` or the
    sizes asked for.

    A name with a colon is the import path of a function of your own, package.module:function. It is
    called with the `options`, the global random states seeded by 0, and returns (train, test):
    `read_samples` says what these may be.

    Args:
        name: A key of `DATASETS`, or an import path.
        root: Folder that holds the data on disk; see the module's docstring.
        max_train: Take at most this many training samples, with the class proportions of all of
            them.
        max_test: The same for the test samples.
        seed: Chooses the subset, and nothing else.
        options: Keyword arguments of a function of your own.

    Raises:
        ConfigError: If the name is unknown, a size is not positive, or a function of your own
            fails.
        DataError: If files are missing or damaged, or a function of your own returns something
            else.

    Example:
        >>> bundle = load_dataset("digits", max_train=100)
        >>> bundle.train.tensors[0].shape, len(bundle.classes)
        (torch.Size([100, 1, 8, 8]), 10)
    """
    if import_path.is_own(name):
        return _own(name, max_train, max_test, seed, options or {})
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, cutoff=0.4)
        fix = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Correct the name."
        raise ConfigError(
            f"the data set {name!r}", f"one of {sorted(DATASETS)}, or package.module:function", fix
        )
    if options:
        raise ConfigError(
            f"the options {sorted(options)} for {name!r}",
            "none for a built-in data set",
            "Remove them.",
        )
    raw = DATASETS[name].read(_root(root))

    def part(samples: tuple[Array, Array], limit: int | None, stream: int) -> TensorDataset:
        inputs, targets = samples
        rows = _subset(
            targets, limit, np.random.default_rng((seed, stream)), stratify=bool(raw.classes)
        )
        return TensorDataset(
            raw.scale(torch.from_numpy(inputs[rows])), torch.from_numpy(targets[rows])
        )

    return DataBundle(name, part(raw.train, max_train, 0), part(raw.test, max_test, 1), raw.classes)


def _own(
    name: str, max_train: int | None, max_test: int | None, seed: int, options: Mapping[str, Any]
) -> DataBundle:
    """What the user's function returns, in memory; the classes are the whole numbers up to the
    largest target."""
    made = import_path.make(name, "the data", options, seed=0)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise DataError(
            f"{type(made).__name__} from {name}", "a pair (train, test)", "Return both data sets."
        )
    train, test = (read_samples(part) for part in made)
    targets = torch.cat([train.tensors[-1], test.tensors[-1]])
    labelled = targets.dim() == 1 and not targets.is_floating_point()
    classes = tuple(map(str, range(int(targets.max()) + 1))) if labelled else ()

    def part(samples: TensorDataset, limit: int | None, stream: int) -> TensorDataset:
        rows = _subset(
            samples.tensors[-1].numpy(),
            limit,
            np.random.default_rng((seed, stream)),
            stratify=labelled,
        )
        return take(samples, rows)

    return DataBundle(name, part(train, max_train, 0), part(test, max_test, 1), classes)


def available(root: str | Path | None = None) -> dict[str, str]:
    """For each data set "ready", or how to get it."""
    place = _root(root)
    return {
        name: "ready" if (e := source.missing(place)) is None else e.fix
        for name, source in DATASETS.items()
    }


def catalogue(root: str | Path | None = None) -> str:
    """Which data sets are found and where, and how to get the others."""
    place = _root(root)
    lines = [
        f"Data sets in {place.resolve()}; FISHER_FORGET_DATA, data.root or --root names another folder.",
        "",
    ]
    for name, source in DATASETS.items():
        problem = source.missing(place)
        lines.append(f"  {name:15}{'found' if problem is None else 'missing':9}{source.about}")
        if problem is None:
            lines.append(
                f"  {'':15}in       {place / source.folder if source.folder else 'scikit-learn'}"
            )
        else:
            lines += [
                f"  {'':15}{word:9}{text}"
                for word, text in (
                    ("lacks", problem.got.removeprefix("no ")),
                    ("get", source.origin),
                )
            ]
            lines.append(f"  {'':15}{'do':9}{problem.fix}")
    own = (
        "Your own: `data: package.module:function` in the configuration; see `fisher-forget init`."
    )
    return "\n".join([*lines, "", own])


def _root(root: str | Path | None) -> Path:
    return Path(root if root is not None else os.environ.get("FISHER_FORGET_DATA") or DEFAULT_ROOT)


def _subset(
    targets: Array, limit: int | None, rng: np.random.Generator, *, stratify: bool
) -> NDArray[np.int64]:
    """Sorted indices of at most `limit` samples; class sizes are proportional, by largest
    remainder."""
    if limit is not None and limit < 1:
        raise ConfigError(
            f"a subset of {limit} samples",
            "at least one sample, or None for all",
            "Raise the size.",
        )
    if limit is None or limit >= len(targets):
        return np.arange(len(targets))
    groups = targets if stratify else np.zeros(len(targets))
    _, member, counts = np.unique(groups, return_inverse=True, return_counts=True)
    share = limit * counts / len(targets)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: limit - take.sum()]] += 1
    rows = [rng.permutation(np.flatnonzero(member == k))[:n] for k, n in enumerate(take)]
    return np.sort(np.concatenate(rows))


# Shipped with scikit-learn, which is imported late because that takes a second.
def _split(
    inputs: Array, targets: Array, *, stratify: bool
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Four fifths to train on, the same ones always."""
    from sklearn.model_selection import train_test_split

    by = targets if stratify else None
    a, b, y, z = train_test_split(inputs, targets, test_size=0.2, random_state=0, stratify=by)
    return (a, y), (b, z)


def _digits(root: Path) -> _Raw:
    from sklearn.datasets import load_digits

    found = load_digits()
    train, test = _split(
        found.images[:, None].astype(np.float32), found.target.astype(np.int64), stratify=True
    )
    return _Raw(train, test, tuple(map(str, range(10))), lambda x: x / 16)


def _standardiser(train: Array) -> Callable[[Array], Array]:
    mean, std = train.mean(0), train.std(0)
    return lambda x: ((x - mean) / std).astype(np.float32)


def _breast_cancer(root: Path) -> _Raw:
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    (a, y), (b, z) = _split(found.data, found.target.astype(np.int64), stratify=True)
    inputs = _standardiser(a)
    return _Raw((inputs(a), y), (inputs(b), z), tuple(map(str, found.target_names)), lambda x: x)


def _diabetes(root: Path) -> _Raw:
    from sklearn.datasets import load_diabetes

    found = load_diabetes()
    (a, y), (b, z) = _split(found.data, found.target[:, None], stratify=False)
    inputs, target = _standardiser(a), _standardiser(y)
    return _Raw((inputs(a), target(y)), (inputs(b), target(z)), (), lambda x: x)


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
    return DataError(
        f"{path} with {why}", "a complete file of this data set", "Fetch the file again."
    )


def _idx_file(root: Path, name: str) -> Path | None:
    return next(
        (path for end in (".gz", "") if (path := root / "MNIST" / "raw" / (name + end)).is_file()),
        None,
    )


def _missing_mnist(root: Path) -> DataError | None:
    absent = [name for name in MNIST_FILES if _idx_file(root, name) is None]
    if not absent:
        return None
    return DataError(
        f"no {', '.join(absent)} in {root / 'MNIST' / 'raw'}",
        "the four IDX files of MNIST, raw or .gz",
        f"Put them into {root / 'MNIST' / 'raw'}, or name the folder above MNIST by root= or FISHER_FORGET_DATA.",
    )


def _mnist(root: Path) -> _Raw:
    if (problem := _missing_mnist(root)) is not None:
        raise problem
    images, labels, test_images, test_labels = (
        read_idx(path) for name in MNIST_FILES if (path := _idx_file(root, name))
    )
    for x, y in ((images, labels), (test_images, test_labels)):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise _damaged(
                root / "MNIST" / "raw", f"images of shape {x.shape} for labels of shape {y.shape}"
            )
    train, test = (
        (x[:, None], y.astype(np.int64)) for x, y in ((images, labels), (test_images, test_labels))
    )
    return _Raw(train, test, tuple(map(str, range(10))), lambda x: x.float() / 255)


# The functions that NumPy names in its own pickles, taken from NumPy itself because their modules
# move.
_REBUILD, _FROM_BUFFER = np.empty(1).__reduce__()[0], np.empty(1).__reduce_ex__(5)[0]
_SAFE_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _REBUILD for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FROM_BUFFER for core in ("core", "_core")},
}


class _ArraysOnly(pickle.Unpickler):
    """Builtin containers and NumPy arrays: a pickle can call what it names, so it may name nothing
    else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return _SAFE_GLOBALS[module, name]


def read_pickled_arrays(path: Path) -> Any:
    """The arrays, lists and strings in a pickle file; anything that could run code is refused.

    Raises:
        DataError: If the file is damaged or asks for more than arrays.
    """
    try:
        # latin1 reads what Python 2 wrote, as the original CIFAR-10 was
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"the pickle {path}, which cannot be read: {error}",
            "a pickle of NumPy arrays, lists and strings",
            "Fetch the file again, from a source you trust.",
        ) from error


def _missing_cifar10(root: Path) -> DataError | None:
    folder = root / "cifar-10-batches-py"
    absent = [name for name in CIFAR_FILES if not (folder / name).is_file()]
    if not absent:
        return None
    fix = f"Put them into {folder}, or name the folder above it by root= or FISHER_FORGET_DATA."
    if (root / "cifar10-images.tar.xz").is_file():
        fix = f"Run `python {root / 'unpack_cifar10.py'} DESTINATION` and pass that destination as root."
    return DataError(f"no {', '.join(absent)} in {folder}", "the python version of CIFAR-10", fix)


def _cifar10(root: Path) -> _Raw:
    if (problem := _missing_cifar10(root)) is not None:
        raise problem
    *batches, meta = (
        read_pickled_arrays(root / "cifar-10-batches-py" / name) for name in CIFAR_FILES
    )
    try:
        parts = [
            (np.asarray(b["data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(b["labels"]))
            for b in batches
        ]
        classes = tuple(map(str, meta["label_names"]))
        images, labels = (np.concatenate(pieces) for pieces in zip(*parts[:-1], strict=True))
        train, test = ((x, y.astype(np.int64)) for x, y in ((images, labels), parts[-1]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(
            root / "cifar-10-batches-py", f"another layout ({type(error).__name__}: {error})"
        ) from error
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return _Raw(train, test, classes, lambda x: (x.float() / 255 - mean) / std)


class _Source(NamedTuple):
    about: str
    read: Callable[[Path], _Raw]
    missing: Callable[[Path], DataError | None] = lambda root: (
        None
    )  # scikit-learn's are always there
    folder: str = ""  # below the root
    origin: str = ""


DATASETS: dict[str, _Source] = {
    "digits": _Source("1,797 handwritten digits of 8 x 8 pixels, ten classes", _digits),
    "mnist": _Source(
        "70,000 handwritten digits of 28 x 28 pixels, ten classes",
        _mnist,
        _missing_mnist,
        "MNIST/raw",
        "http://yann.lecun.com/exdb/mnist/ (mirror: https://ossci-datasets.s3.amazonaws.com/mnist/), four files *.gz",
    ),
    "cifar10": _Source(
        "60,000 colour images of 32 x 32 pixels, ten classes",
        _cifar10,
        _missing_cifar10,
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu/~kriz/cifar.html, the python version, cifar-10-python.tar.gz, unpacked",
    ),
    "breast_cancer": _Source("569 tumours, 30 features, two classes", _breast_cancer),
    "diabetes": _Source("442 patients, 10 features, regression", _diabetes),
}
