"""Any layout gives the losses, gradient norms and weights of one process."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import pairwise
from tests.training.conftest import CONFIG
from tests.training.layouts import MOVED
from tests.training.runs import rows, state

SCRIPT = Path(__file__).with_name("layouts.py")

SETTINGS: dict[str, list[Any]] = {
    "dp": [1, 2],
    "tp": [1, 2, 4],
    "cp": [1, 2, 4],
    "pp": [1, 2, 4],
    "zero": [0, 1, 2, 3],
    "sequence_parallel": [False, True],
    "micro_batch": [1, 2, 4],  # sequences of 8 / dp
    "attention": ["krause", "softmax", "mixed"],
    "tied": [False, True],
    "recompute": ["none", "selective", "full"],
    "offload": [False, True],
}
KINDS = {
    "krause": ["krause"] * 4,
    "softmax": ["softmax"] * 4,
    "mixed": ["krause", "softmax_window", "softmax", "krause"],
}


def ranks(case: dict[str, Any]) -> int:
    return math.prod(case[axis] for axis in ("dp", "tp", "cp", "pp"))


def is_legal(case: dict[str, Any]) -> bool:
    return (
        ranks(case) <= 8
        and not (case["pp"] > 1 and case["zero"] > 1)
        and not (case["tp"] == 1 and case["sequence_parallel"])
        and not (case["zero"] == 0 and case["offload"])
    )


PLAIN: dict[str, Any] = {name: values[0] for name, values in SETTINGS.items()}
CHOSEN = [
    *({"dp": 2, "zero": zero} for zero in range(4)),
    {"tp": 2, "dp": 2, "zero": 3, "sequence_parallel": True},
    {"tp": 2, "pp": 2, "tied": True, "attention": "mixed", "micro_batch": 2},
    {"cp": 2, "pp": 2, "zero": 1, "attention": "mixed"},
    {"cp": 4, "attention": "mixed", "tied": True},
    {"pp": 2, "dp": 2, "tp": 2, "tied": True, "zero": 1},
    {"dp": 2, "cp": 2, "tp": 2, "zero": 2, "sequence_parallel": True},
    # The largest sizes of two axes together take 16 ranks.
    {"tp": 4, "cp": 4, "zero": 3},
    {"tp": 4, "pp": 4, "zero": 1, "tied": True, "sequence_parallel": True},
    {"cp": 4, "pp": 4, "attention": "mixed"},
]
CASES = [PLAIN | case for case in CHOSEN] + pairwise(SETTINGS, legal=is_legal)


def variant(case: dict[str, Any]) -> tuple[str, list[str]]:
    """The model that a case trains: its name, and config keys. Half of them clip."""
    attention, tied = case["attention"], case["tied"]
    kinds = str(KINDS[attention]).replace("'", '"')
    keys = ["model.layers=4", "model.heads=8", f"model.attention={kinds}", f"model.tie_embeddings={str(tied).lower()}"]
    keys += [f"optim.clip={0.5 if tied == (attention == 'softmax') else 0.0}", "train.steps=3", "train.global_batch=8"]
    return f"{attention}-{'tied' if tied else 'untied'}", keys


def settings(case: dict[str, Any], precision: str) -> str:
    """NAME:key=value;... for `layouts.py`."""
    names = ("tp", "cp", "pp", "zero", "sequence_parallel", "recompute", "offload")
    keys = [*variant(case)[1], *(f"parallel.{name}={str(case[name]).lower()}" for name in names)]
    return f"{name_of(case)}:" + ";".join(
        [*keys, f"train.micro_batch={case['micro_batch']}", f"train.precision={precision}"]
    )


def name_of(case: dict[str, Any]) -> str:
    """What is not plain in it."""
    return "-".join(f"{name}{value}" for name, value in case.items() if value != PLAIN[name])


def run(processes: int, *arguments: object) -> None:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


def curve(output: Path, key: str) -> Tensor:
    return torch.tensor([row[key] for row in rows(output)], dtype=torch.float64)


def weights(output: Path) -> dict[str, Tensor]:
    return {name: tensor for (name, kind), tensor in state(output).items() if kind == "master"}


class Yardstick:
    """Twice what changes when the initial weights move by one unit in the last place: of a curve, up to each step; of
    each parameter."""

    def __init__(self, folder: Path, name: str):
        self.one, self.moved = folder / name, [folder / f"{name}-{kind}" for kind in MOVED]
        self.weights = weights(self.one)
        moved = [weights(output) for output in self.moved]
        self.weight_bounds = {
            name: 2 * max(float((m[name] - w).abs().max()) for m in moved) for name, w in self.weights.items()
        }

    def bounds(self, key: str) -> Tensor:
        one = curve(self.one, key)
        changes = torch.stack([(curve(output, key) - one).abs() for output in self.moved])
        # A loss is a sum in float32, which may not show so small a move.
        return 2 * changes.amax(0).cummax(0).values + torch.finfo(torch.float32).eps * one

    def check(self, output: Path) -> None:
        for key in ("loss", "grad_norm"):
            bounds, one = self.bounds(key), curve(self.one, key)
            assert (bounds < 0.1 * one).all(), "the yardstick itself is broken"
            change = (curve(output, key) - one).abs()
            assert (change <= bounds).all(), (output.name, key, change, bounds)
        found = weights(output)
        assert found.keys() == self.weights.keys()
        for name, weight in found.items():
            change = float((weight - self.weights[name]).abs().max())
            assert change <= self.weight_bounds[name], (output.name, name, change, self.weight_bounds[name])


class Runs:
    """All runs of as many processes, one after the other in the same ones, when the first of them is asked for."""

    def __init__(self, folder: Path, config: Path, precision: str, cases: list[dict[str, Any]]):
        self.folder, self.config, self.precision, self.cases = folder, config, precision, cases
        self.yardsticks: dict[str, Yardstick] = {}
        self.done: set[int] = set()

    def check(self, case: dict[str, Any]) -> None:
        name, keys = variant(case)
        if name not in self.yardsticks:
            run(1, self.config, self.folder, f"{name}:" + ";".join([*keys, f"train.precision={self.precision}", "ulp"]))
            self.yardsticks[name] = Yardstick(self.folder, name)
        processes = ranks(case)
        if processes not in self.done:
            self.done.add(processes)
            here = [settings(c, self.precision) for c in self.cases if ranks(c) == processes]
            run(processes, self.config, self.folder, *here)
        self.yardsticks[name].check(self.folder / name_of(case))


@pytest.fixture(scope="session")
def config_here(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "config.toml"
    path.write_text(CONFIG.format(data=corpus, folder=path.parent))
    return path


@pytest.fixture(scope="session")
def runs(config_here: Path, request: pytest.FixtureRequest) -> Runs:
    return Runs(config_here.parent / "fp32", config_here, "fp32", chosen(request, "test_a_layout_equals_one_process"))


def chosen(request: pytest.FixtureRequest, test: str) -> list[dict[str, Any]]:
    """The cases of a test that are checked this time: no others are trained."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    return [item.callspec.params["case"] for item in items if item.originalname == test]


