"""What a corpus is made of: files by path, folder or glob, plain or compressed, and Hugging Face datasets."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megakrause.data.hf_dataset import DATASET, describe_dataset, is_saved_dataset
from megakrause.data.quarantine import QUARANTINE
from megakrause.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
INPUT_HELP = (
    "files, folders, globs in quotes, or datasets hf:ID[:CONFIG][@SPLIT], by id or a folder; default split: train"
)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Input:
    """A file, or a dataset."""

    path: str  # of a dataset "hf:..."
    size: int  # bytes; of a dataset on the hub 0
    stamp: str  # changes when the content does: a file's time, a dataset's revision

    @cached_property
    def compression(self) -> str | None:
        return None if self.path.startswith(DATASET) else COMPRESSIONS.get(Path(self.path).suffix)

    @cached_property
    def kind(self) -> Literal["lines", "table", "text", "dataset"]:
        """.jsonl, .parquet, any other file, a dataset."""
        if self.path.startswith(DATASET):
            return "dataset"
        suffix = Path(_plain_name(self.path)).suffix
        return "lines" if suffix == ".jsonl" else "table" if suffix == ".parquet" else "text"


def find_inputs(inputs: Iterable[str], suffixes: Iterable[str] = SUFFIXES, exclude: Iterable[str] = ()) -> list[Input]:
    """What `inputs` name: files (see `find_files`), then datasets, each sorted and once.

    A dataset is `hf:ID[:CONFIG][@SPLIT]`, or a folder that `save_to_disk` wrote. Raises UserError for an input that
    matches nothing."""
    files, datasets = [], set()
    for entry in inputs:
        if entry.startswith(DATASET) or is_saved_dataset(entry):
            datasets.add(entry if entry.startswith(DATASET) else DATASET + entry)
        else:
            files.append(entry)
    return [_describe_file(path) for path in find_files(files, suffixes, exclude)] + [
        Input(name, *describe_dataset(name)) for name in sorted(datasets)
    ]


def find_files(inputs: Iterable[str], suffixes: Iterable[str] = SUFFIXES, exclude: Iterable[str] = ()) -> list[Path]:
    """Files that `inputs` name (files, folders, globs), sorted, each once.

    Of a folder, however deep, it takes files with one of `suffixes`, compressed (.gz, .zst) or not; what has a name in
    `exclude`, file or folder, is passed over. Raises UserError for an input that matches nothing, OSError for a folder
    that cannot be listed."""
    suffixes, exclude = tuple(suffixes), set(exclude)
    found: set[Path] = set()
    for entry in inputs:
        matches = [Path(entry)] if os.path.exists(entry) else [Path(path) for path in glob.glob(entry, recursive=True)]
        files = [path for path in matches if path.is_file()]
        for folder in filter(Path.is_dir, matches):
            for parent, folders, names in os.walk(folder, onerror=_fail):
                folders[:] = [name for name in folders if name not in exclude]
                files += [Path(parent, name) for name in names if _plain_name(name).endswith(suffixes)]
        if not files:
            raise UserError(f"no input matches {entry}; give files, globs, or folders with {' '.join(suffixes)} files")
        found.update(path for path in files if path.name not in exclude and not path.name.endswith(QUARANTINE))
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error


def _plain_name(name: str) -> str:
    """Without the suffix of a compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSIONS else name


def _describe_file(path: Path) -> Input:
    try:
        status = path.stat()
    except OSError:  # whoever reads it will say so
        return Input(str(path), 0, "")
    return Input(str(path), status.st_size, str(status.st_mtime_ns))
