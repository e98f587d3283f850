"""`make demo`: the whole main job on this machine, from text to a trained, exported and talking language model.

The text is Python's own standard library. Running it again goes on where it stopped, or keeps what is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from megakrause.checkpoint.model import load_language_model, stored_tokenizer
from megakrause.checkpoint.read import Checkpoint, find_checkpoint
from megakrause.config import RunConfig
from megakrause.config.file import load_config
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import train_tokenizer
from megakrause.errors import UserError, run_command
from megakrause.evaluate import evaluate_checkpoint
from megakrause.generate import generate_tokens
from megakrause.hf.export import export
from megakrause.parallel.mesh import Mesh
from megakrause.training.loop import train

CONFIG = Path("configs/demo/lm.toml")
VOCABULARY = 4096
PROMPT = 'def read_lines(path):\n    """'
NEW_TOKENS = 96


def main() -> None:
    began = time.perf_counter()
    config = load_config(CONFIG)
    data, output = Path(config.tokenizer).parent, Path(config.output)
    exported = output.with_name("hf")
    with step(1, "corpus: the sources of Python's standard library, split by file"):
        files = {"train": list(sources(held_out=False)), "valid": list(sources(held_out=True))}
        for name, paths in files.items():
            print(f"   {name}: {len(paths):,} files, {sum(p.stat().st_size for p in paths) / 1e6:.1f} MB")
    if is_current(data, files, config):
        print(f"\n2-3  tokenizer and shards in {data} are of these very files: kept")
    else:
        if output.exists():  # trained on other files, or another model
            aside = output.with_name(f"{output.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
            print(f"   the files or {CONFIG} changed: {output} is set aside as {aside}")
            output.rename(aside)
        prepare(data, files, config)
    with step(4, f"training: {CONFIG} through DeepSpeed, into {output}"):
        train(config, Mesh.start())
        report_waiting(output)
    checkpoint = find_checkpoint(output)
    with step(5, "held-out loss"):
        report_loss(checkpoint, config)
    with step(6, f"export to {exported}, reload with AutoModelForCausalLM, compare"):
        print(f"   largest logit difference {export(checkpoint.path, exported):.2e}")
    with step(7, "a sample, greedy, from the checkpoint and from the export with its cache"):
        report_sample(checkpoint, exported, PROMPT)
    print(f"\n8  all of it took {time.perf_counter() - began:.0f} s. To go on (source .venv/bin/activate first):")
    print(f"""
   tensorboard --logdir {output.parent}                                   # curves
   megakrause generate {output} --prompt 'class ' --temperature 0.8       # more text
   megakrause train {CONFIG} train.steps=5000 output=runs/longer          # longer training
   python data_prep/tokenize_text.py --input YOUR_TEXT --tokenizer {config.tokenizer} --output runs/own/train
   megakrause train {CONFIG} data.train=runs/own/train data.valid=none train.eval_every=0 output=runs/own/lm
""")


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """Announces a step and says how long it took."""
    print(f"\n{number}  {title}", flush=True)
    began = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - began:.1f} s", flush=True)


def sources(held_out: bool) -> Iterator[Path]:
    """The standard library's files in order; one in 32, by its name, is held out."""
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if {"site-packages", "dist-packages", "__pycache__"}.isdisjoint(relative.parts) and path.stat().st_size:
            chosen = xxhash.xxh3_64_intdigest(str(relative).encode()) % 32 == 0
            if chosen == held_out:
                yield path


def prepare(data: Path, files: dict[str, list[Path]], config: RunConfig) -> None:
    """Tokenizer and shards."""
    with step(2, f"tokenizer: SentencePiece BPE, {VOCABULARY} pieces, byte fallback"):
        data.mkdir(parents=True, exist_ok=True)
        (data / "source.json").unlink(missing_ok=True)
        texts = (path.read_bytes().decode(errors="replace") for path in files["train"])
        tokenizer = train_tokenizer(texts, VOCABULARY, config.tokenizer)
        text = "".join(path.read_bytes().decode(errors="replace") for path in files["valid"])
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise UserError("the tokenizer is not lossless on the held-out files")
        print(f"   lossless on {len(text.encode()) / 1e6:.1f} MB of held-out text")
    with step(3, f"shards: Megatron .bin/.idx with a manifest, in {data}"):
        for name, paths in files.items():
            prefix = data / name
            tokenize_corpus([str(p) for p in paths], tokenizer, prefix, workers=os.cpu_count() or 1)
            corpus = Corpus.open(prefix, tokenizer)
            print(
                f"   {prefix}: {corpus.num_tokens:,} tokens, {corpus.num_documents:,} documents, "
                f"{corpus.bytes_per_token:.2f} bytes per token"
            )
        (data / "source.json").write_text(json.dumps(source_key(files, config)), encoding="utf-8")


def source_key(files: dict[str, list[Path]], config: RunConfig) -> str:
    """A hash that changes with the files or with what the model is to be."""
    listing = [(name, str(p), p.stat().st_size, p.stat().st_mtime_ns) for name, paths in files.items() for p in paths]
    what = (listing, config.model.model_dump(), config.seq_len, config.train.seed, VOCABULARY)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def is_current(data: Path, files: dict[str, list[Path]], config: RunConfig) -> bool:
    """Whether an earlier run prepared these files to the end."""
    try:
        return json.loads((data / "source.json").read_text(encoding="utf-8")) == source_key(files, config)
    except (OSError, ValueError):
        return False


def report_waiting(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "data_seconds" in row]
    share = sum(row["data_seconds"] for row in steps) / sum(row["seconds"] for row in steps)
    print(f"   steps waited for data {share:.2%} of their time")


def report_loss(checkpoint: Checkpoint, config: RunConfig) -> None:
    assert config.data.valid is not None
    result = evaluate_checkpoint(checkpoint.path, None)
    corpus = Corpus.open(config.data.valid)
    counts = np.bincount(corpus.read(0, corpus.num_tokens))
    share = counts[counts > 0] / corpus.num_tokens
    unigram = -float((share * np.log(share)).sum())
    print(f"   {result.bits_per_byte:.3f} bits per byte, {result.loss:.3f} nats per token over {result.count:,} tokens")
    print(f"   entropy of one token: uniform {math.log(VOCABULARY):.3f} nats, held-out unigrams {unigram:.3f} nats")
    print(f"   the model is {unigram - result.loss:.2f} nats below the unigrams")


def report_sample(checkpoint: Checkpoint, exported: Path, text: str) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = stored_tokenizer(checkpoint)
    prompt = [tokenizer.eos, *tokenizer.encode(text)]
    ours = list(generate_tokens(load_language_model(checkpoint), prompt, NEW_TOKENS, temperature=0.0))
    model: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32)
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, max_new_tokens=NEW_TOKENS
    )[0, len(prompt) :].tolist()
    print("   " + (text + tokenizer.decode(ours)).replace("\n", "\n   "))
    if ours != theirs:
        raise UserError(f"the export generates other tokens: {theirs} instead of {ours}")
    print(f"   {len(ours)} tokens, the same from both")


if __name__ == "__main__":
    sys.exit(run_command(main))
