"""A corpus as sequences of one length: what stands in each sample."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megakrause.batch import TokenBatch
from megakrause.data.formats import Shard
from megakrause.data.order import BlockOrder, key_of
from megakrause.data.packing import Packing, num_windows
from megakrause.data.shards import Corpus
from megakrause.data.windows import PackedBlock, Rows
from megakrause.errors import UserError


class TokenWindows:
    """A corpus as windows of `seq_len` targets, its documents packed within each block (packing.py).

    Every token is a target once an epoch. The inputs of a document are the separator `eos`, then its tokens but the
    last; a part of one that was cut begins with the token before it. What a window has beyond its documents is padding:
    `eos`, with loss_mask False. With `mask_documents`, nothing is seen of other documents, nor of what was cut off.

    Of instructions, a response is learnt only where its prompt can be seen: samples are always packed best-fit, and
    what of one that is longer than a window continues in the next is read and not learnt.

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
        self.packing: Packing = "best_fit" if corpus.has_prompts else packing
        self._key = None if seed is None else (seed, int(corpus.fingerprint[:16], 16))
        self.order = BlockOrder(num_windows(corpus.block_tokens, seq_len), self._key, group)
        self._announced: list[int] = []  # blocks that will be wanted next
        self._packed = lru_cache(maxsize=2 * group)(self._pack)

    def __len__(self) -> int:
        """Windows of an epoch."""
        return self.order.size

    @property
    def name(self) -> str:
        return self.corpus.prefix

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def batch(self, samples: np.ndarray) -> TokenBatch:
        """Samples [b] counted over epochs from 0; -1: a row of padding. Raises UserError for damaged data."""
        samples = np.asarray(samples)
        rows = Rows(len(samples), self.seq_len, self.eos)
        there = np.flatnonzero(samples >= 0)
        self.fill(rows, there, samples[there])
        return rows.batch(self.mask_documents)

    def fill(self, rows: Rows, numbers: np.ndarray, samples: np.ndarray) -> None:
        """Writes samples [n] into the rows of these numbers [n]."""
        for epoch, block, chosen, windows in self.order.locate(samples):
            shard = self.corpus.shard_of(block)

            def take(places: np.ndarray, shard: Shard = shard) -> np.ndarray:
                return self._known(shard, places, shard.tokens.take(shard.dtype, places, shard.base).astype(np.int64))

            self._packed(epoch, block).write(rows, numbers[chosen], windows, take, self.corpus.has_prompts)
        if len(samples) and (following := self.order.next_blocks(int(samples.max()))) != self._announced:
            self._announced = following
            for block in following:
                self.corpus.announce(block)

    def describe(self, start: int, stop: int) -> str:
        """What samples [start, stop) of it are."""
        return (
            f"{self.corpus.prefix}: {self.corpus.num_tokens:,} tokens, epochs {start / len(self):.2f} to "
            f"{stop / len(self):.2f}"
        )

    def _pack(self, epoch: int, block: int) -> PackedBlock:
        key = None if self._key is None else key_of(*self._key, epoch, 2, block)
        return PackedBlock.of(self.corpus.documents_of(block)[1], self.seq_len, self.packing, key)

    def _known(self, shard: Shard, places: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The tokens. Raises UserError for one outside the vocabulary."""
        limit = self.corpus.vocab_size
        lowest = -limit if limit is not None and self.corpus.has_prompts else 0
        if limit is not None and len(tokens) and not lowest <= tokens.min() <= tokens.max() < limit:
            wrong = int(np.argmax((tokens < lowest) | (tokens >= limit)))
            raise UserError(
                f"{shard.tokens.path}: token {tokens[wrong]}, number {places[wrong]}, is outside the vocabulary of "
                f"{limit}; it is damaged or of another tokenizer"
            )
        return tokens
