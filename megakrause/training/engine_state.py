"""Weights and Adam moments of a DeepSpeed engine, out and in, as flat fragments.

DeepSpeed's own checkpoint files are pickles bound to one layout, so state is taken from the engine's memory instead.
Where a parameter's fp32 master weights and moments lie there depends on the optimizer that DeepSpeed wraps around the
AdamW it was given. `home` is the tensor that AdamW steps, and by which it keys its moments:

    ZeRO  precision  DeepSpeed's wrapper            home, on each data-parallel rank
    0     fp32       none                           the parameter itself
    1, 2  any        DeepSpeedZeroOptimizer         an equal part of a whole parameter group, flattened and padded
    1     bf16       BF16_Optimizer                 the same (chosen when gradients accumulate in fp32)
    3     any        DeepSpeedZeroOptimizer_Stage3  an equal part of each flattened and padded parameter, concatenated

`_trained` brings the five cases into one form, and everything above it is written in that form. Parameters that are
not trained (frozen, or given to no optimizer) have no home but their own memory. Only this file and engine.py know
DeepSpeed's internals; whatever is not public is reached through `_internal`, which says so if it is gone.
"""

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.nn import Parameter

from megakrause.checkpoint.fragment import Box, Fragment
from megakrause.errors import UserError
from megakrause.models.init import whole_names, whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")

Read = Callable[[str, str, int, int, Box, Tensor | None], Tensor]


def fragments(engine: DeepSpeedEngine, owns: Callable[[Parameter], bool] = lambda _: True) -> Iterator[Fragment]:
    """Yield this rank's share of all master weights and Adam moments.

    Over the data-parallel group, each element of each (name, kind) comes exactly once. What ZeRO partitions comes from
    its owner; what every rank holds whole (all of ZeRO-0, untrained parameters) the ranks split evenly, so that each
    writes its part of a checkpoint. Of parameters that several model-parallel ranks hold, only those that this one
    `owns` come. Trained parameters have the kinds "master", "exp_avg" and "exp_avg_sq", in fp32; untrained
    ones only "master", their own values in their own dtype. Before the first step the moments are zeros: loaded back
    with step 0 they continue exactly as if never saved, and all checkpoints hold the same tensors.

    Wherever the engine's memory is fp32 the tensors are views of it: copy them before the next step. The engine is
    left as it was. Nothing here communicates, so ranks need not keep in step.
    """
    adam = _adam(engine)
    rank, ranks = _data_parallel_place(engine)
    for piece in _pieces(engine):
        if not owns(piece.parameter):
            continue
        first, end = 0, piece.numel
        if piece.replicated:
            first, end = rank * piece.numel // ranks, (rank + 1) * piece.numel // ranks
        if first == end:
            continue
        tensors = {"master": piece.values}
        if piece.trained:
            state = adam.state.get(piece.home)
            tensors |= {kind: piece.of(state[kind]) if state else torch.zeros(piece.numel) for kind in MOMENTS}
        box, offset = _box(piece.parameter), piece.offset + first
        for kind, tensor in tensors.items():
            part = tensor[first:end].float() if piece.trained else tensor[first:end]
            yield Fragment(piece.name, kind, box.shape, box.start, box.size, offset, part)


def adam_step(engine: DeepSpeedEngine) -> int:
    """Return how many updates Adam has made: 0 before the first; steps skipped for overflow do not count.

    Raises RuntimeError if the tensors that Adam steps do not agree.
    """
    adam = _adam(engine)
    states = (adam.state.get(home) for home in _homes(engine))
    steps = {int(state["step"]) if state else 0 for state in states}
    if len(steps) > 1:
        raise RuntimeError(f"Adam's step count differs between the tensors it steps: {sorted(steps)}")
    return steps.pop() if steps else 0


@torch.no_grad()
def load_fragments(engine: DeepSpeedEngine, read: Read, step: int) -> None:
    """Fill weights, Adam's moments and its step count, so that training continues where they were taken.

    `read(name, kind, offset, numel, box, out)` returns those elements of this rank's flattened box, 1-D and fp32; in
    the memory of `out`, unless that is None. It is
    asked for what this rank holds and nothing else, so the state may come from any other layout. `step` is what
    `adam_step` said when the state was taken. The engine may be new or have trained; gradients it holds are not
    touched, so call it between steps. Collective over the data-parallel group.

    Raises ValueError if `read` returns another shape or dtype. If it raises on one rank only, the others wait in a
    collective for it until the process group's timeout.
    """
    load_weights(engine, read)
    adam = _adam(engine)
    for home in _homes(engine):
        adam.state[home] = adam.state.get(home) or _fresh_state(adam, home)
        adam.state[home]["step"].fill_(step)
    for piece in _pieces(engine):
        if piece.trained:
            for kind in MOMENTS:
                _fill(piece.of(adam.state[piece.home][kind]), read, piece, kind)


