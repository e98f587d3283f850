"""Writes images and their classes as a corpus: PREFIX.bin, PREFIX.idx and PREFIX.manifest.json."""

from __future__ import annotations

import argparse
import glob
import os
import sys

from megakrause.cli_arguments import number_or_share, positive
from megakrause.data.image_sources import SUFFIXES
from megakrause.data.prepare_images import prepare_images
from megakrause.errors import UserError, run_command

SHOWN = 10  # names of classes
NAMES = {"L": "gray", "I;16": "gray of 16 bits", "P": "with a palette"}  # of Pillow's modes
EXAMPLES = """examples:
  python data_prep/prepare_images.py --input imagenet/train --output data/imagenet-train
  python data_prep/prepare_images.py --input hf:uoft-cs/cifar10@train --image-field img --output data/cifar10-train
  python data_prep/prepare_images.py --input 'cifar-10-batches-bin/data_batch_*.bin' --output data/cifar10-train
  python data_prep/prepare_images.py --input train-images-idx3-ubyte.gz --output data/mnist-train
  python data_prep/prepare_images.py --input digits.npz --output data/digits

An input is a folder with one folder for each class; a .parquet file; hf:DATASET[:CONFIG][@SPLIT], by id or a folder; or
an array: .npz with `images` and `labels`, MNIST's ...-images-idx3-ubyte[.gz] beside its labels, CIFAR's binary version.
Files are kept as they are. Every one is decoded once: what cannot be is listed in PREFIX.quarantine.jsonl and left out;
a label that is no class stops it, and so does a class without images. Gray, CMYK, 16-bit and transparent images are
kept and become what a model needs when they are read. Interrupted or killed, the same command goes on.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="folders, files, globs in quotes, or hf:DATASET")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the corpus's files; no folder")
    parser.add_argument("--image-field", default="image", help="column of tables; default: image")
    parser.add_argument("--label-field", default="label", help="column of tables; default: label")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line; default: the input's")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument(
        "--max-rejected",
        type=number_or_share,
        default="1%",
        metavar="N",
        help="stop at more images that cannot be decoded than this, a number or a percentage; default: 1%%",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus if there is one")
    parser.add_argument("--shard-mb", type=positive, default=4096, help="largest .bin file, in MiB; default: 4096")
    arguments = parser.parse_args()

    def run() -> None:
        names: list[str] = []
        for name in arguments.input:
            found = sorted(glob.glob(name)) if glob.has_magic(name) and not name.startswith("hf:") else [name]
            if not found:
                raise UserError(f"no file matches {name}")
            names += found
        classes = None
        if arguments.classes:
            with open(arguments.classes, encoding="utf-8") as file:
                classes = file.read().splitlines()
        summary = prepare_images(
            names,
            arguments.output,
            image_field=arguments.image_field,
            label_field=arguments.label_field,
            classes=classes,
            workers=arguments.workers,
            max_rejected=arguments.max_rejected,
            overwrite=arguments.overwrite,
            shard_bytes=arguments.shard_mb << 20,
        )
        kinds = ", ".join(f"{count:,} {NAMES.get(kind, kind)}" for kind, count in sorted(summary.kinds.items()))
        width, height = summary.smallest
        shown = ", ".join(summary.classes[:SHOWN]) + ", ..." * (len(summary.classes) > SHOWN)
        print(
            f"{arguments.output}: {summary.images:,} images ({kinds}), none narrower than {width} or lower than "
            f"{height} pixels; {len(summary.classes)} classes: {shown}"
        )
        if summary.rejected:
            print(f"{summary.rejected} images cannot be decoded, see {summary.quarantine}", file=sys.stderr)
        if summary.passed_over:
            known = " ".join(sorted(SUFFIXES))
            print(f"{summary.passed_over} other files passed over; images end in {known}", file=sys.stderr)

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
