"""Resume equals never having stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.runs import kill_when, losses, rows, start, state, train


@pytest.fixture
def undisturbed(config: Path, tmp_path: Path) -> Path:
    output = tmp_path / "undisturbed"
    train(config, "train.steps=40", f"output={output}")
    return output


def test_killed_and_resumed_run_is_bitwise_the_undisturbed_one(config: Path, tmp_path: Path, undisturbed: Path) -> None:
    killed = tmp_path / "killed"
    arguments = (config, "train.steps=40", "checkpoint.every=20", "train.eval_every=10", f"output={killed}")
    kill_when(start(*arguments), killed / "checkpoints" / "step-20")
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 23, "loss": 1.0}\n{"step": 24, "lo')  # what a kill some steps later leaves
    printed = train(*arguments)
    assert "resuming from" in printed and "step-20" in printed

    assert [row["step"] for row in rows(killed)] == list(range(1, 41))
    assert losses(killed) == losses(undisturbed)
    assert [row["tokens"] for row in rows(killed)] == [row["tokens"] for row in rows(undisturbed)]
    ours, theirs = state(killed), state(undisturbed)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    evaluated = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").open() if "eval_loss" in line]
    assert evaluated == [10, 20, 30, 40]

    # The saved config restarts the run by itself, and there is nothing left to do.
    assert "already at step 40" in train(killed / "config.toml")
    assert losses(killed) == losses(undisturbed)


def test_run_killed_before_its_first_checkpoint_starts_again_and_says_so(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    kill_when(start(config, "train.steps=100000"), output / "metrics.jsonl")
    assert "starting again" in train(config)
    assert [row["step"] for row in rows(output)] == list(range(1, 7))