@torch.no_grad()
def load_weights(engine: DeepSpeedEngine, read: Read, names: Container[str] | None = None) -> None:
    """Fill the master weights, and with them the live parameters that the model computes with; leave Adam alone.

    `read`, the collective and the errors are those of `load_fragments`; only the kind "master" is asked for, and only
    of the parameters `names`. None: of all.
    """
    optimizer = engine.optimizer
    zero3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    if zero3:  # drop what is gathered, and hpZ's copies within a node, or the model would go on computing with them
        _internal(optimizer, "parameter_offload").partition_all_parameters()
        for parameter in engine.module.parameters():
            parameter.ds_secondary_tensor = None

    for piece in _pieces(engine):
        if names is not None and piece.name not in names:
            continue
        _fill(piece.values, read, piece, "master")
        if zero3:
            _internal(piece.parameter, "ds_tensor").data[: piece.numel].copy_(piece.values)
        elif piece.replicated:
            piece.parameter.view(-1).copy_(piece.values)

    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        _internal(optimizer, "update_lp_params")()  # gathers what has reached only its owners; ZeRO-3 does so by itself


@dataclass(frozen=True)
class _Piece:
    """What this data-parallel rank holds of one parameter: `numel` elements of its flattened box, from `offset` on."""

    name: str
    parameter: Parameter
    offset: int
    numel: int
    home: Tensor  # of an untrained parameter: the memory that holds its values
    home_offset: int  # of the piece, in the flattened home
    trained: bool
    replicated: bool  # every data-parallel rank holds the whole box

    def of(self, tensor: Tensor) -> Tensor:
        """Return the piece's elements of `tensor`, which is laid out like `home`: a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.home_offset, self.numel)

    @property
    def values(self) -> Tensor:
        """The fp32 master weights, or an untrained parameter's values in their own dtype: a 1-D view."""
        return self.of(self.home)


def _pieces(engine: DeepSpeedEngine) -> Iterator[_Piece]:
    """Yield what this rank holds of each parameter, tied ones once, and nothing where it holds no element."""
    zero, zero3 = engine.zero_optimization(), isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    names = {parameter: name for name, parameter in whole_names(model_of(engine)).items()}
    for parameter, home, home_offset, offset, numel in _trained(engine):
        name = names.pop(parameter)
        if numel:
            yield _Piece(name, parameter, offset, numel, home, home_offset, trained=True, replicated=not zero)
    for parameter, name in names.items():  # the untrained ones are left
        home = _internal(parameter, "ds_tensor") if zero3 else parameter
        offset, numel = _partition(engine, parameter) if zero3 else (0, parameter.numel())
        if numel:
            yield _Piece(name, parameter, offset, numel, home, 0, trained=False, replicated=not zero3)


def _trained(engine: DeepSpeedEngine) -> Iterator[tuple[Parameter, Tensor, int, int, int]]:
    """Yield (parameter, home, home_offset, offset, numel) of each parameter that Adam updates, as in `_Piece`.

    Raises UserError if DeepSpeed has wrapped Adam in a way that this file does not know.
    """
    homes = _homes(engine)
    match engine.optimizer:
        case torch.optim.Optimizer():
            for parameter in homes:
                yield parameter, parameter, 0, 0, parameter.numel()
        case DeepSpeedZeroOptimizer() | BF16_Optimizer() as optimizer:
            if getattr(optimizer, "round_robin_gradients", False):  # reorders the parameters, not their _hp_mapping
                raise UserError("zero_optimization.round_robin_gradients = true mixes up saved parameters; set false")
            groups = "bf16_groups" if isinstance(optimizer, BF16_Optimizer) else "bit16_groups"
            for group, home in zip(_internal(optimizer, groups), homes, strict=True):
                for parameter in group:
                    if mapping := _internal(parameter, "_hp_mapping"):
                        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                        yield parameter, home, here.start, there.start, there.numel
                    else:  # other ranks hold all of it
                        yield parameter, home, 0, 0, 0
        case DeepSpeedZeroOptimizer_Stage3() as optimizer:
            for group, home in zip(_internal(optimizer, "fp16_groups"), homes, strict=True):
                packed = 0
                for parameter in group:
                    yield parameter, home, packed, *_partition(engine, parameter)
                    packed += _internal(parameter, "ds_tensor").numel()
        case optimizer:
            raise UserError(f"the state in DeepSpeed's {type(optimizer).__name__} cannot be saved; use ZeRO, no fp16")


