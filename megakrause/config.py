"""The typed description of a run, checked before anything starts: every key, its meaning, default and legal values.

What was resolved is written back with `RunConfig.to_toml()` and restarts the run by itself.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megakrause.errors import UserError

NUMBER = re.compile(r"[-+]?[.,]?\d[\d.,]*(e[-+]?\d+)?%?|[-+]?(nan|inf)", re.IGNORECASE)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


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


class ModelConfig(Section):
    """A decoder language model of the Llama kind; each layer's attention is Krause, softmax, windowed softmax, or dual:
    softmax with a Krause branch beside it (models/dual.py)."""

    kind: Literal["lm"] = "lm"
    layers: int = Field(gt=0)
    width: int = Field(gt=0, description="size of the residual stream")
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int | None = Field(default=None, gt=0, description="key/value heads; default: heads")
    head_dim: int | None = Field(default=None, gt=0, description="default: width / heads")
    mlp_width: int = Field(gt=0, description="inner size of the SwiGLU")
    attention: AttentionKind | list[AttentionKind] = Field(
        default="krause", description="one word for all layers, or one word a layer"
    )
    window: int | None = Field(
        default=None, gt=0, description="keys that a query sees, itself included; not of softmax layers"
    )
    top_k: int | None = Field(default=None, gt=0, description="keys kept per Krause query; left out: the whole window")
    sigma: float = Field(default=2.5, gt=0, description="initial width of the RBF kernel of every head")
    qkv_bias: bool = False
    qk_norm: bool = Field(
        default=False, description="normalize every head's queries and keys before rotation, as Qwen3"
    )
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = Field(default=None, gt=0, description="size of the table of learned positions")
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_embeddings: bool = False
    vocab_size: int | None = Field(default=None, gt=0, description="default: the tokenizer's")
    init_std: float = Field(default=0.02, gt=0)
    lora: LoraConfig | None = None

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
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"model.head_dim = {self.head_size} is odd; "
                f"rotary positions need an even one, such as {self.head_size + 1}"
            )
        if isinstance(self.attention, list) and len(self.attention) != self.layers:
            raise ValueError(
                f"model.attention lists {len(self.attention)} layers, model.layers = {self.layers}; they must agree"
            )
        if self.window is None and set(self.attention_of_layers) != {"softmax"}:
            raise ValueError(
                "model.window is missing; krause, dual and softmax_window layers need one, such as model.window = 128"
            )
        targets = [] if self.lora is None else self.lora.targets
        odd = [target for target in targets if target.startswith("krause.")]
        if odd and "dual" not in self.attention_of_layers:
            raise ValueError(f"model.lora.targets has {odd[0]!r}; only dual layers have a Krause branch")
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("model.max_positions is missing; learned positions need one, at least train.seq_len")
        return self

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


class SourceConfig(Section):
    """A corpus to train on, and its part in the mix."""

    path: str = Field(
        description="corpus PREFIX; or text that is tokenized while it is read: .txt, .md, .py, .jsonl, .ndjson, .json "
        "and .parquet files, also .gz and .zst, as one name or a pattern, or a dataset hf:ID (hf://... is a URL)"
    )
    weight: Annotated[float, Field(ge=0)] | list[Annotated[tuple[int, float], Field(strict=False)]] = Field(
        default=1.0,
        description="its share of the sequences; or [[0, w], [steps, w], ...]: w after so many steps",
    )
    epochs: float | None = Field(
        default=None, gt=0, description="how often it may be used; then the others share its part"
    )
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = Field(
        default=None, description="of a token, in files that do not say so"
    )
    text_field: str = Field(default="text", description="of the objects or rows of text")
    separator: str | None = Field(default=None, description="line between the documents of text files")

    @model_validator(mode="after")
    def check(self) -> SourceConfig:
        steps = [step for step, _ in self.weights]
        if steps and steps[0] > 0:
            raise ValueError(
                f"data.train: weight = {list(map(list, self.weights))} of {self.path}: the first step must be 0, as in "
                f"[[0, 0], {list(self.weights[0])}]"
            )
        if steps[:1] != [0] or steps != sorted(set(steps)) or min(weight for _, weight in self.weights) < 0:
            raise ValueError(
                f"data.train: weight = {self.weight} of {self.path} must be pairs [step, weight] with steps from 0 "
                "upwards and weights of at least 0"
            )
        return self

    @property
    def weights(self) -> list[tuple[int, float]]:
        """(after so many steps, weight), from 0 on."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]

    def weight_at(self, step: int) -> float:
        return [weight for start, weight in self.weights if start <= step][-1]


