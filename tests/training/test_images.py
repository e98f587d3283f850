"""Whole runs of a vision transformer and an image model: every layout trains the same, and runs go on."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megakrause.cli import main
from megakrause.data.prepare_images import prepare_images
from megakrause.training.drawing import SCALE
from tests.training.runs import losses, rows, start_script, state, train

COMMON = """
output = "{folder}/run"
[data]
train = "{folder}/train"
valid = "{folder}/valid"
workers = 1
[optim]
lr = 1e-2
warmup = 2
eps = 1e-3
clip = 0
[train]
steps = 6
global_batch = 8
[checkpoint]
every = 3
keep = 9
[log]
every = 2
samples = {samples}
[model]
layers = 2
width = 32
heads = 4
mlp_width = 48
dropout = 0.1
image_size = 6
channels = 1
"""
KINDS = {
    "vit": """kind = "vit"
patch_size = 2
classes = 3
top_k = 3
drop_path = 0.3
norm_placement = "post"
[augment]
crop = "pad"
padding = 1
mixup = 0.8
label_smoothing = 0.1
""",
    "image": """kind = "image"
window = 9
top_k = 5
""",
    "swin": """kind = "swin"
patch_size = 1
classes = 3
depths = [1, 1]
window = 3
drop_path = 0.3
""",
}
NOT_SHARED = ("tp", "pp")  # which a swin is
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "zero3-dp2": (2, ["parallel.zero=3"]),
    "tp2-pp2-sp": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "zero1-tp2-dp2": (4, ["parallel.tp=2", "parallel.zero=1", "train.micro_batch=2"]),
}
NORMAL = [("vit", "dp2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With corpora and the config of each kind."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in {"train": 50, "valid": 13}.items():
        labels = np.arange(count) % 3
        images = (random.integers(0, 60, (count, 6, 6)) + 60 * labels[:, None, None]).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        prepare_images([str(folder / f"{name}.npz")], folder / name)
    for kind, model in KINDS.items():
        common = COMMON.replace("dropout = 0.1\n", "") if kind == "swin" else COMMON
        samples = 3 if kind == "image" else 0
        (folder / f"{kind}.toml").write_text(common.format(folder=folder, samples=samples) + model)
    return folder


class Ones(dict[str, Path]):
    """The runs of one process, by kind, made when they are wanted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __missing__(self, kind: str) -> Path:
        self[kind] = self.folder / f"{kind}-one"
        train(self.folder / f"{kind}.toml", f"output={self[kind]}")
        return self[kind]


@pytest.fixture(scope="module")
def ones(folder: Path) -> Ones:
    return Ones(folder)


def evaluations(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [value for row in lines for key, value in row.items() if key.startswith("eval_")]


def pictures(output: Path) -> dict[str, np.ndarray]:
    """What an image model drew for TensorBoard, by tag."""
    board = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    drawn = {tag: board.Images(tag)[-1].encoded_image_string for tag in board.Tags()["images"]}
    return {tag: np.asarray(Image.open(io.BytesIO(encoded))) for tag, encoded in drawn.items()}


CASES = [(kind, name) for kind in KINDS for name in LAYOUTS if kind != "swin" or not any(n in name for n in NOT_SHARED)]


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*case, marks=() if case in NORMAL else pytest.mark.slow) for case in CASES]
)
def test_a_layout_trains_as_one_process_and_another_goes_on(folder: Path, ones: Ones, kind: str, name: str) -> None:
    ranks, layout = LAYOUTS[name]
    one, out, config = ones[kind], folder / f"{kind}-{name}", folder / f"{kind}.toml"
    process = start_script(config, f"output={out}", "log.tensorboard=true", *layout, ranks=ranks)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert losses(out) == pytest.approx(losses(one), rel=2e-5)
    assert evaluations(out) == pytest.approx(evaluations(one), rel=2e-5)
    found, expected = pictures(out), pictures(one)
    assert found.keys() == (expected.keys() if "pp" not in name else set())
    # A draw at the edge of two values may go the other way, and with it the rest of its image.
    assert all(np.count_nonzero(found[tag] != expected[tag]) <= (6 * SCALE) ** 2 for tag in found)
    shutil.rmtree(out / "checkpoints" / "step-6")
    train(config, f"output={out}")
    assert losses(out) == pytest.approx(losses(one), rel=2e-5)


