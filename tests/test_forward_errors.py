"""Where forward fails, the error says why, and what to do about that."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fisher_forget import Categorical, estimate_curvature, forget, prepare
from fisher_forget import params as P
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ConfigError, CurvatureError, ModelError
from fisher_forget.evaluate.predictions import predict

DATA = blobs_data()
X, Y = DATA.tensors


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Fixed(Named):
    """Takes batches of one size only."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.layer(x.view(30, 4))  # type: ignore[no-any-return]


class Elsewhere(Named):
    """Makes a tensor that lies somewhere else."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.layer(x + torch.zeros(4, device="meta"))  # type: ignore[no-any-return]


class OtherType(Named):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.layer(x.double())  # type: ignore[no-any-return]


class Greedy(Named):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.layer(x + torch.empty(1 << 60).sum())  # type: ignore[no-any-return]


def swapped(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    return [(Y[i], X[i]) for i in range(count)]


def keyed(count: int = 40) -> list[dict[str, Tensor]]:
    return [{"pixels": X[i], "mask": X[i], "labels": Y[i]} for i in range(count)]


def message(call: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    return str(caught.value)


class TestTheFirstBatch:
    @pytest.mark.parametrize("likelihood", ["categorical", Categorical()])
    @pytest.mark.parametrize(
        "call",
        [
            lambda data, likelihood: forget(
                seeded(Named), data, [0], likelihood=likelihood, progress=False
            ),
            lambda data, likelihood: estimate_curvature(seeded(Named), data, likelihood),
            lambda data, _: predict(seeded(Named), resolve_split(data, [0])),
        ],
    )
    def test_is_laid_out_in_another_way(self, call: Any, likelihood: Any) -> None:
        text = message(lambda: call(keyed(), likelihood))
        assert "Named.forward(x, *, mask=None)" in text
        assert re.search(r"pixels=\[\d+, 4\] float32, mask=\[\d+, 4\] float32", text)
        assert "unpack=" in text
        assert "by position" in message(lambda: call(swapped(), likelihood))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda f: torch.complex(f, f), "complex outputs"),
        (lambda f: torch.fft.fft(f), "complex outputs"),
        (lambda f: f.to_sparse(), "sparse_coo outputs"),
    ],
)
def test_outputs_that_are_no_logits(after: Any, words: str) -> None:
    class After(Named):
        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return after(self.layer(x))  # type: ignore[no-any-return]

    assert words in message(lambda: forget(seeded(After), DATA, [0], progress=False))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2)])
def test_samples_that_are_merged(sizes: tuple[int, ...]) -> None:
    """Words of all bags in a row, and where each bag starts."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
            return self.head(self.bag(words, offsets))  # type: ignore[no-any-return]

    def collate(rows: Any) -> Any:
        starts = np.cumsum([0, *(len(words) for words, _ in rows[:-1])])
        return (torch.cat([words for words, _ in rows]), torch.tensor(starts)), torch.tensor(
            [label for _, label in rows]
        )

    data = [((torch.arange(sizes[i % 3]) * 5 + i) % 9, i % 3) for i in range(30)]
    loader = DataLoader(data, batch_size=10, collate_fn=collate)  # type: ignore[arg-type]
    assert "pad samples that are merged" in message(
        lambda: forget(seeded(Bags), loader, [0], progress=False)
    )


class TestLater:
    def test_fewer_samples_at_a_time(self) -> None:
        text = message(
            lambda: forget(seeded(Fixed), [(X[i], Y[i]) for i in range(30)], [0], progress=False)
        )
        assert "any number of samples" in text

    @pytest.mark.parametrize("count", [1, 8, 29])
    def test_any_call_after_the_first(self, count: int) -> None:
        text = message(lambda: P.call(seeded(Fixed), {}, (X[:count],), {}))
        assert f"on [{count}, 4] float32 by position" in text
        assert "number of samples" in text
        assert "unpack" not in text


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Elsewhere, "one device"),
        (OtherType, "cast what forward makes"),
        (Greedy, "batch_size"),
    ],
)
def test_what_torch_says_is_passed_on(build: Any, words: str) -> None:
    for call in (
        lambda: forget(seeded(build), DATA, [0], progress=False),
        lambda: estimate_curvature(seeded(build), DATA),
        lambda: predict(seeded(build), resolve_split(DATA, [0])),
    ):
        text = message(call)
        assert words in text
        assert "laid out" not in text


def test_forwards_without_a_signature() -> None:
    model = seeded(small_net)
    model.forward = torch.add  # type: ignore[method-assign, assignment]
    assert "Sequential.forward(...)" in message(lambda: P.call(model, {}, (X,), {}))


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), 3.5, "nonsense", -1, ""])
def test_devices(device: Any) -> None:
    with pytest.raises(ConfigError, match="device"):
        forget(seeded(small_net), DATA, [0], device=device, progress=False)


class TestSeeds:
    @pytest.mark.parametrize("seed", [3.5, -1, True, "0", torch.tensor(1)])
    def test_refused(self, seed: Any) -> None:
        for call in (
            lambda: forget(seeded(small_net), DATA, [0], seed=seed, drift=True, progress=False),
            lambda: estimate_curvature(seeded(small_net), DATA, seed=seed),
        ):
            with pytest.raises((ConfigError, CurvatureError), match="seed"):
                call()

    @pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
    def test_integers_of_numpy(self, kind: Any) -> None:
        plain, other = (
            forget(seeded(small_net), DATA, [0], seed=s, noise=None, drift=True, progress=False)
            for s in (3, kind(3))
        )
        assert json.dumps(plain.summary()["seed"]) == json.dumps(other.summary()["seed"]) == "3"
        for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for structure in ("low_rank", "diagonal"):
            estimate_curvature(
                seeded(small_net), DATA, structure=structure, kind="sketch", seed=kind(1)
            )

    def test_generators_are_torchs(self) -> None:
        options: dict[str, Any] = {"drift": True, "progress": False}
        result = forget(seeded(small_net), DATA, [0], noise=None, **options)
        prepared = prepare(seeded(small_net), DATA, progress=False)
        for wrong in (3, np.random.default_rng(0), "0", torch.default_generator):
            for call in (
                lambda g: forget(seeded(small_net), DATA, [0], generator=g, **options),
                lambda g: prepared.forget([0], generator=g),
                lambda g: result.with_noise(0.1, generator=g),
            ):
                with pytest.raises(ConfigError, match="generator") as caught:
                    call(wrong)
                assert "manual_seed" in str(caught.value)
        assert not prepared.requests

    def test_of_more_bits_than_torch_takes(self) -> None:
        result = forget(seeded(small_net), DATA, [0], seed=2**70, drift=True, progress=False)
        assert result.options.seed == 2**70
        assert (
            estimate_curvature(seeded(small_net), DATA, kind="sketch", seed=2**64 + 1).trace() > 0
        )
