"""`megakrause plan`: what a run will take on any number of GPUs, on a machine that has none.

Parameters, what they hold in memory and what is sent are counted by running the config's own layers on tensors without
memory (`models/cost.py`). Times are estimates from data sheets and the shares of them below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megakrause.config import RunConfig
from megakrause.config.file import parse_config
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError
from megakrause.models.build import whole_shapes
from megakrause.models.cost import ModelCost, measure, state_bytes
from megakrause.models.flops import flops_of_layers
from megakrause.models.layout import balanced_stages
from megakrause.table import table

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets: memory in bytes, dense bf16 FLOP/s, bytes/s that one sends within a host and to
    another one."""

    memory: float
    flops: float
    within: float
    between: float
    per_host: int = 8


GPUS = {
    "a100": Gpu(80e9, 312e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 450e9, 50e9),
    "b200": Gpu(180e9, 2250e12, 900e9, 50e9),
}
# What is assumed: the share of the data sheet's FLOP/s that products of these sizes reach, that of its bytes/s, and the
# share of a GPU's memory that is there for a run (the rest is CUDA, communication libraries, fragments).
REACHED_FLOPS, REACHED_BYTES, USABLE = 0.5, 0.7, 0.92
# Seconds that a block's forward and backward pass take at least, however little there is to compute: about a hundred
# kernels are launched one by one.
LEAST_OF_A_BLOCK = 1e-3


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept of all micro-batches in flight
    workspace: int  # the block that is worked on in the backward pass
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """One layout of a config on so many GPUs."""

    config: RunConfig
    gpus: int
    dp: int
    micro_batch: int
    accumulation: int
    stages: list[int]
    parameters: list[int]  # of a rank of each stage
    memories: list[Memory]  # of a rank of each stage
    sent: dict[str, int]  # bytes a step and rank, by axis
    bubble: float  # share of the time that a stage waits
    seconds: float  # a step

    @property
    def memory(self) -> Memory:
        """Of the fullest rank."""
        return max(self.memories, key=lambda memory: memory.total)

    @property
    def peak(self) -> int:
        """Bytes: of a step, or of the start, when ZeRO 3 has not cut the weights yet."""
        width = 2 if self.config.train.precision == "bf16" else 4
        return max(self.memory.total, width * max(self.parameters))

    @property
    def units_per_s(self) -> float:
        """Of what losses are means over: tokens, values, images."""
        return self.config.train.global_batch * units_of_sequence(self.config) / self.seconds

    @property
    def layout(self) -> str:
        p = self.config.parallel
        text = f"pp {p.pp} dp {self.dp} cp {p.cp} tp {p.tp}{'+sp' if p.sequence_parallel else ''} zero {p.zero}"
        text += f" recompute {p.recompute}" if p.recompute != "none" else ""
        return text + (" offload" if p.offload else "")


