"""Prints a hash of every global batch of a config's run, and the state after it, until it is killed.

python tests/data/batches.py CONFIG.toml RANKS PREFETCH WORKERS POSITION STREAMS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import xxhash

from megakrause.config.file import load_config
from megakrause.data import sources, stream
from megakrause.data.loader import train_batches
from megakrause.data.open import train_samples
from megakrause.data.tokenizer import Tokenizer


def main(path: str, ranks: int, prefetch: int, workers: int, start: int, streams: dict[str, Any]) -> None:
    sources.CHUNK, stream.BLOCK_BYTES = 600, 1500  # so that a few texts are many blocks
    config = load_config(path, [f"data.workers={workers}"])
    size, loaders = config.train.global_batch, []
    for rank in range(ranks):
        samples = train_samples(config, Tokenizer.load(config.data.tokenizer))
        samples.resume(streams)
        loaders.append(
            train_batches(samples, global_batch=size, rank=rank, ranks=ranks, start=start, prefetch=prefetch)
        )
    for together in zip(*loaders, strict=True):
        digest = xxhash.xxh3_128()
        for batch, _ in together:
            assert len(batch.tokens) == size // ranks and batch.doc_start is not None
            for row in range(size // ranks):  # a row at a time, so that the ranks' shares do not show
                for field in (batch.tokens, batch.targets, batch.loss_mask, batch.doc_start):
                    digest.update(field[row].to(torch.int64).numpy().tobytes())
        (position,) = {position for _, position in together}
        print(digest.hexdigest(), position, json.dumps(samples.stream_states(position)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), json.loads(sys.argv[6]))
