"""`megakrause verify`: every byte of a checkpoint or a corpus against its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megakrause.checkpoint.files import Folder
from megakrause.checkpoint.place import COMMIT, open_folder
from megakrause.checkpoint.read import Checkpoint, find_place
from megakrause.data.check import verify_corpus
from megakrause.data.shards import is_corpus_folder
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError


def verify(name: str, tokenizer: str | None = None, dtype: str | None = None) -> Iterator[str]:
    """Yields what was checked, a line for each corpus or checkpoint. Raises UserError that says what is wrong where."""
    folders = _checkpoints(name)
    if not folders and Path(name).is_dir() and not is_corpus_folder(Path(name)):
        raise UserError(f"{name} is no checkpoint and no run's folder with one; name one, or a corpus PREFIX")
    if not folders:
        yield _verify_corpus(name, tokenizer, dtype)
    damaged = []
    for folder in folders:
        try:
            checkpoint = Checkpoint(folder)
            problem = checkpoint.verify()
        except UserError as error:
            problem = str(error)
        if problem is None:
            size = sum(record.size for record in checkpoint.files)
            yield f"{folder.path}: {len(checkpoint.files)} files, {size / 2**20:.1f} MiB, all checksums match"
        else:
            damaged.append(problem)
    if damaged:
        raise UserError("; ".join(damaged))


def _checkpoints(name: str) -> list[Folder]:
    """The checkpoint that a path is, or those of the run that it is."""
    is_url = "://" in name
    if not is_url and not Path(name).is_dir() or is_url and name.startswith("http"):  # which cannot be listed
        return []
    if (folder := open_folder(name)).exists(COMMIT):
        return [folder]
    place = find_place(name)
    return [place.folder(step) for step in place.steps()]


def _verify_corpus(path: str, tokenizer: str | None, dtype: str | None) -> str:
    found = verify_corpus(path, Tokenizer.load(tokenizer) if tokenizer else None, dtype)
    documents = "" if found["documents"] is None else f" in {found['documents']:,} documents"
    hashes = "all checksums match" if found["hashed"] else "no manifest, so no checksums"
    if found["classes"]:
        return (
            f"{found['corpus']}: {found['files']} files, {found['bytes'] / 2**20:.1f} MiB, "
            f"{found['documents']:,} images of {found['classes']} classes, {hashes}"
        )
    ids = "" if found["vocab_size"] else "; token ids not checked, give --tokenizer"
    return (
        f"{found['corpus']}: {found['files']} files, {found['bytes'] / 2**20:.1f} MiB, {found['tokens']:,} tokens"
        f"{documents}, {hashes}{ids}"
    )
