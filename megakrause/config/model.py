"""What a model is."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from megakrause.config.section import Section

ModelKind = Literal["lm", "image", "vit", "swin"]
CoreKind = Literal["krause", "softmax", "softmax_window"]
AttentionKind = Literal["krause", "softmax", "softmax_window", "dual"]


class RopeScaling(Section):
    """How rotary positions are stretched (ops/rotary.py)."""

    kind: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_positions: int = Field(default=8192, gt=0, description="length that the model was trained on at first")


# fmt: off
AdapterTarget = Literal[
    "query", "key", "value", "output", "gate", "up", "down",
    "attention.query", "attention.key", "attention.value", "attention.output",
    "krause.query", "krause.key", "krause.value", "krause.output",
]
# fmt: on


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights (models/lora.py). Trained are the adapters and, of Krause attention, the
    widths of the kernels and the gates of dual layers."""

    rank: int = Field(gt=0)
    alpha: float = Field(gt=0, description="an adapter's output is multiplied by alpha / rank")
    rank_stabilized: bool = Field(default=False, description="by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the features that an adapter does not see")
    targets: list[AdapterTarget] = Field(
        default=["query", "key", "value", "output"],
        min_length=1,
        description="projections with an adapter: query, key, value, output of both branches of a dual layer; of one "
        "with attention. or krause. before it; gate, up, down of the MLP",
    )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


# The keys that not all kinds of model have, and what a kind sets where a config does not.
KEYS: dict[str, set[str]] = {
    "lm": {"kv_heads", "window", "qk_norm", "positions", "rope_theta", "rope_scaling", "max_positions"}
    | {"tie_embeddings", "vocab_size", "lora"},
    "image": {"image_size", "channels", "kv_heads", "window"},
    "vit": {"image_size", "channels", "patch_size", "classes", "radius", "metric", "top_k_last", "pooling"}
    | {"shared_sigma", "drop_path"},
    "swin": {"image_size", "channels", "patch_size", "classes", "window", "depths", "drop_path"},
}
TRANSFORMER = {"norm": "layer", "mlp": "gelu", "bias": True, "qkv_bias": True}  # as the first ones were
PRESETS: dict[str, dict[str, Any]] = {
    "lm": {},
    "image": TRANSFORMER | {"positions": "learned", "vocab_size": 256},
    "vit": TRANSFORMER | {"shared_sigma": True},
    "swin": TRANSFORMER,
}


