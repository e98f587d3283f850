"""Where checkpoints lie: a folder of this machine's file systems, or a URL of anything that fsspec writes.

ROOT/step-20/                   a whole checkpoint
    rank-00000.safetensors      each rank's fragments of weights and optimizer state, and its RNG state
    state.json  config.toml     what exists once
    tokenizer.model             or the files of a Hugging Face tokenizer, tokenizer.json among them
    COMMIT.json                 last: size and hash of every file
ROOT/step-20.tmp/               one that is being written, where names can be changed: it is renamed when it is on disk

Where they cannot (object stores), files are written to their final names, and a folder without COMMIT.json is none.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megakrause.checkpoint.files import (
    FileRecord,
    Folder,
    flush_folder,
    make_folder,
    raise_if_unreachable,
    write_bytes,
    write_chunks,
)
from megakrause.data.remote import Patience, is_missing
from megakrause.errors import Unreachable, UserError

COMMIT = "COMMIT.json"
MOST_OPEN = 64  # files of a folder at a time
PART = 64 << 20  # bytes of an upload at a time
STEP = re.compile(r"step-(0|[1-9][0-9]*)")

Chunks = Callable[[], Iterator[bytes | memoryview]]  # a file's content, from its beginning each time


class Place(ABC):
    """The checkpoints of a run. One process begins, commits and removes; every rank writes files between.

    Writing raises OSError or UserError that names the file."""

    path: str

    @staticmethod
    def of(path: str | Path) -> Place:
        """Raises UserError for a kind of URL that nothing installed here knows."""
        return _RemotePlace(str(path)) if "://" in str(path) else _LocalPlace(Path(path))

    @abstractmethod
    def steps(self) -> list[int]:
        """Of what was committed, newest first."""

    @abstractmethod
    def folder(self, step: int) -> Folder: ...

    @abstractmethod
    def begin(self, step: int) -> None:
        """Makes room for a checkpoint's files."""

    @abstractmethod
    def write(self, step: int, name: str, chunks: Chunks) -> FileRecord:
        """Writes one of its files."""

    @abstractmethod
    def commit(self, step: int, content: bytes) -> None:
        """Writes COMMIT.json and makes it a checkpoint; from here on it survives a loss of power."""

    @abstractmethod
    def discard(self, step: int) -> None:
        """Removes what was begun and not committed, as far as that is possible."""

    @abstractmethod
    def remove(self, step: int) -> None:
        """Removes a checkpoint, which at no moment looks like a whole one any more."""

    @abstractmethod
    def clean(self) -> None:
        """Makes the folder that it lies in, and removes what interrupted writes and removals left, as far as that is
        possible. Only when none is going on."""


def open_folder(path: str | Path) -> Folder:
    """A folder on this machine or at a URL."""
    if "://" not in str(path):
        return _LocalFolder(Path(path))
    place, _, name = str(path).rstrip("/").rpartition("/")
    return _RemoteFolder(_RemotePlace(place), name)


class _LocalFolder(Folder):
    def __init__(self, path: Path):
        self.path = str(path)
        self._open: dict[str, int] = {}

    def exists(self, name: str) -> bool:
        return os.path.exists(os.path.join(self.path, name))

    def size(self, name: str) -> int:
        return os.stat(os.path.join(self.path, name)).st_size

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        if name not in self._open:
            path = os.path.join(self.path, name)
            if not stat.S_ISREG(os.stat(path).st_mode):  # one that waits for a writer, for example
                raise OSError(errno.EINVAL, "Not a regular file", path)
            if len(self._open) == MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[name] = os.open(path, os.O_RDONLY)
        filled = 0
        while filled < len(buffer) and (n := os.preadv(self._open[name], [buffer[filled:]], offset + filled)):
            filled += n
        return filled

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the very end there is no module `os`
        for descriptor in self._open.values():
            close(descriptor)


