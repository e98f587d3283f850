"""What a config costs one rank: measured by running its layers on tensors without memory, and so on a laptop for any
number of GPUs. The processes that are not there are played by `AbsentAxis`, which counts what would be sent."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megakrause.config import ModelConfig, RunConfig
from megakrause.models.attention import Sequence
from megakrause.models.block import Block
from megakrause.models.layout import Layout, Recompute
from megakrause.models.lm import Embedding, Head
from megakrause.models.lora import freeze
from megakrause.models.vit import ClassHead, PatchEmbedding
from megakrause.ops.feature_dropout import Noise
from megakrause.ops.grid import Grid
from megakrause.ops.krause_launch import triton_refuses
from megakrause.ops.rotary import rotary_angles
from megakrause.parallel.linear import TensorParallel
from megakrause.parallel.mesh import Axis

LEVELS: tuple[Recompute, ...] = ("none", "selective", "full")
REDUCE_BUCKET = 100_000_000  # gradients that ZeRO 2 and 3 send at once, at most
LIVE_PARAMETERS = 500_000_000  # that ZeRO 3 keeps gathered, at most
PLAIN_BUCKET = 500_000_000  # gradients that DeepSpeed sends at once without them; not to be set


class AbsentAxis(Axis):
    """An axis of which no process but this one is there: what others would send is left uninitialized."""

    def _all_reduce(self, value: Tensor, op: Any) -> Tensor:
        self.traffic.bytes += 2 * value.nbytes * (self.size - 1) // self.size
        return value

    def all_gather(self, part: Tensor) -> Tensor:
        self.traffic.bytes += (self.size - 1) * part.nbytes
        return part.new_empty(self.size * len(part), *part.shape[1:])

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        result = parts.new_empty(len(parts) // self.size, *parts.shape[1:])
        self.traffic.bytes += (self.size - 1) * result.nbytes
        return result

    def all_to_all(self, parts: Tensor) -> Tensor:
        self.traffic.bytes += parts.nbytes // self.size * (self.size - 1)
        return torch.empty_like(parts)

    def exchange(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        self.traffic.bytes += sum(tensor.nbytes for tensor in sent.values())


@dataclass(frozen=True)
class Bytes:
    """Of one layer and one sequence on one rank."""

    saved: int  # for the backward pass
    tp: int  # sent forwards and backwards
    cp: int


@dataclass(frozen=True)
class LayerCost:
    shapes: tuple[tuple[int, ...], ...]  # of this rank's parameters
    frozen: tuple[bool, ...]  # whether each is
    bytes: dict[Recompute, Bytes]  # by what is computed again


@dataclass(frozen=True)
class ModelCost:
    embedding: LayerCost
    blocks: tuple[LayerCost, ...]  # of all layers, in order
    head: LayerCost
    logits: int  # bytes, of one sequence
    stream: int  # bytes between two layers, of one sequence


def measure(config: RunConfig, *, gpu: bool) -> ModelCost:
    """The cost of each layer of a config whose vocab_size is known. gpu: with the backends of a GPU, not of a CPU."""
    parallel, model = config.parallel, config.model
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    # A rank in the middle of the axis sends and receives most.
    tp, cp = (AbsentAxis(size // 2, size, None) for size in (parallel.tp, parallel.cp))
    layout = Layout(TensorParallel(tp, parallel.sequence_parallel), cp)
    length = config.seq_len // cp.size
    with FakeTensorMode(), _default_dtype(dtype):
        positions = torch.arange(cp.rank * length, (cp.rank + 1) * length)
        documents = None
        if config.data.mask_documents and model.kind == "lm":
            documents = torch.zeros(1, config.seq_len, dtype=torch.int32)
        rotary = (
            rotary_angles(positions, model.head_size, model.rope_theta, model.rope_scaling)
            if model.positions == "rope" and model.kind == "lm"
            else None
        )
        noise = None
        if model.has_dropout:
            noise = Noise(torch.zeros(1, dtype=torch.int64), cp.rank * length)
        sequence = Sequence(cp.rank * length, length, rotary, documents, noise)
        share = len(tp.share(length)) if parallel.sequence_parallel else length
        stream = torch.zeros(1, share, model.width, requires_grad=True)

        def run(modules: dict[Recompute, nn.Module], *arguments: Any) -> LayerCost:
            for module in modules.values() if model.lora is not None else ():
                freeze(module)
            return _run(layout, modules, *arguments)

        def block(layer: int) -> LayerCost:
            window, kind = model.window_of_layers[layer], model.attention_of_layers[layer]
            kernels = [(model.window or 0, model.top_k)] if kind in ("krause", "dual") else []
            if kind != "krause":
                kernels.append((window or config.seq_len, None))
            q = torch.empty(1, 1, 1, model.head_size)
            if model.kind == "vit":
                grid = Grid(*model.patches, model.radius, model.metric, model.pooling == "cls")
                top_k = model.top_k_of_layers[layer]
                takes = gpu and kind == "krause" and triton_refuses(q, None, grid, top_k) is None
            else:
                takes = gpu and all(triton_refuses(q, keys, None, top_k) is None for keys, top_k in kernels)
            here = replace(layout, backend="triton" if takes else "auto")
            made: dict[Recompute, nn.Module] = {
                level: _Rerun(model, layer, replace(here, recompute=level)) for level in LEVELS
            }
            return run(made, stream, sequence)

        first = {kind: layer for layer, kind in reversed(list(enumerate(model.attention_of_layers)))}
        kinds = {kind: block(layer) for kind, layer in first.items()}
        if model.classes is not None:
            height, width, channels = model.image_shape
            given: tuple[Tensor, ...] = (torch.zeros(1, channels, height, width, dtype=torch.float32),)
            ends: tuple[nn.Module, nn.Module] = PatchEmbedding(model, layout.tp), ClassHead(model, layout.tp)
            logits = model.classes * dtype.itemsize
        else:
            assert model.vocab_size is not None
            given = torch.zeros(1, length, dtype=torch.int64), positions
            ends = Embedding(model, model.vocab_size, layout), Head(model, model.vocab_size, layout.tp)
            logits = length * len(tp.share(model.vocab_size)) * dtype.itemsize
        embedding = run(dict.fromkeys(LEVELS, ends[0]), *given)
        head = run(dict.fromkeys(LEVELS, ends[1]), stream, length)
    return ModelCost(embedding, tuple(kinds[k] for k in model.attention_of_layers), head, logits, stream.nbytes)


class _Rerun(nn.Module):
    """A block, computed again as a whole where the layout says so."""

    def __init__(self, model: ModelConfig, layer: int, layout: Layout):
        super().__init__()
        self.block, self.layout = Block(model, layer, layout), layout

    def forward(self, *arguments: Any) -> Tensor:
        return self.layout.run("full", self.block, *arguments)


def _run(layout: Layout, modules: Mapping[Recompute, nn.Module], *arguments: Any) -> LayerCost:
    """Forwards and backwards."""
    found: dict[Recompute, Bytes] = {}
    for level, module in modules.items():
        tp_bytes, cp_bytes = layout.tp.axis.traffic.bytes, layout.cp.traffic.bytes
        own = {p.untyped_storage()._cdata for p in module.parameters()}
        storages: dict[int, Tensor] = {}  # the tensors too, so that no address is used twice

        def pack(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            return storages.setdefault(tensor.untyped_storage()._cdata, tensor)

        with torch.autograd.graph.saved_tensors_hooks(lambda x, pack=pack: (pack(x), x)[1], lambda x: x):  # type: ignore[misc]
            out = module(*arguments)
        saved = sum(x.untyped_storage().nbytes() for key, x in storages.items() if key not in own)
        if out.requires_grad:
            out.sum().backward()
        sent = layout.tp.axis.traffic.bytes - tp_bytes, layout.cp.traffic.bytes - cp_bytes
        found[level] = Bytes(saved, *sent)
    params = list(module.parameters())
    return LayerCost(tuple(tuple(p.shape) for p in params), tuple(not p.requires_grad for p in params), found)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class StateBytes:
    """What DeepSpeed holds of a rank's parameters from step to step."""

    weights: int
    gradients: int
    optimizer: int  # master weights and both moments
    buffers: int  # through which gradients are sent; weights that are gathered

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


