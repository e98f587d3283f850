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
    for add in (
        *(_add_train, _add_evaluate, _add_generate, _add_convert, _add_verify),
        *(_add_checkpoint, _add_data, _add_plan, _add_bench),
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

    parser = _command(
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
    parser.add_argument("--limit", type=_positive, help="examples of each task; default: all")
    parser.add_argument("--batch", type=_positive, default=8, help="sequences at once, of tasks; default: 8")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code of a folder that is not ours"
    )
    parser.add_argument("--json", type=Path, help="also write the scores here")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.generate import generate_images, generate_text

        if arguments.output is not None:
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
        prompt = arguments.prompt
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

    parser = _command(
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
    parser.add_argument("--prompt", default="", help="text that opens the document (default: none)")
    parser.add_argument("--max-new-tokens", type=_positive, default=128)
    parser.add_argument(
        "--temperature", type=_not_negative, help="0: the most likely token; default: 0 of text, 1 of images"
    )
    parser.add_argument("--output", metavar="PNG", type=Path, help="of an image model: a picture of what it draws")
    parser.add_argument("--count", type=_positive, default=16, help="images; default: 16")
    parser.add_argument("--complete", action="store_true", help="draw the lower halves of real images")
    parser.add_argument(
        "--data", metavar="PREFIX", help="of these; default: the config's data.valid, or data.train for first values"
    )
    parser.add_argument(
        "--top-p", type=_share, default=1.0, help="draw from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    def to_hf(arguments: argparse.Namespace) -> None:
        import torch

        from megakrause.hf.export import export

        dtype = getattr(torch, arguments.dtype)
        difference = export(arguments.checkpoint, arguments.out, dtype, adapters=not arguments.without_adapters)
        print(f"{arguments.out}: reloaded; largest logit difference {difference:.2e}")

    def from_hf(arguments: argparse.Namespace) -> None:
        from megakrause.hf.imports import import_folder

        print(f"{arguments.out}: {import_folder(arguments.folder, arguments.out)}")

    def to_peft(arguments: argparse.Namespace) -> None:
        from megakrause.hf.adapter import export_adapter

        difference = export_adapter(arguments.checkpoint, arguments.base, arguments.out)
        print(f"{arguments.out}: reloaded on {arguments.base}; largest logit difference {difference:.2e}")

    def from_paper(arguments: argparse.Namespace) -> None:
        from megakrause.hf.paper import import_state_dict

        model = import_state_dict(arguments.state, arguments.out, arguments.config, arguments.window, arguments.top_k)
        kinds = " and ".join(sorted(set(model.attention_of_layers)))
        print(f"{arguments.out}: {model.kind} of {model.layers} layers of width {model.width}, attention {kinds}")

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
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument(
        "--without-adapters", action="store_true", help="leave them out instead of merging them: a base for to-peft"
    )

    parser = _command(
        converters,
        "to-peft",
        "Write the adapters of a checkpoint as a PEFT folder, put it on its base and compare the logits.",
        "  megakrause convert to-peft runs/lora Llama-3.2-1B adapter\n"
        "  then: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('Llama-3.2-1B'), 'adapter')\n"
        "of a model with Krause branches, whose gates are trained, too, first:\n"
        "  megakrause convert to-hf runs/lora base --without-adapters",
        to_peft,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser.add_argument("base", metavar="BASE", type=Path, help="Hugging Face folder that the adapters were trained on")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; must not exist, or be an earlier export"
    )

    parser = _command(
        converters,
        "from-hf",
        "Write the weights of a Hugging Face folder (Llama, Qwen1.5, Qwen2, Qwen3, or an export) as a checkpoint.",
        "  megakrause convert from-hf Llama-3.2-1B runs/llama\n"
        "  then: megakrause generate runs/llama, or train.init_from=runs/llama (or =Llama-3.2-1B, without this)",
        from_hf,
    )
    parser.add_argument("folder", metavar="HF_FOLDER", help="with config.json and safetensors; code in it is never run")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be new or empty")

    parser = _command(
        converters,
        "from-paper",
        "Write a state dict of the paper's published implementation as a checkpoint.",
        "  megakrause convert from-paper llama_krause.pt runs/llama --config Llama-3-8B/config.json --window 32 "
        "--top-k 16\n"
        "  megakrause convert from-paper kvit.pt runs/kvit --config configs/vit/kvit-s-cifar10.toml",
        from_paper,
    )
    parser.add_argument("state", metavar="STATE_DICT", type=Path, help=".pt, .safetensors, or a folder of shards")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be new or empty")
    parser.add_argument(
        "--config", type=Path, required=True, help="config.json of a language model, or a run's .toml of any other"
    )
    parser.add_argument("--window", type=_positive, help="of a language model: keys that a Krause query sees")
    parser.add_argument("--top-k", type=_positive, help="of a language model: keys that it keeps; default: all")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from megakrause.verify import verify

        for line in verify(arguments.path, arguments.tokenizer, arguments.dtype):
            print(line)

    parser = _command(
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
    parser = _command(
        kinds,
        "list",
        "List the checkpoints of a run, newest first.",
        "  megakrause checkpoint list runs/demo/lm\n  megakrause checkpoint list s3://bucket/runs/lm",
        show_lines("list_checkpoints", "path"),
    )
    parser.add_argument("path", metavar="RUN", help="a run's folder, or a folder of step-N folders")
    parser = _command(
        kinds,
        "show",
        "Print where a run was at a checkpoint, its config and its parameters.",
        "  megakrause checkpoint show runs/demo/lm",
        show_lines("show_checkpoint", "checkpoint"),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder")
    parser = _command(
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
    parser = _command(
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
    parser.add_argument("--step", type=_positive, default=1, help="of the run; default: 1")
    parser.add_argument("--count", type=_positive, default=1, help="documents or sequences; default: 1")
    _add_dtype(parser)
    parser = _command(
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

    parser = _command(
        commands,
        "plan",
        "What a run will take on any number of GPUs: memory by part, bytes sent, time; and which layouts fit.",
        "  megakrause plan configs/lm/krause-1b.toml --gpus 64\n"
        "  megakrause plan configs/lm/krause-7b.toml --gpus 256 --gpu h200 parallel.tp=4 parallel.zero=1",
        run,
    )
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys to change")
    parser.add_argument("--gpus", type=_positive, help="how many; default: what pp x cp x tp need")
    parser.add_argument("--gpu", choices=["a100", "h100", "h200", "b200"], default="h100", help="default: h100")
    parser.add_argument("--layouts", type=int, default=10, help="how many other layouts to show; default: 10")
    parser.add_argument("--json", type=Path, help="also write all of it here")


def _add_bench(commands: argparse._SubParsersAction) -> None:
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

    parser = _command(
        kinds,
        "attention",
        "Krause attention against the published dense arithmetic and torch's attention: time, memory, share of floor.",
        "  megakrause bench attention --plot attention.png\n"
        "  megakrause bench attention --window 256 --top-k 192 --heads 16 --dtype bfloat16 --json attention.json",
        attention,
    )
    parser.add_argument(
        "--lengths", type=_positive, nargs="+", help="sequence lengths; default: 1024 to 4096, on a GPU to 131072"
    )
    parser.add_argument("--window", type=_positive, default=128, help="keys a query sees")
    parser.add_argument("--top-k", type=_positive, default=64, help="keys it keeps")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences")
    parser.add_argument("--heads", type=_positive, default=4, help="heads")
    parser.add_argument("--head-dim", type=_positive, default=64, help="size of a head")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--json", type=Path, help="also write the tables here")
    parser.add_argument("--plot", type=Path, help="also draw the times, as PNG")

    def decode(arguments: argparse.Namespace) -> None:
        from megakrause.bench.decode import run

        run(arguments.positions, arguments.batch, arguments.json)

    parser = _command(
        kinds,
        "decode",
        "What one more token costs, near the start of a text and far into it.",
        "  megakrause bench decode\n  megakrause bench decode --positions 100 100000 --batch 8",
        decode,
    )
    default = [100, 1000, 10000, 100000]
    parser.add_argument("--positions", type=_positive, nargs="+", default=default, help="tokens in the cache before")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences at once")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def sampling(arguments: argparse.Namespace) -> None:
        from megakrause.bench.sampling import run

        run(arguments.batches, arguments.json)

    parser = _command(
        kinds,
        "sampling",
        "Images a second of a CIFAR-10 image model with a rolling cache, and of its softmax twin with a full one.",
        "  megakrause bench sampling\n  megakrause bench sampling --batches 16 --json sampling.json",
        sampling,
    )
    parser.add_argument("--batches", type=_positive, nargs="+", default=[64, 1], help="images at once; default: 64 1")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def kernels(arguments: argparse.Namespace) -> None:
        from megakrause.bench.kernels import run

        run(arguments.capabilities, arguments.all, arguments.json, arguments.markdown)

    parser = _command(
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

    parser = _command(
        kinds,
        "data",
        "Preparation against SentencePiece alone and Megatron-LM's loop (needs megatron-core), reading, and opening.",
        "  megakrause bench data\n  megakrause bench data --megabytes 20 --json data.json",
        data,
    )
    parser.add_argument("--megabytes", type=_positive, default=100, help="of text; default: 100")
    parser.add_argument("--json", type=Path, help="also write the tables here")

    def checkpoint(arguments: argparse.Namespace) -> None:
        from megakrause.bench.checkpoint import run

        run(arguments.megabytes, arguments.folder, arguments.json)

    parser = _command(
        kinds,
        "checkpoint",
        "Saving, beside training and not, and verified loading, against a plain copy, write and read.",
        "  megakrause bench checkpoint\n  megakrause bench checkpoint --megabytes 8000 --folder /lustre/scratch",
        checkpoint,
    )
    parser.add_argument("--megabytes", type=_positive, default=2100, help="of one rank's state; default: 2100")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to measure; default: runs")
    parser.add_argument("--json", type=Path, help="also write the table here")

    def training(arguments: argparse.Namespace) -> None:
        if arguments.layouts:
            from megakrause.bench.layouts import run as run_layouts

            return run_layouts(arguments.json)
        from megakrause.bench.training import run

        run(arguments.lengths, arguments.json)

    parser = _command(
        kinds,
        "training",
        "Tokens per second of the demo model, its softmax twin and a transformers Llama; or of every layout.",
        "  megakrause bench training\n  megakrause bench training --lengths 256 --json training.json\n"
        "  torchrun --nproc_per_node=4 -m megakrause bench training --layouts",
        training,
    )
    parser.add_argument("--lengths", type=_positive, nargs="+", default=[256, 1024, 4096], help="sequence lengths")
    parser.add_argument(
        "--layouts", action="store_true", help="instead: every layout of the launcher's processes, and what it sends"
    )
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
