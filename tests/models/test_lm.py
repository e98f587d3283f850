"""The language model: caches, documents, causality, initial weights and what is said of its size.

In float64, where rounding is far from changing which keys are kept, and with large random weights, so that attention
is anything but uniform.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakrause.config import ModelConfig
from megakrause.errors import UserError
from megakrause.generate import generate_tokens
from megakrause.models.build import build_model, count_parameters
from megakrause.models.flops import flops_per_unit
from megakrause.models.init import initialize
from megakrause.models.lm import LanguageModel

WINDOW, VOCAB = 6, 23
BASE: dict[str, Any] = dict(
    layers=3, width=16, heads=4, kv_heads=2, mlp_width=24, window=WINDOW, top_k=3, vocab_size=VOCAB, init_std=0.3
)
MODELS: dict[str, dict[str, Any]] = {
    "krause": {},
    "softmax": dict(attention="softmax"),
    "softmax window": dict(attention="softmax_window"),
    "mixed": dict(attention=["krause", "softmax", "krause"]),
    "all kinds": dict(attention=["softmax_window", "krause", "softmax"]),
    "dual": dict(attention="dual"),
    "dual between others": dict(attention=["softmax", "dual", "krause"], qkv_bias=True, qk_norm=True),
    "whole window": dict(top_k=None, sigma=1.0),
    "learned positions": dict(positions="learned", max_positions=64),
    "window of one": dict(window=1, top_k=None),
    "wide heads, biases, tied": dict(head_dim=6, qkv_bias=True, tie_embeddings=True, kv_heads=None),
}


def make_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**(BASE | changes))


def make_model(**changes: Any) -> LanguageModel:
    model = build_model(make_config(**changes), seed=1).double().eval()
    with torch.no_grad():  # a bias that is zero, a norm that is one and equal sigmas would hide mistakes
        for i, (name, param) in enumerate(model.named_parameters()):
            if name.endswith(("bias", "norm.weight", "log_sigma")):
                param += 0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(i)).double()
    return model


def tokens(b: int, s: int) -> Tensor:
    return torch.randint(VOCAB, (b, s), generator=torch.Generator().manual_seed(s))


def assert_equal_logits(actual: Tensor, expected: Tensor) -> None:
    """Sums in another order, over three layers: some hundreds of float64's 2e-16."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# ---- caches


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("chunks", [[1] * 20, [9, 1, 1, 1, 8], [20], [3, 6, 1, 7, 3]], ids=str)
@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole(changes: dict[str, Any], chunks: list[int]) -> None:
    model, text = make_model(**changes), tokens(2, 20)
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in text.split(chunks, dim=1)]
    assert cache.position == 20 > 2 * WINDOW
    assert_equal_logits(torch.cat(parts, dim=1), model(text))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_generated_tokens_equal_those_of_recomputation(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    text = tokens(1, 5)[0].tolist()
    generated = list(generate_tokens(model, text, 3 * WINDOW))
    for token in generated:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(token)
    assert len(generated) == 3 * WINDOW
    assert len(set(generated)) > 1 or model.config.tie_embeddings  # which makes a small model repeat its input


@torch.no_grad()
def test_a_krause_layer_caches_a_window_at_most() -> None:
    model = make_model(attention=["krause", "softmax", "krause"])
    cache, seen = model.new_cache(), 0
    for part in tokens(2, 40).split([4, 1, 1, 1, 20, 1, 12], dim=1):
        model(part, cache=cache)
        seen += part.shape[1]
        first, middle, last = cache.layers
        assert middle.length == seen
        for layer in (first, last):
            ring = layer.ring(torch.empty(0))
            assert ring.k.shape == ring.v.shape == (2, WINDOW, 2, 4)
            assert ring.k.untyped_storage().nbytes() == ring.k.nbytes  # it holds on to nothing else


@torch.no_grad()
def test_learned_positions_run_out_with_a_clear_error() -> None:
    model = make_model(positions="learned", max_positions=10)
    model(tokens(1, 10))
    with pytest.raises(UserError, match="11 positions.*at most model.max_positions = 10"):
        model(tokens(1, 11))
    cache = model.new_cache()
    model(tokens(1, 9), cache=cache)
    model(tokens(1, 1), cache=cache)
    with pytest.raises(UserError, match="11 positions.*at most model.max_positions = 10"):
        model(tokens(1, 1), cache=cache)


# ---- who influences whom


@pytest.mark.parametrize(
    "attention", ["krause", "softmax", "softmax_window", "dual", ["softmax", "krause", "softmax_window"]], ids=str
)
@pytest.mark.parametrize("positions", ["rope", "learned"])
@torch.no_grad()
def test_documents_packed_in_one_sequence_are_as_alone(attention: Any, positions: str) -> None:
    model = make_model(attention=attention, positions=positions, max_positions=30)
    text, lengths = tokens(2, 30), [1, 17, 1, 2, 9]
    doc_start = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)]).int().expand(2, -1)
    packed = model(text, doc_start)
    alone = torch.cat([model(document) for document in text.split(lengths, dim=1)], dim=1)
    # Rotary angles of up to 30 radians are rounded in float32, and positions differ.
    torch.testing.assert_close(packed, alone, rtol=0, atol=30 * torch.finfo(torch.float32).eps)
    assert (packed - model(text)).abs().max() > 0.1


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_no_token_changes_anything_before_it(changes: dict[str, Any]) -> None:
    model, text = make_model(**changes), tokens(2, 30)
    other = text.clone()
    other[:, 17] = (text[:, 17] + 1) % VOCAB
    before, after = model(text), model(other)
    assert torch.equal(before[:, :17], after[:, :17])
    assert (before[:, 17] != after[:, 17]).any(-1).all()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_receptive_field_of_krause_layers(layers: int) -> None:
    """Every layer reaches window - 1 positions further back, and no layer a single one more."""
    model = make_model(layers=layers, top_k=None)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits, last = model(tokens(1, 30)), 27
    (gradient,) = torch.autograd.grad(logits[0, last].sum(), embedded[0])
    reached = (gradient[0] != 0).any(-1).nonzero()[:, 0].tolist()
    assert reached == list(range(last - layers * (WINDOW - 1), last + 1))


