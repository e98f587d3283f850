"""Checkpoints that someone made to do harm, with checksums that match: nothing in them is run, no memory is filled, and
what is wrong is one line that names the file.

All is tried in processes that may use little more memory than they have, so that a crash would be seen."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megakrause.checkpoint.files import TensorFile, check_file, write_bytes
from megakrause.checkpoint.model import load_model, stored_config, stored_tokenizer
from megakrause.checkpoint.place import Place, open_folder
from megakrause.checkpoint.read import Checkpoint, find_checkpoint, newest_checkpoint
from megakrause.errors import UserError
from tests.checkpoint.processes import Nursery, run_alone
from tests.checkpoint.states import NAMES, SHAPES, is_whole, replace_file, save

pytestmark = pytest.mark.faults

ROOM = 256 << 20  # bytes that a reader may allocate at most
RANK = "rank-00000.safetensors"
DEEP = 100_000  # levels


# ---- what reads a checkpoint


def readers(root: Path) -> dict[str, Callable[[], Any]]:
    folder = root / "step-1"
    return {
        "newest": lambda: newest_checkpoint(Place.of(root)),
        "find": lambda: find_checkpoint(folder),
        "verify": lambda: Checkpoint(folder).verify(),
        "step": lambda: Checkpoint(folder).step,
        "shapes": lambda: Checkpoint(folder).shapes,
        "weights": lambda: [Checkpoint(folder).weights(name) for name in SHAPES],
        "read": lambda: Checkpoint(folder).read("a.bias", "exp_avg", 1, 3),
        "rng": lambda: Checkpoint(folder).rng(0),
        "tensors": lambda: [(file := TensorFile(open_folder(folder), RANK)), *map(file.tensor, file)],
        "config": lambda: stored_config(Checkpoint(folder)),
        "tokenizer": lambda: stored_tokenizer(Checkpoint(folder)),
        "model": lambda: load_model(Checkpoint(folder)),
    }


Outcomes = dict[str, tuple[str, str] | None]  # by reader: kind and text of what was raised


def try_all(root: Path, only: tuple[str, ...] = ()) -> Outcomes:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    outcomes: Outcomes = {}
    for name, read in readers(root).items():
        if only and name not in only:
            continue
        try:
            read()
            outcomes[name] = None
        except BaseException as error:
            outcomes[name] = type(error).__name__, str(error)[:500]
    return outcomes


def judge(outcomes: Outcomes, file: str, refused_by: set[str]) -> None:
    """All that is raised is for people, and names the file; those who have to refuse it do."""
    others = {name: outcome for name, outcome in outcomes.items() if outcome and outcome[0] != "UserError"}
    assert not others, others
    accepted = {name for name in refused_by if outcomes[name] is None}
    assert not accepted, f"{accepted} take it"
    for name in refused_by:
        assert file in (outcomes[name] or ("", ""))[1], (name, outcomes[name])


# ---- pickles


class Command:
    """What a malicious pickle does when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trusted", [False, True], ids=["pickle", "pickle with its checksum"])
def test_no_pickle_is_ever_run(
    nursery: Nursery, root: Path, tmp_path: Path, name: str, trusted: bool, protocol: int
) -> None:
    marker = tmp_path / "run"
    pickled = pickle.dumps(Command(marker), protocol)
    if trusted and name != "COMMIT.json":
        replace_file(root / "step-1", name, pickled)
    else:
        (root / "step-1" / name).write_bytes(pickled)
        with pytest.raises(UserError, match=name):
            find_checkpoint(root / "step-1")
    outcomes = nursery.call(run_alone, try_all, root)
    assert not marker.exists()
    refused_by = {"COMMIT.json": {"find", "verify", "weights"}, "state.json": {"find", "verify", "step"}}
    refused_by |= {RANK: {"shapes", "weights", "read", "rng", "tensors"}, "config.toml": {"config", "model"}}
    refused_by |= {"tokenizer.model": {"tokenizer"}}
    judge(outcomes, "step-1" if name in ("config.toml", "tokenizer.model") else name, refused_by[name])
    pickle.loads(pickled)
    assert marker.exists()  # so it would have been seen


