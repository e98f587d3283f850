"""The unit in which training state leaves and enters a running engine."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one parameter's weights or Adam moments, as one data-parallel rank hands it out.

    A parameter of shape `shape` is cut by tensor parallelism into boxes, one for each model-parallel rank; a box,
    flattened in row-major order, is cut by data parallelism into fragments. Over all ranks of both kinds, the
    fragments of one (name, kind) hold each element of the parameter exactly once.
    """

    name: str  # as in model.named_parameters()
    kind: str  # "master" (fp32 weights), "exp_avg" or "exp_avg_sq" (Adam's moments)
    shape: tuple[int, ...]  # of the whole parameter, over all ranks
    start: tuple[int, ...]  # corner of this model-parallel rank's box in it; all zeros without tensor parallelism
    box: tuple[int, ...]  # shape of that box; equal to `shape` without tensor parallelism
    offset: int  # of the first element here, in the flattened box
    tensor: torch.Tensor  # 1-D, contiguous, fp32
