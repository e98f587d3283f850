"""The sequence of global batches, by their hashes, whatever the ranks, read-ahead, accumulation and restarts."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

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


def run(config: Path, count: int, ranks: int, prefetch: int, micro_batches: int, start: int = 0) -> list[str]:
    """`count` batches from a process that is then killed: "HASH STATE" each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/data/batches.py", str(config), *map(str, (ranks, prefetch, micro_batches, start))]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(count)]
    process.kill()
    process.wait()
    assert all(len(line.split()) == 2 for line in lines), lines
    return lines


STEPS = 25


def test_killed_and_resumed_with_another_number_of_ranks(config: Path) -> None:
    whole = run(config, STEPS, 1, 0, 1)
    assert len(set(whole)) == STEPS
    lines: list[str] = []
    for ranks, count, prefetch in ((4, 7, 3), (2, 5, 1), (8, 3, 0), (1, STEPS - 15, 3)):
        start = int(lines[-1].split()[1]) if lines else 0
        lines += run(config, count, ranks, prefetch, 1, start)
    assert lines == whole


@pytest.mark.slow
def test_every_way_of_sharing_the_work(config: Path) -> None:
    whole = run(config, STEPS, 1, 0, 1)
    for ranks, prefetch, micro_batches in product((1, 2, 4), (0, 1, 3), (1, 2)):
        assert run(config, STEPS, ranks, prefetch, micro_batches) == whole, (ranks, prefetch, micro_batches)
