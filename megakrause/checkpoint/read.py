"""Reads checkpoints: finds the newest good one, verifies, and gives out any range of any tensor."""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch

from megakrause.checkpoint.files import FileRecord, TensorFile, as_size, check_file
from megakrause.checkpoint.fragment import Box
from megakrause.checkpoint.place import COMMIT, STEP, Place, StepFolder, step_folder
from megakrause.checkpoint.write import FORMAT
from megakrause.errors import Unreachable, UserError
from megakrause.parallel.mesh import ALONE, Axis

FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)  # what odd JSON leads to


@dataclass(frozen=True)
class _Piece:
    """Elements [offset, offset + numel) of a flattened box, and where they lie."""

    box: Box
    offset: int
    numel: int
    file: str
    key: str


@dataclass(frozen=True)
class _Rectangle:
    """Rows and columns of a parameter seen as a matrix, row by row from element `offset` of a flat tensor on."""

    rows: range
    columns: range
    offset: int

    def flat(self, rows: range) -> slice:
        """Where some of its rows lie in the flat tensor."""
        first = self.offset + (rows.start - self.rows.start) * len(self.columns)
        return slice(first, first + len(rows) * len(self.columns))


def _rectangles(box: Box, dim: int, offset: int, numel: int) -> list[_Rectangle]:
    """What elements [offset, offset + numel) of a flattened box are of the matrix that the parameter is when the dims
    before `dim` are its rows: the rest of a row, whole rows, the beginning of a row."""
    inner = math.prod(box.size[dim + 1 :])
    width, corner = math.prod(box.size[dim:]), (box.start[dim] * inner if box.start else 0)
    found, here, end = [], offset, offset + numel
    while here < end:
        row, column = divmod(here, width)
        whole_rows = 0 if column else (end - here) // width
        count = whole_rows * width or min(width - column, end - here)
        columns = range(corner, corner + width) if whole_rows else range(corner + column, corner + column + count)
        found.append(_Rectangle(range(row, row + max(1, whole_rows)), columns, here - offset))
        here += count
    return found


def _overlap(pieces: list[_Piece]) -> bool:
    """Whether some element is in two of them."""
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Piece]] = {}
    for piece in pieces:
        boxes.setdefault((piece.box.start, piece.box.size), []).append(piece)
    for same in boxes.values():
        ordered = sorted(same, key=lambda piece: piece.offset)
        if any(b.offset < a.offset + a.numel for a, b in pairwise(ordered) if b.numel):
            return True
    return any(
        all(x < y + m and y < x + n for x, n, y, m in zip(*a, *b, strict=True)) for a, b in combinations(boxes, 2)
    )


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