class _LocalPlace(Place):
    def __init__(self, root: Path):
        self.path = str(root)
        self._root = root

    def _step(self, step: int, suffix: str = "") -> Path:
        return self._root / f"step-{step}{suffix}"

    def steps(self) -> list[int]:
        try:
            names = map(STEP.fullmatch, os.listdir(self._root))
        except OSError as error:
            raise_if_unreachable(self.path, error)
            return []
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def folder(self, step: int) -> Folder:
        return _LocalFolder(self._step(step))

    def begin(self, step: int) -> None:
        if not self._root.exists():
            self._root.mkdir()  # in a folder that is there: a run's output that was removed is not made anew
            flush_folder(self._root.parent)
        temporary = self._step(step, ".tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()

    def write(self, step: int, name: str, chunks: Chunks) -> FileRecord:
        return write_bytes(self._step(step, ".tmp"), name, chunks())

    def commit(self, step: int, content: bytes) -> None:
        temporary, folder = self._step(step, ".tmp"), self._step(step)
        write_bytes(temporary, COMMIT, iter([content]))
        flush_folder(temporary)
        if folder.exists():  # of the same step, and passed over on resume because it does not verify
            bad = self._step(step, ".bad.tmp")
            shutil.rmtree(bad, ignore_errors=True)
            folder.rename(bad)
        temporary.rename(folder)
        flush_folder(self._root)
        shutil.rmtree(self._step(step, ".bad.tmp"), ignore_errors=True)

    def discard(self, step: int) -> None:
        shutil.rmtree(self._step(step, ".tmp"), ignore_errors=True)

    def remove(self, step: int) -> None:
        trash = self._step(step, ".old.tmp")  # a half-removed checkpoint must not look like one
        self._step(step).rename(trash)
        shutil.rmtree(trash)

    def clean(self) -> None:
        make_folder(self._root.parent)
        for path in self._root.glob("step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


class _RemoteFolder(Folder):
    def __init__(self, place: _RemotePlace, name: str):
        self.path = f"{place.path}/{name}"
        self._place, self._name = place, name

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        return int(self._place.ask(f"{self._name}/{name}", lambda fs, path: fs.info(path))["size"])

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        end = min(offset + len(buffer), self.size(name))
        if end <= offset:
            return 0
        content = self._place.ask(f"{self._name}/{name}", lambda fs, path: fs.cat_file(path, start=offset, end=end))
        buffer[: len(content)] = content
        return len(content)


class _RemotePlace(Place):
    def __init__(self, url: str):
        import fsspec

        self.path = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot use {url}: {error}") from error
        self._patience = Patience(stall=3600)  # one attempt may be a large upload

    def ask(
        self, name: str, work: Callable[[Any, str], Any], verb: str = "read", patience: Patience | None = None
    ) -> Any:
        """What work(file system, path of `name` below the root) returns, asked again when the store fails. Raises
        FileNotFoundError, and Unreachable when it fails to the end."""
        path = f"{self._root}/{name}".rstrip("/")

        def attempt() -> tuple[Any, FileNotFoundError | None]:
            self._fs.invalidate_cache()  # listings, which others change
            try:
                return work(self._fs, path), None
            except (IsADirectoryError, NotADirectoryError) as error:
                return None, FileNotFoundError(error.errno, error.strerror)
            except FileNotFoundError as error:
                if is_missing(error):
                    return None, error
                raise

        try:
            result, missing = (patience or self._patience).ask(f"{self.path}/{name}".rstrip("/"), attempt, verb)
        except UserError as error:
            raise Unreachable(str(error)) from error
        if missing is not None:
            reason = missing.strerror or "No such file or directory"
            raise FileNotFoundError(errno.ENOENT, reason, f"{self.path}/{name}") from missing
        return result

    def _files(self) -> dict[int, list[str]]:
        """The names of the files of every step folder, whole or not."""
        found: dict[int, list[str]] = {}
        for folder in self._names(""):
            if match := STEP.fullmatch(folder):
                found[int(match[1])] = self._names(folder)
        return found

    def _names(self, folder: str, patience: Patience | None = None) -> list[str]:
        with suppress(FileNotFoundError):
            paths = self.ask(folder, lambda fs, path: fs.ls(path, detail=False), patience=patience)
            return [path.rstrip("/").rpartition("/")[2] for path in paths]
        return []

    def steps(self) -> list[int]:
        return sorted((step for step, names in self._files().items() if COMMIT in names), reverse=True)

    def folder(self, step: int) -> Folder:
        return _RemoteFolder(self, f"step-{step}")

    def begin(self, step: int) -> None:
        self.remove(step)
        self.ask(f"step-{step}", lambda fs, path: fs.makedirs(path, exist_ok=True), "write")

    def write(self, step: int, name: str, chunks: Chunks) -> FileRecord:
        def upload(fs: Any, path: str) -> FileRecord:
            with fs.open(path, "wb", block_size=PART) as file:
                return write_chunks(file, name, chunks())

        record: FileRecord = self.ask(f"step-{step}/{name}", upload, "write")
        return record

    def commit(self, step: int, content: bytes) -> None:
        def write(fs: Any, path: str) -> None:
            fs.pipe_file(f"{path}.tmp", content)  # not every store writes a file at once
            fs.mv(f"{path}.tmp", path)

        self.ask(f"step-{step}/{COMMIT}", write, "write")

    def discard(self, step: int) -> None:
        with suppress(OSError, UserError):
            once = Patience(total=0)  # the others do not wait for this
            if COMMIT not in self._names(f"step-{step}", once):
                self._remove(step, once)

    def remove(self, step: int) -> None:
        self._remove(step, self._patience)

    def _remove(self, step: int, patience: Patience) -> None:
        with suppress(FileNotFoundError):
            self.ask(f"step-{step}/{COMMIT}", lambda fs, path: fs.rm_file(path), "remove", patience)
        with suppress(FileNotFoundError):
            self.ask(f"step-{step}", lambda fs, path: fs.rm(path, recursive=True), "remove", patience)

    def clean(self) -> None:
        for step, names in self._files().items():
            if COMMIT not in names:
                with suppress(OSError, UserError):
                    self.remove(step)
