import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakrause.data.packing import Packing, num_windows, pack


@given(
    st.lists(st.integers(0, 40), max_size=60),
    st.integers(1, 25),
    st.sampled_from(["concat", "best_fit"]),
)
def test_every_token_has_one_place(lengths: list[int], length: int, how: Packing) -> None:
    pieces = pack(np.array(lengths), length, how)
    places = np.zeros(int(num_windows(np.array(sum(lengths)), length)) * length, int)
    tokens = [np.zeros(n, int) for n in lengths]
    for window, place, document, offset, size in zip(*(field.tolist() for field in pieces), strict=True):
        assert size > 0 and place + size <= length
        places[window * length + place :][:size] += 1
        tokens[document][offset : offset + size] += 1
    assert all((counts == 1).all() for counts in tokens)
    assert places.max(initial=0) <= 1 and places.sum() == sum(lengths)
    assert all(field.dtype == np.int64 for field in pieces)
    keys = list(zip(pieces.window.tolist(), pieces.place.tolist(), strict=True))
    assert keys == sorted(keys)


def cut(lengths: np.ndarray, length: int, how: Packing) -> int:
    """Documents that would fit in a window and are cut."""
    counts = np.bincount(pack(lengths, length, how).document, minlength=len(lengths))
    return int(((counts > 1) & (lengths <= length)).sum())


def test_best_fit_cuts_few() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 5000).astype(int) + 1
    assert cut(lengths, 2048, "best_fit") < 5 < 500 < cut(lengths, 2048, "concat")


def test_best_fit_worked_by_hand() -> None:
    """13 and 8 over windows of 10: a whole one; then 8, 6, 4, 3, 3 into three: [8] [6 4] [3 3], full but for 2 + 4."""
    pieces = pack(np.array([13, 4, 8, 3, 6]), 10, "best_fit")
    where = sorted(zip(*(field.tolist() for field in pieces), strict=True))
    assert where == [
        (0, 0, 0, 0, 10),
        (1, 0, 2, 0, 8),
        (2, 0, 4, 0, 6),
        (2, 6, 1, 0, 4),
        (3, 0, 0, 10, 3),
        (3, 3, 3, 0, 3),
    ]


def test_what_fits_nowhere_fills_the_room_that_is_left() -> None:
    pieces = pack(np.array([6, 6, 6, 6]), 8, "best_fit")
    assert sorted(zip(*(field.tolist() for field in pieces), strict=True)) == [
        (0, 0, 0, 0, 6),
        (0, 6, 3, 4, 2),
        (1, 0, 1, 0, 6),
        (1, 6, 3, 2, 2),
        (2, 0, 2, 0, 6),
        (2, 6, 3, 0, 2),
    ]


@pytest.mark.parametrize("how", ["concat", "best_fit"])
def test_nothing_packs_to_nothing(how: Packing) -> None:
    assert all(len(field) == 0 for field in pack(np.array([], int), 8, how))
    assert all(len(field) == 0 for field in pack(np.array([0, 0]), 8, how))
