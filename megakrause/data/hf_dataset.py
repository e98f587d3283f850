"""Hugging Face datasets as inputs, read as a stream: `hf:ID[:CONFIG][@SPLIT][#REVISION]`.

Without a revision, a dataset on the hub is read as it is when a run begins, and a run that goes on needs that again.
ID is a dataset on the hub, a folder that `save_to_disk` wrote, or one of data files that `datasets` understands. No
code that comes with a dataset is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megakrause.errors import UserError

DATASET = "hf:"
NAME = re.compile(r"hf:(?P<id>[^:@#]+)(:(?P<config>[^:@#]+))?(@(?P<split>[^:@#]+))?(#(?P<revision>[^#]+))?")
BATCH = 128  # documents


@dataclass(frozen=True)
class _Name:
    id: str
    config: str | None
    split: str
    revision: str | None


def is_dataset(name: str) -> bool:
    """Whether it is written as one; hf://... is a URL."""
    return name.startswith(DATASET) and not name.startswith(f"{DATASET}//")


def is_saved_dataset(folder: str) -> bool:
    """Whether `save_to_disk` wrote it."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def describe_dataset(name: str) -> tuple[int, str]:
    """(bytes, or 0 where that is not known; stamp: a revision on the hub, or a hash of the local files' names, sizes
    and times). Raises UserError when there is no such dataset."""
    dataset = _parse(name)
    if not os.path.isdir(dataset.id):
        return 0, dataset.revision or _revision(name, dataset.id)
    status = [(str(path), path.stat()) for path in sorted(Path(dataset.id).rglob("*")) if path.is_file()]
    listing = [(path, one.st_size, one.st_mtime_ns) for path, one in status]
    return sum(size for _, size, _ in listing), xxhash.xxh3_128_hexdigest(repr(listing).encode())


def read_dataset(name: str, stamp: str, columns: tuple[str, ...], start: int) -> Iterator[tuple[Any, ...]]:
    """The values of the columns in each row from row `start` on. Raises UserError when there is no such column, or the
    dataset cannot be read, perhaps only today."""
    try:
        rows = open_dataset(name, stamp)
        missing = [column for column in columns if column not in (rows.column_names or columns)]
        if missing:
            there = ", ".join(map(repr, rows.column_names))
            raise UserError(f"the dataset {name} has no field '{missing[0]}' but {there}")
        for batch in rows.skip(start).select_columns(list(columns)).iter(BATCH):
            yield from zip(*(batch[column] for column in columns), strict=True)
    except UserError:
        raise
    except Exception as error:  # `datasets` and what it builds on raise dozens of types
        raise cannot_read(name, error) from error


def open_dataset(name: str, stamp: str) -> Any:
    """The dataset as an IterableDataset. Raises UserError when it cannot be opened, perhaps only today."""
    try:
        return _open(_parse(name), stamp)
    except UserError:
        raise
    except Exception as error:  # `datasets` and what it builds on raise dozens of types
        raise cannot_read(name, error) from error


def _parse(name: str) -> _Name:
    if not (match := NAME.fullmatch(name)):
        raise UserError(f"{name} names no dataset: write hf:ID, hf:ID:CONFIG, hf:ID@SPLIT or hf:ID:CONFIG@SPLIT")
    return _Name(match["id"], match["config"], match["split"] or "train", match["revision"])


def _revision(name: str, repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository).sha or ""
    except Exception as error:  # of the network, of the hub, of the name
        raise cannot_read(name, error) from error


def _open(dataset: _Name, revision: str) -> Any:
    """An IterableDataset."""
    # Takes seconds to import, and nothing else needs it.
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not os.path.isdir(dataset.id):
        return load_dataset(dataset.id, dataset.config, split=dataset.split, streaming=True, revision=revision)
    if not is_saved_dataset(dataset.id):
        return load_dataset(dataset.id, dataset.config, split=dataset.split, streaming=True)
    saved = load_from_disk(dataset.id)
    if isinstance(saved, DatasetDict):
        if dataset.split not in saved:
            raise UserError(f"the dataset {dataset.id} has no split {dataset.split} but {', '.join(saved)}")
        saved = saved[dataset.split]
    return saved.to_iterable_dataset()


def cannot_read(name: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"cannot read the dataset {name}: {reason}")
