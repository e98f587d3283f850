"""Ids of a Hugging Face tokenizer, and text from ids. Only tokenizer.json decides them; no code of a folder is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash

from megakrause.errors import UserError

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
OF_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")  # parts of tokenizer.json that determine ids


def read_folder(folder: Path) -> dict[str, bytes]:
    """What is kept of a tokenizer, by name: tokenizer.json, tokenizer_config.json, and a chat template if there is one.

    The special tokens that special_tokens_map.json names go into tokenizer_config.json, where it has none. So does the
    separator, as eos_token; if neither names it, it is eos_token_id of generation_config.json or of config.json, the
    first of several. Raises UserError, and OSError for what cannot be read."""
    files = {name: (folder / name).read_bytes() for name in (TOKENIZER, TEMPLATE) if (folder / name).exists()}
    tokens = {key: _content(token) for key, token in _read(folder / "special_tokens_map.json").items()}
    config = {key: value for key, value in (*tokens.items(), *_read(folder / CONFIG).items()) if value is not None}
    if "eos_token" not in config and (eos := _model_eos(folder)) is not None:
        config["eos_token"] = _parse(files[TOKENIZER], folder / TOKENIZER).id_to_token(eos)
    return files | {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


class HuggingFaceCodec:
    """A tokenizer.json, whatever its kind.

    Special tokens in a text are encoded as any text is, so that it cannot end its own document; added tokens that are
    not special (such as runs of spaces) are what they are for transformers. Decoding leaves special tokens out.

    Encoding takes some 200 bytes of memory for each character of a text."""

    fingerprint: str  # of the parts of tokenizer.json that determine ids and of the separator, however they are written
    vocab_size: int
    eos: int

    def __init__(self, files: Mapping[str, bytes], path: str) -> None:
        """files: as `read_folder` gives them. path: the folder, for messages. Raises UserError."""
        fast = _parse(files[TOKENIZER], Path(path) / TOKENIZER)
        separator = _content(json.loads(files[CONFIG]).get("eos_token"))
        if separator is None:
            raise UserError(f'tokenizer {path} has no end-of-document token; name it as "eos_token" in its {CONFIG}')
        eos = fast.token_to_id(separator)
        if eos is None:
            raise UserError(f"tokenizer {path}: eos_token of its {CONFIG} is {separator!r}, which {TOKENIZER} lacks")
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True
        parts = json.loads(files[TOKENIZER])
        text = json.dumps([*(parts.get(name) for name in OF_IDS), eos], sort_keys=True)
        self.fingerprint = xxhash.xxh3_128_hexdigest(text.encode())
        self.vocab_size = max(fast.get_vocab_size(), 1 + max(fast.get_vocab().values()))
        self.eos = eos
        self._fast = fast
        self._config, self._template = json.loads(files[CONFIG]), files.get(TEMPLATE)
        self._content = files[TOKENIZER]

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]. Raises ValueError for a lone surrogate."""
        encoding = self._encode(text)
        ids = np.array(encoding.ids, dtype=np.int32)
        found = np.flatnonzero(ids == self.eos)
        if len(found) == 0:
            return ids
        # The separator is among the pieces of the model too, and is found in the text: cut within it, it is not.
        offsets = encoding.offsets
        cuts = [0, *(offsets[i][0] + 1 for i in found), len(text)]
        parts = (self._encode(text[start:end]).ids for start, end in pairwise(cuts))
        return np.array([i for part in parts for i in part], dtype=np.int32)

    def encode_marked(self, text: str) -> np.ndarray:
        """As `encode`, but special tokens in the text are special tokens."""
        return np.array(self._marked.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        marked = tokenizers.Tokenizer.from_buffer(self._content)
        marked.no_truncation()
        marked.no_padding()
        return marked

    @cached_property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self._fast.get_added_tokens_decoder().values() if token.special]

    @property
    def chat_template(self) -> tuple[str | None, dict[str, str]]:
        """(Jinja template or None, the special tokens by the names that it has for them)."""
        template: Any = self._config.get("chat_template") if self._template is None else self._template.decode()
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        tokens = {key: _content(value) for key, value in self._config.items() if key.endswith("_token")}
        return template, {key: value for key, value in tokens.items() if value is not None}

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self._fast.encode(text, add_special_tokens=False)
        except TypeError:
            text.encode()  # a lone surrogate: Python's message says where
            raise

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode([int(i) for i in ids if i != self.eos], skip_special_tokens=True)


def _parse(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a Hugging Face tokenizer: {reason}") from error


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file. Raises UserError and OSError."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def _model_eos(folder: Path) -> int | None:
    for name in ("generation_config.json", "config.json"):
        eos = _read(folder / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int):
            return eos
    return None


def _content(token: object) -> str | None:
    """What a token in a config is: its text, or an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
