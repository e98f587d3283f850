"""The one file that drives DeepSpeed: ZeRO, precision, gradient accumulation, clipping and the step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megakrause.batch import TokenBatch
from megakrause.checkpoint.fragment import Fragment
from megakrause.checkpoint.read import Checkpoint
from megakrause.config import RunConfig
from megakrause.models.lm import LanguageModel
from megakrause.ops.cross_entropy import cross_entropy_sum
from megakrause.parallel.mesh import Mesh
from megakrause.training.extensions import prepare_extensions
from megakrause.training.optimizer import build_optimizer


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token over the global batch
    grad_norm: float  # of all gradients, before clipping
    tokens: int  # that were learnt from, over the global batch
    applied: bool  # False: skipped, a gradient was not finite


class Engine:
    """A model in training on this process's share of the mesh."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: Mesh):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of names it calls
        prepare_extensions()
        import deepspeed

        from megakrause.training import engine_state

        self.mesh = mesh
        self.micro_batch, self.accumulation = config.accumulation(mesh.dp.size)
        # DeepSpeed neither measures nor clips the plain gradients of fp32 without ZeRO, so that is done here.
        self._plain = config.parallel.zero == 0 and config.train.precision == "fp32"
        self.clip = config.optim.clip
        # Its stage 0 would accumulate bf16 gradients in bf16; stage 1 gives the same numbers as a true stage 0.
        bf16 = config.train.precision == "bf16"
        stage = max(1, config.parallel.zero) if bf16 else config.parallel.zero
        model.to(mesh.device)
        deepspeed.init_distributed(verbose=False)
        self._engine: Any
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optim),
            config={
                "train_batch_size": config.train.global_batch,
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": 0.0 if self._plain else self.clip,
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": bf16},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "steps_per_print": 2**31 - 1,
            },
        )
        self._state = engine_state

    def train_step(self, batch: TokenBatch, lr: float) -> StepResult:
        """One optimizer step on this rank's rows of the global batch. The loss is the mean over the tokens of all ranks
        and micro-batches, whatever masks hide."""
        tokens = self.mesh.dp.sum(batch.loss_mask.sum().to(self.mesh.device))
        # DeepSpeed averages gradients over the ranks; times their number, that is their sum.
        scale = self.mesh.dp.size / tokens.clamp(min=1)
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        norm, applied = None, True
        for micro in range(self.accumulation):
            rows = batch[micro * self.micro_batch : (micro + 1) * self.micro_batch].to(self.mesh.device)
            loss = self._loss_sum(rows)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
            if self._plain and micro == self.accumulation - 1:
                norm, applied = self._clip_plain_gradients()
            self._engine.step()
        if norm is None:
            norm, applied = float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()
        mean = float(self.mesh.dp.sum(total)) / max(1, int(tokens))
        return StepResult(mean, norm, int(tokens), applied)

    @torch.no_grad()
    def evaluate_step(self, batch: TokenBatch) -> tuple[float, int]:
        """(sum of nats, tokens) of this rank's batch. All ranks must call it equally often (ZeRO-3 gathers weights)."""
        self._engine.eval()
        batch = batch.to(self.mesh.device)
        return float(self._loss_sum(batch)), int(batch.loss_mask.sum())

    def _loss_sum(self, batch: TokenBatch) -> Tensor:
        logits = self._engine(batch.tokens, batch.doc_start)
        return cross_entropy_sum(logits, batch.targets, batch.loss_mask)

    def _clip_plain_gradients(self) -> tuple[float, bool]:
        """The norm before clipping, and whether it is finite; if not, the gradients are dropped, so that the step does
        nothing."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            self._engine.zero_grad()
            return float(norm), False
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self._engine.module.parameters(), self.clip, norm)
        return float(norm), True

    def sigmas(self) -> dict[str, float]:
        """The mean kernel width of every Krause layer, by parameter name; empty where weights are partitioned."""
        named = self._engine.module.named_parameters()
        return {n: float(p.detach().float().exp().mean()) for n, p in named if n.endswith("log_sigma") and p.numel()}

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of weights and optimizer state, for a checkpoint; valid until the next step."""
        return self._state.fragments(self._engine)

    @property
    def optimizer_steps(self) -> int:
        """How many updates the optimizer has made."""
        return self._state.adam_step(self._engine)

    def load(self, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
        """Takes weights, and optimizer state unless `weights_only`, from a checkpoint of any layout."""
        if weights_only:
            self._state.load_weights(self._engine, checkpoint.read)
        else:
            self._state.load_fragments(self._engine, checkpoint.read, checkpoint.state["optimizer_steps"])
