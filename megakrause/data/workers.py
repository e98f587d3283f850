"""Work shared out to processes, and taken back in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from megakrause.errors import UserError

A = TypeVar("A")
B = TypeVar("B")


def worker_pool(workers: int, module: str) -> ProcessPoolExecutor:
    """module: what all of them need, imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return ProcessPoolExecutor(workers, context, _start_worker)


@contextmanager
def dead_workers_named(key: str) -> Iterator[None]:
    """key: what says how many there are. Raises UserError when one of them dies."""
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(f"a worker process died, perhaps for want of memory; use fewer {key}") from error


def in_order(
    items: Iterable[A], work: Callable[[A], B], workers: int, module: str
) -> Generator[tuple[A, B], None, None]:
    """Every item with what became of it, in order; at most 4 x workers of them are under way."""
    pending: deque[tuple[A, Future[B]]] = deque()
    with dead_workers_named("workers"), worker_pool(workers, module) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) == 4 * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _start_worker() -> None:
    """Requests to end are the parent's to handle, and a worker does not outlive it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a scheduler sends them to all processes
        signal.signal(number, signal.SIG_IGN)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
