"""The bytes of a corpus's files, each block of them compared with its hash before anything of it is handed out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from megakrause.errors import UserError

BLOCK = 64 << 20  # bytes that have a hash together


class Blob:
    """A file, memory-mapped when first read.

    hashes: xxh3-128, hex, of each `block_size` bytes, if they are known. Reading raises UserError, which names the file
    and the place, when a block is not what its hash says, or the file was changed, cut or removed since it was mapped.
    """

    def __init__(self, path: Path, size: int, hashes: Sequence[str] = (), block_size: int = BLOCK) -> None:
        self.path = path
        self.size = size
        self.hashes = hashes
        self.block_size = block_size
        self._checked: set[int] = set()

    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """`count` elements from byte `start` on, not a copy."""
        self.check(start, start + count * dtype.itemsize)
        return np.frombuffer(self._bytes, dtype, count, start)

    def take(self, dtype: np.dtype, places: np.ndarray, base: int = 0) -> np.ndarray:
        """The elements at `places` [n] of an array that begins at byte `base`; copied."""
        if not len(places):
            return np.empty(0, dtype)
        first, last = int(places.min()), int(places.max())
        if first < 0 or base + (last + 1) * dtype.itemsize > self.size:
            raise UserError(f"{self.path}: elements {first} to {last} are asked for, which it has not: damaged index")
        self.check(base + first * dtype.itemsize, base + (last + 1) * dtype.itemsize)
        return np.frombuffer(self._bytes, dtype, last + 1 - first, base + first * dtype.itemsize)[places - first]

    def peek(self, start: int, count: int) -> bytes:
        """At most `count` bytes from `start` on, not compared with any hash."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(count)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def check(self, start: int, stop: int) -> None:
        """Raises UserError unless bytes [start, stop) can be handed out."""
        _ = self._bytes
        try:
            now = _identity(self.path)
        except OSError as error:
            raise UserError(f"{self.path} is gone while it is in use: {error.strerror}; put it back") from error
        if now != self._mapped:
            raise UserError(f"{self.path} was changed while it is in use; put back what it was")
        if not self.hashes:
            return
        for block in range(start // self.block_size, -(-stop // self.block_size)):
            if block not in self._checked:
                self._check_block(block)
                self._checked.add(block)

    def release(self) -> None:
        """Gives its file handle back; what was checked stays so as long as the file stays the same."""
        self.__dict__.pop("_bytes", None)

    def _check_block(self, block: int) -> None:
        start = block * self.block_size
        stop = min(start + self.block_size, self.size)
        if xxhash.xxh3_128_hexdigest(self._bytes[start:stop].data) != self.hashes[block]:
            raise UserError(
                f"{self.path}: block {block}, bytes {start} to {stop}, is damaged: its hash is not the manifest's"
            )

    @cached_property
    def _bytes(self) -> np.ndarray:
        try:
            now = _identity(self.path)
            if getattr(self, "_mapped", now) != now:
                self._checked.clear()
            self._mapped = now
            if now[0] != self.size:
                raise UserError(f"{self.path} has {now[0]} bytes, {self.size} are expected: truncated or swapped")
            return np.memmap(self.path, np.uint8, "r") if self.size else np.empty(0, np.uint8)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error


def _identity(path: Path) -> tuple[int, int, int]:
    """(size, inode, time of the last change)"""
    status = os.stat(path)
    return status.st_size, status.st_ino, status.st_mtime_ns
