"""Checkpoints: what is saved is read back to the bit, damage is noticed, and nothing loses the last good one.

Kills, full disks and several ranks need processes of their own, which start slowly; so this file runs itself once,
forks for every such case and writes down what was seen; the tests only judge it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megakrause.checkpoint.files import FileRecord, check_file, write_bytes, write_tensors
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.model import load_model, stored_config, stored_tokenizer
from megakrause.checkpoint.read import Checkpoint, find_checkpoint, newest_checkpoint
from megakrause.checkpoint.write import remove_leftovers, save_checkpoint
from megakrause.config import RunConfig, parse_config
from megakrause.errors import UserError
from megakrause.models.build import build_model
from megakrause.parallel.mesh import ALONE, Axis

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (7, 5), "a.bias": (5,), "scale": (), "table": (3, 2, 4)}
KINDS = ("master", "exp_avg", "exp_avg_sq")
RANKS = 3
FILES = {"config.toml": b'output = "runs/x"\n', "tokenizer.model": bytes(range(256))}
FULL = ": File too large"  # what the kernel says to a process that may not write more
NAMES = ["COMMIT.json", "rank-00000.safetensors", "state.json", *FILES]


def value(name: str, kind: str, step: int) -> Tensor:
    """A whole flattened tensor: random bits, so with NaNs, infinities, denormals and both zeros among them."""
    generator = torch.Generator().manual_seed(hash_of(name, kind, step))
    bits = torch.randint(-(2**31), 2**31, (math.prod(SHAPES[name]),), generator=generator, dtype=torch.int64)
    for i, special in enumerate([-(2**31), 0x7FC00001, 1]):  # -0, a NaN that is not the usual one, the smallest number
        bits[i : i + 1] = special
    return bits.int().view(torch.float32)


def hash_of(*parts: object) -> int:
    return random.Random(repr(parts)).getrandbits(62)


def cut(step: int, ranks: int) -> list[list[Fragment]]:
    """Everything, cut at random places and dealt out to the ranks at random."""
    choose = random.Random(step)
    dealt: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, shape in SHAPES.items():
        for kind in KINDS:
            whole = value(name, kind, step)
            places = sorted({0, whole.numel(), *(choose.randrange(whole.numel() + 1) for _ in range(ranks))})
            for start, end in zip(places, places[1:], strict=False):
                zeros = (0,) * len(shape)
                dealt[choose.randrange(ranks)].append(
                    Fragment(name, kind, shape, zeros, shape, start, whole[start:end].clone())
                )
    return dealt


def rng_of(rank: int, step: int) -> dict[str, Tensor]:
    return {"cpu": torch.Generator().manual_seed(100 * step + rank).get_state()}


def save(root: Path, step: int, *, axis: Axis = ALONE, keep: int = 2, **changes: Any) -> Path:
    arguments: dict[str, Any] = dict(
        axis=axis,
        fragments=cut(step, axis.size)[axis.rank],
        rng=rng_of(axis.rank, step),
        state={"position": 10 * step, "tokens": 1.5},
        files=FILES,
        keep=keep,
    )
    return save_checkpoint(root, step, **(arguments | changes))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def bytes_of(x: Tensor) -> list[int]:
    return x.detach().reshape(-1).contiguous().view(torch.uint8).tolist()


def is_whole(checkpoint: Checkpoint, step: int) -> bool:
    """Whether it holds exactly what `save` was given."""
    return (
        checkpoint.step == step
        and checkpoint.state == {"format": 1, "step": step, "position": 10 * step, "tokens": 1.5}
        and checkpoint.config.encode() == FILES["config.toml"]
        and (checkpoint.folder / "tokenizer.model").read_bytes() == FILES["tokenizer.model"]
        and checkpoint.shapes == SHAPES
        and all(
            same_bits(checkpoint.read(name, kind, 0, math.prod(SHAPES[name])), value(name, kind, step))
            for name in SHAPES
            for kind in KINDS
        )
    )


def damage(path: Path, at: int | None = None) -> None:
    """Flips one bit: at a byte, or in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one good checkpoint, of step 1."""
    save(tmp_path / "checkpoints", 1)
    return tmp_path / "checkpoints"


# ---- what is saved is read


def test_everything_is_read_back_to_the_bit(root: Path) -> None:
    for step in range(2, 8):
        folder = save(root, step, keep=9)
        assert folder == root / f"step-{step}"
        checkpoint = Checkpoint(folder)
        assert checkpoint.verify() is None
        assert is_whole(checkpoint, step)
        assert {k: v.tolist() for k, v in checkpoint.rng(0).items()} == {"cpu": rng_of(0, step)["cpu"].tolist()}
        assert checkpoint.rng(1) == {}
        for name, shape in SHAPES.items():
            assert checkpoint.weights(name).shape == shape
            assert same_bits(checkpoint.weights(name).reshape(-1), value(name, "master", step))


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save(tmp_path_factory.mktemp("read"), 3))


@given(st.sampled_from([*SHAPES]), st.sampled_from(KINDS), st.data())
def test_any_range_is_read(read_only: Checkpoint, name: str, kind: str, data: st.DataObject) -> None:
    numel = math.prod(SHAPES[name])
    start = data.draw(st.integers(0, numel))
    count = data.draw(st.integers(0, numel - start))
    found = read_only.read(name, kind, start, count)
    assert same_bits(found, value(name, kind, 3)[start : start + count])


@pytest.mark.parametrize(
    "name, kind, offset, numel, holds",
    [("a.bias", "master", 3, 3, 2), ("a.bias", "master", 6, 1, 0), ("b", "master", 0, 1, 0), ("a.bias", "m", 0, 5, 0)],
)
def test_what_is_not_there_is_named(
    read_only: Checkpoint, name: str, kind: str, offset: int, numel: int, holds: int
) -> None:
    with pytest.raises(UserError, match=f"holds {holds} of the {numel} elements of {kind} of {name}"):
        read_only.read(name, kind, offset, numel)


def test_unknown_parameters_are_named(read_only: Checkpoint) -> None:
    with pytest.raises(UserError, match="no parameter b.weight"):
        read_only.weights("b.weight")


def test_a_missing_fragment_is_noticed(tmp_path: Path) -> None:
    fragments = cut(5, 1)[0]
    left_out = fragments.pop(4)
    checkpoint = Checkpoint(save(tmp_path, 5, fragments=fragments))
    with pytest.raises(UserError, match=f"elements of {left_out.kind} of {left_out.name}"):
        checkpoint.read(left_out.name, left_out.kind, 0, math.prod(left_out.shape))


def test_tensor_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "float32": value("a.weight", "master", 1).view(7, 5),
        "float64": torch.linspace(0, 1, 7, dtype=torch.float64),
        "bfloat16": torch.linspace(0, 1, 5).bfloat16(),
        "int64": torch.tensor([[-(2**63), 2**63 - 1]]),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "part": torch.arange(6.0)[1::2],
        'a "quoted" näme': torch.ones(1, requires_grad=True),
    }
    record = write_tensors(tmp_path, "x.safetensors", tensors, {"note": 'ünd "more"'})
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert bytes_of(found[name]) == bytes_of(tensor)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"note": 'ünd "more"'}
    assert record.size == (tmp_path / "x.safetensors").stat().st_size
    assert check_file(tmp_path, record) is None


def test_checkpoints_open_with_the_safetensors_library(root: Path) -> None:
    found = safetensors.torch.load_file(root / "step-1" / "rank-00000.safetensors")
    for fragment in cut(1, 1)[0]:
        assert same_bits(found.pop(f"{fragment.kind}/{fragment.name}@{fragment.offset}"), fragment.tensor)
    assert set(found) == {"rng/cpu"}


# ---- damage


def positions(size: int) -> list[int]:
    """Both ends, the middle and some in between."""
    return sorted({0, 1, 7, 8, size // 2, size - 2, size - 1, *range(0, size, max(1, size // 12))} & {*range(size)})


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_noticed_and_its_file_named(root: Path, name: str) -> None:
    path = root / "step-1" / name
    whole = path.read_bytes()
    for at in positions(len(whole)):
        path.write_bytes(whole)
        damage(path, at)
        with pytest.raises(UserError) as raised:
            find_checkpoint(root / "step-1")
        # A flipped digit of a checksum in COMMIT.json looks like damage to the file that it is of.
        assert name == "COMMIT.json" or name in str(raised.value), at
        with pytest.raises(UserError, match="none of the 1 checkpoints"):
            newest_checkpoint(root)
    path.write_bytes(whole)
    assert is_whole(find_checkpoint(root / "step-1"), 1)


def test_every_single_bit_of_a_commit_counts(root: Path) -> None:
    path = root / "step-1" / "COMMIT.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        with pytest.raises(UserError):
            find_checkpoint(root / "step-1")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["truncated", "empty", "longer", "missing", "a folder"])
def test_every_broken_file_is_noticed_and_named(root: Path, name: str, kind: str) -> None:
    save(root, 2)
    path = root / "step-2" / name
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "truncated":
            path.write_bytes(content[:-1])
        case "empty":
            path.touch()
        case "longer":
            path.write_bytes(content + b"\0")
        case "a folder":
            path.mkdir()
    checkpoint, passed_over = newest_checkpoint(root)
    assert checkpoint is not None and is_whole(checkpoint, 1)  # the older one
    assert len(passed_over) == 1 and passed_over[0].startswith("step-2: ") and name in passed_over[0]
    if not (name == "COMMIT.json" and kind == "missing"):  # without one the folder is no checkpoint's at all
        with pytest.raises(UserError, match=name):
            find_checkpoint(root / "step-2")


def test_when_none_is_usable_all_reasons_are_given(root: Path) -> None:
    save(root, 2)
    damage(root / "step-1" / "tokenizer.model")
    (root / "step-2" / "state.json").unlink()
    with pytest.raises(UserError) as raised:
        newest_checkpoint(root)
    message = str(raised.value)
    assert message.startswith(f"none of the 2 checkpoints in {root} is usable")
    assert "step-2: " in message and "state.json is missing" in message
    assert "step-1: " in message and "tokenizer.model does not match its checksum" in message


def test_when_nothing_was_ever_committed_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-3.tmp").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "other").touch()
    assert newest_checkpoint(tmp_path) == (None, [])


def test_a_later_format_is_refused(root: Path) -> None:
    path = root / "step-1" / "COMMIT.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2; this version reads format 1"):
        Checkpoint(root / "step-1")


def test_a_checkpoint_is_found_by_its_folder_and_by_its_run(root: Path) -> None:
    save(root, 10, keep=9)
    save(root, 9, keep=9)
    assert find_checkpoint(root / "step-9").step == 9
    assert find_checkpoint(str(root.parent)).step == 10  # by number, not by name
    for path in (root, root.parent / "nowhere", root / "step-1" / "COMMIT.json"):
        with pytest.raises(UserError, match="neither a checkpoint nor the folder of a run"):
            find_checkpoint(path)


def test_files_larger_than_one_read_are_checked_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakrause.checkpoint.files.READ_SIZE", 64)
    content = bytes(range(200))
    record = write_bytes(tmp_path, "x", iter([content[:50], content[50:], b""]))
    assert record == FileRecord("x", 200, record.xxh3_128) and (tmp_path / "x").read_bytes() == content
    assert check_file(tmp_path, record) is None
    for at in (0, 63, 64, 199):
        (tmp_path / "x").write_bytes(content)
        damage(tmp_path / "x", at)
        assert check_file(tmp_path, record) == f"{tmp_path / 'x'} does not match its checksum"


class Command:
    """What a malicious pickle does when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trusted", [False, True], ids=["pickle", "pickle with its checksum"])
