"""From files of text to a corpus: every document encoded, in order, by as many processes as wished.

What cannot be read goes to PREFIX.quarantine.jsonl with its source and the reason; empty documents are left out and
counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megakrause.data.layout import TokenizerInfo, token_dtype
from megakrause.data.sources import (
    MAX_DOCUMENT,
    QUARANTINE,
    SUFFIXES,
    Part,
    Rejected,
    cut_parts,
    find_files,
    group_parts,
    read_part,
)
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.writer import SHARD_BYTES, CorpusWriter
from megakrause.errors import UserError


@dataclass
class Documents:
    """What became of a few parts."""

    tokens: np.ndarray  # [n] in the corpus's dtype, every document with its separator
    lengths: np.ndarray  # int32 [documents]
    text_bytes: int = 0
    empty: int = 0
    lines: list[int] = field(default_factory=list)  # of each part
    rejected: list[list[Rejected]] = field(default_factory=list)  # of each part, lines counted from its first


@dataclass
class Summary:
    """What `tokenize_corpus` did."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    rejected: int = 0
    quarantine: Path | None = None  # lists what was rejected, if anything was


def tokenize_corpus(
    inputs: Iterable[str],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    workers: int = 1,
    suffixes: Iterable[str] = SUFFIXES,
    exclude: Iterable[str] = (),
    text_field: str = "text",
    shard_bytes: int = SHARD_BYTES,
    max_document: int = MAX_DOCUMENT,
) -> Summary:
    """Writes the corpus `prefix` (see writer.py) from `inputs` (see `find_files`): every document, then the separator.

    The files are the same for any number of `workers`. Memory is bounded by the workers and the largest document; one
    of more than `max_document` bytes is quarantined. Raises UserError when no input matches or none has any text."""
    files = find_files(inputs, suffixes, exclude)
    quarantine = Path(f"{prefix}{QUARANTINE}")
    summary = Summary()
    with (
        CorpusWriter(prefix, TokenizerInfo.of(tokenizer), shard_bytes=shard_bytes) as writer,
        tqdm(
            total=sum(part.size for part in cut_parts(files)), desc="tokenizing", unit="B", unit_scale=True
        ) as progress,
        closing(_encoded(group_parts(cut_parts(files)), tokenizer, text_field, max_document, workers)) as groups,
    ):
        quarantine.unlink(missing_ok=True)
        line = 0  # of the file under way, before the part under way
        for parts, made in groups:
            writer.add(made.tokens, made.lengths, made.text_bytes)
            summary.empty += made.empty
            for part, lines, rejected in zip(parts, made.lines, made.rejected, strict=True):
                line = line if part.start else 0
                _append(quarantine, [replace(one, line=one.line and line + one.line) for one in rejected])
                summary.rejected += len(rejected)
                line += lines
                progress.update(part.size)
            rate = writer.num_tokens / max(progress.format_dict["elapsed"], 1e-3)
            progress.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
    summary.documents, summary.tokens, summary.text_bytes = writer.num_documents, writer.num_tokens, writer.text_bytes
    summary.quarantine = quarantine if summary.rejected else None
    return summary


def _append(path: Path, entries: list[Rejected]) -> None:
    if entries:
        with path.open("a") as file:
            file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)


def _encode(parts: list[Part], tokenizer: Tokenizer, text_field: str, max_document: int) -> Documents:
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.eos], dtype)
    tokens: list[np.ndarray] = [np.empty(0, dtype)]
    lengths: list[int] = []
    made = Documents(tokens[0], np.empty(0, np.int32))
    for part in parts:
        lines, rejected = 0, []
        for item in read_part(part, text_field, max_document):
            lines += 1
            if isinstance(item, Rejected):
                rejected.append(item)
            elif not item:
                made.empty += 1
            else:
                ids = tokenizer.encode_array(item)
                tokens += [ids.astype(dtype), separator]
                lengths.append(len(ids) + 1)
                made.text_bytes += len(item.encode())
        made.lines.append(lines)
        made.rejected.append(rejected)
    made.tokens, made.lengths = np.concatenate(tokens), np.array(lengths, np.int32)
    return made


def _encoded(
    groups: Iterable[list[Part]], tokenizer: Tokenizer, text_field: str, max_document: int, workers: int
) -> Generator[tuple[list[Part], Documents], None, None]:
    """Every group with what became of it, in order; at most 4 x workers of them are under way."""
    if workers <= 1:
        for group in groups:
            yield group, _encode(group, tokenizer, text_field, max_document)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pending: deque[tuple[list[Part], Future[Documents]]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            for group in groups:
                work = pool.submit(
                    _encode_in_worker, group, tokenizer.path, tokenizer.fingerprint, text_field, max_document
                )
                pending.append((group, work))
                if len(pending) == 4 * workers:
                    group, work = pending.popleft()
                    yield group, work.result()
            while pending:
                group, work = pending.popleft()
                yield group, work.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process died, perhaps for want of memory; use fewer workers") from error
        finally:
            for _, work in pending:
                work.cancel()


def _start_worker() -> None:
    """Interrupts are the parent's to handle, and a worker does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _encode_in_worker(parts: list[Part], path: str, fingerprint: str, text_field: str, max_document: int) -> Documents:
    return _encode(parts, _load_once(path, fingerprint), text_field, max_document)


@lru_cache(maxsize=1)
def _load_once(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"tokenizer {path} changed while it was in use")
    return tokenizer
