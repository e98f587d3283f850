"""`megakrause bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megakrause.cli_arguments import command, positive


def add_bench(commands: argparse._SubParsersAction) -> None:
    benches = commands.add_parser("bench", help="Measure; every benchmark checks results before it times them.")
    kinds = benches.add_subparsers(metavar="WHAT", required=True)

    def attention(arguments: argparse.Namespace) -> None:
        import torch

        from megakrause.bench.attention import Setting, run

        gpu = torch.cuda.is_available()
        lengths = arguments.lengths or [2**n for n in (range(10, 18) if gpu else range(10, 13))]
        names = ("window", "top_k", "batch", "heads", "head_dim")
        setting = Setting(
            **{name: getattr(arguments, name) for name in names},
            dtype=arguments.dtype or ("bfloat16" if gpu else "float32"),
        )
        run(setting, lengths, arguments.json, arguments.plot)

    parser = command(
        kinds,
        "attention",
        "Krause attention against the published dense arithmetic and torch's attention: time, memory, share of floor.",
        "  megakrause bench attention --plot attention.png\n"
        "  megakrause bench attention --window 256 --top-k 192 --heads 16 --dtype bfloat16 --json attention.json",
        attention,
    )
    parser.add_argument(
        "--lengths", type=positive, nargs="+", help="sequence lengths; default: 1024 to 4096, on a GPU to 131072"
    )
    parser.add_argument("--window", type=positive, default=128, help="keys a query sees")
    parser.add_argument("--top-k", type=positive, default=64, help="keys it keeps")
    parser.add_argument("--batch", type=positive, default=1, help="sequences")
    parser.add_argument("--heads", type=positive, default=4, help="heads")
    parser.add_argument("--head-dim", type=positive, default=64, help="size of a head")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--json", type=Path, help="also write the tables here")
    parser.add_argument("--plot", type=Path, help="also draw the times, as PNG")

    def decode(arguments: argparse.Namespace) -> None:
        from megakrause.bench.decode import run

        run(arguments.positions, arguments.batch, arguments.json)

    parser = command(
        kinds,
        "decode",
        "What one more token costs, near the start of a text and far into it.",
        "  megakrause bench decode\n  megakrause bench decode --positions 100 100000 --batch 8",
        decode,
    )
    default = [100, 1000, 10000, 100000]
    parser.add_argument("--positions", type=positive, nargs="+", default=default, help="tokens in the cache before")
    parser.add_argument("--batch", type=positive, default=1, help="sequences at once")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def sampling(arguments: argparse.Namespace) -> None:
        from megakrause.bench.sampling import run

        run(arguments.batches, arguments.json)

    parser = command(
        kinds,
        "sampling",
        "Images a second of a CIFAR-10 image model with a rolling cache, and of its softmax twin with a full one.",
        "  megakrause bench sampling\n  megakrause bench sampling --batches 16 --json sampling.json",
        sampling,
    )
    parser.add_argument("--batches", type=positive, nargs="+", default=[64, 1], help="images at once; default: 64 1")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def kernels(arguments: argparse.Namespace) -> None:
        from megakrause.bench.kernels import run

        run(arguments.capabilities, arguments.all, arguments.json, arguments.markdown)

    parser = command(
        kinds,
        "kernels",
        "Compile the Triton kernels for GPUs that need not be there: registers, stack, spills, shared memory.",
        "  megakrause bench kernels\n  megakrause bench kernels --all --capabilities 90 --markdown kernels.md",
        kernels,
    )
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100], help="80 for sm_80, and so on")
    parser.add_argument("--all", action="store_true", help="every configuration, not only one of each kernel")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--markdown", type=Path, help="also write it here, with what spills and why")

    def data(arguments: argparse.Namespace) -> None:
        from megakrause.bench.data import run

        run(arguments.megabytes, arguments.json)

    parser = command(
        kinds,
        "data",
        "Preparation against SentencePiece alone and Megatron-LM's loop (needs megatron-core), reading, and opening.",
        "  megakrause bench data\n  megakrause bench data --megabytes 20 --json data.json",
        data,
    )
    parser.add_argument("--megabytes", type=positive, default=100, help="of text; default: 100")
    parser.add_argument("--json", type=Path, help="also write the tables here")

    def checkpoint(arguments: argparse.Namespace) -> None:
        from megakrause.bench.checkpoint import run

        run(arguments.megabytes, arguments.folder, arguments.json)

    parser = command(
        kinds,
        "checkpoint",
        "Saving, beside training and not, and verified loading, against a plain copy, write and read.",
        "  megakrause bench checkpoint\n  megakrause bench checkpoint --megabytes 8000 --folder /lustre/scratch",
        checkpoint,
    )
    parser.add_argument("--megabytes", type=positive, default=2100, help="of one rank's state; default: 2100")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to measure; default: runs")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def training(arguments: argparse.Namespace) -> None:
        if arguments.layouts:
            from megakrause.bench.layouts import run as run_layouts

            return run_layouts(arguments.json)
        from megakrause.bench.training import run

        run(arguments.lengths, arguments.json)

    parser = command(
        kinds,
        "training",
        "Tokens per second of the demo model, its softmax twin and a transformers Llama; or of every layout.",
        "  megakrause bench training\n  megakrause bench training --lengths 256 --json training.json\n"
        "  torchrun --nproc_per_node=4 -m megakrause bench training --layouts",
        training,
    )
    parser.add_argument("--lengths", type=positive, nargs="+", default=[256, 1024, 4096], help="sequence lengths")
    parser.add_argument(
        "--layouts", action="store_true", help="instead: every layout of the launcher's processes, and what it sends"
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
