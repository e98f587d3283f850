"""The order of samples: which one stands at each position of an endless run over a data set.

Every epoch is a permutation of its own, computed and not stored: a Feistel network with additions on the a x b grid
that just covers 0..n-1, walked on while it leads outside (Black & Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Memory is O(1), any position can be asked for at once, and lengthening a run changes nothing that came before.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 12
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / the golden ratio


def sample_at(position: int, num_samples: int, seed: int) -> int:
    """The sample, in 0..num_samples-1, at a global position (counted over epochs, from 0)."""
    return int(samples_at(np.array([position]), num_samples, seed)[0])


def samples_at(positions: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """As `sample_at` for each of `positions`, int64 [n]. A function of (seed, position // num_samples, num_samples)
    and the place within the epoch alone. Raises ValueError for a negative position or seed, or no samples."""
    positions = np.asarray(positions, dtype=np.int64)
    if num_samples < 1 or seed < 0 or (positions < 0).any():
        raise ValueError(f"no order of {num_samples} samples with seed {seed} at positions from {positions.min()}")
    epoch, place = np.divmod(positions, num_samples)
    key = _mix(_mix(np.array([(seed + GOLDEN) % 2**64], dtype=np.uint64)) ^ epoch.astype(np.uint64))
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    place = _feistel(place, key, rows, columns)
    while (outside := place >= num_samples).any():
        place = np.where(outside, _feistel(place, key, rows, columns), place)
    return place


def _feistel(place: np.ndarray, key: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A keyed permutation of 0..rows*columns-1."""
    row, column = np.divmod(place.astype(np.uint64), np.uint64(columns))
    for number in range(ROUNDS):
        round_key = key + np.uint64((number + 1) * GOLDEN % 2**64)
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
