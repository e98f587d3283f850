"""`megakrause bench kernels`: compiles the Triton kernels for GPUs that need not be there, and says what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megakrause.ops.krause_launch import Launch

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Compilation:
    """One launch as Triton would compile it."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int

    def compile(self, capability: int) -> dict[str, Any]:
        """Registers, stack bytes, shared memory and the matrix instruction for sm_`capability`. No GPU is needed."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants
        for number, name in enumerate(self.kernel.arg_names):
            value = values[name]
            if name in self.constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(number,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(number,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return self._usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}

    def _usage(self, cubin: bytes) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = cuobjdump("-res-usage", file.name)
            sass = cuobjdump("-sass", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        matrix = next((name for name in ("UTCHMMA", "HGMMA", "HMMA", "FFMA") if name in sass), "-")
        return {
            "registers": int(found[1]),
            "stack": int(found[2]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            "instruction": matrix,
        }


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Recorder(Launch):
    """A launch that keeps what it would run."""

    recorded: list[Compilation] = field(default_factory=list, compare=False)

    def run(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int
    ) -> None:
        self.recorded.append(Compilation(kernel, arguments, constants, warps, stages))
