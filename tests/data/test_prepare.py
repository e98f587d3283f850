import gzip
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megakrause.data import shard_files, sources
from megakrause.data.check import verify_corpus
from megakrause.data.inputs import Input, find_files, find_inputs
from megakrause.data.layout import TokenizerInfo
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.quarantine import Rejected
from megakrause.data.records import ReadOptions
from megakrause.data.shards import Corpus
from megakrause.data.sources import Part, cut_parts, read_part, read_texts
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.writer import CorpusWriter
from megakrause.errors import UserError

ROOT = Path(__file__).parents[2]


def documents_of(prefix: str | Path, tokenizer: Tokenizer) -> list[str]:
    """The corpus decoded; every document must end with its separator, and have no other."""
    corpus = Corpus.open(prefix, tokenizer)
    result: list[str] = []
    for block in range(len(corpus.block_tokens)):
        shard, bounds = corpus.documents_of(block)
        for start, stop in pairwise(bounds.tolist()):
            ids = shard.tokens.array(corpus.dtype, start * corpus.dtype.itemsize, stop - start).tolist()
            assert ids.index(tokenizer.eos) == len(ids) - 1
            result.append(tokenizer.decode(ids))
    assert len(result) == corpus.num_documents
    return result


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of good and bad files: name -> content, in the order of documents."""
    folder = tmp_path / "texts"
    (folder / "b" / "skipped").mkdir(parents=True)
    lines = [
        b'{"text": "first line"}',
        b'{"text": "unclosed"',
        b"",
        b'{"other": "field"}',
        b'{"text": 5}',
        b'["text"]',
        b'{"text": "not \xff UTF-8"}',
        b'{"text": "half a pair \\ud800"}',
        b'{"text": ""}',
        b"[" * 100_000,
        '{"text": "last, é\\n\\ttab", "id": 3}\r'.encode(),
    ]
    files = {
        "a.txt": b"plain\r\ntext\n",
        "b/c.py": b"def f():\n    return 1\n",
        "b/skipped/d.py": b"no = 1\n",
        "b/e.dat": b"no",
        "bad.txt": b"caf\xe9",
        "empty.txt": b"",
        "lines.jsonl": b"\n".join(lines),
        "z.txt": "ende \u2581".encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


GOOD = ["plain\r\ntext\n", "def f():\n    return 1\n", "first line", "last, é\n\ttab", "ende \u2581"]


def test_good_documents_arrive_and_bad_ones_are_listed(texts: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "out" / "corpus"
    summary = tokenize_corpus([str(texts)], tokenizer, prefix, exclude=["skipped"])
    assert documents_of(prefix, tokenizer) == GOOD
    assert verify_corpus(prefix, tokenizer)["documents"] == 5
    assert summary.documents == 5 and summary.empty == 3 and summary.rejected == 8
    assert summary.tokens == Corpus.open(prefix).num_tokens
    assert summary.text_bytes == Corpus.open(prefix).num_bytes == sum(len(text.encode()) for text in GOOD)
    entries = [json.loads(line) for line in summary.quarantine.read_text().splitlines()]
    listed = [(Path(entry["source"]).name, entry["line"]) for entry in entries]
    assert listed == [("bad.txt", None), *(("lines.jsonl", line) for line in (2, 4, 5, 6, 7, 8, 10))]
    for entry, reason in zip(
        entries,
        ["can't decode byte 0xe9", "delimiter", "no object with a field 'text' but 'other'", "is no string but int",
         "no object with a field 'text' but a list", "can't decode byte 0xff", "surrogates not allowed", "recursion"],
        strict=True,
    ):  # fmt: skip
        assert reason in entry["reason"]


def test_a_clean_run_removes_the_old_quarantine(texts: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "corpus"
    tokenize_corpus([str(texts)], tokenizer, prefix)
    assert (tmp_path / "corpus.quarantine.jsonl").exists()
    summary = tokenize_corpus([str(texts / "a.txt")], tokenizer, prefix)
    assert summary.quarantine is None and not (tmp_path / "corpus.quarantine.jsonl").exists()


def test_inputs_are_files_folders_and_globs(texts: Path) -> None:
    def names(*inputs: str, **options) -> list[str]:
        return [str(path.relative_to(texts)) for path in find_files([str(texts / name) for name in inputs], **options)]

    everything = ["a.txt", "b/c.py", "b/skipped/d.py", "bad.txt", "empty.txt", "lines.jsonl", "z.txt"]
    assert names("") == everything
    assert names("z.txt", "", "a.txt", "*.txt") == everything  # sorted, each once
    assert names("b/e.dat", "*.txt") == ["a.txt", "b/e.dat", "bad.txt", "empty.txt", "z.txt"]
    assert names("**/*.py") == ["b/c.py", "b/skipped/d.py"]
    assert names("b", suffixes=[".dat"]) == ["b/e.dat"]
    assert names("", exclude=["skipped", "z.txt"]) == [
        name for name in everything if "skipped" not in name and name != "z.txt"
    ]
    for missing in ("nothing.txt", "*.zip", "b/skipped/*.txt"):
        with pytest.raises(UserError, match="^no input matches [^\n]*$"):
            names("a.txt", missing)


def test_what_is_hidden_or_there_twice_is_not_taken(texts: Path, tmp_path: Path, capfd) -> None:
    before = find_files([str(texts)])
    for name in (".git/a.txt", ".hidden.txt", "b/node_modules/x.md", "__pycache__/y.py"):
        (texts / name).parent.mkdir(exist_ok=True)
        (texts / name).write_text("hidden")
    (tmp_path / "outside.txt").write_text("outside")
    for name, target in (("0.txt", "z.txt"), ("b/again.txt", "../a.txt"), ("o.txt", "../outside.txt")):
        (texts / name).symlink_to(target)
    (texts / "p.txt").symlink_to("o.txt")
    (texts / "gone.txt").symlink_to("nowhere")
    capfd.readouterr()
    assert find_files([str(texts)]) == sorted([*before, texts / "o.txt", texts / "gone.txt"])
    assert capfd.readouterr().err == "1 files passed over (.dat): --suffix takes others\n"
    assert find_files([str(texts / ".git")]) == [texts / ".git" / "a.txt"]  # named, it is meant


def test_what_a_folder_has_besides_is_told(tmp_path: Path, capfd) -> None:
    for name in ("a.c", "b.c", "c.rst", "d", "e.json.gz", "f.csv", "g.h", "h.x"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"^no input matches [^\n]* \(there are \.c [^\n]* \.\.\.\); give files"):
        find_files([str(tmp_path)])
    (tmp_path / "a.txt").write_text("")
    assert find_files([str(tmp_path)]) == [tmp_path / "a.txt"]
    said = capfd.readouterr().err
    assert re.fullmatch(r"8 files passed over \(\.c (\S+|no suffix) .* \.\.\.\): --suffix takes others\n", said)
    found = find_files([str(tmp_path)], [".txt", ".c"], ["c.rst"])
    assert found == [tmp_path / name for name in ("a.c", "a.txt", "b.c")]
    assert "5 files passed over" in (said := capfd.readouterr().err) and ".rst" not in said and ".json.gz" in said


def test_suffixes_of_compressed_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt.gz", "e.GZ"):
        (tmp_path / name).write_text("")

    def names(*suffixes: str) -> str:
        return " ".join(path.name for path in find_files([str(tmp_path)], suffixes))

    assert names(".jsonl") == "a.jsonl b.jsonl.gz c.jsonl.zst"
    assert names(".jsonl.gz") == "b.jsonl.gz" and names(".gz") == "b.jsonl.gz d.txt.gz"
    assert names(".jsonl.zst", ".txt.gz") == "c.jsonl.zst d.txt.gz"


@pytest.mark.parametrize("name", ["a.csv", "a.tar.gz", "a.ZIP", "a.jsonl.xz", "a.csv.zst", "a.pdf", "a.safetensors"])
def test_what_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text,1")
    (tmp_path / "b.html").write_text("text")
    for entry in (name, "*"):
        with pytest.raises(UserError, match=rf"{name} is no text; convert it to .jsonl, .parquet or .txt [^\n]*$"):
            find_files([str(tmp_path / entry)])
    assert find_files([str(tmp_path / "*")], exclude=[name]) == [tmp_path / "b.html"]


@pytest.mark.parametrize("url", ["https://host/a.jsonl", "hf://datasets/a/b/c.jsonl.gz", "s3://x/*.txt"])
def test_text_is_not_read_from_urls(url: str) -> None:
    with pytest.raises(UserError, match=r"text is not read from URLs; download it and prepare it first [^\n]*hf:ID$"):
        find_inputs([url])


def test_outputs_that_would_be_taken_for_something_else(texts: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name, says in [
        ("out", f"is a folder: name a PREFIX such as {tmp_path}/out/train$"),
        ("out/", f"is a folder: name a PREFIX such as {tmp_path}/out/train$"),
        ("new/", f"is a folder: name a PREFIX such as {tmp_path}/new/train$"),
        ("a.bin", f"would be taken for a .bin file: name a PREFIX such as {tmp_path}/a$"),
        ("a.jsonl.gz", "would be taken for a .gz file"),
        ("a.u16", "would be taken for a .u16 file"),
    ]:
        with pytest.raises(UserError, match=says):
            tokenize_corpus([str(texts / "a.txt")], tokenizer, f"{tmp_path}/{name}")
        with pytest.raises(UserError, match=says):
            CorpusWriter(f"{tmp_path}/{name}", TokenizerInfo.of(tokenizer))
    with pytest.raises(UserError, match="is a URL: write to a folder of this machine"):
        tokenize_corpus([str(texts / "a.txt")], tokenizer, "s3://bucket/train")
    assert sorted(tmp_path.rglob("*")) == before
    tokenize_corpus([str(texts / "a.txt")], tokenizer, tmp_path / "v1.5")


def test_read_texts_passes_over_bad_ones(texts: Path) -> None:
    assert [text for text in read_texts([str(texts)], exclude=["skipped"]) if text] == GOOD


def test_nothing_but_bad_documents_is_refused(texts: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="would be empty"):
        tokenize_corpus([str(texts / "bad.txt"), str(texts / "empty.txt")], tokenizer, tmp_path / "corpus")
    assert [path.name for path in tmp_path.glob("corpus*")] == ["corpus.quarantine.jsonl"]


def test_documents_that_are_too_long(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.txt").write_text("y" * 100)
    (tmp_path / "c.jsonl").write_text('{"text": "z"}\n{"text": "%s"}\n{"text": "zz"}' % ("z" * 200))
    summary = tokenize_corpus([str(tmp_path)], tokenizer, tmp_path / "corpus", max_document=100)
    assert documents_of(tmp_path / "corpus", tokenizer) == ["y" * 100, "z", "zz"]
    entries = [json.loads(line) for line in summary.quarantine.read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (None, "longer than 100 bytes"),
        (2, "longer than 100 bytes"),
    ]


@given(
    lines=st.lists(st.text(alphabet="abé", max_size=30), max_size=12),
    ends=st.booleans(),
    chunk=st.integers(1, 80),
    limit=st.integers(12, 60),
)
def test_lines_belong_to_one_part_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines, ends, chunk, limit
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    raws = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(raws) + ("\n" if ends and raws else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", chunk)
        options = ReadOptions(max_document=limit)
        parts = list(cut_parts(find_inputs([str(path)]), options))
        items = [item for part in parts for _, item in read_part(part, options)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    expected = [
        line if len(raw.encode()) + (number < len(raws) or ends) <= limit else None
        for number, (line, raw) in enumerate(zip(lines, raws, strict=True), 1)
    ]
    assert [None if isinstance(item, Rejected) else item for item in items] == expected


def test_line_numbers_go_on_from_part_to_part(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", 64)
    bad = {7, 8, 30, 99}
    for name in ("a.jsonl", "b.jsonl"):
        lines = ["bad" if number in bad else f'{{"text": "line {number}"}}' for number in range(1, 101)]
        (tmp_path / name).write_text("\n".join(lines))
    summary = tokenize_corpus([str(tmp_path / "*.jsonl")], tokenizer, tmp_path / "corpus")
    entries = [json.loads(line) for line in summary.quarantine.read_text().splitlines()]
    assert [(Path(entry["source"]).name, entry["line"]) for entry in entries] == [
        (name, line) for name in ("a.jsonl", "b.jsonl") for line in sorted(bad)
    ]
    assert summary.documents == 2 * 96


def test_a_file_that_disappears_is_listed(tmp_path: Path) -> None:
    [(_, rejected)] = read_part(Part(Input(str(tmp_path / "gone.txt"), 10, ""), 0, 0, 10, 10), ReadOptions())
    assert rejected == Rejected(str(tmp_path / "gone.txt"), None, "No such file or directory", damaged=True)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Several megabytes in small and large files, so that every worker has several groups to do."""
    folder = tmp_path / "many"
    folder.mkdir()
    random = np.random.default_rng(0)
    words = np.array(["self", "return", "x", "=", "0\n", "    ", "def", "é", "\u2581", "中"])

    def text(length: int) -> str:
        return " ".join(words[random.integers(0, len(words), length)])

    for number in range(300):
        (folder / f"{number:03d}.txt").write_text(text(int(random.integers(0, 2000))))
    for name in ("100.jsonl", "200.jsonl"):
        lines = ["broken" if number % 500 == 7 else json.dumps({"text": text(200)}) for number in range(1500)]
        (folder / name).write_text("\n".join(lines))
        (folder / f"{name}.gz").write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    rows = pa.table({"text": [None if number % 100 == 7 else text(200) for number in range(1500)]})
    parquet.write_table(rows, folder / "300.parquet", row_group_size=111)
    return folder


