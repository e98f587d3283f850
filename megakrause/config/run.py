"""A complete run."""

from __future__ import annotations

from typing import Any, Literal

import tomli_w
from pydantic import Field, model_validator

from megakrause.config.data import AugmentConfig, DataConfig, SourceConfig
from megakrause.config.model import ModelConfig
from megakrause.config.section import Section
from megakrause.errors import UserError


class OptimConfig(Section):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101). What has one dim (norms, biases, log_sigma) is not decayed."""

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
    seq_len: int | None = Field(default=None, gt=0, description="tokens per sequence; of images, the model says it")
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
    samples: int = Field(
        default=0,
        ge=0,
        description="images that an image model draws and completes for TensorBoard at every evaluation; without "
        "pipeline or context parallelism",
    )


class RunConfig(Section):
    """A complete run."""

    output: str = Field(description="folder of everything the run writes")
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    augment: AugmentConfig = AugmentConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def check(self) -> RunConfig:
        if self.model.kind == "lm":
            self._check_text()
        else:
            self._check_images()
        if self.log.samples and self.model.kind != "image":
            raise ValueError(f"log.samples = {self.log.samples}: a model of kind {self.model.kind} draws no images")
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

    @property
    def seq_len(self) -> int:
        """Positions of a sequence."""
        length = self.model.length or self.train.seq_len
        assert length is not None
        return length

    @property
    def tokenizer(self) -> str:
        """The path of a text run's tokenizer. Raises UserError for a run of images."""
        if self.data.tokenizer is None:
            raise UserError(f"a model of kind {self.model.kind} has no tokenizer")
        return self.data.tokenizer

    def _check_text(self) -> None:
        if self.train.seq_len is None:
            raise ValueError("config key 'train.seq_len' is missing; it has no default")
        if self.data.tokenizer is None:
            raise ValueError("config key 'data.tokenizer' is missing; it has no default")
        if self.augment != AugmentConfig():
            raise ValueError("section 'augment' is for images; remove it")
        limit = self.model.max_positions
        if self.model.positions == "learned" and limit is not None and self.seq_len > limit:
            raise ValueError(
                f"train.seq_len = {self.seq_len} is longer than the learned positions allow; "
                f"use at most model.max_positions = {limit}"
            )

    def _check_images(self) -> None:
        model, length = self.model, self.model.length
        if self.train.seq_len not in (None, length):
            raise ValueError(
                f"train.seq_len = {self.train.seq_len}: sequences of these images have {length} positions; leave it out"
            )
        for key in ("tokenizer", "packing", "mask_documents", "shuffle_blocks"):
            if getattr(self.data, key) != DataConfig.model_fields[key].default:
                raise ValueError(f"data.{key} is for text; leave it out")
        if self.data.sources != [SourceConfig(path=self.data.sources[0].path)]:
            raise ValueError("data.train has weights, epochs or several sources; images are read from one PREFIX")
        if model.kind == "image" and length is not None and length % self.parallel.cp:
            legal = [n for n in range(1, 65) if length % n == 0]
            raise ValueError(
                f"parallel.cp = {self.parallel.cp} cannot share {length} positions of an image; use one of {legal}"
            )
        if model.kind == "image" and self.augment.model_copy(update={"flip": False}) != AugmentConfig():
            raise ValueError("section 'augment': an image model learns the images as they are; it takes only flip")
        for name, values in [("mean", self.augment.mean), ("std", self.augment.std)]:
            if values is not None and len(values) != model.channels:
                raise ValueError(f"augment.{name} = {values} must be {model.channels} numbers, as model.channels")
        shared = {"vit": ["cp"], "swin": ["cp", "tp", "pp"]}.get(model.kind, [])
        if wrong := [key for key in shared if getattr(self.parallel, key) > 1]:
            value = getattr(self.parallel, wrong[0])
            raise ValueError(f"parallel.{wrong[0]} = {value}: a {model.kind} is not shared so; use 1")
        if model.classes is not None and self.parallel.tp > model.classes:
            raise ValueError(
                f"parallel.tp = {self.parallel.tp} cannot share model.classes = {model.classes}; use at most so many"
            )

    def _check_layout(self) -> None:
        """Raises ValueError for a model that the layout cannot cut."""
        model, parallel, seq_len = self.model, self.parallel, self.seq_len
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
        tree = self.model_dump(exclude_none=True)
        if self.model.kind == "lm":
            del tree["augment"]
        return tomli_w.dumps(tree)
