"""Images: from whatever they come as to the same batches for any number of workers and ranks."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megakrause.batch import ImageBatch, TokenBatch
from megakrause.cli import main
from megakrause.config import AugmentConfig, ModelConfig
from megakrause.data.augment import OPERATIONS, NoImage, View, decode, erase, generator, mixing
from megakrause.data.images import ImageRecords, ImageSamples
from megakrause.data.loader import eval_batches, train_batches
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.prepare_images import prepare_images
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import train_tokenizer
from megakrause.errors import UserError

RANDOM = np.random.default_rng(0)
SIDE = 12
EVERYTHING = AugmentConfig(
    crop="random_resized", flip=True, rand_augment=2, color_jitter=0.4, erasing=0.5, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1,
)  # fmt: skip


def vit(**changes: Any) -> ModelConfig:
    given: dict[str, Any] = dict(kind="vit", image_size=SIDE, channels=3, patch_size=4, classes=3, layers=1, width=8)
    return ModelConfig(**(given | dict(heads=1, mlp_width=8) | changes))


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 14)) -> Image.Image:
    """Something smooth, which JPEG keeps."""
    ramp = np.add.outer(np.linspace(0, 120, size[1]), np.linspace(0, 120, size[0])) + RANDOM.uniform(0, 15)
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def class_folders(root: Path, count: int = 4) -> Path:
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            form, suffix = (("PNG", "png"), ("JPEG", "jpg"))[i % 2]
            (root / name / f"{i}.{suffix}").write_bytes(encoded(picture(), form))
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    prepare_images([str(class_folders(folder / "raw", 7))], folder / "train")
    return str(folder / "train")


def records(prefix: str | Path) -> list[tuple[int, bytes]]:
    found = ImageRecords(str(prefix))
    return [found[i] for i in range(len(found))]


# ---- preparation


def test_class_folders_are_kept_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_folders(tmp_path / "raw")
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "beside.png").write_bytes(b"of no class")
    summary = prepare_images([str(root)], tmp_path / "out")
    assert (summary.images, summary.classes, summary.rejected) == (12, ["ant", "bee", "cat"], 0)
    assert summary.passed_over == 2 and "warning" not in capsys.readouterr().err
    (root / "beside.png").unlink()
    paths = sorted(path for path in root.rglob("*.*") if path.suffix != ".txt")
    expected = [(["ant", "bee", "cat"].index(path.parent.name), path.read_bytes()) for path in paths]
    assert records(tmp_path / "out") == expected
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "12 images of 3 classes, all checksums match" in capsys.readouterr().out


def test_the_folder_above_the_classes_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        class_folders(tmp_path / "raw" / part)
    summary = prepare_images([str(tmp_path / "raw")], tmp_path / "out")
    assert summary.classes == ["train", "val"]
    assert f"is one of them meant, such as {tmp_path}/raw/train?" in capsys.readouterr().err


def parquet(path: Path, rows: list[dict[str, Any]], names: list[str] | None) -> None:
    import datasets

    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "fine": label})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def test_tables_and_datasets(tmp_path: Path) -> None:
    rows = [{"img": {"bytes": encoded(picture()), "path": None}, "fine": i % 2} for i in range(5)]
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", rows, ["no", "yes"])
    expected = [(row["fine"], row["img"]["bytes"]) for row in rows]
    fields = dict(image_field="img", label_field="fine")
    for name in (f"{tmp_path}/set/train.parquet", f"hf:{tmp_path}/set@train"):
        summary = prepare_images([name], tmp_path / "out", **fields)  # type: ignore[arg-type]
        assert summary.classes == ["no", "yes"] and records(tmp_path / "out") == expected
    with pytest.raises(UserError, match="has no field 'image' but 'img', 'fine'"):
        prepare_images([f"{tmp_path}/set/train.parquet"], tmp_path / "out")


def test_arrays_as_mnist_and_cifar_have_them(tmp_path: Path) -> None:
    gray = RANDOM.integers(0, 256, (6, 28, 28), np.uint8)
    colour, labels = RANDOM.integers(0, 256, (6, 32, 32, 3), np.uint8), np.array([3, 1, 4, 1, 5, 9], np.uint8)
    np.savez(tmp_path / "a.npz", images=gray, labels=labels)
    header = bytes([0, 0, 8, 3]) + np.array([6, 28, 28], ">i4").tobytes()
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + gray.tobytes()))
    header = bytes([0, 0, 8, 1]) + np.array([6], ">i4").tobytes()
    (tmp_path / "t-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    planes = colour.transpose(0, 3, 1, 2).reshape(6, -1)
    (tmp_path / "ten.bin").write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())
    (tmp_path / "hundred.bin").write_bytes(np.concatenate([labels[:, None] * 0, labels[:, None], planes], 1).tobytes())
    arrays = {"a.npz": gray, "t-images-idx3-ubyte.gz": gray, "ten.bin": colour, "hundred.bin": colour}
    for name, pixels in arrays.items():
        summary = prepare_images([str(tmp_path / name)], tmp_path / "out")
        assert summary.images == 6 and summary.classes == [str(i) for i in range(10)]
        found = records(tmp_path / "out")
        assert [label for label, _ in found] == labels.tolist()
        for (_, content), one in zip(found, pixels, strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), one)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: shutil.rmtree(root / "bee") or (root / "bee").mkdir(), "bee has no images; remove it, or put in"),
        (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "has no folders; it needs one for each class"),
        (lambda root: shutil.rmtree(root), "is neither a folder of class folders, a file of images, nor hf:DATASET"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    root = class_folders(tmp_path / "raw")
    spoil(root)
    with pytest.raises(UserError, match=said):
        prepare_images([str(root)], tmp_path / "out")
    assert not (tmp_path / "out.manifest.json").exists()


@pytest.mark.faults
@pytest.mark.parametrize("label", [-1, 3, True, 1.5, "dog", None])
def test_a_label_that_is_no_class_stops_the_run(tmp_path: Path, label: Any) -> None:
    from megakrause.data.image_sources import Found
    from megakrause.data.layout import ImagesInfo
    from megakrause.data.prepare_images import _Run
    from megakrause.data.writer import CorpusWriter

    refused = pytest.raises(UserError, match="x, row 7: label .* is not one of the 3 classes")
    with refused, CorpusWriter(tmp_path / "out", ImagesInfo(classes=["a", "b", "c"])) as writer:
        _Run(writer, ["a", "b", "c"], 0).add([Found("x, row 7", b"...", label)], [("RGB", (1, 1))])


@pytest.mark.faults
def test_what_cannot_be_decoded_is_left_out_counted_and_listed(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "raw", 40)
    whole = (root / "bee" / "1.jpg").read_bytes()
    bad = {"1.jpg": whole[: len(whole) // 2], "2.png": b"", "4.png": b"no image at all", "6.png": whole[:2]}
    for name, content in bad.items():
        (root / "bee" / name).write_bytes(content)
    with pytest.raises(UserError, match="4 of 120 images cannot be decoded, more than --max-rejected allows"):
        prepare_images([str(root)], tmp_path / "out")
    summary = prepare_images([str(root)], tmp_path / "out", max_rejected=4)
    assert (summary.images, summary.rejected) == (116, 4)
    lines = [json.loads(line) for line in Path(f"{tmp_path}/out.quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["source"]).name for line in lines} == set(bad) and all(line["reason"] for line in lines)
    command = [sys.executable, "data_prep/prepare_images.py", "--input", str(root), "--output", str(tmp_path / "b")]
    ended = subprocess.run([*command, "--max-rejected", "3"], capture_output=True, text=True)
    assert ended.returncode == 1 and "error: 4 of" in ended.stderr
    ended = subprocess.run([*command, "--max-rejected", "10%", "--workers", "2"], capture_output=True, text=True)
    assert ended.returncode == 0 and "4 images cannot be decoded, see" in ended.stderr
    assert records(tmp_path / "b") == records(tmp_path / "out")


@pytest.mark.faults
def test_preparation_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megakrause.data import prepare_images as module

    root = class_folders(tmp_path / "raw", 50)
    prepare_images([str(root)], tmp_path / "whole")
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "GROUP", 16)
    real, calls = module._examine, []

    def dies(contents: list[bytes]) -> Any:
        calls.append(len(contents))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(contents)

    monkeypatch.setattr(module, "_examine", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_images([str(root)], tmp_path / "out")
    prepare_images([str(root)], tmp_path / "out")
    assert sum(calls) == 5 * 16 + 150 - 4 * 16  # what was saved was not done again
    assert records(tmp_path / "out") == records(tmp_path / "whole")
    assert Path(f"{tmp_path}/out.bin").read_bytes() == Path(f"{tmp_path}/whole.bin").read_bytes()


def test_a_source_of_unknown_length_is_gone_on_with_where_it_was() -> None:
    from megakrause.data.image_sources import Found
    from megakrause.data.prepare_images import _from

    class Source:
        def __init__(self, name: str, count: int, known: bool):
            self.name, self.count, self.total = name, count, count if known else None

        def read(self, start: int = 0) -> Any:
            return (Found(f"{self.name}{i}", b"", 0) for i in range(start, self.count))

    for known in ([False, False, False], [True, False, True], [True, True, True]):
        sources: list[Any] = [Source(n, c, k) for n, c, k in zip("abc", (5, 4, 3), known, strict=True)]
        everything = [found.place for found in _from(sources, 0)]
        assert len(everything) == 12
        for start in range(13):
            assert [found.place for found in _from(sources, start)] == everything[start:]


# ---- decoding


def test_rows_of_padding_alone(corpus: str) -> None:
    image = ModelConfig(kind="image", image_size=SIDE, layers=1, width=8, heads=1, mlp_width=8, window=4)
    for model, shape in ((vit(), (2, 3, SIDE, SIDE)), (image, (2, 3 * SIDE**2 - 1))):
        made = ImageSamples(corpus, model, AugmentConfig()).batch(np.array([-1, -1]))
        assert made.inputs[0].shape == shape and not made.loss_mask.any()


@pytest.mark.faults
def test_only_known_formats_are_opened_and_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS file would be handed to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    flat = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(flat, "TIFF")
    for content in (eps, b"", b"GIF89a", flat.getvalue(), encoded(picture())[:40]):
        with pytest.raises(NoImage):
            decode(content, 3)
    assert not (tmp_path / "ran").exists()


def test_sixteen_bits_of_other_formats() -> None:
    ramp = np.arange(0, 65536, 256, dtype=">u2").reshape(16, 16)
    content = b"P5 16 16 65535\n" + ramp.tobytes()
    assert np.array_equal(np.asarray(decode(content, 1)), ramp >> 8)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16", "1", "YCbCr"])
def test_every_kind_of_image_becomes_what_a_model_needs(mode: str) -> None:
    image = picture(mode)
    content = encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    gray = np.asarray(decode(content, 1)).astype(int)
    rgb = np.asarray(decode(content, 3)).astype(int)
    assert gray.shape == (14, 16) and rgb.shape == (14, 16, 3)
    if mode != "1":
        expected = np.asarray(picture_like(image)).astype(int)
        assert np.abs(gray - expected).max() <= 12  # JPEG, palettes and the way to CMYK and back
        assert np.abs(rgb - expected[..., None]).max() <= 14


def picture_like(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB").convert("L")


@pytest.mark.parametrize("size", [(SIDE, SIDE), (5, 3), (40, 20), (13, 12), (1, 1)])
def test_evaluation_sees_the_centre_in_the_right_proportions(size: tuple[int, int]) -> None:
    image = picture(size=size)
    seen = View(SIDE, SIDE, 3)(encoded(image), generator(0, 0, 0))
    assert seen.shape == (SIDE, SIDE, 3)
    if size == (SIDE, SIDE):
        assert np.array_equal(seen, np.asarray(image))


def test_augmentation_is_a_function_of_the_sample_alone() -> None:
    content = encoded(picture(size=(30, 20)))
    view = View(SIDE, SIDE, 3, EVERYTHING)
    first = [view(content, generator(7, number, 0)) for number in range(40)]
    assert all(np.array_equal(one, view(content, generator(7, number, 0))) for number, one in enumerate(first))
    assert len({one.tobytes() for one in first}) > 35
    assert any(not np.array_equal(one, view(content, generator(8, number, 0))) for number, one in enumerate(first))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_operation_of_randaugment_keeps_size_and_mode_and_most_change_something(mode: str) -> None:
    image, changed = picture(mode), 0
    for operation in OPERATIONS:
        for strength in (0.0, 0.3, 1.0):
            for sign in (-1, 1):
                out = operation(image, strength, sign)
                assert out.size == image.size and out.mode == mode
                changed += strength > 0 and not np.array_equal(np.asarray(out), np.asarray(image))
    assert changed >= 4 * (len(OPERATIONS) - 4)  # not the first one, nor the colours of what has none


def test_flips_crops_erasing_and_mixing_are_as_often_and_as_large_as_they_should_be() -> None:
    left = Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3))
    view = View(SIDE, SIDE, 3, AugmentConfig(flip=True))
    flips = sum(not np.array_equal(view(encoded(left), generator(1, n, 0)), np.asarray(left)) for n in range(400))
    assert 150 < flips < 250
    padded = View(SIDE, SIDE, 3, AugmentConfig(crop="pad", padding=2))
    corners = {padded(encoded(left), generator(1, n, 0)).tobytes() for n in range(400)}
    assert len(corners) == 25  # each shift of up to two pixels
    erased = np.zeros((400, 1, SIDE, SIDE), np.float32)
    for n, one in enumerate(erased):
        erase(one, generator(1, n, 1))
    share = (erased != 0).mean((1, 2, 3))
    assert share.min() > 0 and share.max() < 0.45 and 0.1 < share.mean() < 0.25
    pairs = [mixing(EVERYTHING, SIDE, SIDE, generator(1, n, 2)) for n in range(400)]
    cut = [taken for taken, share in pairs if set(np.unique(taken)) <= {0.0, 1.0}]
    assert 150 < len(cut) < 250
    for taken, share in pairs:
        assert taken.mean() == pytest.approx(share, abs=1e-6) and 0 <= share <= 1


# ---- batches


def batches(prefix: str, ranks: int, workers: int, model: ModelConfig, steps: int = 4) -> list[Any]:
    """The global batches of a run, put together from its ranks'."""
    parts = []
    for rank in range(ranks):
        augment = EVERYTHING if model.kind == "vit" else AugmentConfig(flip=True)
        samples = ImageSamples(prefix, model, augment, seed=3, workers=workers)
        made = train_batches(samples, global_batch=12, rank=rank, ranks=ranks, start=0, prefetch=2)
        parts.append([next(made)[0] for _ in range(steps)])
        made.close()
        samples.close()
    rows = [[torch.cat([one.inputs[0].flatten(1).float(), one.targets.float()], 1) for one in part] for part in parts]
    return [torch.cat([part[step] for part in rows]) for step in range(steps)]


