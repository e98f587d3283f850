import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakrause.data.order import BlockOrder, key_of, permute

FOR_EVER = [(1, 3, [0, 1, 4], [3, 1, 0]), (1, 2, [2, 3], [0, 1])]


def epoch(number: int, size: int, seed: int) -> np.ndarray:
    return permute(np.arange(size), size, key_of(seed, number))


@pytest.mark.parametrize("number", [0, 1, 1000])
def test_every_epoch_of_every_small_size_is_a_permutation(number: int) -> None:
    for size in range(1, 301):
        assert np.array_equal(np.sort(epoch(number, size, seed=5)), np.arange(size)), size


@given(st.integers(301, 200_000), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=30)
def test_large_epochs_are_permutations(size: int, seed: int, number: int) -> None:
    assert np.array_equal(np.sort(epoch(number, size, seed)), np.arange(size))


@given(st.integers(1, 10**13), st.integers(0, 2**64), st.data())
def test_a_place_has_its_sample_whatever_is_asked_beside_it(size: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    key = key_of(seed)
    samples = permute(places, size, key)
    assert samples.tolist() == [permute(np.array([place]), size, key)[0] for place in places]
    assert samples.dtype == np.int64 and (samples >= 0).all() and (samples < size).all()


def test_the_order_is_for_ever() -> None:
    """Runs that are resumed rely on these very numbers."""
    assert [epoch(number, 5, seed=0).tolist() for number in (0, 1)] == [[0, 4, 2, 3, 1], [3, 1, 0, 4, 2]]
    number, first = divmod(10**12, 1_000_003)
    order = permute(np.arange(first, first + 4), 1_000_003, key_of(1234, number))
    assert order.tolist() == [147315, 668360, 18822, 312932]
    found = BlockOrder(np.array([3, 0, 2, 4]), (7, 8), 2).locate(np.arange(9, 14))
    assert [(e, b, chosen.tolist(), windows.tolist()) for e, b, chosen, windows in found] == FOR_EVER


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch(number, 1000, seed) for number in range(5) for seed in range(5)]
    agreements = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10 and 0.7 < np.mean(agreements) < 1.3  # two random permutations agree once


def test_all_orders_of_a_few_samples_are_equally_likely() -> None:
    for size in (3, 4, 5):
        counts = Counter(tuple(epoch(number, size, seed=3).tolist()) for number in range(4_000))
        expected = 4_000 / math.factorial(size)
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
    for words in ((-1,), (0, -1)):
        with pytest.raises(ValueError, match="no key of negative numbers"):
            key_of(*words)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    st.integers(1, 5),
    st.none() | st.tuples(st.integers(0, 99), st.integers(0, 2**64 - 1)),
)
def test_every_window_of_every_block_once_an_epoch(counts: list[int], group: int, seed: tuple[int, int] | None) -> None:
    order = BlockOrder(np.array(counts), seed, group)
    every = [(block, window) for block, count in enumerate(counts) for window in range(count)]
    epochs = []
    for number in range(3):
        samples = np.arange(number * order.size, (number + 1) * order.size)
        place = {}
        for e, block, chosen, windows in order.locate(samples):
            assert e == number
            place |= {i: (block, window) for i, window in zip(chosen.tolist(), windows.tolist(), strict=True)}
        epochs.append([place[i] for i in range(order.size)])
        assert sorted(epochs[-1]) == every
        # What is mixed are few blocks at a time, and which come next is known.
        blocks, starts = order._epoch(number)
        for first in range(0, len(blocks), group):
            part = epochs[-1][starts[first] : starts[min(first + group, len(blocks))]]
            assert {block for block, _ in part} <= set(blocks[first : first + group].tolist())
            if part:
                following = order.next_blocks(number * order.size + int(starts[first]))
                assert following == blocks[first + group : first + 2 * group].tolist()
    if seed is None:
        assert epochs == [every] * 3
    elif order.size > 12:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != every
    alone = [order.locate(np.array([sample]))[0] for sample in range(order.size)]
    assert [(block, int(windows[0])) for _, block, _, windows in alone] == epochs[0]
