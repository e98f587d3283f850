"""Reads checkpoints: finds the newest good one, verifies, and gives out any range of any tensor."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch

from megakrause.checkpoint.files import FileRecord, Folder, as_size, check_file, raise_if_unreachable
from megakrause.checkpoint.fragment import Box
from megakrause.checkpoint.place import COMMIT, STEP, Place, open_folder
from megakrause.checkpoint.weights import Piece, Weights, overlap
from megakrause.checkpoint.write import FORMAT
from megakrause.errors import Unreachable, UserError
from megakrause.parallel.mesh import ALONE, Axis

NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)  # what odd JSON leads to


class Checkpoint(Weights):
    """A committed step folder. Opening reads the small files and the headers; `verify` reads everything."""

    def __init__(self, folder: Folder | str | Path):
        """Raises UserError when the folder is no whole checkpoint."""
        folder = folder if isinstance(folder, Folder) else open_folder(folder)
        super().__init__(folder)
        try:
            name = COMMIT
            commit = json.loads(folder.read(name))
            if commit["format"] != FORMAT:
                raise UserError(f"{self.path} has format {commit['format']}; this version reads format {FORMAT}")
            self.files = [FileRecord.from_json(record) for record in commit["files"]]
            name = "state.json"
            self.state: dict[str, Any] = json.loads(folder.read(name))
            as_size(self.state["step"])
            name = "config.toml"
            self.config = folder.read(name).decode()
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a checkpoint: {name} is missing") from error
        except (OSError, *NOT_OURS) as error:
            if isinstance(error, OSError):
                raise_if_unreachable(f"{self.path}/{name}", error)
            raise UserError(f"{self.path} is not a readable checkpoint: {name}: {error}") from error
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[Piece]] = {}

    @property
    def step(self) -> int:
        return self.state["step"]

    def verify(self, axis: Axis = ALONE) -> str | None:
        """What is wrong, in words, or None. The ranks of the axis share the work and learn the same."""
        share = self.files[axis.rank :: axis.size]
        problems = axis.together(lambda: [check_file(self.folder, record) for record in share])
        found = axis.gather_objects([p for p in problems if p is not None])
        return next((p for part in found for p in part), None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        self._read_index()
        return self._shapes

    def pieces(self, name: str, kind: str) -> list[Piece]:
        self._read_index()
        return self._pieces.get((name, kind), [])

    def kinds(self, name: str) -> list[str]:
        """What is held of a parameter: "master", and Adam's moments of one that is trained."""
        self._read_index()
        return [kind for other, kind in self._pieces if other == name]

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """A rank's generator states; empty if it did not write a part."""
        name = f"rank-{rank:05d}.safetensors"
        if all(record.name != name for record in self.files):
            return {}
        file = self.file(name)
        return {key.removeprefix("rng/"): file.tensor(key) for key in file if key.startswith("rng/")}

    def content(self, name: str) -> bytes:
        """One of its small files. Raises UserError."""
        try:
            return self.folder.read(name)
        except OSError as error:
            raise UserError(f"cannot read {self.path}/{name}: {error.strerror}") from error

    def _read_index(self) -> None:
        if self._shapes:
            return
        shapes: dict[str, tuple[int, ...]] = {}
        pieces: dict[tuple[str, str], list[Piece]] = {}
        for record in self.files:
            if not record.name.startswith("rank-"):
                continue
            file = self.file(record.name)
            try:
                for f in json.loads(file.metadata["fragments"]):
                    box = Box(*(tuple(map(as_size, f[key])) for key in ("shape", "start", "box")))
                    if file.shape(f["key"]) != (as_size(f["numel"]),) or not box.holds(
                        as_size(f["offset"]), f["numel"]
                    ):
                        raise ValueError(f"{f['key']} is not what its place says")
                    if shapes.setdefault(str(f["name"]), box.shape) != box.shape:
                        raise ValueError(f"{f['name']} has two shapes")
                    piece = Piece(box, f["offset"], f["numel"], record.name, f["key"])
                    pieces.setdefault((f["name"], f["kind"]), []).append(piece)
            except NOT_OURS as error:
                raise UserError(f"{self.path}/{record.name} has no readable list of fragments: {error}") from error
        for (name, kind), parts in pieces.items():
            if overlap(parts):
                raise UserError(f"{self.path} holds elements of {kind} of {name} twice")
        self._shapes, self._pieces = shapes, pieces


def find_checkpoint(path: str | Path, axis: Axis = ALONE) -> Checkpoint:
    """The checkpoint that `path` names: a step folder, or the newest that verifies of a run's folder or of a folder of
    checkpoints. Raises UserError."""
    folder = open_folder(path)
    if STEP.fullmatch(str(path).rstrip("/").rpartition("/")[2]) or folder.exists(COMMIT):
        checkpoint = Checkpoint(folder)
        if problem := checkpoint.verify(axis):
            raise UserError(f"checkpoint {path} is damaged: {problem}")
        return checkpoint
    newest, passed_over = newest_checkpoint(find_place(path), axis)
    if axis.rank == 0:
        for step, problem in passed_over.items():
            print(f"passed over step-{step}: {problem}", file=sys.stderr)
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


def newest_checkpoint(place: Place, axis: Axis = ALONE) -> tuple[Checkpoint | None, dict[int, str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones, by step; None when nothing was ever
    committed. Raises UserError when checkpoints exist and none verifies, or they cannot be reached."""
    passed_over: dict[int, str] = {}
    # The main rank's view, so that all decide alike.
    steps = axis.gather_objects(axis.together(place.steps if axis.rank == 0 else list))[0]
    for step in steps:
        checkpoint, problem = axis.together(lambda step=step: _try_open(place.folder(step)))  # type: ignore[misc]
        problem = next((p for p in axis.gather_objects(problem) if p), None)
        if checkpoint is not None and problem is None:
            problem = checkpoint.verify(axis)
            if problem is None:
                return checkpoint, passed_over
        passed_over[step] = str(problem)
    if steps:
        problems = "; ".join(f"step-{step}: {problem}" for step, problem in passed_over.items())
        raise UserError(f"none of the {len(steps)} checkpoints in {place.path} is usable ({problems})")
    return None, passed_over


def _try_open(folder: Folder) -> tuple[Checkpoint | None, str | None]:
    try:
        return Checkpoint(folder), None
    except Unreachable:  # it may be the newest good one
        raise
    except UserError as error:
        return None, str(error)
