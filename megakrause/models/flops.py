"""What a model has to compute, counted from its config: products only, a multiplication and an addition each."""

from __future__ import annotations

from dataclasses import dataclass

from megakrause.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Of one image, forwards."""

    needed: int  # scores of the keys that a query sees, and sums over those that it keeps
    executed: int  # what is computed, part of it to be masked


def flops_per_unit(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, pixel value or image: forward and twice as many
    backward."""
    return 3 * image_flops(config).needed if config.unit == "image" else sum(flops_of_layers(config, seq_len))


def flops_of_layers(config: ModelConfig, seq_len: int) -> list[float]:
    """Of each block and of the head, for one token, or one patch of a vit: forward and twice as many backward. Frozen
    weights have no gradients, and so one product less; what adapters add is not counted.

    A query meets at most its layer's `window` keys, or (seq_len + 1) / 2 on average; document masks are not taken into
    account."""
    q, kv, width = config.heads * config.head_size, config.num_kv_heads * config.head_size, config.width
    if config.kind == "vit":
        # Of an image, evenly on its patches and layers; all pairs of patches are computed.
        assert config.classes is not None
        head = 6 * width * config.classes / seq_len
        return [(3 * image_flops(config).executed / seq_len - head) / config.layers] * config.layers + [head]
    assert config.vocab_size is not None

    passes = 3 if config.lora is None else 2

    def attention(limit: int | None) -> float:
        scores = 2 * q * _causal_pairs(seq_len, limit) / seq_len
        return 2 * passes * width * (2 * q + 2 * kv) + 2 * 3 * scores

    def block(layer: int) -> float:
        flops = 2 * passes * _mlp(config) + attention(config.window_of_layers[layer])
        if config.attention_of_layers[layer] == "dual":
            flops += attention(config.window) + 2 * 3 * 2 * 2 * width
        return flops

    return [block(layer) for layer in range(config.layers)] + [2 * passes * width * config.vocab_size]


def image_flops(config: ModelConfig) -> Flops:
    """Of a model of images. In a vit's Krause layers all pairs of patches are computed: on grids of this size
    that is faster than to gather neighbours."""
    if config.kind == "swin":
        return _swin_flops(config)
    s, q = config.length, config.heads * config.head_size
    assert s is not None
    kv = config.num_kv_heads * config.head_size
    if config.kind == "vit":
        assert config.classes is not None and config.patch_size is not None
        rows, columns = config.patches
        ends = rows * columns * config.channels * config.patch_size**2 * config.width + config.width * config.classes
    else:
        assert config.vocab_size is not None
        ends = s * config.width * config.vocab_size
    same = ends + config.layers * s * (config.width * (2 * q + 2 * kv) + _mlp(config))
    needed = executed = same
    for layer, kind in enumerate(config.attention_of_layers):
        if config.kind == "vit":
            sizes = neighbourhood_sizes(config) if kind == "krause" else [s] * s
            pairs, all_pairs = sum(sizes), s * s
        else:
            limit = config.window_of_layers[layer]
            sizes = [min(i + 1, limit or s) for i in range(s)]
            pairs = all_pairs = _causal_pairs(s, limit)
        top_k = config.top_k_of_layers[layer] if kind == "krause" else None
        kept = sum(min(size, top_k or size) for size in sizes)
        needed += q * (pairs + kept)
        executed += q * 2 * all_pairs
    return Flops(2 * needed, 2 * executed)


def _swin_flops(config: ModelConfig) -> Flops:
    assert config.patch_size is not None and config.classes is not None
    assert config.depths is not None and config.window is not None
    rows, columns = config.patches
    total = rows * columns * config.channels * config.patch_size**2 * config.width
    for stage, ((rows, columns), depth) in enumerate(zip(config.stage_grids, config.depths, strict=True)):
        s, width = rows * columns, config.width << stage
        side = min(rows, columns, config.window)
        total += depth * s * (4 * width**2 + 2 * width * (config.mlp_width << stage) + 2 * side**2 * width)
        total += s * 2 * width**2 if stage else 0  # its patches are made of four of half the width
    total += (config.width << (len(config.depths) - 1)) * config.classes
    return Flops(2 * total, 2 * total)


def neighbourhood_sizes(config: ModelConfig) -> list[int]:
    """How many keys each position of a vit's Krause layer sees, itself included."""
    rows, columns = config.patches
    cls, r = int(config.pooling == "cls"), config.radius

    def near(row: int, column: int) -> int:
        count = 0
        for other in range(max(0, row - r), min(rows, row + r + 1)):
            reach = r - abs(other - row) if config.metric == "manhattan" else r
            count += min(columns, column + reach + 1) - max(0, column - reach)
        return count

    return [rows * columns + 1] * cls + [near(row, column) + cls for row in range(rows) for column in range(columns)]


def _causal_pairs(s: int, limit: int | None) -> int:
    """Of a query and a key that it sees, at most `limit` back."""
    window = min(limit or s, s)
    return s * window - window * (window - 1) // 2


def _mlp(config: ModelConfig) -> int:
    """Products of one position's MLP."""
    return (3 if config.mlp == "swiglu" else 2) * config.width * config.mlp_width