@pytest.mark.parametrize("kind", ["vit", "image"])
def test_the_same_batches_for_any_number_of_workers_and_ranks(corpus: str, kind: str) -> None:
    model = vit() if kind == "vit" else ModelConfig(
        kind="image", image_size=SIDE, layers=1, width=8, heads=1, mlp_width=8, window=4
    )  # fmt: skip
    expected = batches(corpus, 1, 0, model)
    assert len({one.numpy().tobytes() for one in expected}) == 4
    for ranks, workers in ((1, 1), (1, 4), (2, 0), (4, 0), (4, 1)):
        for ours, theirs in zip(batches(corpus, ranks, workers, model), expected, strict=True):
            assert torch.equal(ours, theirs), (ranks, workers)


def test_an_epoch_has_every_image_once_and_another_another_order(corpus: str) -> None:
    samples = ImageSamples(corpus, vit(), AugmentConfig(), seed=1)
    n = len(samples)
    plain = ImageSamples(corpus, vit(), AugmentConfig())
    there = sorted(one.tobytes() for one in plain.pixels(np.arange(n)))
    epochs = [[one.tobytes() for one in samples.pixels(np.arange(n) + n * epoch)] for epoch in range(2)]
    assert all(sorted(epoch) == there for epoch in epochs) and epochs[0] != epochs[1]
    other = ImageSamples(corpus, vit(), AugmentConfig(), seed=2)
    assert [one.tobytes() for one in other.pixels(np.arange(n))] != epochs[0]


