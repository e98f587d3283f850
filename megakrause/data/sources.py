"""The documents of text files and .jsonl files: found, cut into parts for many processes, and read.

A text or source file is one document; each line of a .jsonl file is one, in a field of its object.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megakrause.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
QUARANTINE = ".quarantine.jsonl"
CHUNK = 1 << 20  # bytes of input that a process takes at a time
MAX_DOCUMENT = 256 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """A text file, whole, or the lines of a .jsonl file that begin at bytes [start, stop)."""

    path: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Rejected:
    """An entry of the quarantine file."""

    source: str
    line: int | None  # from 1; None: the whole file
    reason: str


def find_files(inputs: Iterable[str], suffixes: Iterable[str] = SUFFIXES, exclude: Iterable[str] = ()) -> list[Path]:
    """Files that `inputs` name (files, folders, globs), sorted, each once.

    Of a folder, however deep, it takes files with one of `suffixes`; what has a name in `exclude`, file or folder, is
    passed over. Raises UserError for an input that matches nothing."""
    suffixes, exclude = tuple(suffixes), set(exclude)
    found: set[Path] = set()
    for entry in inputs:
        matches = [Path(entry)] if os.path.exists(entry) else [Path(path) for path in glob.glob(entry, recursive=True)]
        files = [path for path in matches if path.is_file()]
        for folder in filter(Path.is_dir, matches):
            for parent, folders, names in os.walk(folder):
                folders[:] = [name for name in folders if name not in exclude]
                files += [Path(parent, name) for name in names if name.endswith(suffixes)]
        if not files:
            raise UserError(f"no input matches {entry}; give files, globs, or folders with {' '.join(suffixes)} files")
        found.update(path for path in files if path.name not in exclude and not path.name.endswith(QUARANTINE))
    return sorted(found)


def read_texts(
    inputs: Iterable[str],
    *,
    suffixes: Iterable[str] = SUFFIXES,
    exclude: Iterable[str] = (),
    text_field: str = "text",
) -> Iterator[str]:
    """Every readable document of `inputs` (see `find_files`), in order."""
    for part in cut_parts(find_files(inputs, suffixes, exclude)):
        yield from (item for item in read_part(part, text_field, MAX_DOCUMENT) if isinstance(item, str))


def cut_parts(files: Iterable[Path]) -> Iterator[Part]:
    """All of `files`, in order."""
    for path in files:
        try:
            size = path.stat().st_size
        except OSError:  # whoever reads it will say so
            size = 0
        if path.suffix == ".jsonl":
            yield from (Part(str(path), start, min(start + CHUNK, size)) for start in range(0, max(size, 1), CHUNK))
        else:
            yield Part(str(path), 0, size)


def group_parts(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in order, together about CHUNK bytes and at most 256 files."""
    group: list[Part] = []
    for part in parts:
        group.append(part)
        if len(group) == 256 or sum(part.size for part in group) >= CHUNK:
            yield group
            group = []
    if group:
        yield group


def read_part(part: Part, text_field: str, limit: int) -> Iterator[str | Rejected]:
    """The documents of a part; of a .jsonl file one for each line, "" for a blank one."""
    is_lines = part.path.endswith(".jsonl")
    try:
        with open(part.path, "rb") as file:
            raws = _lines(file, part, limit) if is_lines else [file.read(limit + 1)]
            for number, raw in enumerate(raws, 1):
                try:
                    if len(raw) > limit:
                        raise ValueError(f"longer than {limit} bytes")
                    yield _parse_line(raw, text_field) if is_lines else raw.decode()
                except (ValueError, RecursionError) as error:
                    yield Rejected(part.path, number if is_lines else None, str(error))
    except OSError as error:
        yield Rejected(part.path, None, error.strerror or str(error))


def _lines(file: BinaryIO, part: Part, limit: int) -> Iterator[bytes]:
    """The lines that begin in the part; of one longer than `limit` bytes, its first limit + 1."""
    position = part.start
    if position:  # the line under way there is the part's before, unless it ends just there
        file.seek(position - 1)
        newline = file.read(part.stop - position).find(b"\n")
        if newline < 0:
            return
        position += newline
    file.seek(position)
    while position < part.stop and (line := file.readline(limit + 1)):
        position += len(line)
        yield line
        while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
            position += len(line)


def _parse_line(line: bytes, text_field: str) -> str:
    """The text of a line of JSON. Raises ValueError with the reason where there is none."""
    if not line.strip():
        return ""
    document = json.loads(line.decode("utf-8-sig"))
    if not isinstance(document, dict) or text_field not in document:
        raise ValueError(f"no object with a field '{text_field}'")
    text = document[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field '{text_field}' is no string but {type(text).__name__}")
    text.encode()  # raises for a lone surrogate
    return text
