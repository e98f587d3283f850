"""The files that corpora are read from: tokens in one file, and what says where documents begin.

Every kind is cut into blocks: at most 2^16 documents, or about 2^26 tokens where documents are long. A block is what is
read, checked and permuted together; its documents are looked up when it is used, so that opening takes no time and
no memory to speak of, however large the corpus.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from megakrause.data.blob import Blob
from megakrause.data.layout import DTYPES, HEADER, MAGIC
from megakrause.errors import UserError

BLOCK_DOCUMENTS = 1 << 16
BLOCK_TOKENS = 1 << 26
INT64 = np.dtype("<i8")
Cuts = list[tuple[int, int]]  # (document, token) at which each block begins, and both at the end


class Shard(ABC):
    """One file of tokens."""

    tokens: Blob
    base: int  # byte at which its tokens begin
    dtype: np.dtype
    num_tokens: int
    num_documents: int | None  # None: known only where a block is read
    cuts: Cuts

    @property
    def blobs(self) -> list[Blob]:
        """Its files, tokens first."""
        return [self.tokens]

    def ahead(self, block: int) -> None:
        """A block will be wanted soon."""
        (_, start), (_, end) = self.cuts[block : block + 2]
        self.tokens.ahead(self.base + start * self.dtype.itemsize, self.base + end * self.dtype.itemsize)

    @abstractmethod
    def documents(self, block: int) -> np.ndarray:
        """The tokens at which the documents of a block begin, and where the last ends, int64 [documents + 1]. Raises
        UserError when they are in disorder."""


def cut_blocks(starts: Callable[[np.ndarray], np.ndarray], num_documents: int, num_tokens: int) -> Cuts:
    """Where blocks begin. starts: the first token of each of some documents; it is asked for a few of each block."""
    first = np.arange(0, num_documents, BLOCK_DOCUMENTS)
    tokens = np.append(starts(first), num_tokens)
    parts = -(-np.diff(tokens) // BLOCK_TOKENS)
    # Long documents: evenly, at the first document that begins at or after each part's token.
    chunk = np.repeat(np.arange(len(first)), np.maximum(parts - 1, 0))
    part = np.concatenate([np.arange(1, n) for n in parts] or [first])
    wanted = tokens[chunk] + np.diff(tokens)[chunk] * part // np.maximum(parts, 1)[chunk]
    low, high = first[chunk], np.minimum(first[chunk] + BLOCK_DOCUMENTS, num_documents)
    while (low < high).any():
        middle = (low + high) // 2
        before = (starts(np.minimum(middle, num_documents - 1)) < wanted) & (low < high)
        low, high = np.where(before, middle + 1, low), np.where(before, high, np.minimum(high, middle))
    inner = np.unique(low[low < num_documents])
    documents = np.union1d(first, inner)
    positions = np.concatenate([starts(documents), [num_tokens]])
    return list(zip([*documents.tolist(), num_documents], positions.tolist(), strict=True))


class _IndexedShard(Shard):
    """A shard whose index has a number for every document."""

    index: Blob

    @property
    def blobs(self) -> list[Blob]:
        return [self.tokens, self.index]

    def documents(self, block: int) -> np.ndarray:
        (first, start), (last, end) = self.cuts[block : block + 2]
        bounds = np.append(self._starts(np.arange(first, last)), end)
        if bounds[0] != start or (np.diff(bounds) < 0).any():
            raise UserError(f"{self.index.path}: documents {first} to {last} are out of order: damaged")
        return bounds

    @abstractmethod
    def _starts(self, documents: np.ndarray) -> np.ndarray:
        """The first token of each of some documents, int64."""


class MegatronShard(_IndexedShard):
    """STEM.bin and STEM.idx (layout.py). cuts: where blocks begin, if that is known."""

    def __init__(self, tokens: Blob, index: Blob, cuts: Cuts | None = None) -> None:
        """Raises UserError when the index is none, not whole, or not that of the tokens."""
        self.tokens, self.index, self.base = tokens, index, 0
        header, path, size = index.peek(0, HEADER.size), index.path, index.size
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is no corpus index: it begins with {header[:9]!r}, not {MAGIC!r}")
        if len(header) < HEADER.size:
            raise UserError(f"{path} is truncated: {size} bytes, not even a header of {HEADER.size}")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != 1 or code not in DTYPES or bounds < 1:
            raise UserError(f"{path}: version {version}, dtype code {code}, {bounds} document bounds: not supported")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size not in (expected, expected + sequences):  # multimodal corpora add a byte per sequence
            raise UserError(f"{path} has {size} bytes where its header says {expected}: truncated or damaged")
        self.dtype = np.dtype(DTYPES[code])
        self.num_sequences, self.num_documents = sequences, bounds - 1
        # Byte of: lengths, int32 [S] tokens; offsets, int64 [S] bytes; documents, int64 [D + 1] sequences.
        self.lengths_at, self.offsets_at, self.documents_at = (HEADER.size + n * sequences for n in (0, 4, 12))
        where = self.documents_at, self.documents_at + 8 * (bounds - 1)
        first, last = (int.from_bytes(index.peek(place, 8), "little", signed=True) for place in where)
        if (first, last) != (0, sequences):
            raise UserError(
                f"{path}: its documents are of sequences {first} to {last}, there are sequences 0 to {sequences}"
            )
        length = index.peek(self.lengths_at + 4 * (sequences - 1), 4) if sequences else b""
        offset = index.peek(self.offsets_at + 8 * (sequences - 1), 8) if sequences else b""
        end = int.from_bytes(offset, "little", signed=True)
        end += int.from_bytes(length, "little", signed=True) * self.dtype.itemsize
        if tokens.size != end:
            raise UserError(f"{tokens.path} has {tokens.size} bytes, {path} says {end}: truncated or swapped")
        self.num_tokens = end // self.dtype.itemsize
        self.cuts = cuts or cut_blocks(self._starts, self.num_documents, self.num_tokens)
        ends = self.cuts[0], self.cuts[-1]
        if ends != ((0, 0), (self.num_documents, self.num_tokens)) or self.cuts != sorted(self.cuts):
            raise UserError(f"the manifest of {tokens.path} has wrong blocks: {ends[0]} to {ends[1]}; prepare it again")

    def check_cuts(self) -> None:
        """Raises UserError unless blocks begin where the documents say."""
        if self.cuts != cut_blocks(self._starts, self.num_documents or 0, self.num_tokens):
            raise UserError(f"the manifest of {self.tokens.path} has other blocks than its documents; prepare it again")

    def _starts(self, documents: np.ndarray) -> np.ndarray:
        sequence = self.index.take(INT64, documents, self.documents_at)
        if len(sequence) and not 0 <= sequence.min() <= sequence.max() <= self.num_sequences:
            raise UserError(f"{self.index.path}: a document begins at none of {self.num_sequences} sequences: damaged")
        starts = np.full(len(documents), self.tokens.size, np.int64)
        there = sequence < self.num_sequences  # those without sequences, at the very end, begin there
        starts[there] = self.index.take(INT64, sequence[there], self.offsets_at)
        return starts // self.dtype.itemsize


class DatatroveShard(_IndexedShard):
    """FILE.ds, tokens of two or four bytes, and FILE.ds.index, the end of each document as a u64."""

    def __init__(self, tokens: Blob, index: Blob) -> None:
        """Raises UserError when the index is not that of the tokens."""
        self.tokens, self.index, self.base = tokens, index, 0
        self.num_documents = index.size // 8
        end = int.from_bytes(index.peek(index.size - 8, 8), "little") if self.num_documents else 0
        if index.size % 8 or end == 0 or tokens.size not in (2 * end, 4 * end):
            raise UserError(
                f"{tokens.path} has {tokens.size} bytes, {index.path} of {index.size} bytes says {end} tokens: "
                "truncated or swapped"
            )
        self.dtype, self.num_tokens = np.dtype(np.uint16 if tokens.size == 2 * end else np.uint32), end
        self.cuts = cut_blocks(self._starts, self.num_documents, self.num_tokens)

    def _starts(self, documents: np.ndarray) -> np.ndarray:
        ends = self.index.take(INT64, np.maximum(documents - 1, 0))
        return np.where(documents > 0, ends, 0)


class NumpyShard(Shard):
    """A file of nothing but tokens, or a .npy file. Documents end with `eos`, and where a block does."""

    def __init__(self, tokens: Blob, dtype: np.dtype | None, eos: int | None) -> None:
        """dtype: of a file without a header. Raises UserError when it cannot be known, or is none of integers."""
        self.tokens, self.base, self._eos = tokens, 0, eos
        if tokens.peek(0, 6) == b"\x93NUMPY":
            with io.BytesIO(tokens.peek(0, 1 << 16)) as file:
                try:
                    read = (
                        np.lib.format.read_array_header_1_0
                        if np.lib.format.read_magic(file) == (1, 0)
                        else (np.lib.format.read_array_header_2_0)
                    )
                    shape, _, dtype = read(file)
                except ValueError as error:
                    raise UserError(f"{tokens.path} has no .npy header that can be read: {error}") from error
                self.base = file.tell()
            if len(shape) != 1:
                raise UserError(f"{tokens.path} is an array of shape {shape}; tokens are one-dimensional")
        if dtype is None:
            raise UserError(
                f'{tokens.path}: how many bytes has a token? Name it .u16 or .u32, or give dtype = "uint16" or "uint32"'
            )
        self.dtype, count = np.dtype(dtype), tokens.size - self.base
        if self.dtype.kind not in "iu":
            raise UserError(f"{tokens.path}: {count} bytes are no tokens of type {self.dtype}")
        if count % (size := self.dtype.itemsize):
            raise UserError(f"{tokens.path}: {count} bytes of tokens are not a multiple of {size} bytes: truncated?")
        self.num_tokens, self.num_documents = count // self.dtype.itemsize, None
        self.cuts = [(0, token) for token in [*range(0, self.num_tokens, BLOCK_TOKENS), self.num_tokens]]

    def documents(self, block: int) -> np.ndarray:
        (_, start), (_, end) = self.cuts[block : block + 2]
        bounds = np.array([start, end])
        if self._eos is not None:
            tokens = self.tokens.array(self.dtype, self.base + start * self.dtype.itemsize, end - start)
            bounds = np.union1d(bounds, np.flatnonzero(tokens == self._eos) + start + 1)
        return bounds
