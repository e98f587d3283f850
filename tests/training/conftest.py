"""A tiny corpus and a config that trains on it, for whole runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megakrause.data.prepare import tokenize_corpus
from megakrause.data.tokenizer import train_tokenizer

CONFIG = """
output = "{folder}/run"
[model]
layers = 2
width = 32
heads = 4
kv_heads = 2
mlp_width = 64
window = 12
top_k = 6
[data]
train = "{data}/train"
valid = "{data}/valid"
tokenizer = "{data}/tokenizer.model"
[optim]
lr = 1e-2
warmup = 2
eps = 1e-3
[train]
steps = 6
global_batch = 4
seq_len = 48
[log]
every = 2
"""


def write_texts(folder: Path, count: int, seed: int) -> list[str]:
    """Small made-up source files, so that there is something to learn and documents end within sequences."""
    rng = random.Random(seed)
    words = ["def", "return", "value", "index", "for", "in", "range", "if", "else", "x", "y", "0", "1", "name", "self"]
    paths = []
    for number in range(count):
        lines = (" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(rng.randint(1, 30)))
        path = folder / f"{seed}-{number}.txt"
        path.write_text("\n    ".join(lines))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train and valid shards and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    texts = {"train": write_texts(folder, 60, seed=1), "valid": write_texts(folder, 6, seed=2)}
    tokenizer = train_tokenizer((Path(p).read_text() for p in texts["train"]), 320, folder / "tokenizer.model")
    for name, paths in texts.items():
        tokenize_corpus(paths, tokenizer, folder / name)
    return folder


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    """A run's config file; its output is tmp_path / "run"."""
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(data=corpus, folder=tmp_path))
    return path
