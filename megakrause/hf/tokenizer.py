"""A model's tokenizer as files that transformers' AutoTokenizer loads, without custom code.

A Hugging Face tokenizer is written as it came, but that its tokenizer.json alone is to decide the ids: any class or
code that its configuration names besides is left out.

A SentencePiece model becomes tokenizer.json and tokenizer_config.json.

The vocabulary is written with real spaces in place of SentencePiece's U+2581. So nothing normalises the text, and a
real U+2581 in it falls back to its bytes, as it does in `Tokenizer`. Text is cut into words where `Tokenizer` cuts it.

SentencePiece's BPE merges any two neighbours whose union is a piece, the piece with the best score first. The merges
here are ranked by that score, and ids are the same. Unigram models add up scores in another precision here: of
segmentations that are equally likely, another may be chosen.

The ids of a text decode to it. Ids whose bytes are not UTF-8 (a character that generation cut short) decode otherwise
than in `Tokenizer`: the whole run of byte pieces around them becomes U+FFFD, one for each byte.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

SPACE = "\u2581"  # stands for a space inside SentencePiece
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
PROBE = "A text, 1234 words:\n\tif x:  # é 中文 😀\n"
UNLIKELY = -1e9  # score of pieces that no text matches, in a unigram model


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> dict[str, int]:
    """Writes a tokenizer. max_length: tokens that the model can read at once.

    Returns bos_token_id and eos_token_id, both the separator, which opens a document and ends generation; and
    pad_token_id if there is one. Raises UserError for a SentencePiece model without byte fallback or with a
    normalisation, and when transformers does not give the ids of a Hugging Face tokenizer."""
    write = _write_huggingface if "tokenizer.json" in tokenizer.files else _write_sentencepiece
    return write(tokenizer, folder, max_length)


def _write_huggingface(tokenizer: Tokenizer, folder: Path, max_length: int) -> dict[str, int]:
    """Its special tokens around a text, and in a text, are the tokenizer's own matter."""
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config.pop("auto_map", None)
    changed = {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    for name, content in (tokenizer.files | changed).items():
        (folder / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(PROBE, add_special_tokens=False)["input_ids"]
    if ids != tokenizer.encode(PROBE) or theirs.eos_token_id != tokenizer.eos:
        raise UserError(f"transformers does not give the ids of tokenizer {tokenizer.path}; nothing was written")
    special = {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
    pad = theirs.pad_token_id  # a token that tokenizer.json lacks gets an id that the model lacks
    return special if pad is None or pad >= tokenizer.vocab_size else special | {"pad_token_id": pad}


def _write_sentencepiece(tokenizer: Tokenizer, folder: Path, max_length: int) -> dict[str, int]:
    """The separator is put in front of a text. The unknown piece pads: with byte fallback, no text has it."""
    path, eos = tokenizer.path, tokenizer.eos
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files["tokenizer.model"])  # type: ignore[attr-defined]
    _check(path, proto)
    pad = proto.trainer_spec.unk_id
    separator, unknown = proto.pieces[eos].piece, proto.pieces[pad].piece
    _fast_tokenizer(proto, eos).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "unk_token": unknown,
        "pad_token": unknown,
        "padding_side": "left",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Text that looks like a special piece is text, as it is for `Tokenizer`.
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad}


def _check(path: str, proto: Any) -> None:
    normalizer = proto.normalizer_spec
    problem = None
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        problem = "it is neither BPE nor unigram"
    elif not proto.trainer_spec.byte_fallback:
        problem = "it has no byte fallback"
    elif normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        problem = "it normalises text"
    elif any(piece.type not in (NORMAL, UNKNOWN, CONTROL, BYTE) for piece in proto.pieces):
        problem = "it has user-defined or unused pieces"
    if problem:
        raise UserError(f"tokenizer {path} has no exact form in Hugging Face's format: {problem}")


def _fast_tokenizer(proto: Any, eos: int) -> FastTokenizer:
    scores = {p.piece.replace(SPACE, " "): p.score for p in proto.pieces if p.type == NORMAL}
    pieces = [p.piece.replace(SPACE, " ") if p.type == NORMAL else p.piece for p in proto.pieces]
    unk_id = proto.trainer_spec.unk_id
    model: models.Model
    if proto.trainer_spec.model_type == BPE:
        vocab = {piece: i for i, piece in enumerate(pieces)}
        model = models.BPE(vocab, _merges(scores), unk_token=pieces[unk_id], fuse_unk=False, byte_fallback=True)
    else:
        model = models.Unigram([(p, scores.get(p, UNLIKELY)) for p in pieces], unk_id=unk_id, byte_fallback=True)
    fast = FastTokenizer(model)
    if not any(re.search("[^ ] ", piece) for piece in scores):
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+| +"), behavior="isolated")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    separator = pieces[eos]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{separator} $A",
        pair=f"{separator} $A {separator} $B",
        special_tokens=[(separator, eos)],
    )
    special = (p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL))
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return fast


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces whose union is a piece, the best union first."""
    ordered = sorted(scores, key=lambda piece: -scores[piece])
    splits = ((piece[:i], piece[i:]) for piece in ordered for i in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in scores and right in scores]
