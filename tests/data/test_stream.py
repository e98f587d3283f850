"""Text that is tokenized while it is read: what of it is learnt, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megakrause.data import sources, stream
from megakrause.data.encode import EncodeOptions
from megakrause.data.inputs import find_inputs
from megakrause.data.open import TEXT
from megakrause.data.records import ReadOptions
from megakrause.data.sources import read_texts
from megakrause.data.stream import TextStream
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.windows import Rows
from megakrause.errors import UserError

RNG = np.random.default_rng(5)
TEXTS = [" ".join(f"n{i}" for i in RNG.integers(0, 99, RNG.integers(1, 40))) for _ in range(60)]
SEQ_LEN = 17


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 500)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1200)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def make(pattern: str, tokenizer: Tokenizer, packing: str = "concat") -> TextStream:
    options = EncodeOptions(ReadOptions(), tokenizer.eos)
    return TextStream(pattern, find_inputs([pattern]), tokenizer, options, seq_len=SEQ_LEN, seed=3, packing=packing)  # type: ignore[arg-type]


def read(text: TextStream, first: int, last: int, step: int = 4) -> list[int]:
    """The targets of samples [first, last), asked for a few at a time."""
    found: list[int] = []
    for begin in range(first, last, step):
        samples = np.arange(begin, min(begin + step, last))
        rows = Rows(len(samples), SEQ_LEN, text.eos)
        text.fill(rows, np.arange(len(samples)), samples)
        found += rows.targets[rows.mask].tolist()
    return found


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_token_is_learnt_once_an_epoch(tmp_path: Path, tokenizer: Tokenizer, packing: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:35]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[35:])))
    pattern = f"{tmp_path}/*.jsonl*"
    every = Counter(token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eos])
    text = make(pattern, tokenizer, packing)
    sample, epochs = 0, []
    for epoch in range(2):  # ask sample by sample until all of an epoch have come
        found: Counter[int] = Counter()
        while found.total() < every.total():
            found.update(read(text, sample, sample + 1))
            sample += 1
        assert found == every
        assert text.state(sample)[1] == epoch + 1 or text.state(sample - 1)[1] == epoch
        epochs.append(sample)
    assert epochs[1] == 2 * epochs[0]  # blocks are the same, their documents in another order


def test_it_goes_on_from_a_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    whole = make(f"{tmp_path}/a.jsonl", tokenizer)
    states, parts = [], []
    for first in range(0, 300, 10):
        states.append(whole.state(first))
        parts.append(read(whole, first, first + 10))
    assert len({tuple(state) for state in states}) > 4
    for number in (0, 1, 7, 20, 29):
        again = make(f"{tmp_path}/a.jsonl", tokenizer)
        again.resume(states[number])
        assert read(again, 10 * number, 10 * number + 10) == parts[number]
        with pytest.raises(ValueError, match="is behind, it goes on from"):
            again.resume(states[29])
            again._blocks, again._reader = [], again._read()
            read(again, 0, 1)


def test_what_stands_for_it_is_the_content_not_the_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(lines(TEXTS))
    os.utime(tmp_path / "y/a.jsonl", (1, 1))
    first, second = (make(f"{tmp_path}/{folder}/a.jsonl", tokenizer) for folder in ("x", "y"))
    assert first.fingerprint == second.fingerprint and read(first, 0, 20) == read(second, 0, 20)
    (tmp_path / "y/a.jsonl").write_bytes(lines([TEXTS[1], TEXTS[0], *TEXTS[2:]]))
    assert make(f"{tmp_path}/y/a.jsonl", tokenizer).fingerprint != first.fingerprint


def test_files_that_vanish_or_change(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(TEXTS))
    text = make(f"{tmp_path}/*.jsonl", tokenizer)
    read(text, 0, 4)
    (tmp_path / "b.jsonl").write_bytes(lines(TEXTS[:5]))
    with pytest.raises(UserError, match="b.jsonl was changed while it is in use; start again"):
        read(text, 4, 10_000)
    text = make(f"{tmp_path}/*.jsonl", tokenizer)
    read(text, 0, 4)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"b.jsonl is (gone while it is in use|damaged: No such file)"):
        read(text, 4, 10_000)


def test_a_stream_that_is_cut_short(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = gzip.compress(lines(TEXTS * 20))
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a.jsonl.gz is damaged: .* after line \d+"):
        read(make(f"{tmp_path}/a.jsonl.gz", tokenizer), 0, 10_000)


def test_bad_lines_are_told_and_too_many_refused(
    tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 2) + b"{broken\n")
    text = make(f"{tmp_path}/a.jsonl", tokenizer)
    read(text, 0, 500)
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert said and all("what cannot be read is left out, first" in line and "a.jsonl, line" in line for line in said)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + b"{broken\n" * 2)
    with pytest.raises(UserError, match="2 of 62 documents of .* cannot be read; prepare a corpus of it"):
        read(make(f"{tmp_path}/a.jsonl", tokenizer), 0, 500)


def test_what_is_taken_for_text() -> None:
    for name in ("a.txt", "x/*.md", "a.py.gz", "*.jsonl.zst", "c4.json.gz", "a.ndjson", "a.parquet", "A.JSONL", "hf:a"):
        assert TEXT.fullmatch(name), name
    for name in ("hf://datasets/a/b/corpus", "data/train", "a.csv", "a.rst", "my_text/", "a.bin", "https://x/corpus"):
        assert not TEXT.fullmatch(name), name


def test_json_lines_by_any_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a.jsonl", "a.json", "a.ndjson"):
        (tmp_path / name).write_bytes(lines(TEXTS))
        assert list(read_texts([f"{tmp_path}/{name}"])) == TEXTS
        assert read(make(f"{tmp_path}/{name}", tokenizer), 0, 4)


def test_no_text_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match="has no text: no document of it can be read"):
        read(make(f"{tmp_path}/a.jsonl", tokenizer), 0, 1)
