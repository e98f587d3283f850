"""PREFIX.quarantine.jsonl: what could not be read, with its place and the reason, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megakrause.errors import UserError

QUARANTINE = ".quarantine.jsonl"


@dataclass(frozen=True)
class Rejected:
    """An entry."""

    source: str
    line: int | None  # from 1; of a table or a dataset the row; None: the whole file
    reason: str
    damaged: bool = False  # the file, from there on or all of it: not one document

    def __str__(self) -> str:
        return f"{self.source}{'' if self.line is None else f', line {self.line}'} ({self.reason})"


class Quarantine:
    """The file, open to append; there is none until there is an entry."""

    def __init__(self, prefix: Path, size: int) -> None:
        """Goes on after `size` bytes; 0 bytes: anew. Raises UserError when there are fewer."""
        self.path = Path(f"{prefix}{QUARANTINE}")
        if not size:
            self.path.unlink(missing_ok=True)
        elif self.path.exists() and self.path.stat().st_size >= size:
            os.truncate(self.path, size)
        else:
            raise UserError(
                f"{self.path} has not the {size} bytes that were written before: "
                f"put it back, or remove {prefix}.journal.json to start anew"
            )

    def add(self, entries: Iterable[Rejected]) -> None:
        data = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        if data:
            with self.path.open("a") as file:
                file.write(data)

    def first(self) -> Rejected | None:
        """The first document that was rejected."""
        if self.path.exists():
            with self.path.open() as file:
                for entry in (Rejected(**json.loads(line)) for line in file):
                    if not entry.damaged:
                        return entry
        return None

    def sync(self) -> int:
        """Bytes, which are on disk now."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return 0
        try:
            os.fsync(file)
            return os.fstat(file).st_size
        finally:
            os.close(file)