class DataConfig(Section):
    train: str | list[SourceConfig] = Field(
        description="corpus PREFIX (of PREFIX.bin, PREFIX.idx, PREFIX.manifest.json; or another kind, data/shards.py), "
        "or several as 'WEIGHT PREFIX WEIGHT PREFIX ...', or a list of tables"
    )
    valid: str | None = Field(default=None, description="held-out corpus PREFIX")
    tokenizer: str = Field(description="SentencePiece .model file, or Hugging Face tokenizer folder")
    mask_documents: bool = Field(default=True, description="no attention across documents packed in one sequence")
    packing: Literal["concat", "best_fit"] = Field(
        default="concat", description="documents joined and cut, or packed so that few are cut"
    )
    shuffle_blocks: int = Field(
        default=8, gt=0, description="blocks (of 65,536 documents, fewer long ones) whose sequences are mixed at a time"
    )
    prefetch: int = Field(default=4, ge=0, description="global batches read ahead")
    workers: int = Field(default=2, ge=0, description="processes of each rank that tokenize text while it is read")
    cache: str | None = Field(
        default=None, description="folder on each host for what is read from URLs; default: ~/.cache/megakrause"
    )
    cache_gib: int = Field(default=16, gt=0, description="its largest size, in GiB")

    @model_validator(mode="after")
    def check(self) -> DataConfig:
        words = self.train.split() if isinstance(self.train, str) else []
        # A slip in a mix, not a name with spaces: some word is a number, or is meant to be one, as 0,7 or 70%.
        if len(words) > 1 and any(NUMBER.fullmatch(word) for word in words) and not _is_mix(words):
            raise ValueError(
                f"data.train = '{self.train}' is no 'WEIGHT PREFIX WEIGHT PREFIX ...' with weights of at least 0, such "
                "as '0.7 data/web 0.3 data/code'; for names with spaces write tables, [{ path = \"my web\" }]"
            )
        if not any(source.weight_at(0) for source in self.sources):
            raise ValueError("data.train: no source has a weight at step 0; give one a weight above 0")
        return self

    @property
    def sources(self) -> list[SourceConfig]:
        """What data.train lists, however it is written."""
        if not isinstance(self.train, str):
            return self.train
        words = self.train.split()
        if not _is_mix(words):
            return [SourceConfig(path=self.train)]
        return [SourceConfig(path=p, weight=float(w)) for p, w in zip(words[1::2], words[::2], strict=True)]


def _is_mix(words: list[str]) -> bool:
    """Whether they are WEIGHT PREFIX WEIGHT PREFIX ..."""
    try:
        return len(words) >= 2 and len(words) % 2 == 0 and all(0 <= float(word) < math.inf for word in words[::2])
    except ValueError:
        return False