# ---- grouped queries and tied embeddings


@torch.no_grad()
def test_grouped_queries_are_full_attention_with_repeated_keys() -> None:
    grouped, full = make_model(kv_heads=2), make_model(kv_heads=4)
    for mine, theirs in zip(full.blocks.values(), grouped.blocks.values(), strict=True):
        for name in ("key", "value"):
            per_head = getattr(theirs.attention, name).weight.unflatten(0, (2, 4))  # h_kv d e
            weight = per_head.repeat_interleave(2, dim=0).flatten(0, 1)
            theirs_full = getattr(mine.attention, name).weight
            assert theirs_full.shape == weight.shape
            theirs_full.copy_(weight)
    weights = dict(grouped.named_parameters())
    for name, param in full.named_parameters():
        if "key" not in name and "value" not in name:
            param.copy_(weights[name])
    assert_equal_logits(full(tokens(2, 20)), grouped(tokens(2, 20)))


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = make_model(tie_embeddings=True), make_model()
    assert tied.head.output.weight is tied.embedding.tokens.weight
    assert "head.output.weight" not in dict(tied.named_parameters())
    assert count_parameters(untied) - count_parameters(tied) == VOCAB * 16
    assert not torch.equal(untied.head.output.weight, untied.embedding.tokens.weight)
    text = torch.zeros(1, 3, dtype=torch.int64)
    tied(text)[0, -1, 5].backward()
    gradient = tied.embedding.tokens.weight.grad
    assert gradient is not None and gradient[0].any() and gradient[5].any()  # as an input, and as an output


