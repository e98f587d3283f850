"""Instructions to tokens: what is only read, the prompts, and what is learnt, the responses.

A sample is a prompt and a response, or a conversation whose messages the tokenizer's chat template turns into text;
every message of the assistant is a response, with whatever the template puts behind it. In a corpus, tokens that are
only read are stored as -1 - id (`Manifest.prompts`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

# What Llama's templates say where they know of no date. One that was asked for it would make other tokens every day.
DATE = "26 Jul 2024"
Parts = list[tuple[np.ndarray, bool]]  # tokens, int32, and whether they are learnt


@dataclass(frozen=True)
class Instructions:
    """Which fields of a record hold a sample: prompt and response, or the messages of a conversation."""

    fields: tuple[str, ...]  # two, or one
    max_tokens: int | None = None  # longer documents are cut there, and left out if no token to learn is left


@dataclass
class Sample:
    """What became of one: documents, int32 [n] each, how many more were cut or left out, and the bytes of its text."""

    documents: list[np.ndarray]
    cut: int
    left_out: int
    text_bytes: int


class InstructionEncoder:
    """Samples to tokens."""

    def __init__(self, tokenizer: Tokenizer, options: Instructions) -> None:
        """Raises UserError for conversations and a tokenizer without a chat template."""
        self._tokenizer, self._limit = tokenizer, options.max_tokens
        self._render = None if len(options.fields) == 2 else chat_renderer(tokenizer)

    def encode(self, record: str) -> Sample:
        """Of a JSON list of the fields' values. Raises ValueError with the reason for what is no sample."""
        values = json.loads(record)
        documents = self._pair(*values) if self._render is None else self._conversation(values[0], self._render)
        sample = Sample([], 0, 0, sum(map(_text_bytes, values)))
        for parts in documents:
            tokens = np.concatenate([ids if learnt else ~ids for ids, learnt in parts])
            sample.cut += self._limit is not None and len(tokens) > self._limit
            tokens = tokens[: self._limit]
            if (tokens >= 0).any():
                sample.documents.append(tokens)
            else:
                sample.left_out += 1
        return sample

    def _pair(self, prompt: Any, response: Any) -> Iterator[Parts]:
        for text, name in ((prompt, "prompt"), (response, "response")):
            if not isinstance(text, str):
                raise ValueError(f"the {name} is no string but {type(text).__name__}")
        if not response:
            raise ValueError("the response is empty")
        encode = self._tokenizer.encode_array
        yield [(encode(prompt), False), (encode(response), True), self._end()]

    def _conversation(self, messages: Any, render: Callable[[list[Any], bool], str]) -> Iterator[Parts]:
        """Text up to an answer is what the template gives where one is to be generated, so that training sees what
        generation will. Where the template changes what came before (Qwen3's drops earlier reasoning), a document ends
        and the next one begins with the whole conversation so far."""
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise ValueError("a conversation is a list of messages with a role and content")
        for token in self._tokenizer.special_tokens:
            if any(token in text for text in _texts(messages)):
                raise ValueError(f"a message has the special token {token} in its text, which would be taken for one")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("no message is of the assistant")
        encode = self._tokenizer.encode_marked
        parts, done = Parts(), ""
        for i in answers:
            before, after = render(messages[:i], True), render(messages[: i + 1], False)
            if not after.startswith(before):
                raise ValueError("the chat template gives an answer another beginning than the one to be generated")
            if not before.startswith(done):
                yield [*parts, *self._missing_end(parts)]
                parts, done = Parts(), ""
            parts += [(encode(before[len(done) :]), False), (encode(after[len(before) :]), True)]
            done = after
        yield [*parts, *self._missing_end(parts)]

    def _end(self) -> tuple[np.ndarray, bool]:
        return np.array([self._tokenizer.eos], np.int32), True

    def _missing_end(self, parts: Parts) -> Parts:
        """A template may end a turn with the separator, and a line break."""
        return [] if self._tokenizer.eos in parts[-1][0][-2:] else [self._end()]


def template_hash(tokenizer: Tokenizer) -> str | None:
    """Of the chat template; None: there is none."""
    template, _ = tokenizer.chat_template
    return None if template is None else xxhash.xxh3_128_hexdigest(template.encode())


def chat_renderer(tokenizer: Tokenizer) -> Callable[[list[Any], bool], str]:
    """A function of (messages, whether an answer follows) that applies the chat template, in Jinja's sandbox as
    transformers does. Raises UserError when there is none; the function ValueError for messages that it does not
    take."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special = tokenizer.chat_template
    if template is None:
        raise UserError(
            f"tokenizer {tokenizer.path} has no chat template; give prompts and responses, or a Hugging Face tokenizer "
            "that has one"
        )
    if "strftime_now" in template and "date_string" not in template:
        raise UserError(
            f"the chat template of {tokenizer.path} writes today's date, and other tokens every day; write one into it"
        )
    variables: dict[str, Any] = special | {"date_string": DATE}

    def render(messages: list[Any], answer_follows: bool) -> str:
        try:
            texts: Any = render_jinja_template(
                conversations=[messages], chat_template=template, add_generation_prompt=answer_follows, **variables
            )[0]
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template does not take it: {error}") from error
        return str(texts[0])

    return render


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _text_bytes(value: Any) -> int:
    return sum(len(text.encode()) for text in _texts(value))
