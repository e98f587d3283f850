"""Who this process is among the others. Passed explicitly; there are no globals."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megakrause.errors import UserError, explain_os_error

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: this process's place on it and the group of processes along it."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # None: alone

    def share(self, total: int, rank: int | None = None) -> range:
        """Which of `total` things in order are a rank's (default: this one's): shares differ by one at most."""
        rank = self.rank if rank is None else rank
        return range(rank * total // self.size, (rank + 1) * total // self.size)

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

    def together(self, work: Callable[[], T]) -> T:
        """Does the work and returns its result; when it fails on some rank, raises one UserError on all of them.

        Also a barrier: nobody returns before everybody is done."""
        result, message = None, None
        try:
            result = work()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = explain_os_error(error)
        messages = self.gather_objects(message)
        for rank, message in enumerate(messages):
            if message is not None:
                everywhere = all(other == message for other in messages)
                raise UserError(message if everywhere else f"rank {rank}: {message}", everywhere=True)
        return result  # type: ignore[return-value]


ALONE = Axis(rank=0, size=1, group=None)


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
        if "MASTER_ADDR" in os.environ:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
        else:
            rank, size, local_rank = 0, 1, 0
        device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"{local_rank + 1} processes on a host with {torch.cuda.device_count()} GPUs; start fewer"
                )
            device, backend = torch.device("cuda", local_rank), "nccl"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            if "MASTER_ADDR" in os.environ:
                dist.init_process_group(backend, rank=rank, world_size=size)
            else:  # alone: no address and no port that another job could hold
                os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return Mesh(dp=Axis(rank, size, dist.group.WORLD), device=device)
