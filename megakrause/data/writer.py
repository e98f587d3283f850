"""The writer of corpora: hashes while it writes, and publishes all files or none."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from megakrause.data.layout import (
    BLOCK,
    DTYPES,
    HEADER,
    MAGIC,
    FileInfo,
    Manifest,
    TokenizerInfo,
    manifest_path,
    token_dtype,
    unfinished_path,
)
from megakrause.errors import UserError

SHARD_BYTES = 4 << 30


class CorpusWriter:
    """Writes a corpus, as a context: leaving it commits, an exception inside leaves what stood there before.

    Everything is written under temporary names in the corpus's folder, synced, renamed, the manifest last; killed at
    any moment, it leaves the old corpus or nothing that opens. Memory: 4 bytes per document of the open shard.
    """

    def __init__(self, prefix: str | Path, tokenizer: TokenizerInfo, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Raises UserError when the folder cannot be written, or another process is writing this corpus."""
        self.prefix = Path(prefix)
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.num_tokens = self.num_documents = self.text_bytes = 0
        self._shard_tokens = max(1, shard_bytes // self.dtype.itemsize)
        self._files: list[FileInfo] = []  # of finished shards
        self._shard: _Shard | None = None
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._lock = unfinished_path(prefix).open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing the corpus {prefix}; wait, or choose another name") from error
        except OSError as error:
            raise UserError(f"cannot write a corpus at {prefix}: {error.strerror}") from error
        for stale in self._paths(temporary=True):
            stale.unlink()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Appends whole documents: `tokens` [n] of one after the other, their `lengths` [documents], and the size of
        their text as UTF-8."""
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            raise ValueError(f"ids {tokens.min()} to {tokens.max()} in a vocabulary of {self.tokenizer.vocab_size}")
        ends = np.cumsum(lengths, dtype=np.int64)
        document, start = 0, 0
        while document < len(ends):
            shard = self._shard or self._next_shard()
            fit = int(np.searchsorted(ends, start + self._shard_tokens - shard.num_tokens, "right"))
            if fit <= document and shard.num_tokens:
                self._finish_shard()
                continue
            stop = max(fit, document + 1)
            end = int(ends[stop - 1])
            shard.add(tokens[start:end].astype(self.dtype, copy=False), lengths[document:stop])
            document, start = stop, end
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        self.text_bytes += text_bytes

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish_shard()
                if not self.num_tokens:
                    raise UserError(f"no document has any text: the corpus {self.prefix} would be empty")
        except BaseException:
            self._discard()
            raise
        if kind is None:
            self._publish()
        else:
            self._discard()
        self._lock.close()

    def _next_shard(self) -> _Shard:
        self._shard = _Shard(self.prefix.with_name(f"{self.prefix.name}-{len(self._files) // 2:05d}"), self.dtype)
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard:
            self._files += self._shard.finish()
            self._shard = None

    def _publish(self) -> None:
        """Puts the new files in the place of the old, in an order that lets nothing half-done open."""
        written = [self.prefix.with_name(file.name) for file in self._files]
        if len(written) == 2:
            for file in self._files:
                file.name = self.prefix.name + file.name[-4:]
        manifest = Manifest(
            dtype=self.dtype.name,
            tokens=self.num_tokens,
            documents=self.num_documents,
            text_bytes=self.text_bytes,
            block_size=BLOCK,
            tokenizer=self.tokenizer,
            files=self._files,
        )
        with unfinished_path(self.prefix).open("w") as output:
            output.write(manifest.model_dump_json(indent=1) + "\n")
            output.flush()
            os.fsync(output.fileno())
        manifest_path(self.prefix).unlink(missing_ok=True)
        _sync_folder(self.prefix.parent)
        for old in self._paths(temporary=False):
            old.unlink()
        for path, info in zip(written, self._files, strict=True):
            os.replace(_temporary(path), path.with_name(info.name))
        _sync_folder(self.prefix.parent)
        os.replace(unfinished_path(self.prefix), manifest_path(self.prefix))
        _sync_folder(self.prefix.parent)

    def _discard(self) -> None:
        if self._shard:
            self._shard.close()
        for path in self._paths(temporary=True):
            path.unlink()
        unfinished_path(self.prefix).unlink(missing_ok=True)

    def _paths(self, *, temporary: bool) -> list[Path]:
        """This prefix's shards in the folder."""
        pattern = re.compile(re.escape(self.prefix.name) + r"(-\d{5})?\.(bin|idx)" + (r"\.tmp" if temporary else ""))
        return [path for path in self.prefix.parent.iterdir() if pattern.fullmatch(path.name)]


class _Shard:
    """A pair of files in the making."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.num_tokens = 0
        self._dtype = dtype
        self._lengths: list[np.ndarray] = []
        self._bin = _HashedFile(path.with_name(path.name + ".bin"))
        self._idx = _HashedFile(path.with_name(path.name + ".idx"))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self._bin.write(np.ascontiguousarray(tokens).data)
        self._lengths.append(lengths.astype("<i4"))
        self.num_tokens += len(tokens)

    def finish(self) -> list[FileInfo]:
        lengths = np.concatenate(self._lengths)
        offsets = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], out=offsets[1:])
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        self._idx.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(documents)))
        for part in (lengths, offsets * self._dtype.itemsize, documents):
            self._idx.write(part.data)
        return [self._bin.finish(), self._idx.finish()]

    def close(self) -> None:
        self._bin.file.close()
        self._idx.file.close()


class _HashedFile:
    """A new file under a temporary name, hashed block by block as it is written."""

    def __init__(self, path: Path) -> None:
        self.file = _temporary(path).open("wb")
        self._name = path.name
        self._size = 0
        self._hash = xxhash.xxh3_128()
        self._blocks: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            part = rest[: BLOCK - self._size % BLOCK]
            self.file.write(part)
            self._hash.update(part)
            self._size += len(part)
            if self._size % BLOCK == 0:
                self._end_block()
            rest = rest[len(part) :]

    def finish(self) -> FileInfo:
        if self._size % BLOCK:
            self._end_block()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return FileInfo(name=self._name, size=self._size, blocks=self._blocks)

    def _end_block(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._hash.reset()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
