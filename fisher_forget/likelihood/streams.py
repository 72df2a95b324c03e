"""Random numbers of samples, each a function of what it is for and not of the order of drawing.

What a pass over all samples adds, a pass over some of them can then take away again, whatever the
batches, the order and the worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 0x9E3779B97F4A7C15 - 2**64  # odd, so that the states of a stream are all different
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class Streams:
    """A stream of random words for each sample of a batch.

    A word is a hash of (seed, draw, sample, position): each coordinate in turn chooses a state of
    the SplitMix64 generator that the word before it seeds (Steele, Lea & Flood 2014, Fig. 14).

    Attributes:
        seed: A whole number of at least 0; of larger ones the lowest 64 bits count.
        samples: Indices in the data set [B], int64.

    Example:
        >>> whole = Streams(0, torch.tensor([3, 5, 8])).words(2, 4)
        >>> torch.equal(whole[:, 1:2], Streams(0, torch.tensor([5])).words(2, 4))
        True
    """

    seed: int
    samples: Tensor

    def words(self, draws: int, *shape: int) -> Tensor:
        """Uniform 64-bit words [draws, B, *shape], int64.

        Padding a sample adds words, and changes none.
        """
        seed = int(self.seed) % 2**64
        words = _mixed(torch.tensor(seed - 2**64 if seed >= 2**63 else seed) + STEP)
        for coordinate in (torch.arange(draws), self.samples, *map(torch.arange, shape)):
            along = coordinate.to(self.samples.device)
            words = _mixed(words.to(along.device).unsqueeze(-1) + (along + 1) * STEP)
        return words

    def uniform(self, draws: int, *shape: int) -> Tensor:
        """Numbers in [0, 1) [draws, B, *shape], float64: multiples of 2^-53."""
        return _shifted(self.words(draws, *shape), 11).double() * 2.0**-53

    def signs(self, draws: int, *shape: int) -> Tensor:
        """Numbers of random sign [draws, B, *shape], int32: bits of words, 64 of a word."""
        *lead, last = shape or (1,)
        words = self.words(draws, *lead, -(-last // 64))
        shifts = torch.arange(32, dtype=torch.int32, device=words.device)
        bits = words.view(torch.int32).unsqueeze(-1) << shifts  # each bit in turn becomes the sign
        return bits.flatten(-2)[..., :last].reshape(draws, len(self.samples), *shape)


def _mixed(state: Tensor) -> Tensor:
    """The output of SplitMix64 for a state; products are modulo 2^64."""
    for shift, factor in ROUNDS:
        state = (state ^ _shifted(state, shift)) * factor
    return state ^ _shifted(state, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifted right as numbers without a sign."""
    shifted: Tensor = (words >> bits) & (2 ** (64 - bits) - 1)
    return shifted
