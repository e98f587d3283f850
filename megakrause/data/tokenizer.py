"""Text to token ids and back, over a SentencePiece model, and the training of such a model.

A model that `train_tokenizer` makes is lossless: `decode(encode(text)) == text` for every text that UTF-8 can carry.
It normalises nothing, adds nothing, and falls back to bytes. A piece of it has spaces only in front or is all spaces,
so no piece crosses from a character to a space after it; text is cut there into words, each of which is encoded once.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
import xxhash
from tqdm import tqdm

from megakrause.errors import UserError

SPACE = "\u2581"  # stands for a space inside SentencePiece
UNKNOWN = "\u2585"  # stands for rare characters inside SentencePiece's trainer, which skips sentences that have it
EOS_PIECE = "<|endoftext|>"
PIECE_OF_TEXT = 2000  # characters
WORD = re.compile(f"{SPACE}| *[^ {SPACE}]+| +")
CUT = re.compile("(?<=[^ ]) ")
SLICE = 1 << 20  # characters encoded at a time, so that one long document needs no list of all its words
CACHED_WORDS = 1 << 18
CACHED_WORD_LENGTH = 64  # characters
TRAINING_THREADS = 4  # fixed: SentencePiece writes their number into the model, and so into its fingerprint


class Tokenizer:
    """A SentencePiece model, held in memory; it pickles, so that other processes can use it.

    Models of other origin work too and give SentencePiece's own ids; whether they are lossless is their matter.
    """

    model: bytes  # the model file
    path: str  # where the model came from
    fingerprint: str  # xxh3-128 of the model file, hex
    vocab_size: int
    eos: int  # id of the end-of-document separator

    def __init__(self, model: bytes, path: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model") from error
        if processor.eos_id() < 0:
            raise UserError(f"tokenizer {path} has no end-of-document piece; train one with train_tokenizer")
        self.path = path
        self.fingerprint = xxhash.xxh3_128_hexdigest(model)
        self.vocab_size = processor.get_piece_size()
        self.eos = processor.eos_id()
        self.model = model
        self._processor = processor
        self._words = _Words(self._encode, [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()])
        self._cuts = _cuts_before_spaces(processor)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a .model file. Raises UserError when it is missing or no such model."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from error
        return cls(model, str(path))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str]]:
        return Tokenizer, (self.model, self.path)

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces of `text`, without a separator. Raises ValueError for a lone surrogate."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, int32 [n]."""
        if self._cuts:
            ids = b"".join(b"".join(map(self._words.__getitem__, WORD.findall(part))) for part in _slices(text))
        else:
            ids = self._encode(text)
        return np.frombuffer(ids, dtype=np.int32)

    def _encode(self, text: str) -> bytes:
        try:
            return self._processor.encode(text, return_type="numpy").tobytes()
        except RuntimeError:
            text.encode()  # a lone surrogate: Python's message says where
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; separators have none, bytes that are not UTF-8 become U+FFFD."""
        return self._processor.decode([int(i) for i in ids])


class _Words(dict[str, bytes]):
    """word -> its ids, int32 as bytes; bounded in size."""

    def __init__(self, encode: Callable[[str], bytes], ids_of_space: list[int]) -> None:
        super().__init__()
        self._encode = encode
        self._space = np.array(ids_of_space, dtype=np.int32).tobytes()

    def __missing__(self, word: str) -> bytes:
        # Given a real U+2581, SentencePiece would take it for a space.
        ids = self._space if word == SPACE else self._encode(word)
        if len(word) <= CACHED_WORD_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _cuts_before_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether text may be cut between a character and a space after it, without changing its ids."""
    probe = "  a  ﬁ e\u0301 Å\t\r\n  ①\u3000 "
    pieces = (processor.id_to_piece(i) for i in range(processor.get_piece_size()))
    return processor.normalize(probe) == probe.replace(" ", SPACE) and not any(
        re.search(f"[^{SPACE}]{SPACE}", piece) for piece in pieces
    )


def _slices(text: str) -> Iterator[str]:
    """`text` in order, cut where a space follows a character once SLICE characters are reached."""
    start = 0
    while cut := CUT.search(text, start + SLICE):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    sample_bytes: int = 64 << 20,
) -> Tokenizer:
    """Trains a lossless SentencePiece model on `texts` and writes it to `output` (.model).

    Of more than `sample_bytes` bytes of text it takes pieces at even distances, and says so. The same texts give
    the same file. Raises UserError when the texts are too few, or the vocabulary too small for their characters.
    """
    sample = _sample(_pieces(tqdm(texts, desc="reading", unit=" documents")), sample_bytes)
    if not sample:
        raise UserError("there is no text to train a tokenizer on")
    size = sum(map(_size, sample)) / 1e6
    tqdm.write(f"training a {kind} tokenizer of {vocab_size} pieces on {size:.1f} MB of text", file=sys.stderr)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters are left to the byte pieces
            max_sentencepiece_length=32,
            max_sentence_length=4 * PIECE_OF_TEXT,  # bytes
            unk_id=0,
            eos_id=1,
            eos_piece=EOS_PIECE,
            bos_id=-1,
            pad_id=-1,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {reason}") from error
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, output)
    return Tokenizer(model.getvalue(), str(output))


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    pattern = re.compile(f"[^{UNKNOWN}]{{1,{PIECE_OF_TEXT}}}")
    for text in texts:
        yield from pattern.findall(text)


def _sample(pieces: Iterable[str], limit: int) -> list[str]:
    """Every n-th piece, n the smallest power of two that keeps them within `limit` bytes."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, piece in enumerate(pieces):
        if number % stride:
            continue
        kept.append(piece)
        size += _size(piece)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(_size, kept))
    if stride > 1:
        tqdm.write(f"more than {limit / 1e6:.0f} MB of text: 1 piece in {stride} is used", file=sys.stderr)
    return kept


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
