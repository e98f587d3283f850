"""A corpus as sequences of one length, and several corpora mixed: what stands in each sample of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from megakrause.batch import TokenBatch
from megakrause.data.mixture import Mixture
from megakrause.data.order import BlockOrder, key_of, permute
from megakrause.data.packing import Packing, Pieces, num_windows, pack
from megakrause.data.shards import Corpus
from megakrause.errors import UserError


class Samples(Protocol):
    """What batches are made of."""

    def batch(self, samples: np.ndarray) -> TokenBatch:
        """Samples [b] counted over epochs from 0; -1: a row of padding."""
        ...


class _Rows:
    """A batch in the making: padding wherever nothing is written."""

    def __init__(self, rows: int, seq_len: int, eos: int) -> None:
        self.inputs = np.full((rows, seq_len), eos, np.int64)
        self.targets = np.full((rows, seq_len), eos, np.int64)
        self.mask = np.zeros((rows, seq_len), bool)
        # Padding sees itself alone: it must not change what documents are alone.
        self.doc_start = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))

    def batch(self, mask_documents: bool) -> TokenBatch:
        inputs, targets, mask, doc_start = map(torch.from_numpy, (self.inputs, self.targets, self.mask, self.doc_start))
        return TokenBatch(inputs, targets, mask, doc_start if mask_documents else None)


class TokenWindows:
    """A corpus as windows of `seq_len` targets, its documents packed within each block (packing.py).

    Every token is a target once an epoch. The inputs of a document are the separator `eos`, then its tokens but the
    last; a part of one that was cut begins with the token before it. What a window has beyond its documents is padding:
    `eos`, with loss_mask False. With `mask_documents`, nothing is seen of other documents, nor of what was cut off.

    seed None: in the corpus's own order, for evaluation. Else each epoch permutes blocks, the windows of each `group`
    of blocks, and the documents of each block, by keys of (seed, the corpus's content, epoch).
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        *,
        eos: int,
        mask_documents: bool,
        seed: int | None = None,
        packing: Packing = "concat",
        group: int = 8,
    ) -> None:
        self.corpus = corpus
        self.seq_len = seq_len
        self.eos = eos
        self.mask_documents = mask_documents
        self.packing = packing
        self._key = None if seed is None else (seed, int(corpus.fingerprint[:16], 16))
        self.order = BlockOrder(num_windows(corpus.block_tokens, seq_len), self._key, group)
        self._announced: list[int] = []  # blocks that will be wanted next
        self._packed = lru_cache(maxsize=2 * group)(self._pack)

    def __len__(self) -> int:
        """Windows of an epoch."""
        return self.order.size

    def batch(self, samples: np.ndarray) -> TokenBatch:
        """Samples [b] counted over epochs from 0; -1: a row of padding. Raises UserError for damaged data."""
        samples = np.asarray(samples)
        rows = _Rows(len(samples), self.seq_len, self.eos)
        there = np.flatnonzero(samples >= 0)
        self.fill(rows, there, samples[there])
        return rows.batch(self.mask_documents)

    def fill(self, rows: _Rows, numbers: np.ndarray, samples: np.ndarray) -> None:
        """Writes samples [n] into the rows of these numbers [n]."""
        for epoch, block, chosen, windows in self.order.locate(samples):
            starts, pieces, first = self._packed(epoch, block)
            shard, _ = self.corpus.documents_of(block)
            # The pieces of each window, then the tokens of each piece: where they come from and where they go.
            counts = first[windows + 1] - first[windows]
            row, piece = np.repeat(numbers[chosen], counts), _ranges(first[windows], counts)
            length, place, offset = pieces.length[piece], pieces.place[piece], pieces.offset[piece]
            token = starts[pieces.document[piece]] + offset
            begins = np.cumsum(length) - length
            source, goal = _ranges(token, length), _ranges(row * self.seq_len + place, length)
            targets = shard.tokens.take(shard.dtype, source, shard.base).astype(np.int64)
            inputs = np.empty_like(targets)
            inputs[1:] = targets[:-1]
            inputs[begins] = self.eos
            cut = np.flatnonzero(offset)
            inputs[begins[cut]] = shard.tokens.take(shard.dtype, token[cut] - 1, shard.base)
            self._check(block, source, targets)
            rows.inputs.reshape(-1)[goal] = inputs
            rows.targets.reshape(-1)[goal] = targets
            rows.mask.reshape(-1)[goal] = True
            rows.doc_start.reshape(-1)[goal] = np.repeat(place, length)
        if len(samples) and (following := self.order.next_blocks(int(samples.max()))) != self._announced:
            self._announced = following
            for block in following:
                self.corpus.announce(block)

    def _pack(self, epoch: int, block: int) -> tuple[np.ndarray, Pieces, np.ndarray]:
        """(first token of each document, the pieces, the first piece of each window and the end)"""
        _, bounds = self.corpus.documents_of(block)
        starts, lengths = bounds[:-1], np.diff(bounds)
        if self._key is not None:
            order = permute(np.arange(len(starts)), len(starts), key_of(*self._key, epoch, 2, block))
            starts, lengths = starts[order], lengths[order]
        pieces = pack(lengths, self.seq_len, self.packing)
        return starts, pieces, np.searchsorted(pieces.window, np.arange(self.order.counts[block] + 1))

    def _check(self, block: int, places: np.ndarray, tokens: np.ndarray) -> None:
        """Raises UserError for a token outside the vocabulary."""
        limit = self.corpus.vocab_size
        if limit is not None and len(tokens) and not 0 <= tokens.min() <= tokens.max() < limit:
            wrong = int(np.argmax((tokens < 0) | (tokens >= limit)))
            path = self.corpus.documents_of(block)[0].tokens.path
            raise UserError(
                f"{path}: token {tokens[wrong]}, number {places[wrong]}, is outside the vocabulary of {limit}; it is "
                "damaged or of another tokenizer"
            )


class MixedWindows:
    """Windows of several corpora, by weights (mixture.py)."""

    def __init__(self, sources: Sequence[TokenWindows], mixture: Mixture) -> None:
        self.sources = sources
        self.mixture = mixture

    def batch(self, samples: np.ndarray) -> TokenBatch:
        """Samples [b] of the run. Raises UserError for damaged data."""
        sources, inside = self.mixture.locate(np.asarray(samples))
        some = self.sources[0]
        rows = _Rows(len(sources), some.seq_len, some.eos)
        for number in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == number)
            self.sources[number].fill(rows, chosen, inside[chosen])
        return rows.batch(some.mask_documents)

    def describe(self, start: int, count: int) -> list[str]:
        """A line for each source: what it is, and its part in `count` samples from `start` on."""
        before, after = self.mixture.given_before(start), self.mixture.given_before(start + count)
        return [
            f"data: {(b - a) / max(count, 1):6.1%} from {source.corpus.prefix}: {source.corpus.num_tokens:,} tokens, "
            f"epochs {a / len(source):.2f} to {b / len(source):.2f}"
            for source, a, b in zip(self.sources, before, after, strict=True)
        ]

    def past(self, sample: int) -> list[dict[str, Any]]:
        """What decided the samples before one of the run, as plain values: equal pasts, equal samples."""
        names = [source.corpus.fingerprint for source in self.sources]
        return [
            {"start": segment.start, "mix": {n: u for n, u in zip(names, segment.units, strict=True) if u}}
            for segment in self.mixture.past(sample)
        ]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from starts[i] on, lengths[i] of them, for one i after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