# ---- initial weights


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    def weights(seed: int = 1, **changes: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed * 100 + len(changes))  # the state of the global generator must not matter
        return dict(build_model(make_config(**changes), seed).state_dict())

    base, same = weights(), weights(layers=3, top_k=2, window=9)
    assert all(torch.equal(base[name], same[name]) for name in base)
    deeper = weights(layers=5)
    assert set(base) < set(deeper)
    for name, value in base.items():
        # What writes into the residual stream is scaled down with the number of layers.
        scale = (3 / 5) ** 0.5 if name.endswith(("attention.output.weight", "mlp.down.weight")) else 1.0
        torch.testing.assert_close(deeper[name], value * scale, rtol=1e-6 if scale < 1 else 0, atol=0)
    other = weights(seed=2)
    drawn = [name for name in base if base[name].std() > 0]
    assert len(drawn) == 2 + 3 * 7  # embedding, head and seven matrices a layer
    assert not any(torch.equal(base[name], other[name]) for name in drawn)
    shapes = [tuple(base[name].shape) for name in drawn]
    alike = [(a, b) for i, a in enumerate(drawn) for b in drawn[:i] if shapes[i] == base[b].shape]
    assert len(alike) > 20 and not any(torch.equal(base[a], base[b]) for a, b in alike)


def test_initial_weights_have_the_spread_that_the_config_says() -> None:
    config = make_config(width=128, mlp_width=256, vocab_size=500, sigma=4.0, qkv_bias=True, init_std=0.02)
    model = build_model(config, seed=3)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (param == 1).all()
        elif name.endswith("bias"):
            assert not param.any()
        elif name.endswith("log_sigma"):
            torch.testing.assert_close(param.exp(), torch.full((4,), 4.0))
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = 0.02 / 6**0.5 if residual else 0.02
            assert abs(param.std() / std - 1) < 4 / (2 * param.numel()) ** 0.5, name  # four standard deviations


def test_every_parameter_must_say_how_it_starts() -> None:
    model = build_model(make_config())
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AttributeError, match="initial_std"):
        initialize(model, seed=0)


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(UserError, match="model.vocab_size is missing"):
        build_model(make_config(vocab_size=None))


# ---- size and cost


def test_parameters_are_counted() -> None:
    layer = 16 + 4 + 16 * 16 + 2 * 16 * 8 + 16 * 16 + 16 + 3 * 16 * 24  # norm, log_sigma, q, k and v, output, norm, mlp
    assert count_parameters(make_model()) == VOCAB * 16 + 3 * layer + 16 + 16 * VOCAB
    softmax = count_parameters(make_model(attention="softmax"))
    assert softmax == count_parameters(make_model()) - 3 * 4  # no log_sigma
    assert count_parameters(make_model(qkv_bias=True)) == count_parameters(make_model()) + 3 * (16 + 8 + 8)
    learned = count_parameters(make_model(positions="learned", max_positions=10))
    assert learned == count_parameters(make_model()) + 10 * 16


@pytest.mark.parametrize("seq_len", [1, 4, WINDOW, 50])
@pytest.mark.parametrize("attention", ["krause", "softmax", ["softmax", "krause", "dual"]], ids=str)
def test_operations_are_counted(seq_len: int, attention: Any) -> None:
    config = make_config(attention=attention, head_dim=6)
    total = 0  # multiplications of one forward pass over a sequence
    for i in range(seq_len):
        total += 16 * VOCAB
        for kind in config.attention_of_layers:
            total += 3 * 16 * 24
            for branch in {"dual": ["softmax", "krause"]}.get(kind, [kind]):
                total += 16 * (4 * 6) + 2 * 16 * (2 * 6) + (4 * 6) * 16
                seen = min(i + 1, WINDOW) if branch == "krause" else i + 1
                total += 2 * 4 * 6 * seen  # scores, and weights times values
            total += 2 * 32 if kind == "dual" else 0  # the gate
    assert flops_per_unit(config, seq_len) == pytest.approx(3 * 2 * total / seq_len, rel=1e-12)
    assert flops_per_unit(config.model_copy(update={"tie_embeddings": True}), seq_len) == flops_per_unit(
        config, seq_len
    )
