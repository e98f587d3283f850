"""From a config to the samples that it trains and evaluates on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megakrause.config import RunConfig, SourceConfig
from megakrause.data.encode import EncodeOptions
from megakrause.data.images import ImageSamples
from megakrause.data.inputs import TEXT_SUFFIXES, find_inputs
from megakrause.data.mixed import MixedWindows
from megakrause.data.mixture import Mixture, Share
from megakrause.data.records import ReadOptions
from megakrause.data.remote import BlockCache, default_folder
from megakrause.data.shards import Corpus
from megakrause.data.stream import TextStream
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError

TEXT = re.compile(rf"hf:(?!//).*|.*({'|'.join(map(re.escape, TEXT_SUFFIXES))})(\.gz|\.zst)?", re.IGNORECASE)


class Batches:
    """From which step on the global batch had which size: where a step's samples begin, also when that changed."""

    def __init__(
        self, global_batch: int, step: int = 0, position: int = 0, before: Sequence[Sequence[int]] = ()
    ) -> None:
        """The batch of a run that begins or goes on at a step and sample. before: `changes` of the run until then."""
        changes = [tuple(change) for change in before] or [(0, 0, global_batch)]
        if changes[-1][2] != global_batch:
            changes.append((step, position, global_batch))
        self.changes = changes  # (step, its first sample, size of the batch)

    def skip_to(self, step: int, position: int) -> None:
        """Leaves out what lies before a sample: from here on, that is the first of a step."""
        self.changes.append((step, position, self.changes[-1][2]))

    def sample(self, step: int) -> int:
        """The first sample of a step, counted from 0."""
        begun, position, size = [change for change in self.changes if change[0] <= step][-1]
        return position + (step - begun) * size


def train_samples(config: RunConfig, tokenizer: Tokenizer, batches: Batches | None = None) -> MixedWindows:
    """What data.train lists, mixed. batches: of a run whose global batch has changed.

    Raises UserError when a source cannot be read, is listed twice, or when the sources may not be used as often as the
    run needs."""
    train, cache = config.train, _cache(config)
    batches = batches or Batches(train.global_batch)
    sources, shares, seen = [], [], dict[str, str]()
    for source in config.data.sources:
        windows = _open(config, source, tokenizer, cache)
        if other := seen.get(windows.fingerprint):
            raise UserError(f"data.train lists one source twice, as {other} and {source.path}; add their weights")
        seen[windows.fingerprint] = source.path
        limit = None
        if source.epochs is not None:
            if isinstance(windows, TextStream):
                raise UserError(f"data.train: epochs = {source.epochs} of {source.path}: a stream has no known length")
            limit = max(1, round(source.epochs * len(windows)))
        sources.append(windows)
        shares.append(Share(tuple((batches.sample(step), weight) for step, weight in source.weights), limit))
    mixture, needed = Mixture(shares), batches.sample(train.steps)
    if mixture.size is not None and mixture.size < needed:
        steps = max(step for step in range(train.steps) if batches.sample(step) <= mixture.size)
        raise UserError(
            f"train.steps = {train.steps} of train.global_batch = {train.global_batch} need {needed} sequences, the "
            f"epochs and weights of data.train allow {mixture.size}, which is train.steps = {steps}; use that, or "
            "allow more epochs"
        )
    return MixedWindows(sources, mixture, config.data.mask_documents, cache)


def train_images(config: RunConfig) -> ImageSamples:
    """What data.train names, of a model of images. Raises UserError."""
    data = config.data
    return ImageSamples(
        data.sources[0].path,
        config.model,
        config.augment,
        seed=config.train.seed,
        workers=data.workers,
        cache=_cache(config),
    )


def eval_images(config: RunConfig, prefix: str | None = None, workers: int | None = None) -> ImageSamples | None:
    """Held-out images in their own order: `prefix`, or data.valid, or None where there is none. Raises UserError."""
    prefix, workers = prefix or config.data.valid, config.data.workers if workers is None else workers
    if prefix is None:
        return None
    return ImageSamples(prefix, config.model, config.augment, workers=workers, cache=_cache(config))


def eval_windows(config: RunConfig, tokenizer: Tokenizer, prefix: str | None = None) -> TokenWindows | None:
    """A held-out corpus in its own order: `prefix`, or data.valid, or None where there is none."""
    prefix = prefix or config.data.valid
    if prefix is None:
        return None
    corpus = Corpus.open(prefix, tokenizer, cache=_cache(config))
    return TokenWindows(corpus, config.seq_len, eos=tokenizer.eos, mask_documents=config.data.mask_documents)


def _open(
    config: RunConfig, source: SourceConfig, tokenizer: Tokenizer, cache: BlockCache
) -> TokenWindows | TextStream:
    data, train = config.data, config.train
    if TEXT.fullmatch(source.path):
        options = EncodeOptions(ReadOptions(source.text_field, source.separator), tokenizer.eos)
        return TextStream(
            source.path,
            find_inputs([source.path]),
            tokenizer,
            options,
            seq_len=config.seq_len,
            seed=train.seed,
            packing=data.packing,
            workers=data.workers,
        )
    return TokenWindows(
        Corpus.open(source.path, tokenizer, source.dtype, cache),
        config.seq_len,
        eos=tokenizer.eos,
        mask_documents=data.mask_documents,
        seed=train.seed,
        packing=data.packing,
        group=data.shuffle_blocks,
    )


def _cache(config: RunConfig) -> BlockCache:
    return BlockCache(config.data.cache or default_folder(), config.data.cache_gib << 30)
