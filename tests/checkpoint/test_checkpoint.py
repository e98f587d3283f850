"""Checkpoints: what is saved is read back to the bit, damage is noticed, and nothing loses the last good one.

Whatever can lie at a URL is tested there, too."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megakrause.checkpoint.files import FileRecord, TensorFile, check_file, tensor_chunks, write_bytes
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.model import load_model, stored_config, stored_tokenizer
from megakrause.checkpoint.place import Place, open_folder
from megakrause.checkpoint.read import Checkpoint, find_checkpoint, find_place, newest_checkpoint
from megakrause.config import RunConfig
from megakrause.config.file import parse_config
from megakrause.data.tokenizer import Tokenizer, train_tokenizer
from megakrause.errors import UserError
from megakrause.models.build import build_model
from tests.checkpoint.states import (
    FILES,
    KINDS,
    NAMES,
    SHAPES,
    Home,
    contents,
    cut,
    damage,
    folders,
    is_whole,
    rng_of,
    same_bits,
    save,
    value,
)
from tests.disks import needs_root

pytestmark = pytest.mark.faults

# ---- what is saved is read


def test_everything_is_read_back_to_the_bit(home: Home) -> None:
    for step in range(2, 8):
        path = save(home.name, step, last=9)
        assert path == home.step(step)
        checkpoint = Checkpoint(path)
        assert checkpoint.path == path
        assert checkpoint.verify() is None
        assert is_whole(checkpoint, step)
        assert {k: v.tolist() for k, v in checkpoint.rng(0).items()} == {"cpu": rng_of(0, step)["cpu"].tolist()}
        assert checkpoint.rng(1) == {}
        for name, shape in SHAPES.items():
            assert checkpoint.weights(name).shape == shape
            assert same_bits(checkpoint.weights(name).reshape(-1), value(name, "master", step))
    assert home.place().steps() == [7, 6, 5, 4, 3, 2, 1]


def test_a_url_gets_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "here", 3)
    save(f"file://{tmp_path}/there", 3)
    assert folders(tmp_path / "here" / "step-3") == sorted(NAMES)
    assert contents(tmp_path / "here" / "step-3") == contents(tmp_path / "there" / "step-3")


@pytest.fixture(scope="module", params=["", "file://"], ids=["folder", "url"])
def read_only(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint(save(f"{request.param}{tmp_path_factory.mktemp('read')}", 3))


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


def test_small_files_that_are_not_there_are_named(read_only: Checkpoint) -> None:
    assert read_only.content("config.toml") == FILES["config.toml"]
    with pytest.raises(UserError, match="cannot read .*/step-3/other.bin: No such file or directory"):
        read_only.content("other.bin")


def test_a_missing_fragment_is_noticed(home: Home) -> None:
    fragments = cut(5, 1)[0]
    left_out = fragments.pop(4)
    checkpoint = home.save(5, fragments=fragments)
    with pytest.raises(UserError, match=f"elements of {left_out.kind} of {left_out.name}"):
        checkpoint.read(left_out.name, left_out.kind, 0, math.prod(left_out.shape))


def test_one_fragment_twice_does_not_stand_for_a_missing_one(home: Home) -> None:
    whole = value("a.weight", "master", 5)
    halves = [
        Fragment("a.weight", "master", (7, 5), (0, 0), (7, 5), offset, whole[offset : offset + 15])
        for offset in (0, 5, 20)  # elements 5 to 14 twice, and none from 20 on but 15 of them
    ]
    checkpoint = home.save(5, fragments=halves)
    with pytest.raises(UserError, match="holds elements of master of a.weight twice"):
        checkpoint.read("a.weight", "master", 0, 35)  # 45 in all: too many
    checkpoint = home.save(6, fragments=[*halves[:2], Fragment(*(vars(halves[2]) | {"tensor": whole[20:25]}).values())])
    with pytest.raises(UserError, match="holds elements of master of a.weight twice"):
        checkpoint.read("a.weight", "master", 0, 35)  # 35 in all, and 25 to 34 are nowhere


def test_an_index_that_could_not_be_read_stays_unread(root: Path) -> None:
    second = cut(1, 1)[0][:1]
    folder = root / "step-1"
    record = write_bytes(folder, "rank-00001.safetensors", tensor_chunks({"x": second[0].tensor}, {"fragments": "?"}))
    commit = json.loads((folder / "COMMIT.json").read_text())
    commit["files"].append(record.to_json())
    (folder / "COMMIT.json").write_text(json.dumps(commit))
    checkpoint = Checkpoint(folder)
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError, match="rank-00001.safetensors"):
            _ = checkpoint.shapes


def tensors_of_all_kinds() -> dict[str, Tensor]:
    return {
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


def bytes_of(x: Tensor) -> list[int]:
    return x.detach().reshape(-1).contiguous().view(torch.uint8).tolist()


def test_tensor_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    record = write_bytes(tmp_path, "x.safetensors", tensor_chunks(tensors, {"note": 'ünd "more"'}))
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert bytes_of(found[name]) == bytes_of(tensor)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"note": 'ünd "more"'}
    assert record.size == (tmp_path / "x.safetensors").stat().st_size
    assert check_file(open_folder(tmp_path), record) is None


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_tensor_files_of_the_safetensors_library_are_read(tmp_path: Path, scheme: str) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of_all_kinds().items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"note": 'ünd "more"'})
    file = TensorFile(open_folder(f"{scheme}{tmp_path}"), "x.safetensors")
    assert set(file) == set(tensors) and file.metadata == {"note": 'ünd "more"'}
    for name, tensor in tensors.items():
        found = file.tensor(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and bytes_of(found) == bytes_of(tensor)
        for start in range(tensor.numel()):
            part = torch.empty(tensor.numel() - start, dtype=tensor.dtype)
            file.read_into(name, start, part)
            assert bytes_of(part) == bytes_of(tensor.reshape(-1)[start:])
            with pytest.raises(UserError, match=f"elements {start + 1} to {tensor.numel() + 1} of .* are not in it"):
                file.read_into(name, start + 1, part)


def test_checkpoints_open_with_the_safetensors_library(root: Path) -> None:
    found = safetensors.torch.load_file(root / "step-1" / "rank-00000.safetensors")
    for fragment in cut(1, 1)[0]:
        assert same_bits(found.pop(f"{fragment.kind}/{fragment.name}@{fragment.offset}"), fragment.tensor)
    assert set(found) == {"rng/cpu"}


# ---- what a path names


def test_a_checkpoint_is_found_by_its_folder_by_its_run_and_by_all_their_folder(home: Home) -> None:
    save(home.name, 10, last=9)
    save(home.name, 9, last=9)
    assert find_checkpoint(home.step(9)).step == 9
    assert find_checkpoint(home.step(9) + "/").step == 9
    assert find_checkpoint(home.name).step == 10  # by number, not by name
    run = home.name.removesuffix("/checkpoints")
    assert find_place(run).steps() == [10, 9, 1]
    assert find_checkpoint(run).step == 10
    with pytest.raises(UserError, match="neither a checkpoint nor the folder of a run"):
        find_checkpoint(f"{run}/nowhere")
    with pytest.raises(UserError, match="step-7 is not a checkpoint: COMMIT.json is missing"):
        find_checkpoint(home.step(7))


def test_a_file_of_a_checkpoint_is_none(root: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor the folder of a run"):
        find_checkpoint(root / "step-1" / "COMMIT.json")


def test_a_run_says_where_its_checkpoints_are(home: Home, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(f'[checkpoint]\nfolder = "{home.name}"\n')
    assert is_whole(find_checkpoint(run), 1)
    (run / "config.toml").write_text("[checkpoint]\n")
    save(run / "checkpoints", 5)
    assert is_whole(find_checkpoint(str(run)), 5)
    (run / "config.toml").write_text("[checkpoint\n")
    with pytest.raises(UserError, match="cannot read .*config.toml"):
        find_checkpoint(run)


def test_a_step_without_its_commit_is_not_taken_for_a_run(home: Home) -> None:
    """Its config.toml, which names the folder of all, does not make it one: who names step 2 does not get step 3."""
    config = f'[checkpoint]\nfolder = "{home.name}"\n'.encode()
    for step in (2, 3):
        save(home.name, step, last=9, files=FILES | {"config.toml": config})
    (home.root / "step-2" / "COMMIT.json").unlink()
    with pytest.raises(UserError, match="step-2"):
        find_checkpoint(home.step(2))


def test_unknown_kinds_of_urls_are_refused() -> None:
    with pytest.raises(UserError, match="cannot use nonsense://a/b"):
        Place.of("nonsense://a/b")


# ---- damage


def positions(size: int) -> list[int]:
    """Both ends, the middle and some in between."""
    return sorted({0, 1, 7, 8, size // 2, size - 2, size - 1, *range(0, size, max(1, size // 12))} & {*range(size)})


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_noticed_and_its_file_named(home: Home, name: str) -> None:
    path = home.root / "step-1" / name
    whole = path.read_bytes()
    for at in positions(len(whole)):
        path.write_bytes(whole)
        damage(path, at)
        with pytest.raises(UserError) as raised:
            find_checkpoint(home.step(1))
        # A flipped digit of a checksum in COMMIT.json looks like damage to the file that it is of.
        assert name == "COMMIT.json" or name in str(raised.value), at
        with pytest.raises(UserError, match="none of the 1 checkpoints"):
            newest_checkpoint(home.place())
    path.write_bytes(whole)
    assert is_whole(find_checkpoint(home.step(1)), 1)


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
def test_every_broken_file_is_noticed_and_named(home: Home, name: str, kind: str) -> None:
    save(home.name, 2)
    path = home.root / "step-2" / name
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
    without_commit = name == "COMMIT.json" and kind == "missing"  # at a URL, that is no checkpoint's folder at all
    checkpoint, passed_over = newest_checkpoint(home.place())
    assert is_whole(checkpoint, 1)  # the older one
    if not (home.scheme and name == "COMMIT.json" and kind in ("missing", "a folder")):
        assert list(passed_over) == [2] and name in passed_over[2]
    if not without_commit:
        with pytest.raises(UserError, match=name):
            find_checkpoint(home.step(2))


def test_when_none_is_usable_all_reasons_are_given(home: Home) -> None:
    save(home.name, 2)
    damage(home.root / "step-1" / "tokenizer.model")
    (home.root / "step-2" / "state.json").unlink()
    with pytest.raises(UserError) as raised:
        newest_checkpoint(home.place())
    message = str(raised.value)
    assert message.startswith(f"none of the 2 checkpoints in {home.name} is usable")
    assert "step-2: " in message and "state.json is missing" in message
    assert "step-1: " in message and "tokenizer.model does not match its checksum" in message


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_when_nothing_was_ever_committed_there_is_none(tmp_path: Path, scheme: str) -> None:
    assert newest_checkpoint(Place.of(f"{scheme}{tmp_path}/nowhere")) == (None, {})
    (tmp_path / "step-3.tmp").mkdir()
    (tmp_path / "step-3.tmp" / "COMMIT.json").touch()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-x" / "COMMIT.json").touch()
    (tmp_path / "other").touch()
    assert newest_checkpoint(Place.of(f"{scheme}{tmp_path}")) == (None, {})


def test_a_later_format_is_refused(home: Home) -> None:
    path = home.root / "step-1" / "COMMIT.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2; this version reads format 1"):
        Checkpoint(home.step(1))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_larger_than_one_read_are_checked_to_their_end(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megakrause.checkpoint.files.CHUNK", 64)
    content, name = bytes(range(200)), f"{scheme}{tmp_path}"
    record = write_bytes(tmp_path, "x", iter([content[:50], content[50:], b""]))
    assert record == FileRecord("x", 200, record.xxh3_128) and (tmp_path / "x").read_bytes() == content
    assert check_file(open_folder(name), record) is None
    for at in (0, 63, 64, 199):
        (tmp_path / "x").write_bytes(content)
        damage(tmp_path / "x", at)
        assert check_file(open_folder(name), record) == f"{name}/x does not match its checksum"


# ---- what is left behind


def test_a_step_can_be_saved_again_and_again(home: Home) -> None:
    for tokens in (3, 4, 5):
        damage(home.root / "step-1" / "rank-00000.safetensors")
        save(home.name, 1, state={"tokens": tokens})
        assert find_checkpoint(home.step(1)).state["tokens"] == tokens
        assert set(folders(home.root / "step-1")) == set(NAMES)
    assert folders(home.root) == ["step-1"]


def test_leftovers_are_removed_and_nothing_else(root: Path) -> None:
    for name in ("step-2.tmp", "step-1.old.tmp", "step-3.bad.tmp"):
        shutil.copytree(root / "step-1", root / name)
    (root / "notes.txt").touch()
    checkpoint, passed_over = newest_checkpoint(Place.of(root))
    assert checkpoint is not None and checkpoint.step == 1 and passed_over == {}
    Place.of(root).clean()
    assert folders(root) == ["notes.txt", "step-1"]
    Place.of(root / "nowhere").clean()


def test_what_a_killed_save_left_is_not_mixed_into_the_next(home: Home) -> None:
    left = home.root / ("step-2" if home.scheme else "step-2.tmp")
    shutil.copytree(home.root / "step-1", left)
    (left / "COMMIT.json").unlink()
    (left / "rank-00007.safetensors").touch()
    save(home.name, 2)
    assert set(folders(home.root / "step-2")) == set(NAMES)
    assert folders(home.root) == ["step-1", "step-2"]


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


def test_the_name_of_a_new_folder_of_checkpoints_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, flushed = os.fsync, []

    def recorded_fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    save(tmp_path / "checkpoints", 1)
    assert flushed[0] == str(tmp_path) and flushed[-1] == str(tmp_path / "checkpoints")


def test_a_run_that_was_removed_is_not_made_anew(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    Place.of(run / "checkpoints").clean()  # at the beginning, it is
    assert folders(run) == []
    save(run / "checkpoints", 1)
    shutil.rmtree(run)
    with pytest.raises(UserError, match="/runs/x/checkpoints: No such file or directory"):
        save(run / "checkpoints", 2)
    assert not run.exists()


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
            save(root, 2, last=1)
        assert folders(root) == ["step-1"]
        assert is_whole(find_checkpoint(root.parent), 1)
    left = flushes + 1
    save(root, 2, last=1)
    assert is_whole(find_checkpoint(root.parent), 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="/checkpoints.*: Not a directory"):
        save(tmp_path / "checkpoints", 1)
    with pytest.raises(UserError, match="file://.*/checkpoints/step-1.*Not a directory"):
        save(f"file://{tmp_path}/checkpoints", 1)
    with pytest.raises(UserError, match="/checkpoints.*: Not a directory"):
        save(tmp_path / "checkpoints" / "below", 1)
    assert folders(tmp_path) == ["checkpoints"]


def test_other_errors_clean_up_too(home: Home) -> None:
    def fragments() -> Iterator[Fragment]:
        yield cut(2, 1)[0][0]
        raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        save(home.name, 2, fragments=fragments())
    assert folders(home.root) == ["step-1"]


# ---- a model from a checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["def value(x):\n    return x if x else 0\n", "for index in range(9):\n    print(index, name)\n"] * 20
    return train_tokenizer(texts, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


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


def save_model(root: str, config: RunConfig, files: dict[str, bytes]) -> tuple[str, torch.nn.Module]:
    model = build_model(config.model, seed=3)
    fragments = []
    for name, p in model.named_parameters():
        shape, half = tuple(p.shape), p.numel() // 2
        for offset, part in ((half, p.reshape(-1)[half:]), (0, p.reshape(-1)[:half])):
            fragments.append(Fragment(name, "master", shape, (0,) * len(shape), shape, offset, part.detach()))
    files = {"config.toml": config.to_toml().encode(), **files}
    return save(root, 2, fragments=fragments, files=files), model


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_loaded_to_the_bit(home: Home, tied: bool, tokenizer: Tokenizer) -> None:
    config = run_config(tie_embeddings=tied, qkv_bias=True)
    folder, model = save_model(home.name, config, tokenizer.files)
    checkpoint = Checkpoint(folder)
    assert stored_config(checkpoint) == config
    stored = stored_tokenizer(checkpoint)
    assert stored.files == tokenizer.files and stored.fingerprint == tokenizer.fingerprint
    assert stored.path == folder and stored.encode("return index") == tokenizer.encode("return index")
    loaded = load_model(checkpoint)
    assert not loaded.training
    expected = dict(model.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(expected)
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("files", [{}, {"tokenizer.model": b"?"}, {"tokenizer.json": b"?"}, {"other.bin": b"?"}])
def test_a_checkpoint_without_a_tokenizer_says_so(home: Home, files: dict[str, bytes]) -> None:
    checkpoint = home.save(2, files={"config.toml": b""} | files)
    with pytest.raises(UserError, match="step-2"):
        stored_tokenizer(checkpoint)


def test_a_checkpoint_of_another_model_is_refused(root: Path) -> None:
    folder, _ = save_model(str(root), run_config(), {})
    for other, says in [
        (run_config(mlp_width=13), r"blocks.0.mlp.gate.weight is \(12, 8\) in it and \(13, 8\) in this one"),
        (run_config(layers=3), "blocks.2.* is not there in it"),
        (run_config(layers=1), "blocks.1.* not there in this one"),
    ]:
        write_bytes(Path(folder), "config.toml", iter([other.to_toml().encode()]))
        with pytest.raises(UserError, match=says):
            load_model(Checkpoint(folder))


@needs_root
@pytest.mark.parametrize("trouble", ["no more open files", "no rights to the folder", "no rights to a file"])
def test_what_cannot_be_read_now_is_neither_passed_over_nor_missing(tmp_path: Path, trouble: str) -> None:
    """In a process of its own, which is really so."""
    home = Home(tmp_path / "checkpoints", "")
    for step in (1, 2):
        save(home.name, step)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o711)
    match trouble:
        case "no more open files":
            before = "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')), 4096))"
        case "no rights to the folder":
            home.root.chmod(0o711)
            before = "os.setuid(65534)"
        case _:
            (home.root / "step-2" / "state.json").chmod(0o600)
            before = "os.setuid(65534)"
    code = f"""
import os, resource, sys
from megakrause.checkpoint.read import Place, newest_checkpoint
{before}
print("found", newest_checkpoint(Place.of(sys.argv[1])))
"""
    ended = subprocess.run([sys.executable, "-c", code, home.name], capture_output=True, text=True)
    assert "cannot read" in ended.stderr and "it may be whole, so nothing older is used" in ended.stderr, ended
    assert "found" not in ended.stdout


def test_many_ranks_need_few_open_files(tmp_path: Path) -> None:
    save_files = {f"rank-{rank:05d}.safetensors": b"" for rank in range(300)}
    folder = tmp_path / "step-1"
    folder.mkdir()
    for name in save_files:
        write_bytes(folder, name, iter([name.encode()]))
    opened = open_folder(folder)
    for _ in range(2):
        assert all(opened.read(name) == name.encode() for name in save_files)
    assert len(os.listdir("/proc/self/fd")) < 200
