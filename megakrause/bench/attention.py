"""`megakrause bench attention`: Krause attention against what it replaces, by sequence length."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from megakrause.bench.measure import copy_bandwidth, machine, peak_memory, ratio, take_turns, write_json
from megakrause.bench.plot import plot_lines
from megakrause.errors import UserError
from megakrause.ops.krause import krause_attention
from megakrause.table import table

SIGMA = 2.5
DENSE_BYTES = 12 * 4  # the published form holds about a dozen float32 [h, s, s] at once
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SDPA_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    window: int = 128
    top_k: int = 64
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


def run(setting: Setting, lengths: list[int], json_path: Path | None, plot_path: Path | None) -> list[dict[str, Any]]:
    """Checks, times, prints the tables, writes JSON and plot. Raises UserError when a check fails."""
    title = (
        f"W {setting.window}, k {setting.top_k}, {setting.heads} heads of {setting.head_dim}, batch {setting.batch}, "
        f"{setting.dtype}; {machine()}"
    )
    print(title)
    check(setting)
    bandwidth = copy_bandwidth() if setting.device == "cuda" else None
    rows = [measure(setting, length, bandwidth) for length in tqdm(lengths, "measuring", unit="length", leave=False)]
    for kind in ("forward", "forward + backward"):
        print(f"\n{kind}, ms")
        print(table([{"T": row["T"], **row[kind]} for row in rows]))
    print(
        "\nmedians; x: medians of ratios, round by round. published: the published layer's dense arithmetic. "
        f"sdpa: torch's full causal softmax attention ({rows[0]['sdpa backend']})."
    )
    if bandwidth is not None:
        print("replayed from CUDA graphs: the GPU's own time, without waiting for Python.")
        print(f"floor: q, k, v, the results and the gradients moved once, at {bandwidth / 1e12:.2f} TB/s (measured).")
    if json_path is not None:
        write_json(json_path, {"machine": machine(), "setting": asdict(setting), "rows": rows})
    if plot_path is not None:
        names = [name.removesuffix(" ms") for name in rows[0]["forward + backward"] if name.endswith(" ms")]
        times = {name: [row["forward + backward"][f"{name} ms"] for row in rows] for name in names}
        plot_lines(plot_path, "forward + backward\n" + title, [row["T"] for row in rows], times)
    return rows


# ---- the contestants


def krause(setting: Setting, top_k: int | None) -> Attend:
    return partial(krause_attention, window=setting.window, top_k=top_k)


def published(setting: Setting, q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
    """The arithmetic of the published layer between its projections: dense distances, additive masks made anew, topk
    with gather and scatter (github.com/Jingkun-Liu/Krause-Synchronization-Transformers, autoregressive models)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b h s d
    s = q.shape[2]
    distance = (q**2).sum(-1, keepdim=True) + (k**2).sum(-1, keepdim=True).mT - 2 * (q @ k.mT)
    scores = distance / (-2 * torch.exp(2 * log_sigma[:, None, None]))
    row, column = torch.arange(s, device=q.device)[:, None], torch.arange(s, device=q.device)
    for hidden in (column > row, column < row - setting.window + 1):
        scores = scores + torch.zeros(s, s, device=q.device).masked_fill(hidden, -torch.inf)
    if s > setting.top_k:
        index = scores.topk(setting.top_k, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, index, scores.gather(-1, index))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def fastest_sdpa(inputs: list[Tensor]) -> tuple[str, Attend]:
    """The backend of torch's attention that is fastest forward and backward on these inputs, by name."""
    if inputs[0].device.type == "cpu":
        return "torch's choice", sdpa
    seconds: dict[str, float] = {}
    for backend in SDPA_BACKENDS:
        attend = partial(sdpa, backend=backend)
        try:
            times = take_turns({backend.name: partial(forward_backward, attend, inputs)}, rounds=3, replayed=True)
        except RuntimeError:  # not for these inputs, or not on this GPU
            continue
        seconds[backend.name] = min(times[backend.name])
    name = min(seconds, key=lambda n: seconds[n])
    return name.lower(), partial(sdpa, backend=getattr(SDPBackend, name))


