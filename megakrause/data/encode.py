"""Parts of inputs to tokens, by as many processes as wished, in order."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np

from megakrause.data.instructions import InstructionEncoder, Instructions, template_hash
from megakrause.data.layout import token_dtype
from megakrause.data.quarantine import Rejected
from megakrause.data.records import ReadOptions
from megakrause.data.sources import Part, read_part
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.workers import in_order
from megakrause.errors import UserError

Identity = tuple[str, str | None]  # of a tokenizer and its chat template


@dataclass(frozen=True)
class EncodeOptions:
    """What becomes of documents."""

    reading: ReadOptions
    eos: int | None  # token after every document
    min_chars: int = 0  # documents of fewer characters, or of more than max_chars, are left out
    max_chars: int | None = None
    instructions: Instructions | None = None  # documents are samples, and not text


@dataclass
class Encoded:
    """What became of a few parts."""

    tokens: np.ndarray  # [n] in the corpus's dtype, every document with its separator
    lengths: np.ndarray  # int32 [documents]
    text_bytes: int = 0
    empty: int = 0
    filtered: int = 0
    cut: int = 0  # instructions that were too long
    lines: list[int] = field(default_factory=list)  # of each part
    rejected: list[list[Rejected]] = field(default_factory=list)  # of each part, lines counted from its first


def encode_groups(
    groups: Iterable[list[Part]], tokenizer: Tokenizer, options: EncodeOptions, workers: int
) -> Generator[tuple[list[Part], Encoded], None, None]:
    """Every group with what became of it, in order; at most 4 x workers of them are under way."""
    if workers <= 1:
        for group in groups:
            yield group, _encode(group, tokenizer, options)
        return
    work = partial(_encode_in_worker, path=tokenizer.path, identity=_identity(tokenizer), options=options)
    yield from in_order(groups, work, workers, __name__)


def _encode(parts: list[Part], tokenizer: Tokenizer, options: EncodeOptions) -> Encoded:
    dtype = token_dtype(tokenizer.vocab_size, prompts=options.instructions is not None)
    separator = np.array([] if options.eos is None else [options.eos], dtype)
    encoder = None if options.instructions is None else _encoder(tokenizer, options.instructions)
    tokens: list[np.ndarray] = [np.empty(0, dtype)]
    lengths: list[int] = []
    made = Encoded(tokens[0], np.empty(0, np.int32))
    for part in parts:
        num_lines, rejected = 0, []
        for lines, text in read_part(part, options.reading):
            line = num_lines + 1
            num_lines += lines
            if isinstance(text, Rejected):
                rejected.append(text)
            elif not text:
                made.empty += 1
            elif len(text) < options.min_chars or (options.max_chars is not None and len(text) > options.max_chars):
                made.filtered += 1
            elif encoder is not None:
                try:
                    sample = encoder.encode(text)
                except ValueError as error:
                    rejected.append(Rejected(part.input.path, line, str(error)))
                    continue
                made.cut += sample.cut
                made.filtered += sample.left_out
                tokens += sample.documents
                lengths += map(len, sample.documents)
                made.text_bytes += sample.text_bytes
            else:
                ids = tokenizer.encode_array(text)
                if not len(ids) + len(separator):  # a tokenizer that drops spaces, and no separator
                    made.empty += 1
                    continue
                tokens += [ids.astype(dtype), separator]
                lengths.append(len(ids) + len(separator))
                made.text_bytes += len(text.encode())
        made.lines.append(num_lines)
        made.rejected.append(rejected)
    made.tokens, made.lengths = np.concatenate(tokens), np.array(lengths, np.int32)
    return made


def _identity(tokenizer: Tokenizer) -> Identity:
    return tokenizer.fingerprint, template_hash(tokenizer)


@lru_cache(maxsize=1)
def _encoder(tokenizer: Tokenizer, options: Instructions) -> InstructionEncoder:
    return InstructionEncoder(tokenizer, options)


def _encode_in_worker(parts: list[Part], path: str, identity: Identity, options: EncodeOptions) -> Encoded:
    return _encode(parts, _load_once(path, identity), options)


@lru_cache(maxsize=1)
def _load_once(path: str, identity: Identity) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if _identity(tokenizer) != identity:
        raise UserError(f"tokenizer {path} changed while it was in use")
    return tokenizer
