"""Who this process is among the others. Passed explicitly; there are no globals."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megakrause.errors import UserError


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: this process's place on it and the group of processes along it."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # None: alone

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums in place over the axis."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Does the work and returns every rank's result; when it fails on some rank, raises UserError on all of them.

        Also a barrier: nobody returns before everybody is done."""
        try:
            outcome: tuple[Any, str | None] = work(), None
        except UserError as error:
            outcome = None, str(error)
        except OSError as error:
            outcome = None, _explain(error)
        outcomes = self.gather_objects(outcome)
        failures = [(rank, message) for rank, (_, message) in enumerate(outcomes) if message is not None]
        if failures:
            rank, message = failures[0]
            raise UserError(message if self.size == 1 else f"rank {rank}: {message}")
        return [result for result, _ in outcomes]


@dataclass(frozen=True)
class Mesh:
    """The processes of a run. dp: data parallelism, every rank works on its own sequences of the same global batch."""

    dp: Axis
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: prints, logs, writes what exists once."""
        return self.dp.rank == 0

    @staticmethod
    def start() -> Mesh:
        """Joins the processes that torchrun or deepspeed started, or starts alone."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", local_rank), "nccl"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            if "MASTER_ADDR" in os.environ:
                dist.init_process_group(backend, rank=rank, world_size=size)
            else:  # alone: no address and no port that another job could hold
                os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Mesh(dp=Axis(rank, size, dist.group.WORLD), device=device)


def _explain(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
