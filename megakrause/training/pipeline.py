"""A model's pipeline stage in DeepSpeed's form, and what DeepSpeed wants to know of the mesh."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megakrause.models.build import Model
from megakrause.models.init import whole_names
from megakrause.models.lm import LanguageModel
from megakrause.parallel.mesh import Mesh, make_axis


class MeshView:
    """The mesh by the names of Megatron's `mpu`, which DeepSpeed asks. Its data-parallel ranks are those over which
    gradients are summed: context-parallel ones are among them."""

    def __init__(self, mesh: Mesh):
        data, tp = mesh.data, mesh.tp
        self.get_data_parallel_rank = lambda: data.rank
        self.get_data_parallel_world_size = lambda: data.size
        self.get_data_parallel_group = lambda: data.group
        self.get_data_parallel_group_ranks = lambda: dist.get_process_group_ranks(data.group)
        for kind in ("model", "tensor_model"):
            setattr(self, f"get_{kind}_parallel_rank", lambda: tp.rank)
            setattr(self, f"get_{kind}_parallel_world_size", lambda: tp.size)
            setattr(self, f"get_{kind}_parallel_group", lambda: tp.group)
        self.get_pipeline_model_parallel_rank = lambda: 0
        self.get_pipeline_model_parallel_world_size = lambda: 1


class _Layer(nn.Module):
    """A whole stage as the one layer that DeepSpeed sees of it."""

    def __init__(self, model: Model, length: int):
        super().__init__()
        self.model, self.length = model, length

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """What the stage before returned, or tokens, or images: alone, or with doc_start, [b, s], seeds, [b], or
        both."""
        x, *others = inputs if isinstance(inputs, tuple) else (inputs,)
        documents = [other for other in others if other.dim() == 2]
        seeds = next((other for other in others if other.dim() == 1), None)
        x = self.model(x, *documents, length=self.length, seeds=seeds)
        return x if not others or self.model.layout.is_last else (x, *others)


class Pipeline(PipelineModule):
    """This rank's stage of a model."""

    def __init__(self, model: Model, mesh: Mesh, length: int, loss: Callable[[Tensor, Any], Tensor]):
        """length: positions of a sequence on this rank. loss: of logits and what comes beside a micro-batch's input."""
        topology = PipeModelDataParallelTopology(num_pp=mesh.pp.size, num_mp=mesh.tp.size, num_dp=mesh.data.size)
        layer = _Layer(model, length)
        with contextlib.redirect_stdout(io.StringIO()):  # it lists the layers
            super().__init__([layer] * mesh.pp.size, topology=topology, loss_fn=loss, partition_method="uniform")
        self.tied: list[tuple[nn.Parameter, dist.ProcessGroup | None]] = []
        if isinstance(model, LanguageModel) and model.config.tie_embeddings:
            ranks = np.arange(mesh.world.size).reshape(mesh.pp.size, -1)
            ends = make_axis(ranks[[0, -1]].T)
            if ends.size > 1:
                weight: Any = next(p for n, p in whole_names(model).items() if n == "embedding.tokens.weight")
                weight.ds_pipe_replicated = model.embedding is None  # counts once in the gradient norm
                self.tied = [(weight, ends.group)]

    @property
    def model(self) -> Model:
        return self.forward_funcs[0].model

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup | None]]:
        """Whose gradients DeepSpeed adds up over which ranks before the step."""
        return self.tied
