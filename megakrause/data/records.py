"""The records of one file, from which documents are made: lines, rows, or what a separator parts; and their text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as arrow
from pyarrow import parquet

from megakrause.data.inputs import Input

MAX_DOCUMENT = 256 << 20  # bytes
PIECE = 1 << 20  # bytes of a line or a table that are read at a time
FIELDS = 20  # of an object, that are listed where the text's is missing
ROWS = 256  # of a table, decoded at a time

# What a document is made from: bytes of a file, a value of a dataset, or why there is none.
Record = Any
Records = Iterator[tuple[int, Record]]  # with the lines that it takes up in the file


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files, and where in a record they stand."""

    text_field: str = "text"
    separator: str | None = None  # a line of text files
    max_document: int = MAX_DOCUMENT  # bytes; longer ones are rejected
    fields: tuple[str, ...] = ()  # if any: a document is a JSON list of their values, and not text

    @property
    def columns(self) -> tuple[str, ...]:
        return self.fields or (self.text_field,)

    def document(self, values: Sequence[Any]) -> Any:
        """Of the columns' values in a record."""
        if not self.fields:
            return values[0]
        try:
            return json.dumps(values, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            return ValueError(str(error))


def file_records(file: BinaryIO, source: Input, start: int, stop: int, options: ReadOptions) -> Records:
    """What begins in bytes [start, stop); of a record that is too long, at least one byte more than allowed."""
    if source.kind == "lines":
        yield from ((1, line) for line in _lines(file, start, stop, options.max_document))
    elif options.separator is not None:
        yield from _separated(file, start, stop, options.separator.encode(), options.max_document)
    else:
        yield 1, file.read(options.max_document + 1)


def table_records(source: Input, group: int, options: ReadOptions) -> Records:
    """A row group's documents: text as bytes or None. The first says what is wrong with all of the file."""
    if source.compression:
        raise OSError("a .parquet file is compressed inside; decompress it")
    with parquet.ParquetFile(source.path, buffer_size=PIECE, pre_buffer=False) as table:
        names, columns = table.schema_arrow.names, options.columns
        wrong = None
        if missing := [column for column in columns if column not in names]:
            wrong = f"no column '{missing[0]}' but {', '.join(map(repr, names))}"
        elif not options.fields and not _is_text(kind := table.schema_arrow.field(columns[0]).type):
            wrong = f"column '{columns[0]}' is no string but {kind}"
        if wrong and group:
            return
        if wrong:
            raise OSError(wrong)
        groups = [group] if table.num_row_groups else []
        for batch in table.iter_batches(ROWS, groups, list(columns)):
            if options.fields:
                yield from ((1, options.document([row[c] for c in columns])) for row in batch.to_pylist())
            else:  # as bytes, one that is not UTF-8 is one bad document and not a bad batch
                yield from ((1, value) for value in batch.column(0).cast(arrow.large_binary()).to_pylist())


def limited(records: Records, options: ReadOptions) -> Records:
    """Puts a short error in the place of bytes that are too many."""
    for lines, record in records:
        if isinstance(record, bytes) and len(record) > options.max_document:
            record = _too_long(options)
        yield lines, record


def text_of(record: Record, kind: str, options: ReadOptions) -> str:
    """The text of a record. Raises ValueError with the reason where there is none."""
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, bytes) and kind in ("table", "text"):
        return record.decode()
    text = record
    if kind == "lines":
        if not record.strip():
            return ""
        document = json.loads(record.decode("utf-8-sig"))
        if not isinstance(document, dict):
            raise ValueError(f"no object with a field '{options.columns[0]}' but a {type(document).__name__}")
        if missing := [column for column in options.columns if column not in document]:
            there = ", ".join(map(repr, [*document][:FIELDS])) or "none"
            raise ValueError(f"no object with a field '{missing[0]}' but {there}")
        text = options.document([document[column] for column in options.columns])
    if isinstance(text, ValueError):
        raise text
    if not isinstance(text, str):
        raise ValueError(f"field '{options.text_field}' is no string but {type(text).__name__}")
    if len(text.encode()) > options.max_document:  # which raises for a lone surrogate
        raise _too_long(options)
    return text


def decompressed(file: Any, source: Input) -> BinaryIO:
    """A file's content. Raises OSError where it is damaged, and when it is read if it is of another format."""
    if not source.size:
        raise OSError(f"empty, not even a header of {source.compression}")
    stream = arrow.CompressedInputStream(file, source.compression)
    return io.BufferedReader(stream, 512)  # a read that meets damage loses what it had: they are small


def num_row_groups(source: Input) -> int:
    """At least 1, so that whoever reads it says what is wrong."""
    try:
        with parquet.ParquetFile(source.path) as table:
            return max(table.num_row_groups, 1)
    except (OSError, arrow.ArrowException):
        return 1


def _is_text(kind: arrow.DataType) -> bool:
    values = kind.value_type if arrow.types.is_dictionary(kind) else kind
    return arrow.types.is_string(values) or arrow.types.is_large_string(values)


def _lines(file: BinaryIO, start: int, stop: int, limit: int) -> Iterator[bytes]:
    """The lines that begin in [start, stop); of one longer than `limit` bytes, its first limit + 1."""
    position = start
    if position:  # the line under way there is the part's before, unless it ends just there
        file.seek(position - 1)
        newline = file.read(stop - position).find(b"\n")
        if newline < 0:
            return
        position += newline
        file.seek(position)
    while position < stop and (line := file.readline(limit + 1)):
        position += len(line)
        yield line
        while not line.endswith(b"\n") and (line := file.readline(PIECE)):
            position += len(line)


def _separated(file: BinaryIO, start: int, stop: int, separator: bytes, limit: int) -> Iterator[tuple[int, bytes]]:
    """(lines, document) for those that begin in [start, stop), the file's first or just after a line `separator`.

    The end of the line before a separator belongs to the separator. Of a document longer than `limit`, more than that
    is given, but not all."""
    position = max(0, start - len(separator) - 3)  # a separator that ends at `start` is "\\n", itself, "\\r\\n"
    if position:
        file.seek(position)
        newline = file.read(stop - position).find(b"\n")
        if newline < 0:
            return
        position += newline + 1
        file.seek(position)
    begin = None if start else 0  # of the document under way; None: it is the part's before
    pieces: list[bytes] = []
    lines = size = 0
    at_line_start = True
    while (begin is not None or position < stop) and (piece := file.readline(PIECE)):
        position += len(piece)
        is_separator = at_line_start and piece.rstrip(b"\r\n") == separator
        at_line_start = piece.endswith(b"\n")
        lines += at_line_start
        if is_separator:
            if begin is not None:
                yield lines, b"".join(pieces).removesuffix(b"\n").removesuffix(b"\r")
            if position >= stop:
                return
            begin = position if position >= start else None
            pieces, lines, size = [], 0, 0
        elif begin is not None and size <= limit:
            pieces.append(piece)
            size += len(piece)
    if begin is not None and (pieces or not position):
        yield lines, b"".join(pieces)


def _too_long(options: ReadOptions) -> ValueError:
    return ValueError(f"longer than {options.max_document} bytes")