def make_plan(config: RunConfig, gpus: int, gpu: Gpu, cost: ModelCost | None = None, *, on_gpu: bool = True) -> Plan:
    """cost: what `measure` gave for the config, if it is known. Raises UserError for a layout that cannot be."""
    parallel, model, seq_len = config.parallel, config.model, config.seq_len
    pp, cp, tp = parallel.pp, parallel.cp, parallel.tp
    if gpus % (pp * cp * tp):
        raise UserError(
            f"{gpus} GPUs are no multiple of parallel.pp x cp x tp = {pp} x {cp} x {tp}; use {pp * cp * tp}"
        )
    dp = gpus // (pp * cp * tp)
    micro, accumulation = config.accumulation(dp)
    cost = cost or measure(config, gpu=on_gpu)
    counts = parallel.stages or balanced_stages(config, pp)
    flops, level = flops_of_layers(model, seq_len), parallel.recompute
    tokens = micro * seq_len // cp

    parameters, memories, states, busy, sent = [], [], [], [], []
    for stage, count in enumerate(counts):
        layers = range(sum(counts[:stage]), sum(counts[:stage]) + count)
        last = stage == pp - 1
        parts = [*[cost.embedding] * (stage == 0), *(cost.blocks[i] for i in layers), *[cost.head] * last]
        params = [param for part in parts for param in zip(part.shapes, part.frozen, strict=True)]
        if model.tie_embeddings and pp == 1:
            params.remove((cost.embedding.shapes[0], cost.embedding.frozen[0]))  # one matrix, used twice
        shapes = [shape for shape, frozen in params if not frozen]
        still = [shape for shape, frozen in params if frozen]
        state = state_bytes(config, shapes, dp * cp, still)
        kept = sum(part.bytes[level].saved for part in parts)
        kept += cost.stream * ((stage > 0) + (not last))  # what DeepSpeed keeps of what comes in and goes out
        kept *= micro * min(accumulation, pp - stage)
        again = max(cost.blocks[i].bytes["none"].saved - cost.blocks[i].bytes[level].saved for i in layers) * micro
        logits = cost.logits * micro * last
        states.append(state)
        parameters.append(sum(math.prod(shape) for shape, _ in params))
        trained = sum(map(math.prod, shapes))
        memories.append(Memory(state.weights, state.gradients, state.optimizer, kept, again, logits, state.buffers))
        work = sum(flops[i] for i in layers) * (4 / 3 if level == "full" else 1) + flops[-1] * last
        busy.append(max(work * tokens / tp / (gpu.flops * REACHED_FLOPS), count * LEAST_OF_A_BLOCK))
        by_axis = {"tp": sum(p.bytes[level].tp for p in parts), "cp": sum(p.bytes[level].cp for p in parts)}
        # Forwards to the next stage and backwards to the one before; of one stream, or each rank of its own positions.
        by_axis["pp"] = cost.stream // (1 if parallel.sequence_parallel else tp) * ((stage > 0) + (not last))
        if pp > 1 and not parallel.sequence_parallel:  # which it puts together again, also for the backward pass
            by_axis["tp"] += cost.stream * (tp - 1) // tp * ((stage > 0) + 2 * (not last))
        sent.append({axis: n * micro * accumulation for axis, n in by_axis.items()})
        if (
            model.tie_embeddings and model.lora is None and pp > 1 and stage in (0, pp - 1)
        ):  # the two add up their gradients, in float32
            sent[-1]["pp"] += 4 * math.prod(cost.embedding.shapes[0])
        sent[-1]["data"] = _data_bytes(config, dp * cp, trained, parameters[-1], accumulation)

    speeds = {"tp": _speed(gpu, tp), "cp": _speed(gpu, tp * cp), "pp": _speed(gpu, gpus if pp > 1 else 1)}
    waits = [sum(s[axis] / accumulation / speed for axis, speed in speeds.items()) for s in sent]
    slowest = max(map(sum, zip(busy, waits, strict=True)))
    data = max(s["data"] for s in sent) / _speed(gpu, dp * cp * tp)  # stages are furthest apart
    rounds = accumulation + pp - 1
    return Plan(
        config,
        gpus,
        dp,
        micro,
        accumulation,
        counts,
        parameters,
        memories,
        {axis: max(s[axis] for s in sent) for axis in sent[0]},
        (pp - 1) / rounds,
        rounds * slowest + data,
    )


def _speed(gpu: Gpu, span: int) -> float:
    """Bytes/s among ranks that span so many neighbouring GPUs."""
    return REACHED_BYTES * (gpu.within if span <= gpu.per_host else gpu.between)


def _data_bytes(config: RunConfig, ranks: int, trained: int, parameters: int, accumulation: int) -> int:
    """What a rank sends a step to sum gradients, in float32, and to gather weights: trained ones; with ZeRO 3, all."""
    zero, width = config.parallel.zero, 2 if (bf16 := config.train.precision == "bf16") else 4
    share, gradients, weights = (ranks - 1) / ranks, 4 * trained, width * trained
    if zero == 3:
        return int(share * accumulation * (gradients + 2 * width * parameters))
    if zero == 2:  # sums whole buckets and takes its part
        return int(share * (accumulation * 2 * gradients + weights))
    return int(share * (2 * gradients + (weights if zero or bf16 else 0)))


