"""How the Triton kernels of Krause attention are launched: what they share, and the sizes of their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megakrause.ops.grid import Grid
from megakrause.ops.krause_tiles import CHEBYSHEV, MANHATTAN, WINDOW

MAX_SELECTED = 1024  # keys a row may see where it selects: they are held in registers
MAX_HEAD_DIM = 128
MAX_RING = 2**14  # keys times rows of a decoding step: 64 registers of each thread
# Registers of a thread, at most. Unless told, ptxas may spill to make room for more threads.
MAX_REGISTERS = 255
THREE_PROGRAMS, FOUR_PROGRAMS = 168, 128  # with which so many of 4 warps run beside each other
INTERPRETED = triton.knobs.runtime.interpret  # kernels run on CPU tensors; decided when they are imported


class Tiles(NamedTuple):
    """How a kernel cuts its work, and what it is compiled with."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    tiles: int | None = None  # of columns, where their number is fixed
    registers: int = MAX_REGISTERS  # of a thread, at most: fewer let more programs run beside each other


def triton_refuses(q: Tensor, window: int | None, grid: Grid | None, top_k: int | None) -> str | None:
    """What the kernels would take instead of these arguments; None if they take these."""
    seen = window if grid is None else grid.tokens
    assert seen is not None
    if isinstance(q, FakeTensor):  # nothing is launched, on no device
        pass
    elif not q.is_cuda and not INTERPRETED:
        return f"CUDA tensors, not {q.device.type} ones (but with TRITON_INTERPRET=1 set before the start)"
    elif q.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(q.device) < (8, 0)):
        return f"NVIDIA GPUs from sm_80 on, not {torch.cuda.get_device_name(q.device)}"
    elif not q.is_cuda and q.dtype == torch.bfloat16:  # whose products are wrong there
        return "float32 and float16 in Triton's interpreter, not torch.bfloat16"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"float32, float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of at most {MAX_HEAD_DIM} numbers, not {q.shape[-1]}"
    if top_k is not None and top_k < seen and seen > MAX_SELECTED:
        return f"a selection among at most {MAX_SELECTED} keys, not {seen}"
    return None


