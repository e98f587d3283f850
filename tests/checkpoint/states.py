"""The states that these tests save, and how they are known again: to the bit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakrause.checkpoint.files import write_bytes
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.write import Retention, Snapshot, save_checkpoint
from megakrause.errors import UserError
from megakrause.parallel.mesh import ALONE, Axis

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (7, 5), "a.bias": (5,), "scale": (), "table": (3, 2, 4)}
KINDS = ("master", "exp_avg", "exp_avg_sq")
FILES = {"config.toml": b'output = "runs/x"\n', "tokenizer.model": bytes(range(256))}
NAMES = ["COMMIT.json", "rank-00000.safetensors", "state.json", *FILES]


def value(name: str, kind: str, seed: int) -> Tensor:
    """A whole flattened tensor: random bits, so with NaNs, infinities, denormals and both zeros among them."""
    generator = torch.Generator().manual_seed(hash_of(name, kind, seed))
    bits = torch.randint(-(2**31), 2**31, (math.prod(SHAPES[name]),), generator=generator, dtype=torch.int64)
    for i, special in enumerate([-(2**31), 0x7FC00001, 1]):  # -0, a NaN that is not the usual one, the smallest number
        bits[i : i + 1] = special
    return bits.int().view(torch.float32)


def hash_of(*parts: object) -> int:
    return random.Random(repr(parts)).getrandbits(62)


def cut(seed: int, ranks: int, cuts: int | None = None) -> list[list[Fragment]]:
    """Everything, cut at random places and dealt out to the ranks at random. cuts: seed of the places, as it stays the
    same in a run; None: that of the values."""
    choose = random.Random(seed if cuts is None else cuts)
    dealt: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, shape in SHAPES.items():
        for kind in KINDS:
            whole = value(name, kind, seed)
            places = sorted({0, whole.numel(), *(choose.randrange(whole.numel() + 1) for _ in range(ranks))})
            for start, end in zip(places, places[1:], strict=False):
                zeros = (0,) * len(shape)
                dealt[choose.randrange(ranks)].append(
                    Fragment(name, kind, shape, zeros, shape, start, whole[start:end].clone())
                )
    return dealt


def rng_of(rank: int, seed: int) -> dict[str, Tensor]:
    return {"cpu": torch.Generator().manual_seed(100 * seed + rank).get_state()}


def snapshot(step: int, axis: Axis = ALONE, *, seed: int | None = None, cuts: int | None = None) -> Snapshot:
    """What a rank has at a step. seed: of its content; None: the step. cuts: as in `cut`."""
    seed = step if seed is None else seed
    return Snapshot(
        step,
        fragments=cut(seed, axis.size, cuts)[axis.rank],
        rng=rng_of(axis.rank, seed),
        state={"position": 10 * seed, "tokens": 1.5},
        files=FILES,
    )


def save(
    root: Place | Path | str,
    step: int,
    *,
    axis: Axis = ALONE,
    last: int = 2,
    every: int = 0,
    damaged: Iterable[int] = (),
    seed: int | None = None,
    **changes: Any,
) -> str:
    """Saves `snapshot(step)`, changed, and returns the path of the step's folder."""
    place = root if isinstance(root, Place) else Place.of(root)
    save_checkpoint(
        place, replace(snapshot(step, axis, seed=seed), **changes), axis, Retention(last, every, set(damaged))
    )
    return f"{place.path}/step-{step}"


def is_whole(checkpoint: Checkpoint | None, step: int, *, ranks: int = 1, seed: int | None = None) -> bool:
    """Whether it holds exactly what `save` was given."""
    seed = step if seed is None else seed
    return (
        checkpoint is not None
        and checkpoint.step == step
        and checkpoint.state == {"format": 1, "step": step, "position": 10 * seed, "tokens": 1.5}
        and checkpoint.config.encode() == FILES["config.toml"]
        and checkpoint.content("tokenizer.model") == FILES["tokenizer.model"]
        and checkpoint.shapes == SHAPES
        and all(
            same_bits(checkpoint.read(name, kind, 0, math.prod(SHAPES[name])), value(name, kind, seed))
            for name in SHAPES
            for kind in KINDS
        )
        and all(same_rng(checkpoint.rng(rank), rng_of(rank, seed)) for rank in range(ranks))
        and checkpoint.rng(ranks) == {}
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def same_rng(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@dataclass(frozen=True)
class Home:
    """Where checkpoints lie: as files of this machine, and by the name that the product is told."""

    root: Path
    scheme: str  # "" or "file://" and the like

    @property
    def name(self) -> str:
        return f"{self.scheme}{self.root}"

    def place(self) -> Place:
        return Place.of(self.name)

    def step(self, step: int) -> str:
        return f"{self.name}/step-{step}"

    def save(self, step: int, **changes: Any) -> Checkpoint:
        return Checkpoint(save(self.name, step, **changes))


def damage(path: Path, at: int | None = None) -> None:
    """Flips one bit: at a byte, or in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Writes other content where a checkpoint's commit vouches for it, as someone does who means harm."""
    record = write_bytes(folder, name, iter([content]))
    commit = json.loads((folder / "COMMIT.json").read_bytes())
    commit["files"] = [record.to_json() if old["name"] == name else old for old in commit["files"]]
    (folder / "COMMIT.json").write_text(json.dumps(commit))


def message_of(attempt: Callable[[], Any]) -> str | None:
    """What a UserError says; None if there was none."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return None
