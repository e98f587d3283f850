"""Language models with Krause attention for transformers. This file ships with every export and stands alone.

For query i of one head, with sigma = exp(log_sigma), attention goes to the nearest of the last `window` keys, i itself
included (Krause Synchronization Transformers, arXiv 2602.11534):

    z_ij = q_i . k_j - ||k_j||^2 / 2             -||q_i - k_j||^2 / 2 up to a constant of the row; in float32 at least
    keep(i) = the keys whose z is among the top_k largest of the row, ties with the last one included; None: all
    out_i = sum_j p_ij v_j,   p_i = softmax of z_i / sigma^2 over keep(i)

Shapes: b batch, s new positions, s_k key positions (the new ones are the last s of them), e width, h query heads,
h_kv key/value heads, d head size, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

# What outputs call the cache, and generate() the argument: "past_key_values" until transformers 5.23.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MegakrauseConfig(PretrainedConfig):
    """attention: "krause", "softmax", "softmax_window" or "dual" for each layer. krause_sigma: initial width of the
    kernel of every head (`top_k` alone would be taken for generate()'s). qk_norm: heads' queries and keys are
    normalized before rotation. position_scaling: of rotary positions, Llama 3.1's or linear. learned_positions: a table
    of max_position_embeddings positions in place of rotary ones. norm: "rms" or "layer"; post_norm: norms follow the
    sums. mlp: "swiglu" or "gelu". bias: of the attention's output, the MLP and the head."""

    model_type = "megakrause"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"sliding_window": "krause_window"}

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        attention: Sequence[str] | None = None,
        krause_window: int | None = 128,
        krause_top_k: int | None = None,
        krause_sigma: float = 2.5,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm: str = "rms",
        post_norm: bool = False,
        mlp: str = "swiglu",
        bias: bool = False,
        learned_positions: bool = False,
        rope_theta: float = 10000.0,
        position_scaling: dict[str, Any] | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.attention = list(attention or ["krause"] * num_hidden_layers)
        self.krause_window = krause_window
        self.krause_top_k = krause_top_k
        self.krause_sigma = krause_sigma
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.norm = norm
        self.post_norm = post_norm
        self.mlp = mlp
        self.bias = bias
        self.learned_positions = learned_positions
        self.rope_theta = rope_theta
        self.position_scaling = position_scaling
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        super().__init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What `DynamicCache` reads: a Krause layer caches like one with a sliding window, only its weights differ."""
        return ["full_attention" if kind in ("softmax", "dual") else "sliding_attention" for kind in self.attention]


def krause_attention(
    q: Tensor,  # [b, h, s, d]
    k: Tensor,  # [b, h_kv, s_k, d]
    v: Tensor,  # [b, h_kv, s_k, d]
    log_sigma: Tensor,  # [h]
    window: int,
    top_k: int | None,
    segments: Tensor | None,  # int [b, s_k]
) -> Tensor:  # [b, h, s, d]
    """Works on a chunk of queries at a time, so that memory is linear in s.

    segments: positions with different numbers do not see each other."""
    heads = k.shape[1], q.shape[1] // k.shape[1]  # h_kv, h / h_kv
    positions = torch.arange(k.shape[2], device=q.device)
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    stop, outputs = k.shape[2] - q.shape[2], []
    with torch.autocast(q.device.type, enabled=False):
        inverse_variance = torch.exp(-2 * log_sigma.to(compute)).view(*heads, 1, 1)
        q, k, v = q.to(compute).unflatten(1, heads), k.to(compute)[:, :, None], v.to(compute)[:, :, None]
        for chunk in q.split(max(window, 64), dim=-2):
            start, stop = stop, stop + chunk.shape[-2]
            near = slice(max(0, start - window + 1), stop)
            z = chunk @ k[..., near, :].mT - k[..., near, :].square().sum(-1).unsqueeze(-2) / 2
            keep = visible(positions[start:stop], positions[near], window, segments)
            if top_k is not None and top_k < min(window, z.shape[-1]):
                last = z.detach().masked_fill(~keep, -torch.inf).topk(top_k, dim=-1).values[..., -1:]
                keep = keep & (z >= last)
            p = torch.softmax((z * inverse_variance).masked_fill(~keep, -torch.inf), dim=-1)
            outputs.append(p @ v[..., near, :])  # b h_kv h/h_kv chunk d
    return torch.cat(outputs, dim=-2).flatten(1, 2).to(dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Tensor | None) -> Tensor:
    """Arguments and result as of `krause_attention`."""
    s, s_k = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if window is not None and window < s_k and s == 1:
        k, v = k[:, :, -window:], v[:, :, -window:]
        segments, s_k, window = None if segments is None else segments[:, -window:], window, None
    if segments is None and s in (1, s_k) and (window is None or window >= s_k):
        return F.scaled_dot_product_attention(q, k, v, is_causal=s > 1)
    positions = torch.arange(s_k, device=q.device)
    seen = visible(positions[-s:], positions, window or s_k, segments)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.flatten(1, 2))


def visible(queries: Tensor, keys: Tensor, window: int, segments: Tensor | None) -> Tensor:
    """bool [b or 1, 1, 1, queries, keys]: no later key, none beyond the window, none of another segment; itself always.

    queries, keys: positions on the key axis."""
    distance = queries[:, None] - keys
    seen = ((distance >= 0) & (distance < window))[None]
    if segments is not None:
        seen = seen & (segments[:, queries, None] == segments[:, None, keys])
    return seen[:, None, None]


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: dict[str, Any] | None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [b, 1, s, d], of positions [b, s]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        slow, kept = frequencies / scaling["factor"], torch.zeros_like(frequencies)
        if scaling["kind"] == "llama3":  # short waves stay as they are
            waves = frequencies * (scaling["original_positions"] / (2 * math.pi))
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = ((waves - low) / (high - low)).clamp(0, 1)
        frequencies = torch.lerp(slow, frequencies, kept)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [b, h, s, d], halves against each other as in Llama."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], dim=-1) * sin.to(x.dtype)


class MegakrauseRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm_of(config: MegakrauseConfig) -> nn.Module:
    """The norm between layers."""
    kind = nn.LayerNorm if config.norm == "layer" else MegakrauseRMSNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class MegakrauseAttention(nn.Module):
    def __init__(self, config: MegakrauseConfig, kind: str, cache_layer: int):
        super().__init__()
        self.cache_layer, self.head_dim = cache_layer, config.head_dim
        self.window = None if kind == "softmax" else config.krause_window
        self.top_k, self.sigma = config.krause_top_k, config.krause_sigma
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (MegakrauseRMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))
        self.log_sigma: nn.Parameter | None = None
        if kind == "krause":
            self.log_sigma = nn.Parameter(torch.full((config.num_attention_heads,), math.log(config.krause_sigma)))

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, segments: Tensor | None, cache: Cache | None
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)  # b h s d
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.cache_layer)
        if segments is not None:
            segments = segments[:, -k.shape[2] :]
        if self.log_sigma is None:
            out = softmax_attention(q, k, v, self.window, segments)
        else:
            assert self.window is not None
            out = krause_attention(q, k, v, self.log_sigma, self.window, self.top_k, segments)
        return self.o_proj(out.transpose(1, 2).flatten(-2))  # b s e


class MegakrauseDualAttention(MegakrauseAttention):
    """Softmax attention and a Krause branch, mixed for each position by a gate that reads both outputs."""

    def __init__(self, config: MegakrauseConfig, layer: int):
        super().__init__(config, "softmax", layer)
        cache_layer = config.num_hidden_layers + config.attention[:layer].count("dual")  # see `add_branches`
        self.krause = MegakrauseAttention(config, "krause", cache_layer)
        self.gate = nn.Linear(2 * config.hidden_size, 2)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, segments: Tensor | None, cache: Cache | None
    ) -> Tensor:
        softmax, krause = super().forward(x, rotary, segments, cache), self.krause(x, rotary, segments, cache)
        logits = self.gate(torch.cat([softmax, krause], dim=-1))
        share = torch.sigmoid(logits[..., :1] - logits[..., 1:])  # the first of a softmax over two
        return torch.lerp(krause, softmax, share)


class MegakrauseMLP(nn.Module):
    def __init__(self, config: MegakrauseConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.bias) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(width, inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegakrauseLayer(nn.Module):
    def __init__(self, config: MegakrauseConfig, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.input_layernorm = norm_of(config)
        kind = config.attention[layer]
        self.self_attn = (
            MegakrauseDualAttention(config, layer) if kind == "dual" else MegakrauseAttention(config, kind, layer)
        )
        self.post_attention_layernorm = norm_of(config)
        self.mlp = MegakrauseMLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, segments: Tensor | None, cache: Cache | None
    ) -> Tensor:
        if self.post_norm:
            x = self.input_layernorm(x + self.self_attn(x, rotary, segments, cache))
            return self.post_attention_layernorm(x + self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), rotary, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MegakrausePreTrainedModel(PreTrainedModel):
    config_class = MegakrauseConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegakrauseLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegakrauseAttention) and module.log_sigma is not None:
            init.constant_(module.log_sigma, math.log(module.sigma))
        if isinstance(module, MegakrauseDualAttention):
            init.normal_(module.gate.weight, std=0.01)
            init.copy_(module.gate.bias, torch.tensor([math.log(4), 0.0]))  # 0.8 : 0.2


def add_branches(cache: Cache, attention: list[str], window: int) -> None:
    """Gives a new cache a layer for the Krause branch of every dual layer, behind those of all layers."""
    if len(cache.layers) == len(attention):
        cache.layers += [DynamicSlidingWindowLayer(sliding_window=window) for kind in attention if kind == "dual"]


def positions_in_documents(mask: Tensor) -> Tensor:
    """int64 [b, s]: how many positions of its own document stand before each."""
    index = torch.arange(mask.shape[1], device=mask.device)
    begins = mask.ne(F.pad(mask, (1, 0), value=-1)[:, :-1])
    return index - (index * begins).cummax(-1).values


class MegakrauseModel(MegakrausePreTrainedModel):
    def __init__(self, config: MegakrauseConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MegakrauseLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm_of(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask: int [b, past + s]; positions see only those with their own number, so that 0 for padding
        (on either side) and 1 for text works, and so does a number for each of several packed documents. Without a
        mask and a past, positions that start anew in position_ids, int [b or 1, s], open a document.
        past_key_values: another name of the cache."""
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # b s e
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if cache is not None:
            add_branches(cache, self.config.attention, self.config.krause_window)
        past = 0 if cache is None else cache.get_seq_length()
        end = past + x.shape[1]
        if attention_mask is not None and getattr(attention_mask, "shape", None) != (x.shape[0], end):
            raise ValueError(
                f"attention_mask must be [{x.shape[0]}, {end}]: a number for every position, cached ones included; "
                "masks of four dimensions and caches of fixed size are not supported"
            )
        if position_ids is None:
            text = x.new_ones(1, end) if attention_mask is None else attention_mask
            position_ids = (text.ne(0).cumsum(-1) - 1).clamp(min=0)
            if self.embed_positions is not None and bool((text > 1).any()):
                position_ids = positions_in_documents(text)
            position_ids = position_ids[:, past:]
        elif attention_mask is None and past == 0:
            attention_mask = (position_ids.diff(dim=-1, prepend=position_ids[:, :1]) != 1).cumsum(-1)
            attention_mask = attention_mask.expand(x.shape[0], -1)
        if attention_mask is not None and bool((attention_mask == attention_mask[:, :1]).all()):
            attention_mask = None

        rotary = None
        if self.embed_positions is None:
            config = self.config
            rotary = rotary_angles(position_ids, config.head_dim, config.rope_theta, config.position_scaling)
        else:
            x = x + self.embed_positions(position_ids)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: tuple[Tensor, ...] | None = () if keep_states else None
        for layer in self.layers:
            states = None if states is None else (*states, x)
            x = layer(x, rotary, attention_mask, cache)
        x = self.norm(x)
        states = None if states is None else (*states, x)
        named: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states, **named)


class MegakrauseForCausalLM(MegakrausePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegakrauseConfig):
        super().__init__(config)
        self.model = MegakrauseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, v] of the next token, and the loss where labels (int64 [b, s], -100: not counted) are given.
        logits_to_keep: of the last so many positions only, or of these; 0: of all."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )
