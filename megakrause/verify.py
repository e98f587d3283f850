"""`megakrause verify`: every byte of a checkpoint or a corpus against its checksums."""

from __future__ import annotations

from pathlib import Path

from megakrause.checkpoint.read import Checkpoint, find_checkpoint
from megakrause.data.shards import verify_corpus


def verify(path: Path) -> str:
    """What was checked, in one line. Raises UserError that says what is wrong where."""
    if path.is_dir():
        checkpoint: Checkpoint = find_checkpoint(path)
        size = sum(record.size for record in checkpoint.files)
        return f"{checkpoint.folder}: {len(checkpoint.files)} files, {size / 2**20:.1f} MiB, all checksums match"
    found = verify_corpus(path)
    hashes = "all checksums match" if found["hashed"] else "no manifest, so no checksums"
    return (
        f"{found['corpus']}: {found['files']} files, {found['bytes'] / 2**20:.1f} MiB, {found['tokens']:,} tokens in "
        f"{found['documents']:,} documents, {hashes}"
    )
