"""Real text that every installation has: which library is a docstring from?"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

LIBRARIES = {
    "numpy": ("lib", "ma", "polynomial", "linalg"),
    "scipy": ("signal", "optimize"),
    "matplotlib": ("axes", "tri", "backends"),
    "torch": ("nn", "optim"),
    "sklearn": ("linear_model", "cluster", "metrics"),
}
PER_LIBRARY, SHORTEST, LONGEST = 400, 12, 64  # docstrings; words
VOCABULARY = 2000  # most frequent words, with 0 for padding and 1 for the others
GIVEAWAY = re.compile(r"numpy|scipy|matplotlib|mpl|plt|torch|sklearn|scikit|^np$|^sp$")


def docstrings(library: str) -> list[tuple[str, str]]:
    """(module, docstring) of functions and classes, read from the source without importing it; at
    most `PER_LIBRARY`, evenly spaced over all."""
    spec = importlib.util.find_spec(library)
    root = Path(str(spec and spec.origin)).parent
    found: dict[str, str] = {}  # a text that occurs twice counts once
    for module in LIBRARIES[library]:
        for path in sorted((root / module).rglob("*.py")):
            if "tests" not in path.parts:
                for text in _of_file(path):
                    found.setdefault(text, f"{library}.{module}")
    texts = list(found)
    chosen = np.linspace(0, len(texts) - 1, min(PER_LIBRARY, len(texts))).astype(int)
    return [(found[texts[i]], texts[i]) for i in chosen]


def _of_file(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            if len(text.split()) >= SHORTEST:
                yield text


def words(text: str) -> list[str]:
    """The first words of a text, without the libraries' names."""
    found = re.findall(r"[a-z]{2,}", text.lower())
    return [word for word in found if not GIVEAWAY.search(word)][:LONGEST]


def load() -> tuple[Tensor, Tensor, list[str]]:
    """All docstrings: ids of their words [N, LONGEST], 0 behind the end; the library's number [N];
    and the module of each."""
    samples = [
        (module, words(text), label)
        for label, library in enumerate(LIBRARIES)
        for module, text in docstrings(library)
    ]
    counts = Counter(word for _, text, _ in samples for word in text)
    # ties by the word, so that the numbering depends on the texts alone
    known = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    number = {word: i for i, word in enumerate(known, 2)}
    x = torch.zeros(len(samples), LONGEST, dtype=torch.int64)
    for row, (_, text, _) in zip(x, samples, strict=True):
        row[: len(text)] = torch.tensor([number.get(word, 1) for word in text])
    return x, torch.tensor([y for *_, y in samples]), [module for module, *_ in samples]


class BagOfWords(nn.Module):
    """Mean of the words' embeddings, and an MLP of one hidden layer on it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, len(LIBRARIES))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Ids [B, L] -> logits [B, libraries]."""
        is_word = (x > 0).unsqueeze(-1)
        total = (self.embedding(x) * is_word).sum(1)
        logits: Tensor = self.head(total / is_word.sum(1).clamp(min=1))
        return logits