def layouts(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[RunConfig]:
    """Layouts that GPUs of such hosts might have."""
    tree = config.model_dump(exclude_none=True)
    tree["parallel"].pop("stages", None)
    sizes = [2**n for n in range(11)]
    micro_batches = sizes[:5] if config.model.kind == "lm" else sizes[:10]  # an image is small
    for tp, cp, pp in product(sizes, sizes, sizes):
        if tp > gpu.per_host or gpus % (tp * cp * pp) or pp > config.model.layers:
            continue
        dp = gpus // (tp * cp * pp)
        stages = (1, 2, 3) if config.train.precision == "bf16" else (0, 1, 2, 3)
        for zero, micro, recompute in product(stages, micro_batches, ("none", "selective", "full")):
            if config.train.global_batch % (dp * micro) or (pp > 1 and config.train.global_batch < dp * micro * pp):
                continue
            parallel = {"tp": tp, "cp": cp, "pp": pp, "zero": zero, "recompute": recompute, "sequence_parallel": tp > 1}
            try:
                yield parse_config(
                    tree | {"parallel": tree["parallel"] | parallel, "train": tree["train"] | {"micro_batch": micro}}
                )
            except UserError:
                continue


def search(config: RunConfig, gpus: int, gpu: Gpu) -> list[Plan]:
    """Of each mesh the fastest layout that fits, fastest first."""

    @cache
    def cost(tp: int, cp: int) -> ModelCost:
        parallel = config.parallel.model_copy(update={"tp": tp, "cp": cp, "sequence_parallel": tp > 1})
        return measure(config.model_copy(update={"parallel": parallel}), gpu=True)

    found: dict[tuple[int, int, int], Plan] = {}
    for candidate in tqdm(list(layouts(config, gpus, gpu)), "trying layouts", unit="layout", leave=False):
        plan = make_plan(candidate, gpus, gpu, cost(candidate.parallel.tp, candidate.parallel.cp))
        mesh = candidate.parallel.pp, candidate.parallel.cp, candidate.parallel.tp
        if plan.peak <= USABLE * gpu.memory and (mesh not in found or _better(plan, found[mesh])):
            found[mesh] = plan
    return sorted(found.values(), key=lambda plan: plan.seconds)


def _better(plan: Plan, other: Plan) -> bool:
    """Faster; or as fast with larger micro-batches, whose products reach more. The first of equals recomputes least."""
    if abs(plan.seconds / other.seconds - 1) < 0.01:
        return plan.micro_batch > other.micro_batch
    return plan.seconds < other.seconds


def units_of_sequence(config: RunConfig) -> int:
    """What losses are means over: once an image, or each position."""
    return 1 if config.model.unit == "image" else config.seq_len


def receptive_field(config: RunConfig) -> int | None:
    """How many positions the last layer's output depends on; None: all of them."""
    windows = [window for window in config.model.window_of_layers if window is not None]
    return 1 + sum(window - 1 for window in windows) if len(windows) == config.model.layers else None


def run(config: RunConfig, gpus: int | None, gpu_name: str, count: int, json_path: Path | None) -> None:
    """Prints the plan of a config, and the best layouts of as many GPUs. Raises UserError."""
    if config.model.kind == "swin":
        raise UserError("a swin is not shared by tensor or pipeline parallelism, and plan does not know it yet")
    if config.model.kind == "lm" and config.model.vocab_size is None:
        vocab_size = Tokenizer.load(config.tokenizer).vocab_size
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    gpu, parallel = GPUS[gpu_name], config.parallel
    gpus = gpus or parallel.pp * parallel.cp * parallel.tp
    plan = make_plan(config, gpus, gpu)
    print(describe(plan, gpu, gpu_name))
    best = search(config, gpus, gpu)[:count] if count else []
    if count:
        print(f"\nlayouts of {gpus} GPUs that fit in {USABLE:.0%} of {gpu.memory / GIB:.0f} GiB, fastest first:")
        print(table([_row(p, gpu) for p in best]) if best else "none; use more GPUs, or parallel.offload = true")
    if json_path is not None:
        found = [_row(p, gpu) | {"memory": asdict(p.memory), "sent": p.sent} for p in (plan, *best)]
        json_path.write_text(json.dumps({"gpu": gpu_name, "this": found[0], "best": found[1:]}, indent=1) + "\n")


def describe(plan: Plan, gpu: Gpu, gpu_name: str) -> str:
    config = plan.config
    model, seq_len = config.model, config.seq_len
    total = sum(map(math.prod, whole_shapes(model).values()))
    flops = sum(flops_of_layers(model, seq_len))
    fits = "fits" if plan.peak <= USABLE * gpu.memory else "does NOT fit"
    field = receptive_field(config)
    reach = "all of the sequence" if field is None or field >= seq_len else f"{field:,} of {seq_len:,} positions"
    units = units_of_sequence(config)
    unit, sequences = ("an image", "images") if model.unit == "image" else (f"a {model.unit}", "sequences")
    ranks = ", ".join(f"{n / 1e6:,.1f} M" for n in dict.fromkeys(plan.parameters))
    waits = f", layers {plan.stages}, a stage waits {plan.bubble:.1%} of the time" if config.parallel.pp > 1 else ""
    lines = [
        f"parameters            {total / 1e6:,.1f} M; of a rank {ranks}",
        f"training              {flops * seq_len / units / 1e9:,.3f} GFLOP {unit}, "
        f"{config.train.global_batch * units:,} {model.unit}s a step",
        f"receptive field       {reach}",
        f"layout                {plan.gpus} x {gpu_name}: {plan.layout}",
        f"                      micro-batches: {plan.accumulation} of {plan.micro_batch} {sequences} a step{waits}",
        f"memory of a rank      {plan.memory.total / GIB:,.2f} GiB of {gpu.memory / GIB:.0f} x {USABLE}: {fits}",
        *(f"  {name:<20}{n / GIB:>9,.2f} GiB" for name, n in asdict(plan.memory).items()),
        "sent by a rank, a step",
        *(f"  {axis:<20}{n / GIB:>9,.3f} GiB" for axis, n in plan.sent.items()),
        f"estimated             {plan.seconds:,.2f} s a step, {plan.units_per_s:,.0f} {model.unit}s/s, "
        f"MFU {_mfu(plan, gpu):.0%}",
        f"                      (if products reach {REACHED_FLOPS:.0%} of the FLOP/s, links {REACHED_BYTES:.0%}, and a "
        f"block takes {LEAST_OF_A_BLOCK * 1e3:.0f} ms or more)",
    ]
    if plan.peak > plan.memory.total:
        lines.append(f"warning: the start takes {plan.peak / GIB:,.1f} GiB a rank, before ZeRO 3 cuts the weights")
    if field is not None and field < seq_len:
        needed = -(-(seq_len - 1) // model.layers) + 1
        lines.append(
            f"warning: a token sees {field:,} positions back through all layers, train.seq_len = {seq_len:,}; "
            f"use model.window >= {needed}, or softmax in some layers"
        )
    return "\n".join(lines)


def _mfu(plan: Plan, gpu: Gpu) -> float:
    config = plan.config
    flops = config.train.global_batch * config.seq_len * sum(flops_of_layers(config.model, config.seq_len))
    return flops / plan.seconds / (plan.gpus * gpu.flops)


def _row(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    p = plan.config.parallel
    return {
        "pp": p.pp,
        "dp": plan.dp,
        "cp": p.cp,
        "tp": f"{p.tp}+sp" if p.sequence_parallel else str(p.tp),
        "zero": p.zero,
        "recompute": p.recompute,
        "micro": plan.micro_batch,
        "times": plan.accumulation,
        "GiB": plan.memory.total / GIB,
        "bubble %": 100 * plan.bubble,
        "s/step": plan.seconds,
        f"{plan.config.model.unit}s/s": plan.units_per_s,
        "MFU %": 100 * _mfu(plan, gpu),
    }
