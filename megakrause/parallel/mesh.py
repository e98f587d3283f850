"""Who this process is among the others. Passed explicitly; there are no globals."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megakrause.config import ParallelConfig
from megakrause.errors import UserError, explain_os_error
from megakrause.parallel.launcher import end_with_launcher, is_launched, outlive_launcher

T = TypeVar("T")


@dataclass
class Traffic:
    """What one process has sent. A sum over n ranks counts as a ring's: 2 (n - 1) / n of its size."""

    bytes: int = 0


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: this process's place on it and the group of processes along it."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # None: alone
    traffic: Traffic = field(default_factory=Traffic, compare=False)

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
        return self._all_reduce(value, dist.ReduceOp.SUM)

    def max(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks, element by element, in place."""
        return self._all_reduce(value, dist.ReduceOp.MAX)

    def _all_reduce(self, value: torch.Tensor, op: Any) -> torch.Tensor:
        if self.size > 1:
            self.traffic.bytes += 2 * value.nbytes * (self.size - 1) // self.size
            dist.all_reduce(value, op, group=self.group)
        return value

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """[size * n, ...]: every rank's contiguous [n, ...], in order of rank."""
        everything = part.new_empty(self.size * len(part), *part.shape[1:])
        self.traffic.bytes += (self.size - 1) * part.nbytes
        dist.all_gather_into_tensor(everything, part, group=self.group)
        return everything

    def reduce_scatter(self, parts: torch.Tensor) -> torch.Tensor:
        """[n, ...]: this rank's part of the sum of every rank's contiguous [size * n, ...]."""
        result = parts.new_empty(len(parts) // self.size, *parts.shape[1:])
        self.traffic.bytes += (self.size - 1) * result.nbytes
        dist.reduce_scatter_tensor(result, parts, group=self.group)
        return result

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        """[size, ...]: part r is what rank r had as this rank's of its contiguous [size, ...]."""
        result = torch.empty_like(parts)
        self.traffic.bytes += parts.nbytes // self.size * (self.size - 1)
        dist.all_to_all_single(result, parts, group=self.group)
        return result

    def exchange(self, sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor]) -> None:
        """Sends to, and receives from, other ranks of the axis, all at once. Contiguous tensors, by rank."""
        self.traffic.bytes += sum(tensor.nbytes for tensor in sent.values())
        operations = [dist.P2POp(dist.isend, x, group=self.group, group_peer=r) for r, x in sent.items()]
        operations += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=r) for r, x in received.items()]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

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
    """The processes of a run, a pp x dp x cp x tp block in order of rank: tensor-parallel ranks are neighbours,
    pipeline stages are furthest apart."""

    pp: Axis  # pipeline: each stage has some of the layers
    dp: Axis  # data: each rank works on its own sequences of the same global batch
    cp: Axis  # context: each rank works on its share of the positions of the same sequences
    tp: Axis  # tensor: each rank works on its share of the features of the same positions
    data: Axis  # dp x cp: the ranks with the same weights, over which gradients are summed and ZeRO cuts
    world: Axis
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: prints, logs, writes what exists once."""
        return self.world.rank == 0

    def beside(self, timeout: timedelta) -> Axis:
        """All processes again, over a group of its own between hosts, which a thread may use while others are in use.
        Collective."""
        return make_axis(np.arange(self.world.size)[None], timeout, "gloo") if self.world.size > 1 else ALONE

    @staticmethod
    def alone(device: torch.device) -> Mesh:
        """One process without process groups."""
        return Mesh(ALONE, ALONE, ALONE, ALONE, ALONE, ALONE, device)

    @staticmethod
    def start(parallel: ParallelConfig | None = None) -> Mesh:
        """Joins the processes that torchrun or deepspeed started, or starts alone. Raises UserError when their number
        is not what `parallel` needs."""
        parallel = parallel or ParallelConfig()
        rank, size, local_rank = 0, 1, 0
        if launched := is_launched():
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
        shape = mesh_shape(parallel, size)
        device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"{local_rank + 1} processes on a host with {torch.cuda.device_count()} GPUs; start fewer"
                )
            device, backend = torch.device("cuda", local_rank), "nccl"
            torch.cuda.set_device(device)
        if not launched:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # which DeepSpeed asks for
        timeout = timedelta(seconds=parallel.timeout + 60)  # the watch, which knows more, comes first
        if not dist.is_initialized():
            if launched:
                end_with_launcher()
                dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
                outlive_launcher()
            else:  # alone: no address and no port that another job could hold
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        world = Axis(rank, size, dist.group.WORLD)
        for other, theirs in enumerate(world.gather_objects(parallel)):
            if theirs != parallel:  # they would wait for one another in different groups
                raise UserError(
                    f"rank {rank} has the layout {parallel}, rank {other} {theirs}; start all with the same config"
                )
        return Mesh.of(shape, device, timeout)

    @staticmethod
    def of(shape: tuple[int, int, int, int], device: torch.device, timeout: timedelta | None = None) -> Mesh:
        """The mesh of all processes of the default group, of shape (pp, dp, cp, tp). Collective. timeout: of its own
        collectives; None: torch's default."""
        ranks = np.arange(dist.get_world_size()).reshape(shape)
        rows = [np.moveaxis(ranks, dim, -1).reshape(-1, shape[dim]) for dim in range(4)]
        pp, dp, cp, tp = (make_axis(each, timeout) for each in rows)
        data = make_axis(np.moveaxis(ranks, 3, 1).reshape(-1, shape[1] * shape[2]), timeout)
        world = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        return Mesh(pp, dp, cp, tp, data, world, device)


def mesh_shape(parallel: ParallelConfig, processes: int) -> tuple[int, int, int, int]:
    """(pp, dp, cp, tp) of so many processes. Raises UserError when they are no multiple of pp x cp x tp."""
    pp, cp, tp = parallel.pp, parallel.cp, parallel.tp
    if processes % (pp * cp * tp):
        raise UserError(
            f"{processes} processes are no multiple of parallel.pp x cp x tp = {pp} x {cp} x {tp}; "
            f"start a multiple of {pp * cp * tp}, or change the layout",
            everywhere=True,
        )
    return pp, processes // (pp * cp * tp), cp, tp


def make_axis(rows: np.ndarray, timeout: timedelta | None = None, backend: str | None = None) -> Axis:
    """The axis along that row of `rows`, ranks [axes, size], which holds this process; alone if none does. Collective
    over all processes. backend: of torch.distributed; None: that of the default group."""
    group, mine = None, None
    for row in rows.tolist():
        made = dist.new_group(row, timeout=timeout, backend=backend)
        if dist.get_rank() in row:
            group, mine = made, row
    return ALONE if mine is None else Axis(mine.index(dist.get_rank()), len(mine), group)
