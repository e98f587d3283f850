"""Text to token ids and back, over a SentencePiece model or a Hugging Face tokenizer, and the training of the former.

A model that `train_tokenizer` makes is lossless: `decode(encode(text)) == text` for every text that UTF-8 can carry.
It normalises nothing, adds nothing, and falls back to bytes. A piece of it has spaces only in front or is all spaces.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from tqdm import tqdm

from megakrause.data.huggingface_tokenizer import TOKENIZER, HuggingFaceCodec, read_folder
from megakrause.data.sentencepiece_tokenizer import SentencePieceCodec
from megakrause.errors import UserError

MODEL = "tokenizer.model"  # a SentencePiece model in a folder
UNKNOWN = "\u2585"  # stands for rare characters inside SentencePiece's trainer, which skips sentences that have it
EOS_PIECE = "<|endoftext|>"
PIECE_OF_TEXT = 2000  # characters
TRAINING_THREADS = 4  # fixed: SentencePiece writes their number into the model, and so into its fingerprint


class Tokenizer:
    """A tokenizer held in memory; it pickles, so that other processes can use it.

    Of whatever kind it is, the ids of a text have no special tokens around them and no separator among them: what
    looks like a special token in a text is text. Whether it is lossless is the tokenizer's own matter."""

    files: dict[str, bytes]  # name -> content; a folder of these files loads as the same tokenizer
    path: str  # where it came from
    fingerprint: str  # xxh3-128 of what determines ids, hex
    vocab_size: int  # number of ids
    eos: int  # id of the end-of-document separator

    def __init__(self, files: Mapping[str, bytes], path: str) -> None:
        """Raises UserError when the files are no tokenizer with a separator."""
        self.files, self.path = dict(files), path
        self._codec: HuggingFaceCodec | SentencePieceCodec
        if TOKENIZER in files:
            self._codec = HuggingFaceCodec(files, path)
        else:
            self._codec = SentencePieceCodec(files[MODEL], path)
        self.fingerprint, self.vocab_size, self.eos = self._codec.fingerprint, self._codec.vocab_size, self._codec.eos

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a SentencePiece .model file, or a folder with tokenizer.json (a Hugging Face tokenizer) or, if it has
        none, tokenizer.model. Raises UserError when there is no such thing."""
        path = Path(path)
        if path.name == TOKENIZER:
            path = path.parent
        try:
            if (path / TOKENIZER).exists():
                return cls(read_folder(path), str(path))
            if path.is_dir():
                if not (path / MODEL).exists():
                    raise UserError(f"tokenizer {path} has neither {TOKENIZER} nor {MODEL}; a folder needs one of them")
                path = path / MODEL
            return cls({MODEL: path.read_bytes()}, str(path))
        except OSError as error:
            raise UserError(f"cannot read tokenizer {error.filename}: {error.strerror}") from error

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[dict[str, bytes], str]]:
        return Tokenizer, (self.files, self.path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without a separator. Raises ValueError for a lone surrogate."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, int32 [n]."""
        return self._codec.encode(text)

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids of what a chat template gave, where special tokens are what they are called: int32 [n]."""
        assert isinstance(self._codec, HuggingFaceCodec)
        return self._codec.encode_marked(text)

    @property
    def chat_template(self) -> tuple[str | None, dict[str, str]]:
        """(Jinja template or None, the special tokens by the names that it has for them)."""
        return self._codec.chat_template if isinstance(self._codec, HuggingFaceCodec) else (None, {})

    @property
    def special_tokens(self) -> list[str]:
        """What `encode_marked` takes for special tokens."""
        return self._codec.special_tokens if isinstance(self._codec, HuggingFaceCodec) else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; separators have none, bytes that are not UTF-8 become U+FFFD."""
        return self._codec.decode(ids)


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
    return Tokenizer({MODEL: model.getvalue()}, str(output))


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
