"""The check of every byte of a corpus, and the manifest that makes it possible for corpora of other software."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from megakrause.data.blob import BLOCK, Blob, LocalBlob
from megakrause.data.formats import INT64, MegatronShard, Shard
from megakrause.data.layout import FileInfo, Manifest, TokenizerInfo, corpus_prefix, manifest_path
from megakrause.data.shards import Corpus, shard_manifest
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError


def verify_corpus(path: str | Path, tokenizer: Tokenizer | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Reads every byte of a corpus, or of one shard, and checks headers, sizes, hashes, document bounds and token ids.
    Without a manifest there are no hashes to check, the vocabulary is `tokenizer`'s, and one line on standard error
    warns where its separator is not found.

    Returns what was checked: corpus, files, bytes, tokens, documents, vocab_size, classes (of images), hashed. Raises
    UserError that names the first thing wrong, its file and place."""
    prefix = corpus_prefix(path)
    manifest = shard_manifest(prefix)
    if manifest:
        files = [(str(Path(prefix).with_name(file.name)), file) for file in manifest.files]
        tokens, index = (LocalBlob(path, file.size, file.blocks, manifest.block_size) for path, file in files)
        blobs: list[Blob] = [tokens, index]
        corpus = Corpus(prefix, [MegatronShard(tokens, index)], None)
    else:
        corpus = Corpus.open(prefix, tokenizer, dtype)
        blobs = [blob for shard in corpus.shards for blob in shard.blobs]
    vocab_size = manifest.tokenizer.vocab_size if manifest and manifest.tokenizer else corpus.vocab_size
    prompts = manifest.prompts if manifest else corpus.has_prompts
    tokens_of = {shard.tokens.path: shard for shard in corpus.shards}
    with tqdm(
        total=sum(blob.size for blob in blobs), desc="verifying", unit="B", unit_scale=True, leave=False
    ) as progress:
        for blob in blobs:
            for start in range(0, blob.size, blob.block_size):
                stop = min(start + blob.block_size, blob.size)
                blob.array(np.dtype(np.uint8), start, stop - start)
                if shard := tokens_of.get(blob.path):
                    _check_tokens(blob, shard, start, stop, vocab_size, prompts)
                progress.update(stop - start)
            blob.release()
    for shard in corpus.shards:
        if isinstance(shard, MegatronShard):
            _check_megatron_index(shard)
            shard.check_cuts()
    for block in range(len(corpus.block_tokens)):
        corpus.documents_of(block)
    if tokenizer and not (manifest or corpus.manifest) and (warning := corpus.lacks_separator(tokenizer.eos)):
        tqdm.write(f"warning: {warning}", file=sys.stderr)
    return {
        "corpus": prefix,
        "files": len(blobs),
        "bytes": sum(blob.size for blob in blobs),
        "tokens": corpus.num_tokens,
        "documents": corpus.num_documents,
        "vocab_size": vocab_size,
        "classes": len(corpus.manifest.images.classes) if corpus.manifest and corpus.manifest.images else None,
        "hashed": any(blob.hashes for blob in blobs),
    }


def adopt_corpus(prefix: str | Path, tokenizer: Tokenizer) -> Manifest:
    """Checks a .bin/.idx pair that other software wrote and puts a manifest beside it, so that what is read of it from
    now on is compared with hashes. The tokenizer is the one that made it. Raises UserError when something is wrong."""
    if "://" in str(prefix):
        raise UserError(
            f"{prefix} is a URL: adopt it where its folder can be written, then upload "
            f"{corpus_prefix(prefix).rpartition('/')[2]}.manifest.json"
        )
    prefix = corpus_prefix(prefix)
    if manifest_path(prefix).exists():
        raise UserError(f"{manifest_path(prefix)} is there already; the corpus has its hashes")
    verify_corpus(prefix, tokenizer)
    corpus = Corpus.open(prefix, tokenizer)
    (shard,) = corpus.shards
    if not isinstance(shard, MegatronShard):
        raise UserError(f"{prefix}: a manifest can be given to .bin/.idx pairs only")
    files = []
    with tqdm(total=shard.tokens.size + shard.index.size, desc="hashing", unit="B", unit_scale=True) as progress:
        for blob in shard.blobs:
            hashes = []
            for start in range(0, blob.size, BLOCK):
                part = blob.array(np.dtype(np.uint8), start, min(BLOCK, blob.size - start))
                hashes.append(xxhash.xxh3_128_hexdigest(part.data))
                progress.update(len(part))
            files.append(FileInfo(name=Path(blob.path).name, size=blob.size, blocks=hashes))
    manifest = Manifest(
        dtype=corpus.dtype.name,
        tokens=corpus.num_tokens,
        documents=shard.num_documents or 0,
        text_bytes=None,
        block_size=BLOCK,
        tokenizer=TokenizerInfo.of(tokenizer),
        files=files,
        blocks=[shard.cuts],
    )
    path = manifest_path(prefix)
    temporary = path.with_name(path.name + ".adopting")
    with temporary.open("w") as output:
        output.write(manifest.model_dump_json(indent=1) + "\n")
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, path)
    return manifest


def _check_tokens(blob: Blob, shard: Shard, start: int, stop: int, vocab_size: int | None, prompts: bool) -> None:
    """Raises UserError for a token outside the vocabulary."""
    start, size = max(start, shard.base), shard.dtype.itemsize
    start -= (start - shard.base) % size
    tokens = blob.array(shard.dtype, start, (stop - start) // size)
    limit = np.iinfo(shard.dtype).max if vocab_size is None else vocab_size - 1
    lowest = -limit - 1 if prompts else 0
    if len(tokens) and not lowest <= tokens.min() <= tokens.max() <= limit:
        first = int(np.argmax((tokens < lowest) | (tokens > limit)))
        raise UserError(
            f"{blob.path}: token {tokens[first]} at byte {start + first * size} is outside the vocabulary of "
            f"{limit + 1}"
        )


def _check_megatron_index(shard: MegatronShard) -> None:
    """Sequences lie end to end in .bin, documents in order over them."""
    index, n = shard.index, shard.num_sequences
    lengths = index.array(np.dtype("<i4"), shard.lengths_at, n)
    offsets = index.array(INT64, shard.offsets_at, n)
    documents = index.array(INT64, shard.documents_at, (shard.num_documents or 0) + 1)
    step = 1 << 20
    end = 0
    for first in range(0, n, step):
        part = lengths[first : first + step].astype(np.int64)
        expected = end + np.cumsum(part) - part
        wrong = (part < 0) | (offsets[first : first + step] != expected * shard.dtype.itemsize)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise UserError(
                f"{index.path}: sequence {first + place} has {part[place]} tokens at byte {offsets[first + place]}, "
                f"where the lengths before it put it at byte {expected[place] * shard.dtype.itemsize}"
            )
        end = int(expected[-1] + part[-1])
    for first in range(0, len(documents) - 1, step):
        steps = np.diff(documents[first : first + step + 1])
        if (steps < 0).any():
            place = first + int(np.argmax(steps < 0)) + 1
            raise UserError(f"{index.path}: document {place} begins at sequence {documents[place]}, out of order")
