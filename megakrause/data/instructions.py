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

from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError


@dataclass(frozen=True)
class Instructions:
    """Which fields of a record hold a sample: prompt and response, or the messages of a conversation."""

    fields: tuple[str, ...]  # two, or one
    max_tokens: int | None = None  # longer samples are cut there, and left out if no token to learn is left


class InstructionEncoder:
    """Samples to tokens."""

    def __init__(self, tokenizer: Tokenizer, options: Instructions) -> None:
        """Raises UserError for conversations and a tokenizer without a chat template."""
        self._tokenizer, self._limit = tokenizer, options.max_tokens
        self._render = None if len(options.fields) == 2 else chat_renderer(tokenizer)

    def encode(self, sample: str) -> tuple[np.ndarray, bool]:
        """int32 [n] of a JSON list of the fields' values, and whether it was cut; empty: nothing to learn is left.
        Raises ValueError with the reason for what is no sample."""
        values = json.loads(sample)
        parts = list(self._conversation(values[0]) if self._render is not None else self._pair(*values))
        tokens = np.concatenate([ids if learnt else ~ids for ids, learnt in parts])
        cut = self._limit is not None and len(tokens) > self._limit
        tokens = tokens[: self._limit]
        return (tokens if (tokens >= 0).any() else tokens[:0]), cut

    def _pair(self, prompt: Any, response: Any) -> Iterator[tuple[np.ndarray, bool]]:
        for text, name in ((prompt, "prompt"), (response, "response")):
            if not isinstance(text, str):
                raise ValueError(f"the {name} is no string but {type(text).__name__}")
        if not response:
            raise ValueError("the response is empty")
        yield self._tokenizer.encode_array(prompt), False
        yield self._tokenizer.encode_array(response), True
        yield np.array([self._tokenizer.eos], np.int32), True

    def _conversation(self, messages: Any) -> Iterator[tuple[np.ndarray, bool]]:
        """Text up to an answer is what the template gives where one is to be generated, so that training sees what
        generation will."""
        assert self._render is not None
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise ValueError("a conversation is a list of messages with a role and content")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("no message is of the assistant")
        done = ""
        for i in answers:
            before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            if not before.startswith(done) or not after.startswith(before):
                raise ValueError("the chat template changes what came before an answer; it cannot be cut into parts")
            yield self._tokenizer.encode_marked(before[len(done) :]), False
            yield (last := self._tokenizer.encode_marked(after[len(before) :])), True
            done = after
        if self._tokenizer.eos not in last[-2:]:  # a template may end a turn with it, and a line break
            yield np.array([self._tokenizer.eos], np.int32), True


def chat_renderer(tokenizer: Tokenizer) -> Callable[[list[Any], bool], str]:
    """A function of (messages, whether an answer follows) that applies the chat template, in Jinja's sandbox as
    transformers does. Raises UserError when there is none; the function ValueError for messages that it does not
    take."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special = tokenizer.chat_template
    tokens: dict[str, Any] = dict(special)
    if template is None:
        raise UserError(
            f"tokenizer {tokenizer.path} has no chat template; give prompts and responses, or a Hugging Face tokenizer "
            "that has one"
        )

    def render(messages: list[Any], answer_follows: bool) -> str:
        try:
            texts: Any = render_jinja_template(
                conversations=[messages], chat_template=template, add_generation_prompt=answer_follows, **tokens
            )[0]
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template does not take it: {error}") from error
        return str(texts[0])

    return render