def flex(setting: Setting, length: int, bias_gradient: bool = False) -> Attend:
    """FlexAttention with the same window and key bias, without a selection: what torch's compiler makes of it. The
    gradient that goes through the bias is a hundred times slower than all else, with atomics; it is timed without."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def in_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - setting.window)

    torch.compiler.reset()  # it compiles one function for a few shapes only, and from then on runs it uncompiled
    mask = create_block_mask(in_window, None, None, length, length, device=setting.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, log_sigma: Tensor) -> Tensor:
        inverse, keys = torch.exp(-2 * log_sigma), k
        if not bias_gradient:
            inverse, keys = inverse.detach(), keys.detach()
        bias = -keys.float().square().sum(-1).transpose(1, 2) / 2 * inverse[:, None]  # b h s

        def score(z: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return z * inverse[h] + bias[b, h, j]

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, score_mod=score, block_mask=mask, scale=1.0).transpose(1, 2)

    return attend


# ---- checking and timing


def check(setting: Setting) -> None:
    """Outputs and gradients of what is timed against the float64 reference, on inputs whose z is exact."""
    length = 3 * setting.window + 5
    reference = {k: partial(krause_attention, window=setting.window, top_k=k, backend="reference") for k in
                 (setting.top_k, None)}  # fmt: skip
    exact = make_inputs(setting, length, exact=True)
    expected = {k: forward_backward(attend, [x.double() for x in exact]) for k, attend in reference.items()}
    # float32: sums of hundreds of terms, each good to 6e-8. 16 bits: each operand of a product is rounded once.
    tolerance = 1e-5 if setting.dtype == "float32" else 8 * torch.finfo(DTYPES[setting.dtype]).eps
    for name, top_k in (("krause", setting.top_k), ("k >= W", None)):
        _compare(name, forward_backward(krause(setting, top_k), exact), expected[top_k], tolerance)
        if setting.dtype != "float32":  # 16 bits would hide a key too many or too few
            single = forward_backward(krause(setting, top_k), [x.float() for x in exact])
            _compare(f"{name} in float32", single, expected[top_k], 1e-5)
    if setting.device == "cuda":
        _compare("flex", forward_backward(flex(setting, length, bias_gradient=True), exact), expected[None], tolerance)
    # The published form keeps exactly k keys where scores tie, so its inputs are generic; and in float64, so that
    # rounding does not select other keys.
    generic = [x.double() for x in make_inputs(setting, length, exact=False)]
    target = forward_backward(reference[setting.top_k], generic)
    _compare("published", forward_backward(partial(published, setting), generic), target, 1e-10)


def _compare(name: str, got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= tolerance:
            raise UserError(f"{name} differs from the reference by {error:.1e}; nothing was timed")


def measure(setting: Setting, length: int, bandwidth: float | None) -> dict[str, Any]:
    """One row: times, ratios and memory at one sequence length."""
    inputs = make_inputs(setting, length, exact=False)
    backend, softmax = fastest_sdpa(inputs)
    contestants: dict[str, Attend] = {"krause": krause(setting, setting.top_k), "k >= W": krause(setting, None)}
    if setting.device == "cuda":
        contestants["flex"] = flex(setting, length)
    contestants["sdpa"] = softmax
    names = [*contestants, "published"]
    available = torch.cuda.mem_get_info()[0] if setting.device == "cuda" else 8 * 2**30
    if length**2 * setting.heads * setting.batch * DENSE_BYTES < available:
        contestants["published"] = partial(published, setting)
    row: dict[str, Any] = {"T": length, "sdpa backend": backend}
    for kind, call in (("forward", forward), ("forward + backward", forward_backward)):
        runs = {name: partial(call, attend, inputs) for name, attend in contestants.items()}
        seconds = take_turns(runs, rounds=5, replayed=True)
        ms = {f"{name} ms": statistics.median(seconds[name]) * 1e3 if name in seconds else None for name in names}
        ratios = {f"x {n}": ratio(seconds[n], seconds["krause"]) if n in seconds else None for n in names[2:]}
        memory = peak_memory(runs["krause"])
        row[kind] = ms | ratios | {"krause MiB": None if memory is None else memory / 2**20}
        if bandwidth is not None:
            floor = _bytes(setting, length, kind) / bandwidth
            row[kind]["of floor"] = floor / statistics.median(seconds["krause"])
    return row


def _bytes(setting: Setting, length: int, kind: str) -> int:
    """Bytes that must move, each once: forward q, k, v, out and 8 a row; backward these, and the gradient of each."""
    rows = setting.batch * setting.heads * length
    tensor = rows * setting.head_dim * DTYPES[setting.dtype].itemsize
    return 4 * tensor + 8 * rows + (0 if kind == "forward" else 8 * tensor + 8 * rows)


def make_inputs(setting: Setting, length: int, exact: bool) -> list[Tensor]:
    """q, k, v [b, s, h, d] and log_sigma [h]. exact: multiples of 1/8, for which z is exact in float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, length, setting.heads, setting.head_dim)
    qkv = [torch.randn(shape, generator=generator) for _ in range(3)]
    if exact:
        qkv = [(x * 8).round() / 8 for x in qkv]
    log_sigma = torch.full((setting.heads,), SIGMA).log()
    return [*(x.to(setting.device, DTYPES[setting.dtype]) for x in qkv), log_sigma.to(setting.device)]


def forward(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [attend(*inputs)]


def forward_backward(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs that have one."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]
