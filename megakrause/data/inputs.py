"""What a corpus is made of: files by path, folder or glob, plain or compressed, and Hugging Face datasets."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from megakrause.data.hf_dataset import DATASET, describe_dataset, is_dataset, is_saved_dataset
from megakrause.data.quarantine import QUARANTINE
from megakrause.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".ndjson", ".parquet")  # of folders
LINES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*SUFFIXES, ".json")  # of names by which `data.train` knows text
NO_TEXT = {
    *(".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".sqlite", ".db"),
    *(".tar", ".tgz", ".zip", ".xz", ".bz2", ".lz4", ".7z", ".rar"),
    *(".bin", ".idx", ".ds", ".npy", ".npz", ".u16", ".u32", ".pkl", ".pickle", ".pt", ".pth", ".ckpt"),
    *(".safetensors", ".model", ".onnx", ".so", ".exe", ".pyc"),
    *(".pdf", ".doc", ".docx", ".odt", ".epub", ".ppt", ".pptx", ".png", ".jpg", ".jpeg", ".gif", ".mp3", ".mp4"),
}
PASSED_OVER = ("node_modules", "__pycache__")  # in folders, as is what begins with a dot
INPUT_HELP = (
    "files, folders, globs in quotes, or datasets hf:ID[:CONFIG][@SPLIT], by id or a folder (default split: train). "
    f"{' '.join(LINES)} files are JSON lines, .parquet files tables, all others text, also as .gz and .zst; what is no "
    "text, such as .csv, .tar or .pdf, is refused. In folders hidden files and folders, "
    f"{' and '.join(PASSED_OVER)} are passed over, and a file that a symlink leads to again is taken once"
)
SUFFIX_HELP = f"of files in folders, with or without .gz and .zst; default: {' '.join(SUFFIXES)}"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Input:
    """A file, or a dataset."""

    path: str  # of a dataset "hf:..."
    size: int  # bytes; of a dataset on the hub 0
    stamp: str  # changes when the content does: a file's time, a dataset's revision

    @cached_property
    def compression(self) -> str | None:
        return None if is_dataset(self.path) else COMPRESSIONS.get(Path(self.path).suffix.lower())

    @cached_property
    def kind(self) -> Literal["lines", "table", "text", "dataset"]:
        """.jsonl and its like, .parquet, any other file, a dataset."""
        if is_dataset(self.path):
            return "dataset"
        suffix = _suffix(self.path)
        return "lines" if suffix in LINES else "table" if suffix == ".parquet" else "text"


def find_inputs(inputs: Iterable[str], suffixes: Iterable[str] = SUFFIXES, exclude: Iterable[str] = ()) -> list[Input]:
    """What `inputs` name: files (see `find_files`), then datasets, each sorted and once.

    A dataset is `hf:ID[:CONFIG][@SPLIT]`, or a folder that `save_to_disk` wrote. Raises UserError for an input that
    matches nothing, or is a URL."""
    files, datasets = [], set()
    for entry in inputs:
        if "://" in entry:
            raise UserError(
                f"{entry}: text is not read from URLs; download it and prepare it first with "
                "data_prep/tokenize_text.py, or name a dataset as hf:ID"
            )
        if is_dataset(entry) or is_saved_dataset(entry):
            datasets.add(entry if is_dataset(entry) else DATASET + entry)
        else:
            files.append(entry)
    return [_describe_file(path) for path in find_files(files, suffixes, exclude)] + [
        Input(name, *describe_dataset(name)) for name in sorted(datasets)
    ]


def find_files(inputs: Iterable[str], suffixes: Iterable[str] = SUFFIXES, exclude: Iterable[str] = ()) -> list[Path]:
    """Files that `inputs` name (files, folders, globs), sorted, each once.

    Of a folder, however deep, it takes files with one of `suffixes`, compressed (.gz, .zst) or not, but nothing hidden
    and nothing twice, and says how many it did not take; what has a name in `exclude`, file or folder, is passed over.
    Raises UserError for an input that matches nothing or is no text, OSError for a folder that cannot be listed."""
    suffixes, exclude = tuple(suffixes), set(exclude)
    found: set[Path] = set()
    others: Counter[str] = Counter()
    for entry in inputs:
        matches = [Path(entry)] if os.path.exists(entry) else [Path(path) for path in glob.glob(entry, recursive=True)]
        files = [path for path in matches if path.is_file()]
        passed: Counter[str] = Counter()
        for folder in filter(Path.is_dir, matches):
            files += _in_folder(folder, suffixes, exclude, passed)
        if not files:
            there = f" (there are {_listed(passed)})" if passed else ""
            raise UserError(
                f"no input matches {entry}{there}; give files, globs, or folders with {' '.join(suffixes)} files"
            )
        files = [path for path in files if path.name not in exclude and not path.name.endswith(QUARANTINE)]
        for path in files:
            if _suffix(path) in NO_TEXT:
                raise UserError(
                    f"{path} is no text; convert it to .jsonl, .parquet or .txt (plain, .gz or .zst), or leave it out"
                )
        found.update(files)
        others += passed
    if others:
        tqdm.write(f"{others.total()} files passed over ({_listed(others)}): --suffix takes others", file=sys.stderr)
    return sorted(found)


def _in_folder(folder: Path, suffixes: tuple[str, ...], exclude: set[str], passed: Counter[str]) -> list[Path]:
    """The files of a folder; of those with other suffixes, these are counted in `passed`."""
    files: list[Path] = []
    links: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not (name in exclude or name in PASSED_OVER or name.startswith("."))]
        for name in names:
            if name.startswith(".") or name in exclude or name.endswith(QUARANTINE):
                continue
            if not (name.endswith(suffixes) or _plain_name(name).endswith(suffixes)):
                passed[_suffix(name) + name[len(_plain_name(name)) :]] += 1
                continue
            path = Path(parent, name)
            (links if path.is_symlink() else files).append(path)
    if not links:
        return files
    seen = {_identity(path) for path in files}
    for path in sorted(links):
        if (identity := _identity(path)) is None or identity not in seen:
            seen.add(identity)
            files.append(path)
    return files


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of a file; None of one that is not there: whoever reads it will say so."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listed(suffixes: Counter[str]) -> str:
    """The most frequent ones, in words."""
    most = [suffix or "no suffix" for suffix, _ in suffixes.most_common(5)]
    return " ".join([*most, "..."] if len(suffixes) > 5 else most)


def _fail(error: OSError) -> None:
    raise error


def _plain_name(name: str) -> str:
    """Without the suffix of a compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in COMPRESSIONS else name


def _suffix(path: str | Path) -> str:
    """In small letters, without that of a compression."""
    return os.path.splitext(_plain_name(str(path)))[1].lower()


def _describe_file(path: Path) -> Input:
    try:
        status = path.stat()
    except OSError:  # whoever reads it will say so
        return Input(str(path), 0, "")
    return Input(str(path), status.st_size, str(status.st_mtime_ns))
