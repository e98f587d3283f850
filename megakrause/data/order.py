"""The order of samples: which one stands at each position of an endless run over a data set.

An order is a permutation that is computed and not stored: a Feistel network with additions on the a x b grid that just
covers 0..n-1, walked on while it leads outside (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Memory
is O(1), any place can be asked for at once, and lengthening a run changes nothing that came before.

A data set is read by blocks (shards.py), so that what is read together lies together. An epoch permutes its blocks,
takes them in groups, and permutes the windows of each group. At 10^12 tokens in 10^9 documents there are about 15,000
blocks: an epoch's order is one array of as many integers, whatever the number of ranks.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

ROUNDS = 12
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / the golden ratio


def key_of(seed: int, *words: int) -> np.uint64:
    """A key for `permute`; another one for other numbers (each in 0..2^64-1). Raises ValueError for a negative one."""
    if min(seed, *words, 0) < 0:
        raise ValueError(f"no key of negative numbers {(seed, *words)}")
    key = _mix(np.array([(seed + GOLDEN) % 2**64], dtype=np.uint64))
    for word in words:
        key = _mix(key ^ np.uint64(word))
    return key[0]


def permute(places: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """What stands at each of `places` [n], all in 0..size-1, of a permutation of 0..size-1; int64 [n]."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    result = _feistel(np.asarray(places, dtype=np.int64), key, rows, columns)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _feistel(result[outside], key, rows, columns)
    return result


class BlockOrder:
    """The windows of blocks, endlessly, each once an epoch.

    counts: windows of each block. seed: of the order; None: as they stand. group: blocks that are mixed together."""

    def __init__(self, counts: np.ndarray, seed: tuple[int, ...] | None, group: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.size = int(self.counts.sum())  # windows of an epoch
        self._seed = seed
        self._group = group
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def locate(self, samples: np.ndarray) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """Where samples [n] (counted over epochs, from 0) are: a list of (epoch, block, which of `samples` [m], their
        windows in the block [m])."""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.size)
        found = []
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            blocks, starts = self._epoch(epoch)
            # Groups are `_group` blocks of the epoch's own order; starts[-1] is the end.
            group_starts = np.append(starts[:-1][:: self._group], starts[-1])
            groups = np.searchsorted(group_starts, places[of_epoch], "right") - 1
            for group in np.unique(groups).tolist():
                chosen = of_epoch[groups == group]
                inside = places[chosen] - group_starts[group]
                if self._seed is not None:
                    size = int(group_starts[group + 1] - group_starts[group])
                    inside = permute(inside, size, key_of(*self._seed, epoch, 1, group))
                inside += group_starts[group]
                ranks = np.searchsorted(starts, inside, "right") - 1
                for rank in np.unique(ranks).tolist():
                    mine = ranks == rank
                    found.append((epoch, int(blocks[rank]), chosen[mine], inside[mine] - starts[rank]))
        return found

    def next_blocks(self, sample: int) -> list[int]:
        """The blocks of the group after the one that a sample is in, in that epoch; empty at its end."""
        epoch, place = divmod(sample, self.size)
        blocks, starts = self._epoch(epoch)
        rank = int(np.searchsorted(starts, place, "right")) - 1
        first = (rank // self._group + 1) * self._group
        return blocks[first : first + self._group].tolist()

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in their order [n], the first window of each and the end [n + 1])"""
        blocks = np.arange(len(self.counts))
        if self._seed is not None:
            blocks = permute(blocks, len(blocks), key_of(*self._seed, epoch, 0))
        return blocks, np.concatenate([[0], np.cumsum(self.counts[blocks])])


def _feistel(place: np.ndarray, key: np.uint64, rows: int, columns: int) -> np.ndarray:
    """A keyed permutation of 0..rows*columns-1."""
    row, column = np.divmod(place.astype(np.uint64), np.uint64(columns))
    for number in range(ROUNDS):
        round_key = np.array([key], np.uint64) + np.uint64((number + 1) * GOLDEN % 2**64)  # an array wraps silently
        if number % 2:
            column = (column + _mix(row ^ round_key)) % np.uint64(columns)
        else:
            row = (row + _mix(column ^ round_key)) % np.uint64(rows)
    return (row * np.uint64(columns) + column).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that flips about half the output bits for any flipped input bit (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
