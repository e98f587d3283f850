"""Ids of a SentencePiece model, and text from ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import sentencepiece
import xxhash

from megakrause.errors import UserError

SPACE = "\u2581"  # stands for a space inside SentencePiece
WORD = re.compile(f"{SPACE}| *[^ {SPACE}]+| +")
CUT = re.compile("(?<=[^ ]) ")
SLICE = 1 << 20  # characters encoded at a time, so that one long document needs no list of all its words
CACHED_WORDS = 1 << 18
CACHED_WORD_LENGTH = 64  # characters


class SentencePieceCodec:
    """A SentencePiece model of any origin, which gives SentencePiece's own ids.

    Where no piece of it crosses from a character to a space after it, text is cut there into words, each of which is
    encoded once."""

    fingerprint: str  # xxh3-128 of the model file, hex
    vocab_size: int
    eos: int

    def __init__(self, model: bytes, path: str) -> None:
        """model: the file's content. path: for messages. Raises UserError."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model") from error
        if processor.eos_id() < 0:
            raise UserError(f"tokenizer {path} has no end-of-document piece; train one with train_tokenizer")
        self.fingerprint = xxhash.xxh3_128_hexdigest(model)
        self.vocab_size = processor.get_piece_size()
        self.eos = processor.eos_id()
        self._processor = processor
        self._words = _Words(self._encode, [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()])
        self._cuts = _cuts_before_spaces(processor)

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]. Raises ValueError for a lone surrogate."""
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