# ---- headers of tensor files


def tensor_file(header: object, content: bytes = bytes(256), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def one_tensor(**changes: object) -> bytes:
    """A header with one tensor of 5 floats, changed."""
    entry = {"dtype": "F32", "shape": [5], "data_offsets": [0, 20], **changes}
    return with_tensors({"rng/cpu": {key: value for key, value in entry.items() if value is not None}})


def with_tensors(tensors: dict[str, Any]) -> bytes:
    """And an index of no fragments, so that it is for its tensors that the file is refused."""
    return tensor_file({"__metadata__": {"fragments": "[]"}, **tensors})


def nested(levels: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * levels + closing * levels).encode()


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "7 bytes": bytes(7),
    "no header": bytes(8),
    "a header as long as can be": tensor_file({}, length=2**64 - 1),
    "a header of 2^63 bytes": tensor_file({}, length=2**63),
    "a header of a terabyte": tensor_file({}, length=2**40),
    "a header longer than the file": tensor_file({}, b"", length=3),
    "no JSON": tensor_file(b"what?   "),
    "no UTF-8": tensor_file(b'{"\xff\xfe": 1}'),
    "half": tensor_file(b'{"a": {"dtype": "F32", "shape": [1], "data'),
    "a list": tensor_file([]),
    "a number": tensor_file(5),
    "null": tensor_file(None),
    "a text": tensor_file("header"),
    "deep lists": tensor_file(nested(DEEP)),
    "deep objects": tensor_file(nested(DEEP, '{"a":', "}").replace(b":}", b":0}")),
    "a deep shape": tensor_file(b'{"a": {"dtype": "F32", "data_offsets": [0, 4], "shape": ' + nested(DEEP) + b"}}"),
    "a number of a million digits": tensor_file(b'{"a": ' + b"1" * 10**6 + b"}"),
    "an entry that is a number": tensor_file({"a": 1}),
    "an entry that is a list": tensor_file({"a": ["F32", [1], [0, 4]]}),
    "no dtype": one_tensor(dtype=None),
    "no shape": one_tensor(shape=None),
    "no offsets": one_tensor(data_offsets=None),
    "an unknown dtype": one_tensor(dtype="F4096"),
    "a dtype that is a number": one_tensor(dtype=32),
    "a dtype that is a list": one_tensor(dtype=["F32"]),
    "a wider dtype": one_tensor(dtype="F64"),
    "a narrower dtype": one_tensor(dtype="U8"),
    "a shape that does not match": one_tensor(shape=[6]),
    "a shape of 2^62": one_tensor(shape=[2**62]),
    "a shape whose product wraps around": one_tensor(shape=[2**32, 2**32, 5]),
    "a shape below zero": one_tensor(shape=[-5]),
    "a shape twice below zero": one_tensor(shape=[-1, -5]),
    "a shape of fractions": one_tensor(shape=[2.5, 2]),
    "a shape of a text": one_tensor(shape="5"),
    "a shape of texts": one_tensor(shape=["5"]),
    "a shape that is no list": one_tensor(shape=5),
    "an infinite shape": tensor_file(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 20]}}'),
    "a shape that is not a number": tensor_file(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 20]}}'),
    "nothing of a size that cannot be": one_tensor(shape=[0, 2**63], data_offsets=[0, 0]),
    "nothing of huge sizes": one_tensor(shape=[0, 2**40, 2**40], data_offsets=[0, 0]),
    "offsets below zero": one_tensor(data_offsets=[-20, 0]),
    "offsets into the header": one_tensor(data_offsets=[-8, 12]),
    "offsets the wrong way round": one_tensor(data_offsets=[20, 0]),
    "offsets beyond the file": one_tensor(data_offsets=[256, 276]),
    "offsets far beyond the file": one_tensor(data_offsets=[2**70, 2**70 + 20]),
    "offsets to the end and one on": one_tensor(data_offsets=[237, 257]),
    "one offset": one_tensor(data_offsets=[20]),
    "three offsets": one_tensor(data_offsets=[0, 20, 40]),
    "offsets that are texts": one_tensor(data_offsets=["0", "20"]),
    "offsets that are fractions": one_tensor(data_offsets=[0.0, 20.0]),
    "offsets that are an object": one_tensor(data_offsets={"0": 0, "20": 20}),
    "offsets that overlap": with_tensors(
        {
            "rng/cpu": {"dtype": "U8", "shape": [20], "data_offsets": [0, 20]},
            "rng/b": {"dtype": "U8", "shape": [20], "data_offsets": [10, 30]},
        }
    ),
    "one place for two": with_tensors(
        {f"rng/{name}": {"dtype": "U8", "shape": [20], "data_offsets": [0, 20]} for name in ("cpu", "cuda")}
    ),
}


