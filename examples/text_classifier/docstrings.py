"""A text classifier that is not ours: DistilBERT of `transformers`, telling from which library a
sentence comes.

The text needs no download: it is the docstrings of four libraries that are installed with
fisher_forget. Classes, in this order: matplotlib, pandas, sklearn, torch. A sentence that names its
library is left out.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

LIBRARIES = ("matplotlib", "pandas", "sklearn", "torch")
NAMES = re.compile(
    "|".join([*LIBRARIES, "numpy", "scipy", "scikit", "pyplot", "mpl"]) + r"|\b(np|pd|plt)\b",
    re.IGNORECASE,
)
WORDS = range(12, 40)  # of a sentence
FILES = 40  # read at a time
PADDING, UNKNOWN, FIRST = "[PAD]", "[UNK]", "[CLS]"

Encoded = tuple[dict[str, Tensor], Tensor]


def load(
    per_class: int = 800, test_per_class: int = 100, vocabulary: int = 1500, tokens: int = 24
) -> tuple[Encoded, Encoded]:
    """(training data, test data), each ({input_ids [N, T], attention_mask [N, T]}, targets [N]).

    Args:
        per_class: Training sentences of each library.
        test_per_class: Test sentences of each.
        vocabulary: Most tokens; they are learnt from the training sentences.
        tokens: T: longer sentences are cut, shorter ones padded.
    """
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, library in enumerate(LIBRARIES):
        chosen = list(itertools.islice(sentences(library), per_class + test_per_class))
        train += [(text, label) for text in chosen[:per_class]]
        test += [(text, label) for text in chosen[per_class:]]
    tokenizer = learnt([text for text, _ in train], vocabulary, tokens)
    return encoded(tokenizer, train), encoded(tokenizer, test)


def build(
    classes: int = 4,
    vocabulary: int = 1500,
    tokens: int = 24,
    width: int = 64,
    layers: int = 1,
    spread: float = 0.1,
) -> nn.Module:
    """DistilBERT, much smaller than the published one, with random weights from the global seed."""
    config = DistilBertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
        dim=width,
        hidden_dim=2 * width,
        n_layers=layers,
        n_heads=4,
        num_labels=classes,
        pad_token_id=0,
        initializer_range=spread,
    )
    return DistilBertForSequenceClassification(config)


def sentences(library: str) -> Iterator[str]:
    """Different sentences of a library's docstrings in an order that mixes its files; nothing is
    imported.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{library} is not installed")
    files = sorted(
        path for path in Path(spec.origin).parent.rglob("*.py") if "tests" not in path.parts
    )
    mixed, seen = random.Random(0), set[str]()
    mixed.shuffle(files)
    for start in range(0, len(files), FILES):
        found = sorted(
            {text for path in files[start : start + FILES] for text in in_file(path)} - seen
        )
        seen.update(found)
        mixed.shuffle(found)
        yield from found


def in_file(path: Path) -> Iterator[str]:
    """Sentences in the docstrings of a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            yield from prose(ast.get_docstring(node) or "")


def prose(docstring: str) -> Iterator[str]:
    """Sentences in it that start with a capital, end with a full stop and do not name a library."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", text):
            plain = re.fullmatch(r"[A-Z][^<>=|_{}\\]*\.", sentence)
            if plain and len(sentence.split()) in WORDS and not NAMES.search(sentence):
                yield sentence


def learnt(texts: list[str], vocabulary: int, tokens: int) -> Tokenizer:
    """A byte-pair tokenizer of these texts, which cuts and pads to one length."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [PADDING, UNKNOWN, FIRST]  # with the ids 0, 1, 2
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # DistilBERT classifies by what it made of the first token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A", special_tokens=[(FIRST, 2)]
    )
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=0, pad_token=PADDING)
    return tokenizer


def encoded(tokenizer: Tokenizer, samples: list[tuple[str, int]]) -> Encoded:
    """Token ids, attention mask and labels of (text, label) pairs."""
    found = tokenizer.encode_batch([text for text, _ in samples])
    inputs = {
        "input_ids": torch.tensor([e.ids for e in found]),
        "attention_mask": torch.tensor([e.attention_mask for e in found]),
    }
    return inputs, torch.tensor([label for _, label in samples])
