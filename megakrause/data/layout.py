"""The layout of a corpus on disk: Megatron's .bin/.idx pairs and the manifest beside them.

A corpus PREFIX is one shard, PREFIX.bin with PREFIX.idx, or several, PREFIX-00000.bin and so on, which
PREFIX.manifest.json lists in order. A .bin file is tokens and nothing else. An .idx file, little-endian:

    9 bytes "MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 S sequences | u64 D = documents + 1
    i32 [S] lengths in tokens | i64 [S] byte offsets into .bin | i64 [D] first sequence of each document, then S

The manifest adds what that format lacks: counts, the tokenizer, and a hash of every 64 MiB of every file.
A corpus without one, made by other software, opens too, as one shard.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ValidationError

from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

BLOCK = 64 << 20  # bytes
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # by Megatron's codes


def token_dtype(vocab_size: int) -> np.dtype:
    """As Megatron has it."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenizerInfo(BaseModel):
    """What a corpus remembers of its tokenizer."""

    fingerprint: str
    vocab_size: int
    eos: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerInfo:
        return cls(fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eos=tokenizer.eos)

    def __str__(self) -> str:
        return f"{self.fingerprint} ({self.vocab_size} pieces)"


class FileInfo(BaseModel):
    name: str  # in the manifest's folder
    size: int  # bytes
    blocks: list[str]  # xxh3-128 of each block of bytes, hex


class Manifest(BaseModel):
    """PREFIX.manifest.json."""

    version: Literal[1] = 1
    dtype: str  # of a token, numpy's name
    tokens: int
    documents: int
    text_bytes: int  # of the text, as UTF-8, that the tokens stand for
    block_size: int  # bytes hashed together
    tokenizer: TokenizerInfo
    files: list[FileInfo]  # .bin and .idx of each shard, in order

    @property
    def fingerprint(self) -> str:
        """xxh3-128, hex, of everything but the files' names."""
        return xxhash.xxh3_128_hexdigest(self.model_dump_json(exclude={"files": {"__all__": {"name"}}}).encode())


def corpus_prefix(path: str | Path) -> str:
    """PREFIX of PREFIX, PREFIX.bin, PREFIX.idx or PREFIX.manifest.json."""
    return re.sub(r"\.(bin|idx|manifest\.json)$", "", str(path))


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def unfinished_path(prefix: str | Path) -> Path:
    """The manifest while the corpus is being written: there from the first moment to the last."""
    return Path(f"{prefix}.manifest.json.tmp")


class Index:
    """An .idx file, mapped. Raises UserError when it is none, or not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(HEADER.size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is no corpus index: it begins with {header[:9]!r}, not {MAGIC!r}")
        if len(header) < HEADER.size:
            raise UserError(f"{path} is truncated: {size} bytes, not even a header of {HEADER.size}")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != 1 or code not in DTYPES or documents < 1:
            raise UserError(f"{path}: version {version}, dtype code {code}, {documents} document bounds: not supported")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # multimodal corpora add a byte per sequence
            raise UserError(f"{path} has {size} bytes where its header says {expected}: truncated or damaged")
        self.dtype = np.dtype(DTYPES[code])
        content = np.memmap(path, mode="r")
        self.lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)  # [S] tokens
        self.offsets = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)  # [S] bytes
        self.documents = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)  # [D] sequences
        if self.documents[-1] != sequences:
            raise UserError(f"{path}: its documents end at sequence {self.documents[-1]}, its sequences at {sequences}")
        self.bin_size = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def document_starts(self) -> np.ndarray:
        """First token of each document, int64 [documents]."""
        first = self.documents[:-1]
        if not len(self.offsets):
            return np.zeros(len(first), dtype=np.int64)
        starts = self.offsets.take(first, mode="clip")
        starts[first == len(self.offsets)] = self.bin_size  # a document of no sequences at the very end
        starts //= self.dtype.itemsize
        return starts


def find_shards(prefix: str | Path) -> tuple[Manifest | None, list[Path]]:
    """(manifest, paths of the shards without suffix) of a corpus. Raises UserError when there is none."""
    path = manifest_path(prefix)
    if path.exists():
        manifest = read_manifest(path)
        return manifest, [path.with_name(file.name[:-4]) for file in manifest.files if file.name.endswith(".bin")]
    if unfinished_path(prefix).exists():
        raise UserError(f"corpus {prefix} is unfinished: wait for its writer, or prepare it again")
    if not Path(f"{prefix}.idx").exists():
        raise UserError(f"there is no corpus at {prefix}: neither {prefix}.manifest.json nor {prefix}.idx exists")
    return None, [Path(prefix)]


def read_manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is no corpus manifest: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    names = [file.name for file in manifest.files]
    shards = [name[:-4] for name in names[::2]]
    if not names or names != [Path(shard).name + kind for shard in shards for kind in (".bin", ".idx")]:
        raise UserError(f"{path} is no corpus manifest: its files are {names}, not pairs of .bin and .idx")
    return manifest


def check_tokenizer(prefix: str | Path, manifest: Manifest, tokenizer: Tokenizer | None) -> None:
    """Raises UserError when the corpus was made with another tokenizer."""
    if tokenizer and manifest.tokenizer != TokenizerInfo.of(tokenizer):
        raise UserError(
            f"corpus {prefix} was made with tokenizer {manifest.tokenizer}, "
            f"{tokenizer.path} is {TokenizerInfo.of(tokenizer)}: use that tokenizer, or prepare the corpus again"
        )


def check_sizes(prefix: str | Path, manifest: Manifest) -> None:
    """Raises UserError when a file of the corpus is missing or has not the size that the manifest says."""
    for file in manifest.files:
        path = manifest_path(prefix).with_name(file.name)
        if (size := file_size(path)) != file.size:
            raise UserError(f"{path} has {size} bytes, the manifest says {file.size}: truncated, or of another corpus")


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