HARMLESS = {"a shape of a text", "a shape of texts", "nothing of huge sizes"}  # may be taken


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_hostile_headers_are_refused(nursery: Nursery, root: Path, header: str) -> None:
    replace_file(root / "step-1", RANK, HEADERS[header])
    refused_by = set() if header in HARMLESS else {"shapes", "weights", "read", "rng", "tensors"}
    judge(nursery.call(run_alone, try_all, root), RANK, refused_by)


@pytest.mark.parametrize("size", [1 << 30, (1 << 30) + 1, 100_000_001])
def test_a_huge_header_in_a_huge_file_is_refused(nursery: Nursery, root: Path, size: int) -> None:
    """A sparse file takes no room and no time to make."""
    path = root / "step-1" / RANK
    path.write_bytes(size.to_bytes(8, "little"))
    os.truncate(path, 1 << 32)
    few = ("shapes", "rng", "tensors")  # which do not read everything
    judge(nursery.call(run_alone, try_all, root, few), RANK, set(few))


# ---- the index of fragments


def index_of(root: Path) -> list[dict[str, Any]]:
    return json.loads(TensorFile(open_folder(root / "step-1"), RANK).metadata["fragments"])


def with_index(root: Path, index: object) -> None:
    """Another index in the same file."""
    path = root / "step-1" / RANK
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = index if isinstance(index, dict | list | int) else {"fragments": index}
    replace_file(root / "step-1", RANK, tensor_file(header, content[8 + length :]))


METADATA: dict[str, object] = {
    "no index": {},
    "metadata that is a list": ["fragments"],
    "metadata that is a number": 5,
    "an index that is no JSON": "what?",
    "an index that is a number": "5",
    "an index that is an object": "{}",
    "an index that is null": "null",
    "an index of numbers": "[1, 2]",
    "an index of lists": "[[]]",
    "an index of empty objects": "[{}]",
    "a deep index": nested(DEEP).decode(),
}


@pytest.mark.parametrize("case", METADATA, ids=str)
def test_an_index_that_is_none_is_refused(nursery: Nursery, root: Path, case: str) -> None:
    with_index(root, METADATA[case])
    refused = {"shapes", "weights", "read"}
    if case == "an index that is an object":  # as empty as an empty list
        refused = {"weights", "read"}
        outcomes = nursery.call(run_alone, try_all, root)
        judge(outcomes, "step-1", refused)
    else:
        judge(nursery.call(run_alone, try_all, root), RANK, refused)


ENTRIES: dict[str, dict[str, Any]] = {
    "a key that is not there": {"key": "master/nothing@0"},
    "a key that is a number": {"key": 5},
    "a key that is a list": {"key": []},
    "a name that is a list": {"name": ["a.bias"]},
    "a name that is a number": {"name": 5},
    "a kind that is an object": {"kind": {}},
    "a shape that is a number": {"shape": 5},
    "a shape that is a text": {"shape": "5"},
    "a shape of texts": {"shape": ["5"]},
    "a shape of fractions": {"shape": [5.0]},
    "a shape below zero": {"shape": [-5], "box": [-5]},
    "another number of dims": {"shape": [5, 1]},
    "a box that is larger than the whole": {"box": [6]},
    "a box below zero": {"box": [-1]},
    "a corner below zero": {"start": [-1]},
    "a corner beyond the whole": {"start": [5]},
    "an offset below zero": {"offset": -5},
    "an offset beyond the box": {"offset": 5},
    "an offset that is a text": {"offset": "0"},
    "an offset that is a fraction": {"offset": 0.5},
    "a number below zero": {"numel": -5},
    "more elements than the tensor has": {"numel": 6},
    "more elements than there could be": {"numel": 2**62},
    "a number that is a text": {"numel": "5"},
    "a number that is null": {"numel": None},
    "a parameter of a terabyte": {"shape": [2**38], "box": [2**38]},
    "a parameter of 2^80 elements": {"shape": [2**80], "box": [2**80]},
}


