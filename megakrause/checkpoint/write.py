"""Writes a checkpoint so that a kill at any moment leaves the last one usable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megakrause.checkpoint.files import FileRecord, tensor_chunks
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.place import Place
from megakrause.errors import UserError, explain_os_error
from megakrause.parallel.mesh import Axis

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """All that one rank has to give to a checkpoint."""

    step: int
    fragments: Iterable[Fragment]
    rng: Mapping[str, torch.Tensor]  # this rank's generator states, uint8
    state: Mapping[str, Any]  # plain values that are the same on every rank
    files: Mapping[str, bytes]  # more of what exists once, by name
    load: Callable[[Fragment], torch.Tensor] | None = None  # the content of fragments that are on the meta device


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    last: int  # the newest so many
    every: int = 0  # and those of steps that are a multiple; 0: no others
    damaged: set[int] = field(default_factory=set)  # steps that are known not to verify: these count for nothing

    def outdated(self, newest: int, steps: list[int]) -> list[int]:
        """Which of `steps`, newest first, have to go when `newest` has been written. Later ones than that were passed
        over on resume, because they do not verify: they must not push good ones out."""
        older = [step for step in steps if step < newest]
        spare = [step for step in older if step not in self.damaged][self.last - 1 :]
        kept = [step for step in spare if self.every and step % self.every == 0]
        return [step for step in older if step in self.damaged or step in spare and step not in kept]


def save_checkpoint(place: Place, snapshot: Snapshot, axis: Axis, retention: Retention) -> None:
    """Writes a checkpoint with the parts of all ranks of the axis, and removes what is outdated.

    Raises UserError on every rank when any of them fails; what was there before stays."""
    step, is_main = snapshot.step, axis.rank == 0

    def write() -> list[FileRecord]:
        fragments = list(snapshot.fragments)
        records = [place.write(step, f"rank-{axis.rank:05d}.safetensors", lambda: _rank_chunks(fragments, snapshot))]
        if is_main:
            text = json.dumps({"format": FORMAT, "step": step, **snapshot.state}, indent=1).encode()
            for name, content in {"state.json": text, **snapshot.files}.items():
                records.append(place.write(step, name, lambda content=content: iter([content])))  # type: ignore[misc]
        return records

    try:
        axis.together(lambda: place.begin(step) if is_main else None)
        parts: list[list[FileRecord]] = axis.gather_objects(axis.together(write))
        records = [record.to_json() for part in parts for record in part]
        commit = json.dumps({"format": FORMAT, "files": records}, indent=1).encode()
        axis.together(lambda: place.commit(step, commit) if is_main else None)
    except Exception:
        if is_main:
            place.discard(step)
        raise
    axis.together(lambda: _remove_outdated(place, step, retention) if is_main else None)


def _rank_chunks(fragments: list[Fragment], snapshot: Snapshot) -> Iterator[bytes | memoryview]:
    tensors = {f"rng/{key}": value for key, value in snapshot.rng.items()}
    index, by_key = [], {}
    for f in fragments:
        key = f"{f.kind}/{f.name}@{f.offset}"
        tensors[key], by_key[key] = f.tensor, f
        index.append(
            {"key": key, "name": f.name, "kind": f.kind, "shape": f.shape, "start": f.start, "box": f.box}
            | {"offset": f.offset, "numel": f.tensor.numel()}
        )
    load = snapshot.load
    return tensor_chunks(
        tensors, {"fragments": json.dumps(index)}, None if load is None else lambda key: load(by_key[key])
    )


def _remove_outdated(place: Place, newest: int, retention: Retention) -> None:
    """What fails here is said: the new one is safe, and training goes on."""
    try:
        retention.damaged.discard(newest)  # it has been written anew
        steps = retention.outdated(newest, place.steps())
    except UserError as error:
        print(str(error), file=sys.stderr)
        return
    for step in steps:
        try:
            place.remove(step)
        except OSError as error:
            print(f"cannot remove {explain_os_error(error)}", file=sys.stderr)
        except UserError as error:
            print(str(error), file=sys.stderr)