def test_no_pickle_is_ever_run(root: Path, tmp_path: Path, name: str, trusted: bool) -> None:
    folder, marker = root / "step-1", tmp_path / "run"
    pickled = pickle.dumps(Command(marker))
    if trusted and name != "COMMIT.json":
        record = write_bytes(folder, name, iter([pickled]))
        commit = json.loads((folder / "COMMIT.json").read_text())
        commit["files"] = [record.to_json() if old["name"] == name else old for old in commit["files"]]
        (folder / "COMMIT.json").write_text(json.dumps(commit))
    else:
        (folder / name).write_bytes(pickled)
        with pytest.raises(UserError, match=name):
            find_checkpoint(folder)
    attempts: list[Callable[[], Any]] = [
        lambda: newest_checkpoint(root),
        lambda: find_checkpoint(folder),
        lambda: Checkpoint(folder).verify(),
        lambda: Checkpoint(folder).weights("a.bias"),
        lambda: Checkpoint(folder).rng(0),
        lambda: load_model(Checkpoint(folder)),
    ]
    for attempt in attempts:
        with contextlib.suppress(Exception):
            attempt()
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()  # so it would have been seen


# ---- what is left behind


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=3)
    assert folders(tmp_path) == ["step-10", "step-11", "step-9"]
    save(tmp_path, 12, keep=1)
    assert folders(tmp_path) == ["step-12"]


