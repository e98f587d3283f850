"""What layouts really hold in memory, on the fullest rank, beside what `megakrause plan` says: a line of JSON each.

torchrun --nproc_per_node=2 tests/training/memory.py CONFIG key=value;key=value ...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import psutil
import torch
from torch import Tensor

from megakrause.batch import TokenBatch
from megakrause.config.file import load_config
from megakrause.models.build import build_model
from megakrause.models.layout import Layout
from megakrause.parallel.mesh import Mesh
from megakrause.plan import GPUS, make_plan
from megakrause.training.engine import Engine
from megakrause.training.engine_state import _adam, _homes


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of their elements, each memory once."""
    return sum({(t.data_ptr(), t.numel()): t.nbytes for t in tensors if t is not None}.values())


def gradients(engine: Any, model: torch.nn.Module) -> int:
    optimizer = engine.optimizer
    averaged = getattr(optimizer, "averaged_gradients", None) or {}
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    own = [p.grad for p in model.parameters()] + getattr(optimizer, "fp32_groups_gradients_flat", [])
    if flat is not None:
        return size([*own, flat])
    return size([*own, *(tensor for group in averaged.values() if group for tensor in group)])


def run(config_path: str, case: str) -> None:
    config = load_config(config_path, case.split(";"))
    mesh = Mesh.start(config.parallel)
    import deepspeed  # noqa: F401  before memory is measured

    torch.zeros(10).sum()
    before = psutil.Process().memory_info().rss
    model = build_model(config.model, 0, Layout.of(config, mesh))
    engine = Engine(model, config, mesh)
    inner, found = engine._engine, dict(gradients=0)

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            found["gradients"] = max(found["gradients"], gradients(inner, model))
            return real(*given, **named)

        setattr(owner, name, watched)

    # Where gradients are whole before they are summed; or where each rank has its part of the sum.
    watch(*((inner, "allreduce_gradients") if config.parallel.zero < 2 else (inner.optimizer, "step")))
    assert config.model.vocab_size is not None
    for _ in range(2):
        rows = config.train.global_batch // mesh.dp.size
        tokens = torch.randint(config.model.vocab_size, (rows, config.train.seq_len + 1))
        mask = torch.ones(rows, config.train.seq_len, dtype=torch.bool)
        documents = torch.zeros(rows, config.train.seq_len, dtype=torch.int32) if config.data.mask_documents else None
        engine.train_step(TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, documents), 1e-3)
    found["weights"] = size(getattr(p, "ds_tensor", p) for p in model.parameters())
    moments = [v for state in _adam(inner).state.values() for k, v in state.items() if k != "step"]
    plain = config.parallel.zero == 0 and config.train.precision == "fp32"
    found["optimizer"] = size([*moments, *([] if plain else _homes(inner))])
    with open("/proc/self/status") as status:  # the largest that resident memory ever was
        high = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    found["growth"] = high - before
    plan = make_plan(config, mesh.world.size, GPUS["h100"], on_gpu=False)
    fullest = {part: max(each[part] for each in mesh.world.gather_objects(found)) for part in found}
    planned = {part: max(asdict(memory)[part] for memory in plan.memories) for part in asdict(plan.memory)}
    planned["total"] = plan.memory.total
    if mesh.is_main:
        print(json.dumps({"found": fullest, "plan": planned}))


if __name__ == "__main__":
    for each in sys.argv[2:]:
        run(sys.argv[1], each)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of so many process groups may abort while the interpreter takes them down