class Checkpoint:
    """A committed step folder. Opening reads the small files and the headers; `verify` reads everything."""

    def __init__(self, folder: StepFolder | str | Path):
        """Raises UserError when the folder is no whole checkpoint."""
        folder = folder if isinstance(folder, StepFolder) else step_folder(folder)
        self._folder, self.path = folder, folder.path
        try:
            name = COMMIT
            commit = json.loads(folder.read(name))
            if commit["format"] != FORMAT:
                raise UserError(f"{self.path} has format {commit['format']}; this version reads format {FORMAT}")
            self.files = [FileRecord(**record) for record in commit["files"]]
            for record in self.files:
                if not (isinstance(record.xxh3_128, str) and FILE.fullmatch(record.name) and as_size(record.size) + 1):
                    raise ValueError(f"{record.name!r} is no file of a checkpoint")
            name = "state.json"
            self.state: dict[str, Any] = json.loads(folder.read(name))
            as_size(self.state["step"])
            name = "config.toml"
            self.config = folder.read(name).decode()
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a checkpoint: {name} is missing") from error
        except (OSError, *NOT_OURS) as error:
            raise UserError(f"{self.path} is not a readable checkpoint: {name}: {error}") from error
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        self._open: dict[str, TensorFile] = {}

    @property
    def step(self) -> int:
        return self.state["step"]

    def verify(self, axis: Axis = ALONE) -> str | None:
        """What is wrong, in words, or None. The ranks of the axis share the work and learn the same."""
        share = self.files[axis.rank :: axis.size]
        problems = axis.together(lambda: [check_file(self._folder, record) for record in share])
        found = axis.gather_objects([p for p in problems if p is not None])
        return next((p for part in found for p in part), None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        self._read_index()
        return self._shapes

    def kinds(self, name: str) -> list[str]:
        """What is held of a parameter: "master", and Adam's moments of one that is trained."""
        self._read_index()
        return [kind for other, kind in self._pieces if other == name]

    def read(
        self,
        name: str,
        kind: str,
        offset: int,
        numel: int,
        box: Box | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Elements [offset, offset + numel) of the flattened box (None: the whole) of a parameter or moment, fp32
        [numel], in the memory of `out` if that is given; only these are read, from whatever boxes the checkpoint holds.

        Raises UserError when the checkpoint does not hold them all."""
        self._read_index()
        box = box or Box.whole(self._shapes.get(name, (numel,)))
        result, filled = torch.empty(numel) if out is None else out, 0
        for piece in self._pieces.get((name, kind), []):
            dim = box.dim if piece.box.dim is None else piece.box.dim
            if piece.box.shape != box.shape or box.dim not in (None, dim):
                raise UserError(f"{self.path} holds {name} cut as {piece.box}; it cannot be read as {box}")
            wanted = _rectangles(box, dim or 0, offset, numel)
            for there in _rectangles(piece.box, dim or 0, piece.offset, piece.numel):
                filled += sum(self._copy(piece, there, here, result) for here in wanted)
        if filled != numel:
            raise UserError(f"{self.path} holds {filled} of the {numel} elements of {kind} of {name} that are needed")
        return result

    def _copy(self, piece: _Piece, there: _Rectangle, here: _Rectangle, result: torch.Tensor) -> int:
        """Copies what two rectangles have in common; returns how many elements that is."""
        rows, columns = _common(there.rows, here.rows), _common(there.columns, here.columns)
        if not rows or not columns:
            return 0
        file, begin = self._file(piece.file), there.flat(rows).start
        target = result[here.flat(rows)]
        part = slice(columns.start - there.columns.start, columns.stop - there.columns.start)
        into = slice(columns.start - here.columns.start, columns.stop - here.columns.start)
        if len(rows) == 1:
            file.read_into(piece.key, begin + part.start, target[into])
        elif columns == there.columns == here.columns:
            file.read_into(piece.key, begin, target)
        else:
            stored = torch.empty(len(rows) * len(there.columns))
            file.read_into(piece.key, begin, stored)
            target.view(len(rows), -1)[:, into] = stored.view(len(rows), -1)[:, part]
        return len(rows) * len(columns)

    def weights(self, name: str) -> torch.Tensor:
        """A whole parameter, fp32. Raises UserError when it is not there."""
        if name not in self.shapes:
            raise UserError(f"{self.path} has no parameter {name}; it is of another model")
        shape = self.shapes[name]
        return self.read(name, "master", 0, math.prod(shape)).view(shape)

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """A rank's generator states; empty if it did not write a part."""
        name = f"rank-{rank:05d}.safetensors"
        if all(record.name != name for record in self.files):
            return {}
        file = self._file(name)
        return {key.removeprefix("rng/"): file.tensor(key) for key in file if key.startswith("rng/")}

    def content(self, name: str) -> bytes:
        """One of its small files. Raises UserError."""
        try:
            return self._folder.read(name)
        except OSError as error:
            raise UserError(f"cannot read {self.path}/{name}: {error.strerror}") from error

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            try:
                self._open[name] = TensorFile(self._folder, name)
            except OSError as error:
                raise UserError(f"cannot read {self.path}/{name}: {error.strerror}") from error
        return self._open[name]

    def _read_index(self) -> None:
        if self._shapes:
            return
        shapes: dict[str, tuple[int, ...]] = {}
        pieces: dict[tuple[str, str], list[_Piece]] = {}
        for record in self.files:
            if not record.name.startswith("rank-"):
                continue
            file = self._file(record.name)
            try:
                for f in json.loads(file.metadata["fragments"]):
                    box = Box(*(tuple(map(as_size, f[key])) for key in ("shape", "start", "box")))
                    if file.shape(f["key"]) != (as_size(f["numel"]),) or not box.holds(
                        as_size(f["offset"]), f["numel"]
                    ):
                        raise ValueError(f"{f['key']} is not what its place says")
                    if shapes.setdefault(str(f["name"]), box.shape) != box.shape:
                        raise ValueError(f"{f['name']} has two shapes")
                    piece = _Piece(box, f["offset"], f["numel"], record.name, f["key"])
                    pieces.setdefault((f["name"], f["kind"]), []).append(piece)
            except NOT_OURS as error:
                raise UserError(f"{self.path}/{record.name} has no readable list of fragments: {error}") from error
        for (name, kind), parts in pieces.items():
            if _overlap(parts):
                raise UserError(f"{self.path} holds elements of {kind} of {name} twice")
        self._shapes, self._pieces = shapes, pieces


def find_checkpoint(path: str | Path, axis: Axis = ALONE) -> Checkpoint:
    """The checkpoint that `path` names: a step folder, or the newest that verifies of a run's folder or of a folder of
    checkpoints. Raises UserError."""
    folder = step_folder(path)
    if STEP.fullmatch(str(path).rstrip("/").rpartition("/")[2]) or folder.exists(COMMIT):
        checkpoint = Checkpoint(folder)
        if problem := checkpoint.verify(axis):
            raise UserError(f"checkpoint {path} is damaged: {problem}")
        return checkpoint
    newest, passed_over = newest_checkpoint(find_place(path), axis)
    if axis.rank == 0:
        for reason in passed_over:
            print(f"passed over {reason}", file=sys.stderr)
    if newest is None:
        raise UserError(f"{path} is neither a checkpoint nor the folder of a run with one; name a step-N folder")
    return newest


def find_place(path: str | Path) -> Place:
    """Where the checkpoints are that `path` names: a folder of step folders, or of a run. Raises UserError."""
    config = Path(path) / "config.toml"
    if "://" not in str(path) and config.is_file():
        try:
            tree = tomllib.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {config}: {error}") from error
        if folder := tree.get("checkpoint", {}).get("folder"):
            return Place.of(folder)
    place = Place.of(path)
    return place if place.steps() else Place.of(f"{str(path).rstrip('/')}/checkpoints")


def newest_checkpoint(place: Place, axis: Axis = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over; None when nothing was ever
    committed. Raises UserError when checkpoints exist and none verifies, or they cannot be reached."""
    passed_over: list[str] = []
    # The main rank's view, so that all decide alike.
    steps = axis.gather_objects(axis.together(place.steps if axis.rank == 0 else list))[0]
    for step in steps:
        checkpoint, problem = axis.together(lambda step=step: _try_open(place.folder(step)))  # type: ignore[misc]
        problem = next((p for p in axis.gather_objects(problem) if p), None)
        if checkpoint is not None and problem is None:
            problem = checkpoint.verify(axis)
            if problem is None:
                return checkpoint, passed_over
        passed_over.append(f"step-{step}: {problem}")
    if steps:
        raise UserError(f"none of the {len(steps)} checkpoints in {place.path} is usable ({'; '.join(passed_over)})")
    return None, passed_over


def _try_open(folder: StepFolder) -> tuple[Checkpoint | None, str | None]:
    try:
        return Checkpoint(folder), None
    except Unreachable:  # it may be the newest good one
        raise
    except UserError as error:
        return None, str(error)