def test_a_damaged_newer_one_does_not_push_good_ones_out(root: Path) -> None:
    """A run that passed over step 9 and went on from step 1 saves step 2, which is all that it can go on from."""
    save(root, 9)
    damage(root / "step-9" / "state.json")
    save(root, 2, keep=1)
    checkpoint, passed_over = newest_checkpoint(root)
    assert checkpoint is not None and is_whole(checkpoint, 2)
    assert [reason.split(":")[0] for reason in passed_over] == ["step-9"]
    assert "step-1" not in folders(root)


def test_a_step_can_be_saved_again_and_again(root: Path) -> None:
    for tokens in (3, 4, 5):
        damage(root / "step-1" / "rank-00000.safetensors")
        save(root, 1, state={"tokens": tokens})
        assert find_checkpoint(root / "step-1").state["tokens"] == tokens
    remove_leftovers(root)
    assert folders(root) == ["step-1"]


def test_leftovers_are_removed_and_nothing_else(root: Path) -> None:
    for name in ("step-2.tmp", "step-1.old.tmp", "step-3.bad.tmp"):
        shutil.copytree(root / "step-1", root / name)
    (root / "notes.txt").touch()
    checkpoint, passed_over = newest_checkpoint(root)
    assert checkpoint is not None and checkpoint.step == 1 and passed_over == []
    remove_leftovers(root)
    assert folders(root) == ["notes.txt", "step-1"]
    remove_leftovers(root / "nowhere")


