"""Documents into windows of one length: joined and cut, or packed so that few are cut.

A block's documents fill ceil(tokens / length) windows, whatever the way: no token is lost or taken twice, fewer than
`length` places of a block stay empty, and how many windows a block has is known without packing it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["concat", "best_fit"]


class Pieces(NamedTuple):
    """Parts of documents and where they go, int64 [n] each, by window and place."""

    window: np.ndarray
    place: np.ndarray  # in the window
    document: np.ndarray
    offset: np.ndarray  # in the document
    length: np.ndarray


def num_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Windows that so many tokens fill."""
    return -(-tokens // length)


def pack(lengths: np.ndarray, length: int, how: Packing) -> Pieces:
    """Documents of `lengths` [d] tokens into windows of `length`.

    concat: one after the other, cut where a window ends. best_fit: of a longer document, whole windows from its start;
    what is left of each, largest first, into the window where it leaves least room (Ding et al., "Fewer Truncations
    Improve Language Modeling", 2024), and what fits nowhere whole, cut, into the room that is left."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return _concat(lengths, length) if how == "concat" else _best_fit(lengths, length)


def _concat(lengths: np.ndarray, length: int) -> Pieces:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    starts = np.union1d(ends - lengths, np.arange(0, total, length))
    starts = starts[starts < total]
    document = np.searchsorted(ends, starts, "right")
    window, place = np.divmod(starts, length)
    return Pieces(window, place, document, starts - (ends - lengths)[document], np.diff(starts, append=total))


def _best_fit(lengths: np.ndarray, length: int) -> Pieces:
    total = int(lengths.sum())
    wholes, rests = np.divmod(lengths, length)
    document = np.repeat(np.arange(len(lengths)), wholes)
    num_whole = len(document)
    windows = np.arange(num_whole)
    offset = (windows - np.repeat(np.cumsum(wholes) - wholes, wholes)) * length
    whole = Pieces(windows, np.zeros_like(windows), document, offset, np.full_like(windows, length))

    count = -(-total // length) - num_whole
    room = [length] * count
    by_room: dict[int, list[int]] = {length: list(range(count - 1, -1, -1))}
    rooms = 1 << length if count else 0  # bit r: some window has room for exactly r
    order = np.argsort(-rests, kind="stable")
    order = order[rests[order] > 0]
    placed: list[tuple[int, int, int, int, int]] = []
    homeless: list[tuple[int, int]] = []

    for number, size in zip(order.tolist(), rests[order].tolist(), strict=True):
        fitting = rooms >> size
        if not fitting:
            homeless.append((number, size))
            continue
        best = size + (fitting & -fitting).bit_length() - 1
        window = by_room[best].pop()
        if not by_room[best]:
            rooms ^= 1 << best
        placed.append((window, length - best, number, int(wholes[number]) * length, size))
        left = room[window] = best - size
        if left:
            by_room.setdefault(left, []).append(window)
            rooms |= 1 << left

    holes = sorted((w for w in range(count) if room[w]), key=lambda w: room[w])  # the largest last
    for number, size in homeless:
        offset_in = int(wholes[number]) * length
        while size:
            window = holes[-1]
            part = min(size, room[window])
            placed.append((window, length - room[window], number, offset_in, part))
            room[window] -= part
            offset_in, size = offset_in + part, size - part
            if not room[window]:
                holes.pop()

    parts = np.array(placed, dtype=np.int64).reshape(-1, 5).T
    parts[0] += num_whole
    order = np.lexsort((parts[1], parts[0]))
    return Pieces(*(np.concatenate([field, part[order]]) for field, part in zip(whole, parts, strict=True)))
