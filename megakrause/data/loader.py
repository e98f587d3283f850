"""Batches for training and evaluation. Where training stands is one integer, the same for every number of ranks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from megakrause.batch import Batch

T = TypeVar("T")
CLOSING = 5.0  # seconds that a reader may take to notice that nobody wants more; one that waits for a store is left


B = TypeVar("B", bound=Batch, covariant=True)


class Samples(Protocol[B]):
    """What batches are made of."""

    def batch(self, samples: np.ndarray) -> B:
        """Samples [b] counted over epochs from 0; -1: a row of padding."""
        ...


@runtime_checkable
class LoadedElsewhere(Samples[B], Protocol[B]):
    """By processes that can begin with a batch while this one is at another."""

    def begin(self, samples: np.ndarray) -> Callable[[], B]:
        """Has a batch loaded; the result waits for it and makes it."""
        ...


class Epoch(Samples[B], Protocol[B]):
    """Of a known number."""

    def __len__(self) -> int: ...


def train_batches(
    samples: Samples[B], *, global_batch: int, rank: int, ranks: int, start: int, prefetch: int
) -> Generator[tuple[B, int], None, None]:
    """Endless global batches from sample `start` on: this rank's rows of each, [b, s] with b = global_batch / ranks,
    and the sample after it, from which the next run goes on.

    Rank r has rows r*b to (r+1)*b of the global batch, so the ranks together have the same batch whatever their
    number. `prefetch` batches are read ahead in a thread; 0: none. Raises ValueError if `ranks` does not divide
    `global_batch`."""
    if global_batch % ranks:
        raise ValueError(f"a global batch of {global_batch} cannot be shared by {ranks} ranks")
    batches = _train_batches(samples, global_batch, rank, ranks, start)
    return _prefetched(batches, prefetch) if prefetch else batches


def _train_batches(
    samples: Samples[B], global_batch: int, rank: int, ranks: int, position: int
) -> Generator[tuple[B, int], None, None]:
    share = global_batch // ranks
    rows = (start + rank * share + np.arange(share) for start in count(position, global_batch))
    yield from zip(_made(samples, rows), count(position + global_batch, global_batch))


def _made(samples: Samples[B], wanted: Iterator[np.ndarray]) -> Iterator[B]:
    """A batch of each, in order."""
    if not isinstance(samples, LoadedElsewhere):
        yield from map(samples.batch, wanted)
        return
    before: Callable[[], B] | None = None
    for rows in wanted:
        begun = samples.begin(rows)
        if before is not None:
            yield before()
        before = begun
    if before is not None:
        yield before()


def eval_batches(windows: Epoch[B], *, batch: int, rank: int, ranks: int, limit: int, prefetch: int = 0) -> Iterator[B]:
    """This rank's batches [batch, s] of one pass over the first `limit` windows in order (0: all).

    Every window stands on one rank in one batch. All ranks have equally many batches; rows beyond the last window are
    all padding, with loss_mask False. `prefetch` batches are read ahead in a thread; 0: none."""
    batches = _eval_batches(windows, batch, rank, ranks, limit)
    return _prefetched(batches, prefetch) if prefetch else batches


def _eval_batches(windows: Epoch[B], batch: int, rank: int, ranks: int, limit: int) -> Iterator[B]:
    windows_wanted = min(len(windows), limit) if limit else len(windows)
    numbers = range(num_eval_batches(windows, batch=batch, ranks=ranks, limit=limit))
    indices = ((number * ranks + rank) * batch + np.arange(batch) for number in numbers)
    yield from _made(windows, (np.where(i < windows_wanted, i, -1) for i in indices))


def num_eval_batches(windows: Epoch[B], *, batch: int, ranks: int, limit: int) -> int:
    """How many batches `eval_batches` yields on each rank."""
    return -(-(min(len(windows), limit) if limit else len(windows)) // (batch * ranks))


def _prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made in a thread up to `depth` ahead. Its exceptions are raised here; closing this ends it."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the consumer must learn of it
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join(CLOSING)