def test_the_number_of_workers_changes_no_byte(many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    results = []
    for workers in (1, 2, 3):
        prefix = tmp_path / f"out{workers}" / "corpus"
        tokenize_corpus([str(many)], tokenizer, prefix, workers=workers, shard_bytes=1 << 20)
        results.append({path.name: path.read_bytes() for path in prefix.parent.iterdir()})
    assert results[0] == results[1] == results[2]
    assert len(results[0]) > 5 and "corpus.quarantine.jsonl" in results[0]


def test_separators(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    other = tokenizer.encode("x")[-1]
    piece = sentencepiece.SentencePieceProcessor(model_file=tokenizer.path).id_to_piece(other)
    for eos, after in ((None, [tokenizer.eos]), ("none", []), (piece, [other]), ("<|endoftext|>", [tokenizer.eos])):
        summary = tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "corpus", eos=eos)
        corpus = Corpus.open(tmp_path / "corpus", tokenizer)
        assert corpus.read(0, corpus.num_tokens).tolist() == [*one, *after, *two, *after]
        assert summary.documents == corpus.num_documents == 2
    with pytest.raises(UserError, match="has no piece <nothing>; give another, or none$"):
        tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "corpus", eos="<nothing>")


def test_filters_by_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["é" * length for length in (1, 4, 5, 60, 61, 100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["", *texts]))
    summary = tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "corpus", min_chars=5, max_chars=60)
    assert documents_of(tmp_path / "corpus", tokenizer) == texts[2:4]
    assert (summary.documents, summary.filtered, summary.empty, summary.rejected) == (2, 4, 1, 0)


