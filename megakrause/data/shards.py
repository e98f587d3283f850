"""The reader of corpora, memory-mapped, and the check of every byte. Their layout on disk is in layout.py."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from megakrause.data.layout import (
    BLOCK,
    FileInfo,
    Index,
    Manifest,
    check_sizes,
    check_tokenizer,
    corpus_prefix,
    file_size,
    find_shards,
    manifest_path,
    read_manifest,
)
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError


class Corpus:
    """A corpus, memory-mapped: one stream of tokens, whatever its shards."""

    def __init__(self, prefix: str, shards: list[Path], manifest: Manifest | None) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.vocab_size = manifest.tokenizer.vocab_size if manifest else None
        self.indices = [Index(Path(f"{shard}.idx")) for shard in shards]
        self.dtype = self.indices[0].dtype
        self._shards: list[np.ndarray] = []  # tokens of each
        for index in self.indices:
            path = index.path.with_suffix(".bin")
            if index.dtype != self.dtype:
                raise UserError(f"{index.path} holds {index.dtype} tokens, the shards before it {self.dtype}")
            if (size := file_size(path)) != index.bin_size:
                raise UserError(f"{path} has {size} bytes, {index.path} says {index.bin_size}: truncated or swapped")
            self._shards.append(np.memmap(path, self.dtype, "r") if size else np.empty(0, self.dtype))
        self._bounds = np.cumsum([0] + [len(tokens) for tokens in self._shards])  # first token of each shard, the end
        self.num_tokens = int(self._bounds[-1])
        self.num_documents = sum(index.num_documents for index in self.indices)
        self.num_bytes = manifest.text_bytes if manifest else None
        if self.num_tokens == 0:
            raise UserError(f"corpus {prefix} is empty: it holds no tokens")

    @classmethod
    def open(cls, prefix: str | Path, tokenizer: Tokenizer | None = None) -> Corpus:
        """Maps the corpus at `prefix`; headers and sizes are checked, hashes are not (`verify_corpus` does that).

        Raises UserError when it is missing, unfinished, empty or damaged, or was made with another tokenizer."""
        prefix = corpus_prefix(prefix)
        manifest, shards = find_shards(prefix)
        if manifest:
            check_tokenizer(prefix, manifest, tokenizer)
            check_sizes(prefix, manifest)
        corpus = cls(prefix, shards, manifest)
        if tokenizer:
            corpus.vocab_size = tokenizer.vocab_size
        counts = (corpus.dtype.name, corpus.num_tokens, corpus.num_documents)
        if manifest and counts != (manifest.dtype, manifest.tokens, manifest.documents):
            raise UserError(f"corpus {prefix}: its shards hold {counts}, its manifest says otherwise; prepare it again")
        return corpus

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, on average; None without a manifest."""
        return self.num_bytes / self.num_tokens if self.num_bytes else None

    @cached_property
    def document_starts(self) -> np.ndarray:
        """First token of each document, int64 [num_documents], ascending."""
        starts = [index.document_starts() for index in self.indices]
        for part, bound in zip(starts, self._bounds, strict=False):
            part += bound
        return starts[0] if len(starts) == 1 else np.concatenate(starts)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that stand for the content: the manifest's, or without one the index's."""
        if self.manifest:
            return self.manifest.fingerprint
        digest = xxhash.xxh3_128()
        for index in self.indices:
            digest.update(np.memmap(index.path, mode="r").data)
        return digest.hexdigest()

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), in the corpus's dtype. Raises IndexError outside the corpus."""
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a corpus of {self.num_tokens}")
        shard = int(np.searchsorted(self._bounds, start, "right")) - 1
        parts = []
        while length:
            part = self._shards[shard][start - self._bounds[shard] :][:length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def read_rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each of `starts`, [len(starts), length] in the corpus's dtype."""
        rows = np.empty((len(starts), length), self.dtype)
        first = np.searchsorted(self._bounds, starts, "right") - 1
        within = starts + length <= self._bounds[first + 1]
        for shard in np.unique(first[within]):
            chosen = within & (first == shard)
            windows = np.lib.stride_tricks.sliding_window_view(self._shards[shard], length)
            rows[chosen] = windows[starts[chosen] - self._bounds[shard]]
        for row in np.flatnonzero(~within):
            rows[row] = self.read(int(starts[row]), length)
        return rows


def verify_corpus(path: str | Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Reads every byte of a corpus PREFIX, or of one shard, and checks headers, sizes, hashes, document bounds and
    token ids. Without a manifest there are no hashes to check, and the vocabulary is `tokenizer`'s.

    Returns what was checked: corpus, files, bytes, tokens, documents, vocab_size, hashed. Raises UserError that names
    the first thing wrong, its file and place."""
    prefix = corpus_prefix(path)
    manifest = _manifest_of_shard(prefix)
    if manifest:
        check_tokenizer(prefix, manifest, tokenizer)
        check_sizes(prefix, manifest)
        corpus = Corpus(prefix, [Path(prefix)], None)
    else:
        corpus = Corpus.open(prefix, tokenizer)
        manifest = corpus.manifest
    if manifest:
        files = manifest.files
        vocab_size: int | None = manifest.tokenizer.vocab_size
    else:
        pair = [Path(prefix + kind) for kind in (".bin", ".idx")]
        files = [FileInfo(name=path.name, size=file_size(path), blocks=[]) for path in pair]
        vocab_size = tokenizer.vocab_size if tokenizer else None
    num_bytes = sum(file.size for file in files)
    with tqdm(total=num_bytes, desc="verifying", unit="B", unit_scale=True) as progress:
        for file in files:
            dtype = corpus.dtype if file.name.endswith(".bin") else None
            block_size = manifest.block_size if manifest else BLOCK
            _verify_file(Path(prefix).with_name(file.name), file.blocks, block_size, dtype, vocab_size, progress)
    for index in corpus.indices:
        _verify_index(index)
    return {
        "corpus": prefix,
        "files": len(files),
        "bytes": num_bytes,
        "tokens": corpus.num_tokens,
        "documents": corpus.num_documents,
        "vocab_size": vocab_size,
        "hashed": manifest is not None,
    }


def _manifest_of_shard(prefix: str) -> Manifest | None:
    """The manifest of the corpus that has a shard `prefix`, cut down to that shard; None when there is none."""
    base = re.sub(r"-\d{5}$", "", prefix)
    if base == prefix or not manifest_path(base).exists():
        return None
    manifest = read_manifest(manifest_path(base))
    files = [file for file in manifest.files if file.name[:-4] == Path(prefix).name]
    return manifest.model_copy(update={"files": files}) if files else None


def _verify_file(
    path: Path, hashes: list[str], block_size: int, dtype: np.dtype | None, vocab_size: int | None, progress: tqdm
) -> None:
    """Compares each block with its hash, if there are any, and each token (dtype given) with the vocabulary."""
    with path.open("rb") as file:
        for number, block in enumerate(iter(lambda: file.read(block_size), b"")):
            start = number * block_size
            if hashes and hashes[number : number + 1] != [xxhash.xxh3_128_hexdigest(block)]:
                raise UserError(
                    f"{path}: block {number}, bytes {start} to {start + len(block)}, is damaged: "
                    "its hash is not the manifest's"
                )
            if dtype:
                tokens = np.frombuffer(block, dtype)
                limit = np.iinfo(dtype).max if vocab_size is None else vocab_size - 1
                if not 0 <= tokens.min() <= tokens.max() <= limit:
                    first = int(np.argmax((tokens < 0) | (tokens > limit)))
                    raise UserError(
                        f"{path}: token {tokens[first]} at byte {start + first * dtype.itemsize} is outside "
                        f"the vocabulary of {limit + 1}"
                    )
            progress.update(len(block))


def _verify_index(index: Index) -> None:
    """Sequences lie end to end in .bin, documents in order over them."""
    offsets = np.zeros(len(index.lengths), np.int64)
    np.cumsum(index.lengths[:-1], dtype=np.int64, out=offsets[1:])
    wrong = (index.lengths < 0) | (index.offsets != offsets * index.dtype.itemsize)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UserError(
            f"{index.path}: sequence {first} has {index.lengths[first]} tokens at byte {index.offsets[first]}, "
            f"where the lengths before it put it at byte {offsets[first] * index.dtype.itemsize}"
        )
    steps = np.diff(index.documents)
    if index.documents[0] != 0 or (steps < 0).any():
        first = int(np.argmax(steps < 0)) + 1 if index.documents[0] == 0 else 0
        raise UserError(f"{index.path}: document {first} begins at sequence {index.documents[first]}, out of order")
