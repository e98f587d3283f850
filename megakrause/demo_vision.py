"""`make demo-vision`: vision transformers and image models on handwritten digits, with Krause attention and with
softmax.

The digits are scikit-learn's: 1,797 real images of 8 x 8 pixels, of which every fifth is held out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from megakrause.analyze.attention_maps import draw_maps
from megakrause.checkpoint.model import load_model
from megakrause.checkpoint.read import find_checkpoint
from megakrause.config import RunConfig
from megakrause.config.file import load_config
from megakrause.data.open import eval_images
from megakrause.data.prepare_images import prepare_images
from megakrause.demo import step
from megakrause.errors import UserError, run_command
from megakrause.evaluate import evaluate_checkpoint
from megakrause.generate import generate_images
from megakrause.models.flops import image_flops
from megakrause.models.vit import VisionTransformer
from megakrause.parallel.mesh import Mesh
from megakrause.table import table
from megakrause.training.evaluate import Evaluation
from megakrause.training.loop import train

VIT, IMAGE = Path("configs/demo/vit.toml"), Path("configs/demo/image.toml")
SOFTMAX = ["model.attention=softmax", "model.top_k=none"]
HELD_OUT = 5  # every so many-th image
SHOWN = 12  # images of a picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="of each vision transformer, from 0 on; default: 1")
    seeds = parser.parse_args().seeds
    began = time.perf_counter()
    folder = Path(load_config(VIT).output).parent
    if folder.exists():
        print(f"{folder} of an earlier demo is removed")
        shutil.rmtree(folder)
    with step(1, f"digits: a corpus of images in {folder / 'data'}"):
        prepare(folder / "data")
    with step(2, f"vision transformers: {VIT} and its softmax twin, {seeds} of each"):
        softmax = [*SOFTMAX, "model.top_k_last=none"]
        folders = [folder, *(folder / f"seed-{seed}" for seed in range(1, seeds))]
        vits = [twins(VIT, one, seed, softmax) for seed, one in enumerate(folders)]
        results = [tuple(run(config) for config in pair) for pair in vits]
    with step(3, "accuracy on the held-out digits, and operations of an image"):
        report_vits(vits, results)
    with step(4, f"image models: {IMAGE} and its softmax twin"):
        models = twins(IMAGE, folder, 0, [*SOFTMAX, "model.window=none"])
        drawn = [run(config) for config in models]
    with step(5, "bits per dimension of held-out digits"):
        for config, result in zip(models, drawn, strict=True):
            print(f"   {config.model.attention:8} {result}")
    with step(6, "pictures: samples, completions of lower halves, and where the layers look"):
        for config in models:
            for complete in (False, True):
                path = folder / f"{config.model.attention}-{'completions' if complete else 'samples'}.png"
                generate_images(
                    config.output, SHOWN, path, complete=complete, prefix=None, temperature=1.0, top_p=1.0, seed=0
                )
                print(f"   {path}")
        print(f"   {draw_attention(vits[0], folder / 'attention.png')}")
    print(f"\n7  all of it took {time.perf_counter() - began:.0f} s. To go on (source .venv/bin/activate first):")
    print(
        f"""
   tensorboard --logdir {folder}
   megakrause generate {models[0].output} --output more.png --count 64 --temperature 0.9
   python data_prep/prepare_images.py --input YOUR_CLASS_FOLDERS --output data/own
   megakrause train configs/vit/kvit-t-cifar10.toml data.train=data/own data.valid=... model.classes=... output=runs/own
"""
    )


def prepare(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    held_out = np.arange(len(pixels)) % HELD_OUT == HELD_OUT - 1
    folder.mkdir(parents=True)
    for name, chosen in {"train": ~held_out, "valid": held_out}.items():
        np.savez(folder / f"{name}.npz", images=pixels[chosen], labels=digits.target[chosen])
        summary = prepare_images([str(folder / f"{name}.npz")], folder / name)
        print(f"   {name}: {summary.images:,} images of {len(summary.classes)} classes")


def twins(path: Path, folder: Path, seed: int, softmax: list[str]) -> tuple[RunConfig, RunConfig]:
    """Configs that differ in their attention alone."""
    own = [f"train.seed={seed}"]
    name = load_config(path).model.kind
    return (
        load_config(path, [*own, f"output={folder / f'{name}-krause'}"]),
        load_config(path, [*own, *softmax, f"output={folder / f'{name}-softmax'}"]),
    )


def run(config: RunConfig) -> Evaluation:
    train(config, Mesh.start())
    return evaluate_checkpoint(config.output, None)


def report_vits(vits: list[tuple[RunConfig, RunConfig]], results: list[tuple[Evaluation, ...]]) -> None:
    rows = []
    for number, config in enumerate(vits[0]):
        top1 = [100 * (pair[number].top1 or 0.0) for pair in results]
        spread = {"least": min(top1), "greatest": max(top1)}
        spread["deviation"] = statistics.stdev(top1) if len(top1) > 1 else 0.0
        flops = image_flops(config.model)
        counted = {"needed kFLOPs": flops.needed // 1000, "executed kFLOPs": flops.executed // 1000}
        rows.append({"attention": config.model.attention, "top-1 %": statistics.fmean(top1)} | spread | counted)
    print("   " + table(rows).replace("\n", "\n   "))
    krause, softmax = (image_flops(config.model).needed for config in vits[0])
    print(f"   Krause attention needs {1 - krause / softmax:.1%} fewer operations in all")


@torch.no_grad()
def draw_attention(pair: tuple[RunConfig, RunConfig], path: Path) -> Path:
    models = {}
    for config in pair:
        model, samples = load_model(find_checkpoint(config.output)), eval_images(config, workers=0)
        assert isinstance(model, VisionTransformer) and samples is not None
        numbers = np.arange(4)
        (images,) = samples.batch(numbers).inputs
        models[str(config.model.attention)] = model, images
        pixels = samples.pixels(numbers)
    draw_maps(path, pixels, models)
    return path


def start() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("the digits come with scikit-learn; install it with pip install 'megakrause[demo]'") from error
    main()


if __name__ == "__main__":
    sys.exit(run_command(start))