# May be taken: what is wrong in them plays no part in what is read.
HARMLESS_ENTRIES = {
    "a shape of fractions",
    "a box that is larger than the whole",
    "more elements than the tensor has",
    "more elements than there could be",
}


@pytest.mark.parametrize("case", ENTRIES, ids=str)
def test_hostile_entries_of_the_index_are_refused(nursery: Nursery, root: Path, case: str) -> None:
    index = index_of(root)
    whole = next(entry for entry in index if (entry["name"], entry["kind"]) == ("a.bias", "master"))
    rest = [entry for entry in index if (entry["name"], entry["kind"]) != ("a.bias", "master")]
    entry = whole | {"offset": 0} | ENTRIES[case]
    with_index(root, json.dumps([entry, *rest]))
    outcomes = nursery.call(run_alone, try_all, root)
    judge(outcomes, "step-1", set() if case in HARMLESS_ENTRIES else {"weights"})


# ---- the commit and the small files


def record(**changes: object) -> dict[str, object]:
    return {"name": "extra.bin", "size": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f", **changes}


COMMITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda commit: [commit],
    "a number": lambda commit: 5,
    "null": lambda commit: None,
    "deep lists": lambda commit: nested(DEEP),
    "a number of a million digits": lambda commit: b'{"format": ' + b"1" * 10**6 + b"}",
    "no format": lambda commit: {"files": commit["files"]},
    "a format that is a list": lambda commit: commit | {"format": [1]},
    "no files": lambda commit: {"format": 1},
    "files that are a number": lambda commit: commit | {"files": 5},
    "files that are null": lambda commit: commit | {"files": None},
    "a record that is a text": lambda commit: commit | {"files": ["state.json"]},
    "a record that is empty": lambda commit: commit | {"files": [{}]},
    "a record with more in it": lambda commit: commit | {"files": [record(path="/etc")]},
    "a name that is a number": lambda commit: commit | {"files": [*commit["files"], record(name=5)]},
    "a name that is null": lambda commit: commit | {"files": [*commit["files"], record(name=None)]},
    "a name that is a list": lambda commit: commit | {"files": [*commit["files"], record(name=["x"])]},
    "a name with a zero byte": lambda commit: commit | {"files": [*commit["files"], record(name="a\0b")]},
    "a name with a lone surrogate": lambda commit: commit | {"files": [*commit["files"], record(name="\ud800")]},
    "an empty name": lambda commit: commit | {"files": [*commit["files"], record(name="")]},
    "the folder itself": lambda commit: commit | {"files": [*commit["files"], record(name=".")]},
    "a name of a million letters": lambda commit: commit | {"files": [*commit["files"], record(name="x" * 10**6)]},
    "a size below zero": lambda commit: commit | {"files": [*commit["files"], record(size=-1)]},
    "a size that is a text": lambda commit: commit | {"files": [*commit["files"], record(size="0")]},
    "a size of 2^62": lambda commit: commit | {"files": [*commit["files"], record(size=2**62)]},
    "a checksum that is a number": lambda commit: commit | {"files": [*commit["files"], record(xxh3_128=5)]},
}


@pytest.mark.parametrize("case", COMMITS, ids=str)
def test_hostile_commits_are_refused(nursery: Nursery, root: Path, case: str) -> None:
    (root / "step-1" / "extra.bin").touch()
    path = root / "step-1" / "COMMIT.json"
    commit = COMMITS[case](json.loads(path.read_text()))
    path.write_bytes(commit if isinstance(commit, bytes) else json.dumps(commit).encode())
    judge(nursery.call(run_alone, try_all, root), "step-1", {"find", "newest"})


