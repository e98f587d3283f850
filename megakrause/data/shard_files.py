"""The two files of a shard in the making, under temporary names, hashed as they are written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from io import FileIO
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from megakrause.data.formats import Cuts, cut_blocks
from megakrause.data.journal import OpenShard
from megakrause.data.layout import DTYPES, HEADER, MAGIC, FileInfo

CHUNK = 1 << 18  # bytes of a file, or documents of an index, held at a time


class ShardFiles:
    """A pair of files in the making. Until it is finished, .idx holds room for its header and the lengths so far."""

    def __init__(self, path: Path, dtype: np.dtype, block_size: int, state: OpenShard | None = None) -> None:
        """`block_size`: bytes that are hashed together. `state`: goes on from there."""
        state = state or OpenShard(tokens=0, documents=0, blocks=[])
        self.num_tokens, self.num_documents = state.tokens, state.documents
        self._dtype = dtype
        self._path = path
        self._block_size = block_size
        self._hashes = _Hashes(block_size, state.blocks)
        self._bin, self._idx = (_open(one, size) for one, size in ShardFiles._sizes(path, dtype, state))
        self._bin.seek(block_size * len(state.blocks))
        while piece := self._bin.read(CHUNK):  # of the block under way
            self._hashes.update(piece)

    @staticmethod
    def is_whole(path: Path, dtype: np.dtype, state: OpenShard) -> bool:
        """Whether the files have at least what `state` says."""
        return all(size_of(one) >= size for one, size in ShardFiles._sizes(path, dtype, state))

    @staticmethod
    def _sizes(path: Path, dtype: np.dtype, state: OpenShard) -> list[tuple[Path, int]]:
        """.bin and .idx, and how many bytes they have."""
        sizes = {".bin": state.tokens * dtype.itemsize, ".idx": HEADER.size + 4 * state.documents}
        return [(temporary_path(path.with_name(path.name + kind)), size) for kind, size in sizes.items()]

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        data = np.ascontiguousarray(tokens).data.cast("B")
        _write(self._bin, data)
        self._hashes.update(data)
        _write(self._idx, lengths.astype("<i4").data.cast("B"))
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def sync(self) -> None:
        os.fsync(self._bin.fileno())
        os.fsync(self._idx.fileno())

    def state(self) -> OpenShard:
        return OpenShard(tokens=self.num_tokens, documents=self.num_documents, blocks=self._hashes.blocks)

    def finish(self) -> list[FileInfo]:
        """Completes .idx. What stands in it already is hashed as it is read back, all else before it is written."""
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        header = HEADER.pack(MAGIC, 1, code, self.num_documents, self.num_documents + 1)
        hashes = _Hashes(self._block_size)
        hashes.update(header)
        for lengths in self._lengths():
            hashes.update(lengths.data.cast("B"))
        for part in chain(self._offsets(), self._documents()):
            hashes.update(part.data.cast("B"))
            _write(self._idx, part.data.cast("B"))
        self._idx.seek(0)
        _write(self._idx, memoryview(header))
        sizes = self._bin.seek(0, os.SEEK_END), self._idx.seek(0, os.SEEK_END)
        self.sync()
        self.close()
        return [
            FileInfo(name=self._path.name + kind, size=size, blocks=made.finish())
            for kind, size, made in zip((".bin", ".idx"), sizes, (self._hashes, hashes), strict=True)
        ]

    def cuts(self) -> Cuts:
        """Where blocks begin, of a finished shard. Read and not mapped: mapped pages would count as this process's."""
        offsets_at = HEADER.size + 4 * self.num_documents
        with open(temporary_path(self._path.with_name(self._path.name + ".idx")), "rb") as index:

            def starts(documents: np.ndarray) -> np.ndarray:
                raw = b"".join(os.pread(index.fileno(), 8, offsets_at + 8 * int(number)) for number in documents)
                return np.frombuffer(raw, "<i8") // self._dtype.itemsize

            return cut_blocks(starts, self.num_documents, self.num_tokens)

    def close(self) -> None:
        self._bin.close()
        self._idx.close()

    def _lengths(self) -> Iterator[np.ndarray]:
        for start in range(0, self.num_documents, CHUNK):
            count = min(CHUNK, self.num_documents - start)
            yield np.frombuffer(os.pread(self._idx.fileno(), 4 * count, HEADER.size + 4 * start), "<i4")

    def _offsets(self) -> Iterator[np.ndarray]:
        """Where documents begin in .bin, in bytes."""
        end = 0
        for lengths in self._lengths():
            ends = end + np.cumsum(lengths, dtype="<i8")
            yield (ends - lengths) * self._dtype.itemsize
            end = int(ends[-1])

    def _documents(self) -> Iterator[np.ndarray]:
        """A document is one sequence."""
        for start in range(0, self.num_documents + 1, CHUNK):
            yield np.arange(start, min(start + CHUNK, self.num_documents + 1), dtype="<i8")


class _Hashes:
    """xxh3-128 of every block of a file, as its bytes come by."""

    def __init__(self, block_size: int, blocks: Iterable[str] = ()) -> None:
        """Goes on after whole `blocks`."""
        self._block_size = block_size
        self.blocks = list(blocks)
        self._size = 0  # of the block under way
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            part = rest[: self._block_size - self._size]
            self._hash.update(part)
            self._size += len(part)
            if self._size == self._block_size:
                self._end_block()
            rest = rest[len(part) :]

    def finish(self) -> list[str]:
        if self._size:
            self._end_block()
        return self.blocks

    def _end_block(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash.reset()
        self._size = 0


def _open(path: Path, size: int) -> FileIO:
    """A file of `size` bytes, to write on at its end.

    Unbuffered, so that an error of writing is raised there, and not again when the file is closed."""
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    file.truncate(size)
    file.seek(size)
    return file


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def temporary_path(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def size_of(path: Path) -> int:
    """-1 where there is no file."""
    return path.stat().st_size if path.exists() else -1
