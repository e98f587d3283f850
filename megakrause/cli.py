"""The `megakrause` command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from megakrause.errors import UserError, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="megakrause", description="Pretraining with Krause attention: train, evaluate, generate, convert, measure."
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_train, _add_evaluate, _add_generate, _add_convert, _add_verify, _add_bench):
        add(commands)
    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


def _command(
    commands: argparse._SubParsersAction, name: str, help: str, examples: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.config import load_config

        try:
            config = load_config(arguments.config, arguments.overrides)
        except UserError as error:
            raise UserError(str(error), everywhere=True) from error
        from megakrause.parallel.mesh import Mesh
        from megakrause.training.loop import train

        train(config, Mesh.start())

    parser = _command(
        commands,
        "train",
        "Train from a config, or go on where its output folder stopped.",
        "  megakrause train configs/demo/lm.toml\n"
        "  megakrause train configs/demo/lm.toml train.steps=1000 optim.lr=1e-3 output=runs/longer\n"
        "  torchrun --nproc_per_node=2 -m megakrause train configs/demo/lm.toml parallel.zero=1",
        run,
    )
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config keys to change; `none` leaves one out"
    )


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.evaluate import evaluate_checkpoint

        print(evaluate_checkpoint(arguments.checkpoint, arguments.data))

    parser = _command(
        commands,
        "evaluate",
        "Loss of a checkpoint on a held-out corpus.",
        "  megakrause evaluate runs/demo/lm --data runs/demo/data/valid",
        run,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser.add_argument("--data", metavar="PREFIX", help="corpus; default: data.valid of the checkpoint's config")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.generate import generate_text

        prompt = arguments.prompt
        pieces = generate_text(
            arguments.checkpoint,
            prompt,
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        started = False
        for piece in pieces:
            print(piece if started else prompt + piece, end="", flush=True)
            started = True
        print()

    parser = _command(
        commands,
        "generate",
        "Continue a text.",
        "  megakrause generate runs/demo/lm --prompt 'import os' --max-new-tokens 100 --temperature 0\n"
        "  megakrause generate runs/demo/lm/checkpoints/step-400 --temperature 0.8 --top-p 0.95 --seed 1",
        run,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser.add_argument("--prompt", default="", help="text that opens the document (default: none)")
    parser.add_argument("--max-new-tokens", type=_positive, default=128)
    parser.add_argument("--temperature", type=_not_negative, default=0.0, help="0 (default): the most likely token")
    parser.add_argument(
        "--top-p", type=_share, default=1.0, help="draw from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    def to_hf(arguments: argparse.Namespace) -> None:
        from megakrause.hf.export import export

        difference = export(arguments.checkpoint, arguments.out)
        print(f"{arguments.out}: reloaded; largest logit difference {difference:.2e}")

    converters = commands.add_parser("convert", help="Convert checkpoints.").add_subparsers(metavar="TO", required=True)
    parser = _command(
        converters,
        "to-hf",
        "Write a checkpoint as a Hugging Face folder, reload it and compare the logits.",
        "  megakrause convert to-hf runs/demo/lm exported\n"
        "  then: AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True)",
        to_hf,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; must not exist, or be an earlier export"
    )


def _add_verify(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.verify import verify

        for line in verify(Path(arguments.path)):
            print(line)

    parser = _command(
        commands,
        "verify",
        "Check every byte of a corpus, a checkpoint or all of a run's against its checksums.",
        "  megakrause verify runs/demo/lm\n  megakrause verify runs/demo/data/train",
        run,
    )
    parser.add_argument("path", metavar="CHECKPOINT|PREFIX|SHARD")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    benches = commands.add_parser("bench", help="Measure; every benchmark checks results before it times them.")
    kinds = benches.add_subparsers(metavar="WHAT", required=True)

    def attention(arguments: argparse.Namespace) -> None:
        from megakrause.bench.attention import run

        run(arguments.lengths, arguments.json)

    parser = _command(
        kinds,
        "attention",
        "Krause attention against the published dense arithmetic and torch's softmax attention.",
        "  megakrause bench attention\n  megakrause bench attention --lengths 1024 4096 --json attention.json",
        attention,
    )
    parser.add_argument("--lengths", type=_positive, nargs="+", default=[1024, 2048, 4096], help="sequence lengths")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def training(arguments: argparse.Namespace) -> None:
        from megakrause.bench.training import run

        run(arguments.lengths, arguments.json)

    parser = _command(
        kinds,
        "training",
        "Tokens per second of the demo model, its softmax twin and a transformers Llama of the same size.",
        "  megakrause bench training\n  megakrause bench training --lengths 256 --json training.json",
        training,
    )
    parser.add_argument("--lengths", type=_positive, nargs="+", default=[256, 1024, 4096], help="sequence lengths")
    parser.add_argument("--json", type=Path, help="also write the table here")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
