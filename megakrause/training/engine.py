"""The one file that drives DeepSpeed: ZeRO, precision, gradient accumulation, clipping and the step."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megakrause.batch import Batch
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.read import Checkpoint
from megakrause.checkpoint.weights import Weights
from megakrause.config import RunConfig
from megakrause.models.build import Model, count_parameters
from megakrause.models.cost import LIVE_PARAMETERS, REDUCE_BUCKET
from megakrause.models.init import whole_names
from megakrause.models.lm import LanguageModel
from megakrause.models.objective import build_objective
from megakrause.models.sample import Step
from megakrause.parallel.collectives import collect
from megakrause.parallel.mesh import Mesh
from megakrause.training.extensions import prepare_extensions
from megakrause.training.optimizer import build_optimizer


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token, or image, over the global batch
    grad_norm: float  # of all gradients, before clipping
    tokens: int  # or images, that were learnt from, over the global batch
    applied: bool  # False: skipped, a gradient was not finite


class Engine:
    """A model in training on this process's share of the mesh."""

    def __init__(self, model: Model, config: RunConfig, mesh: Mesh):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of names it calls
        prepare_extensions()
        import deepspeed

        from megakrause.training import engine_state, pipeline

        self.mesh, self.layout = mesh, model.layout
        self._objective = build_objective(model.config, mesh.tp)
        self._dropout_seed = (config.train.seed & 0x7FFFFFFF) << 32 if model.config.has_dropout else None
        self.micro_batch, self.accumulation = config.accumulation(mesh.dp.size)
        length = config.seq_len // mesh.cp.size
        self._positions = slice(mesh.cp.rank * length, (mesh.cp.rank + 1) * length)
        # DeepSpeed neither measures nor clips the plain gradients of fp32 without ZeRO, and those of a pipeline by a
        # wrong norm, so that is done here.
        self._plain = config.parallel.zero == 0 and config.train.precision == "fp32"
        self.clip = config.optim.clip
        # Its stage 0 would accumulate bf16 gradients in bf16; stage 1 gives the same numbers as a true stage 0.
        bf16 = config.train.precision == "bf16"
        zero: dict[str, Any] = {"stage": max(1, config.parallel.zero) if bf16 else config.parallel.zero}
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, count_parameters(model, trained=True))  # it is held as a buffer
        if config.parallel.zero == 3:
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_PARAMETERS
        if config.parallel.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
        # As DeepSpeed would: master weights are made from those that the model computes with.
        model.to(mesh.device, torch.bfloat16 if bf16 else torch.float32)
        for param in model.parameters():  # by which DeepSpeed's norm knows what to count on every rank
            param.tensor_model_parallel = hasattr(param, "shard")  # type: ignore[attr-defined]
        deepspeed.init_distributed(verbose=False)
        self._module: Model | pipeline.Pipeline = model
        if mesh.pp.size > 1:
            self._module = pipeline.Pipeline(model, mesh, length, self._pipeline_loss)
        # Tensor-parallel ranks send a stage's output in parts of one tensor, unless each has positions of its own.
        same_on_all = not config.parallel.sequence_parallel
        optimizer = build_optimizer(model, config.optim)
        self._norm, self._applied = 0.0, True
        if self._plain:
            optimizer.register_step_pre_hook(lambda *_: self._clip_plain_gradients())
        self._engine: Any
        self._engine, _, _, _ = deepspeed.initialize(
            model=self._module,
            optimizer=optimizer,
            mpu=pipeline.MeshView(mesh) if mesh.pp.size == 1 and mesh.world.size > 1 else None,
            config={
                "train_batch_size": self.micro_batch * self.accumulation * mesh.data.size,
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": 0.0 if self._plain else self.clip,
                "zero_optimization": zero,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": bf16},
                "pipeline": {"pipe_partitioned": same_on_all, "grad_partitioned": same_on_all},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "steps_per_print": 2**31 - 1,
            },
        )
        self._state = engine_state
        self._scale = torch.ones((), device=mesh.device)  # of the sum of losses that is differentiated
        # Of a batch here: what the objective sums up.
        self._total = torch.zeros(len(self._objective.names), dtype=torch.float64, device=mesh.device)

    def train_step(self, batch: Batch, lr: float) -> StepResult:
        """One optimizer step on this rank's rows of the global batch. The loss is the mean over the tokens of all ranks
        and micro-batches, whatever masks hide."""
        data, pp = self.mesh.data, self.mesh.pp
        batch = batch.at(self._positions)
        tokens = data.sum(batch.loss_mask.sum().to(self.mesh.device))
        # DeepSpeed averages gradients over the ranks; times their number, that is their sum.
        self._scale = data.size / tokens.clamp(min=1)
        self._total.zero_()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        micro_batches = (
            batch[start : start + self.micro_batch].to(self.mesh.device)
            for start in range(0, self.accumulation * self.micro_batch, self.micro_batch)
        )
        if pp.size > 1:
            self._scale *= self.accumulation  # the pipeline divides by it
            self._engine.train_batch(_for_pipeline(rows, self._seeds(rows)) for rows in micro_batches)
        else:
            self._engine.train()
            for rows in micro_batches:
                logits = self._engine(*rows.inputs, seeds=self._seeds(rows))
                loss = self._loss_sum(logits, rows.targets, rows.loss_mask)
                self._engine.backward(loss * self._scale, scale_wrt_gas=False)
                self._engine.step()
        if not self._plain:
            self._norm, self._applied = float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()
        mean = float(pp.sum(data.sum(self._total[0].clone()))) / max(1, int(tokens))
        return StepResult(mean, self._norm, int(tokens), self._applied)

    @torch.no_grad()
    def evaluate_step(self, batch: Batch) -> tuple[list[float], int]:
        """(the objective's sums, tokens or images) of this rank's batch. All ranks must call it equally often (ZeRO-3
        gathers weights)."""
        batch = batch.at(self._positions).to(self.mesh.device)
        self._total.zero_()
        if self.mesh.pp.size > 1:
            batches = iter([_for_pipeline(batch, self._seeds(batch))])
            self._engine.eval_batch(batches, reduce_output=None, bcast_loss=False, num_micro_batches=1)
        else:
            self._engine.eval()
            self._loss_sum(self._engine(*batch.inputs), batch.targets, batch.loss_mask)
        return self.mesh.pp.sum(self._total.clone()).tolist(), int(batch.loss_mask.sum())

    def drawing(self) -> Step | None:
        """The model as what goes on from an empty cache, for all ranks to call alike; None where it is cut into stages
        or positions."""
        if self.mesh.pp.size > 1 or self.mesh.cp.size > 1 or not isinstance(self._module, LanguageModel):
            return None
        self._engine.eval()
        cache, tp, size = (
            self._module.new_cache(self._module.config.num_positions or 0),
            self.mesh.tp,
            self._module.config.vocab_size,
        )
        assert size is not None
        return lambda tokens: collect(self._engine(tokens, cache=cache), tp, -1, size)

    def _loss_sum(self, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """The sum of the loss; all of the objective's are also added to the batch's."""
        sums = self._objective.sums(logits, targets, mask)
        self._total += sums.detach()
        return sums[0]

    def _seeds(self, batch: Batch) -> Tensor | None:
        """Of dropout, int64 [b]: the run's seed in the high bits, the number of the sequence in the low ones. Also in
        evaluation, where nothing is dropped: pipeline stages always wait for tensors of the same shapes."""
        if self._dropout_seed is None:
            return None
        x = batch.inputs[0]
        numbers = torch.zeros(len(x), dtype=torch.int64) if batch.numbers is None else batch.numbers
        return (numbers + self._dropout_seed).to(x.device)

    def _pipeline_loss(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        return self._loss_sum(logits, *labels) * self._scale

    def _clip_plain_gradients(self) -> None:
        """Before a step: measures the gradients and clips them, or drops them if they are not finite, so that the step
        does nothing."""
        params = [p for p in self._module.parameters() if p.grad is not None]
        own = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None and self.layout.owns(p)])
        squares = self.mesh.pp.sum(self.mesh.tp.sum(own.to(self.mesh.device, torch.float64) ** 2))
        self._norm = float(squares.sqrt())
        self._applied = math.isfinite(self._norm)
        if not self._applied:
            for param in params:
                param.grad = None
        elif self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(params, self.clip, squares.sqrt().float())

    def sigmas(self) -> dict[str, float]:
        """The mean kernel width of every Krause layer here, by parameter name; empty where weights are partitioned."""
        named = whole_names(self._state.model_of(self._engine)).items()
        return {n: float(p.detach().float().exp().mean()) for n, p in named if n.endswith("log_sigma") and p.numel()}

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of weights and optimizer state, for a checkpoint; valid until the next step."""
        return self._state.fragments(self._engine, self.layout.owns)

    @property
    def optimizer_steps(self) -> int:
        """How many updates the optimizer has made."""
        return self._state.adam_step(self._engine)

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes weights and optimizer state from a checkpoint of any layout."""
        self._state.load_fragments(self._engine, checkpoint.read, checkpoint.state["optimizer_steps"])

    def load_weights(self, weights: Weights) -> None:
        """Takes weights alone, of the parameters that are there; the others stay as they are."""
        self._state.load_weights(self._engine, weights.read, weights.shapes)


def _for_pipeline(batch: Batch, seeds: Tensor | None) -> tuple[Any, tuple[Tensor, Tensor]]:
    """(input of the first stage, what the last one's loss needs)."""
    inputs = batch.inputs if seeds is None else (*batch.inputs, seeds)
    return inputs if len(inputs) > 1 else inputs[0], (batch.targets, batch.loss_mask)
