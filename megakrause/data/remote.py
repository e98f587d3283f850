"""Files that lie elsewhere (s3, gs, hf, http, whatever fsspec reads), fetched by blocks into a cache on this machine.

A block is fetched whole, compared with its hash, and kept as a file that all processes here share. What fails, stalls,
comes short or damaged is asked for again, waiting longer each time, so that a store that comes back loses nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import xxhash

from megakrause.data.blob import BLOCK, Blob
from megakrause.errors import UserError

T = TypeVar("T")
MAPPED = 64  # blocks of a cache at a time
BLOCKS, TEMPORARY = "??/" + 32 * "[0-9a-f]", "??/*.tmp"
STALE = 86400  # seconds after which a temporary file is a dead process's
UNREACHABLE = ("ClientConnectorError", "ClientConnectorDNSError", "EndpointConnectionError")  # aiohttp's, botocore's
FULL = (errno.ENOSPC, errno.EDQUOT)


class Patience:
    """How long a store that does not answer is asked again. Setting `stop` ends all waiting."""

    def __init__(
        self, total: float = 300, first: float = 0.5, longest: float = 30, stall: float = 60, contact: float = 30
    ) -> None:
        """Seconds: in all, before the second attempt (doubled each time, up to `longest`), for one attempt, and in all
        while a host that never answered refuses to be connected. All together they stay below the trainer's own watch,
        so that it is the store that is named."""
        self.total, self.first, self.longest, self.stall, self.contact = total, first, longest, stall, contact
        self.stop = threading.Event()
        self._answered: set[str] = set()  # hosts

    def ask(self, what: str, work: Callable[[], T], verb: str = "read") -> T:
        """What `work` returns. Raises UserError when it fails to the end, at once for what is not there or not
        allowed, and soon after `stop` is set."""
        begun, wait, host = time.monotonic(), self.first, urlsplit(what).netloc
        while not self.stop.is_set():
            try:
                result = _within(self.stall, work, self.stop)
                self._answered.add(host)
                return result
            except UserError:
                raise
            except Exception as error:  # every store has its own
                if self.stop.is_set():
                    break
                is_refused = _is_refused(error)
                if not is_refused:
                    self._answered.add(host)
                total = min(self.total, self.contact) if is_refused and host not in self._answered else self.total
                if is_missing(error) or _is_forbidden(error):
                    raise UserError(f"cannot {verb} {what}: {_reason(error)}") from error
                if time.monotonic() + wait > begun + total:
                    raise UserError(f"cannot {verb} {what}: {_reason(error)}; given up after {total:.0f} s") from error
                print(f"{what}: {_reason(error)}; asking again in {wait:.1f} s", file=sys.stderr, flush=True)
            self.stop.wait(wait)
            wait = min(2 * wait, self.longest)
        raise UserError(f"cannot {verb} {what}: its reader was closed")


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "megakrause"


class BlockCache:
    """Blocks of remote files on this machine's disk, at most `limit` bytes, those unused for longest dropped first.

    Any number of processes may share the folder. Blocks are written under other names and then renamed, and are mapped
    while they certainly exist, so that none is seen half written and one that is dropped stays readable; the locks are
    there only to fetch nothing twice and to keep to the limit.
    """

    def __init__(self, folder: str | Path, limit: int = 16 << 30, patience: Patience | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self.patience = patience or Patience()
        self._used = False
        self._mapped: dict[str, np.ndarray] = {}  # by key, the last used last
        self._mutex = threading.Lock()  # for the above
        self._wanted: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def get(self, key: str, size: int, fetch: Callable[[], bytes], intact: Callable[[np.ndarray], bool]) -> np.ndarray:
        """The block of this key, 32 hex digits, mapped; fetched unless it is here. `fetch` raises UserError when it
        cannot; so does this when the folder cannot be used or is full."""
        path = self.folder / key[:2] / key
        with self._explained():
            if not self._used:
                self._used = True
                self._shrink(self.limit)  # it may have been larger
            content = self._find(path, size, intact)
            if content is None:
                with self._alone(self.folder / f"{key[:2]}.lock"):
                    content = self._find(path, size, intact)  # which another process may have fetched
                    if content is None:
                        fetched = fetch()
                        with self._alone(self.folder / "room.lock"):  # what one makes room for, no other fills
                            content = self._keep(path, fetched)
        with self._mutex:
            self._mapped.pop(key, None)
            self._mapped[key] = content
            while len(self._mapped) > MAPPED or len(self._mapped) > 1 and self._mapped_bytes() > self.limit:
                del self._mapped[next(iter(self._mapped))]
        return content

    def ahead(self, work: Callable[[], Any]) -> None:
        """Does some work in a thread of its own, after what was asked before; whoever needs the result sees it fail."""
        self._wanted.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="read ahead", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends reading ahead, and whatever waits for a store, in any thread, with UserError."""
        self.patience.stop.set()
        self._wanted.put(lambda: None)

    def _read_ahead(self) -> None:
        while not self.patience.stop.is_set():
            work = self._wanted.get()
            with suppress(Exception):
                work()

    def _find(self, path: Path, size: int, intact: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """The block, if it is here and whole."""
        with self._mutex:
            content = self._mapped.get(path.name)
        if content is None:
            try:
                with path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size != size:
                        return None
                    content = np.memmap(file, np.uint8, "r")
            except FileNotFoundError:
                return None
            if not intact(content):
                return None
        with suppress(OSError):  # another process may drop it, or the folder be for reading only
            os.utime(path)
        return content

    def _keep(self, path: Path, content: bytes) -> np.ndarray:
        """Writes a block and maps it. Raises OSError when it cannot, even with no other block on the disk."""
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        room = self.limit
        while True:
            left = self._shrink(room - len(content))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(content)
                mapped = np.memmap(temporary, np.uint8, "r")  # while nobody else can drop it
                os.replace(temporary, path)
                return mapped
            except OSError as error:
                if error.errno not in FULL or not left:
                    raise
                room = left  # the disk holds no more
                with self._mutex:
                    self._mapped.clear()  # what others dropped takes room for as long as it is mapped
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _shrink(self, limit: int) -> int:
        """Removes blocks until the rest has at most `limit` bytes; how many those are."""
        found = []
        for path in self.folder.glob(BLOCKS):
            with suppress(FileNotFoundError):  # another process drops too
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= limit:
                break
            path.unlink(missing_ok=True)
            with self._mutex:
                self._mapped.pop(path.name, None)
            left -= size
        for path in self.folder.glob(TEMPORARY):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()
        return left

    def _mapped_bytes(self) -> int:
        return sum(map(len, self._mapped.values()))

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Holds a lock, unless there are none here or its holder is stuck."""
        with ExitStack() as stack:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(path.open("a"))
                deadline = time.monotonic() + self.patience.stall
                while time.monotonic() < deadline and not self.patience.stop.is_set():
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.02)
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                said = f"the disk of the cache folder {self.folder} is full: make room, or set data.cache to a folder"
                raise UserError(f"{said} on another disk") from error
            said = f"cannot use the cache folder {self.folder}: {error.strerror or error}"
            raise UserError(f"{said}; make it writable, or set data.cache to a folder that is") from error


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
        version: str = "",
    ) -> None:
        """fs, inner: the fsspec file system and the path in it; path: how people call it; version: what tells a file
        without hashes from others that had or will have its name."""
        super().__init__(path, size, hashes, block_size)
        self._fs, self._inner, self._cache, self._version = fs, inner, cache, version
        self._has_ranges = False  # as far as is known

    def peek(self, start: int, count: int) -> bytes:
        stop = min(start + count, self.size)
        return self._cache.patience.ask(self.path, lambda: self._fetch(start, stop))

    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        stop = start + count * dtype.itemsize
        parts = []
        for block in range(start // self.block_size, -(-stop // self.block_size)):
            begin, _ = self.block_range(block)
            parts.append(self._get(block)[max(start - begin, 0) : stop - begin])
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
            content = self._get(block)
            elements = np.frombuffer(content, dtype, (len(content) - lead) // size, lead)
            result[inside] = elements[(base + places[inside] * size - begin - lead) // size]
        for place in np.flatnonzero(first != last):  # those that two blocks share
            result[place] = self.array(dtype, base + int(places[place]) * size, 1)[0]
        return result

    def ahead(self, start: int, stop: int) -> None:
        for block in range(start // self.block_size, -(-stop // self.block_size)):
            self._cache.ahead(partial(self._get, block))

    def release(self) -> None:
        pass  # the cache has the handles, few for all its files

    def _get(self, block: int) -> np.ndarray:
        start, stop = self.block_range(block)
        name = self.hashes[block] if self.hashes else f"{self.path} {self.size} {self._version} {start} {stop}"
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
        if not self._has_ranges and self.size > BLOCK and self.path.startswith("http"):
            self._ask_for_range()  # else all of a large file may come, into memory
        self._has_ranges = True
        content: bytes = self._fs.cat_file(self._inner, start=start, end=stop)
        if len(content) == self.size > stop - start:
            raise self._without_ranges()
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came of {stop - start} from byte {start} on")
        return content

    def _ask_for_range(self) -> None:
        """Raises UserError when an HTTP server answers the question for one byte with the file."""
        from fsspec.asyn import sync

        async def status() -> int:
            session, options = await self._fs.set_session(), dict(self._fs.kwargs)
            options["headers"] = {**options.get("headers", {}), "Range": "bytes=0-0"}
            async with session.get(self._fs.encode_url(self._inner), **options) as response:
                return int(response.status)

        if sync(self._fs.loop, status) == 200:
            raise self._without_ranges()

    def _without_ranges(self) -> UserError:
        return UserError(f"cannot read {self.path}: the server ignores byte ranges; use one that supports them")


def _within(seconds: float, work: Callable[[], T], stop: threading.Event) -> T:
    """What `work` returns, if it does in time. Raises TimeoutError, and leaves it behind, else, and when `stop` is
    set."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and not stop.is_set() and (left := deadline - time.monotonic()) > 0:
        thread.join(min(left, 0.2))
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


def _is_forbidden(error: Exception) -> bool:
    status = getattr(error.__cause__ or error, "status", 0)
    return isinstance(error, PermissionError) or status in (401, 403)


def _is_refused(error: BaseException | None) -> bool:
    """Whether a host cannot be connected at all: nobody listens there, or it has no address."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | socket.gaierror) or type(error).__name__ in UNREACHABLE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error) or type(error).__name__
    return " ".join(text.split())[:200]
