"""Random numbers of samples: SplitMix64 by coordinates, uniform, and independent of each other.

Statistical tests are of fixed seeds and have a false-alarm rate of 1e-6 each, had the words been
drawn anew.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fisher_forget.likelihood.streams import Streams

ALARM = 1e-6
LARGE = 2**64 - 1


def splitmix64(state: int) -> int:
    """Steele, Lea & Flood 2014, Fig. 14: the output for a state, in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & LARGE
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & LARGE
    return state ^ (state >> 31)


def word(*coordinates: int) -> int:
    """The k-th output of a generator that the word of the coordinates before seeds."""
    found = splitmix64((coordinates[0] + 0x9E3779B97F4A7C15) & LARGE)
    for k in coordinates[1:]:
        found = splitmix64((found + (k + 1) * 0x9E3779B97F4A7C15) & LARGE)
    return found


def bits(words: Tensor) -> np.ndarray:
    """[..., 64] of 0 and 1."""
    return ((words.unsqueeze(-1) >> torch.arange(64)) & 1).numpy()


def even(table: np.ndarray) -> bool:
    """Chi-square against equal frequencies."""
    return bool(stats.chisquare(table.ravel()).pvalue > ALARM)


def test_the_reference_is_splitmix64() -> None:
    """The first outputs of the generator with the seed 1234567, as published with it."""
    step = 0x9E3779B97F4A7C15
    assert splitmix64(1234567 + step) == 6457827717110365317
    assert splitmix64((1234567 + 2 * step) & LARGE) == 3203168211198807973


@given(
    st.integers(0, 2**70),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    st.integers(1, 3),
    st.lists(st.integers(1, 3), max_size=3),
)
def test_a_word_depends_on_its_coordinates_alone(
    seed: int, samples: list[int], draws: int, shape: list[int]
) -> None:
    found = Streams(seed, torch.tensor(samples)).words(draws, *shape)
    assert found.shape == (draws, len(samples), *shape)
    for at in np.ndindex(*found.shape):
        assert int(found[at]) % 2**64 == word(seed % 2**64, at[0], samples[at[1]], *at[2:])


def test_order_parts_and_padding_change_nothing() -> None:
    samples = torch.tensor([4, 0, 7, 7, 100_000])
    whole = Streams(3, samples)
    some = Streams(3, samples[[4, 1]])
    for draw in (Streams.words, Streams.uniform, Streams.signs):
        full = draw(whole, 3, 5, 70)
        assert torch.equal(full[:, [4, 1]], draw(some, 3, 5, 70))
        assert torch.equal(full[:2, :, :4, :66], draw(whole, 2, 4, 66))
        assert torch.equal(full[:, 2], full[:, 3])  # a sample that is read twice
    assert Streams(3, samples).signs(2).shape == Streams(3, samples).uniform(2).shape == (2, 5)


@pytest.mark.parametrize("along", ["seed", "sample", "draw", "position", "word"])
def test_uniform_and_independent_of_the_next(along: str) -> None:
    """Of 100,000 words in a row: each of the 64 bits, each byte, and each pair of a bit with that
    of the next word; 64 + 8 + 64 chi-squares, the smallest p-value times their number."""
    n, samples = 100_000, torch.arange(100_000)
    if along == "seed":
        words = torch.cat(
            [Streams(seed, samples[:1]).words(1, 1).flatten() for seed in range(2000)]
        )
    else:
        words = {
            "sample": lambda: Streams(0, samples).words(1),
            "draw": lambda: Streams(0, samples[:1]).words(n),
            "position": lambda: Streams(0, samples[:1]).words(1, n, 1),
            "word": lambda: Streams(0, samples[:1]).words(1, n),
        }[along]().flatten()
    each = bits(words)
    pairs = 2 * each[1:] + each[:-1]
    tables = [np.bincount(column, minlength=2) for column in each.T]
    tables += [np.bincount((words.numpy() >> 8 * k) & 255, minlength=256) for k in range(8)]
    tables += [np.bincount(column, minlength=4) for column in pairs.T]
    assert min(stats.chisquare(table).pvalue for table in tables) * len(tables) > ALARM


def test_neighbours_share_nothing() -> None:
    """Agreements of the signs of 512 samples, seeds and draws with those of each other: every pair
    is binomial. 3 x 130,816 pairs, so the bound of the p-value is 1e-6 over their number."""
    first = torch.tensor([0])
    sets = [
        Streams(0, torch.arange(512)).signs(1, 640)[0],
        Streams(0, first).signs(512, 640)[:, 0],
        torch.cat([Streams(seed, first).signs(1, 640)[0] for seed in range(512)]),
    ]
    for numbers in sets:
        signs = torch.where(numbers < 0, -1.0, 1.0)
        agreements = (signs @ signs.T).triu(1)[np.triu_indices(512, 1)]
        worst = (640 + float(agreements.abs().max())) / 2
        assert 2 * stats.binom.sf(worst - 1, 640, 0.5) * 3 * len(agreements) > ALARM


def test_uniform_numbers() -> None:
    numbers = Streams(1, torch.arange(200)).uniform(5, 100).double()
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > ALARM
    cells = (numbers[:, :, 1:] * 8).long() * 8 + (numbers[:, :, :-1] * 8).long()
    assert even(np.bincount(cells.flatten().numpy(), minlength=64))


def test_the_checks_above_can_fail() -> None:
    """A generator whose lowest bits alternate, as those of a plain congruential one do."""
    words = torch.arange(1000) * (0x9E3779B97F4A7C15 - 2**64)
    each = bits(words)
    pairs = np.bincount(2 * each[1:, 0] + each[:-1, 0], minlength=4)
    assert not even(pairs)
