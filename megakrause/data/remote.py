"""Files that lie elsewhere (s3, gs, hf, http, whatever fsspec reads), fetched by blocks into a cache on this machine.

A block is fetched whole, compared with its hash, and kept as a file that all processes here share. What fails, stalls,
comes short or damaged is asked for again, waiting longer each time, so that a store that comes back loses nothing.
"""

from __future__ import annotations

import fcntl
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from megakrause.data.blob import BLOCK, Blob
from megakrause.errors import UserError

T = TypeVar("T")
MAPPED = 32  # blocks of a file at a time


class Patience:
    """How long a store that does not answer is asked again."""

    def __init__(self, total: float = 600, first: float = 0.5, longest: float = 30, stall: float = 120) -> None:
        """Seconds: in all, before the second attempt (doubled each time, up to `longest`), and for one attempt."""
        self.total, self.first, self.longest, self.stall = total, first, longest, stall

    def ask(self, what: str, work: Callable[[], T]) -> T:
        """What `work` returns. Raises UserError when it fails to the end, at once for what is not there or not
        allowed."""
        deadline, wait = time.monotonic() + self.total, self.first
        while True:
            try:
                return _within(self.stall, work)
            except UserError:
                raise
            except Exception as error:  # every store has its own
                if is_missing(error) or isinstance(error, PermissionError):
                    raise UserError(f"cannot read {what}: {_reason(error)}") from error
                if time.monotonic() + wait > deadline:
                    raise UserError(
                        f"cannot read {what}: {_reason(error)}; given up after {self.total:.0f} s"
                    ) from error
                print(f"{what}: {_reason(error)}; asking again in {wait:.1f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
            wait = min(2 * wait, self.longest)


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "megakrause"


class BlockCache:
    """Blocks of remote files on this machine's disk, at most `limit` bytes, those unused for longest dropped first."""

    def __init__(self, folder: str | Path, limit: int = 16 << 30, patience: Patience | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self.patience = patience or Patience()
        self._wanted: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def get(self, key: str, size: int, fetch: Callable[[], bytes], intact: Callable[[np.ndarray], bool]) -> np.ndarray:
        """The block of this key, mapped; fetched unless it is here. `fetch` raises when it cannot."""
        path = self.folder / key[:2] / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(key + ".lock")):  # one process fetches, the others wait for it
            if path.exists() and path.stat().st_size == size:
                content = np.memmap(path, np.uint8, "r")
                if intact(content):
                    os.utime(path)
                    return content
            temporary = path.with_name(key + ".tmp")
            temporary.write_bytes(fetch())
            os.replace(temporary, path)
        self._drop(path)
        return np.memmap(path, np.uint8, "r")

    def ahead(self, work: Callable[[], Any]) -> None:
        """Does some work in a thread of its own, after what was asked before; whoever needs the result sees it fail."""
        self._wanted.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="read ahead", daemon=True)
            self._thread.start()

    def _read_ahead(self) -> None:
        while True:
            work = self._wanted.get()
            with suppress(UserError):
                work()

    def _drop(self, keep: Path) -> None:
        """Removes blocks until the rest fits. What is mapped stays readable."""
        found = []
        for path in self.folder.glob("??/*"):
            if path.suffix != ".lock" and path != keep:
                try:
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
                except FileNotFoundError:  # another process drops too
                    pass
        total = sum(size for _, size, _ in found) + keep.stat().st_size
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


class RemoteBlob(Blob):
    """A file that fsspec reads, by blocks through a cache."""

    def __init__(
        self,
        fs: Any,
        path: str,
        inner: str,
        cache: BlockCache,
        size: int,
        hashes: Sequence[str] = (),
        block_size: int = BLOCK,
    ) -> None:
        """fs, inner: the fsspec file system and the path in it; path: how people call it."""
        super().__init__(path, size, hashes, block_size)
        self._fs, self._inner, self._cache = fs, inner, cache
        self._blocks: dict[int, np.ndarray] = {}

    def peek(self, start: int, count: int) -> bytes:
        stop = min(start + count, self.size)
        return self._cache.patience.ask(self.path, lambda: self._fetch(start, stop))

    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        stop = start + count * dtype.itemsize
        parts = []
        for block in range(start // self.block_size, -(-stop // self.block_size)):
            begin, _ = self.block_range(block)
            parts.append(self._block(block)[max(start - begin, 0) : stop - begin])
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint8)])
        return np.frombuffer(joined.tobytes() if (start % dtype.itemsize) else joined, dtype, count)

    def take(self, dtype: np.dtype, places: np.ndarray, base: int = 0) -> np.ndarray:
        result = np.empty(len(places), dtype)
        if not len(places):
            return result
        self.span(dtype, places, base)
        size = dtype.itemsize
        first, last = (base + places * size) // self.block_size, (base + (places + 1) * size - 1) // self.block_size
        for block in np.unique(first).tolist():
            begin, end = self.block_range(block)
            lead = (base - begin) % size  # bytes of an element that began in the block before
            inside = np.flatnonzero((first == block) & (last == block))
            content = self._block(block)
            elements = np.frombuffer(content, dtype, (len(content) - lead) // size, lead)
            result[inside] = elements[(base + places[inside] * size - begin - lead) // size]
        for place in np.flatnonzero(first != last):  # those that two blocks share
            result[place] = self.array(dtype, base + int(places[place]) * size, 1)[0]
        return result

    def ahead(self, start: int, stop: int) -> None:
        for block in range(start // self.block_size, -(-stop // self.block_size)):
            if block not in self._blocks:
                self._cache.ahead(partial(self._get, block))

    def release(self) -> None:
        self._blocks.clear()

    def _block(self, block: int) -> np.ndarray:
        if block not in self._blocks:
            if len(self._blocks) >= MAPPED:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._get(block)
        return self._blocks[block]

    def _get(self, block: int) -> np.ndarray:
        start, stop = self.block_range(block)
        name = self.hashes[block] if self.hashes else f"{self.path} {self.size} {start} {stop}"
        attempts = 0

        def fetch() -> bytes:
            nonlocal attempts
            content = self._fetch(start, stop)
            if self.is_intact(block, np.frombuffer(content, np.uint8)):
                return content
            attempts += 1
            if attempts == 3:  # not the way here, then
                raise self.damaged(block)
            raise OSError(f"block {block} came damaged")

        return self._cache.get(
            xxhash.xxh3_128_hexdigest(name.encode()),
            stop - start,
            lambda: self._cache.patience.ask(self.path, fetch),
            lambda content: self.is_intact(block, content),
        )

    def _fetch(self, start: int, stop: int) -> bytes:
        content: bytes = self._fs.cat_file(self._inner, start=start, end=stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came of {stop - start} from byte {start} on")
        return content


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, if it does in time. Raises TimeoutError, and leaves it behind, else."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    done, value = outcome[0]
    if done:
        return value
    raise value


def is_missing(error: Exception) -> bool:
    """Whether a store says that there is no such file. fsspec's http says so of a server that does not answer, too."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", 0) in (404, 410))


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error) or type(error).__name__
    return " ".join(text.split())[:200]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
