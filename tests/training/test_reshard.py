"""Any layout reads any checkpoint: right after loading it is what was saved, bit for bit, and training goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megakrause.checkpoint.read import Checkpoint
from tests.training.runs import rows
from tests.training.test_layouts import Yardstick, config_here, run

pytestmark = pytest.mark.faults

__all__ = ["config_here"]  # a fixture

ZERO = [f"parallel.zero={stage}" for stage in range(4)]
TP, PP, CP = "parallel.tp=2", "parallel.pp=2", "parallel.cp=2"

LAYOUTS: dict[str, tuple[int, list[str]]] = {  # ranks, config keys
    "one": (1, []),
    **{f"dp2-zero{stage}": (2, [ZERO[stage]]) for stage in range(4)},
    "dp4-zero1": (4, [ZERO[1]]),
    "dp4-zero3": (4, [ZERO[3]]),
    "tp2-pp2": (4, [TP, PP]),
    "pp4": (4, ["parallel.pp=4"]),
    "tp2-dp2-zero3": (4, [TP, ZERO[3], "parallel.sequence_parallel=true"]),
    "cp2-dp2-zero2": (4, [CP, ZERO[2]]),
    "dp8-zero3": (8, [ZERO[3]]),
    "tp2-pp2-dp2-zero1": (8, [TP, PP, ZERO[1]]),
}
# A vocabulary that neither ranks nor ZeRO's parts divide.
MODEL = ["model.layers=4", "model.heads=8", "model.vocab_size=323", "train.global_batch=8", "log.tensorboard=false"]
TIED = {"tied": "model.tie_embeddings=true", "untied": "model.tie_embeddings=false"}

AT_ONCE = 32  # layouts in the same processes: each leaves gloo's threads behind, which wake a hundred times a second

Pair = tuple[str, str, str]  # the layout that saved, the one that loads, the model


class Resaved:
    """Checkpoints after 3 steps in one layout, and what another saved as soon as it had loaded them. All of as many
    processes in the same ones, when the first is asked for."""

    def __init__(self, folder: Path, config: Path, pairs: list[Pair]):
        self.folder, self.config, self.todo = folder, config, list(pairs)
        self.begun: set[str] = set()

    def checkpoints(self, pair: Pair) -> tuple[Checkpoint, Checkpoint]:
        source, target, model = pair
        # What more processes have saved, fewer load in a second round.
        for ranks in (1, 2, 4, 8) * 2:
            if pair in self.todo:
                self._run(ranks)
        return self._checkpoint(f"{source}-{model}"), self._checkpoint(f"{source}-{model}-to-{target}")

    def _run(self, ranks: int) -> None:
        begun = {f"{s}-{m}": [*LAYOUTS[s][1], TIED[m]] for s, _, m in self.todo if LAYOUTS[s][0] == ranks}
        runs = {name: keys for name, keys in begun.items() if name not in self.begun}
        ready = self.begun | begun.keys()
        here = [pair for pair in self.todo if LAYOUTS[pair[1]][0] == ranks and f"{pair[0]}-{pair[2]}" in ready]
        for source, target, model in here:
            resave = f"resave={self.folder}/{source}-{model}/checkpoints"
            runs[f"{source}-{model}-to-{target}"] = [*LAYOUTS[target][1], TIED[model], resave]
        layouts = [f"{name}:{';'.join([*MODEL, 'train.steps=3', *keys])}" for name, keys in runs.items()]
        for start in range(0, len(layouts), AT_ONCE):
            run(ranks, self.config, self.folder, *layouts[start : start + AT_ONCE])
        self.begun, self.todo = ready, [pair for pair in self.todo if pair not in here]

    def _checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.folder / name / "checkpoints" / "step-3")


NORMAL: list[Pair] = [  # mostly on two ranks
    ("one", "dp2-zero0", "untied"),
    ("dp2-zero3", "dp2-zero1", "untied"),
    ("dp2-zero3", "dp2-zero2", "tied"),
    ("dp2-zero1", "dp2-zero3", "untied"),
    ("tp2-pp2", "one", "tied"),
]
ALL: list[Pair] = list(itertools.product(LAYOUTS, LAYOUTS, TIED))


@pytest.fixture(scope="session")
def some_resaved(config_here: Path) -> Resaved:
    return Resaved(config_here.parent / "some", config_here, NORMAL)


@pytest.fixture(scope="session")
def all_resaved(config_here: Path) -> Resaved:
    return Resaved(config_here.parent / "all", config_here, ALL)


def assert_same_checkpoint(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.shapes == theirs.shapes
    for name, shape in theirs.shapes.items():
        assert set(ours.kinds(name)) == set(theirs.kinds(name)) == {"master", "exp_avg", "exp_avg_sq"}
        for kind in theirs.kinds(name):
            found, wanted = (c.read(name, kind, 0, torch.Size(shape).numel()) for c in (ours, theirs))
            assert wanted.any(), "nothing was trained"
            assert torch.equal(found.view(torch.int32), wanted.view(torch.int32)), (name, kind)
    assert ours.state | {"ranks": 0} == theirs.state | {"ranks": 0}
    assert ours.state["optimizer_steps"] == 3


def name_of(pair: Pair) -> str:
    source, target, model = pair
    return f"{source}-to-{target}-{model}"


@pytest.mark.parametrize("pair", NORMAL, ids=name_of)
def test_what_is_loaded_is_what_was_saved(some_resaved: Resaved, pair: Pair) -> None:
    assert_same_checkpoint(*reversed(some_resaved.checkpoints(pair)))


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the first of them runs all
@pytest.mark.parametrize("pair", ALL, ids=name_of)
def test_every_layout_loads_what_every_other_saved(all_resaved: Resaved, pair: Pair) -> None:
    assert_same_checkpoint(*reversed(all_resaved.checkpoints(pair)))


STEPS = 5  # of each part of a run
Leg = tuple[int, list[Any]]  # ranks, config keys

CHAINS: dict[str, list[Leg]] = {
    "4-1-2-8-ranks": [(4, [ZERO[3]]), (1, []), (2, [ZERO[2]]), (8, [ZERO[1]])],
    "tp-and-pp": [(4, [TP, PP]), (4, ["parallel.pp=4"]), (4, [TP, PP, ZERO[1]]), (4, ["parallel.pp=4", ZERO[1]])],
    "zero-stages": [(2, [ZERO[stage]]) for stage in (1, 3, 1, 2)],
    "micro-batches": [(1, [f"train.micro_batch={size}"]) for size in (8, 2, 1, 4)],
}


@pytest.fixture(scope="session")
def yardstick(config_here: Path) -> Yardstick:
    folder = config_here.parent / "undisturbed"
    run(1, config_here, folder, f"one:{';'.join(chain_keys(4, 'checkpoint.every=0'))};ulp")
    return Yardstick(folder, "one")


def chain_keys(legs: int, *keys: str) -> list[str]:
    """Of a run up to the end of so many parts, which does not know that it is not the end of all."""
    return [*MODEL, TIED["tied"], "optim.schedule=constant", f"train.steps={STEPS * legs}", *keys]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_from_layout_to_layout(
    config_here: Path, tmp_path: Path, yardstick: Yardstick, chain: str
) -> None:
    legs = [(ranks, f"run:{';'.join(chain_keys(n, *keys))}") for n, (ranks, keys) in enumerate(CHAINS[chain], 1)]
    for ranks, parts in itertools.groupby(legs, key=lambda leg: leg[0]):
        run(ranks, config_here, tmp_path, *(part for _, part in parts))
    found, wanted = rows(tmp_path / "run"), rows(yardstick.one)
    assert [(row["step"], row["tokens"]) for row in found] == [(row["step"], row["tokens"]) for row in wanted]
    yardstick.check(tmp_path / "run")
