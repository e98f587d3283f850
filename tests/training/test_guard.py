"""Steps that go wrong: skipped, gone back from, or the end; never in the weights or the statistics."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from megakrause.checkpoint.read import Checkpoint
from megakrause.config import GuardConfig
from megakrause.training.guard import Guard, Verdict
from tests.training.runs import losses, rows, start_script, state, train

pytestmark = pytest.mark.faults

NAN = math.nan

# The losses of one rank's training steps in BAD (counted over the process's life, from 1) are not finite.
POISON = """
from megakrause.training import engine
real_step, real_sum, calls = engine.Engine.train_step, engine.Engine._loss_sum, []
def train_step(self, batch, lr):
    calls.append(1)
    return real_step(self, batch, lr)
def loss_sum(self, *given):
    bad = self._module.training and os.environ.get("RANK", "0") == "{rank}" and len(calls) in {bad}
    return real_sum(self, *given) * (float("nan") if bad else 1)
engine.Engine.train_step, engine.Engine._loss_sum = train_step, loss_sum
"""
# The loss that the steps in BAD report is high.
SPIKE = """
import dataclasses
from megakrause.training import engine
real_step, calls = engine.Engine.train_step, []
def train_step(self, batch, lr):
    calls.append(int(batch.tokens.sum()))
    result = real_step(self, batch, lr)
    return dataclasses.replace(result, loss=100.0) if {bad} else result
