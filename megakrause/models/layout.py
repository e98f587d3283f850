"""How a model is cut over ranks, and what it keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megakrause.config import ModelConfig, RunConfig
from megakrause.parallel.linear import TensorParallel
from megakrause.parallel.mesh import ALONE, Axis, Mesh

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    tp: TensorParallel = field(default_factory=TensorParallel)
    cp: Axis = ALONE
    pp: Axis = ALONE
    stages: tuple[range, ...] | None = None  # the layers of each pipeline stage; None: one stage has all
    recompute: Recompute = "none"
    backend: str = "auto"  # of windowed attention: see `krause_attention`

    @staticmethod
    def of(config: RunConfig, mesh: Mesh) -> Layout:
        """This process's part of a run's model."""
        parallel = config.parallel
        stages = parallel.stages or balanced_stages(config, mesh.pp.size)
        starts = [sum(stages[:i]) for i in range(len(stages) + 1)]
        return Layout(
            TensorParallel(mesh.tp, parallel.sequence_parallel),
            mesh.cp,
            mesh.pp,
            tuple(map(range, starts[:-1], starts[1:])),
            parallel.recompute,
        )

    def layers(self, model: ModelConfig) -> range:
        """The layers of this rank's stage."""
        return range(model.layers) if self.stages is None else self.stages[self.pp.rank]

    @property
    def is_first(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    def owns(self, param: Tensor) -> bool:
        """Whether this rank stands for a parameter of which others may hold the same elements too: such are counted
        and saved once."""
        return not hasattr(param, "copy_of") and (hasattr(param, "shard") or self.tp.axis.rank == 0)

    def run(self, level: Recompute, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """function(*arguments); where `level` is this layout's, computed again in the backward pass, so that of it
        nothing but the arguments is kept."""
        if self.recompute != level:
            return function(*arguments)
        # The model draws no random numbers outside of functions of a seed.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def balanced_stages(config: RunConfig, stages: int) -> list[int]:
    """Layers of each stage such that the busiest has as little to do as can be; the head works in the last one."""
    model = config.model
    if stages == 1:
        return [model.layers]
    block = 2 * (model.heads + model.num_kv_heads) * model.head_size + 3 * model.mlp_width
    head = (model.vocab_size or 0) / block  # in blocks

    def split(last: int) -> list[int]:
        return [len(range(i, model.layers - last, stages - 1)) for i in range(stages - 1)] + [last]

    return min(map(split, range(model.layers // stages, 0, -1)), key=lambda n: max(n[0], n[-1] + head))