def test_what_a_killed_save_left_is_not_mixed_into_the_next(root: Path) -> None:
    shutil.copytree(root / "step-1", root / "step-2.tmp")
    (root / "step-2.tmp" / "rank-00007.safetensors").touch()
    save(root, 2)
    assert set(folders(root / "step-2")) == set(NAMES)
    assert folders(root) == ["step-1", "step-2"]


# ---- failures of the disk


def test_everything_is_flushed_before_the_rename_and_the_rename_after(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_rename(source: Any, target: Any, **options: Any) -> None:
        events.append(("rename", os.path.basename(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(root, 2)
    before, after = events[: events.index(("rename", "step-2"))], events[events.index(("rename", "step-2")) + 1 :]
    assert {name for what, name in before if what == "flush"} == {*NAMES, "step-2.tmp"}
    assert before.index(("flush", "step-2.tmp")) == len(before) - 1  # after COMMIT.json, which is after all others
    assert before.index(("flush", "COMMIT.json")) == len(before) - 2
    assert after == [("flush", "checkpoints")]


def test_an_error_of_the_disk_at_any_flush_leaves_what_was_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, left = os.fsync, 0

    def failing_fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    flushes = len(NAMES) + 1  # the files and their folder; what follows is the rename
    for left in range(flushes):  # noqa: B007
        with pytest.raises(UserError, match="No space left on device"):
            save(root, 2, keep=1)
        assert folders(root) == ["step-1"]
        assert is_whole(find_checkpoint(root.parent), 1)
    left = flushes + 1
    save(root, 2, keep=1)
    assert is_whole(find_checkpoint(root.parent), 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints: File exists"):
        save(tmp_path / "checkpoints", 1)


def test_other_errors_clean_up_too(root: Path) -> None:
    def fragments() -> Iterator[Fragment]:
        yield cut(2, 1)[0][0]
        raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        save(root, 2, fragments=fragments())
    assert folders(root) == ["step-1"]


# ---- a model from a checkpoint


def run_config(**model: Any) -> RunConfig:
    shape = dict(layers=2, width=8, heads=2, mlp_width=12, window=4, vocab_size=11)
    return parse_config(
        {
            "output": "runs/x",
            "model": shape | model,
            "data": {"train": "train", "tokenizer": "tokenizer.model"},
            "optim": {"lr": 0.1},
            "train": {"steps": 1, "global_batch": 1, "seq_len": 8},
        }
    )


def save_model(root: Path, config: RunConfig) -> tuple[Path, torch.nn.Module]:
    model = build_model(config.model, seed=3)
    fragments = []
    for name, p in model.named_parameters():
        shape, half = tuple(p.shape), p.numel() // 2
        for offset, part in ((half, p.reshape(-1)[half:]), (0, p.reshape(-1)[:half])):
            fragments.append(Fragment(name, "master", shape, (0,) * len(shape), shape, offset, part.detach()))
    files = FILES | {"config.toml": config.to_toml().encode()}
    return save(root, 1, fragments=fragments, files=files), model


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_loaded_to_the_bit(tmp_path: Path, tied: bool) -> None:
    config = run_config(tie_embeddings=tied, qkv_bias=True)
    folder, model = save_model(tmp_path, config)
    checkpoint = Checkpoint(folder)
    assert stored_config(checkpoint) == config
    assert stored_tokenizer(checkpoint).read_bytes() == FILES["tokenizer.model"]
    loaded = load_model(checkpoint)
    assert not loaded.training
    expected = dict(model.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(expected)
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder, _ = save_model(tmp_path, run_config())
    for other, says in [
        (run_config(mlp_width=13), r"blocks.0.mlp.gate.weight is \(12, 8\) in it and \(13, 8\) in this one"),
        (run_config(layers=3), "blocks.2.* is not there in it"),
        (run_config(layers=1), "blocks.1.* not there in this one"),
    ]:
        write_bytes(folder, "config.toml", iter([other.to_toml().encode()]))
        with pytest.raises(UserError, match=says):
            load_model(Checkpoint(folder))


# ---- what happened in processes of their own


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text()) | {"folder": folder}


def test_a_kill_at_any_moment_of_a_save_leaves_a_usable_checkpoint(seen: dict[str, Any]) -> None:
    kills: list[dict[str, Any]] = seen["kills"]
    assert len(kills) > 30 and {kill["killed"] for kill in kills[:-1]} == {True} and not kills[-1]["killed"]
    for kill in kills:
        assert kill["problem"] is None, kill
        assert kill["found"] == (2 if not kill["committed"] else 3), kill
        assert kill["half removed"] == [], kill
        assert kill["afterwards"] == ["step-3"], kill
    found = [kill["found"] for kill in kills]
    assert found == sorted(found) and set(found) == {2, 3}  # the old one up to one moment, the new one from then on


@pytest.mark.parametrize("limit", ["first file", "later file"])
def test_a_full_disk_is_an_error_and_leaves_what_was_there(seen: dict[str, Any], limit: str) -> None:
    case = seen["full disk"][limit]
    kind, message = case["error"]
    assert kind == "UserError" and message.endswith({"first file": ".safetensors", "later file": "z.bin"}[limit] + FULL)
    assert case["folders"] == ["step-1"] and case["whole"]


def test_several_ranks_save_one_checkpoint(seen: dict[str, Any]) -> None:
    """Fragments cut at random places over the ranks come back, to any number of ranks, to the bit."""
    for step in (1, 2, 3):
        checkpoint = Checkpoint(seen["folder"] / "ranks" / f"step-{step}")
        assert checkpoint.verify() is None and is_whole(checkpoint, step)
        assert {r.name for r in checkpoint.files} == {*NAMES[1:], *(f"rank-{n:05d}.safetensors" for n in range(RANKS))}
        for rank in range(RANKS):
            assert torch.equal(checkpoint.rng(rank)["cpu"], rng_of(rank, step)["cpu"])
    for rank in seen["ranks"]:
        assert rank["newest"] == 3 and rank["passed over"] == []


def test_all_ranks_see_the_damage_that_one_reads(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert rank["damaged"] == seen["ranks"][0]["damaged"]
        assert "rank-00001.safetensors does not match its checksum" in rank["damaged"]["verify"]
        assert "rank-00001.safetensors does not match its checksum" in rank["damaged"]["find"]
        assert rank["damaged"]["newest"] == 2
        assert [reason.split(": ")[0] for reason in rank["damaged"]["passed over"]] == ["step-3"]


@pytest.mark.parametrize("case", ["full disk on rank 1", "user error on rank 2", "full disk on rank 0"])
def test_a_failure_of_one_rank_is_raised_on_all_and_leaves_what_was_there(seen: dict[str, Any], case: str) -> None:
    who = case[-1]
    says = "rank 2: no moments here" if case.startswith("user error") else f"rank-0000{who}.safetensors" + FULL
    for rank in seen["ranks"]:
        assert rank[case]["error"].startswith(f"rank {who}: ") and rank[case]["error"].endswith(says)
        assert rank[case]["newest"] == 2
        assert rank[case]["folders"] == ["step-1", "step-2", "step-3"]  # 3 is the damaged one


# ---- the processes


def fork(work: Callable[[], None]) -> int:
    """Runs work in a copy of this process and gives its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def wait(pid: int) -> bool:
    """Whether the process was killed. Raises when it failed otherwise."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a worker ended with status {status}")
    return status != 0


TOUCHES = {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"}  # built-in functions that change the disk


def kill_at(moment: int) -> None:
    """Kills this process before it touches the disk for that time."""
    left = moment

    def profile(frame: FrameType, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_call" and function.__name__ in TOUCHES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def kills(folder: Path) -> list[dict[str, Any]]:
    """Saves step 3 where steps 1 and 2 are good and an earlier step 3 is damaged, killed a little later every time."""
    start = folder / "start"
    for step in (1, 2, 3):
        save(start, step, keep=9)
    damage(start / "step-3" / "state.json")
    results: list[dict[str, Any]] = []
    while not results or results[-1]["killed"]:
        root = folder / "killed"
        shutil.copytree(start, root)

        def killed(moment: int = len(results), root: Path = root) -> None:
            kill_at(moment)
            save(root, 3, keep=1)

        result: dict[str, Any] = {"moment": len(results), "killed": wait(fork(killed)), "problem": None}
        result["committed"] = (root / "step-3").exists() and Checkpoint(root / "step-3").verify() is None
        checkpoint, passed_over = newest_checkpoint(root)
        assert checkpoint is not None
        result["found"] = checkpoint.step
        if not is_whole(checkpoint, checkpoint.step):
            result["problem"] = "other content"
        result["half removed"] = [
            name for name in folders(root) if name in ("step-1", "step-2") and Checkpoint(root / name).verify()
        ]
        # What the next start does.
        remove_leftovers(root)
        save(root, 3, keep=1)
        remove_leftovers(root)
        result["afterwards"] = folders(root)
        shutil.rmtree(root)
        results.append(result)
    return results


def limit_file_size(size: int) -> None:
    """Longer files cannot be written by this process: the disk is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(folder: Path) -> dict[str, Any]:
    results = {}
    for limit, size, files in [("first file", 512, FILES), ("later file", 16384, FILES | {"z.bin": bytes(20000)})]:
        root, report = folder / f"full {limit}", folder / f"{limit}.json"
        save(root, 1)

        def fail(root: Path = root, size: int = size, files: dict[str, bytes] = files, report: Path = report) -> None:
            limit_file_size(size)
            try:
                save(root, 2, keep=1, files=files)
            except Exception as error:
                outcome = [type(error).__name__, str(error)]
            limit_file_size(resource.RLIM_INFINITY)
            report.write_text(json.dumps(outcome))

        wait(fork(fail))
        whole = is_whole(find_checkpoint(root / "step-1"), 1)
        results[limit] = {"error": json.loads(report.read_text()), "folders": folders(root), "whole": whole}
    return results


def several_ranks(folder: Path) -> list[dict[str, Any]]:
    pids = [fork(lambda rank=rank: one_of_several(folder, rank)) for rank in range(RANKS)]  # type: ignore[misc]
    for pid in pids:
        wait(pid)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def one_of_several(folder: Path, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    axis = Axis(rank, RANKS, dist.group.WORLD)
    root = folder / "ranks"
    seen: dict[str, Any] = {}
    for step in (1, 2, 3):
        save(root, step, axis=axis, keep=9)
    checkpoint, passed_over = newest_checkpoint(root, axis)
    seen |= {"newest": checkpoint and checkpoint.step, "passed over": passed_over}

    root = folder / "broken ranks"
    axis.together(lambda: shutil.copytree(folder / "ranks", root) if rank == 0 else None)
    axis.together(lambda: damage(root / "step-3" / "rank-00001.safetensors", -1) if rank == 0 else None)
    checkpoint, passed_over = newest_checkpoint(root, axis)
    seen["damaged"] = {
        "verify": Checkpoint(root / "step-3").verify(axis),
        "find": message_of(lambda: find_checkpoint(root / "step-3", axis)),
        "newest": checkpoint and checkpoint.step,
        "passed over": passed_over,
    }

    def no_moments() -> Iterator[Fragment]:
        yield cut(4, RANKS)[rank][0]
        raise UserError("no moments here")

    cases: dict[str, tuple[int, Callable[[], Any]]] = {
        "full disk on rank 1": (1, lambda: save(root, 4, axis=axis)),
        "user error on rank 2": (
            2,
            lambda: save(root, 4, axis=axis, **({"fragments": no_moments()} if rank == 2 else {})),
        ),
        "full disk on rank 0": (0, lambda: save(root, 4, axis=axis)),
    }
    for case, (who, attempt) in cases.items():
        if rank == who and case.startswith("full disk"):
            limit_file_size(512)
        error = message_of(attempt)
        limit_file_size(resource.RLIM_INFINITY)
        checkpoint, _ = newest_checkpoint(root, axis)
        seen[case] = {"error": error, "newest": checkpoint and checkpoint.step, "folders": folders(root)}
        axis.together(lambda: None)  # the next case writes here
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def message_of(attempt: Callable[[], Any]) -> str | None:
    try:
        attempt()
    except UserError as error:
        return str(error)
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as quick:
        report: dict[str, Any] = {"kills": kills(Path(quick))}
    report["full disk"] = full_disk(target)
    report["ranks"] = several_ranks(target)
    (target / "seen.json").write_text(json.dumps(report))
