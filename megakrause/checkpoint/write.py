"""Writes a checkpoint so that a kill at any moment leaves the last one usable.

ROOT/step-20.tmp/             every rank writes its own part; nobody looks here
    rank-00000.safetensors    fragments of weights and optimizer state; RNG state
    state.json  config.toml       what exists once, by the main rank; likewise
    tokenizer.model               or the files of a Hugging Face tokenizer, tokenizer.json among them
    COMMIT.json               last: size and hash of every file
ROOT/step-20/                 the same folder, renamed when all of it is on disk
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megakrause.checkpoint.files import FileRecord, flush_folder, write_bytes, write_tensors
from megakrause.checkpoint.fragment import Fragment
from megakrause.errors import explain_os_error
from megakrause.parallel.mesh import Axis

FORMAT = 1


def save_checkpoint(
    root: Path,
    step: int,
    *,
    axis: Axis,
    fragments: Iterable[Fragment],
    rng: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    keep: int,
) -> Path:
    """Writes ROOT/step-N with the parts of all ranks of the axis; of it and earlier ones, the `keep` newest stay.

    rng: this rank's generator states, uint8. state: plain values that are the same on every rank. files: more of
    what exists once, by name. Raises UserError on every rank when any of them fails; what was there before stays."""
    folder, temporary = root / f"step-{step}", root / f"step-{step}.tmp"

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()

    def write() -> list[FileRecord]:
        records = [_write_rank(temporary, axis.rank, list(fragments), rng)]
        if axis.rank == 0:
            text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1).encode()
            for name, content in {"state.json": text, **files}.items():
                records.append(write_bytes(temporary, name, iter([content])))
        return records

    try:
        axis.together(lambda: prepare() if axis.rank == 0 else None)
        parts: list[list[FileRecord]] = axis.gather_objects(axis.together(write))
        records = [record for part in parts for record in part]
        axis.together(lambda: _commit(temporary, folder, records) if axis.rank == 0 else None)
    except Exception:
        if axis.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    axis.together(lambda: _retain(folder, keep) if axis.rank == 0 else None)
    return folder


def _write_rank(folder: Path, rank: int, fragments: list[Fragment], rng: Mapping[str, torch.Tensor]) -> FileRecord:
    tensors = {f"rng/{key}": value for key, value in rng.items()}
    index = []
    for f in fragments:
        key = f"{f.kind}/{f.name}@{f.offset}"
        tensors[key] = f.tensor
        index.append(
            {"key": key, "name": f.name, "kind": f.kind, "shape": f.shape, "start": f.start, "box": f.box}
            | {"offset": f.offset, "numel": f.tensor.numel()}
        )
    return write_tensors(folder, f"rank-{rank:05d}.safetensors", tensors, {"fragments": json.dumps(index)})


def _commit(temporary: Path, folder: Path, records: list[FileRecord]) -> None:
    text = json.dumps({"format": FORMAT, "files": [r.to_json() for r in records]}, indent=1).encode()
    write_bytes(temporary, "COMMIT.json", iter([text]))
    flush_folder(temporary)
    if folder.exists():  # of the same step, and passed over on resume because it does not verify
        bad = folder.with_name(f"{folder.name}.bad.tmp")
        shutil.rmtree(bad, ignore_errors=True)
        folder.rename(bad)
    temporary.rename(folder)
    flush_folder(folder.parent)


def _retain(newest: Path, keep: int) -> None:
    folders = committed_folders(newest.parent)
    # Those of later steps were passed over on resume, because they do not verify: they must not push good ones out.
    for old in folders[folders.index(newest) + keep :]:
        trash = old.with_name(f"{old.name}.old.tmp")  # a half-removed checkpoint must not look like one
        try:
            old.rename(trash)
            shutil.rmtree(trash)
        except OSError as error:  # the new one is safe; training goes on
            print(f"cannot remove {explain_os_error(error)}", file=sys.stderr)


def remove_leftovers(root: Path) -> None:
    """Removes what interrupted writes and removals left. Only the main rank, before anything is written."""
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def committed_folders(root: Path) -> list[Path]:
    """The step folders below `root`, newest first."""
    folders = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)
