"""The `megakrause` command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megakrause.cli_arguments import command, not_negative, positive, share
from megakrause.cli_bench import add_bench
from megakrause.cli_convert import add_convert
from megakrause.errors import UserError, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="megakrause", description="Pretraining with Krause attention: train, evaluate, generate, convert, measure."
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        *(_add_train, _add_evaluate, _add_generate, add_convert, _add_verify),
        *(_add_checkpoint, _add_data, _add_plan, add_bench),
    ):
        add(commands)
    arguments, rest = parser.parse_known_args(argv)
    overrides = getattr(arguments, "overrides", None)
    if overrides is None or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:  # argparse takes those before the first option alone
        overrides += rest
    return run_command(lambda: arguments.run(arguments))


def _add_train(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.config.file import load_config
        from megakrause.parallel.launcher import end_with_launcher, is_launched

        if is_launched():
            end_with_launcher()
        try:
            config = load_config(arguments.config, arguments.overrides)
        except UserError as error:
            raise UserError(str(error), everywhere=True) from error
        from megakrause.parallel.mesh import Mesh
        from megakrause.training.loop import train

        train(config, Mesh.start(config.parallel))

    parser = command(
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
        if arguments.tasks:
            if arguments.data is not None:
                raise UserError("--data is of the held-out loss, --tasks have data of their own; leave one out")
            from megakrause.tasks import evaluate_tasks

            scores = evaluate_tasks(
                arguments.checkpoint,
                arguments.tasks,
                include=arguments.task_folder,
                shots=arguments.shots,
                limit=arguments.limit,
                batch=arguments.batch,
                trust_remote_code=arguments.trust_remote_code,
                json_path=arguments.json,
            )
            print(scores)
            return
        for option in ("json", "limit", "shots", "task_folder"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is of --tasks; name some, or leave it out")
        from megakrause.evaluate import evaluate_checkpoint

        print(evaluate_checkpoint(arguments.checkpoint, arguments.data))

    parser = command(
        commands,
        "evaluate",
        "Loss of a checkpoint on a held-out corpus; or tasks of lm-evaluation-harness, also on a Hugging Face folder.",
        "  megakrause evaluate runs/demo/lm --data runs/demo/data/valid\n"
        "  megakrause evaluate runs/lora --tasks boolq piqa mnli --limit 1000 --json scores.json",
        run,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser.add_argument("--data", metavar="PREFIX", help="corpus; default: data.valid of the checkpoint's config")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="zero-shot unless the task says otherwise")
    parser.add_argument("--task-folder", type=Path, metavar="FOLDER", help="of task files (.yaml) beside the harness's")
    parser.add_argument("--shots", type=int, help="examples in the prompt; default: the task's own number")
    parser.add_argument("--limit", type=positive, help="examples of each task; default: all")
    parser.add_argument("--batch", type=positive, default=8, help="sequences at once, of tasks; default: 8")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code of a folder that is not ours"
    )
    parser.add_argument("--json", type=Path, help="also write the scores here")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.generate import generate_images, generate_text

        if arguments.output is not None:
            if arguments.prompt is not None:
                raise UserError("--prompt is for text, --output for images; give one of them")
            generate_images(
                arguments.checkpoint,
                arguments.count,
                arguments.output,
                complete=arguments.complete,
                prefix=arguments.data,
                temperature=1.0 if arguments.temperature is None else arguments.temperature,
                top_p=arguments.top_p,
                seed=arguments.seed,
            )
            print(arguments.output)
            return
        prompt = arguments.prompt or ""
        pieces = generate_text(
            arguments.checkpoint,
            prompt,
            arguments.max_new_tokens,
            temperature=arguments.temperature or 0.0,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        started = False
        for piece in pieces:
            print(piece if started else prompt + piece, end="", flush=True)
            started = True
        print()

    parser = command(
        commands,
        "generate",
        "Continue a text, or draw images.",
        "  megakrause generate runs/demo/lm --prompt 'import os' --max-new-tokens 100 --temperature 0\n"
        "  megakrause generate runs/demo/lm/checkpoints/step-400 --temperature 0.8 --top-p 0.95 --seed 1\n"
        "  megakrause generate runs/image/krause-mnist --output samples.png --count 64\n"
        "  megakrause generate runs/image/krause-mnist --output completed.png --complete --data data/mnist-test",
        run,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser.add_argument("--prompt", help="text that opens the document (default: none)")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument(
        "--temperature", type=not_negative, help="0: the most likely token; default: 0 of text, 1 of images"
    )
    parser.add_argument("--output", metavar="PNG", type=Path, help="of an image model: a picture of what it draws")
    parser.add_argument("--count", type=positive, default=16, help="images; default: 16")
    parser.add_argument("--complete", action="store_true", help="draw the lower halves of real images")
    parser.add_argument(
        "--data", metavar="PREFIX", help="of these; default: the config's data.valid, or data.train for first values"
    )
    parser.add_argument(
        "--top-p", type=share, default=1.0, help="draw from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.verify import verify

        for line in verify(arguments.path, arguments.tokenizer, arguments.dtype):
            print(line)

    parser = command(
        commands,
        "verify",
        "Check every byte of a corpus, a checkpoint or all of a run's against its checksums.",
        "  megakrause verify runs/demo/lm\n  megakrause verify runs/demo/data/train\n"
        "  megakrause verify megatron/corpus_text_document --tokenizer tokenizer.model",
        run,
    )
    parser.add_argument("path", metavar="CHECKPOINT|PREFIX|SHARD")
    parser.add_argument("--tokenizer", help="of a corpus without a manifest, to check its token ids")
    _add_dtype(parser)


def _add_checkpoint(commands: argparse._SubParsersAction) -> None:
    def show_lines(name: str, *keys: str) -> Callable[[argparse.Namespace], None]:
        def run(arguments: argparse.Namespace) -> None:
            from megakrause import checkpoints

            for line in getattr(checkpoints, name)(*(getattr(arguments, key) for key in keys)):
                print(line)

        return run

    kinds = commands.add_parser("checkpoint", help="Look at checkpoints.").add_subparsers(metavar="WHAT", required=True)
    parser = command(
        kinds,
        "list",
        "List the checkpoints of a run, newest first.",
        "  megakrause checkpoint list runs/demo/lm\n  megakrause checkpoint list s3://bucket/runs/lm",
        show_lines("list_checkpoints", "path"),
    )
    parser.add_argument("path", metavar="RUN", help="a run's folder, or a folder of step-N folders")
    parser = command(
        kinds,
        "show",
        "Print where a run was at a checkpoint, its config and its parameters.",
        "  megakrause checkpoint show runs/demo/lm",
        show_lines("show_checkpoint", "checkpoint"),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser = command(
        kinds,
        "diff",
        "Print how two checkpoints differ, whatever layouts they were written in.",
        "  megakrause checkpoint diff runs/a/checkpoints/step-100 runs/b/checkpoints/step-100",
        show_lines("compare_checkpoints", "first", "second"),
    )
    parser.add_argument("first", metavar="CHECKPOINT")
    parser.add_argument("second", metavar="CHECKPOINT")


def _add_data(commands: argparse._SubParsersAction) -> None:
    def show(arguments: argparse.Namespace) -> None:
        from megakrause.show import show_corpus, show_step

        if arguments.what.endswith(".toml"):
            from megakrause.config.file import load_config

            lines = show_step(load_config(arguments.what, arguments.overrides), arguments.step, arguments.count)
        else:
            if arguments.tokenizer is None:
                raise UserError("the documents of a corpus need --tokenizer to be read")
            lines = show_corpus(
                arguments.what, arguments.tokenizer, arguments.document, arguments.count, arguments.dtype
            )
        for line in lines:
            print(line)

    def adopt(arguments: argparse.Namespace) -> None:
        from megakrause.data.check import adopt_corpus
        from megakrause.data.tokenizer import Tokenizer

        manifest = adopt_corpus(arguments.prefix, Tokenizer.load(arguments.tokenizer))
        print(
            f"{arguments.prefix}.manifest.json: {manifest.tokens:,} tokens in {manifest.documents:,} documents, hashed"
        )

    kinds = commands.add_parser("data", help="Look at corpora.").add_subparsers(metavar="WHAT", required=True)
    parser = command(
        kinds,
        "show",
        "Print the documents of a corpus; or of a config, the mix and the sequences of a training step.",
        "  megakrause data show runs/demo/data/train --tokenizer runs/demo/data/tokenizer.model --document 7\n"
        "  megakrause data show configs/demo/lm.toml --step 100 --count 2",
        show,
    )
    parser.add_argument("what", metavar="PREFIX|CONFIG.toml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys to change")
    parser.add_argument("--tokenizer", help="of the corpus")
    parser.add_argument("--document", type=int, default=0, help="the first one to print; default: 0")
    parser.add_argument("--step", type=positive, default=1, help="of the run; default: 1")
    parser.add_argument("--count", type=positive, default=1, help="documents or sequences; default: 1")
    _add_dtype(parser)
    parser = command(
        kinds,
        "adopt",
        "Check a .bin/.idx corpus that other software wrote and put a manifest with its hashes beside it.",
        "  megakrause data adopt megatron/corpus_text_document --tokenizer tokenizer.model",
        adopt,
    )
    parser.add_argument("prefix", metavar="PREFIX")
    parser.add_argument("--tokenizer", required=True, help="the one that made it")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="of a token, in files that do not say so: uint16 or uint32")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.config.file import load_config
        from megakrause.plan import run

        config = load_config(arguments.config, arguments.overrides)
        run(config, arguments.gpus, arguments.gpu, arguments.layouts, arguments.json)

    parser = command(
        commands,
        "plan",
        "What a run will take on any number of GPUs: memory by part, bytes sent, time; and which layouts fit.",
        "  megakrause plan configs/lm/krause-1b.toml --gpus 64\n"
        "  megakrause plan configs/lm/krause-7b.toml --gpus 256 --gpu h200 parallel.tp=4 parallel.zero=1",
        run,
    )
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys to change")
    parser.add_argument("--gpus", type=positive, help="how many; default: what pp x cp x tp need")
    parser.add_argument("--gpu", choices=["a100", "h100", "h200", "b200"], default="h100", help="default: h100")
    parser.add_argument("--layouts", type=int, default=10, help="how many other layouts to show; default: 10")
    parser.add_argument("--json", type=Path, help="also write all of it here")
