"""Training state leaves a DeepSpeed engine and enters another one without losing a bit, whatever their layouts.

Engines need real processes and start slowly, so this file runs itself once for each number of ranks, and those workers
go through all cases and write down what they saw; the tests only judge it.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakrause.errors import UserError

CASES = [(stage, "fp32") for stage in range(4)] + [(stage, "bf16") for stage in range(1, 4)]
WORLDS = (2, 1)  # in this order: the cross-layout cases read what two ranks saved
SOURCE = (2, (1, "fp32"))  # the layout that all others read
SAVED_AT, TRAINED_TO = 3, 5
Case = tuple[int, str]


class Model(nn.Module):
    """Sizes so awkward that partitions cut parameters in the middle and need padding; tied and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.again = nn.Linear(7, 5, bias=False)
        self.again.weight = self.first.weight
        self.second = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.rand(1))
        self.shift = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * self.scale + torch.tanh(self.again(x.flip(-1))) + self.shift
        return self.second(hidden).float().pow(2).mean()


WEIGHTS = {"first.weight": (5, 7), "second.weight": (3, 5)}
SHAPES = WEIGHTS | {"first.bias": (5,), "second.bias": (3,), "scale": (1,), "shift": (5,)}
KINDS = {name: ("master",) if name == "shift" else ("master", "exp_avg", "exp_avg_sq") for name in SHAPES}


# ---- the workers


def work(folder: Path, rank: int, world: int, port: int) -> None:
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    from megakrause.training.engine_state import adam_step, fragments, load_fragments, load_weights

    # Spares a build of 50 s, of an op for inference only; killed halfway it would leave a lock that hangs all others.
    deepspeed.ops.__compatible_ops__ = {}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo")

    def build(case: Case, seed: int) -> Any:
        stage, precision = case
        torch.manual_seed(seed)
        model = Model()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": precision != "fp32"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        }
        if precision == "bf16":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        optimizer = torch.optim.AdamW(groups, lr=0.05, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine

    def train(engine: Any, first: int, end: int) -> list[float]:
        losses = []
        for step in range(first, end):
            for micro in range(2):
                noise = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
                x = torch.randn(4, 7, generator=noise)
                loss = engine(x.bfloat16() if engine.bfloat16_enabled() else x)
                engine.backward(loss)
                losses.append(loss.item())
                engine.step()
        return losses

    def record(what: str, engine: Any, case: Case, losses: list[float]) -> None:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=case[0] == 3):
            live = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        torch.save(
            {
                "fragments": [vars(fragment) | {"tensor": fragment.tensor.clone()} for fragment in fragments(engine)],
                "step": adam_step(engine),
                "live": live,
                "losses": losses,
            },
            path(folder, what, world, case, rank),
        )
        dist.barrier()

    def reader(what: str, saved_world: int, case: Case) -> Callable[..., Tensor]:
        whole = assemble(load(folder, what, saved_world, case))
        return lambda name, kind, offset, numel, box, out: whole[name, kind][offset : offset + numel].float()

    for case in CASES:
        engine = build(case, seed=1)
        record("fresh", engine, case, [])
        losses = train(engine, 0, SAVED_AT)
        record("saved", engine, case, losses)
        losses = train(engine, SAVED_AT, TRAINED_TO)
        record("undisturbed", engine, case, losses)

        engine = build(case, seed=2)
        load_fragments(engine, reader("fresh", world, case), step=0)
        losses = train(engine, 0, SAVED_AT)
        record("restarted", engine, case, losses)

        engine = build(case, seed=3)
        load_weights(engine, reader("saved", world, case))
        record("weights", engine, case, [])
        train(engine, 0, 1)  # of which nothing must survive the load
        load_fragments(engine, reader("saved", world, case), step=SAVED_AT)
        record("loaded", engine, case, [])
        losses = train(engine, SAVED_AT, TRAINED_TO)
        record("resumed", engine, case, losses)

    for case in CASES:
        engine = build(case, seed=4)
        load_fragments(engine, reader("saved", *SOURCE), step=SAVED_AT)
        record("crossed", engine, case, [])

    with pytest.raises(ValueError) as refused:
        load_weights(engine, lambda name, kind, offset, numel, box, out: torch.zeros(numel + 1))
    (folder / f"refused-world{world}-rank{rank}").write_text(str(refused.value))
    dist.destroy_process_group()


def path(folder: Path, what: str, world: int, case: Case, rank: int) -> Path:
    return folder / f"{what}-world{world}-zero{case[0]}-{case[1]}-rank{rank}.pt"


def load(folder: Path, what: str, world: int, case: Case) -> list[dict[str, Any]]:
    """Return what each rank recorded."""
    return [torch.load(path(folder, what, world, case, rank), weights_only=True) for rank in range(world)]


def assemble(records: list[dict[str, Any]]) -> dict[tuple[str, str], Tensor]:
    """Join the ranks' fragments into whole flat tensors, and assert that they tile them."""

    def key(fragment: dict[str, Any]) -> tuple[str, str]:
        return fragment["name"], fragment["kind"]

    whole = {}
    everything = sorted((f for record in records for f in record["fragments"]), key=lambda f: (*key(f), f["offset"]))
    for name_kind, pieces in groupby(everything, key):
        parts: list[Tensor] = []
        for piece in pieces:
            assert piece["offset"] == sum(part.numel() for part in parts), f"{name_kind}: a gap or an overlap"
            parts.append(piece["tensor"])
        whole[name_kind] = torch.cat(parts)
    return whole


