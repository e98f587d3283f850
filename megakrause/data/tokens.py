"""A corpus as a data set of sequences: its stream of tokens, cut into windows, with the bounds of documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megakrause.batch import TokenBatch
from megakrause.data.shards import Corpus
from megakrause.errors import UserError


class TokenWindows:
    """Window i has tokens [i*L, (i+1)*L) as inputs and those one further on as targets, L = `seq_len`.

    So every token but the corpus's first is a target in exactly one window. What a window has beyond the corpus's end
    is padding: `eos`, with loss_mask False; a window wholly beyond it is all padding.

    With `mask_documents`, a document is seen from the separator before it on, or, where none stands there, from its
    first token, which is then not to be learnt, for nothing announces it. A document's bounds are those of the
    corpus's index; a separator inside one is a token like any other.
    """

    def __init__(self, corpus: Corpus, seq_len: int, *, eos: int, mask_documents: bool) -> None:
        """Raises UserError for a corpus of fewer than two tokens: it has nothing to predict."""
        if corpus.num_tokens < 2:
            raise UserError(f"corpus {corpus.prefix} has {corpus.num_tokens} token; at least 2 are needed")
        self.corpus = corpus
        self.seq_len = seq_len
        self.eos = eos
        self.mask_documents = mask_documents

    def __len__(self) -> int:
        """Number of windows."""
        return -(-(self.corpus.num_tokens - 1) // self.seq_len)

    def batch(self, indices: Sequence[int] | np.ndarray) -> TokenBatch:
        """Windows `indices` [b], each >= 0, of seq_len tokens."""
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        rows = self._read(starts)
        positions = np.arange(self.seq_len)
        loss_mask = starts[:, None] + positions + 1 < self.corpus.num_tokens
        doc_start = None
        if self.mask_documents:
            doc_start = np.zeros((len(starts), self.seq_len), dtype=np.int32)
            row, position = self._documents_within(starts)
            announced = rows[row, position - 1] == self.eos
            loss_mask[row, position - 1] &= announced
            first = position - announced
            seen = first < self.seq_len
            doc_start[row[seen], first[seen]] = first[seen]
            np.maximum.accumulate(doc_start, axis=1, out=doc_start)
        tokens = torch.from_numpy(rows)
        return TokenBatch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.from_numpy(loss_mask),
            None if doc_start is None else torch.from_numpy(doc_start),
        )

    def _read(self, starts: np.ndarray) -> np.ndarray:
        """Tokens [start, start + seq_len] of each, padded, int64 [b, seq_len + 1].

        Raises UserError for one outside the vocabulary."""
        length = self.seq_len + 1
        rows = np.full((len(starts), length), self.eos, dtype=np.int64)
        whole = starts + length <= self.corpus.num_tokens
        rows[whole] = self.corpus.read_rows(starts[whole], length)
        for row in np.flatnonzero(~whole):
            available = max(0, self.corpus.num_tokens - int(starts[row]))
            if available:
                rows[row, :available] = self.corpus.read(int(starts[row]), available)
        limit = self.corpus.vocab_size
        if limit is not None and len(rows) and not 0 <= rows.min() <= rows.max() < limit:
            row, position = np.argwhere((rows < 0) | (rows >= limit))[0]
            raise UserError(
                f"corpus {self.corpus.prefix}: token {rows[row, position]} at {starts[row] + position} is outside the "
                f"vocabulary of {limit}; the corpus is damaged or of another tokenizer"
            )
        return rows

    def _documents_within(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(window in the batch, position in it from 1 to seq_len) of every document that begins there."""
        bounds = self.corpus.document_starts
        low = np.searchsorted(bounds, starts, "right")
        counts = np.searchsorted(bounds, starts + self.seq_len, "right") - low
        row = np.repeat(np.arange(len(starts)), counts)
        document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + low[row]
        return row, bounds[document] - starts[row]