class OptimConfig(Section):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); norms, biases and log_sigma are not decayed."""

    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay: int | None = Field(
        default=None, gt=0, description="wsd: steps of the final decay; default: a tenth of the run"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    @model_validator(mode="after")
    def check(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr} is above optim.lr = {self.lr}; it must not be")
        return self


class TrainConfig(Section):
    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0, description="sequences per optimizer step, over all ranks")
    micro_batch: int | None = Field(
        default=None, gt=0, description="sequences per forward on one rank; default: no accumulation"
    )
    seq_len: int = Field(gt=0, description="tokens per sequence")
    seed: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations on data.valid; 0: only at the end")
    eval_sequences: int = Field(default=0, ge=0, description="of data.valid that are evaluated; 0: all")
    init_from: str | None = Field(
        default=None, description="checkpoint or Hugging Face folder whose weights (alone) the run starts from"
    )
    time_limit: float | None = Field(
        default=None, gt=0, description="minutes after which the run saves and ends, to be started again"
    )


class ParallelConfig(Section):
    """How the work is shared; the number of processes is a multiple of pp x cp x tp, the rest is data parallelism."""

    tp: int = Field(default=1, gt=0, description="tensor parallelism: ranks that share every layer's features")
    pp: int = Field(default=1, gt=0, description="pipeline parallelism: stages that share the layers")
    cp: int = Field(default=1, gt=0, description="context parallelism: ranks that share every sequence's positions")
    sequence_parallel: bool = Field(
        default=False, description="tensor-parallel ranks share the positions between their regions"
    )
    stages: list[int] | None = Field(
        default=None, description="layers of each pipeline stage; default: balanced, the head counted"
    )
    zero: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage; with pp > 1 at most 1")
    offload: bool = Field(default=False, description="keep master weights and moments in host memory; zero >= 1")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="what the backward pass computes again: nothing, what is cheap (attention cores, activation "
        "functions), or all of a block",
    )
    timeout: int = Field(default=600, gt=0, description="seconds after which ranks that wait for another give up")

    @model_validator(mode="after")
    def check(self) -> ParallelConfig:
        if self.pp > 1 and self.zero > 1:
            raise ValueError(
                f"parallel.zero = {self.zero} with parallel.pp = {self.pp}: a pipeline accumulates gradients that ZeRO "
                "2 and 3 would have cut; use parallel.zero = 1, or parallel.pp = 1"
            )
        if self.offload and self.zero == 0:
            raise ValueError("parallel.offload = true needs optimizer states in parts; use parallel.zero = 1 to 3")
        if self.stages is not None and (len(self.stages) != self.pp or min(self.stages) < 1):
            raise ValueError(
                f"parallel.stages = {self.stages} must list at least one layer for each of {self.pp} stages"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel = true shares positions over parallel.tp ranks; set tp > 1")
        return self


class CheckpointConfig(Section):
    folder: str | None = Field(
        default=None, description="where checkpoints go: a folder, or a URL (s3://, gs://, ...); default: in output"
    )
    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(default=2, gt=0, description="newest checkpoints to keep")
    keep_every: int = Field(
        default=0, ge=0, description="keep those of steps that are a multiple, too; 0: the newest only"
    )
    asynchronous: bool = Field(
        default=False, description="write from a copy of the state, in host memory, while training goes on"
    )
    on_failure: Literal["stop", "continue"] = Field(
        default="stop", description="what follows when a checkpoint cannot be written; the earlier ones stay"
    )
    resume: bool = Field(default=True, description="go on from the newest checkpoint of the output folder")


class GuardConfig(Section):
    """What happens when training goes wrong. A step whose gradient is not finite never changes the weights."""

    skips: int = Field(
        default=10, gt=0, description="such steps in a row after which the run goes back to its last checkpoint, once"
    )
    spike: float = Field(
        default=0.0,
        ge=0,
        description="a loss so many standard deviations above the mean of the last `window` is a spike: the run goes "
        "back to its last checkpoint and leaves out the data in between; 0: no such rule",
    )
    window: int = Field(default=128, ge=8, description="losses that a spike is compared with")
    rollbacks: int = Field(default=3, gt=0, description="how often a spike may lead back to the same checkpoint")


class LogConfig(Section):
    every: int = Field(default=10, gt=0, description="steps between lines of the log and points in TensorBoard")
    tensorboard: bool = True


class RunConfig(Section):
    """A complete run."""

    output: str = Field(description="folder of everything the run writes")
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def check(self) -> RunConfig:
        limit = self.model.max_positions
        if self.model.positions == "learned" and limit is not None and self.train.seq_len > limit:
            raise ValueError(
                f"train.seq_len = {self.train.seq_len} is longer than the learned positions allow; "
                f"use at most model.max_positions = {limit}"
            )
        self._check_layout()
        if (
            self.parallel.pp > 1
            and self.parallel.offload
            and self.train.precision == "bf16"
            and self.model.tie_embeddings
        ):
            raise ValueError(  # DeepSpeed would sum gradients over the two ends that it does not step with
                "parallel.offload = true with parallel.pp > 1, train.precision = 'bf16' and model.tie_embeddings = "
                "true gives wrong gradients in DeepSpeed; set one of them otherwise, such as parallel.offload = false"
            )
        if self.train.eval_every and self.data.valid is None:
            raise ValueError(
                f"train.eval_every = {self.train.eval_every} needs data.valid; "
                "name a corpus or set train.eval_every = 0"
            )
        return self

    def _check_layout(self) -> None:
        """Raises ValueError for a model that the layout cannot cut."""
        model, parallel, seq_len = self.model, self.parallel, self.train.seq_len
        heads, legal = model.heads, model.legal_tp
        if parallel.tp not in legal:
            raise ValueError(
                f"parallel.tp = {parallel.tp} cannot share model.heads = {heads} and model.kv_heads = "
                f"{model.num_kv_heads}; use one of {legal}"
            )
        if seq_len % parallel.cp:
            raise ValueError(
                f"train.seq_len = {seq_len} cannot be shared by parallel.cp = {parallel.cp}; use a multiple of it"
            )
        if None in model.window_of_layers and heads // parallel.tp % parallel.cp:
            raise ValueError(
                f"parallel.cp = {parallel.cp} cannot share the {heads // parallel.tp} heads that softmax layers have "
                "on a tensor-parallel rank; use a divisor of them, or windowed attention in all layers"
            )
        if parallel.pp > model.layers:
            raise ValueError(
                f"model.layers = {model.layers} are too few for parallel.pp = {parallel.pp} stages; "
                f"use at most {model.layers}"
            )
        if parallel.pp > 1 and model.lora is not None and all(t.startswith("krause.") for t in model.lora.targets):
            kinds = [kind for kind in model.attention_of_layers if kind not in ("dual", "krause")]
            if kinds:
                raise ValueError(
                    f"parallel.pp = {parallel.pp}: model.lora.targets leave nothing to train in {kinds[0]} layers, and "
                    "a stage of such alone cannot be; add a target that every layer has, such as 'query'"
                )
        if parallel.stages is not None and sum(parallel.stages) != model.layers:
            raise ValueError(
                f"parallel.stages = {parallel.stages} have {sum(parallel.stages)} layers in all, "
                f"model.layers = {model.layers}; they must agree"
            )

    def accumulation(self, dp: int) -> tuple[int, int]:
        """(sequences per micro-batch, micro-batches per step) on each of `dp` data-parallel ranks.

        Raises UserError when the global batch cannot be cut so."""
        total = self.train.global_batch
        if total % dp:
            raise UserError(
                f"train.global_batch = {total} cannot be shared by {dp} data-parallel ranks; use a multiple of {dp}"
            )
        micro = self.train.micro_batch or total // dp
        if total % (micro * dp):
            raise UserError(
                f"train.global_batch = {total} is no multiple of train.micro_batch = {micro} x {dp} ranks; "
                f"use train.micro_batch = {next(m for m in range(micro, 0, -1) if total % (m * dp) == 0)}"
            )
        return micro, total // (micro * dp)

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return flat

    def to_toml(self) -> str:
        """The whole config as TOML; `load_config` reads it back to an equal one."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))
