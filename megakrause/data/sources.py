"""The documents of inputs: cut into parts for many processes, and read.

A text or source file is one document, or, given a separator, what stands between the lines that are the separator; each
line of a file of JSON lines is one, in a field of its object; each row of a .parquet file or a dataset is one.

Plain files are cut by bytes and .parquet files by row groups, which whoever has the part reads; what can only be read
from its beginning (compressed lines, datasets) is read while it is cut, and its parts carry the records.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import pyarrow as arrow

from megakrause.data.hf_dataset import read_dataset
from megakrause.data.inputs import SUFFIXES, Input, find_inputs
from megakrause.data.quarantine import Rejected
from megakrause.data.records import (
    ReadOptions,
    Record,
    Records,
    decompressed,
    file_records,
    limited,
    num_row_groups,
    table_records,
    text_of,
)
from megakrause.errors import UserError

CHUNK = 1 << 20  # bytes of input that a process takes at a time
END = sys.maxsize


@dataclass(frozen=True)
class Part:
    """What begins in [start, stop) of an input: in bytes, of a table in row groups, of a stream in records."""

    input: Input
    number: int  # of the input
    start: int
    stop: int
    done: int  # bytes of the input that are read when the part is
    records: tuple[tuple[int, Record], ...] | None = None  # of a stream, which cannot be read from the middle

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return self.stop - self.start if self.records is None and self.input.kind in ("lines", "text") else CHUNK


def read_texts(
    inputs: Iterable[str],
    *,
    suffixes: Iterable[str] = SUFFIXES,
    exclude: Iterable[str] = (),
    text_field: str = "text",
    document_separator: str | None = None,
) -> Iterator[str]:
    """Every readable document of `inputs` (see `find_inputs`), in order."""
    options = ReadOptions(text_field, document_separator)
    for part in cut_parts(find_inputs(inputs, suffixes, exclude), options):
        yield from (item for _, item in read_part(part, options) if isinstance(item, str))


def cut_parts(inputs: Sequence[Input], options: ReadOptions, first: int = 0, start: int = 0) -> Iterator[Part]:
    """All of `inputs`, in order; from `start`, the stop of an earlier part, of input number `first` on."""
    for number, source in enumerate(inputs[first:], first):
        divisible = source.kind == "lines" or (source.kind == "text" and options.separator is not None)
        if source.kind == "dataset" or (source.compression and divisible):
            yield from _stream_parts(source, number, options, start)
        elif source.kind == "table":
            groups = num_row_groups(source)
            for group in range(start, groups):
                yield Part(source, number, group, group + 1, source.size * (group + 1) // groups)
        else:
            size = max(source.size, 1)
            step = CHUNK if divisible else size
            for begin in range(start, size, step):
                stop = min(begin + step, size)
                yield Part(source, number, begin, stop, min(stop, source.size))
        start = 0


def group_parts(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in order, together about CHUNK bytes and at most 256 files."""
    group: list[Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part.size
        if len(group) == 256 or size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def read_part(part: Part, options: ReadOptions) -> Iterator[tuple[int, str | Rejected]]:
    """(lines of the file that it takes up, document) of a part, in order; "" for a blank line of .jsonl.

    The lines of what is rejected count from the part's first."""
    kind = part.input.kind
    is_whole = kind == "text" and options.separator is None
    line = 1
    for lines, record in part.records if part.records is not None else _read_range(part, options):
        item: str | Rejected
        if isinstance(record, Rejected):
            item = record
        else:
            try:
                item = text_of(record, kind, options)
            except (ValueError, RecursionError) as error:
                item = Rejected(part.input.path, None if is_whole else line, str(error))
        yield lines, item
        line += lines


def _stream_parts(source: Input, number: int, options: ReadOptions, start: int) -> Iterator[Part]:
    """An input that only its beginning leads into, from record `start` on."""
    if source.kind == "dataset":
        rows = read_dataset(source.path, source.stamp, options.columns, start)
        values = ((1, options.document(row)) for row in rows)
        yield from _batches(source, number, start, values)
        return
    try:
        with open(source.path, "rb") as raw, decompressed(raw, source) as file:
            records = file_records(file, source, 0, END, options)
            records = islice(_until_damage(records, source, options), start, None)
            yield from _batches(source, number, start, records, raw)
    except OSError as error:
        if start > 1:
            raise UserError(f"{source.path} cannot be read any more: {error.strerror or error}") from error
        if not start:
            yield Part(source, number, 0, 1, source.size, ((1, _damage(source, error)),))


def _batches(source: Input, number: int, start: int, records: Records, raw: BinaryIO | None = None) -> Iterator[Part]:
    """Records as parts of about CHUNK bytes. raw: the file whose position says how much of the input is read."""
    batch: list[tuple[int, Record]] = []
    size = done = 0
    for lines, record in records:
        batch.append((lines, record))
        size += 1 + (len(record) if isinstance(record, bytes | str) else 0)
        if size >= CHUNK:
            done = raw.tell() if raw else done + size
            yield Part(source, number, start, start + len(batch), done, tuple(batch))
            start, size, batch = start + len(batch), 0, []
    if batch:
        yield Part(source, number, start, start + len(batch), source.size or done + size, tuple(batch))


def _read_range(part: Part, options: ReadOptions) -> Records:
    """The records of a part that carries none."""
    try:
        if part.input.kind == "table":
            yield from limited(table_records(part.input, part.start, options), options)
            return
        with open(part.input.path, "rb") as file:
            data = decompressed(file, part.input) if part.input.compression else file
            yield from limited(file_records(data, part.input, part.start, part.stop, options), options)
    except (OSError, arrow.ArrowException) as error:
        yield 1, _damage(part.input, error)


def _until_damage(records: Records, source: Input, options: ReadOptions) -> Records:
    """Records to the end, or to where the stream is damaged, and that as the last."""
    line = 0
    try:
        for lines, record in limited(records, options):
            yield lines, record
            line += lines
    except OSError as error:
        yield 1, _damage(source, error, f" after line {line}" if line else "")


def _damage(source: Input, error: Exception, where: str = "") -> Rejected:
    return Rejected(source.path, None, (getattr(error, "strerror", None) or str(error)) + where, damaged=True)
