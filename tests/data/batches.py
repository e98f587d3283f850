"""Prints a hash of every global batch of a config's run, and the state after it, until it is killed.

python tests/data/batches.py CONFIG.toml RANKS PREFETCH MICRO_BATCHES WORKERS POSITION STREAMS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import xxhash

from megakrause.config import load_config
from megakrause.data import sources, stream
from megakrause.data.loader import train_batches
from megakrause.data.open import train_samples
from megakrause.data.tokenizer import Tokenizer


def main(
    path: str, ranks: int, prefetch: int, micro_batches: int, workers: int, start: int, streams: dict[str, Any]
) -> None:
    sources.CHUNK, stream.BLOCK_BYTES = 600, 1500  # so that a few texts are many blocks
    config = load_config(path, [f"data.workers={workers}"])
    size, loaders = config.train.global_batch, []
    for rank in range(ranks):
        samples = train_samples(config, Tokenizer.load(config.data.tokenizer))
        samples.resume(streams)
        loaders.append(
            train_batches(samples, global_batch=size, rank=rank, ranks=ranks, start=start, prefetch=prefetch)
        )
    rows = size // ranks // micro_batches
    for together in zip(*loaders, strict=True):
        digest = xxhash.xxh3_128()
        for batch, _ in together:
            for first in range(0, size // ranks, rows):
                part = batch[slice(first, first + rows)]
                assert part.doc_start is not None
                for row in range(rows):  # a row at a time, so that cuts do not show
                    for field in (part.tokens, part.targets, part.loss_mask, part.doc_start):
                        digest.update(field[row].to(torch.int64).numpy().tobytes())
        (position,) = {position for _, position in together}
        print(digest.hexdigest(), position, json.dumps(samples.stream_states(position)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:7]), json.loads(sys.argv[7]))
