"""`megakrause convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megakrause.cli_arguments import command, positive


def add_convert(commands: argparse._SubParsersAction) -> None:
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
    parser = command(
        converters,
        "to-hf",
        "Write a checkpoint as a Hugging Face folder, reload it and compare the logits.",
        "  megakrause convert to-hf runs/demo/lm exported\n"
        "  then: AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True)\n"
        "  or, of a vision transformer, AutoModelForImageClassification",
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

    parser = command(
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

    parser = command(
        converters,
        "from-hf",
        "Write the weights of a Hugging Face folder (Llama, Qwen1.5, Qwen2, Qwen3, or an export) as a checkpoint.",
        "  megakrause convert from-hf Llama-3.2-1B runs/llama\n"
        "  then: megakrause generate runs/llama, or train.init_from=runs/llama (or =Llama-3.2-1B, without this)",
        from_hf,
    )
    parser.add_argument("folder", metavar="HF_FOLDER", help="with config.json and safetensors; code in it is never run")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be new or empty")

    parser = command(
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
    parser.add_argument("--window", type=positive, help="of a language model: keys that a Krause query sees")
    parser.add_argument("--top-k", type=positive, help="of a language model: keys that it keeps; default: all")
