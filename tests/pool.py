"""Processes that stay: a pool of gloo workers for tests of what runs on several ranks, started once for all of them."""

from __future__ import annotations

import math
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megakrause.parallel.mesh import Mesh, make_axis

Shape = tuple[int, int, int, int]  # pp, dp, cp, tp

LIMIT = 120  # seconds that one call may take


class Pool:
    """Calls a function on some ranks, as ranks of an Axis or a Mesh, and returns what each returned."""

    def __init__(self, size: int):
        self._folder = tempfile.TemporaryDirectory(prefix="megakrause-pool-")
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._known: set[Shape] = set()
        self._workers = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, size, f"{self._folder.name}/store", theirs), daemon=True)
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(axis, *arguments) on each of so many ranks. Raises AssertionError with a rank's traceback."""
        return self._run(ranks, (1, 1, 1, ranks), _with_axis, (function, *arguments))

    def run_mesh(self, shape: Shape, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(mesh, *arguments) on each rank of a mesh."""
        return self._run(math.prod(shape), shape, function, arguments)

    def _run(self, ranks: int, shape: Shape, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        if shape not in self._known:
            self._ask(self._pipes, shape, _nothing, ())  # process groups are made by all processes
            self._known.add(shape)
        return self._ask(self._pipes[:ranks], shape, function, arguments)

    def _ask(
        self, pipes: list[Connection], shape: Shape, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> list[Any]:
        ranks = len(pipes)
        for pipe in pipes:
            pipe.send((shape, function, arguments))
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


def _with_axis(mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(mesh.tp, *arguments)


def _nothing(mesh: Mesh) -> None:
    pass


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    meshes: dict[Shape, Mesh] = {}
    while True:
        shape, function, arguments = pipe.recv()
        try:
            if shape not in meshes:
                meshes[shape] = _mesh(shape)
            pipe.send((function(meshes[shape], *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def _mesh(shape: Shape) -> Mesh:
    """As `Mesh.of`, of the first processes of the pool alone."""
    ranks = np.arange(math.prod(shape)).reshape(shape)
    pp, dp, cp, tp = (make_axis(np.moveaxis(ranks, dim, -1).reshape(-1, shape[dim])) for dim in range(4))
    data = make_axis(np.moveaxis(ranks, 3, 1).reshape(-1, shape[1] * shape[2]))
    return Mesh(pp, dp, cp, tp, data, make_axis(ranks.reshape(1, -1)), torch.device("cpu"))
