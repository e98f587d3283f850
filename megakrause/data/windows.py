"""Sequences in the making: the documents of a block, packed into windows, written into the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from megakrause.batch import TokenBatch
from megakrause.data.order import permute
from megakrause.data.packing import Packing, Pieces, pack


class Rows:
    """A batch in the making, of b rows of s positions: padding wherever nothing is written."""

    def __init__(self, rows: int, seq_len: int, eos: int) -> None:
        self.eos = eos
        self.inputs = np.full((rows, seq_len), eos, np.int64)
        self.targets = np.full((rows, seq_len), eos, np.int64)
        self.mask = np.zeros((rows, seq_len), bool)
        # Padding sees itself alone: it must not change what documents are alone.
        self.doc_start = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))

    def batch(self, mask_documents: bool) -> TokenBatch:
        inputs, targets, mask, doc_start = map(torch.from_numpy, (self.inputs, self.targets, self.mask, self.doc_start))
        return TokenBatch(inputs, targets, mask, doc_start if mask_documents else None)


class PackedBlock(NamedTuple):
    """The documents of a block in windows."""

    starts: np.ndarray  # the first token of each document
    pieces: Pieces
    first: np.ndarray  # the first piece of each window, and the end

    @classmethod
    def of(cls, bounds: np.ndarray, seq_len: int, packing: Packing, key: np.uint64 | None) -> PackedBlock:
        """bounds: where documents begin and the last ends, [d + 1]. key: of their order; None: as they stand."""
        starts, lengths = bounds[:-1], np.diff(bounds)
        if key is not None and len(starts):
            order = permute(np.arange(len(starts)), len(starts), key)
            starts, lengths = starts[order], lengths[order]
        pieces = pack(lengths, seq_len, packing)
        windows = -(-int(bounds[-1] - bounds[0]) // seq_len)
        return cls(starts, pieces, np.searchsorted(pieces.window, np.arange(windows + 1)))

    def write(
        self,
        rows: Rows,
        numbers: np.ndarray,
        windows: np.ndarray,
        take: Callable[[np.ndarray], np.ndarray],
        prompts: bool = False,
    ) -> None:
        """Writes windows [n] into the rows of these numbers [n]. take: the tokens at some places; those that are only
        read as -1 - id. prompts: what continues a document of an earlier window is only read, too."""
        # The pieces of each window, then the tokens of each piece: where they come from and where they go.
        counts = self.first[windows + 1] - self.first[windows]
        row, piece = np.repeat(numbers, counts), _ranges(self.first[windows], counts)
        length, place, offset = self.pieces.length[piece], self.pieces.place[piece], self.pieces.offset[piece]
        token = self.starts[self.pieces.document[piece]] + offset
        begins = np.cumsum(length) - length
        source, goal = _ranges(token, length), _ranges(row * rows.inputs.shape[1] + place, length)
        stored = take(source)
        targets = np.maximum(stored, ~stored)
        inputs = np.empty_like(targets)
        inputs[1:] = targets[:-1]
        inputs[begins] = rows.eos
        cut = np.flatnonzero(offset)
        before = take(token[cut] - 1)
        inputs[begins[cut]] = np.maximum(before, ~before)
        rows.inputs.reshape(-1)[goal] = inputs
        rows.targets.reshape(-1)[goal] = targets
        learnt = stored >= 0
        rows.mask.reshape(-1)[goal] = learnt & np.repeat(offset == 0, length) if prompts else learnt
        rows.doc_start.reshape(-1)[goal] = np.repeat(place, length)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from starts[i] on, lengths[i] of them, for one i after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
