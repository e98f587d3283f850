"""`megakrause bench training --layouts`: tokens per second and bytes sent of the demo's model in every layout of the
processes that a launcher started."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megakrause.bench.measure import machine, write_json
from megakrause.bench.training import LR, MODEL, TOKENS, VOCABULARY, make_batch
from megakrause.config import RunConfig
from megakrause.config.file import parse_config
from megakrause.errors import UserError
from megakrause.models.build import build_model
from megakrause.models.layout import Layout
from megakrause.parallel.mesh import Mesh
from megakrause.plan import GPUS, make_plan
from megakrause.table import table
from megakrause.training.engine import Engine

STEPS = 8
LENGTH = 512


def run(json_path: Path | None) -> None:
    """Trains a few steps in each layout, checks that all learn alike, prints the table. Raises UserError."""
    world = Mesh.start().world
    if world.size == 1:
        raise UserError(
            "one process has one layout: torchrun --nproc_per_node=4 -m megakrause bench training --layouts"
        )
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    for config in tqdm(layouts(world.size), "trying layouts", unit="layout", disable=world.rank != 0):
        mesh = Mesh.start(config.parallel)
        losses, row = measure(config, mesh)
        first = first or losses
        # Sums in another order; selections that this flips move a loss by little.
        if any(abs(a - b) > 1e-3 * b for a, b in zip(losses, first, strict=True)):
            raise UserError(f"{row['layout']}: losses {losses} are not {first}; nothing is shown", everywhere=True)
        rows.append(row)
    if world.rank == 0:
        print(f"steps of {TOKENS:,} tokens in sequences of {LENGTH}, on {world.size} processes; {machine()}")
        print(table(rows))
        print(
            f"{STEPS} steps each, micro-batches of one sequence; the losses of all layouts agree within a thousandth."
        )
        print(
            "MiB a rank and step: tp and cp counted where they are sent, wire: all that went over the loopback device,"
        )
        print("planned: all that `megakrause plan` expects of the fullest rank.")
        if json_path is not None:
            write_json(json_path, {"machine": machine(), "model": MODEL, "rows": rows})


def layouts(ranks: int) -> list[RunConfig]:
    """Data parallelism with every ZeRO stage, and each axis as large as it can be with the model's heads and layers."""
    found = [_config(zero=zero) for zero in range(4)]
    for axis in ("tp", "cp", "pp"):
        size = max(n for n in (1, 2, 4) if ranks % n == 0)
        if size > 1:
            found.append(_config(**{axis: size}))
            found += [_config(tp=size, sequence_parallel=True)] if axis == "tp" else []
    if ranks % 4 == 0:
        found += [_config(tp=2, pp=2, zero=1), _config(tp=2, cp=2), _config(cp=2, pp=2)]
    return found


def _config(**parallel: Any) -> RunConfig:
    sequences = TOKENS // LENGTH
    return parse_config(
        {
            "output": "none",
            "model": MODEL | {"attention": "krause", "vocab_size": VOCABULARY},
            "data": {"train": "none", "tokenizer": "none"},
            "optim": {"lr": LR},
            "train": {"steps": 1, "global_batch": sequences, "seq_len": LENGTH, "micro_batch": 1},
            "parallel": parallel,
        }
    )


def measure(config: RunConfig, mesh: Mesh) -> tuple[list[float], dict[str, Any]]:
    """The losses of some steps, and a row of the table."""
    engine = Engine(build_model(config.model, 0, Layout.of(config, mesh)), config, mesh)
    rows = slice(*(rank * config.train.global_batch // mesh.dp.size for rank in (mesh.dp.rank, mesh.dp.rank + 1)))
    batch = make_batch(LENGTH, documents=True)[rows]
    losses, seconds = [engine.train_step(batch, LR).loss], []
    mesh.world.gather_objects(None)
    wire, sent = _loopback(), {"tp": mesh.tp.traffic.bytes, "cp": mesh.cp.traffic.bytes}
    for _ in range(STEPS):
        began = time.perf_counter()
        losses.append(engine.train_step(batch, LR).loss)
        seconds.append(time.perf_counter() - began)
    sent = {"tp": mesh.tp.traffic.bytes - sent["tp"], "cp": mesh.cp.traffic.bytes - sent["cp"]}
    mesh.world.gather_objects(None)
    wire = None if wire is None else (_loopback() or 0) - wire
    plan = make_plan(config, mesh.world.size, GPUS["h100"], on_gpu=mesh.device.type == "cuda")
    most = {axis: max(each[axis] for each in mesh.world.gather_objects(sent)) for axis in sent}
    mib = STEPS * 2**20
    return losses, {
        "layout": plan.layout,
        "tokens/s": TOKENS / statistics.median(seconds),
        "tp MiB": most["tp"] / mib,
        "cp MiB": most["cp"] / mib,
        "wire MiB": None if wire is None else wire / mesh.world.size / mib,
        "planned MiB": sum(plan.sent.values()) / 2**20,
    }


def _loopback() -> int | None:
    """Bytes that this machine has sent to itself; None where that is not what processes send to one another."""
    if torch.cuda.is_available():
        return None
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return None
