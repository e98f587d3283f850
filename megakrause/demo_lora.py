"""`make demo-lora`: a Llama that transformers trained goes on here, with a Krause branch and adapters and with adapters
alone, and goes back to transformers and PEFT.

The base learns from most of Python's standard library; the two go on with the part of it that the base has not seen.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megakrause.checkpoint.model import load_language_model, stored_tokenizer
from megakrause.checkpoint.read import find_checkpoint
from megakrause.config import RunConfig
from megakrause.config.file import load_config
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer, train_tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.demo import report_sample, sources, step
from megakrause.errors import run_command
from megakrause.evaluate import evaluate_checkpoint
from megakrause.hf.adapter import export_adapter
from megakrause.hf.export import export, hf_config
from megakrause.hf.imports import import_folder
from megakrause.hf.tokenizer import write_tokenizer
from megakrause.parallel.mesh import Mesh
from megakrause.training.loop import train

CONFIG = Path("configs/demo/lora.toml")
PLAIN = ["model.attention=softmax", "model.window=none", "model.top_k=none", "output=runs/demo-lora/plain"]
UNSEEN = ("asyncio", "concurrent", "email", "http", "multiprocessing", "socketserver", "urllib", "xmlrpc")
BASE_STEPS = 250  # of as many tokens as those of the runs
LENGTH = 2048  # tokens that the base says it can read
PROMPT = "async def connect("


def main() -> None:
    began = time.perf_counter()
    krause, plain = load_config(CONFIG), load_config(CONFIG, PLAIN)
    folder = Path(krause.output).parent
    base = Path(krause.train.init_from or "")
    if folder.exists():
        print(f"{folder} of an earlier demo is removed")
        shutil.rmtree(folder)
    with step(1, "corpora: the standard library; what it has on networks and processes is kept from the base"):
        tokenizer = prepare(krause, folder / "data", base)
    with step(2, f"base: transformers' own Llama, {BASE_STEPS} steps, into {base}"):
        train_base(krause, tokenizer, folder / "data", base)
    with step(3, "import: the base as a checkpoint, and what it knows of the unseen part"):
        print(f"   {import_folder(str(base), folder / 'imported')}")
        before = evaluate_checkpoint(str(folder / "imported"), krause.data.valid)
        print(f"   held-out text of the unseen part: {before}")
    for number, config in enumerate((plain, krause), 4):
        what = "adapters alone" if config is plain else "adapters and a Krause branch"
        with step(number, f"{what}: {CONFIG} into {config.output}"):
            train(config, Mesh.start())
    with step(6, "held-out text of the unseen part"):
        for name, result in [
            ("base", before),
            *((c.output, evaluate_checkpoint(c.output, None)) for c in (plain, krause)),
        ]:
            print(f"   {name:24} {result}")
        for name, share in gate_shares(krause).items():
            print(f"   {name}: the Krause branch has {share:.1%} of the output on average (20 % at the start)")
    with step(7, "export: merged folders, and PEFT adapters on their bases; reload and compare"):
        for config in (plain, krause):
            name = Path(config.output).name
            print(f"   {name}: merged, largest logit difference {export(config.output, folder / f'{name}-hf'):.2e}")
        print(f"   plain: adapter on {base}, {export_adapter(plain.output, base, folder / 'plain-peft'):.2e}")
        export(krause.output, folder / "krause-base", adapters=False)
        difference = export_adapter(krause.output, folder / "krause-base", folder / "krause-peft")
        print(f"   krause: adapter on {folder / 'krause-base'}, {difference:.2e}")
    with step(8, "a sample, greedy: the checkpoint, and the export with its rolling cache"):
        report_sample(find_checkpoint(krause.output), folder / "krause-hf", PROMPT)
    print(f"\n9  all of it took {time.perf_counter() - began:.0f} s. To go on (source .venv/bin/activate first):")
    print(f"""
   tensorboard --logdir {folder}
   megakrause generate {krause.output} --prompt 'class ' --temperature 0.8
   megakrause evaluate {folder}/krause-hf --tasks TASK --task-folder FOLDER
   megakrause plan configs/lora/llama3-8b-krause.toml --gpus 4
