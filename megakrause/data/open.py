"""From a config to the samples that it trains and evaluates on."""

from __future__ import annotations

import re

from megakrause.config import RunConfig, SourceConfig
from megakrause.data.encode import EncodeOptions
from megakrause.data.inputs import find_inputs
from megakrause.data.mixed import MixedWindows
from megakrause.data.mixture import Mixture, Share
from megakrause.data.records import ReadOptions
from megakrause.data.remote import BlockCache, default_folder
from megakrause.data.shards import Corpus
from megakrause.data.stream import TextStream
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError

TEXT = re.compile(r"hf:.*|.*\.(txt|md|py|jsonl|parquet)(\.gz|\.zst)?")


def train_samples(config: RunConfig, tokenizer: Tokenizer) -> MixedWindows:
    """What data.train lists, mixed. Raises UserError when a source cannot be read, is listed twice, or when the sources
    may not be used as often as the run needs."""
    train = config.train
    sources, shares, seen = [], [], dict[str, str]()
    for source in config.data.sources:
        windows = _open(config, source, tokenizer)
        if other := seen.get(windows.fingerprint):
            raise UserError(f"data.train lists one source twice, as {other} and {source.path}; add their weights")
        seen[windows.fingerprint] = source.path
        limit = None
        if source.epochs is not None:
            if isinstance(windows, TextStream):
                raise UserError(f"data.train: epochs = {source.epochs} of {source.path}: a stream has no known length")
            limit = max(1, round(source.epochs * len(windows)))
        sources.append(windows)
        shares.append(Share(tuple((step * train.global_batch, weight) for step, weight in source.weights), limit))
    mixture = Mixture(shares)
    if mixture.size is not None and mixture.size < train.steps * train.global_batch:
        raise UserError(
            f"train.steps = {train.steps} of train.global_batch = {train.global_batch} need "
            f"{train.steps * train.global_batch} sequences, the epochs and weights of data.train allow {mixture.size}; "
            f"use at most train.steps = {mixture.size // train.global_batch}"
        )
    return MixedWindows(sources, mixture, config.data.mask_documents)


def eval_windows(config: RunConfig, tokenizer: Tokenizer, prefix: str | None = None) -> TokenWindows | None:
    """A held-out corpus in its own order: `prefix`, or data.valid, or None where there is none."""
    prefix = prefix or config.data.valid
    if prefix is None:
        return None
    corpus = Corpus.open(prefix, tokenizer, cache=_cache(config))
    return TokenWindows(corpus, config.train.seq_len, eos=tokenizer.eos, mask_documents=config.data.mask_documents)


def _open(config: RunConfig, source: SourceConfig, tokenizer: Tokenizer) -> TokenWindows | TextStream:
    data, train = config.data, config.train
    if TEXT.fullmatch(source.path):
        options = EncodeOptions(ReadOptions(source.text_field, source.separator), tokenizer.eos)
        return TextStream(
            source.path,
            find_inputs([source.path]),
            tokenizer,
            options,
            seq_len=train.seq_len,
            seed=train.seed,
            packing=data.packing,
            workers=data.workers,
        )
    return TokenWindows(
        Corpus.open(source.path, tokenizer, source.dtype, _cache(config)),
        train.seq_len,
        eos=tokenizer.eos,
        mask_documents=data.mask_documents,
        seed=train.seed,
        packing=data.packing,
        group=data.shuffle_blocks,
    )


def _cache(config: RunConfig) -> BlockCache:
    return BlockCache(config.data.cache or default_folder(), config.data.cache_gib << 30)
