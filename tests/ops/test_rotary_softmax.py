"""Rotary positions, softmax attention and the summed cross entropy, against independent computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakrause.ops.rotary import apply_rotary, rotary_angles
from megakrause.ops.softmax import causal_mask, softmax_attention


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- rotary positions


def rotate(x: Tensor, first: int, theta: float = 10000.0) -> Tensor:
    """x [b, s, h, d] at positions first, first + 1, ..."""
    return apply_rotary(x, *rotary_angles(torch.arange(first, first + x.shape[1]), x.shape[-1], theta))


def test_rotation_keeps_lengths_and_position_zero() -> None:
    x = random(2, 9, 3, 8)
    torch.testing.assert_close(rotate(x, 5).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)  # angles are float32
    assert torch.equal(rotate(x, 0)[:, 0], x[:, 0])
    assert not torch.isclose(rotate(x, 0)[:, 1:], x[:, 1:]).all()


def test_products_depend_on_relative_positions_alone() -> None:
    q, k = random(1, 12, 2, 8, seed=1), random(1, 12, 2, 8, seed=2)

    def products(shift: int) -> Tensor:
        return torch.einsum("bihd,bjhd->bhij", rotate(q, shift), rotate(k, shift))

    torch.testing.assert_close(products(37), products(0), rtol=0, atol=1e-4)  # float32 angles of up to 48 radians
    assert not torch.allclose(products(0), torch.einsum("bihd,bjhd->bhij", rotate(q, 1), rotate(k, 0)), atol=1e-2)


def test_angles_can_differ_between_sequences() -> None:
    x = random(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    both = apply_rotary(x, *rotary_angles(positions, 8, 10000.0))
    assert torch.equal(both, torch.cat([rotate(x[:1], 0), rotate(x[1:], 7)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_that_of_llama(dtype: torch.dtype) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = random(2, 30, 4, 16, seed=1).to(dtype), random(2, 30, 2, 16, seed=2).to(dtype)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(3, 33)[None])
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, turned in zip((q, k), expected, strict=True):
        actual = rotate(x, 3, theta=500.0)
        assert actual.dtype == dtype
        # Angles of up to 33 radians in float32, whose powers of theta are computed in another order.
        tolerance = 33 * torch.finfo(torch.float32).eps + (dtype == torch.bfloat16) * torch.finfo(dtype).eps
        torch.testing.assert_close(actual, turned.transpose(1, 2), rtol=tolerance, atol=tolerance)


# ---- softmax attention


def dense(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, window: int | None) -> Tensor:
    """One query after the other."""
    (b, s, h, d), (s_k, h_kv) = q.shape, k.shape[1:3]
    rows = []
    for n in range(b):
        for i in range(s):
            first = 0 if doc_start is None else int(doc_start[n, i])
            first = first if window is None else max(first, s_k - s + i - window + 1)
            keys, values = (x[n, first : s_k - s + i + 1].repeat_interleave(h // h_kv, dim=1) for x in (k, v))
            p = torch.softmax(torch.einsum("hd,jhd->hj", q[n, i], keys) / d**0.5, dim=-1)
            rows.append(torch.einsum("hj,jhd->hd", p, values))
    return torch.stack(rows).view(b, s, h, d)


DOCUMENTS = [0, 0, 0, 3, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("window", [None, 1, 3, 4, 9, 20])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("s, s_k", [(1, 1), (1, 9), (5, 9), (9, 9)])
@pytest.mark.parametrize("h, h_kv", [(2, 2), (4, 2), (4, 1)])
def test_softmax_attention(s: int, s_k: int, h: int, h_kv: int, documents: bool, window: int | None) -> None:
    q, k, v = random(2, s, h, 8, seed=1), random(2, s_k, h_kv, 8, seed=2), random(2, s_k, h_kv, 8, seed=3)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    doc_start = None
    if documents:
        doc_start = torch.tensor([DOCUMENTS[:s_k][-s:], [0] * s], dtype=torch.int32)
    upstream = random(2, s, h, 8, seed=4)
    expected = dense(q, k, v, doc_start, window)
    out = softmax_attention(q, k, v, window=window, doc_start=doc_start)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    )
    for actual, value in pairs:
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-13)


def test_masks_are_only_made_where_they_are_needed() -> None:
    device = torch.device("cpu")
    assert causal_mask(9, 9, None, device) is None
    assert causal_mask(1, 9, None, device) is None
    mask = causal_mask(2, 3, None, device)
    assert mask is not None and mask.tolist() == [[[[True, True, False], [True, True, True]]]]
