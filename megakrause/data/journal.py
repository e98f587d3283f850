"""The journal of a corpus in the making: how far its temporary files may be trusted, and what has gone into them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from megakrause.data.layout import FileInfo


class OpenShard(BaseModel):
    """A shard that has not reached its size."""

    tokens: int
    documents: int
    blocks: list[str]  # hashes of the whole blocks of .bin


class Journal(BaseModel):
    """PREFIX.journal.json. All that it speaks of was on disk before it was written."""

    version: Literal[1] = 1
    settings: dict[str, Any]  # of which the corpus is a function
    progress: dict[str, Any]  # of who gives the writer its documents
    tokens: int
    documents: int
    text_bytes: int
    files: list[FileInfo]  # of finished shards
    blocks: list[list[tuple[int, int]]]  # of each of them, see `Manifest`
    shard: OpenShard | None  # after them
    finished: bool  # nothing is left but to give the files their names


def journal_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.journal.json")


def read_journal(prefix: str | Path) -> Journal | None:
    """None where there is none that can be used."""
    try:
        return Journal.model_validate_json(journal_path(prefix).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_journal(prefix: str | Path, journal: Journal) -> None:
    """Replaces it: whoever dies meanwhile leaves the old or the new one."""
    path = journal_path(prefix)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(journal.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def remove_journal(prefix: str | Path) -> None:
    path = journal_path(prefix)
    path.with_name(path.name + ".tmp").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
