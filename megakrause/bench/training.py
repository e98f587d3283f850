"""`megakrause bench training`: tokens per second of the demo model, its softmax twin and a transformers Llama."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from megakrause.batch import TokenBatch
from megakrause.bench.measure import machine, ratio, take_turns, write_json
from megakrause.config import ModelConfig, RunConfig
from megakrause.config.file import parse_config
from megakrause.errors import UserError
from megakrause.hf.names import to_hf
from megakrause.models.build import build_model, count_parameters
from megakrause.ops.softmax import causal_mask
from megakrause.parallel.mesh import Mesh
from megakrause.table import table
from megakrause.training.engine import Engine

TOKENS = 4096  # of a step
DOCUMENT = 300  # mean length of a packed document, tokens
MODEL = dict(layers=4, width=128, heads=4, kv_heads=2, mlp_width=384, window=64, top_k=32, tie_embeddings=True)
VOCABULARY = 4096
LR, CLIP = 1e-4, 1.0


def run(lengths: list[int], json_path: Path | None) -> None:
    """Checks that the twin and the Llama learn alike, times all three in turns, prints the table, writes JSON."""
    mesh = Mesh.start()
    print(f"training steps of {TOKENS:,} tokens, fp32, AdamW, through the engine; {machine()}")
    rows = []
    cases = [(length, documents) for length in lengths for documents in (False, True)]
    for length, documents in tqdm(cases, "measuring", unit="case", leave=False):
        rows.append(measure(length, documents, mesh))
    print(table(rows))
    print(
        "tokens/s: medians. /: medians of ratios, round by round. llama: transformers, sdpa, fused AdamW, same masks."
    )
    if json_path is not None:
        write_json(json_path, {"machine": machine(), "model": MODEL, "rows": rows})


def measure(length: int, documents: bool, mesh: Mesh) -> dict[str, Any]:
    """One row of the table."""
    batch = make_batch(length, documents).to(mesh.device)
    steps: dict[str, Callable[[], float]] = {}
    for attention in ("krause", "softmax"):
        config = make_config(attention, length)
        engine = Engine(build_model(config.model, seed=0), config, mesh)
        steps[attention] = partial(_loss_of_step, engine, batch)
    steps["llama"] = llama_step(make_config("softmax", length).model, batch, documents)
    for _ in range(2):  # the same loss before and after an update
        ours, theirs = steps["softmax"](), steps["llama"]()
        if abs(ours - theirs) > 1e-5 * theirs:  # float32, sums in another order
            raise UserError(f"the softmax twin's loss {ours:.6f} is not the Llama's {theirs:.6f}; nothing was timed")
    seconds = take_turns(steps, rounds=7)
    speed = {f"{name} tok/s": TOKENS / statistics.median(times) for name, times in seconds.items()}
    return (
        {"T": length, "documents": "yes" if documents else "no"}
        | speed
        | {
            "softmax / llama": ratio(seconds["llama"], seconds["softmax"]),
            "krause / softmax": ratio(seconds["softmax"], seconds["krause"]),
        }
    )


def _loss_of_step(engine: Engine, batch: TokenBatch) -> float:
    return engine.train_step(batch, LR).loss


def make_config(attention: str, length: int) -> RunConfig:
    sequences = max(1, TOKENS // length)
    return parse_config(
        {
            "output": tempfile.gettempdir(),
            "model": MODEL | {"attention": attention, "vocab_size": VOCABULARY},
            "data": {"train": "none", "tokenizer": "none"},
            "optim": {"lr": LR, "clip": CLIP},
            "train": {"steps": 1, "global_batch": sequences, "seq_len": length},
        }
    )


def make_batch(length: int, documents: bool) -> TokenBatch:
    """Random tokens, in documents of random lengths or one a sequence."""
    generator = torch.Generator().manual_seed(0)
    sequences = max(1, TOKENS // length)
    tokens = torch.randint(VOCABULARY, (sequences, length + 1), generator=generator)
    doc_start = None
    if documents:
        starts = torch.rand(sequences, length, generator=generator) < 1 / DOCUMENT
        doc_start = torch.where(starts, torch.arange(length), 0).cummax(dim=1).values.int()
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(sequences, length, dtype=torch.bool), doc_start)


def llama_step(config: ModelConfig, batch: TokenBatch, documents: bool) -> Callable[[], float]:
    """A plain training loop around a Llama with the twin's own weights."""
    twin = build_model(config, seed=0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=batch.tokens.shape[1],
        ),
        attn_implementation="sdpa",
    )
    model.to(batch.tokens.device)
    weights = {to_hf(name): param for name, param in twin.named_parameters()}
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if count_parameters(model) != count_parameters(twin) or set(missing) - {"lm_head.weight"}:
        raise UserError("the Llama is not of the twin's size; nothing was timed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    s = batch.tokens.shape[1]
    mask = causal_mask(s, s, batch.doc_start, batch.tokens.device) if documents else None

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch.tokens, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step
