"""A fingerprint of code changes when the function does other things, and only then."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget._util.code import code_fingerprint
from fisher_forget.errors import ConfigError, FisherForgetWarning, StorageError
from fisher_forget.evaluate.ensemble import RetrainedEnsemble, train_members

BASE = """
import functools, enum, typing, math
from dataclasses import dataclass, field
import numpy as np
import torch
from torch import nn

RATE = 0.1
SIZES = {"hidden": [3, 4]}

def step(x, rate=0.5, *, twice=False):
    # a comment
    return x * rate * RATE

def plan():
    def inner(y):
        return [step(z) for z in y]
    return inner

class Base:
    def scale(self):
        return 2

@dataclass
class Trainer(Base):
    rate: float = 0.1
    sizes: list = field(default_factory=lambda: [1, 2])

    @property
    def double(self):
        return 2 * self.rate

    @staticmethod
    def build():
        return nn.Linear(3, 2)

    @functools.cached_property
    def lazy(self):
        return 4

    def __call__(self, idx, seed):
        return self.build(), self.scale(), SIZES["hidden"], self.double

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.factor = nn.Linear(2, 2), 3
        nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)
    def forward(self, x):
        return self.layer(x) * self.factor

@functools.lru_cache
def cached(n):
    return n + 1

def again(n):
    return 0 if n == 0 else again(n - 1)

WEIGHT = torch.arange(3.0)
trainer = Trainer()
net = Net()

