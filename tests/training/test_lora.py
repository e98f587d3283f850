"""Whole runs with adapters: every layout trains the same, frozen weights stay as they are, and runs go on."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megakrause.checkpoint.model import load_model
from megakrause.checkpoint.read import find_checkpoint
from megakrause.cli import main
from tests.training.conftest import CONFIG
from tests.training.runs import KINDS, losses, start_script, state, train

LORA = """
[model.lora]
rank = 4
alpha = 8.0
dropout = 0.1
targets = ["query", "key", "value", "output", "gate", "up", "down"]
"""
DUAL = ["model.attention=dual"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a softmax model that has been trained a little, and a config that goes on with it."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "plain.toml").write_text(CONFIG.format(data=corpus, folder=folder))
    train(folder / "plain.toml", "model.attention=softmax", f"output={folder}/base")
    text = CONFIG.format(data=corpus, folder=folder) + LORA
    (folder / "config.toml").write_text(text.replace("[train]", f'[train]\ninit_from = "{folder}/base"'))
    return folder


@pytest.fixture(scope="module")
def one(base: Path) -> Path:
    printed = train(base / "config.toml", *DUAL, f"output={base}/one", "checkpoint.every=3", "checkpoint.keep=9")
    assert "% of" not in printed and "training 0.0" in printed and " M of 0.0" in printed
    return base / "one"


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(folder)
    return {name: checkpoint.weights(name) for name in checkpoint.shapes}


def is_trained(name: str) -> bool:
    return ".adapter." in name or name.endswith("log_sigma") or ".attention.gate." in name


def test_frozen_weights_are_those_of_the_base_and_have_no_moments(base: Path, one: Path) -> None:
    before, after = parameters(base / "base"), parameters(one)
    checkpoint = find_checkpoint(one)
    moved = 0
    for name, weight in after.items():
        if is_trained(name):
            assert set(checkpoint.kinds(name)) == set(KINDS)
            moved += bool(checkpoint.read(name, "exp_avg", 0, weight.numel()).any())
        else:
            assert list(checkpoint.kinds(name)) == ["master"]
            assert torch.equal(weight, before[name.replace("attention.krause.", "attention.")]), name
    assert moved == sum(map(is_trained, after))  # every trained one has a gradient


LAYOUTS = {
    "tp2-dp2-zero1": (4, ["parallel.tp=2", "parallel.zero=1"]),
    "tp2-dp2-zero2": (4, ["parallel.tp=2", "parallel.zero=2"]),
    "tp2-dp2-zero3": (4, ["parallel.tp=2", "parallel.zero=3"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2-tp2-sp": (4, ["parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true"]),
    "dp2-zero2": (2, ["parallel.zero=2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_and_another_goes_on(base: Path, one: Path, name: str) -> None:
    ranks, layout = LAYOUTS[name]
    config, out = base / "config.toml", base / name
    run(
        config, *DUAL, *layout, f"output={out}", "train.steps=6", "checkpoint.every=3", "checkpoint.keep=9", ranks=ranks
    )
    assert losses(out) == pytest.approx(losses(one), rel=2e-5)
    before, after = parameters(one), parameters(out)
    for key, weight in after.items():
        if not is_trained(key):
            assert torch.equal(weight, before[key]), key
    shutil.rmtree(out / "checkpoints" / "step-6")
    train(config, *DUAL, f"output={out}", "train.steps=6")
    assert losses(out) == pytest.approx(losses(one), rel=2e-5)


def test_a_resumed_run_is_bitwise_the_undisturbed_one(base: Path, one: Path) -> None:
    expected = state(one)
    run(base / "config.toml", *DUAL, f"output={base}/resumed", "checkpoint.every=3", "checkpoint.keep=9", ranks=1)
    shutil.rmtree(base / "resumed" / "checkpoints" / "step-6")
    train(base / "config.toml", *DUAL, f"output={base}/resumed")
    found = state(base / "resumed")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_in_bf16_frozen_weights_are_kept_as_they_are(base: Path, zero: int) -> None:
    """Rounded once, and written in two bytes each."""
    out = base / f"bf16-{zero}"
    run(base / "config.toml", *DUAL, f"output={out}", "train.precision=bf16", f"parallel.zero={zero}", ranks=2)
    checkpoint = find_checkpoint(out)
    before = parameters(base / "base")
    for name in checkpoint.shapes:
        if not is_trained(name):
            source = before[name.replace("attention.krause.", "attention.")]
            assert torch.equal(checkpoint.weights(name), source.bfloat16().float()), name
    assert all(map(math.isfinite, losses(out)))


def test_another_precision_would_round_what_is_frozen_and_is_refused(
    base: Path, one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(one)
    arguments = ["train", str(base / "config.toml"), *DUAL, f"output={one}", "train.steps=9", "train.precision=bf16"]
    assert main(arguments) == 1
    assert "was trained with train.precision = fp32, now it is bf16" in capsys.readouterr().err
    after = state(one)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@torch.no_grad()
def test_what_reads_the_checkpoint_sees_the_merged_model(base: Path, one: Path) -> None:
    model = load_model(find_checkpoint(one))
    assert model.config.lora is None and not any(".adapter." in name for name, _ in model.named_parameters())
    assert main(["evaluate", str(one)]) == 0
    assert main(["generate", str(one), "--prompt", "def", "--max-new-tokens", "5"]) == 0
    assert main(["verify", str(one)]) == 0
    # Another run without adapters goes on from the merged weights.
    plain = base / "plain.toml"
    still = ["train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0"]
    run(plain, *DUAL, *still, f"train.init_from={one}", f"output={base}/merged", "parallel.tp=2", ranks=2)
    merged = parameters(base / "merged")
    for name, param in model.named_parameters():
        assert torch.equal(param, merged[name]), name


def run(config: Path, *arguments: Any, ranks: int) -> None:
    process = start_script(config, *arguments, ranks=ranks)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
