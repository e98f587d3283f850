"""The layout of a corpus on disk: Megatron's .bin/.idx pairs and the manifest beside them.

A corpus PREFIX is one shard, PREFIX.bin with PREFIX.idx, or several, PREFIX-00000.bin and so on, which
PREFIX.manifest.json lists in order. A .bin file is tokens and nothing else. An .idx file, little-endian:

    9 bytes "MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 S sequences | u64 D = documents + 1
    i32 [S] lengths in tokens | i64 [S] byte offsets into .bin | i64 [D] first sequence of each document, then S

The manifest adds what that format lacks: counts, the tokenizer, a hash of every 64 MiB of every file, and where blocks
of documents begin. A corpus without one, made by other software, opens too (shards.py), and can be given one.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ValidationError

from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# Of names of tokens and of text, which a PREFIX must not look like.
TAKEN = (
    *(".bin", ".idx", ".ds", ".npy", ".u16", ".u32"),
    *(".jsonl", ".json", ".ndjson", ".parquet", ".txt", ".md", ".py", ".gz", ".zst"),
)
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # by Megatron's codes


def token_dtype(vocab_size: int, *, prompts: bool = False) -> np.dtype:
    """As Megatron has it. prompts: of a corpus that has some."""
    return np.dtype(np.uint16 if vocab_size < 65500 and not prompts else np.int32)


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


class ImagesInfo(BaseModel):
    """What a corpus of images remembers. Each document of it is one image: four bytes, the number of its class as a
    little-endian int32, and then the image's file, as it was or as PNG."""

    classes: list[str]  # their names, by number


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
    text_bytes: int | None  # of the text, as UTF-8, that the tokens stand for; None: not known
    block_size: int  # bytes hashed together
    tokenizer: TokenizerInfo | None = None  # of images there is none
    images: ImagesInfo | None = None
    prompts: bool = False  # some tokens are only read, not learnt from, and stored as -1 - id
    files: list[FileInfo]  # .bin and .idx of each shard, in order
    blocks: list[list[tuple[int, int]]] | None = None  # of each shard (document, token) where blocks begin, and the end

    @property
    def fingerprint(self) -> str:
        """xxh3-128, hex, of everything but the files' names."""
        excluded: dict[str, Any] = {"files": {"__all__": {"name"}}} | ({} if self.prompts else {"prompts": True})
        excluded |= {} if self.images else {"images": True}
        content = self.model_dump_json(exclude=excluded)
        return xxhash.xxh3_128_hexdigest(content.encode())


def corpus_prefix(path: str | Path) -> str:
    """PREFIX of PREFIX, PREFIX.bin, PREFIX.idx or PREFIX.manifest.json."""
    return re.sub(r"\.(bin|idx|manifest\.json)$", "", str(path))


def check_output(prefix: str | Path) -> None:
    """Raises UserError for a PREFIX that no corpus should be written to."""
    if "://" in str(prefix):
        raise UserError(f"output {prefix} is a URL: write to a folder of this machine, then upload the files")
    if str(prefix).endswith("/") or Path(prefix).is_dir():
        raise UserError(f"output {prefix} is a folder: name a PREFIX such as {Path(prefix)}/train")
    if str(prefix).endswith(TAKEN):
        raise UserError(
            f"output {prefix} would be taken for a {Path(prefix).suffix} file: name a PREFIX such as "
            f"{Path(prefix).with_suffix('')}"
        )


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def unfinished_path(prefix: str | Path) -> Path:
    """The manifest while the corpus is being written: there from the first moment to the last."""
    return Path(f"{prefix}.manifest.json.tmp")


def read_manifest(path: Path) -> Manifest:
    try:
        return parse_manifest(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parse_manifest(path: str, content: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is no corpus manifest: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    if (manifest.tokenizer is None) == (manifest.images is None):
        raise UserError(f"{path} is no corpus manifest: it names neither a tokenizer nor classes of images, or both")
    names = [file.name for file in manifest.files]
    shards = [name[:-4] for name in names[::2]]
    if not names or names != [Path(shard).name + kind for shard in shards for kind in (".bin", ".idx")]:
        raise UserError(f"{path} is no corpus manifest: its files are {names}, not pairs of .bin and .idx")
    for file in manifest.files:
        if len(file.blocks) != -(-file.size // manifest.block_size):
            raise UserError(
                f"{path} is no corpus manifest: {file.name} of {file.size} bytes has {len(file.blocks)} hashes of "
                f"{manifest.block_size} bytes"
            )
    return manifest


def check_tokenizer(prefix: str | Path, manifest: Manifest, tokenizer: Tokenizer | None) -> None:
    """Raises UserError when the corpus was made with another tokenizer."""
    if tokenizer and manifest.images:
        raise UserError(f"{prefix} is a corpus of images, not of text")
    if tokenizer and manifest.tokenizer != TokenizerInfo.of(tokenizer):
        raise UserError(
            f"corpus {prefix} was made with tokenizer {manifest.tokenizer}, "
            f"{tokenizer.path} is {TokenizerInfo.of(tokenizer)}: use that tokenizer, or prepare the corpus again"
        )
