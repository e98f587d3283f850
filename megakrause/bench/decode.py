"""`megakrause bench decode`: what one more token costs, far into a text, with Krause and with softmax attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megakrause.bench.measure import machine, ratio, take_turns, write_json
from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.models.attention import GrowingCache, WindowCache
from megakrause.models.build import build_language_model
from megakrause.models.lm import LanguageModel, ModelCache
from megakrause.table import table

MODEL = dict(layers=4, width=256, heads=4, kv_heads=2, mlp_width=768, window=128, top_k=64)
VOCABULARY = 4096
TOKENS = 4  # are timed together
CHECKED = 300  # tokens that are generated with and without the cache before anything is timed


def run(positions: list[int], batch: int, json_path: Path | None) -> None:
    """Checks, times, prints the table and writes it as JSON. Raises UserError when the check fails."""
    print(f"one more token, {MODEL['layers']} layers of width {MODEL['width']}, batch {batch}; {machine()}")
    models = {kind: make_model(kind) for kind in ("krause", "softmax")}
    for kind in models:
        check(kind)
    rows = [measure(position, batch, models) for position in tqdm(positions, "measuring", unit="position", leave=False)]
    first = rows[0]["krause ms"]
    for row in rows:
        row["krause, x the first"] = row["krause ms"] / first
    print(table(rows))
    print("ms: medians of one token. softmax / krause: medians of ratios, round by round.")
    if json_path is not None:
        write_json(json_path, {"machine": machine(), "model": MODEL, "batch": batch, "rows": rows})


def make_model(kind: str) -> LanguageModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig.model_validate(MODEL | {"attention": kind, "vocab_size": VOCABULARY})
    return build_language_model(config, seed=0).to(device).eval()


@torch.no_grad()
def check(kind: str) -> None:
    """Logits of a text that goes through the cache token by token are those of the whole text. In float64, where
    rounding selects no other keys; so not by the Triton kernel, which the tests compare with this."""
    model = make_model(kind).double()
    text = torch.randint(VOCABULARY, (1, CHECKED), generator=torch.Generator().manual_seed(0))
    text = text.to(next(model.parameters()).device)
    cache = model.new_cache()
    logits = torch.cat([model(token, cache=cache) for token in text.split(1, dim=1)], dim=1)
    error = float((logits - model(text)).abs().max())
    if error > 1e-9:
        raise UserError(f"{kind}: logits with a cache differ from those without by {error:.1e}; nothing was timed")


def measure(position: int, batch: int, models: dict[str, LanguageModel]) -> dict[str, Any]:
    """One row: one token at `position`."""
    steps: dict[str, Callable[[], Any]] = {}
    for kind, model in models.items():
        device = next(model.parameters()).device
        token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        steps[kind] = partial(_step, model, make_cache(model, batch, position), token, position)
    seconds = take_turns(steps, rounds=9)
    ms = {f"{kind} ms": statistics.median(times) * 1e3 / TOKENS for kind, times in seconds.items()}
    return {"position": position} | ms | {"softmax / krause": ratio(seconds["softmax"], seconds["krause"])}


def make_cache(model: LanguageModel, batch: int, position: int) -> ModelCache:
    """A cache as it would be after `position` tokens, of random numbers."""
    config, cache = model.config, model.new_cache()
    weight = next(model.parameters())
    for layer in cache.layers:
        seen = min(position, MODEL["window"]) if config.attention == "krause" else position
        k, v = torch.randn(2, batch, seen, config.num_kv_heads, config.head_size, dtype=weight.dtype).to(weight.device)
        if isinstance(layer, GrowingCache):
            layer.extend(k, v, 0)
        elif isinstance(layer, WindowCache):
            layer.ring(k).fill(k, v, position - seen)
    cache.position = position
    return cache


@torch.no_grad()
def _step(model: LanguageModel, cache: ModelCache, token: torch.Tensor, position: int) -> None:
    for _ in range(TOKENS):
        model(token, cache=cache)
    cache.position = position
