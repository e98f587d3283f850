import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megakrause.data import sources
from megakrause.data.inputs import Input, find_inputs
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.quarantine import Rejected
from megakrause.data.records import ReadOptions
from megakrause.data.sources import cut_parts, read_part, read_texts
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

SEPARATOR = "<|endoftext|>"
DOCUMENTS = [
    f"document {number}\n{'é中 word ' * (number * number % 61)}\n\nlast line {SEPARATOR} of {number}"
    for number in range(111)
]


def jsonl(texts: Iterable[str]) -> bytes:
    return "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in texts).encode()


def compressed(data: bytes, kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd"}[kind]) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def separated(texts: Iterable[str], newline: str = "\n") -> bytes:
    return f"{newline}{SEPARATOR}{newline}".join(texts).encode()


def table(path: Path, column: pa.Array, name: str = "text", rows: int = 37) -> None:
    columns = {"id": pa.array(range(len(column))), name: column}
    parquet.write_table(pa.table(columns), path, row_group_size=rows)


def write_kind(kind: str, folder: Path) -> str:
    """DOCUMENTS in one way of many; returns the input."""
    match kind:
        case "jsonl.gz" | "jsonl.zst":
            halves = (jsonl(DOCUMENTS[:50]), jsonl(DOCUMENTS[50:]))  # two members, two frames
            data = b"".join(compressed(half, Path(kind).suffix) for half in halves)
            (folder / f"a.{kind}").write_bytes(data)
        case "separated.txt" | "separated.txt.gz" | "separated.md.zst":
            data = separated(DOCUMENTS)
            (folder / f"a.{kind}").write_bytes(data if kind.endswith("txt") else compressed(data, Path(kind).suffix))
        case "separated crlf":
            (folder / "a.txt").write_bytes(separated(DOCUMENTS, "\r\n") + f"\r\n{SEPARATOR}".encode())
        case "one file each":
            for number, text in enumerate(DOCUMENTS):
                (folder / f"{number:03d}.txt").write_bytes(text.encode())
        case "one compressed file each":
            for number, text in enumerate(DOCUMENTS):
                suffix = (".gz", ".zst")[number % 2]
                (folder / f"{number:03d}.txt{suffix}").write_bytes(compressed(text.encode(), suffix))
        case "parquet":
            table(folder / "a.parquet", pa.array(DOCUMENTS[:100]))
            table(folder / "b.parquet", pa.array(DOCUMENTS[100:], pa.large_string()))
        case "parquet dictionary":
            table(folder / "a.parquet", pa.array(DOCUMENTS).dictionary_encode())
        case "saved dataset":
            Dataset.from_dict({"id": list(range(111)), "text": DOCUMENTS}).save_to_disk(folder / "saved", num_shards=3)
            return str(folder / "saved")
        case "saved splits":
            data = Dataset.from_dict({"text": DOCUMENTS})
            DatasetDict({"test": data.select([0]), "all": data}).save_to_disk(folder / "saved")
            return f"hf:{folder}/saved@all"
        case "dataset of files":
            table(folder / "train-0.parquet", pa.array(DOCUMENTS[:64]))
            table(folder / "train-1.parquet", pa.array(DOCUMENTS[64:]))
            return f"hf:{folder}"
    return str(folder)


KINDS = [
    "jsonl.gz", "jsonl.zst", "separated.txt", "separated.txt.gz", "separated.md.zst", "separated crlf", "one file each",
    "one compressed file each", "parquet", "parquet dictionary", "saved dataset", "saved splits", "dataset of files",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    tokenize_corpus([str(folder / "a.jsonl")], tokenizer, folder / "corpus")
    return {path.name: path.read_bytes() for path in folder.glob("corpus*")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [500, 1 << 20])
def test_every_kind_of_input_gives_the_same_corpus(
    kind: str, chunk: int, expected: dict[str, bytes], tmp_path: Path, tokenizer: Tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    (tmp_path / "in").mkdir()
    source = write_kind(kind, tmp_path / "in")
    separator = SEPARATOR if "separated" in kind else None
    summary = tokenize_corpus([source], tokenizer, tmp_path / "corpus", document_separator=separator)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("corpus*")} == expected
    assert summary.documents == len(DOCUMENTS) and summary.rejected == summary.empty == 0
    assert list(read_texts([source], document_separator=separator)) == DOCUMENTS


@pytest.mark.parametrize("kind", KINDS)
def test_parts_go_on_where_an_earlier_one_stopped(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 500)
    options = ReadOptions(separator=SEPARATOR if "separated" in kind else None)
    inputs = find_inputs([write_kind(kind, tmp_path)])
    parts = list(cut_parts(inputs, options))
    for done in range(1, len(parts) + 1, 9):
        rest = list(cut_parts(inputs, options, parts[done - 1].number, parts[done - 1].stop))
        texts = [text for part in [*parts[:done], *rest] for _, text in read_part(part, options)]
        assert texts == DOCUMENTS


@given(
    lines=st.lists(st.sampled_from(["=", "==", "a", "é", "", "=b", "x" * 30, "=\r"]), max_size=14),
    ends=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_documents_belong_to_one_part_wherever_it_is_cut(tmp_path_factory, lines, ends, chunk) -> None:
    path = tmp_path_factory.mktemp("separated") / "a.txt"
    content = "\n".join(lines) + ("\n" if ends and lines else "")
    path.write_bytes(content.encode())
    options = ReadOptions(separator="=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", chunk)
        found = [item for part in cut_parts(find_inputs([str(path)]), options) for item in read_part(part, options)]
    # The plain way: line by line.
    expected, document = [], ""
    for line in content.splitlines(keepends=True) if "\r" not in content else content.replace("\n", "\n\0").split("\0"):
        if line.rstrip("\r\n") == "=":
            expected.append(document.removesuffix("\n").removesuffix("\r"))
            document = ""
        else:
            document += line
    if document or not content:
        expected.append(document)
    assert [text for _, text in found] == expected
    assert sum(lines for lines, _ in found) == content.count("\n")


def entries(path: Path, separator: str | None = None) -> tuple[list[str], list[Rejected]]:
    """(documents, what was rejected) of a file or dataset."""
    options = ReadOptions(separator=separator)
    items = [item for part in cut_parts(find_inputs([str(path)]), options) for _, item in read_part(part, options)]
    return [x for x in items if isinstance(x, str)], [x for x in items if isinstance(x, Rejected)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 7, 0.3, 0.9])
def test_a_truncated_stream_gives_what_came_before(suffix: str, cut: float, tmp_path: Path) -> None:
    noise = [f"{number} {os.urandom(40).hex()}" for number in range(20_000)]
    lines = jsonl(noise)
    data = compressed(lines, suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    kept = len(data) - cut if isinstance(cut, int) else int(len(data) * (1 - cut))
    path.write_bytes(data[:kept])
    texts, [rejected] = entries(path)
    assert texts == noise[: len(texts)]
    assert kept / len(data) * len(lines) - len(jsonl(texts)) < 140_000  # a block of zstd and a bit
    assert rejected == Rejected(str(path), None, f"Truncated compressed stream after line {len(texts)}", damaged=True)

    document = tmp_path / f"b.txt{suffix}"  # not half a document
    document.write_bytes(data[:kept])
    assert entries(document) == ([], [Rejected(str(document), None, "Truncated compressed stream", damaged=True)])
    texts, [rejected] = entries(document, SEPARATOR)
    assert not texts and rejected.reason == "Truncated compressed stream"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_what_is_not_of_that_compression(suffix: str, kind: str, tmp_path: Path) -> None:
    for number, (content, reason) in enumerate(
        [(jsonl(DOCUMENTS), "failed"), (b"", "empty, not even a header"), (compressed(b"x", suffix)[:3], "Truncated")]
    ):
        path = tmp_path / f"{number}.{kind}{suffix}"
        path.write_bytes(content)
        texts, [rejected] = entries(path)
        assert not texts and rejected.line is None and reason in rejected.reason
    path.write_bytes(compressed(b"", suffix))
    assert entries(path) == ([] if kind == "jsonl" else [""], [])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_lines_are_listed_with_their_numbers(suffix: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 300)
    bad = {
        3: (b"{", "Expecting property name"),
        7: (b'{"other": 1}', "no object with a field 'text' but 'other'"),
        50: (b'{"text": null}', "field 'text' is no string but NoneType"),
        51: (b'{"text": "\xff"}', "can't decode byte 0xff"),
        99: (b'{"text": "\\udc00"}', "surrogates not allowed"),
        100: (b'{"text": "%s"}' % (b"x" * 5000), "longer than 3000 bytes"),
    }
    lines = [bad[number][0] if number in bad else b'{"text": "%d"}' % number for number in range(1, 112)]
    data = b"\n".join(lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compressed(data, suffix) if suffix else data)
    options = ReadOptions(max_document=3000)
    line, found = 0, {}
    for part in cut_parts(find_inputs([str(tmp_path)]), options):
        items = list(read_part(part, options))
        found |= {line + item.line: item.reason for _, item in items if isinstance(item, Rejected)}
        line += sum(lines for lines, _ in items)
    assert list(found) == list(bad) and line == 111
    assert all(reason in found[number] for number, (_, reason) in bad.items())


def test_bad_documents_between_separators(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 64)
    parts = [b"one\ntwo", b"caf\xe9\n", b"", b"y" * 3000, b"last\n"]
    (tmp_path / "a.txt").write_bytes(b"\n=\n".join(parts))
    options = ReadOptions(separator="=", max_document=2000)
    line, found = 1, []
    for part in cut_parts(find_inputs([str(tmp_path)]), options):
        items = list(read_part(part, options))
        found += [
            item if isinstance(item, str) else (line + item.line - 1, item.reason.split(": ")[-1]) for _, item in items
        ]
        line += sum(lines for lines, _ in items)
    assert found == [
        "one\ntwo",
        (4, "invalid continuation byte"),
        "",
        (9, "longer than 2000 bytes"),
        "last\n",
    ]


def test_tables_that_are_bad(tmp_path: Path) -> None:
    def reasons(name: str, write: Callable[[Path], object]) -> list[tuple[int | None, str]]:
        write(tmp_path / name)
        _, rejected = entries(tmp_path / name)
        return [(entry.line, entry.reason) for entry in rejected]

    column = pa.array(["x"] * 100)
    assert reasons("a.parquet", lambda path: table(path, column, "words")) == [
        (None, "no column 'text' but 'id', 'words'")
    ]
    assert reasons("b.parquet", lambda path: table(path, pa.array(range(100)))) == [
        (None, "column 'text' is no string but int64")
    ]
    [(line, reason)] = reasons("c.parquet", lambda path: path.write_bytes(b"PAR1, but no more"))
    assert line is None and "arquet" in reason
    [(line, reason)] = reasons("d.parquet.gz", lambda path: path.write_bytes(compressed(b"PAR1", ".gz")))
    assert (line, reason) == (None, "a .parquet file is compressed inside; decompress it")
    assert reasons("e.parquet", lambda path: table(path, pa.array([], pa.string()))) == []
    broken = pa.Array.from_buffers(pa.string(), 4, pa.array([b"good", b"\xff\xfe", b"", None], pa.binary()).buffers())
    table(tmp_path / "f.parquet", broken)
    texts, rejected = entries(tmp_path / "f.parquet")
    assert texts == ["good", ""]
    assert [entry.line for entry in rejected] == [2, 4]
    assert "can't decode byte 0xff" in rejected[0].reason and "is no string but NoneType" in rejected[1].reason


def test_a_damaged_table_gives_its_other_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": pa.array([f"{number} {os.urandom(50).hex()}" for number in range(100)])}
    parquet.write_table(pa.table(columns), path, row_group_size=50, use_dictionary=False, compression="gzip")
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(start + 100)
        file.write(b"\0" * 500)
    texts, [rejected] = entries(path)
    assert texts == columns["text"].to_pylist()[:50] and rejected.line is None


def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet", "e.txt.zst"):
        (tmp_path / name).write_bytes(b"x" * 50)
        (tmp_path / name).chmod(0)
    inputs = find_inputs([str(tmp_path)])
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        items = [item for part in cut_parts(inputs, ReadOptions()) for _, item in read_part(part, ReadOptions())]
    finally:
        os.seteuid(user)
    assert [(item.source, item.line) for item in items] == [(source.path, None) for source in inputs]
    assert all("Permission denied" in item.reason and item.damaged for item in items)


def test_datasets_that_cannot_be_read_say_so_in_one_line(tmp_path: Path) -> None:
    Dataset.from_dict({"words": ["a"]}).save_to_disk(tmp_path / "saved")
    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    for name, said in [
        (f"hf:{tmp_path}/saved", "has no field 'text' but 'words'"),
        (f"hf:{tmp_path}/splits", "has no split train but test"),
        ("hf:", "names no dataset"),
        ("hf:a@b@c", "names no dataset"),
        ("hf:nobody/nothing", "cannot read the dataset hf:nobody/nothing: "),
    ]:
        with pytest.raises(UserError, match=f"^[^\n]*{said}[^\n]*$"):
            list(read_texts([name]))


def test_a_dataset_value_that_is_no_text(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", None, "", "b"]}).save_to_disk(tmp_path / "saved")
    texts, [rejected] = entries(tmp_path / "saved")
    assert texts == ["a", "", "b"]
    assert rejected == Rejected(f"hf:{tmp_path}/saved", 2, "field 'text' is no string but NoneType")


LONG_LINE = """
import resource, sys
from megakrause.data.inputs import find_inputs
from megakrause.data.records import ReadOptions
from megakrause.data.sources import cut_parts, read_part

options = ReadOptions(max_document=1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for part in cut_parts(find_inputs(sys.argv[1:]), options):
    for _, item in read_part(part, options):
        print(str(item)[-30:])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("size", [1 << 28, pytest.param(1 << 30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_endless_line_needs_little_memory(suffix: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    with (
        open(path, "wb")
        if not suffix
        else pa.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}[suffix]) as file
    ):
        file.write(b'{"text": "one"}\n{"text": "')
        if suffix:
            for _ in range(size >> 20):
                file.write(b"a" * (1 << 20))
        else:
            file.seek(size, os.SEEK_CUR)  # a hole reads as zeros
        file.write(b'"}\n{"text": "three"}')
    run = [sys.executable, "-c", LONG_LINE, str(path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    *items, grown = done.stdout.splitlines()
    assert items[0] == "one" and items[1].endswith("longer than 1048576 bytes)") and items[2:] == ["three"]
    assert int(grown) < 40  # MiB


def test_an_input_knows_what_it_is() -> None:
    kinds = {path: (Input(path, 1, "").kind, Input(path, 1, "").compression) for path in (
        "a.jsonl", "b/a.jsonl.gz", "a.parquet", "a.txt.zst", "a.weird", "a.gz", "hf:a/b.gz", "a.json", "a.ndjson.zst",
        "A.JSONL.GZ", "a.html",
    )}  # fmt: skip
    assert kinds == {
        "a.jsonl": ("lines", None), "b/a.jsonl.gz": ("lines", "gzip"), "a.parquet": ("table", None),
        "a.txt.zst": ("text", "zstd"), "a.weird": ("text", None), "a.gz": ("text", "gzip"),
        "hf:a/b.gz": ("dataset", None), "a.json": ("lines", None), "a.ndjson.zst": ("lines", "zstd"),
        "A.JSONL.GZ": ("lines", "gzip"), "a.html": ("text", None),
    }  # fmt: skip