def is_quick(case: dict[str, Any]) -> bool:
    return ranks(case) <= 2 or (ranks(case) == 4 and case["zero"] < 2 and not case["offload"])


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name_of(c), marks=() if is_quick(c) else pytest.mark.slow) for c in CASES]
)
def test_a_layout_equals_one_process(runs: Runs, case: dict[str, Any]) -> None:
    runs.check(case)


HALF = [
    PLAIN | case
    for case in (
        *({"dp": 2, "zero": zero} for zero in range(4)),
        {"tp": 2, "dp": 2, "zero": 3, "sequence_parallel": True},
        {"tp": 2, "pp": 2, "zero": 1, "tied": True, "micro_batch": 2},
        {"cp": 2, "dp": 2, "zero": 2, "recompute": "full", "attention": "mixed"},
        *({"dp": 2, "zero": zero, "offload": True} for zero in (1, 2, 3)),
        {"pp": 2, "zero": 1, "offload": True},
        {"pp": 2, "zero": 1, "tied": True},
        {"cp": 2, "zero": 3, "recompute": "selective", "tied": True},
    )
]


@pytest.fixture(scope="session")
def half_runs(config_here: Path, request: pytest.FixtureRequest) -> Runs:
    test = "test_bfloat16_in_a_layout_equals_one_process_by_its_own_last_place"
    return Runs(config_here.parent / "bf16", config_here, "bf16", chosen(request, test))


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF, ids=name_of)
def test_bfloat16_in_a_layout_equals_one_process_by_its_own_last_place(half_runs: Runs, case: dict[str, Any]) -> None:
    half_runs.check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"dp": 2, "zero": 3}, {"tp": 2, "pp": 2, "tied": True, "attention": "mixed", "micro_batch": 2}],
)
def test_what_one_layout_begins_another_goes_on_with(runs: Runs, tmp_path: Path, layout: dict[str, Any]) -> None:
    case = PLAIN | layout
    runs.check(case)
    name, keys = variant(case)
    yardstick = runs.yardsticks[name]
    # Begun in the layout, ended by one process; and the other way round.
    for begun, ended, processes in [
        (runs.folder / name_of(case), f"down:{';'.join(keys)}", 1),
        (yardstick.one, settings(case, "fp32").replace(name_of(case), "up", 1), ranks(case)),
    ]:
        output = tmp_path / ended.split(":")[0]
        shutil.copytree(begun, output)
        shutil.rmtree(output / "checkpoints" / "step-3")
        run(processes, runs.config, tmp_path, ended)
        assert [row["step"] for row in rows(output)] == [1, 2, 3]
        yardstick.check(output)