# ---- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engine_state")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    for world in WORLDS:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(world):
            command = [sys.executable, __file__, *map(str, (folder, rank, world, port))]
            rank_environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            with (folder / f"world{world}-rank{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=rank_environment, stdout=log, stderr=log))
        try:
            codes = [process.wait(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = "\n".join((folder / f"world{world}-rank{rank}.log").read_text()[-3000:] for rank in range(world))
        assert codes == [0] * world, logs
    yield folder


each_layout = pytest.mark.parametrize("world", sorted(WORLDS))
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")


def assert_same(found: dict[tuple[str, str], Tensor], wanted: dict[tuple[str, str], Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@each_layout
@each_case
def test_fragments_tile_every_parameter_exactly_once(folder: Path, case: Case, world: int) -> None:
    for what in ("fresh", "saved"):
        records = load(folder, what, world, case)
        found = {(name, kind): tensor.shape for (name, kind), tensor in assemble(records).items()}
        wanted = {(name, kind): (torch.Size(SHAPES[name]).numel(),) for name in SHAPES for kind in KINDS[name]}
        assert found == wanted
        for fragment in (f for record in records for f in record["fragments"]):
            assert fragment["shape"] == fragment["box"] == SHAPES[fragment["name"]]
            assert fragment["start"] == (0,) * len(fragment["shape"])
            frozen = KINDS[fragment["name"]] == ("master",) and case[1] != "fp32"  # in the engine's precision
            assert fragment["tensor"].dtype == (torch.bfloat16 if frozen else torch.float32)
            assert fragment["tensor"].is_contiguous()


@each_layout
@each_case
def test_every_rank_hands_out_its_share(folder: Path, case: Case, world: int) -> None:
    shares = [sum(f["tensor"].numel() for f in record["fragments"]) for record in load(folder, "saved", world, case)]
    assert max(shares) - min(shares) < 0.2 * sum(shares)


@each_layout
@each_case
def test_resumed_run_is_bitwise_the_undisturbed_one(folder: Path, case: Case, world: int) -> None:
    undisturbed, resumed = load(folder, "undisturbed", world, case), load(folder, "resumed", world, case)
    for one, other in zip(undisturbed, resumed, strict=True):
        assert one["losses"] == other["losses"]
        assert one["step"] == other["step"] == TRAINED_TO
    assert_same(assemble(resumed), assemble(undisturbed))


@each_layout
@each_case
def test_state_taken_before_the_first_step_restarts_bitwise(folder: Path, case: Case, world: int) -> None:
    fresh, saved, restarted = (load(folder, what, world, case) for what in ("fresh", "saved", "restarted"))
    assert all(not tensor.any() for (_, kind), tensor in assemble(fresh).items() if kind != "master")
    assert [record["step"] for record in fresh] == [0] * world
    assert [record["losses"] for record in restarted] == [record["losses"] for record in saved]
    assert_same(assemble(restarted), assemble(saved))


@each_layout
@each_case
def test_load_weights_leaves_adam_fresh(folder: Path, case: Case, world: int) -> None:
    weights, saved = load(folder, "weights", world, case), load(folder, "saved", world, case)
    wanted = {key: value if key[1] == "master" else torch.zeros_like(value) for key, value in assemble(saved).items()}
    assert_same(assemble(weights), wanted)
    assert [record["step"] for record in weights] == [0] * world


@each_layout
@each_case
@pytest.mark.parametrize("what", ["fresh", "weights", "loaded", "resumed", "crossed"])
def test_live_parameters_follow_the_masters_on_every_rank(folder: Path, case: Case, world: int, what: str) -> None:
    records = load(folder, what, world, case)
    masters = assemble(records)
    for record in records:
        for name, live in record["live"].items():
            assert live.dtype == (torch.float32 if case[1] == "fp32" else torch.bfloat16)
            assert torch.equal(live, masters[name, "master"].view(SHAPES[name]).to(live.dtype)), name


@each_layout
@each_case
def test_any_layout_reads_the_state_of_another_bitwise(folder: Path, case: Case, world: int) -> None:
    crossed = load(folder, "crossed", world, case)
    wanted = assemble(load(folder, "saved", *SOURCE))
    if case[1] != "fp32":  # a frozen parameter has no master: it lives in the engine's precision
        wanted["shift", "master"] = wanted["shift", "master"].bfloat16().float()
    assert_same(assemble(crossed), wanted)
    assert [record["step"] for record in crossed] == [SAVED_AT] * world


@each_layout
def test_what_does_not_fit_is_refused_with_name_and_sizes(folder: Path, world: int) -> None:
    for rank in range(world):
        text = (folder / f"refused-world{world}-rank{rank}").read_text()
        assert re.fullmatch(r"[\w.]+ \(master\): \d+ elements of float32 wanted, \(\d+,\) of torch.float32 read", text)


def test_a_deepspeed_without_a_needed_attribute_is_named() -> None:
    from megakrause.training.engine_state import _internal

    with pytest.raises(UserError, match=r"object\._hp_mapping is missing from DeepSpeed .* was written for DeepSpeed"):
        _internal(object(), "_hp_mapping")


if __name__ == "__main__":
    work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
