"""`megakrause data show`: the documents of a corpus, or the sequences of a training step, as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from megakrause.config import RunConfig
from megakrause.data.mixed import MixedWindows
from megakrause.data.open import train_samples
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

SHOWN = 2000  # characters of a document


def show_corpus(prefix: str, tokenizer_path: str, first: int, count: int, dtype: str | None = None) -> Iterator[str]:
    """Lines: the corpus, then `count` documents from number `first` on, decoded. Raises UserError."""
    tokenizer = Tokenizer.load(tokenizer_path)
    corpus = Corpus.open(prefix, tokenizer, dtype)
    documents = "" if corpus.num_documents is None else f" in {corpus.num_documents:,} documents"
    hashes = "with hashes" if corpus.manifest else "without a manifest, so no hashes"
    yield (
        f"{corpus.prefix}: {corpus.num_tokens:,} tokens{documents}, {corpus.dtype}, {len(corpus.shards)} shards, "
        f"{len(corpus.block_tokens)} blocks, {hashes}"
    )
    number = 0
    for block in range(len(corpus.block_tokens)):
        if number >= first + count:
            return
        shard, bounds = corpus.documents_of(block)
        for start, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
            if first <= number < first + count:
                tokens = shard.tokens.array(shard.dtype, shard.base + start * shard.dtype.itemsize, end - start)
                yield f"--- document {number}, {end - start:,} tokens, {shard.tokens.path} from token {start:,}"
                if corpus.has_prompts:
                    yield from _show_parts(tokens, tokenizer)
                else:
                    yield _cut(tokenizer.decode(_known(tokens, tokenizer)))
            number += 1
    if number <= first:
        raise UserError(f"corpus {corpus.prefix} has {number} documents; --document {first} is none of them")


def _show_parts(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """Prompts and responses."""
    changes = np.flatnonzero(np.diff(tokens < 0)) + 1
    for part in np.split(tokens, changes):
        kind = "prompt" if part[0] < 0 else "response"
        yield f"[{kind}] {_cut(tokenizer.decode(_known(np.maximum(part, ~part), tokenizer)))}"


def show_step(config: RunConfig, step: int, count: int) -> Iterator[str]:
    """Lines: the mix, then the first `count` sequences of a training step (from 1) with the bounds of documents."""
    tokenizer = Tokenizer.load(config.tokenizer)
    with closing(train_samples(config, tokenizer)) as samples:
        yield from _show(config, samples, tokenizer, step, count)


def _show(config: RunConfig, samples: MixedWindows, tokenizer: Tokenizer, step: int, count: int) -> Iterator[str]:
    batch = config.train.global_batch
    yield from samples.describe(0, config.train.steps * batch)
    starts = sorted({start // batch + 1 for start in (segment.start for segment in samples.mixture.segments)})
    if len(starts) > 1:
        yield f"data: the mix changes at steps {', '.join(map(str, starts[1:]))}"
    first = (step - 1) * batch
    rows = samples.batch(np.arange(first, first + min(count, batch)))
    for row in range(len(rows.tokens)):
        learnt = int(rows.loss_mask[row].sum())
        yield f"--- step {step}, sequence {row}: {learnt} tokens to learn"
        end = int(rows.loss_mask[row].nonzero().max()) + 1 if learnt else 0  # padding follows
        targets = rows.targets[row][:end].tolist()
        if rows.doc_start is None:
            yield tokenizer.decode(targets)
            continue
        bounds = [*sorted(set(rows.doc_start[row][:end].tolist())), end]
        for start, end in zip(bounds, bounds[1:], strict=False):
            yield f"[{start}:{end}] {tokenizer.decode(targets[start:end])}"


def _known(tokens: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """The tokens. Raises UserError for one that is none of the tokenizer's."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        wrong = tokens.max() if tokens.min() >= 0 else tokens.min()
        raise UserError(f"token {wrong} is none of the {tokenizer.vocab_size} of {tokenizer.path}: another tokenizer?")
    return tokens.tolist()


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}\n... {len(text) - SHOWN:,} more characters"
