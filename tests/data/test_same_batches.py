"""The sequence of global batches, by their hashes, whatever the ranks, read-ahead, worker processes and restarts."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from megakrause.data.layout import TokenizerInfo
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.writer import CorpusWriter

ROOT = Path(__file__).parents[2]
CONFIG = """
output = "none"
[model]
layers = 1
width = 8
heads = 1
mlp_width = 8
window = 4
[data]
train = [
    {{ path = "{folder}/a", weight = [[0, 0.6], [5, 0.2]] }},
    {{ path = "{folder}/b", weight = 0.3 }},
    {{ path = "{folder}/c", weight = 0.1, epochs = 2 }},
]
tokenizer = "{tokenizer}"
packing = "{packing}"
[optim]
lr = 1
[train]
steps = 1
global_batch = 8
seq_len = 33
seed = 4
"""


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def config(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora, of which one may be used up within the steps that are compared."""
    folder, rng = tmp_path_factory.mktemp("mix"), random.Random(1)
    for name, count in (("a", 90), ("b", 40), ("c", 6)):
        with CorpusWriter(folder / name, TokenizerInfo.of(tokenizer), shard_bytes=1000) as writer:
            for _ in range(count):
                document = [*(rng.randrange(2, 600) for _ in range(rng.randrange(60))), tokenizer.eos]
                writer.add(np.array(document), np.array([len(document)]), 1)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(folder=folder, tokenizer=tokenizer.path, packing=request.param))
    return path


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow) for kind in (".jsonl", ".jsonl.gz", "dataset")],
)
def streamed(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that is tokenized while it is read, mixed with a corpus; it is used up and begins again."""
    folder, rng = tmp_path_factory.mktemp("stream"), random.Random(2)
    texts = [" ".join(f"w{rng.randrange(500)}" for _ in range(rng.randrange(1, 60))) for _ in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if request.param == "dataset":
        Dataset.from_dict({"text": texts}).save_to_disk(folder / "d")
        name = f"hf:{folder}/d"
    else:
        name = f"{folder}/t{request.param}"
        Path(name).write_bytes(gzip.compress(lines) if request.param.endswith(".gz") else lines)
    with CorpusWriter(folder / "a", TokenizerInfo.of(tokenizer)) as writer:
        for _ in range(40):
            writer.add(np.array([rng.randrange(2, 600), tokenizer.eos]), np.array([2]), 1)
    mix = f'train = "0.2 {folder}/a 0.8 {name}"\n'
    text = CONFIG.format(folder=folder, tokenizer=tokenizer.path, packing="best_fit")
    path = folder / "config.toml"
    path.write_text(re.sub(r"(?s)train = \[.*?\n\]\n", lambda _: mix, text))
    return path


def run(config: Path, count: int, ranks: int, prefetch: int, workers: int = 0, after: str = "- 0 {}") -> list[str]:
    """`count` batches, after the one of which this is the line, from a process that is then killed: "HASH STATE"."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    _, position, streams = after.split(" ", 2)
    options = [str(option) for option in (ranks, prefetch, workers, position, streams)]
    command = [sys.executable, "tests/data/batches.py", str(config), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(count)]
    process.kill()
    process.wait()
    assert all(len(line.split(" ", 2)) == 3 for line in lines), lines
    return lines


STEPS = 25


def resumed(config: Path, workers: int) -> list[str]:
    """The same steps with other numbers of ranks, killed after odd numbers of steps."""
    lines = run(config, 7, 4, 3, workers)
    for ranks, count, prefetch in ((2, 5, 1), (8, 3, 0), (1, STEPS - 15, 3)):
        lines += run(config, count, ranks, prefetch, workers, after=lines[-1])
    return lines


def test_killed_and_resumed_with_another_number_of_ranks(config: Path) -> None:
    whole = run(config, STEPS, 1, 0)
    assert len(set(whole)) == STEPS
    assert resumed(config, 0) == whole


def test_text_that_is_tokenized_while_it_is_read(streamed: Path) -> None:
    whole = run(streamed, STEPS, 1, 0)
    assert len(set(whole)) == STEPS and len({line.split(" ", 2)[2] for line in whole}) > 3  # blocks and epochs
    assert resumed(streamed, 0) == whole
    assert run(streamed, 6, 2, 1, workers=3) == whole[:6]


@pytest.mark.slow
def test_every_way_of_sharing_the_work(config: Path) -> None:
    whole = run(config, STEPS, 1, 0)
    for ranks, prefetch in product((1, 2, 4), (0, 1, 3)):
        assert run(config, STEPS, ranks, prefetch) == whole, (ranks, prefetch)


@pytest.mark.slow
def test_every_way_of_sharing_the_work_on_a_stream(streamed: Path) -> None:
    whole = run(streamed, STEPS, 1, 0)
    for ranks, workers in product((1, 2, 4), (0, 1, 3)):
        assert run(streamed, STEPS, ranks, 2, workers) == whole, (ranks, workers)