def decode_refuses(q: Tensor, k: Tensor, window: int, top_k: int | None) -> str | None:
    """As `triton_refuses`, for one new token and a ring of `window` keys, all of which lie in registers."""
    rows = max(16, triton.next_power_of_2(q.shape[2] // k.shape[2]))
    most = MAX_RING // (2 if q.element_size() > 2 and q.shape[-1] > 64 else 1)
    if window * rows > most:
        return f"a ring of at most {most // rows} keys for {q.shape[2] // k.shape[2]} query heads each, not {window}"
    return triton_refuses(q, window, None, top_k)


@dataclass(frozen=True)
class Launch:
    """One call's sizes. window, grid: exactly one. top_k: None for no selection. bias: z = q.k - |k|^2 / 2, or q.k."""

    b: int
    s: int
    s_k: int
    h: int
    h_kv: int
    head_dim: int
    itemsize: int
    window: int | None
    grid: Grid | None
    top_k: int | None
    docs: bool
    dropout: float
    seed: int
    bias: bool = True
    capability: int = 90  # of the GPU: 90 for sm_90

    @classmethod
    def of(cls, q: Tensor, k: Tensor, **settings: Any) -> Self:
        b, s, h, d = q.shape
        if q.is_cuda:
            major, minor = torch.cuda.get_device_capability(q.device)
            settings["capability"] = 10 * major + minor
        return cls(b, s, k.shape[1], h, k.shape[2], d, q.element_size(), **settings)

    @property
    def padded_head_dim(self) -> int:
        return max(16, triton.next_power_of_2(self.head_dim))

    @cached_property
    def pack(self) -> int:
        """Query heads that share a program: the largest power of two that divides the group."""
        group = self.h // self.h_kv
        return min(group & -group, 16)

    # Sizes of tiles. On sm_90 and with 16-bit operands: what was fastest of those that `make gpu-check` timed, and what
    # is like it (bench/records/gpu.md says which). Elsewhere: as large as registers allow, by what they compile to
    # (`megakrause bench kernels`). 32-bit operands take twice the registers.

    @property
    def _tuned(self) -> bool:
        return self.capability == 90 and self.itemsize == 2 and self.dropout == 0 and self.grid is None

    def select_tiles(self) -> Tiles:
        """All scores of a block of rows at once. A warp that has 16 rows to itself narrows their brackets without
        asking others."""
        seen = self.s_k if self.window is None else self.window
        columns = min(max(16, triton.next_power_of_2(seen)), 64 if seen <= 128 else 128)
        if self._tuned:
            if self.padded_head_dim > 64:
                columns = min(columns, 64)
            held = columns * triton.cdiv(seen, columns)
            rows, warps = (held, 1) if held <= 32 else (64, 4) if held <= 256 else (32, 4) if held <= 512 else (16, 4)
        else:
            rows, warps = self._untuned_select_rows(columns * triton.cdiv(seen, columns))
        if self.window is not None:  # a block's positions lie within one tile
            rows = min(rows, columns * self.pack)
        small = self._tuned and rows == 64 and seen <= 128 and self.padded_head_dim == 64
        registers = THREE_PROGRAMS if small else MAX_REGISTERS
        return Tiles(max(rows, 16, self.pack), columns, warps, 2, triton.cdiv(seen, columns), registers)

    def _untuned_select_rows(self, held: int) -> tuple[int, int]:
        """Rows and warps: at most 64 scores in registers of each thread."""
        if self.itemsize > 2:
            return 16, 4 if held <= 128 and self.padded_head_dim < 64 and self.dropout == 0 else 8
        rows, warps = (64, 4) if held <= 128 else (32, 4) if held <= 256 else (16, 8)
        # Triton 3.7 fails to compile this kernel with Blackwell's tensor memory, which 64 rows use; dropout, the
        # coordinates of a grid and, before sm_90, the operands of products take registers.
        fewer = self.capability >= 100 or self.dropout > 0 or self.grid is not None
        fewer = fewer or (self.capability < 90 and held == 128)
        return min(rows, 32) if fewer else rows, warps

    def attend_tiles(self) -> Tiles:
        if self._tuned:
            registers = FOUR_PROGRAMS if self.padded_head_dim <= 64 else THREE_PROGRAMS
            return Tiles(64, 32, stages=3, registers=registers)
        if self.itemsize == 2:
            return Tiles(64, 64) if self.dropout == 0 else Tiles(64, 32)
        return Tiles(32, 32)

    def grad_queries_tiles(self) -> Tiles:
        if self._tuned:
            if self.padded_head_dim <= 64:
                return Tiles(64, 32, stages=3, registers=FOUR_PROGRAMS)
            return Tiles(64, 64)
        return Tiles(64, 32) if self.itemsize == 2 else Tiles(16, 32)

    def grad_keys_tiles(self) -> Tiles:
        if self._tuned:
            if self.padded_head_dim > 64:
                return Tiles(32, 64)
            return Tiles(16 if self.docs else 32, 64, registers=THREE_PROGRAMS)
        if self.itemsize == 2:
            return Tiles(32, 64) if self.padded_head_dim <= 64 else Tiles(32, 32)
        return Tiles(16, 16)

    def decode_tiles(self) -> Tiles:
        """All slots of the ring, for the query heads of one kv head."""
        columns = min(max(16, triton.next_power_of_2(self.s_k)), 64 if self.s_k <= 512 else 128)
        rows = max(16, triton.next_power_of_2(self.h // self.h_kv))
        warps = 4 if self.s_k * rows <= (8192 if self.itemsize == 2 else 1024) else 8
        return Tiles(rows, columns, warps, 2, triton.cdiv(self.s_k, columns))

    def by_rows(self, kernel: Any, tiles: Tiles, *arguments: Any) -> None:
        """Launches a kernel that works on blocks of rows."""
        blocks = triton.cdiv(self.s, tiles.rows // self.pack)
        self._by_tiles(kernel, blocks * self.b * (self.h // self.pack), tiles, arguments)

    def by_keys(self, kernel: Any, tiles: Tiles, *arguments: Any) -> None:
        """Launches a kernel that works on blocks of keys."""
        self._by_tiles(kernel, triton.cdiv(self.s_k, tiles.columns) * self.b * self.h_kv, tiles, arguments)

    def _by_tiles(self, kernel: Any, programs: int, tiles: Tiles, arguments: tuple[Any, ...]) -> None:
        constants = self.constants | {"ROWS": tiles.rows, "COLUMNS": tiles.columns}
        if tiles.tiles is not None:
            constants["TILES"] = tiles.tiles
        self.run(kernel, programs, (*arguments, *self.scalars), constants, tiles)

    def run(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], tiles: Tiles
    ) -> None:
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
        kernel[(programs,)](*arguments, **constants, **options)

    @property
    def scalars(self) -> tuple[int | float, ...]:
        """s, s_k, h, h_kv, window, width, radius, seed, dropout_threshold, dropout_scale."""
        width, radius = 1, 0
        if self.grid is not None:  # beyond the grid's own size a radius adds nothing
            width, radius = self.grid.width, min(self.grid.radius, self.grid.height + self.grid.width)
        threshold = round(self.dropout * 2**32) - 2**31
        sizes = self.s, self.s_k, self.h, self.h_kv, self.window or 0, width, radius
        return *sizes, self.seed, threshold, 1 / (1 - self.dropout)

    @property
    def constants(self) -> dict[str, Any]:
        kind = WINDOW if self.grid is None else MANHATTAN if self.grid.metric == "manhattan" else CHEBYSHEV
        return {
            "HEAD_DIM": self.head_dim,
            "D": self.padded_head_dim,
            "KIND": kind.value,
            "CLS": self.grid is not None and self.grid.cls,
            "BIAS": self.bias,
            "DOCS": self.docs,
            "DROPOUT": self.dropout > 0,
            "PACK": self.pack,
        }
