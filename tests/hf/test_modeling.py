"""The modelling file that ships with exports computes what our own model does, in every way transformers uses it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from megakrause.config import ModelConfig
from megakrause.hf.export import hf_config
from megakrause.hf.modeling_megakrause import CACHE, MegakrauseForCausalLM, krause_attention
from megakrause.hf.names import from_hf, to_hf
from megakrause.models.build import build_model
from megakrause.models.lm import LanguageModel
from megakrause.ops.krause import krause_attention as our_krause_attention

SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
TINY: dict[str, Any] = dict(layers=3, width=24, heads=4, kv_heads=2, mlp_width=40, window=8, top_k=5, vocab_size=61)
CASES: dict[str, dict[str, Any]] = {
    "krause": {},
    "mixed": {"attention": ["krause", "softmax", "krause"]},
    "softmax window": {"attention": "softmax_window"},
    "all kinds": {"attention": ["softmax_window", "krause", "softmax"]},
    "softmax first": {"attention": ["softmax", "krause", "softmax"], "qkv_bias": True},
    "dual": {"attention": "dual"},
    "dual between others": {"attention": ["krause", "dual", "softmax"], "qkv_bias": True, "qk_norm": True},
    "no selection": {"top_k": None, "kv_heads": None},
    "selection of all": {"top_k": 20, "kv_heads": 1},
    "nearest only": {"top_k": 1, "tie_embeddings": True},
    "window of one": {"window": 1, "top_k": None},
    "wide window": {"window": 100, "top_k": 9},
    "learned": {"positions": "learned", "max_positions": 160, "head_dim": 5, "qkv_bias": True},
    "learned softmax": {"positions": "learned", "max_positions": 160, "attention": "softmax", "window": None},
}
every_case = pytest.mark.parametrize("case", CASES)


def models(case: str, dtype: torch.dtype = torch.float64) -> tuple[LanguageModel, MegakrauseForCausalLM]:
    """Our model and transformers', of the same weights, of which none has its initial value."""
    config = ModelConfig(**TINY | CASES[case])
    ours = build_model(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    theirs = MegakrauseForCausalLM(hf_config(config, 160, SPECIAL)).eval()
    weights = {to_hf(name): parameter for name, parameter in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if config.tie_embeddings else []) and not unexpected
    return ours.to(dtype), theirs.to(dtype)


def random_tokens(b: int, s: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 61, (b, s), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@every_case
@torch.no_grad()
def test_logits_are_ours(case: str) -> None:
    ours, theirs = models(case)
    tokens = random_tokens(2, 150)
    close(theirs(tokens).logits, ours(tokens))


@torch.no_grad()
def test_logits_are_ours_in_float32() -> None:
    ours, theirs = models("no selection", torch.float32)
    tokens = random_tokens(2, 150)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-5)


@every_case
def test_gradients_are_ours(case: str) -> None:
    ours, theirs = models(case)
    tokens = random_tokens(2, 100)
    for logits in (ours(tokens), theirs(tokens).logits):
        logits.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = {from_hf(name): parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and found[name] is not None, name
        close(found[name], gradient)


@pytest.mark.parametrize("top_k", [None, 3])
def test_attention_with_ties_is_ours(top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    # Few distinct keys, so that many are equally near; integers, so that any order of summing gives the same.
    q, k, v = (torch.randint(-1, 2, (2, 70, h, 4), generator=generator).double() for h in (4, 2, 2))
    log_sigma = torch.rand(4, generator=generator).double()
    arguments = [x.requires_grad_() for x in (q, k, v, log_sigma)]
    ours = our_krause_attention(*arguments, window=9, top_k=top_k, backend="reference")
    theirs = krause_attention(*(x.transpose(1, 2) for x in (q, k, v)), log_sigma, 9, top_k, None).transpose(1, 2)
    close(theirs, ours)
    weight = torch.randn(ours.shape, generator=generator).double()
    expected = torch.autograd.grad((ours * weight).sum(), arguments)
    for found, gradient in zip(torch.autograd.grad((theirs * weight).sum(), arguments), expected, strict=True):
        close(found, gradient)


def test_attention_stays_in_float32_under_autocast() -> None:
    q = torch.randn(1, 2, 70, 4, generator=torch.Generator().manual_seed(0))
    arguments = (q, q, q, torch.zeros(2), 9, 3, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = krause_attention(*arguments)
    assert torch.equal(found, krause_attention(*arguments))


def test_memory_is_linear_in_length() -> None:
    _, theirs = models("krause")

    def kept_for_backward(s: int) -> int:
        sizes: list[int] = []

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            theirs(random_tokens(1, s), use_cache=False)
        return sum(sizes)

    assert kept_for_backward(2048) < 2.1 * kept_for_backward(1024)


@every_case
@torch.no_grad()
def test_later_tokens_change_nothing(case: str) -> None:
    _, theirs = models(case)
    tokens = random_tokens(1, 90)
    changed = torch.cat([tokens[:, :70], random_tokens(1, 20, seed=1)], dim=1)
    close(theirs(changed).logits[:, :70], theirs(tokens).logits[:, :70])


@every_case
@torch.no_grad()
def test_padding_changes_nothing(case: str) -> None:
    _, theirs = models(case)
    long, short = random_tokens(1, 100)[0], random_tokens(1, 37, seed=1)[0]
    padding = torch.zeros(63, dtype=torch.int64)
    alone = theirs(short[None]).logits[0]
    for order, kept in ((padding, short), slice(63, None)), ((short, padding), slice(None, 37)):
        batch = torch.stack([long, torch.cat(order)])
        mask = torch.stack([torch.ones_like(long), torch.cat([(x is short) * torch.ones_like(x) for x in order])])
        logits = theirs(batch, attention_mask=mask).logits
        close(logits[1, kept], alone)
        close(logits[0], theirs(long[None]).logits[0])
        assert logits.isfinite().all()


@pytest.mark.parametrize("case", ["krause", "mixed", "softmax window", "learned"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(case: str) -> None:
    ours, theirs = models(case)
    lengths = [30, 1, 70]
    documents = [random_tokens(1, length, seed=length) for length in lengths]
    packed = torch.cat(documents, dim=1)
    alone = torch.cat([theirs(document).logits for document in documents], dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    close(theirs(packed, position_ids=positions).logits, alone)
    # Here rotary positions go on through the sequence, and float32 rounds their angles otherwise.
    found = theirs(packed, attention_mask=(positions == 0).cumsum(-1)).logits
    close(found, ours(packed, (torch.arange(101) - positions).int()))
    close(found, alone, tolerance=101 * torch.finfo(torch.float32).eps * float(alone.abs().max()))


@torch.no_grad()
def greedy(model: MegakrauseForCausalLM, prompt: Tensor, new: int) -> Tensor:
    """By recomputing everything for every token; prompt [s]."""
    tokens = prompt[None]
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :]


@every_case
@torch.no_grad()
def test_generation_with_and_without_cache_is_recomputation(case: str) -> None:
    ours, theirs = models(case)
    theirs.generation_config.eos_token_id = None
    prompts = [random_tokens(1, length, seed=length)[0] for length in (5, 40, 29)]  # one below, two beyond two windows
    batch = torch.stack([torch.cat([torch.zeros(40 - len(p), dtype=torch.int64), p]) for p in prompts])
    mask = torch.stack([(torch.arange(40) >= 40 - len(p)).long() for p in prompts])
    expected = torch.stack([greedy(theirs, prompt, 30) for prompt in prompts])
    for use_cache in (True, False):
        found = theirs.generate(
            batch, attention_mask=mask, max_new_tokens=30, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        assert torch.equal(found[:, 40:], expected)

    cache, tokens = ours.new_cache(), prompts[1][None]
    for token in expected[1]:
        assert ours(tokens, cache=cache)[0, -1].argmax() == token
        tokens = token.view(1, 1)


@pytest.mark.parametrize("case", ["krause", "mixed", "all kinds", "dual", "dual between others"])
@torch.no_grad()
def test_beams_are_reordered_in_the_cache(case: str) -> None:
    _, theirs = models(case)
    theirs.generation_config.eos_token_id = None
    prompt = random_tokens(2, 30)
    options: dict[str, Any] = dict(
        attention_mask=torch.ones_like(prompt), num_beams=3, max_new_tokens=20, pad_token_id=0
    )
    found = theirs.generate(prompt, use_cache=True, **options)
    assert torch.equal(found, theirs.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize(
    ("case", "held"),  # the next token completes a window of 8; branches stand behind all layers
    [("mixed", [7, 60, 7]), ("dual", [60, 60, 60, 7, 7, 7]), ("dual between others", [7, 60, 60, 7])],
)
@torch.no_grad()
def test_cache_rolls(case: str, held: list[int]) -> None:
    _, theirs = models(case)
    tokens = random_tokens(1, 60)
    expected = theirs(tokens).logits
    given: list[DynamicCache | None] = [None, DynamicCache(), DynamicCache(config=theirs.config)]
    for cache in given:
        pieces = []
        for part in tokens.split([25, 1, 4, 1, 29], dim=1):
            output = theirs(part, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            pieces.append(output.logits)
        close(torch.cat(pieces, dim=1), expected)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 60
    assert [layer.keys.shape[2] for layer in cache.layers] == held


@torch.no_grad()
def test_outputs() -> None:
    _, theirs = models("mixed")
    tokens = random_tokens(2, 50)
    labels = tokens.masked_fill(torch.arange(50) < 10, -100)
    output = theirs(tokens, labels=labels, output_hidden_states=True)
    log_p = output.logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[:, 9:]
    torch.testing.assert_close(output.loss.double(), -log_p.mean(), atol=1e-6, rtol=1e-6)
    assert len(output.hidden_states) == 4 and output.hidden_states[-1].shape == (2, 50, 24)
    close(theirs.lm_head(output.hidden_states[-1]), output.logits)
    close(theirs(tokens, logits_to_keep=3).logits, output.logits[:, -3:])
    close(theirs(inputs_embeds=theirs.model.embed_tokens(tokens)).logits, output.logits)
    assert torch.equal(theirs(tokens, return_dict=False)[0], output.logits)
    assert getattr(theirs(tokens, use_cache=False), CACHE) is None


def test_new_models_are_initialized() -> None:
    theirs = MegakrauseForCausalLM(hf_config(ModelConfig(**TINY), 160, SPECIAL))
    layer = theirs.model.layers[0]
    torch.testing.assert_close(layer.self_attn.log_sigma, torch.full((4,), math.log(2.5)))
    assert torch.equal(layer.input_layernorm.weight, torch.ones(24))
    assert 0.01 < float(layer.mlp.up_proj.weight.detach().std()) < 0.03


@pytest.mark.parametrize("shape", [(2, 1, 50, 50), (2, 49), (1, 50)])
def test_other_masks_are_refused(shape: tuple[int, ...]) -> None:
    _, theirs = models("krause")
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 50\]"):
        theirs(random_tokens(2, 50), attention_mask=torch.ones(shape))
