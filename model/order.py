"""In which order samples are drawn: by their number alone, so that any process finds any of them at once.

A dataset is gone through in epochs, each of which draws every sample once. In an epoch the shards are permuted and
taken in windows of so many, whose rows are permuted together; only the shards of a window are read at a time. Nothing
is remembered but what an epoch needs of its shards, and no permutation of rows is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
T = TypeVar("T")

BLOCK = 4096
"""Samples within which datasets are mixed in the proportion of their weights."""

_ROUNDS = 12
_SHARDS, _ROWS, _TURNS, _MIXTURE, _BATCH = range(5)  # what random numbers are for
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def seeds(seed: int, *place: int) -> np.random.SeedSequence:
    """The source of random numbers of a seed at a place, unlike that of every other place."""
    return np.random.SeedSequence(seed, spawn_key=place)


def batch_seeds(seed: int, number: int) -> np.random.SeedSequence:
    """The source of what is drawn while a batch is made."""
    return seeds(seed, _BATCH, number)


def permuted(places: Ints, size: int, keys: Words) -> Ints:
    """Where a pseudo-random permutation of 0 to size - 1 takes `places`: each in constant time and memory.

    An alternating Feistel network over the smallest near-square grid of `size` cells, walked until it is inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). `keys` are its rounds.
    """
    height = int(np.ceil(np.sqrt(size)))
    width = -(-size // height)
    out = np.asarray(places, np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = np.divmod(out[outside], np.uint64(width))
        for number, key in enumerate(keys):
            # Half of a word, for a sum must not overflow.
            if number % 2:
                left = (left + (mixed(right ^ key) >> np.uint64(32))) % np.uint64(height)
            else:
                right = (right + (mixed(left ^ key) >> np.uint64(32))) % np.uint64(width)
        out[outside] = left * np.uint64(width) + right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def mixed(words: Words) -> Words:
    """Every bit of a word made to depend on all of them; the last step of splitmix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))


class Drawn(NamedTuple):
    """Samples of a dataset: the shard and the row of each, int64 (n,).

    `turns`, uint64 (n,), is random for a sample and one more each time that it is repeated: modulo the number of crops,
    the crop to take.
    """

    shards: Ints
    rows: Ints
    turns: Words


class Stream:
    """The samples of one dataset, epoch after epoch, each `repeats` times in a row; position 0 is the first."""

    def __init__(self, sizes: Sequence[int], seed: int, number: int, *, window: int, repeats: int = 1) -> None:
        self._sizes = np.array(sizes, np.int64)
        self._total = int(self._sizes.sum())
        self._seed, self._number = seed, number
        self._window = window if window else len(sizes)
        self._repeats = repeats
        self._turns = self._keys(_TURNS)[0]
        self._epochs: dict[Hashable, _Epoch] = {}
        self._rounds: dict[Hashable, Words] = {}

    def at(self, positions: Ints) -> Drawn:
        """What is drawn at positions (n,)."""
        items, uses = np.divmod(positions, self._repeats)
        shards, rows = np.empty_like(items), np.empty_like(items)
        epochs, places = np.divmod(items, self._total)
        for epoch in np.unique(epochs).tolist():
            (members,) = np.nonzero(epochs == epoch)
            shards[members], rows[members] = self._within(epoch, places[members])
        turns = mixed(items.astype(np.uint64) ^ self._turns) + uses.astype(np.uint64)
        return Drawn(shards, rows, turns)

    def window(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a position."""
        epoch, place = divmod(position // self._repeats, self._total)
        return epoch, int(np.searchsorted(self._epoch(epoch).bounds, place, side="right")) - 1

    def shards_from(self, position: int) -> list[list[int]]:
        """The shards of the window that a position is in, and of the one after it."""
        epoch, window = self.window(position)
        last = len(self._epoch(epoch).bounds) - 2
        following = (epoch, window + 1) if window < last else (epoch + 1, 0)
        return [
            self._epoch(e).shards[w * self._window : (w + 1) * self._window].tolist()
            for e, w in ((epoch, window), following)
        ]

    def _within(self, epoch: int, places: Ints) -> tuple[Ints, Ints]:
        table = self._epoch(epoch)
        windows = np.searchsorted(table.bounds, places, side="right") - 1
        found = np.empty_like(places)
        for window in np.unique(windows).tolist():
            (members,) = np.nonzero(windows == window)
            first, end = table.bounds[window : window + 2].tolist()
            keys = _recent(self._rounds, (epoch, window), lambda: self._keys(_ROWS, epoch, window))  # noqa: B023
            found[members] = first + permuted(places[members] - first, end - first, keys)
        turns = np.searchsorted(table.ends, found, side="right")
        shards = table.shards[turns]
        return shards, found - (table.ends[turns] - self._sizes[shards])

    def _epoch(self, epoch: int) -> _Epoch:
        return _recent(self._epochs, epoch, lambda: self._made(epoch))

    def _made(self, epoch: int) -> _Epoch:
        shards = np.random.default_rng(seeds(self._seed, _SHARDS, self._number, epoch)).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        last = np.append(np.arange(self._window, len(ends), self._window), len(ends)) - 1
        return _Epoch(shards, ends, np.append(0, ends[last]))

    def _keys(self, what: int, *place: int) -> Words:
        keys: Words = seeds(self._seed, what, self._number, *place).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
        return keys


class _Epoch(NamedTuple):
    """The shards in their order, where each ends in it, and the bounds of the windows."""

    shards: Ints
    ends: Ints
    bounds: Ints


class Mixture:
    """Which dataset each sample is from, and where in that dataset's stream it is.

    After any number of blocks each dataset has been drawn from as its weight says, to within a few samples.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        self._seed = seed
        self._blocks: dict[Hashable, tuple[Ints, Ints]] = {}

    def at(self, first: int, count: int) -> tuple[Ints, Ints]:
        """(datasets, positions), int64 (count,) each, of samples first to first + count - 1."""
        if len(self._shares) == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count)
        parts = []
        while count:
            number, begin = divmod(first, BLOCK)
            end = min(BLOCK, begin + count)
            datasets, positions = _recent(self._blocks, number, lambda: self._block(number))  # noqa: B023
            parts.append((datasets[begin:end], positions[begin:end]))
            first, count = first + end - begin, count - (end - begin)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each dataset has, were they whole blocks."""
        # Each takes its share of what those before it left: never fewer for more samples, and the sum is exact.
        counts = []
        for share in self._shares:
            counts.append(share * samples // 1)
            samples -= counts[-1]
        return counts

    def _block(self, number: int) -> tuple[Ints, Ints]:
        before, after = self.taken(number * BLOCK), self.taken((number + 1) * BLOCK)
        quotas = np.subtract(after, before).astype(np.int64)
        rng = np.random.default_rng(seeds(self._seed, _MIXTURE, number))
        datasets = rng.permutation(np.repeat(np.arange(len(quotas)), quotas))
        positions = np.empty(BLOCK, np.int64)
        for dataset, (first, end) in enumerate(zip(before, after, strict=True)):
            positions[datasets == dataset] = np.arange(first, end)
        return datasets, positions


def _recent(held: dict[Hashable, Any], key: Hashable, make: Callable[[], T]) -> T:
    """What `key` names, made if it is not among the few last used."""
    found: T = held.pop(key) if key in held else make()
    held[key] = found
    if len(held) > 2:
        del held[next(iter(held))]
    return found