@pytest.mark.parametrize("name", ["../outside.bin", "below/inside.bin", "{root}/outside.bin", "../step-1/state.json"])
def test_names_that_lead_elsewhere_are_refused(nursery: Nursery, root: Path, name: str) -> None:
    """What a commit names is copied, as a tokenizer into exports."""
    name = name.format(root=root)
    (root / "outside.bin").touch()
    (root / "step-1" / "below").mkdir()
    (root / "step-1" / "below" / "inside.bin").touch()
    path = root / "step-1" / "COMMIT.json"
    commit = json.loads(path.read_text())
    target = root / "step-1" / name
    made = write_bytes(root, "copy", iter([target.read_bytes()]))
    commit["files"].append(made.to_json() | {"name": name})
    path.write_text(json.dumps(commit))
    assert check_file(open_folder(root / "step-1"), replace(made, name=name)) is None  # its checksum matches
    judge(nursery.call(run_alone, try_all, root), "step-1", {"find", "tokenizer"})


SMALL: dict[str, tuple[str, bytes, set[str]]] = {
    "a state that is a list": ("state.json", b"[]", {"step"}),
    "a state that is null": ("state.json", b"null", {"step"}),
    "a state without a step": ("state.json", b"{}", {"step"}),
    "a step that is a text": ("state.json", b'{"step": "1"}', {"step"}),
    "a deep state": ("state.json", nested(DEEP), {"find", "step"}),
    "a state with a deep value": ("state.json", b'{"step": 1, "a": ' + nested(DEEP) + b"}", {"find", "step"}),
    "a config that is no TOML": ("config.toml", b"[[[", {"config", "model"}),
    "a config of another program": ("config.toml", b"a = 1\n", {"config", "model"}),
    "a deep config": ("config.toml", b"a = " + nested(DEEP), {"config", "model"}),
    "a config that is no UTF-8": ("config.toml", b"a = '\xff'", {"config", "model"}),
    "a tokenizer that is empty": ("tokenizer.model", b"", {"tokenizer"}),
    "a tokenizer that is none": ("tokenizer.model", bytes(range(256)), {"tokenizer"}),
}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hostile_small_files_are_refused(nursery: Nursery, root: Path, case: str) -> None:
    name, content, refused_by = SMALL[case]
    replace_file(root / "step-1", name, content)
    judge(nursery.call(run_alone, try_all, root), "step-1", refused_by)


@pytest.mark.parametrize("name", ["COMMIT.json", "state.json", "config.toml"])
def test_small_files_that_are_huge_are_refused(nursery: Nursery, root: Path, name: str) -> None:
    os.truncate(root / "step-1" / name, 1 << 36)  # sparse
    judge(nursery.call(run_alone, try_all, root), name, {"find", "newest"})


def test_what_is_no_file_is_refused(nursery: Nursery, root: Path) -> None:
    """A pipe would hold its reader up for ever."""
    for name in NAMES:
        damaged = root / "step-2"
        shutil.copytree(root / "step-1", damaged)
        (damaged / name).unlink()
        os.mkfifo(damaged / name)
        assert nursery.call(run_alone, newest_step, root) == 1
        shutil.rmtree(damaged)


def newest_step(root: Path) -> int:
    signal.alarm(20)
    checkpoint, _ = newest_checkpoint(Place.of(root))
    assert checkpoint is not None
    return checkpoint.step


def test_what_the_others_are_changed_from_is_taken(nursery: Nursery, root: Path) -> None:
    """So that they are refused for what was changed."""
    outcomes = nursery.call(run_alone, try_all, root)
    assert {name for name, outcome in outcomes.items() if outcome} == {"config", "tokenizer", "model"}  # which are none
    with_index(root, json.dumps(index_of(root)))
    assert is_whole(find_checkpoint(root / "step-1"), 1)
    save(root, 1)
    replace_file(root / "step-1", RANK, one_tensor())
    outcomes = nursery.call(run_alone, try_all, root)
    assert outcomes["rng"] is None and outcomes["tensors"] is None and outcomes["shapes"] is None
