"""`megakrause checkpoint`: what checkpoints there are, what is in one, and how two differ."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from typing import Any

import torch

from megakrause.checkpoint.read import Checkpoint, find_checkpoint, find_place
from megakrause.errors import UserError
from megakrause.table import table

PART = 1 << 24  # elements that are compared at a time


def list_checkpoints(path: str) -> Iterator[str]:
    """A line for each checkpoint of a run's folder, newest first; `megakrause verify` reads them to the end."""
    place = find_place(path)
    steps = place.steps()
    if not steps:
        raise UserError(f"{path} has no checkpoints; name a run's folder, or a folder of step-N folders")
    rows: list[dict[str, Any]] = []
    for step in steps:
        try:
            checkpoint = Checkpoint(place.folder(step))
        except UserError as error:
            rows.append({"step": step, "tokens": None, "ranks": None, "MiB": None, "folder": f"unusable: {error}"})
            continue
        size = sum(record.size for record in checkpoint.files) / 2**20
        state = checkpoint.state
        rows.append(
            {"step": step, "tokens": state["tokens"], "ranks": state["ranks"], "MiB": size, "folder": checkpoint.path}
        )
    yield table(rows)


def show_checkpoint(path: str) -> Iterator[str]:
    """What a checkpoint holds: where the run was, its config, and every parameter."""
    checkpoint = find_checkpoint(path)
    state = checkpoint.state
    size = sum(record.size for record in checkpoint.files) / 2**20
    yield f"{checkpoint.path}: step {checkpoint.step}, {size:.1f} MiB in {len(checkpoint.files)} files, verified"
    yield (
        f"{state['tokens']:,} tokens learnt, {state['position']:,} sequences read, {state['optimizer_steps']} updates, "
        f"written by {state['ranks']} ranks"
    )
    for fingerprint, name in state["sources"].items():
        yield f"data: {name} ({fingerprint})"
    yield ""
    yield checkpoint.config.strip()
    yield ""
    shapes = checkpoint.shapes
    kinds = {name: " ".join(checkpoint.kinds(name)) for name in shapes}
    width = max(map(len, shapes))
    for name, shape in shapes.items():
        yield f"{name:<{width}}  {str(list(shape)):<16}  {kinds[name]}"
    yield f"{sum(map(math.prod, shapes.values())):,} parameters"


def compare_checkpoints(first: str, second: str) -> Iterator[str]:
    """How two checkpoints, of whatever layouts, differ; one line if their states are the same to the bit."""
    a, b = find_checkpoint(first), find_checkpoint(second)
    differ = 0
    for line in (*_compare_values(a, b), *_compare_tensors(a, b)):
        differ += 1
        yield line
    if not differ:
        yield f"{a.path} and {b.path}: same config, same state, every tensor equal to the bit"


def _compare_values(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    configs = [_flat(tomllib.loads(checkpoint.config)) for checkpoint in (a, b)]
    for what, (left, right) in {"config": configs, "state": [_flat(a.state), _flat(b.state)]}.items():
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                yield f"{what} {key}: {left.get(key)} | {right.get(key)}"


def _compare_tensors(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    for name in [*a.shapes, *(name for name in b.shapes if name not in a.shapes)]:
        shapes = [checkpoint.shapes.get(name) for checkpoint in (a, b)]
        if shapes[0] != shapes[1]:
            yield f"{name}: {_shape(shapes[0])} | {_shape(shapes[1])}"
            continue
        for kind in sorted({*a.kinds(name), *b.kinds(name)}):
            if not (kind in a.kinds(name) and kind in b.kinds(name)):
                yield f"{name}: {kind} is only in {(a if kind in a.kinds(name) else b).path}"
            elif line := _compare_tensor(a, b, name, kind):
                yield f"{name}: {kind} {line}"


def _compare_tensor(a: Checkpoint, b: Checkpoint, name: str, kind: str) -> str | None:
    """How one tensor differs, in words; None if it does not."""
    total = math.prod(a.shapes[name])
    different, largest, scale = 0, 0.0, 0.0
    for start in range(0, total, PART):
        count = min(PART, total - start)
        left, right = (checkpoint.read(name, kind, start, count) for checkpoint in (a, b))
        unequal = left.view(torch.int32) != right.view(torch.int32)
        if unequal.any():
            different += int(unequal.sum())
            largest = max(largest, float((left - right).abs().nan_to_num(math.inf).max()))
            scale = max(scale, float(left.abs().max()))
    if not different:
        return None
    return f"{different:,} of {total:,} elements differ, by {largest:.3g} at most (of values up to {scale:.3g})"


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))
