"""From a config to the samples that it trains and evaluates on."""

from __future__ import annotations

from megakrause.config import RunConfig, SourceConfig
from megakrause.data.mixture import Mixture, Share
from megakrause.data.remote import BlockCache, default_folder
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import MixedWindows, TokenWindows
from megakrause.errors import UserError


def train_samples(config: RunConfig, tokenizer: Tokenizer) -> MixedWindows:
    """What data.train lists, mixed. Raises UserError when a corpus cannot be read, is listed twice, or when the
    sources may not be used as often as the run needs."""
    data, train, cache = config.data, config.train, _cache(config)

    def share(source: SourceConfig, windows: TokenWindows) -> Share:
        limit = None if source.epochs is None else max(1, round(source.epochs * len(windows)))
        return Share(tuple((step * train.global_batch, weight) for step, weight in source.weights), limit)

    windows = [
        TokenWindows(
            Corpus.open(source.path, tokenizer, source.dtype, cache),
            train.seq_len,
            eos=tokenizer.eos,
            mask_documents=data.mask_documents,
            seed=train.seed,
            packing=data.packing,
            group=data.shuffle_blocks,
        )
        for source in data.sources
    ]
    seen: dict[str, str] = {}
    for source, window in zip(data.sources, windows, strict=True):
        if other := seen.get(window.corpus.fingerprint):
            raise UserError(f"data.train lists one corpus twice, as {other} and {source.path}; add their weights")
        seen[window.corpus.fingerprint] = source.path
    mixture = Mixture([share(source, window) for source, window in zip(data.sources, windows, strict=True)])
    if mixture.size is not None and mixture.size < train.steps * train.global_batch:
        raise UserError(
            f"train.steps = {train.steps} of train.global_batch = {train.global_batch} need "
            f"{train.steps * train.global_batch} sequences, the epochs and weights of data.train allow {mixture.size}; "
            f"use at most train.steps = {mixture.size // train.global_batch}"
        )
    return MixedWindows(windows, mixture)


def eval_windows(config: RunConfig, tokenizer: Tokenizer, prefix: str | None = None) -> TokenWindows | None:
    """A held-out corpus in its own order: `prefix`, or data.valid, or None where there is none."""
    prefix = prefix or config.data.valid
    if prefix is None:
        return None
    corpus = Corpus.open(prefix, tokenizer, cache=_cache(config))
    return TokenWindows(corpus, config.train.seq_len, eos=tokenizer.eos, mask_documents=config.data.mask_documents)


def _cache(config: RunConfig) -> BlockCache:
    return BlockCache(config.data.cache or default_folder(), config.data.cache_gib << 30)