def function(idx, seed): return plan()([seed]), cached(3), again(3), WEIGHT.sum(), net, math.pi
closed = (lambda a: lambda idx, seed: a + idx)(np.arange(3))
part = functools.partial(step, rate=2.0)
method = trainer.__call__
"""
NAMES = ("function", "closed", "part", "method", "trainer")


def marks(text: str = BASE) -> dict[str, str]:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(text), "<text>", "exec"), space)
    return {name: code_fingerprint(space[name]) for name in NAMES}


class TestChanges:
    @pytest.mark.parametrize(
        ("old", "new", "changed"),
        [
            ("RATE = 0.1", "RATE = 0.2", {"function", "part"}),
            ("rate=0.5", "rate=0.6", {"function", "part"}),
            ("twice=False", "twice=True", {"function", "part"}),
            ("x * rate", "x + rate", {"function", "part"}),
            ("[step(z) for z in y]", "[step(z + 1) for z in y]", {"function"}),
            ("return 2\n", "return 3\n", {"method", "trainer"}),
            ("rate: float = 0.1", "rate: float = 0.3", {"method", "trainer"}),
            ("[1, 2])", "[1, 3])", {"method", "trainer"}),
            ("2 * self.rate", "3 * self.rate", {"method", "trainer"}),
            ("nn.Linear(3, 2)", "nn.Linear(3, 4)", {"method", "trainer"}),
            ("return 4", "return 5", {"method", "trainer"}),
            ("[3, 4]}", "[3, 5]}", {"method", "trainer"}),
            ("x) * self.factor", "x) + self.factor", {"function"}),
            ("nn.Linear(2, 2), 3", "nn.Linear(2, 2), 4", {"function"}),
            ("n + 1", "n + 2", {"function"}),
            ("0 if n == 0", "1 if n == 0", {"function"}),
            ("arange(3.0)", "arange(4.0)", {"function"}),
            ("np.arange(3)", "np.arange(4)", {"closed"}),
            ("a + idx", "a - idx", {"closed"}),
            ("rate=2.0", "rate=3.0", {"part"}),
        ],
    )
    def test_tell(self, old: str, new: str, changed: set[str]) -> None:
        assert BASE.count(old) == 1
        before, after = marks(), marks(BASE.replace(old, new))
        assert {name for name in NAMES if before[name] != after[name]} == changed

    @pytest.mark.parametrize(
        ("old", "new"),
        [("# a comment", "# another\n\n"), ("RATE = 0.1", "OTHER = 3\nRATE = 0.1"), ("", "")],
    )
    def test_of_no_effect_do_not(self, old: str, new: str) -> None:
        assert marks() == marks(BASE.replace(old, new, 1))

    def test_the_same_in_another_process(self, tmp_path: Path) -> None:
        (tmp_path / "own_code.py").write_text(
            BASE + "\nimport own_code_helper\ndef names(): return own_code_helper.value\n"
        )
        (tmp_path / "own_code_helper.py").write_text("value = 1")
        program = (
            "from fisher_forget._util.code import code_fingerprint as c; import own_code as o; "
            f"print([c(getattr(o, n)) for n in {(*NAMES, 'names')!r}])"
        )

        def told(seed: str) -> str:
            command = [sys.executable, "-c", program]
            env = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "PYTHONHASHSEED": seed}
            return subprocess.run(
                command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
            ).stdout

        first = told("1")
        assert told("2") == first
        (tmp_path / "own_code_helper.py").write_text("value = 2")
        changed = [a != b for a, b in zip(first.split(), told("1").split(), strict=True)]
        assert changed == [False] * 5 + [True]


def of(value: Any) -> Callable[[], Any]:
    return lambda: value


class TestValues:
    def test_equal_ones_are_equal(self) -> None:
        data = TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
        same = TensorDataset(*(x.clone() for x in data.tensors))
        other = TensorDataset(data.tensors[0] + 1, data.tensors[1])
        assert code_fingerprint(of(data)) == code_fingerprint(of(same))
        assert code_fingerprint(of(data)) != code_fingerprint(of(other))
        assert code_fingerprint(of(DataLoader(data))) != code_fingerprint(of(DataLoader(other)))

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            (1, True),
            (1, 1.0),
            ("1", 1),
            ([1], [[1]]),
            ({"a": 1}, {"a": 2}),
            (np.float32(1), np.float64(1)),
            (torch.float32, torch.float64),
            (random.Random(0), random.Random(1)),
            (nn.ReLU(), nn.GELU()),
            (torch.relu, torch.sigmoid),
            (nn.Linear, nn.Conv1d),
            (nn.functional.relu, nn.functional.gelu),
            (np.sum, np.mean),
            (Path("a"), Path("b")),
        ],
    )
    def test_different_ones_are_different(self, one: Any, two: Any) -> None:
        assert code_fingerprint(of(one)) != code_fingerprint(of(two))
        assert code_fingerprint(of(one)) == code_fingerprint(of(one))

    def test_what_holds_itself(self) -> None:
        ring: list[Any] = [1]
        ring.append(ring)
        assert code_fingerprint(of(ring)) == code_fingerprint(of(ring))

    def test_deep_sharing_takes_no_time(self) -> None:
        value: list[Any] = [1]
        for _ in range(60):
            value = [value, value]
        assert code_fingerprint(of(value))

    @pytest.mark.parametrize("value", [torch.Generator(), threading.Lock(), object(), iter([1])])
    def test_what_cannot_be_told_is_refused(self, value: Any) -> None:
        with pytest.raises(StorageError, match="differs in every run"):
            code_fingerprint(of(value))
        with pytest.raises(StorageError, match="differs in every run"):
            code_fingerprint(functools.partial(print, sep=[value]))


TEMPLATE, DATA = nn.Linear(2, 2), TensorDataset(torch.zeros(6, 2), torch.zeros(6).long())


def filled(value: float) -> nn.Module:
    model = nn.Linear(2, 2)
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def scaled(by: Any) -> Callable[[Any, int], nn.Module]:
    return lambda idx, seed: filled(by if isinstance(by, float) else 0.0)


class TestCaches:
    def fit(self, train_fn: Any, folder: Path, **options: Any) -> float:
        options |= {"template": TEMPLATE, "seeds": (1, 2), "folder": folder, "progress": False}
        ensemble = RetrainedEnsemble.fit(train_fn, DATA, [0], **options)
        return float(ensemble.retrained.models[0].bias[0])

    def test_another_function_is_trained_anew(self, tmp_path: Path) -> None:
        assert self.fit(scaled(1.0), tmp_path) == 1
        assert self.fit(scaled(1.0), tmp_path) == 1
        for named in ({}, {"fingerprint": "settings"}, {"fingerprint": "settings"}):
            value = float(2 + len(named))
            with pytest.warns(FisherForgetWarning, match="trained anew"):
                assert self.fit(scaled(value), tmp_path, **named) == value
            with pytest.warns(FisherForgetWarning, match="trained anew"):
                assert self.fit(scaled(value + 0.5), tmp_path, **named) == value + 0.5

    def test_the_version_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fit(scaled(1.0), tmp_path)
        module = sys.modules["fisher_forget.evaluate.ensemble"]  # `evaluate` is a function, too
        monkeypatch.setattr(module, "_version", lambda: "0.0")
        with pytest.warns(FisherForgetWarning, match="trained anew"):
            self.fit(scaled(1.0), tmp_path)

    def test_what_cannot_be_told_needs_a_name(self, tmp_path: Path) -> None:
        held = scaled(torch.Generator())
        with pytest.raises(ConfigError, match=r"Generator object at 0x.*fingerprint="):
            self.fit(held, tmp_path)
        with pytest.raises(ConfigError, match="fingerprint="):
            train_members(
                functools.partial(held, None), [1], template=TEMPLATE, folder=tmp_path / "members"
            )
        assert not list(tmp_path.rglob("*.safetensors"))
        assert self.fit(held, tmp_path, fingerprint="v1") == 0
        with pytest.warns(FisherForgetWarning, match="trained anew"):
            self.fit(held, tmp_path, fingerprint="v2")
        options: Any = {"template": TEMPLATE, "seeds": (1, 2), "progress": False}
        RetrainedEnsemble.fit(held, DATA, [0], **options)  # nothing is stored
