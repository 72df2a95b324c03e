"""Data whose samples have a sensitive attribute beside their target: to show overlearning with."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fisher_forget.errors import ConfigError, DataError
from fisher_forget.experiments.datasets import load_dataset

Codes = NDArray[np.int64]
Samples = tuple[TensorDataset, Codes]

TINTS = ("red", "green")
FAINT = 0.7  # of the colour that a tint has less of
COUNTRIES = ("italy", "the_netherlands", "turkey", "arabia", "japan", "india")
LENGTH = 12  # letters of a name
LETTERS = 27  # and none


@dataclass(frozen=True)
class AttributeBundle:
    """A task, and an attribute that it does not ask for.

    Attributes:
        name: It was loaded by.
        train: Samples of the task.
        train_attribute: One value a sample [N].
        test: Other samples.
        test_attribute: Theirs.
        classes: Of the task.
        values: Of the attribute.
        without: The training samples without the attribute, where there is such a thing.
    """

    name: str
    train: TensorDataset
    train_attribute: Codes
    test: TensorDataset
    test_attribute: Codes
    classes: tuple[str, ...]
    values: tuple[str, ...]
    without: TensorDataset | None = None


def load_attribute_data(
    name: str,
    root: str | Path | None = None,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
) -> AttributeBundle:
    """Load a task with an attribute.

    | name | task | attribute |
    |---|---|---|
    | "digits-tint", "mnist-tint" | digit | tint of the image, red or green, drawn for each sample |
    | "mnist-parity" | even or odd | digit |
    | "names" | gender of a first name | country where the name is most frequent |

    Images with a tint have two channels, red and green, of which one is fainter by .7. Names are
    those of the package gender-guesser with one gender, and with one of six countries (`COUNTRIES`)
    as the only one where they are most frequent; accents are left out, and they are cut to twelve
    letters, 1 to 26, with 0 after them. A quarter of them are test samples.

    Args:
        name: See the table.
        root: As for `load_dataset`.
        max_train: Take at most so many training samples.
        max_test: The same for test samples.

    Raises:
        ConfigError: If the name is unknown.
        DataError: If the data, or the package, are not there.
    """
    if name not in SOURCES:
        expected = f"one of {sorted(SOURCES)}"
        raise ConfigError(f"the data {name!r}", expected, "Correct the name.")
    return SOURCES[name](name, root, max_train, max_test)


def _tinted(
    data: str, name: str, root: str | Path | None, max_train: int | None, max_test: int | None
) -> AttributeBundle:
    bundle = load_dataset(data, root, max_train=max_train, max_test=max_test)
    darkest = min(float(part.tensors[0].min()) for part in (bundle.train, bundle.test))
    parts = [_tint(part, darkest, seed) for seed, part in enumerate((bundle.train, bundle.test))]
    (train, of_train), (test, of_test) = parts
    grey = (bundle.train.tensors[0] - darkest) * (1 + FAINT) / 2
    without = TensorDataset(grey.repeat(1, 2, 1, 1), bundle.train.tensors[1])
    return AttributeBundle(
        name, train, of_train, test, of_test, bundle.classes, TINTS, without
    )  # fmt: skip


def _tint(samples: TensorDataset, darkest: float, seed: int) -> Samples:
    """Images with a colour each, and which."""
    x, y = samples.tensors
    tint = np.random.default_rng(seed).integers(0, 2, len(x))
    strength = torch.tensor([[1.0, FAINT], [FAINT, 1.0]])[tint]
    return TensorDataset((x - darkest) * strength[:, :, None, None], y), tint


def _parity(
    name: str, root: str | Path | None, max_train: int | None, max_test: int | None
) -> AttributeBundle:
    bundle = load_dataset("mnist", root, max_train=max_train, max_test=max_test)
    parts = [
        (TensorDataset(x, y % 2), y.numpy())
        for x, y in (part.tensors for part in (bundle.train, bundle.test))
    ]
    (train, of_train), (test, of_test) = parts
    return AttributeBundle(
        name, train, of_train, test, of_test, ("even", "odd"), bundle.classes
    )  # fmt: skip


def _names(
    name: str, root: str | Path | None, max_train: int | None, max_test: int | None
) -> AttributeBundle:
    rows = _listed_names()
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) // 4

    def part(idx: NDArray[np.int64], limit: int | None) -> Samples:
        chosen = [rows[i] for i in idx[:limit]]
        letters = torch.tensor([letters for letters, _, _ in chosen])
        samples = TensorDataset(letters, torch.tensor([gender for _, gender, _ in chosen]))
        return samples, np.array([country for _, _, country in chosen])

    (test, of_test), (train, of_train) = part(order[:cut], max_test), part(order[cut:], max_train)
    return AttributeBundle(
        name, train, of_train, test, of_test, ("male", "female"), COUNTRIES
    )  # fmt: skip


def _listed_names() -> list[tuple[list[int], int, int]]:
    """Letters, gender and country of each name."""
    try:
        from gender_guesser.detector import Detector
    except ImportError as error:
        fix = "pip install 'fisher-forget[scenarios]'"
        raise DataError("no package gender-guesser", "its list of names", fix) from error
    known = list(Detector.COUNTRIES)
    source = resources.files("gender_guesser") / "data" / "nam_dict.txt"
    found: dict[tuple[int, ...], tuple[int, int] | None] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        sex, *rest = line.split()
        if line[0] in "#=" or sex not in ("M", "F"):
            continue
        # one hexadecimal digit a country: how frequent the name is
        counts = [
            int(x, 16) if x in "123456789ABCDEF" else 0 for x in line[30:-1].ljust(len(known))
        ]
        most = [known[i] for i, x in enumerate(counts[: len(known)]) if x == max(counts) > 0]
        if len(most) == 1 and most[0] in COUNTRIES:
            told = int(sex == "F"), COUNTRIES.index(most[0])
            letters = _letters(rest[0])
            # without accents two names may be one: left out where they do not agree
            found[letters] = told if found.get(letters, told) == told else None
    return [(list(letters), *told) for letters, told in found.items() if told is not None]


def _letters(name: str) -> tuple[int, ...]:
    """Places in the alphabet, cut or filled with 0."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    places = [ord(x) - ord("a") + 1 for x in plain if "a" <= x <= "z"][:LENGTH]
    return tuple(places + [0] * (LENGTH - len(places)))


Source = Callable[[str, str | Path | None, int | None, int | None], AttributeBundle]
SOURCES: dict[str, Source] = {
    "digits-tint": partial(_tinted, "digits"),
    "mnist-tint": partial(_tinted, "mnist"),
    "mnist-parity": _parity,
    "names": _names,
}
