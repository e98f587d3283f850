"""The reader of corpora: ours and those of other software, in place, as blocks of documents over shards.

PREFIX             PREFIX.manifest.json with the shards that it lists, or Megatron's and GPT-NeoX's PREFIX.bin/.idx
FILE.ds            datatrove's and nanotron's, with FILE.ds.index
FILE.npy .u16 .u32 tokens and nothing else (OLMo), or an .npy file; documents end with the tokenizer's separator
FOLDER             all files of one of the last two kinds in it, by name
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from megakrause.data.blob import Blob
from megakrause.data.formats import Cuts, DatatroveShard, MegatronShard, NumpyShard, Shard
from megakrause.data.layout import (
    Manifest,
    check_sizes,
    check_tokenizer,
    corpus_prefix,
    file_size,
    manifest_path,
    read_manifest,
    unfinished_path,
)
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

NUMPY = {".npy": None, ".u16": np.dtype(np.uint16), ".u32": np.dtype(np.uint32)}
MAPPED = 16  # shards that are mapped at a time


class Corpus:
    """A corpus: one stream of tokens, whatever its shards, and the blocks of documents that it is cut into."""

    def __init__(self, prefix: str, shards: list[Shard], manifest: Manifest | None) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.vocab_size = manifest.tokenizer.vocab_size if manifest else None
        self.shards = shards
        self.dtype = shards[0].dtype
        for shard in shards:
            if shard.dtype != self.dtype:
                raise UserError(f"{shard.tokens.path} holds {shard.dtype} tokens, the shards before it {self.dtype}")
        self._bounds = np.cumsum([0] + [shard.num_tokens for shard in shards])  # first token of each, and the end
        self.num_tokens = int(self._bounds[-1])
        counts = [shard.num_documents for shard in shards]
        self.num_documents = None if None in counts else sum(count or 0 for count in counts)
        self.num_bytes = manifest.text_bytes if manifest else None
        # Of each block its shard, its number there, and its tokens, int64 [blocks].
        self._blocks = [(s, block) for s, shard in enumerate(shards) for block in range(len(shard.cuts) - 1)]
        self.block_tokens = np.concatenate([np.diff([token for _, token in shard.cuts]) for shard in shards])
        self._recent: list[Shard] = []
        if self.num_tokens == 0:
            raise UserError(f"corpus {prefix} is empty: it holds no tokens")

    @classmethod
    def open(cls, prefix: str | Path, tokenizer: Tokenizer | None = None, dtype: str | None = None) -> Corpus:
        """Opens the corpus at `prefix`. Headers and sizes are checked; hashes, where a manifest has them, when a block
        is first read. dtype: of a token in files that do not say so.

        Raises UserError when it is missing, unfinished, empty or damaged, or was made with another tokenizer."""
        prefix = corpus_prefix(prefix)
        manifest, shards = find_shards(prefix, tokenizer, dtype)
        corpus = cls(prefix, shards, manifest)
        if tokenizer:
            corpus.vocab_size = tokenizer.vocab_size
        counts = (corpus.dtype.name, corpus.num_tokens, corpus.num_documents)
        if manifest and counts != (manifest.dtype, manifest.tokens, manifest.documents):
            raise UserError(f"corpus {prefix}: its shards hold {counts}, its manifest says otherwise; prepare it again")
        return corpus

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, on average; None where that is not known."""
        return self.num_bytes / self.num_tokens if self.num_bytes else None

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that stand for the content: the manifest's, or without one, of the sizes of the files and of
        where blocks begin."""
        if self.manifest:
            return self.manifest.fingerprint
        what = [(shard.dtype.name, shard.tokens.size, shard.cuts) for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(repr(what).encode())

    def documents_of(self, block: int) -> tuple[Shard, np.ndarray]:
        """The shard of a block, and in it the tokens at which its documents begin and the last one ends,
        int64 [documents + 1]."""
        number, inside = self._blocks[block]
        return self._use(self.shards[number]), self.shards[number].documents(inside)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), in the corpus's dtype. Raises IndexError outside the corpus."""
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a corpus of {self.num_tokens}")
        number = int(np.searchsorted(self._bounds, start, "right")) - 1
        parts = [np.empty(0, self.dtype)]
        while length:
            shard, first = self._use(self.shards[number]), start - int(self._bounds[number])
            count = min(length, shard.num_tokens - first)
            if count:
                parts.append(shard.tokens.array(self.dtype, shard.base + first * self.dtype.itemsize, count))
            start, length, number = start + count, length - count, number + 1
        return np.concatenate(parts)

    def _use(self, shard: Shard) -> Shard:
        """Keeps few files mapped, however many shards there are."""
        if shard not in self._recent:
            self._recent.append(shard)
            if len(self._recent) > MAPPED:
                for blob in vars(self._recent.pop(0)).values():
                    if isinstance(blob, Blob):
                        blob.release()
        return shard


