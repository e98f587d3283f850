"""Processes that stay: a pool of gloo workers for tests of what runs on several ranks, started once for all of them."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megakrause.parallel.mesh import Axis

LIMIT = 120  # seconds that one call may take


class Pool:
    """`run` calls a function on some ranks, as ranks of an Axis, and returns what each returned."""

    def __init__(self, sizes: tuple[int, ...] = (1, 2, 3, 4)):
        self.sizes = sizes
        self._folder = tempfile.TemporaryDirectory(prefix="megakrause-pool-")
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._workers = []
        for rank in range(max(sizes)):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, sizes, f"{self._folder.name}/store", theirs), daemon=True
            )
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(axis, *arguments) on each of so many ranks. Raises AssertionError with a rank's traceback."""
        pipes = self._pipes[:ranks]
        for pipe in pipes:
            pipe.send((ranks, function, arguments))
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(LIMIT), f"rank {rank} of {ranks} does not answer"
            results.append(pipe.recv())
        for rank, (_, problem) in enumerate(results):
            assert problem is None, f"rank {rank} of {ranks}:\n{problem}"
        return [value for value, _ in results]

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._folder.cleanup()


def _work(rank: int, sizes: tuple[int, ...], store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(sizes))
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    while True:
        ranks, function, arguments = pipe.recv()
        try:
            axis = Axis(rank, ranks, groups[ranks])
            pipe.send((function(axis, *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
