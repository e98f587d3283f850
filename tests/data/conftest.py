"""A small tokenizer, and corpora written from lists of tokens."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megakrause.data.layout import TokenizerInfo
from megakrause.data.tokenizer import Tokenizer, train_tokenizer
from megakrause.data.writer import CorpusWriter

EOS = 1
WriteCorpus = Callable[..., str]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [inspect.getsource(module) for module in (argparse, inspect, json)]
    return train_tokenizer(texts, 600, tmp_path_factory.mktemp("tokenizer") / "small.model")


def write_documents(
    prefix: Path, documents: list[list[int]], *, vocab_size: int = 1000, shard_bytes: int = 1 << 30
) -> str:
    """Writes the documents as they are, without adding separators, and returns the prefix."""
    info = TokenizerInfo(fingerprint="0" * 32, vocab_size=vocab_size, eos=EOS)
    with CorpusWriter(prefix, info, shard_bytes=shard_bytes) as writer:
        tokens = np.array([token for document in documents for token in document], dtype=np.int32)
        writer.add(tokens, np.array([len(document) for document in documents], dtype=np.int32), 10 * len(documents))
    return str(prefix)


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """write_corpus(documents, name="corpus", vocab_size=..., shard_bytes=...) -> prefix"""

    def write(documents: list[list[int]], name: str = "corpus", **options: int) -> str:
        return write_documents(tmp_path / name, documents, **options)

    return write
