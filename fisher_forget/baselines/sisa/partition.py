"""How SISA cuts data into shards and slices, and what a deletion is then expected to cost.

A cut is made once, before training, from indices, labels or deletion probabilities, never from
inputs. A deletion takes a sample out of its slice and moves no other sample.

Source: Bourtoule et al. 2021 (arXiv:1912.03817), sections 4 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisher_forget._util.checks import is_whole
from fisher_forget.data.split import Indices
from fisher_forget.errors import ConfigError

Shard = tuple[Indices, ...]  # the indices of each slice
Cut = tuple[Shard, ...]


def uniform(samples: int, shards: int, slices: int, seed: int) -> Cut:
    """Samples dealt at random; shards, and slices of a shard, differ in size by one sample at most.

    Args:
        samples: Number of samples N.
        shards: S.
        slices: R, of every shard.
        seed: Of the permutation.

    Raises:
        ConfigError: If a number is below 1, or S R exceeds N.
    """
    _check(samples, shards, slices)
    order = np.random.default_rng(seed).permutation(samples)
    return tuple(_sliced(part, slices) for part in np.array_split(order, shards))


def balanced(labels: ArrayLike, shards: int, slices: int, seed: int) -> Cut:
    """Every class spread evenly: its counts in two shards, and in two slices of a shard, differ by
    one at most.

    The sizes of shards, and of slices of a shard, differ by one at most as well: the samples are
    put in the order of their classes, at random within each, and dealt in turn like cards.

    Args:
        labels: Class of every sample [N], of any integer or string type.
        shards: S.
        slices: R, of every shard.
        seed: Of the order within a class.

    Raises:
        ConfigError: As for `uniform`, or if labels are not one a sample.
    """
    classes = np.asarray(labels)
    if classes.ndim != 1 or classes.dtype.kind not in "iubUS":
        got = f"labels of shape {classes.shape} and dtype {classes.dtype}"
        fix = "Pass the class of every sample in a flat array."
        raise ConfigError(got, "one class a sample, integer or string", fix)
    _check(len(classes), shards, slices)
    order = _ascending(classes, seed)
    # dealing in turn from classes in order: no shard gets two more of a class than another
    return tuple(
        tuple(np.sort(part[number::slices]) for number in range(slices))
        for part in (order[number::shards] for number in range(shards))
    )


def by_deletion_probability(
    probabilities: ArrayLike, shards: int, slices: int, seed: int, exponent: float = 0.5
) -> Cut:
    """Samples that are likely to be deleted are put together in small shards.

    Samples are sorted by probability p and cut where the sum of p^a comes closest to k/S of its
    total. A request then retrains sum_s P_s n_s / P points on average, with P_s the sum of p and
    n_s the size of shard s:

        a = 1/2:  about (sum sqrt p)^2 / (S sum p), the least; below N/S by the Cauchy-Schwarz
                  inequality
        a = 1:    N/S, as without knowing p: every shard has the same expected number of requests
        a = 0:    N/S: shards of one size; several requests at once hit fewer of them

    (about, because a shard holds different p; the approximation improves with S). Within a shard
    the likeliest samples are in the last slice, where a deletion costs least. Every shard keeps at
    least R samples.

    Args:
        probabilities: Deletion probability of every sample [N].
        shards: S.
        slices: R, of every shard.
        seed: Of the order among equal probabilities.
        exponent: a, in [0, 1].

    Raises:
        ConfigError: As for `uniform`, or if probabilities or exponent are outside [0, 1], or all
            probabilities zero.

    Source: Bourtoule et al. 2021, section 7, which fills shards up to the same expected number of
    requests (a = 1).
    """
    chances = np.asarray(probabilities, dtype=np.float64)
    if chances.ndim != 1 or not bool(((chances >= 0) & (chances <= 1)).all()) or not chances.any():
        raise ConfigError(
            f"deletion probabilities of shape {chances.shape} that are not all in [0, 1], or are "
            "all zero",
            "one probability a sample, at least one of them above 0",
            "Leave `probabilities` out if nothing is known about who will be deleted.",
        )
    if not 0 <= exponent <= 1:
        raise ConfigError(f"exponent={exponent!r}", "a number in [0, 1]", "Correct `exponent`.")
    total = len(chances)
    _check(total, shards, slices)
    order = _ascending(chances, seed)
    # minimising sum_s P_s n_s for small shards means equal integrals of sqrt(p)
    shares = chances[order] ** exponent
    sums = np.cumsum(shares)
    middles = sums - shares / 2  # a sample goes to the side where most of it lies
    ends = [0]
    for number in range(1, shards):
        wished = int(np.searchsorted(middles, sums[-1] * number / shards))
        ends.append(min(max(wished, ends[-1] + slices), total - (shards - number) * slices))
    return tuple(_sliced(part, slices) for part in np.split(order, ends[1:]))


def epochs_per_slice(epochs: float, slices: int) -> float:
    """2 e / (R + 1): epochs of each of R slices that read as many samples as e epochs without.

    Slice r trains on r/R of the shard, and the sum of r/R over r is (R + 1) / 2. Round it as the
    training needs.

    Raises:
        ConfigError: If e is not positive, or R is below 1.
    """
    if not 0 < epochs < math.inf:
        raise ConfigError(f"epochs={epochs!r}", "a finite number above 0", "Correct `epochs`.")
    check_at_least(1, slices=slices)
    return 2 * epochs / (slices + 1)


def expected_points_sequential(samples: int, shards: int, requests: int) -> float:
    """Points retrained by K requests, one by one, for different samples at random; R = 1.

        sum_s n_s (n_s - 1) / (N (N - 1)) * sum_{i=1}^{K} (N - i)

    with n_s the sizes of shards, which differ by one at most. Exact: request i retrains what shares
    a shard with its sample, which is sum_s n_s (n_s - 1) / N others on average, and each of these
    is still there with chance (N - i) / (N - 1). The published
    (N/S + 1/(2S) - 1) K - K^2 / (2S) lets requests hit small shards as often as large ones, which
    is less.

    Args:
        samples: N.
        shards: S.
        requests: K, of one sample each; at most N.

    Raises:
        ConfigError: If a number is below 1, or K exceeds N.
    """
    _requests(samples, shards, requests)
    sizes = _sizes(samples, shards)
    pairs = float((sizes * (sizes - 1)).sum())  # 0 for one sample, whose N - 1 is 0, too
    left = requests * samples - requests * (requests + 1) / 2
    return pairs * left / (samples * max(samples - 1, 1))


def expected_points_batch(samples: int, shards: int, requests: int) -> float:
    """Points retrained by K requests that are served together, for different samples at random;
    R = 1.

        sum_s n_s (1 - C(N - n_s, K) / C(N, K)) - K

    with n_s the sizes of shards, which differ by one at most. Exact: the fraction is the chance
    that none of the K samples lies in shard s, and the K samples themselves are not retrained.

    Args:
        samples: N.
        shards: S.
        requests: K, of one sample each; at most N.

    Raises:
        ConfigError: If a number is below 1, or K exceeds N.
    """
    _requests(samples, shards, requests)
    sizes = _sizes(samples, shards)
    drawn_before = np.arange(requests)
    # the i-th sample misses a shard that was missed so far; a factor is 0 where it cannot
    missed = [np.prod(1 - size / (samples - drawn_before)) for size in sizes]
    return float(sizes @ (1 - np.array(missed))) - requests


def slicing_fraction(slices: int) -> float:
    """2/3 + 1/(3R): expected cost of a deletion from R slices over that of retraining the shard.

    The slice hit is uniform, and training goes on from the checkpoint before it with
    `epochs_per_slice`: the mean of sum_{j >= r} j/R * 2/(R + 1) over r = 1 ... R. It saves a third
    at most.

    Raises:
        ConfigError: If R is below 1.
    """
    check_at_least(1, slices=slices)
    return 2 / 3 + 1 / (3 * slices)


def kept_checkpoints(slices: int, room: int) -> frozenset[int]:
    """After how many slices the `room` checkpoints are kept: spread evenly, the last always.

    Raises:
        ConfigError: If a number is below 1.

    Example:
        >>> sorted(kept_checkpoints(8, 3))
        [3, 6, 8]
    """
    check_at_least(1, slices=slices, room=room)
    room = min(slices, room)
    # rounded up, so that the last number is always R
    return frozenset(-(-slices * number // room) for number in range(1, room + 1))


def retained(cut: Cut, forgotten: Indices | Sequence[int]) -> Cut:
    """The same cut without the forgotten samples; slices may become empty."""
    return tuple(
        tuple(piece[~np.isin(piece, np.asarray(forgotten, dtype=np.int64))] for piece in shard)
        for shard in cut
    )


def check_at_least(least: int, **numbers: int) -> None:
    """Refuse a number that is not an integer of at least `least`.

    Raises:
        ConfigError: With the name of the first that is not.
    """
    for name, value in numbers.items():
        if not is_whole(value, least):
            raise ConfigError(
                f"{name}={value!r}", f"an integer of at least {least}", f"Correct `{name}`."
            )


def _ascending(values: NDArray[np.generic], seed: int) -> Indices:
    """Indices that sort the values, in random order among equal ones."""
    order = np.random.default_rng(seed).permutation(len(values))
    return order[np.argsort(values[order], kind="stable")]


def _sliced(part: Indices, slices: int) -> Shard:
    return tuple(np.sort(piece) for piece in np.array_split(part, slices))


def _sizes(samples: int, shards: int) -> NDArray[np.float64]:
    """Sizes [S] of shards that differ by one at most."""
    return (samples // shards + (np.arange(shards) < samples % shards)).astype(np.float64)


def _check(samples: int, shards: int, slices: int) -> None:
    check_at_least(1, samples=samples, shards=shards, slices=slices)
    if shards * slices > samples:
        got = f"{shards} shards of {slices} slices for {samples} samples"
        fix = "Ask for fewer shards or slices."
        raise ConfigError(got, "at least one sample in every slice", fix)


def _requests(samples: int, shards: int, requests: int) -> None:
    check_at_least(1, samples=samples, shards=shards, requests=requests)
    if requests > samples:
        got = f"{requests} requests for {samples} samples"
        raise ConfigError(got, "at most one a sample", "Lower `requests`.")