class ModelConfig(Section):
    """A stack of blocks, each with an attention and an MLP. `kind` says what is at its ends:

    lm: a decoder language model of the Llama kind; each layer's attention is Krause, softmax, windowed softmax, or
    dual: softmax with a Krause branch beside it (models/dual.py). image: the same over the pixel values of an image,
    in raster order, channels last. vit: a classifier of images by patches, whose Krause layers look around on the grid.
    swin: one that looks around in windows of patches, in stages (models/swin.py); width, heads and mlp_width are those
    of the first stage, and double from stage to stage.

    A key that other kinds have is refused; norm, mlp, bias and qkv_bias have the defaults of the Llama kind in an lm,
    and are "layer", "gelu", true and true in the others."""

    kind: ModelKind = "lm"
    layers: int = Field(gt=0)
    width: int = Field(gt=0, description="size of the residual stream")
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int | None = Field(default=None, gt=0, description="key/value heads; default: heads")
    head_dim: int | None = Field(default=None, gt=0, description="default: width / heads")
    mlp_width: int = Field(gt=0, description="inner size of the MLP")
    attention: AttentionKind | list[AttentionKind] = Field(
        default="krause", description="one word for all layers, or one word a layer"
    )
    window: int | None = Field(
        default=None,
        gt=0,
        description="keys that a query sees, itself included, not of softmax layers; of a swin, patches of a side",
    )
    top_k: int | None = Field(default=None, gt=0, description="keys kept per Krause query; left out: all that it sees")
    sigma: float = Field(default=2.5, gt=0, description="initial width of the RBF kernel of every head")
    norm: Literal["rms", "layer"] = Field(default="rms", description="RMSNorm, or LayerNorm")
    norm_placement: Literal["pre", "post"] = Field(
        default="pre", description="of what goes into attention and MLP, or of the sums behind them"
    )
    norm_eps: float = Field(default=1e-5, gt=0)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = Field(default=False, description="of the attention's output, the MLP and the head")
    qkv_bias: bool = False
    qk_norm: bool = Field(
        default=False, description="normalize every head's queries and keys before rotation, as Qwen3"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the features dropped from embeddings and of what blocks add"
    )
    init_std: float = Field(default=0.02, gt=0)

    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = Field(default=None, gt=0, description="size of the table of learned positions")
    tie_embeddings: bool = False
    vocab_size: int | None = Field(default=None, gt=0, description="default: the tokenizer's")
    lora: LoraConfig | None = None

    image_size: int | Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="pixels of a side, or [height, width]"
    )
    channels: Literal[1, 3] = Field(default=3, description="1: gray, 3: red, green, blue")

    patch_size: int | None = Field(default=None, gt=0, description="pixels of a patch's side")
    classes: int | None = Field(default=None, gt=1)
    radius: int = Field(default=1, ge=0, description="of a Krause layer's neighbourhood on the grid, in patches")
    metric: Literal["manhattan", "chebyshev"] = "manhattan"
    top_k_last: int | None = Field(
        default=None, gt=0, description="top_k of the last layer, to which it grows evenly; default: the same"
    )
    pooling: Literal["cls", "mean"] = Field(
        default="cls", description="a class is read from a token of its own, or from the mean of the patches"
    )
    shared_sigma: bool = Field(default=False, description="one sigma a layer, not one a head")
    depths: list[Annotated[int, Field(gt=0)]] | None = Field(
        default=None, min_length=1, description="blocks of each stage; model.layers in all"
    )
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="share of the images for which the last block is left out; earlier: fewer"
    )

    @model_validator(mode="before")
    @classmethod
    def fill(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or (kind := tree.get("kind", "lm")) not in KEYS:
            return tree
        foreign = set().union(*KEYS.values()) - KEYS[kind]
        if wrong := [key for key in tree if key in foreign]:
            kinds = [other for other in KEYS if wrong[0] in KEYS[other]]
            of = " or ".join(kinds)
            raise ValueError(f"model.{wrong[0]} is a key of model.kind = {of}, not of {kind}; remove it")
        return PRESETS[kind] | tree

    @model_serializer(mode="wrap")
    def own_keys(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = set().union(*KEYS.values()) - KEYS[self.kind]
        return {key: value for key, value in inner(self).items() if key not in foreign}

    @model_validator(mode="after")
    def check(self) -> ModelConfig:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"model.kv_heads = {self.kv_heads} does not divide model.heads = {self.heads}; use one of {divisors}"
            )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"model.width = {self.width} is no multiple of model.heads = {self.heads}; "
                "change one or set model.head_dim"
            )
        if isinstance(self.attention, list) and len(self.attention) != self.layers:
            raise ValueError(
                f"model.attention lists {len(self.attention)} layers, model.layers = {self.layers}; they must agree"
            )
        if self.kind == "lm":
            self._check_language_model()
        else:
            self._check_images()
        if self.kind == "swin":
            self._check_swin()
        if self.kind in ("lm", "image") and self.window is None and set(self.attention_of_layers) != {"softmax"}:
            raise ValueError(
                "model.window is missing; krause, dual and softmax_window layers need one, such as model.window = 128"
            )
        return self

    def _check_language_model(self) -> None:
        if "dual" in self.attention_of_layers and self.bias:
            raise ValueError("model.bias = true does not go with dual layers; use model.bias = false")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"model.head_dim = {self.head_size} is odd; "
                f"rotary positions need an even one, such as {self.head_size + 1}"
            )
        targets = [] if self.lora is None else self.lora.targets
        odd = [target for target in targets if target.startswith("krause.")]
        if odd and "dual" not in self.attention_of_layers:
            raise ValueError(f"model.lora.targets has {odd[0]!r}; only dual layers have a Krause branch")
        if self.mlp == "gelu" and "gate" in targets:
            raise ValueError("model.lora.targets has 'gate'; an MLP of kind 'gelu' has only 'up' and 'down'")
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("model.max_positions is missing; learned positions need one, at least train.seq_len")

    def _check_images(self) -> None:
        needed = ["image_size"] + (["patch_size", "classes"] if self.kind in ("vit", "swin") else [])
        needed += ["window", "depths"] if self.kind == "swin" else []
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f"model.{missing[0]} is missing; a model of kind {self.kind} needs one")
        legal = ("krause", "softmax", "softmax_window") if self.kind == "image" else ("krause", "softmax")
        if wrong := [kind for kind in self.attention_of_layers if kind not in legal]:
            raise ValueError(f"model.attention = {wrong[0]!r} is none of kind {self.kind}; use one of {list(legal)}")
        height, width, _ = self.image_shape
        if min(height, width) < 1:
            raise ValueError(f"model.image_size = {self.image_size} must be at least 1")
        if self.patch_size is not None and (height % self.patch_size or width % self.patch_size):
            divisors = [n for n in range(1, min(height, width) + 1) if height % n == width % n == 0]
            raise ValueError(
                f"model.patch_size = {self.patch_size} does not divide model.image_size = {self.image_size}; "
                f"use one of {divisors}"
            )

    def _check_swin(self) -> None:
        assert self.depths is not None and self.window is not None
        if sum(self.depths) != self.layers:
            total = sum(self.depths)
            raise ValueError(f"model.depths = {self.depths} are {total} blocks, model.layers = {self.layers}")
        only: dict[str, Any] = TRANSFORMER | {"norm_placement": "pre", "qk_norm": False, "dropout": 0.0, "top_k": None}
        for key, value in only.items():
            if (given := getattr(self, key)) != value:
                raise ValueError(f"model.{key} = {given!r}: a swin knows no other than {value!r}; leave it out")
        factor = 2 ** (len(self.depths) - 1)
        if any(side % factor for side in self.patches):
            grid = f"{self.patches[0]} x {self.patches[1]}"
            raise ValueError(f"model.patch_size = {self.patch_size} leaves {grid} patches, no multiples of {factor}")
        for rows, columns in self.stage_grids:
            side = min(rows, columns, self.window)
            if rows % side or columns % side:
                raise ValueError(f"model.window = {self.window} does not divide a stage's {rows} x {columns} patches")

    @property
    def stage_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of patches of each stage of a swin."""
        rows, columns = self.patches
        return [(rows >> stage, columns >> stage) for stage in range(len(self.depths or []))]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images of a model of such."""
        assert self.image_size is not None
        height, width = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        return height, width, self.channels

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a vit."""
        assert self.patch_size is not None
        height, width, _ = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def length(self) -> int | None:
        """Positions of a sequence, where it is for the model to say: each pixel value but the last of an image predicts
        the next; a vit has its patches and the token that a class is read from."""
        match self.kind:
            case "image":
                return math.prod(self.image_shape) - 1
            case "vit":
                return math.prod(self.patches) + (self.pooling == "cls")
            case "swin":
                return math.prod(self.patches)
        return None

    @property
    def unit(self) -> str:
        """What losses are means over, in the singular: what a model predicts at each position, or once an image."""
        return {"lm": "token", "image": "value"}.get(self.kind, "image")

    @property
    def num_positions(self) -> int | None:
        """Size of the table of learned positions of an lm or image model."""
        return math.prod(self.image_shape) if self.kind == "image" else self.max_positions

    @property
    def top_k_of_layers(self) -> list[int | None]:
        """The keys that a Krause query of each layer keeps; None: all that it sees."""
        if self.top_k is None or self.top_k_last is None or self.layers == 1:
            return [self.top_k] * self.layers
        growth = (self.top_k_last - self.top_k) / (self.layers - 1)
        return [round(self.top_k + growth * layer) for layer in range(self.layers)]

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0 or self.drop_path > 0 or (self.lora is not None and self.lora.dropout > 0)

    @property
    def attention_of_layers(self) -> list[AttentionKind]:
        """The attention of each layer, in order."""
        return self.attention if isinstance(self.attention, list) else [self.attention] * self.layers

    @property
    def window_of_layers(self) -> list[int | None]:
        """How many keys a query of each layer sees at most, itself included; None for all."""
        return [None if kind in ("softmax", "dual") else self.window for kind in self.attention_of_layers]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def legal_tp(self) -> list[int]:
        """How many tensor-parallel ranks can share the heads: each has whole ones, and those of its queries' keys."""
        kv = self.num_kv_heads
        return [n for n in range(1, self.heads + 1) if self.heads % n == 0 and (kv % n == 0 or n % kv == 0)]

    @property
    def deep_init_std(self) -> float:
        """init_std of the layers that write to the residual stream, two a block (GPT-2)."""
        return self.init_std / (2 * self.layers) ** 0.5

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads
