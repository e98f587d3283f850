"""`megakrause bench kernels`: compiles the Triton kernels for GPUs that need not be there, and says what they use."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megakrause.bench.measure import write_json
from megakrause.errors import UserError
from megakrause.ops.grid import Grid
from megakrause.ops.krause_backward import backward
from megakrause.ops.krause_decode import decode
from megakrause.ops.krause_forward import forward
from megakrause.ops.krause_launch import INTERPRETED, Launch, Tiles
from megakrause.table import table

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # float16 compiles to what bfloat16 does, but for one letter
WINDOWS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Case:
    """One call of Krause attention, of 16 query heads and as many tokens as there may be."""

    dtype: str = "bf16"
    d: int = 64
    window: int | None = 128
    grid: Grid | None = None
    select: bool = True
    group: int = 1
    docs: bool = False
    dropout: float = 0.0
    bias: bool = True

    def __str__(self) -> str:
        seen = f"W {self.window}" if self.grid is None else f"{self.grid.metric} {self.grid.radius}"
        extras = {
            "all kept": not self.select,
            "group": self.group > 1,
            "documents": self.docs,
            "dropout": self.dropout,
            "softmax": not self.bias,
        }
        return ", ".join([f"{self.dtype} d {self.d} {seen}", *(name for name, on in extras.items() if on)])

    def launches(self, capability: int) -> Iterator[Compilation]:
        """What forward, backward and a decoding step would launch on sm_`capability`."""
        s = 8192 if self.grid is None else self.grid.tokens
        seen = s if self.window is None else self.window
        h, h_kv = 16, 16 // self.group

        def tensor(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = tensor(1, s, h, self.d), tensor(1, s, h_kv, self.d)
        log_sigma = tensor(h, dtype=torch.float32)
        doc_start = tensor(1, s, dtype=torch.int32) if self.docs else None
        settings: dict[str, Any] = dict(docs=self.docs, dropout=self.dropout, seed=2**40, bias=self.bias)
        settings["capability"] = capability
        settings |= dict(window=self.window, grid=self.grid, top_k=seen // 2 if self.select and seen > 1 else None)
        recorder = Recorder.of(q, k, **settings)
        saved = forward(recorder, q, k, k, log_sigma, doc_start)
        backward(recorder, q, q, k, k, log_sigma, doc_start, *saved)
        yield from recorder.recorded
        if self.window is not None and self.bias and not self.docs and not self.dropout:
            ring = tensor(1, self.window, h_kv, self.d)
            recorder = Recorder.of(q[:, :1], ring, **settings)
            half_squares = tensor(1, h_kv, self.window, dtype=torch.float32)
            position = tensor(1, dtype=torch.int32)
            decode(recorder, q[:, :1], k[:, :1], k[:, :1], log_sigma, ring, ring, half_squares, position)
            yield from recorder.recorded


ONE_OF_EACH = [Case(), Case(select=False)]
SHIPPED = [
    *(Case(d=d, window=window) for d in (32, 64, 96, 128) for window in WINDOWS),
    *(Case("fp32", window=window) for window in WINDOWS),
    *(Case("fp32", d=d) for d in (32, 96, 128)),
    *(Case("fp32", group=4, docs=True, dropout=0.1, select=select) for select in (True, False)),
    Case("fp32", window=None, grid=Grid(14, 14, 2, "chebyshev")),
    *(Case(dtype, d=d, select=False) for dtype in DTYPES for d in (32, 64, 96, 128)),
    *(Case(group=4, select=select) for select in (True, False)),
    *(Case(docs=True, select=select) for select in (True, False)),
    *(Case(dropout=0.1, select=select) for select in (True, False)),
    *(Case(docs=True, select=False, bias=False, d=d) for d in (64, 128)),
    Case(window=None, grid=Grid(8, 8, 1)),
    *(Case(window=None, grid=Grid(14, 14, 2, "chebyshev"), select=select) for select in (True, False)),
]


@dataclass(frozen=True)
class Compilation:
    """One launch as Triton would compile it."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tiles: Tiles

    @property
    def source(self) -> tuple[Any, ...]:
        """The kernel, types, constants and what is known of integers: equal for what compiles to the same."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants
        for number, name in enumerate(self.kernel.arg_names):
            value = values[name]
            as_it_comes = name in self.kernel.do_not_specialize
            if name in self.constants or value is None or (isinstance(value, int) and value == 1 and not as_it_comes):
                signature[name], constants[(number,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], attributes[(number,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not as_it_comes:
                    attributes[(number,)] = [["tt.divisibility", 16]]
        return self.kernel, signature, constants, attributes

    def compile(self, capability: int) -> dict[str, Any]:
        """Registers a thread, stack bytes, spill instructions, shared memory in bytes and the matrix instruction, for
        sm_`capability`. No GPU is needed. Raises RuntimeError where Triton fails."""
        tiles = self.tiles
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
        with silence():  # a failing pass prints the whole program
            compiled = triton.compile(
                ASTSource(*self.source), target=GPUTarget("cuda", capability, 32), options=options
            )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, sass = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        return {
            "registers": int(found[1]),
            "stack": int(found[2]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            "shared": compiled.metadata.shared,
            "product": next((name for name in ("UTCHMMA", "HGMMA", "HMMA", "FFMA") if name in sass), "-"),
        }


@dataclass(frozen=True)
class Recorder(Launch):
    """A launch that keeps what it would run."""

    recorded: list[Compilation] = field(default_factory=list, compare=False)

    def run(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], tiles: Tiles
    ) -> None:
        self.recorded.append(Compilation(kernel, arguments, constants, tiles))


def run(capabilities: list[int], every: bool, json_path: Path | None, markdown_path: Path | None) -> None:
    """Compiles, prints the table and writes it. Raises UserError when a kernel does not compile."""
    rows = compile_all(SHIPPED if every else ONE_OF_EACH, capabilities)
    title = f"Triton {triton.__version__}; registers a thread, stack and shared memory in bytes, spills in instructions"
    print(title)
    print(table(rows))
    if json_path is not None:
        write_json(json_path, {"triton": triton.__version__, "rows": rows})
    if markdown_path is not None:
        markdown_path.write_text(markdown(title, rows), encoding="utf-8")
    if failed := [row for row in rows if row["registers"] is None]:
        raise UserError(f"{len(failed)} of {len(rows)} kernels do not compile; see the table")


def compile_all(cases: list[Case], capabilities: list[int]) -> list[dict[str, Any]]:
    """One row for every kernel that differs."""
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")
    rows = []
    for case, launch, capability in tqdm(different(cases, capabilities), "compiling", unit="kernel", leave=False):
        row = describe(case, launch, capability)
        try:
            row |= launch.compile(capability)
        except RuntimeError as error:
            row |= dict.fromkeys(("registers", "stack", "spills", "shared")) | {"product": str(error)[:60]}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], row["sm"]))


def different(cases: list[Case], capabilities: list[int]) -> list[tuple[Case, Compilation, int]]:
    """What the cases launch, each kernel that differs once."""
    found: dict[str, tuple[Case, Compilation, int]] = {}
    for case, capability in product(cases, capabilities):
        for launch in case.launches(capability):
            kernel, *source = launch.source
            name = f"{kernel.__name__} {source} {launch.tiles} {capability}"
            found.setdefault(name, (case, launch, capability))
    return list(found.values())


def describe(case: Case, launch: Compilation, capability: int) -> dict[str, Any]:
    """What is known of a kernel before it is compiled."""
    sizes = [str(launch.constants[name]) for name in ("ROWS", "COLUMNS", "TILES") if name in launch.constants]
    row = {"kernel": launch.kernel.__name__.removesuffix("_kernel"), "sm": capability, "case": str(case)}
    return row | {
        "rows x columns x tiles": " x ".join(sizes) or "-",
        "warps": launch.tiles.warps,
        "limit": launch.tiles.registers,
    }


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """The record that is kept of a run: what spills first, then everything."""
    spilling = [row for row in rows if row["spills"]]
    lines = ["# What the kernels use", "", f"`megakrause bench kernels --all --markdown FILE`: {title}.", ""]
    lines += [
        "A thread has at most 255 registers, or the limit in the table, so that more programs run at once. What spills",
        "holds scores beside a result of 128 numbers a row, or 128 scores in each thread, or float32 operands of",
        "products, each split into two TF32 numbers in registers.",
        "",
        f"{len(spilling)} of {len(rows)} spill:",
        "",
        *_markdown_table(spilling),
        "",
        "All:",
        "",
        *_markdown_table(rows),
        "",
    ]
    return "\n".join(lines)


def _markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return lines + ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing reaches stderr, from C++ neither."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
