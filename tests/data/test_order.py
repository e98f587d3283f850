import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakrause.data.order import sample_at, samples_at


def epoch(number: int, size: int, seed: int) -> np.ndarray:
    return samples_at(np.arange(number * size, (number + 1) * size), size, seed)


@pytest.mark.parametrize("number", [0, 1, 1000])
def test_every_epoch_of_every_small_size_is_a_permutation(number: int) -> None:
    for size in range(1, 301):
        assert np.array_equal(np.sort(epoch(number, size, seed=5)), np.arange(size)), size


@given(st.integers(301, 200_000), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=30)
def test_large_epochs_are_permutations(size: int, seed: int, number: int) -> None:
    assert np.array_equal(np.sort(epoch(number, size, seed)), np.arange(size))


@given(st.integers(1, 10**13), st.integers(0, 2**64), st.lists(st.integers(0, 10**17), min_size=1, max_size=20))
def test_a_position_has_its_sample_whatever_is_asked_beside_it(size: int, seed: int, positions: list[int]) -> None:
    samples = samples_at(np.array(positions), size, seed)
    assert samples.tolist() == [sample_at(position, size, seed) for position in positions]
    assert samples.dtype == np.int64 and (samples >= 0).all() and (samples < size).all()


def test_the_order_is_for_ever() -> None:
    """Runs that are resumed rely on these very numbers."""
    assert samples_at(np.arange(12), 5, seed=0).tolist() == [0, 4, 2, 3, 1, 3, 1, 0, 4, 2, 1, 0]
    assert samples_at(np.arange(4) + 10**12, 1_000_003, seed=1234).tolist() == [147315, 668360, 18822, 312932]


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch(number, 1000, seed) for number in range(5) for seed in range(5)]
    agreements = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10 and 0.7 < np.mean(agreements) < 1.3  # two random permutations agree once


def test_all_orders_of_a_few_samples_are_equally_likely() -> None:
    for size in (3, 4, 5, 6):
        counts = Counter(map(tuple, samples_at(np.arange(12_000 * size), size, seed=3).reshape(-1, size).tolist()))
        expected = 12_000 / math.factorial(size)
        assert len(counts) == math.factorial(size)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        freedom = len(counts) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom), size


@pytest.mark.parametrize("size", [10_000, 2**16, 99_991])
def test_neighbours_are_strangers(size: int) -> None:
    order = epoch(0, size, seed=9)
    limit = 5 / math.sqrt(size)
    for lag in (1, 2, 3, math.isqrt(size), size // 2):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit + 3 * lag / size**1.5, lag
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < limit
    assert (np.diff(order) == 1).sum() < 10
    blocks = np.histogram2d(np.arange(size), order, bins=10)[0]
    assert (abs(blocks - size / 100) < 6 * math.sqrt(size / 100)).all()


def test_nonsense_is_refused() -> None:
    for positions, size, seed in (([-1], 5, 0), ([0], 0, 0), ([0], 5, -1)):
        with pytest.raises(ValueError, match="no order"):
            samples_at(np.array(positions), size, seed)
