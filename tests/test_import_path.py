"""Functions of the user's own, by import path: found, called with a seed, and told apart when they
go wrong."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from fisher_forget.errors import ConfigError
from fisher_forget.experiments.import_path import find, is_own, make


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """module(name, code): a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))

    return write


DRAWS = """
    import random, numpy, torch
    def drawn(count=1, scale=1.0):
        draws = (random.random, numpy.random.rand, torch.rand(()).item)
        return [scale * draw() for _ in range(count) for draw in draws]
    def broken(count=1):
        return 1 / (count - 1)
    class Holder:
        @staticmethod
        def inner(): return 5
    number = 3
"""


def test_only_a_colon_makes_a_path():
    assert is_own("a.b:c", "the model")
    assert not is_own("cnn", "the model")


class TestFind:
    def test_nested_names(self, module):
        module("own_found", DRAWS)
        assert find("own_found:Holder.inner", "the model")() == 5

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("own_absent.part:f", ["no module 'own_absent'", "folder that holds 'own_absent'"]),
            ("own_wrong:draw", ["no 'draw' in it", "Did you mean 'drawn'?"]),
            ("own_wrong:zzz", ["no 'zzz'", "after the colon"]),
            ("own_wrong:number", ["which is a int", "a function or a class"]),
            ("own_wrong:", ["no '' in it"]),
            ("own_wrong.deeper:f", ["own_wrong"]),
        ],
    )
    def test_mistakes(self, module, path, words):
        module("own_wrong", DRAWS)
        with pytest.raises(ConfigError) as caught:
            find(path, "the model")
        assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize(
        ("code", "word"),
        [
            ("import own_other_absent", "own_other_absent"),
            ("1 / 0", "ZeroDivision"),
            ("x =", "Syntax"),
        ],
    )
    def test_a_module_that_fails_is_not_a_missing_one(self, module, code, word):
        name = f"own_fails_{word.lower()}"
        module(name, code)
        with pytest.raises(ConfigError) as caught:
            find(f"{name}:f", "the data")
        assert f"while importing '{name}'" in str(caught.value)
        assert word in str(caught.value)
        assert "--debug" in caught.value.fix


class TestMake:
    def test_the_seed_alone_decides_and_nothing_global_moves(self, module):
        module("own_seeded", DRAWS)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - as given
        first, again, other = (
            make("own_seeded:drawn", "the data", {"count": 2}, seed=seed) for seed in (3, 3, 4)
        )
        assert first == again
        assert not set(first) & set(other)  # each of the three generators was seeded
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])

    def test_options_that_do_not_fit(self, module):
        module("own_options", DRAWS)
        with pytest.raises(ConfigError, match=r"'depth'.*own_options:drawn\(count=1, scale=1.0\)"):
            make("own_options:drawn", "the model", {"depth": 3}, seed=0)

    def test_a_function_that_fails(self, module):
        module("own_broken", DRAWS)
        with pytest.raises(ConfigError, match="ZeroDivisionError from own_broken:broken") as caught:
            make("own_broken:broken", "the model", {}, seed=0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)  # --debug shows it