""")


def prepare(config: RunConfig, data: Path, base: Path) -> Tokenizer:
    """The base's tokenizer, its corpus, and the two of the part that it does not see."""
    base.mkdir(parents=True)
    library = Path(os.__file__).parent
    parts: dict[bool, list[str]] = {False: [], True: []}  # by whether the base never sees it
    for path in sorted([*sources(held_out=False), *sources(held_out=True)]):
        names = path.relative_to(library).parts
        if "test" not in names:
            parts[names[0].removesuffix(".py") in UNSEEN].append(str(path))
    unseen = parts[True]
    files = {"base": parts[False], "train": [path for i, path in enumerate(unseen) if i % 8], "valid": unseen[::8]}
    texts = (Path(path).read_bytes().decode(errors="replace") for path in files["base"])
    assert config.model.vocab_size is not None
    write_tokenizer(train_tokenizer(texts, config.model.vocab_size, data / "tokenizer.model"), base, LENGTH)
    tokenizer = Tokenizer.load(base)
    for name, paths in files.items():
        tokenize_corpus(paths, tokenizer, data / name, workers=os.cpu_count() or 1)
        print(f"   {name}: {len(paths)} files, {Corpus.open(data / name, tokenizer).num_tokens:,} tokens")
    return tokenizer


def train_base(config: RunConfig, tokenizer: Tokenizer, data: Path, out: Path) -> None:
    """Makes of the tokenizer's folder one as people download it: a softmax Llama, nothing of ours."""
    from transformers import AutoModelForCausalLM

    special = {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
    plain = {"attention": "softmax", "window": None, "top_k": None, "lora": None}
    torch.manual_seed(config.train.seed)
    llama = hf_config(config.model.model_copy(update=plain), LENGTH, special)
    model: Any = AutoModelForCausalLM.from_config(llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, BASE_STEPS, pct_start=0.1)
    for batch in tqdm(batches(config, tokenizer, data / "base"), total=BASE_STEPS, desc="transformers", unit="step"):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    print(f"   loss {loss.item():.3f} nats per token after {BASE_STEPS} steps")


def batches(config: RunConfig, tokenizer: Tokenizer, prefix: Path) -> Iterator[torch.Tensor]:
    corpus = Corpus.open(prefix, tokenizer)
    windows = TokenWindows(corpus, config.seq_len, eos=tokenizer.eos, mask_documents=False, seed=1)
    size = config.train.global_batch
    for start in range(0, BASE_STEPS * size, size):
        yield windows.batch(torch.arange(start, start + size).numpy()).tokens


@torch.no_grad()
def gate_shares(config: RunConfig) -> dict[str, float]:
    """How much of each layer's output comes from the Krause branch, on a held-out sequence."""
    checkpoint = find_checkpoint(config.output)
    model, tokenizer = load_language_model(checkpoint), stored_tokenizer(checkpoint)
    assert config.data.valid is not None
    corpus = Corpus.open(config.data.valid, tokenizer)
    shares: dict[str, float] = {}

    def record(name: str, gate: Any, outputs: torch.Tensor) -> None:
        logits = torch.nn.functional.linear(outputs, gate.weight, gate.bias)
        shares[name] = float(logits.softmax(-1)[..., 1].mean())

    for name, block in model.blocks.items():
        gate = block.attention.gate  # type: ignore[union-attr]
        gate.register_forward_pre_hook(lambda gate, args, name=f"layer {name}": record(name, gate, args[0]))  # type: ignore[union-attr]
    model(torch.from_numpy(corpus.read(0, config.seq_len).astype("int64"))[None])
    return shares


if __name__ == "__main__":
    sys.exit(run_command(main))
