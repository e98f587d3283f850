"""From inputs to a corpus: every document encoded, in order, by as many processes as wished.

What cannot be read goes to PREFIX.quarantine.jsonl with its place and the reason; a file that cannot be read to its end
stops the run, unless it may be skipped. Empty documents and those that a filter drops are left out and counted. Stopped
at any moment, the same call goes on where the writer's journal says.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import xxhash
from pydantic import BaseModel
from tqdm import tqdm

from megakrause.data.encode import Encoded, EncodeOptions, encode_groups
from megakrause.data.huggingface_tokenizer import TOKENIZER
from megakrause.data.inputs import SUFFIXES, Input, find_inputs
from megakrause.data.instructions import InstructionEncoder, Instructions, template_hash
from megakrause.data.journal import journal_path, read_journal
from megakrause.data.layout import TokenizerInfo, check_output, manifest_path
from megakrause.data.quarantine import Quarantine
from megakrause.data.records import MAX_DOCUMENT, ReadOptions
from megakrause.data.sources import Part, cut_parts, group_parts
from megakrause.data.tokenizer import MODEL, Tokenizer
from megakrause.data.writer import SHARD_BYTES, CorpusWriter
from megakrause.errors import UserError

SAVE_SECONDS = 3.0  # of work that a kill can cost
ENOUGH = 1000  # documents, of which a share means something
NO_SEPARATOR = "none"


class Progress(BaseModel):
    """How far the inputs have gone into the corpus, and what did not."""

    input: int = 0  # the first that is not done
    start: int = 0  # where in it to go on, see `Part`
    line: int = 0  # lines of it before there
    done: int = 0  # bytes of it before there
    quarantine: int = 0  # bytes of the quarantine file
    empty: int = 0
    filtered: int = 0
    cut: int = 0
    rejected: int = 0
    damaged: int = 0  # files that could not be read to their end
    last_damaged: int = -1  # the input that is the last of them


@dataclass
class Summary:
    """What `tokenize_corpus` did."""

    documents: int
    tokens: int
    text_bytes: int
    empty: int
    filtered: int
    cut: int  # instructions that were too long
    rejected: int
    damaged: int  # files that could not be read to their end
    quarantine: Path | None  # lists the last two, if there are any


def tokenize_corpus(
    inputs: Iterable[str],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    workers: int = 1,
    suffixes: Iterable[str] = SUFFIXES,
    exclude: Iterable[str] = (),
    text_field: str = "text",
    document_separator: str | None = None,
    eos: str | None = None,
    min_chars: int = 0,
    max_chars: int | None = None,
    max_rejected: int | float | None = None,
    skip_damaged: bool = False,
    overwrite: bool = True,
    shard_bytes: int = SHARD_BYTES,
    max_document: int = MAX_DOCUMENT,
    instructions: Instructions | None = None,
) -> Summary:
    """Writes the corpus `prefix` (see writer.py) from `inputs` (see `find_inputs`): every document, then a separator.

    `document_separator` is the line that parts documents in text files. `eos` is the piece after every document,
    "none" for no piece, else the tokenizer's own. Documents of fewer characters than `min_chars`, or of more than
    `max_chars`, are left out. More than `max_rejected` bad documents, a number (int) or a share (float), stop the run;
    so does a file that cannot be read to its end, unless `skip_damaged`: then what came before the damage is taken.
    `instructions`: records are samples of prompts and responses instead (instructions.py).

    The files are the same for any number of `workers` and of interruptions. Memory is bounded by the workers and the
    largest document or row group; a document of more than `max_document` bytes is quarantined. Raises UserError when no
    input matches, none has any text, a file is damaged, too much is rejected, the disk is full, or, without
    `overwrite`, there is such a corpus."""
    check_output(prefix)
    sources = find_inputs(inputs, suffixes, exclude)
    fields = () if instructions is None else instructions.fields
    reading = ReadOptions(text_field, document_separator, max_document, fields)
    options = EncodeOptions(reading, _separator(tokenizer, eos), min_chars, max_chars, instructions)
    if instructions is not None:
        InstructionEncoder(tokenizer, instructions)  # which refuses what cannot be
        if plain := [source.path for source in sources if source.kind == "text"]:
            raise UserError(f"{plain[0]} is text: instructions are records of JSON lines, tables or datasets")
    settings = {
        "inputs": xxhash.xxh3_128_hexdigest(repr(sources).encode()),
        "tokenizer": tokenizer.fingerprint,
        "shard_bytes": shard_bytes,
        **_settings(reading, instructions, tokenizer),
        "eos": options.eos,
        "min_chars": min_chars,
        "max_chars": max_chars,
    }
    if not overwrite and manifest_path(prefix).exists() and not _was_finishing(prefix, settings):
        raise UserError(f"the corpus {prefix} is there and finished: choose another name, or --overwrite")
    try:
        with CorpusWriter(
            prefix,
            TokenizerInfo.of(tokenizer),
            shard_bytes=shard_bytes,
            settings=settings,
            prompts=instructions is not None,
        ) as writer:
            run = _Run(sources, writer, max_rejected, skip_damaged)
            parts = cut_parts(sources, reading, run.progress.input, run.progress.start)
            with closing(encode_groups(group_parts(parts), tokenizer, options, workers)) as groups, run.bar:
                for group, made in groups:
                    run.add(group, made)
            run.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {prefix} is full: make room and run the same again{_what_is_kept(prefix)}"
        ) from error
    except KeyboardInterrupt:
        tqdm.write(f"interrupted: run the same again{_what_is_kept(prefix)}", file=sys.stderr)
        raise
    return run.summary()


class _Run:
    """The progress of one call."""

    def __init__(
        self, sources: list[Input], writer: CorpusWriter, max_rejected: int | float | None, skip_damaged: bool
    ) -> None:
        """Raises UserError when a file was skipped before that may not be now."""
        self.progress = Progress(**(writer.progress or {}))
        if self.progress.damaged and not skip_damaged:
            raise UserError(
                f"{sources[self.progress.last_damaged].path} could not be read to its end and was skipped before: go "
                f"on with --skip-damaged, or remove {journal_path(writer.prefix)} to start anew"
            )
        self._quarantine = Quarantine(writer.prefix, self.progress.quarantine)
        self._writer = writer
        self._max_rejected, self._skip_damaged = max_rejected, skip_damaged
        if writer.progress:
            documents, tokens = writer.num_documents, writer.num_tokens
            tqdm.write(f"going on after {documents} documents, {tokens} tokens", file=sys.stderr)
        elif writer.anew:
            tqdm.write(f"starting anew: {writer.anew}", file=sys.stderr)
        self._tokens_before = writer.num_tokens
        self._sizes = [source.size for source in sources]
        self._starts = list(accumulate(self._sizes, initial=0))  # of each input, in all bytes of input
        unknown = any(source.kind == "dataset" and not source.size for source in sources)
        self.bar = tqdm(
            total=None if unknown else self._starts[-1],
            initial=self._position(),
            desc="tokenizing",
            unit="B",
            unit_scale=True,
        )
        self._saved = time.monotonic()

    def add(self, parts: list[Part], made: Encoded) -> None:
        progress = self.progress
        self._check_damage(made)
        self._writer.add(made.tokens, made.lengths, made.text_bytes)
        progress.empty += made.empty
        progress.filtered += made.filtered
        progress.cut += made.cut
        for part, lines, rejected in zip(parts, made.lines, made.rejected, strict=True):
            if part.number != progress.input:
                progress.line = 0
            self._quarantine.add(replace(one, line=one.line and progress.line + one.line) for one in rejected)
            progress.rejected += sum(not one.damaged for one in rejected)
            if any(one.damaged for one in rejected) and part.number != progress.last_damaged:
                progress.damaged, progress.last_damaged = progress.damaged + 1, part.number
            progress.input, progress.start, progress.done = part.number, part.stop, part.done
            progress.line += lines
        self.bar.update(self._position() - self.bar.n)
        rate = (self._writer.num_tokens - self._tokens_before) / max(self.bar.format_dict["elapsed"], 1e-3)
        self.bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()
        self._check_rejected(ENOUGH)

    def finish(self) -> None:
        self.progress.input, self.progress.start, self.progress.line, self.progress.done = len(self._sizes), 0, 0, 0
        self._save()
        self._check_rejected(1)

    def summary(self) -> Summary:
        writer, progress = self._writer, self.progress
        return Summary(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            text_bytes=writer.text_bytes,
            empty=progress.empty,
            filtered=progress.filtered,
            cut=progress.cut,
            rejected=progress.rejected,
            damaged=progress.damaged,
            quarantine=self._quarantine.path if progress.rejected or progress.damaged else None,
        )

    def _save(self) -> None:
        self.progress.quarantine = self._quarantine.sync()
        self._writer.save(self.progress.model_dump())
        self._saved = time.monotonic()

    def _check_damage(self, made: Encoded) -> None:
        """Raises UserError for a file that may not be skipped. Nothing of `made` counts then: it is read again."""
        damaged = [one for rejected in made.rejected for one in rejected if one.damaged]
        if damaged and not self._skip_damaged:
            self._save()
            raise UserError(
                f"{damaged[0].source} cannot be read to its end: {damaged[0].reason}; mend it or leave it out and run "
                "the same again, or take what can be read with --skip-damaged"
            )

    def _check_rejected(self, enough: int) -> None:
        """Raises UserError when too many documents were rejected; a share counts once there are `enough` of them."""
        progress, limit = self.progress, self._max_rejected
        if limit is None:
            return
        seen = self._writer.num_documents + progress.empty + progress.filtered + progress.rejected
        allowed = limit if isinstance(limit, int) else limit * seen if seen >= enough else seen
        if progress.rejected > allowed:
            self._save()
            said = limit if isinstance(limit, int) else f"{100 * limit:.4g} %"
            first = self._quarantine.first()
            example = "" if first is None else f" the first is {first},"
            raise UserError(
                f"{progress.rejected} of {seen} documents were rejected, more than {said}:{example} all are in "
                f"{self._quarantine.path}; mend the input, name its field with --text-field, or allow more with "
                "--max-rejected"
            )

    def _position(self) -> int:
        """Bytes of input that are done."""
        number = self.progress.input
        return self._starts[number] + (self.progress.done if number < len(self._sizes) else 0)


def _settings(reading: ReadOptions, instructions: Instructions | None, tokenizer: Tokenizer) -> dict[str, Any]:
    settings = asdict(reading)
    del settings["fields"]
    if instructions is not None:
        settings["instructions"] = [*instructions.fields, instructions.max_tokens]
        settings["template"] = template_hash(tokenizer)
    return settings


def _separator(tokenizer: Tokenizer, eos: str | None) -> int | None:
    """The token after every document, if there is to be one."""
    if eos is None:
        return tokenizer.eos
    if eos == NO_SEPARATOR:
        return None
    if MODEL in tokenizer.files:
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files[MODEL])
        piece = processor.piece_to_id(eos) if processor.id_to_piece(processor.piece_to_id(eos)) == eos else None
    else:
        piece = tokenizers.Tokenizer.from_buffer(tokenizer.files[TOKENIZER]).token_to_id(eos)
    if piece is None:
        raise UserError(f"tokenizer {tokenizer.path} has no piece {eos}; give another, or {NO_SEPARATOR}")
    return piece


def _was_finishing(prefix: str | Path, settings: dict[str, Any]) -> bool:
    """Whether the corpus that is there is what a call with these settings had all but finished."""
    journal = read_journal(prefix)
    return journal is not None and journal.finished and journal.settings == settings


def _what_is_kept(prefix: str | Path) -> str:
    return "; it goes on where it was" if journal_path(prefix).exists() else ""