def test_targets_are_shares_and_mixed_as_the_pixels_are(corpus: str) -> None:
    soft = AugmentConfig(mixup=1.0, label_smoothing=0.3)
    samples = ImageSamples(corpus, vit(), soft, seed=1)
    plain = ImageSamples(corpus, vit(), AugmentConfig(label_smoothing=0.3), seed=1)
    numbers = np.array([4, 5, 9, 30])
    mixed, (own, other) = samples.batch(numbers), (plain.batch(n) for n in (numbers, numbers ^ 1))
    assert isinstance(mixed, ImageBatch) and isinstance(own, ImageBatch) and isinstance(other, ImageBatch)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(4))
    assert torch.equal(mixed.numbers, torch.tensor(numbers))  # type: ignore[arg-type]
    for row in range(4):
        share = ((mixed.images - own.images)[row] / (other.images - own.images)[row]).nanmedian()
        torch.testing.assert_close(mixed.targets[row], torch.lerp(own.targets[row], other.targets[row], share))
        torch.testing.assert_close(mixed.images[row], torch.lerp(own.images[row], other.images[row], share))
    assert own.targets.max() == pytest.approx(0.8) and own.targets.min() == pytest.approx(0.1)


def test_evaluation_sees_all_once_with_hard_targets_and_padding(corpus: str) -> None:
    samples = ImageSamples(corpus, vit(), EVERYTHING)
    seen = [b for rank in range(2) for b in eval_batches(samples, batch=4, rank=rank, ranks=2, limit=0)]
    assert sum(int(b.loss_mask.sum()) for b in seen) == len(samples) == 21
    for b in seen:
        assert isinstance(b, ImageBatch)
        assert set(b.targets[b.loss_mask].unique().tolist()) == {0.0, 1.0} and b.images.shape == (4, 3, SIDE, SIDE)