engine.Engine.train_step = train_step
"""


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == status, printed
    return printed


# ---- the rules alone


def test_so_many_in_a_row_lead_back() -> None:
    guard = Guard(GuardConfig(skips=3))
    cases = [(2.0, True), (NAN, False), (2.0, False), (2.0, True), (NAN, False), (math.inf, True), (2.0, False)]
    assert [guard.judge(*case) for case in cases] == [Verdict.GO_ON] * 6 + [Verdict.ROLL_BACK]
    assert guard.allowed(Verdict.ROLL_BACK, 40) is Verdict.ROLL_BACK
    assert guard.allowed(Verdict.ROLL_BACK, 40) is Verdict.STOP  # it has not helped
    assert guard.allowed(Verdict.ROLL_BACK, 60) is Verdict.ROLL_BACK
    assert guard.allowed(Verdict.ROLL_BACK, None) is Verdict.STOP


def test_a_spike_is_told_from_noise_and_never_enters_the_statistics() -> None:
    guard = Guard(GuardConfig(spike=6, window=32))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert guard.judge(3 + 0.1 * float(torch.randn((), generator=generator)), True) is Verdict.GO_ON
    before = guard.state
    assert len(before["losses"]) == 32
    for loss in (NAN, math.inf, -math.inf, 5.0, 1e9):
        guard.judge(loss, math.isfinite(loss))
    assert guard.state == before
    assert guard.judge(5.0, True) is Verdict.ROLL_BACK_AND_SKIP and "5" in guard.reason
    assert guard.judge(0.1, True) is Verdict.GO_ON  # better is no spike
    again = Guard(GuardConfig(spike=6, window=32))
    again.go_back(json.loads(json.dumps(before)))
    assert again.state == before and again.judge(5.0, True) is Verdict.ROLL_BACK_AND_SKIP


def test_there_are_no_spikes_unless_asked_for_or_before_there_is_a_mean() -> None:
    never, early = Guard(GuardConfig()), Guard(GuardConfig(spike=3, window=32))
    assert all(never.judge(loss, True) is Verdict.GO_ON for loss in [1.0] * 300 + [1e9])
    assert all(early.judge(loss, True) is Verdict.GO_ON for loss in [1.0] * 15 + [1e9])


# ---- whole runs


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (["parallel.zero=0"], 2),
        pytest.param(["parallel.zero=2", "train.precision=bf16"], 2, marks=pytest.mark.slow),
        pytest.param(["parallel.zero=3"], 2, marks=pytest.mark.slow),
        pytest.param(["parallel.tp=2"], 2, marks=pytest.mark.slow),
        pytest.param(["parallel.pp=2", "parallel.zero=1"], 2, marks=pytest.mark.slow),
        pytest.param(["parallel.zero=0"], 1, marks=pytest.mark.slow),
    ],
)
def test_nan_on_one_rank_is_skipped_by_all(config: Path, tmp_path: Path, overrides: list[str], ranks: int) -> None:
    """In the very first step, and later."""
    output = tmp_path / "run"
    poison = POISON.format(rank=ranks - 1, bad={1, 4})
    printed = finish(
        start_script(config, *overrides, "checkpoint.every=1", "checkpoint.keep=9", ranks=ranks, prelude=poison)
    )
    assert printed.count("skipped, a gradient is not finite") == 2 and "step 4: skipped" in printed
    skipped = [bool(row.get("skipped")) for row in rows(output)]
    assert skipped == [True, False, False, True, False, False]
    assert "NaN" not in (output / "metrics.jsonl").read_text()
    folders = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert folders == ["step-2", "step-3", "step-5", "step-6"]  # of good steps only
    steps = [Checkpoint(output / "checkpoints" / name).state["optimizer_steps"] for name in folders]
    assert steps == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in state(output).values())


def test_a_fault_that_passes_is_gone_back_from_and_leaves_no_trace(config: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=10", "checkpoint.every=4", "guard.skips=3")
    printed = finish(start_script(config, *overrides, prelude=POISON.format(rank=0, bad={6, 7, 8})))
    assert "3 steps in a row had a loss or gradient that is not finite" in printed and "step-4" in printed
    undisturbed = tmp_path / "undisturbed"
    train(config, *overrides, f"output={undisturbed}")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 11))
    assert losses(tmp_path / "run") == losses(undisturbed)
    ours, theirs = state(tmp_path / "run"), state(undisturbed)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fault_that_stays_ends_the_run_and_the_checkpoint_is_good(config: Path, tmp_path: Path, ranks: int) -> None:
    overrides = ("train.steps=40", "checkpoint.every=4", "guard.skips=3")
    bad = set(range(6, 100))
    printed = finish(start_script(config, *overrides, ranks=ranks, prelude=POISON.format(rank=0, bad=bad)), 1)
    assert printed.count("error: step 7: 3 steps in a row had a loss or gradient that is not finite, and going") == 1
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "step-4" and Checkpoint(folder).verify() is None
    assert all(tensor.isfinite().all() for tensor in state(tmp_path / "run").values())


@pytest.mark.slow
def test_without_a_checkpoint_a_fault_that_stays_ends_the_run(config: Path) -> None:
    printed = finish(start_script(config, "guard.skips=3", prelude=POISON.format(rank=0, bad={1, 2, 3, 4, 5, 6})), 1)
    assert "not finite, and there is no checkpoint to go back to" in printed


@pytest.mark.parametrize(
    ("overrides", "ranks"), [([], 1), pytest.param(["checkpoint.asynchronous=true"], 2, marks=pytest.mark.slow)]
)
def test_the_data_of_a_spike_is_left_out_and_what_follows_follows(
    config: Path, tmp_path: Path, overrides: list[str], ranks: int
) -> None:
    """As in a run that was given the data without it; also when it is killed and started again."""
    output = tmp_path / "run"
    common = (
        "train.steps=20",
        "checkpoint.every=4",
        "guard.spike=8",
        "guard.window=8",
        "checkpoint.keep=9",
        *overrides,
    )
    # The batch of step 11, whenever it comes.
    spike = SPIKE.format(bad="len(calls) == 11")
    printed = finish(start_script(config, *common, ranks=ranks, prelude=spike))
    assert "a loss of 100 after" in printed and "the data of sequences 32 to 43 is left out" in printed
    assert [row["step"] for row in rows(output)] == list(range(1, 21))
    last = Checkpoint(output / "checkpoints" / "step-20").state
    assert last["position"] == 20 * 4 + 3 * 4 and [8, 44, 4] in last["batches"]
    assert 100.0 not in last["guard"]["losses"]

    # From a checkpoint after it, and with the whole of its state, the same comes again.
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "step-12").rename(again / "checkpoints" / "step-12")
    finish(start_script(config, *common, f"output={again}", ranks=ranks))
    assert losses(again) == losses(output)[12:]
    ours, theirs = state(again), state(output)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_spike_that_comes_again_and_again_ends_the_run(config: Path) -> None:
    common = ("train.steps=40", "checkpoint.every=8", "guard.spike=8", "guard.window=8", "guard.rollbacks=2")
    printed = finish(start_script(config, *common, prelude=SPIKE.format(bad="len(calls) > 10")), 1)
    assert printed.count("is left out") == 2 and "is a spike, and going back has not helped" in printed


def test_a_run_that_is_stopped_in_a_spike_does_not_save_it(config: Path, tmp_path: Path) -> None:
    """Neither the spike nor, when it goes on, its data."""
    output = tmp_path / "run"
    common = ("train.steps=20", "checkpoint.every=4", "guard.spike=8", "guard.window=8", "checkpoint.keep=9")
    spike = SPIKE.format(bad="len(calls) == 11 and not os.kill(os.getpid(), 15)")
    printed = finish(start_script(config, *common, prelude=spike), 75)
    assert "stopped: SIGTERM received; step 11 is not saved, for a loss of 100 after" in printed
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-4", "step-8"]
    assert "resuming from" in finish(start_script(config, *common))


def test_steps_that_were_skipped_are_counted_on_after_a_resume() -> None:
    guard, again = (Guard(GuardConfig(skips=3)) for _ in range(2))
    assert [guard.judge(NAN, False) for _ in range(2)] == [Verdict.GO_ON] * 2
    again.go_back(guard.state)
    assert again.judge(NAN, False) is Verdict.ROLL_BACK
    again.go_back({})
    assert again.judge(NAN, False) is Verdict.GO_ON