def _homes(engine: DeepSpeedEngine) -> list[Any]:
    """Return the tensors that Adam steps on this rank, also those that hold nothing but padding."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):  # it empties Adam's own list between steps
        return list(_internal(engine.optimizer, "fp32_partitioned_groups_flat"))
    return [home for group in _adam(engine).param_groups for home in group["params"] if home.requires_grad]


def _partition(engine: DeepSpeedEngine, parameter: Parameter) -> tuple[int, int]:
    """Return offset and size of this rank's ZeRO-3 partition of a parameter, less its padding.

    Raises UserError if it is not cut over the whole data-parallel group.
    """
    rank, ranks = _data_parallel_place(engine)
    whole, size = math.prod(_box(parameter).size), _internal(parameter, "ds_tensor").numel()
    if size != math.ceil(whole / ranks):
        raise UserError(f"ZeRO-3 keeps {size} of {whole} elements on each of {ranks} ranks; use it without MiCS")
    offset = min(rank * size, whole)
    return offset, min(size, whole - offset)


def _adam(engine: DeepSpeedEngine) -> torch.optim.Adam:
    """Return the torch optimizer inside DeepSpeed's. Raises UserError if its state is not Adam's plain two moments."""
    adam = engine.basic_optimizer
    if not isinstance(adam, torch.optim.Adam) or adam.defaults["amsgrad"]:
        raise UserError(f"the state of {type(adam).__name__} cannot be saved; use torch.optim.AdamW without amsgrad")
    return adam


def _fresh_state(adam: torch.optim.Adam, home: Tensor) -> dict[str, Tensor]:
    """Return what Adam itself would create for `home` in its first step, which until then it has not."""
    on_device = adam.defaults["fused"] or adam.defaults["capturable"]
    step = torch.zeros((), dtype=torch.float32, device=home.device if on_device else "cpu")
    return {"step": step, **{kind: torch.zeros_like(home) for kind in MOMENTS}}


def _fill(target: Tensor, read: Read, piece: _Piece, kind: str) -> None:
    """Reads a piece's elements to where they belong, at once if they can be there as they are."""
    out = target if target.device.type == "cpu" and target.dtype == torch.float32 else None
    tensor = read(piece.name, kind, piece.offset, piece.numel, _box(piece.parameter), out)
    if tensor.shape != (piece.numel,) or tensor.dtype != torch.float32:
        wanted = f"{piece.numel} elements of float32"
        raise ValueError(f"{piece.name} ({kind}): {wanted} wanted, {tuple(tensor.shape)} of {tensor.dtype} read")
    if tensor is not out:
        target.copy_(tensor)


def model_of(engine: DeepSpeedEngine) -> torch.nn.Module:
    """Return the model that an engine was made with; DeepSpeed's pipeline wraps it."""
    return getattr(engine.module, "model", engine.module)


def _box(parameter: Parameter) -> Box:
    """Return what this model-parallel rank holds of the whole. ZeRO-3 leaves the parameter's own shape empty."""
    size, shard = tuple(getattr(parameter, "ds_shape", parameter.shape)), getattr(parameter, "shard", None)
    start = [0] * len(size)
    if shard is not None:
        start[shard.dim] = shard.start
    return Box(whole_shape(parameter), tuple(start), size)


def _data_parallel_place(engine: DeepSpeedEngine) -> tuple[int, int]:
    """Return this rank's number in the group that ZeRO partitions over, and the group's size."""
    group = _internal(engine, "seq_data_parallel_group")
    return dist.get_rank(group), dist.get_world_size(group)


def _internal(owner: Any, name: str) -> Any:
    """Return a DeepSpeed attribute that is not public. Raises UserError if this version has it no more."""
    if not hasattr(owner, name):
        missing = f"{type(owner).__name__}.{name} is missing from DeepSpeed {deepspeed.__version__}"
        raise UserError(f"{missing}; megakrause was written for DeepSpeed 0.19.8")
    return getattr(owner, name)
