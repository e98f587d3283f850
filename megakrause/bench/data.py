"""`megakrause bench data`: preparation against SentencePiece alone and Megatron-LM's loop, reading, and opening."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megakrause.bench.measure import machine, ratio, take_turns, write_json
from megakrause.data.layout import HEADER, MAGIC
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.sentencepiece_tokenizer import SPACE
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer, train_tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from megakrause.table import table

PROCESSES = 2
ROUNDS = 3
VOCABULARY = 8192
SEQ_LEN = 2048
HUGE = (10_000_000, 1000)  # documents, tokens of each


def run(megabytes: int, json_path: Path | None) -> None:
    """Measures on Python sources of this machine, checks that all agree, prints the tables. Raises UserError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = folder / "text.jsonl"
        texts = write_lines(lines, megabytes)
        tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 1000)], VOCABULARY, folder / "tokenizer.model")
        preparing = prepare(folder, lines, texts, tokenizer)
        reading = read(folder / "ours", tokenizer)
        opening = open_huge(folder / "huge")
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{size:.0f} MB of Python sources, {PROCESSES} processes; {machine()}")
    print(table(preparing))
    print("From JSON lines on disk to .bin/.idx; starting processes counts for megakrause alone.")
    print(table(reading))
    print(table(opening))
    if json_path is not None:
        result = {"machine": machine(), "preparing": preparing, "reading": reading, "opening": opening}
        write_json(json_path, result)


def write_lines(path: Path, megabytes: int) -> list[str]:
    """Python files of this installation as JSON lines; their texts. Those with SentencePiece's own mark for a space are
    left out: it alone would encode them otherwise, and not losslessly."""
    texts, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) + sorted(
        Path(sysconfig.get_path("purelib")).rglob("*.py")
    ):
        text = file.read_bytes().decode(errors="replace")
        if text and SPACE not in text:
            texts.append(text)
            size += len(text)
        if size > megabytes * 1e6:
            break
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def prepare(folder: Path, lines: Path, texts: list[str], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Rows of the table of preparation. Raises UserError when corpora differ."""
    model = tokenizer.path
    tokens = 0

    def ours() -> None:
        nonlocal tokens
        tokens = tokenize_corpus([str(lines)], tokenizer, folder / "ours", workers=PROCESSES).tokens

    contestants: dict[str, Any] = {"megakrause": ours}
    with Encoders(model, texts) as encoders, Loop(model, lines, folder / "theirs") as loop:
        contestants["SentencePiece alone"] = encoders.run
        contestants["Megatron-LM's loop"] = loop.run
        seconds = take_turns(contestants, ROUNDS)
        if encoders.tokens + len(texts) != tokens:
            raise UserError(f"{encoders.tokens} tokens without separators from SentencePiece, {tokens} from megakrause")
    for kind in (".bin", ".idx"):
        if (folder / f"ours{kind}").read_bytes() != (folder / f"theirs{kind}").read_bytes():
            raise UserError(f"ours{kind} and theirs{kind} differ: nothing is shown")
    return [
        {
            "preparing": name,
            "M tokens/s": tokens / min(found) / 1e6,
            "megakrause is faster": ratio(found, seconds["megakrause"]),
        }
        for name, found in seconds.items()
    ]


class Encoders:
    """Processes that do nothing but SentencePiece's `encode`, on texts that they hold."""

    def __init__(self, model: str, texts: list[str]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes, self.tokens = [], [], 0
        for number in range(PROCESSES):
            here, there = context.Pipe()
            process = context.Process(target=_encode_alone, args=(model, texts[number::PROCESSES], there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self) -> None:
        for pipe in self.pipes:
            pipe.send("go")
        self.tokens = sum(pipe.recv() for pipe in self.pipes)

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()


def _encode_alone(model: str, texts: list[str], pipe: Any) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    while pipe.recv() == "go":
        pipe.send(sum(len(processor.encode(text)) for text in texts))


class Loop:
    """The loop of Megatron-LM's tools/preprocess_data.py with megatron-core's own writer: a pool that parses and
    encodes lines, in chunks of 32, and a process that writes what it returns."""

    processor: sentencepiece.SentencePieceProcessor  # of a process of the pool

    def __init__(self, model: str, lines: Path, prefix: Path) -> None:
        try:
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
        except ImportError as error:
            raise UserError(f"this compares with megatron-core: pip install megatron-core ({error})") from error
        self.builder, self.lines, self.prefix = IndexedDatasetBuilder, lines, prefix
        self.pool = multiprocessing.get_context("fork").Pool(PROCESSES, _start_loop, [model])

    def run(self) -> None:
        import torch

        builder = self.builder(f"{self.prefix}.bin", dtype=np.uint16)
        with self.lines.open(encoding="utf-8") as file:
            for ids in self.pool.imap(_encode_line, file, 32):
                builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(f"{self.prefix}.idx")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()


def _start_loop(model: str) -> None:
    Loop.processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_line(line: str) -> list[int]:
    ids: list[int] = Loop.processor.encode(json.loads(line)["text"])
    return [*ids, Loop.processor.eos_id()]


def read(prefix: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Rows of the table of reading: a pass over the corpus, by batches of 8, in one thread."""
    rows = []
    for packing in ("concat", "best_fit"):
        windows = TokenWindows(
            Corpus.open(prefix, tokenizer), SEQ_LEN, eos=tokenizer.eos, mask_documents=True, seed=1, packing=packing
        )
        began, learnt = time.perf_counter(), 0
        for first in range(0, len(windows), 8):
            learnt += int(windows.batch(np.arange(first, min(first + 8, len(windows)))).loss_mask.sum())
        seconds = time.perf_counter() - began
        if learnt != windows.corpus.num_tokens:
            raise UserError(f"an epoch has {learnt} targets, the corpus {windows.corpus.num_tokens} tokens")
        rows.append({"reading, sequences of 2,048": packing, "M tokens/s": learnt / seconds / 1e6})
    return rows


def open_huge(prefix: Path) -> list[dict[str, Any]]:
    """A row: opening 10 billion tokens in 10 million documents, and the first batch, in a process of its own."""
    documents, length = HUGE
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for part in (np.full(documents, length, "<i4"), np.arange(documents) * 2 * length, np.arange(documents + 1)):
            file.write(part.data)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * documents * length)  # sparse: zeros that take no room
    done = subprocess.run([sys.executable, "-c", OPEN, str(prefix)], capture_output=True, text=True, check=True)
    seconds, private = map(float, done.stdout.split())
    return [{"opening": f"{documents * length:,} tokens", "s": seconds, "private MB": private / 1e6}]


OPEN = f"""
import sys, time
import numpy as np, psutil, torch
from megakrause.data.shards import Corpus
from megakrause.data.tokens import TokenWindows
memory = lambda: (lambda m: m.rss - m.shared)(psutil.Process().memory_info())
before, began = memory(), time.perf_counter()
windows = TokenWindows(Corpus.open(sys.argv[1]), {SEQ_LEN}, eos=1, mask_documents=True, seed=1)
windows.batch(np.arange(8))
print(time.perf_counter() - began, memory() - before)
"""
