"""The bytes of a corpus's files, each block of them compared with its hash before anything of it is handed out."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import xxhash

from megakrause.errors import UserError

BLOCK = 64 << 20  # bytes that have a hash together


class Blob(ABC):
    """A file. hashes: xxh3-128, hex, of each `block_size` bytes, if they are known.

    Whatever reads raises UserError, which names the file and the place, when a block is not what its hash says, or the
    file is not what it was or cannot be read any more.
    """

    def __init__(self, path: str, size: int, hashes: Sequence[str] = (), block_size: int = BLOCK) -> None:
        self.path = path
        self.size = size
        self.hashes = hashes
        self.block_size = block_size

    @abstractmethod
    def peek(self, start: int, count: int) -> bytes:
        """At most `count` bytes from `start` on, not compared with any hash."""

    @abstractmethod
    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """`count` elements from byte `start` on; not to be written to."""

    @abstractmethod
    def take(self, dtype: np.dtype, places: np.ndarray, base: int = 0) -> np.ndarray:
        """The elements at `places` [n] of an array that begins at byte `base`; copied."""

    @abstractmethod
    def ahead(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be wanted soon."""

    @abstractmethod
    def release(self) -> None:
        """Gives file handles back. It can be read again."""

    def block_range(self, block: int) -> tuple[int, int]:
        return block * self.block_size, min((block + 1) * self.block_size, self.size)

    def is_intact(self, block: int, content: np.ndarray) -> bool:
        """Whether the content of a block is what its hash says; True where there is none."""
        return not self.hashes or xxhash.xxh3_128_hexdigest(content.data) == self.hashes[block]

    def damaged(self, block: int) -> UserError:
        start, stop = self.block_range(block)
        return UserError(
            f"{self.path}: block {block}, bytes {start} to {stop}, is damaged: its hash is not the manifest's"
        )

    def span(self, dtype: np.dtype, places: np.ndarray, base: int) -> tuple[int, int]:
        """The least and the greatest of `places`, which are not empty. Raises UserError when they are outside."""
        first, last = int(places.min()), int(places.max())
        if first < 0 or base + (last + 1) * dtype.itemsize > self.size:
            raise UserError(f"{self.path} has no elements {first} to {last}, of which its index speaks: damaged")
        return first, last


class LocalBlob(Blob):
    """A file on this machine, memory-mapped when first read."""

    def __init__(self, path: str, size: int, hashes: Sequence[str] = (), block_size: int = BLOCK) -> None:
        super().__init__(path, size, hashes, block_size)
        self._checked: set[int] = set()
        self._mapped: tuple[int, int, int] | None = None  # what the file was when it was first mapped

    def peek(self, start: int, count: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(count)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        self._check(start, start + count * dtype.itemsize)
        return np.frombuffer(self._bytes, dtype, count, start)

    def take(self, dtype: np.dtype, places: np.ndarray, base: int = 0) -> np.ndarray:
        if not len(places):
            return np.empty(0, dtype)
        first, last = self.span(dtype, places, base)
        self._check(base + first * dtype.itemsize, base + (last + 1) * dtype.itemsize)
        return np.frombuffer(self._bytes, dtype, last + 1 - first, base + first * dtype.itemsize)[places - first]

    def ahead(self, start: int, stop: int) -> None:
        pass  # the kernel reads ahead

    def release(self) -> None:
        self.__dict__.pop("_bytes", None)

    def _check(self, start: int, stop: int) -> None:
        """Raises UserError unless bytes [start, stop) can be handed out."""
        content = self._bytes
        try:
            now = _identity(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path} is gone while it is in use: {error.strerror}; start again when it is back"
            ) from error
        if now != self._mapped:
            raise UserError(f"{self.path} was changed while it is in use; start again when it is whole")
        if not self.hashes:
            return
        for block in range(start // self.block_size, -(-stop // self.block_size)):
            if block not in self._checked:
                if not self.is_intact(block, content[slice(*self.block_range(block))]):
                    raise self.damaged(block)
                self._checked.add(block)

    @cached_property
    def _bytes(self) -> np.ndarray:
        try:
            now = _identity(self.path)
            self._mapped = self._mapped or now
            if now[0] != self.size:
                raise UserError(f"{self.path} has {now[0]} bytes, {self.size} are expected: truncated or swapped")
            return np.memmap(self.path, np.uint8, "r") if self.size else np.empty(0, np.uint8)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error


def _identity(path: str) -> tuple[int, int, int]:
    """(size, inode, time of the last change)"""
    status = os.stat(path)
    return status.st_size, status.st_ino, status.st_mtime_ns