def find_shards(
    prefix: str, tokenizer: Tokenizer | None = None, dtype: str | None = None
) -> tuple[Manifest | None, list[Shard]]:
    """(manifest, shards) of a corpus. Raises UserError when there is none, or it is not whole."""
    path = manifest_path(prefix)
    if path.exists():
        manifest = read_manifest(path)
        check_tokenizer(prefix, manifest, tokenizer)
        check_sizes(prefix, manifest)
        return manifest, _manifest_shards(path.parent, manifest)
    if unfinished_path(prefix).exists():
        raise UserError(f"corpus {prefix} is unfinished: wait for its writer, or prepare it again")
    if Path(f"{prefix}.idx").exists():
        tokens, index = (Blob(file, file_size(file)) for file in (Path(prefix + ".bin"), Path(prefix + ".idx")))
        return None, [MegatronShard(tokens, index)]
    files = _other_files(Path(prefix))
    if not files:
        raise UserError(
            f"there is no corpus at {prefix}: neither {prefix}.manifest.json nor {prefix}.idx exists, and it is no "
            f".ds, {', '.join(NUMPY)} file, nor a folder of such"
        )
    if files[0].suffix == ".ds":
        indices = [Path(f"{file}.index") for file in files]
        return None, [
            DatatroveShard(Blob(file, file_size(file)), Blob(index, file_size(index)))
            for file, index in zip(files, indices, strict=True)
        ]
    eos = tokenizer.eos if tokenizer else None
    return None, [
        NumpyShard(Blob(file, file_size(file)), NUMPY[file.suffix] or (np.dtype(dtype) if dtype else None), eos)
        for file in files
    ]


def _manifest_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    blobs = [Blob(folder / file.name, file.size, file.blocks, manifest.block_size) for file in manifest.files]
    cuts: Sequence[Cuts | None] = manifest.blocks or [None] * (len(blobs) // 2)
    return [MegatronShard(tokens, index, cut) for tokens, index, cut in zip(blobs[::2], blobs[1::2], cuts, strict=True)]


def _other_files(path: Path) -> list[Path]:
    """The files of one kind, .ds or numpy's, that a path is or has."""
    if not path.is_dir():
        return [path] if path.suffix in (".ds", *NUMPY) and path.exists() else []
    for kinds in ([".ds"], list(NUMPY)):
        if files := sorted(file for file in path.iterdir() if file.suffix in kinds):
            return files
    return []


def is_corpus_folder(path: Path) -> bool:
    """Whether a folder is a corpus itself."""
    return bool(_other_files(path))


def shard_manifest(prefix: str) -> Manifest | None:
    """The manifest of the corpus that has a shard `prefix`, cut down to that shard; None when there is none."""
    base = prefix[:-6] if prefix[-6:-5] == "-" and prefix[-5:].isdigit() else prefix
    if base == prefix or not manifest_path(base).exists():
        return None
    manifest = read_manifest(manifest_path(base))
    files = [file for file in manifest.files if file.name[:-4] == Path(prefix).name]
    return manifest.model_copy(update={"files": files, "blocks": None}) if files else None