@pytest.mark.parametrize("kind", ["vit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("image", "swin"))])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(folder: Path, ones: Ones, kind: str) -> None:
    out = folder / f"{kind}-resumed"
    shutil.copytree(ones[kind], out)
    shutil.rmtree(out / "checkpoints" / "step-6")
    assert "resuming from" in train(folder / f"{kind}.toml", f"output={out}")
    found, expected = state(out), state(ones[kind])
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert losses(out) == losses(ones[kind])


def test_what_is_logged(ones: Ones) -> None:
    vit, image = rows(ones["vit"])[-1], rows(ones["image"])[-1]
    assert vit["images"] == 6 * 8 and vit["images_per_s"] > 0
    assert image["values"] == 6 * 8 * 35 and image["values_per_s"] > 0
    board = EventAccumulator(str(ones["image"] / "tensorboard"))
    board.Reload()
    assert "eval/bits_per_dim" in board.Tags()["scalars"]
    drawn = pictures(ones["image"])
    assert set(drawn) == {"eval/samples", "eval/completions"}
    assert drawn["eval/completions"].shape[:2] == (4 * 13, 4 * 20)  # three images, below them what they became


def test_checkpoints_of_images_are_read_by_everything(
    ones: Ones, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(ones["vit"])]) == 0
    said = capsys.readouterr().out
    row = json.loads((ones["vit"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{row['eval_loss']:.4f} nats per image over 13 images, top-1 {row['eval_top1']:.2%}, top-5" in said
    assert main(["evaluate", str(ones["image"])]) == 0
    assert "bits per dimension" in capsys.readouterr().out
    for extra in ([], ["--complete"]):
        assert main(["generate", str(ones["image"]), "--output", str(tmp_path / "a.png"), "--count", "4", *extra]) == 0
        assert Image.open(tmp_path / "a.png").mode == "L"
    for arguments, reason in (
        (["generate", str(ones["image"])], "draws images; give --output PNG"),
        (["generate", str(ones["vit"]), "--output", "a.png"], "is a vit; images are drawn by a model of kind 'image'"),
        (["generate", str(ones["vit"])], "is a vit, which predicts no tokens"),
        (
            ["generate", str(ones["image"]), "--output", "a.png", "--complete", "--count", "99"],
            "has 13 images; --count",
        ),
    ):
        assert main(arguments) == 1
        assert reason in capsys.readouterr().err
    other = tmp_path / "other"
    np.savez(tmp_path / "other.npz", images=np.zeros((3, 6, 6), np.uint8), labels=np.arange(3))
    prepare_images([str(tmp_path / "other.npz")], other, classes=["0", "2", "1"])
    for arguments, reason in (
        (["evaluate", str(ones["vit"]), "--data", str(other)], f"and '2' in {other}; prepare them alike"),
        (
            ["evaluate", str(ones["vit"]), "--data", str(tmp_path)],
            f"there is no corpus of images at {tmp_path}; prepare",
        ),
        (
            ["generate", str(ones["image"]), "--output", "a.png", "--prompt", "x"],
            "--prompt is for text, --output for images",
        ),
    ):
        assert main(arguments) == 1
        assert reason in capsys.readouterr().err
    for command in (["verify", str(ones["vit"])], ["checkpoint", "show", str(ones["image"])]):
        assert main(command) == 0


def test_other_augmentation_is_another_run(folder: Path, ones: Ones, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", str(folder / "vit.toml"), f"output={ones['vit']}", "train.steps=9", "augment.mixup=0.5"]
    assert main(run) == 1
    assert "was trained with augment.mixup = 0.8, now it is 0.5" in capsys.readouterr().err
