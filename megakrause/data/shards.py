"""The reader of corpora: ours and those of other software, in place, as blocks of documents over shards. They lie on
this machine or anywhere that fsspec reads.

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

from megakrause.data.formats import Cuts, DatatroveShard, MegatronShard, NumpyShard, Shard
from megakrause.data.inputs import TEXT_SUFFIXES
from megakrause.data.layout import (
    Manifest,
    check_tokenizer,
    corpus_prefix,
    manifest_path,
    parse_manifest,
    read_manifest,
    unfinished_path,
)
from megakrause.data.remote import BlockCache
from megakrause.data.store import Store
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

NUMPY = {".npy": None, ".u16": np.dtype(np.uint16), ".u32": np.dtype(np.uint32)}
MAPPED = 64  # shards that are mapped at a time
SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 100, 1 << 20  # in which a separator is looked for
PARTS, PART = 8, 4096  # of a file, at even distances, and bytes of each


class Corpus:
    """A corpus: one stream of tokens, whatever its shards, and the blocks of documents that it is cut into."""

    def __init__(self, prefix: str, shards: list[Shard], manifest: Manifest | None) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.vocab_size = manifest.tokenizer.vocab_size if manifest and manifest.tokenizer else None
        self.has_prompts = manifest is not None and manifest.prompts  # tokens that are only read, as -1 - id
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
    def open(
        cls,
        prefix: str | Path,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
        cache: BlockCache | None = None,
    ) -> Corpus:
        """Opens the corpus at `prefix`, a path or a URL. Headers and sizes are checked; hashes, where a manifest has
        them, when a block is first read. dtype: of a token in files that do not say so. cache: for what a URL gives.

        Raises UserError when it is missing, unfinished, empty or damaged, or was made with another tokenizer."""
        prefix = corpus_prefix(prefix)
        manifest, shards = find_shards(prefix, Store(prefix, cache), tokenizer, dtype)
        corpus = cls(prefix, shards, manifest)
        if tokenizer:
            corpus.vocab_size = tokenizer.vocab_size
        counts = (corpus.dtype.name, corpus.num_tokens, corpus.num_documents)
        if manifest and counts != (manifest.dtype, manifest.tokens, manifest.documents):
            raise UserError(f"corpus {prefix}: its shards hold {counts}, its manifest says otherwise; prepare it again")
        return corpus

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, on average; None where that is not known, and for instructions, of
        which only a part is learnt."""
        return self.num_bytes / self.num_tokens if self.num_bytes and not self.has_prompts else None

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that stand for the content: the manifest's, or without one, of the sizes of the files, of some
        parts of each, and of where blocks begin."""
        if self.manifest:
            return self.manifest.fingerprint
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(repr((shard.dtype.name, shard.cuts)).encode())
            for blob in shard.blobs:
                digest.update(repr(blob.size).encode())
                for part in range(PARTS):
                    digest.update(blob.peek(part * max(blob.size - PART, 0) // (PARTS - 1), PART))
        return digest.hexdigest()

    def lacks_separator(self, eos: int) -> str | None:
        """A warning, if the first documents or tokens have not the separator that a run looks for."""
        shard = self.shard_of(0)
        if isinstance(shard, NumpyShard):
            count = min(shard.num_tokens, SAMPLE_TOKENS)
            found = eos in np.frombuffer(shard.tokens.peek(shard.base, count * shard.dtype.itemsize), shard.dtype)
            said = f"the first {count:,} tokens of {self.prefix} have not the tokenizer's separator {eos}"
        else:
            bounds = shard.documents(0)[: SAMPLE_DOCUMENTS + 1]
            ends = bounds[1:][np.diff(bounds) > 0] - 1
            found = not len(ends) or eos in shard.tokens.take(shard.dtype, ends, shard.base)
            said = f"no document of {self.prefix} ends with the tokenizer's separator {eos}"
            if shard.num_documents != len(bounds) - 1 or len(self.shards) > 1:
                said = f"{said}, of the first {len(bounds) - 1}"
        return None if found else f"{said}; was it made with another tokenizer?"

    def notes(self, eos: int) -> list[str]:
        """What people should know of a corpus that has no manifest."""
        if self.manifest:
            return []
        notes = []
        if all(isinstance(shard, MegatronShard) for shard in self.shards):
            notes.append(f"{self.prefix} has no manifest: not verified; megakrause data adopt gives it one")
        if warning := self.lacks_separator(eos):
            notes.append(f"warning: {warning}")
        return notes

    def documents_of(self, block: int) -> tuple[Shard, np.ndarray]:
        """The shard of a block, and in it the tokens at which its documents begin and the last one ends,
        int64 [documents + 1]."""
        number, inside = self._blocks[block]
        return self.shard_of(block), self.shards[number].documents(inside)

    def shard_of(self, block: int) -> Shard:
        return self._use(self.shards[self._blocks[block][0]])

    def announce(self, block: int) -> None:
        """A block will be wanted soon."""
        number, inside = self._blocks[block]
        self.shards[number].ahead(inside)

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
        if shard in self._recent:
            self._recent.remove(shard)
        self._recent.append(shard)
        if len(self._recent) > MAPPED:
            for blob in self._recent.pop(0).blobs:
                blob.release()
        return shard


class NoCorpus(UserError):
    """There is nothing of the name that could be a corpus."""


def find_shards(
    prefix: str, store: Store, tokenizer: Tokenizer | None = None, dtype: str | None = None
) -> tuple[Manifest | None, list[Shard]]:
    """(manifest, shards) of a corpus. Raises UserError when there is none, or it is not whole."""
    path = f"{prefix}.manifest.json"
    if store.exists(path):
        manifest = parse_manifest(path, store.read(path))
        check_tokenizer(prefix, manifest, tokenizer)
        folder = path[: path.rfind("/") + 1]
        blobs = [store.blob(folder + file.name, file.size, file.blocks, manifest.block_size) for file in manifest.files]
        for blob in blobs:
            if (size := store.size(blob.path)) != blob.size:
                raise UserError(
                    f"{blob.path} has {size} bytes, the manifest says {blob.size}: truncated, or of another corpus"
                )
        cuts: Sequence[Cuts | None] = manifest.blocks or [None] * (len(blobs) // 2)
        return manifest, [MegatronShard(*files) for files in zip(blobs[::2], blobs[1::2], cuts, strict=True)]
    if store.is_local and unfinished_path(prefix).exists():
        raise UserError(f"corpus {prefix} is unfinished: wait for its writer, or prepare it again")
    if store.exists(f"{prefix}.idx"):
        return None, [MegatronShard(store.blob(f"{prefix}.bin"), store.blob(f"{prefix}.idx"))]
    files = _other_files(prefix, store)
    if not files:
        raise NoCorpus(_no_corpus(prefix, store))
    if files[0].endswith(".ds"):
        return None, [DatatroveShard(store.blob(file), store.blob(f"{file}.index")) for file in files]
    eos = tokenizer.eos if tokenizer else None
    types = [NUMPY[file[-4:]] or (np.dtype(dtype) if dtype else None) for file in files]
    return None, [NumpyShard(store.blob(file), kind, eos) for file, kind in zip(files, types, strict=True)]


def _no_corpus(prefix: str, store: Store) -> str:
    if store.exists(f"{prefix}.bin"):
        return (
            f"there is no corpus at {prefix}: {prefix}.bin is there, {prefix}.idx is not: raw tokens without an index? "
            "name it .u16 or .u32"
        )
    mix = "; several corpora are 'WEIGHT PREFIX WEIGHT PREFIX ...'" if " " in prefix else ""
    return (
        f"there is no corpus at {prefix}: neither {prefix}.manifest.json nor {prefix}.idx exists, and it is no "
        f".ds, {', '.join(NUMPY)} file, nor a folder of such{mix}; text is read as it is where the name or pattern "
        f"ends in {' '.join(TEXT_SUFFIXES)} (also .gz, .zst); other text and folders of it: prepare it with "
        "data_prep/tokenize_text.py"
    )


def _other_files(path: str, store: Store) -> list[str]:
    """The files of one kind, .ds or numpy's, that a path is or has."""
    if path.endswith((".ds", *NUMPY)):
        return [path] if store.exists(path) else []
    inside = store.files(path)
    return [file for file in inside if file.endswith(".ds")] or [file for file in inside if file.endswith((*NUMPY,))]


def is_corpus_folder(path: Path) -> bool:
    """Whether a folder on this machine is a corpus itself."""
    return path.is_dir() and bool(_other_files(str(path), Store(str(path))))


def shard_manifest(prefix: str) -> Manifest | None:
    """The manifest of the corpus that has a shard `prefix`, cut down to that shard; None when there is none."""
    base = prefix[:-6] if prefix[-6:-5] == "-" and prefix[-5:].isdigit() else prefix
    if base == prefix or not manifest_path(base).exists():
        return None
    manifest = read_manifest(manifest_path(base))
    files = [file for file in manifest.files if file.name[:-4] == Path(prefix).name]
    return manifest.model_copy(update={"files": files, "blocks": None}) if files else None