def state_bytes(
    config: RunConfig, shapes: Collection[tuple[int, ...]], ranks: int, frozen: Collection[tuple[int, ...]] = ()
) -> StateBytes:
    """Of a rank with trained and frozen parameters of these shapes, on a data axis of so many ranks.

    ZeRO 1 and 2 cut the parameters that decay, and those that do not, as two wholes, padded to two elements a rank;
    ZeRO 3 cuts each parameter."""
    zero, bf16 = config.parallel.zero, config.train.precision == "bf16"
    zero = max(zero, 1) if bf16 else zero
    width, sizes = 2 if bf16 else 4, list(map(math.prod, shapes))
    total, still = sum(sizes), sum(map(math.prod, frozen))
    plain = 4 * min(PLAIN_BUCKET, total) if ranks > 1 else 0
    if zero == 0:
        return StateBytes(4 * (total + still), 4 * total, 8 * total, plain)
    wide = sum(n for n, shape in zip(sizes, shapes, strict=True) if len(shape) > 1)
    padded = sum(-(-n // (2 * ranks)) * 2 * ranks for n in (wide, total - wide))
    part = sum(-(-n // ranks) for n in sizes) if zero == 3 else padded // ranks
    optimizer = 0 if config.parallel.offload else 12 * part
    bucket = 4 * min(REDUCE_BUCKET, total) if ranks > 1 else 0
    if zero == 3:
        parts = part + sum(-(-math.prod(shape) // ranks) for shape in frozen)
        live = min(LIVE_PARAMETERS, total + still)
        return StateBytes(width * parts, 4 * part, optimizer, bucket + width * live)
    gradients = 4 * part if zero == 2 else 4 * total  # before they are summed over the ranks
    if zero == 1 and bf16:  # those of a micro-batch, and their sum
        gradients, bucket = 4 * padded + 2 * total, plain
    return StateBytes(width * (padded + still), gradients, optimizer, bucket)