def test_an_index_longer_than_what_is_held_of_it(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join('{"text": "%s"}' % ("x" * (n % 9)) for n in range(1000)))
    tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "a")
    monkeypatch.setattr(shard_files, "CHUNK", 7)
    tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "b")
    for kind in (".bin", ".idx"):
        assert (tmp_path / f"a{kind}").read_bytes() == (tmp_path / f"b{kind}").read_bytes()
    assert verify_corpus(tmp_path / "b", tokenizer)["documents"] == 888


SCRIPT = [sys.executable, str(ROOT / "data_prep" / "tokenize_text.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_killed_preparation_leaves_nothing_that_opens(many: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = tmp_path / "corpus"
    arguments = ["--input", str(many), "--tokenizer", tokenizer.path, "--output", str(prefix), "--workers", "2"]
    process = subprocess.Popen([*SCRIPT, *arguments], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    written = tmp_path / "corpus-00000.bin.tmp"
    deadline = time.monotonic() + 60
    while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="is unfinished"):
        Corpus.open(prefix)
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]

    tokenize_corpus([str(many)], tokenizer, prefix)
    assert verify_corpus(prefix, tokenizer)["documents"] > 3000
    assert not list(tmp_path.glob("*.tmp"))


def test_the_scripts(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "data_prep" / script), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    model, prefix = str(tmp_path / "t.model"), str(tmp_path / "corpus")
    sample = str(ROOT / "megakrause" / "data")
    code, out, _ = run("train_tokenizer.py", "--input", sample, "--vocab-size", "700", "--output", model)
    assert code == 0 and f"{model}: 700 pieces" in out
    arguments = ["--input", str(texts), "--tokenizer", model, "--output", prefix]
    code, _, err = run("tokenize_text.py", *arguments)
    said = err.splitlines()[-1]
    assert code == 1 and said.startswith("error: 8 of 17 documents were rejected, more than 1 %: the first is ")
    assert (
        f"{texts}/bad.txt ('utf-8' codec can't decode byte 0xe9" in said and f"all are in {prefix}.quarantine" in said
    )
    assert "--text-field" in said and "--max-rejected" in said
    code, out, err = run("tokenize_text.py", *arguments, "--max-rejected", "50%")
    assert code == 0 and f"{prefix}: 6 documents" in out and "8 documents were rejected, see" in err
    assert len(documents_of(prefix, Tokenizer.load(model))) == 6
    code, _, err = run("tokenize_text.py", *arguments)
    assert code == 1 and err.splitlines()[1:] == [
        f"error: the corpus {prefix} is there and finished: choose another name, or --overwrite"
    ]
    assert run("tokenize_text.py", *arguments, "--max-rejected", "8", "--overwrite")[0] == 0

    code, _, err = run("train_tokenizer.py", "--input", sample, "--vocab-size", "700", "--output", model)
    assert code == 1 and err == f"error: the tokenizer {model} is there: choose another name, or --overwrite\n"
    over = [model, "--overwrite"]
    assert run("train_tokenizer.py", "--input", sample, "--vocab-size", "400", "--output", *over)[0] == 0
    assert Tokenizer.load(model).vocab_size == 400
    code, _, err = run("train_tokenizer.py", "--input", "nothing", "--vocab-size", "700", "--output", *over)
    assert code == 1 and err.splitlines()[-1].startswith("error: no input matches nothing")
    code, _, err = run("train_tokenizer.py", "--input", sample, "--vocab-size", "700", "--output", f"{model}/t")
    assert code == 1 and err.splitlines()[-1].startswith(f"error: {model}")
    for script in ("train_tokenizer.py", "tokenize_text.py"):
        code, out, _ = run(script, "--help")
        assert code == 0 and "examples:" in out


def test_errors_are_one_line_and_exit_code_1() -> None:
    arguments = ["--input", "x", "--tokenizer", "missing.model", "--output", "y"]
    failed = subprocess.run([*SCRIPT, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "error: cannot read tokenizer missing.model: No such file or directory\n"