def test_values_of_an_image_model_are_the_pixels_in_raster_order(corpus: str) -> None:
    model = ModelConfig(kind="image", image_size=SIDE, layers=1, width=8, heads=1, mlp_width=8, window=4)
    samples = ImageSamples(corpus, model, AugmentConfig())
    numbers = np.array([0, -1, 5])
    made, pixels = samples.batch(numbers), samples.pixels(np.array([0, 5]))
    assert isinstance(made, TokenBatch) and made.tokens.shape == (3, 3 * SIDE**2 - 1)
    assert made.loss_mask.all(1).tolist() == [True, False, True]
    for row, image in zip((0, 2), pixels, strict=True):
        assert made.tokens[row].tolist() == image.flatten().tolist()[:-1]
        assert made.targets[row].tolist() == image.flatten().tolist()[1:]


@pytest.mark.parametrize(
    ("model", "said"),
    [(vit(classes=4), "model.classes = 4, and .* has 3; they must agree")],
)
def test_a_corpus_of_other_classes_is_refused(corpus: str, model: ModelConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImageSamples(corpus, model, AugmentConfig())


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_named_and_never_trained_on(corpus: str, tmp_path: Path, workers: int) -> None:
    for path in Path(corpus).parent.glob("train.*"):
        shutil.copy(path, tmp_path)
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    samples = ImageSamples(f"{tmp_path}/train", vit(), AugmentConfig(), seed=0, workers=workers)
    with pytest.raises(UserError, match="train.bin: block 0, .* is damaged"):
        samples.batch(np.arange(8))
    samples.close()


@pytest.mark.faults
def test_a_worker_that_dies_is_no_hang(corpus: str) -> None:
    samples = ImageSamples(corpus, vit(), AugmentConfig(), seed=0, workers=2)
    samples.batch(np.arange(4))
    assert samples._pool is not None
    for process in list(samples._pool._processes.values()):
        process.kill()
    with pytest.raises(UserError, match="a worker process died, perhaps for want of memory; use fewer data.workers"):
        samples.batch(np.arange(4))
    samples.close()


def test_text_is_not_taken_for_images_nor_images_for_text(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words and some more words\n" * 20)
    tokenizer = train_tokenizer(iter(["some words and some more words"] * 20), 270, tmp_path / "tokenizer.model")
    tokenize_corpus([str(tmp_path / "text.txt")], tokenizer, tmp_path / "text")
    with pytest.raises(UserError, match="text is no corpus of images; prepare one with data_prep/prepare_images.py"):
        ImageSamples(str(tmp_path / "text"), vit(), AugmentConfig())
    with pytest.raises(UserError, match="is a corpus of images, not of text"):
        Corpus.open(corpus, tokenizer)
