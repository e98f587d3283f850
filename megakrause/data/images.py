"""A corpus of images as samples: what stands in each, and in a batch of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from megakrause.batch import Batch, ImageBatch, TokenBatch
from megakrause.config import AugmentConfig, ModelConfig
from megakrause.data.augment import ERASING, MIXING, PIXELS, NoImage, View, erase, generator, mixing
from megakrause.data.order import key_of, permute
from megakrause.data.remote import BlockCache
from megakrause.data.shards import Corpus, NoCorpus
from megakrause.data.workers import dead_workers_named, worker_pool
from megakrause.errors import UserError

LABEL = np.dtype("<i4")  # before every image
HASHED = 1 << 18  # bytes of a corpus of images that are hashed, and so read, together


class ImageRecords:
    """The files and classes of a corpus, by number."""

    def __init__(self, prefix: str, cache: BlockCache | None = None):
        """Raises UserError when it is no corpus of images."""
        try:
            self.corpus = Corpus.open(prefix, cache=cache)
        except NoCorpus as error:
            raise UserError(
                f"there is no corpus of images at {prefix}; prepare one: "
                "python data_prep/prepare_images.py --input IMAGES --output PREFIX"
            ) from error
        manifest = self.corpus.manifest
        if manifest is None or manifest.images is None:
            raise UserError(f"{prefix} is no corpus of images; prepare one with data_prep/prepare_images.py")
        self.classes = manifest.images.classes
        first = [0]
        for shard in self.corpus.shards:
            base = first[-1]
            first += [base + document for document, _ in shard.cuts[1:]]
        self._first = np.array(first)  # image of each block, and the end
        self._bounds = lru_cache(maxsize=None)(lambda block: self.corpus.documents_of(block)[1])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> tuple[int, bytes]:
        """(class, file). Raises UserError when it is damaged."""
        block = int(np.searchsorted(self._first, number, "right")) - 1
        start, stop = self._bounds(block)[number - self._first[block] :][:2].tolist()
        shard = self.corpus.shard_of(block)
        record = shard.tokens.array(np.dtype(np.uint8), shard.base + start, stop - start).tobytes()
        label = int(np.frombuffer(record[: LABEL.itemsize], LABEL)[0]) if len(record) > LABEL.itemsize else -1
        if not 0 <= label < len(self.classes):
            raise UserError(f"{self.corpus.prefix}: image {number} is of class {label}, there are {len(self.classes)}")
        return label, record[LABEL.itemsize :]


class ImageSamples:
    """Images in the order of a run, as batches for a model.

    seed None: each once, in the corpus's own order and as evaluation sees them. Else each epoch permutes all images, by
    a key of (seed, the corpus's content, epoch), and `augment` changes them. Samples 2n and 2n + 1 of a run are mixed
    with one another, if any are."""

    def __init__(
        self,
        prefix: str,
        model: ModelConfig,
        augment: AugmentConfig,
        *,
        seed: int | None = None,
        workers: int = 0,
        cache: BlockCache | None = None,
    ):
        """workers: processes that decode; 0: none but this. Raises UserError."""
        self.records, self._model, self._augment, self._cache = ImageRecords(prefix, cache), model, augment, cache
        there = len(self.records.classes)
        if model.classes is not None and model.classes != there:
            raise UserError(f"model.classes = {model.classes}, and {prefix} has {there}; they must agree")
        self._training, content = seed is not None, int(self.fingerprint[:16], 16)
        self._order = seed or 0, content
        self._key = int(key_of(seed or 0, content, 1))
        self._view = View(*model.image_shape, augment if self._training else None)
        self._pool: ProcessPoolExecutor | None = None
        self._workers = workers
        if workers:
            self._pool = worker_pool(workers, __name__)

    def __len__(self) -> int:
        """Images of an epoch."""
        return len(self.records)

    @property
    def name(self) -> str:
        return self.records.corpus.prefix

    @property
    def fingerprint(self) -> str:
        return self.records.corpus.fingerprint

    @property
    def names(self) -> dict[str, str]:
        return {self.fingerprint: self.name}

    @property
    def classes(self) -> list[str]:
        return self.records.classes

    def check_classes(self, expected: list[str], where: str) -> None:
        """Raises UserError when the classes, by number, are not those of something else, called `where`."""
        for number, (wanted, found) in enumerate(zip(expected, self.classes, strict=True)):
            if wanted != found:
                raise UserError(
                    f"class {number} is {wanted!r} in {where} and {found!r} in {self.name}; prepare them alike",
                    everywhere=True,
                )

    def describe(self, start: int, count: int) -> list[str]:
        """A line that says what `count` samples from `start` on are."""
        epochs = f"epochs {start / len(self):.2f} to {(start + count) / len(self):.2f}"
        return [f"data: {self.name}: {len(self):,} images of {len(self.classes)} classes, {epochs}"]

    def past(self, sample: int) -> list[dict[str, Any]]:
        """What decided the samples before one of the run, as plain values."""
        return [{"start": 0, "mix": {self.fingerprint: 1}}] if sample else []

    def stream_states(self, sample: int) -> dict[str, Any]:
        return {}

    def resume(self, states: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        """Ends the workers. Nothing can be read afterwards."""
        if self._cache is not None:
            self._cache.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def batch(self, samples: np.ndarray) -> Batch:
        """Samples [b] counted over epochs from 0; -1: a row of padding. Raises UserError for damaged data."""
        return self.begin(samples)()

    def begin(self, samples: np.ndarray) -> Callable[[], Batch]:
        """Has the workers, if there are any, load a batch; the result waits for them and makes it."""
        samples = np.asarray(samples, np.int64)
        wanted = samples[samples >= 0]
        numbers = np.union1d(wanted, wanted ^ 1) if self._mixes else wanted
        load = self._begin(numbers)
        return lambda: self._batch(samples, numbers, *load())

    def _batch(self, samples: np.ndarray, numbers: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> Batch:
        """numbers: those of the samples that were loaded."""
        there = samples >= 0
        kept, mask = torch.from_numpy(samples), torch.from_numpy(there)
        if self._model.kind == "image":
            size = math.prod(self._model.image_shape)
            values = np.zeros((len(samples), size), np.int64)
            values[there] = pixels.reshape(len(pixels), size)
            tokens = torch.from_numpy(values)
            learnt = mask[:, None].expand(-1, tokens.shape[1] - 1)
            return TokenBatch(tokens[:, :-1], tokens[:, 1:], learnt, None, kept)
        images, targets = self._normalized(numbers, labels, pixels)
        if self._mixes:
            images, targets = self._mixed(numbers, samples[there], images, targets)
        if not there.all():
            rows = np.zeros((len(samples), *images.shape[1:]), np.float32)
            shares = np.zeros((len(samples), targets.shape[1]), np.float32)
            rows[there], shares[there] = images, targets
            images, targets = rows, shares
        return ImageBatch(torch.from_numpy(images), torch.from_numpy(targets), mask, kept)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """uint8 [b, height, width, c] of samples [b], before anything is made of the numbers. Raises UserError."""
        return self._begin(np.asarray(samples, np.int64))()[1]

    @property
    def _mixes(self) -> bool:
        return self._training and (self._augment.mixup > 0 or self._augment.cutmix > 0)

    def _normalized(self, numbers: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, c, height, width], with parts erased, and smoothed targets, float32 [n, classes]"""
        augment, channels = self._augment, self._model.channels
        mean, std = (np.array(x or [0.5] * channels, np.float32)[:, None, None] for x in (augment.mean, augment.std))
        images = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")
        images *= 1 / (255 * std)
        images -= mean / std
        smoothing = augment.label_smoothing if self._training else 0.0
        targets = np.full((len(labels), len(self.classes)), smoothing / len(self.classes), np.float32)
        targets[np.arange(len(labels)), labels] += 1 - smoothing
        if self._training and augment.erasing > 0:
            for image, number in zip(images, numbers.tolist(), strict=True):
                random = generator(self._key, number, ERASING)
                if random.random() < augment.erasing:
                    erase(image, random)
        return images, targets

    def _mixed(
        self, numbers: np.ndarray, wanted: np.ndarray, images: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The wanted ones of samples `numbers`, which are there with those that they are mixed with."""
        own, other = np.searchsorted(numbers, wanted), np.searchsorted(numbers, wanted ^ 1)
        height, width, _ = self._model.image_shape
        mixed_images, mixed_targets = images[own], targets[own]
        for row, number in enumerate(wanted.tolist()):
            taken, share = mixing(self._augment, height, width, generator(self._key, number // 2, MIXING))
            mixed_images[row] += taken * (images[other[row]] - images[own[row]])
            mixed_targets[row] += np.float32(share) * (targets[other[row]] - targets[own[row]])
        return mixed_images, mixed_targets

    def _begin(self, numbers: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """Has samples loaded; the result gives (classes, int64 [n]; pixels, uint8 [n, height, width, c])."""
        indices = numbers
        if self._training:
            epochs, places = np.divmod(numbers, len(self))
            indices = np.empty_like(numbers)
            for epoch in np.unique(epochs).tolist():
                mine = epochs == epoch
                indices[mine] = permute(places[mine], len(self), key_of(*self._order, epoch, 0))
        work = list(zip(numbers.tolist(), indices.tolist(), strict=True))
        found: Iterable[tuple[int, np.ndarray]]
        if self._pool is None:
            found = (view_of(self.records, self._view, self._key, number, index) for number, index in work)
        else:
            size = max(1, -(-len(work) // (2 * self._workers)))
            parts = [work[start : start + size] for start in range(0, len(work), size)]
            with dead_workers_named("data.workers"):
                found = chain.from_iterable(self._pool.map(self._in_worker, parts))

        def loaded() -> tuple[np.ndarray, np.ndarray]:
            labels, pixels = np.empty(len(work), np.int64), np.empty((len(work), *self._model.image_shape), np.uint8)
            with dead_workers_named("data.workers"):
                for i, one in enumerate(found):
                    labels[i], pixels[i] = one
            return labels, pixels

        return loaded

    @property
    def _in_worker(self) -> _Job:
        cache = None if self._cache is None else (self._cache.folder, self._cache.limit)
        return _Job(self.name, self.fingerprint, self._view, self._key, cache)


class _Job:
    """What a worker does with (number of a sample, image in the corpus) pairs."""

    def __init__(self, prefix: str, fingerprint: str, view: View, key: int, cache: tuple[Any, int] | None):
        """cache: folder and size of a `BlockCache`."""
        self.prefix, self.fingerprint, self.view, self.key, self.cache = prefix, fingerprint, view, key, cache

    def __call__(self, work: Sequence[tuple[int, int]]) -> list[tuple[int, np.ndarray]]:
        records = _records(self.prefix, self.fingerprint, self.cache)
        return [view_of(records, self.view, self.key, number, index) for number, index in work]


def view_of(records: ImageRecords, view: View, key: int, number: int, index: int) -> tuple[int, np.ndarray]:
    """The class and the pixels of one sample. Raises UserError for a damaged image."""
    label, content = records[index]
    try:
        return label, view(content, generator(key, number, PIXELS))
    except NoImage as error:
        raise UserError(f"{records.corpus.prefix}: image {index} cannot be decoded: {error}") from error


@lru_cache(maxsize=4)
def _records(prefix: str, fingerprint: str, cache: tuple[Any, int] | None) -> ImageRecords:
    records = ImageRecords(prefix, None if cache is None else BlockCache(*cache))
    if records.corpus.fingerprint != fingerprint:
        raise UserError(f"{prefix} changed while it was in use")
    return records
