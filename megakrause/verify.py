"""`megakrause verify`: every byte of a checkpoint or a corpus against its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.write import committed_folders
from megakrause.data.check import verify_corpus
from megakrause.data.shards import is_corpus_folder
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError


def verify(name: str, tokenizer: str | None = None, dtype: str | None = None) -> Iterator[str]:
    """Yields what was checked, a line for each corpus or checkpoint. Raises UserError that says what is wrong where."""
    path = Path(name)
    if not path.is_dir() or is_corpus_folder(path):
        yield _verify_corpus(name, tokenizer, dtype)
        return
    folders = [path] if (path / "COMMIT.json").exists() else committed_folders(path / "checkpoints")
    if not folders:
        raise UserError(f"{path} is no checkpoint and no run's folder with one; name one, or a corpus PREFIX")
    damaged = []
    for folder in folders:
        try:
            checkpoint = Checkpoint(folder)
            problem = checkpoint.verify()
        except UserError as error:
            problem = str(error)
        if problem is None:
            size = sum(record.size for record in checkpoint.files)
            yield f"{folder}: {len(checkpoint.files)} files, {size / 2**20:.1f} MiB, all checksums match"
        else:
            damaged.append(problem)
    if damaged:
        raise UserError("; ".join(damaged))


def _verify_corpus(path: str, tokenizer: str | None, dtype: str | None) -> str:
    found = verify_corpus(path, Tokenizer.load(tokenizer) if tokenizer else None, dtype)
    documents = "" if found["documents"] is None else f" in {found['documents']:,} documents"
    hashes = "all checksums match" if found["hashed"] else "no manifest, so no checksums"
    ids = "" if found["vocab_size"] else "; token ids not checked, give --tokenizer"
    return (
        f"{found['corpus']}: {found['files']} files, {found['bytes'] / 2**20:.1f} MiB, {found['tokens']:,} tokens"
        f"{documents}, {hashes}{ids}"
    )
