"""`make gpu-check`: everything worth knowing of this project on a CUDA GPU, in one go of a few minutes.

Parts that time nothing run first, all at once; then the others, one by one. Each runs whatever becomes of the others;
results are written as they come, to gpu-report/ or the folder given.
Needs torch, triton and pytest; DeepSpeed for the training part alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import date
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakrause import krause_attention
from megakrause.bench.attention import Setting, forward_backward, make_inputs
from megakrause.bench.attention import run as bench_attention
from megakrause.bench.decode import run as bench_decode
from megakrause.bench.measure import machine, take_turns
from megakrause.ops import krause_backward, krause_forward
from megakrause.ops.krause_launch import Launch, Tiles
from megakrause.table import table

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_krause_triton.py",
    "test_krause_operators.py",
    "test_krause_decode.py",
    "test_golden.py",
    "test_feature_dropout.py",
)
SMALL = """
import torch
from megakrause import Grid, krause_attention
for options in (dict(window=20, top_k=7), dict(window=20), dict(grid=Grid(6, 6), top_k=3)):
    x = [torch.randn(1, 37, h, 32, device="cuda", dtype=torch.float16, requires_grad=True) for h in (4, 2, 2)]
    krause_attention(*x, torch.zeros(4, device="cuda"), **options).sum().backward()
torch.cuda.synchronize()
"""
# What to reach: (what, contestant, kind, sequence length, ratio, whether it is a speed-up or a share of time).
TARGETS = [
    ("time / flex", "flex", "forward", 8192, 1.5, 1.0),
    ("time / flex", "flex", "forward + backward", 8192, 1.2, 1.0),
    *(("speed-up over sdpa", "sdpa", "forward + backward", t, *x) for t, x in
      ((8192, (6, 10)), (32768, (25, 40)), (131072, (100, 160)))),
    *(("speed-up over published", "published", "forward", t, *x) for t, x in ((1024, (30, 50)), (4096, (150, 350)))),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-report")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run", default=list(PARTS))
    parser.add_argument("--tests", default="not slow", help="which tests of the kernels: an expression of pytest -m")
    parser.add_argument("--limit", type=float, default=900, help="seconds for the parts that run at once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 18)])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here; `make test` checks the kernels without one", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"{date.today()}: {machine()}, triton {triton.__version__}, CUDA {torch.version.cuda}", flush=True)
    untimed = [name for name in PARTS if name in UNTIMED and name in arguments.only]
    results: dict[str, str] = {}
    if len(untimed) > 1:  # each in a process of its own, all at once

        def alone(name: str) -> str:
            command = [sys.executable, __file__, "--only", name, "--output", str(arguments.output)]
            command += ["--tests", arguments.tests]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            try:
                printed, _ = process.communicate(timeout=arguments.limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed = process.communicate()[0] + f"\n{name}: failed: not done in {arguments.limit} s"
            print(printed[-8000:], flush=True)
            ends = [line for line in printed.splitlines() if line.startswith(f"{name}: ")]
            return ends[-1].removeprefix(f"{name}: ") if ends else f"failed: exit {process.returncode}"

        with ThreadPoolExecutor(len(untimed)) as pool:
            results |= zip(untimed, pool.map(alone, untimed), strict=True)
    for name in (name for name in PARTS if name in arguments.only and name not in results):
        results[name] = run_part(name, arguments)
    if len(results) > 1:
        (arguments.output / "summary.json").write_text(json.dumps(results, indent=1))
    print("\n" + "\n".join(f"{name}: {result}" for name, result in results.items()))
    return int(not all(result.startswith("ok") for result in results.values()))


def run_part(name: str, arguments: argparse.Namespace) -> str:
    """Runs one part; what it prints goes to its file too. How it ended."""
    began, result = time.time(), "ok"
    with open(arguments.output / f"{name}.txt", "w") as file, contextlib.redirect_stdout(Tee(sys.stdout, file)):
        print(f"\n== {name}\n{date.today()}: {machine()}, triton {triton.__version__}")
        try:
            PARTS[name](arguments)
        except Exception as error:  # the other parts go on
            traceback.print_exc(file=sys.stdout)
            result = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return f"{result} ({time.time() - began:.0f} s)"


class Tee(io.TextIOBase):
    """Writes to several files at once."""

    def __init__(self, *files: Any):
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


def call(*command: str, **environment: str) -> None:
    """Runs a command, prints what it prints. Raises RuntimeError when it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(done.stdout[-20000:])
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {' '.join(command)[:200]}")


# ---- the parts


def check_kernels(arguments: argparse.Namespace) -> None:
    tests = [str(ROOT / "tests/ops" / name) for name in TESTS]
    options = ["-q", "--maxfail=30", "-p", "no:cacheprovider", "-m", arguments.tests]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling, on one core each
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    call(sys.executable, "-m", "pytest", *tests, *options, MEGAKRAUSE_TEST_GPU="1")


def check_repeats(arguments: argparse.Namespace) -> None:
    """Two runs of a large case are equal, bit for bit."""
    setting = Setting(batch=2, heads=8, dtype="bfloat16")
    inputs = make_inputs(setting, 4096, exact=False)

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        return krause_attention(*leaves, window=128, top_k=64)

    first, second = (forward_backward(attend, inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), "two runs differ"
    print("output and all gradients of two runs are equal bit for bit")


def time_attention(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for d, window, top_k in ((64, 128, 64), (64, 256, 128), (128, 128, 64)):
        setting = Setting(window, top_k, batch=4, heads=16, head_dim=d, dtype="bfloat16")
        name = f"attention-d{d}-w{window}"
        found = bench_attention(setting, [8192], arguments.output / f"{name}.json", None)
        rows += found if (d, window) == (64, 128) else []
    setting = Setting(heads=16, dtype="bfloat16")
    sweep = bench_attention(
        setting, arguments.lengths, arguments.output / "attention.json", arguments.output / "attention.png"
    )
    print(table(compare_with_targets(rows + sweep)))


def compare_with_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets beside what was measured; of several rows of one length, the first counts."""
    by_length = {row["T"]: row for row in reversed(rows)}
    lines = []
    for what, contestant, kind, length, first, goal in TARGETS:
        times = by_length.get(length, {}).get(kind, {})
        ours, other = times.get("krause ms"), times.get(f"{contestant} ms")
        value = None if not ours or not other else ours / other if what.startswith("time") else other / ours
        better = None if value is None else (value <= first if what.startswith("time") else value >= first)
        lines.append(
            {"target": what, "kind": kind, "T": length, "first": first, "goal": goal, "measured": value}
            | {"reached": "-" if better is None else "yes" if better else "no"}
        )
    return lines


def time_decoding(arguments: argparse.Namespace) -> None:
    bench_decode([100, 10000, 100000], 16, arguments.output / "decode.json")


def train(arguments: argparse.Namespace) -> None:
    """The demo's configuration in bf16, ZeRO 1 and 3, with a resume half-way, against the same on the CPU."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RuntimeError("deepspeed is not installed")
    from megakrause.config.file import load_config
    from megakrause.demo import CONFIG, prepare, sources

    os.chdir(ROOT)
    config = load_config(CONFIG)
    data = Path(config.data.tokenizer).parent
    if not (data / "valid.manifest.json").exists():
        prepare(data, {"train": list(sources(held_out=False)), "valid": list(sources(held_out=True))}, config)
    runs = {"cpu": 1, "cpu in fp32": 1, "zero1": 1, "zero3": 3}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(runs)) as pool:
        losses = dict(zip(runs, pool.map(partial(losses_of, Path(folder)), runs, runs.values()), strict=True))
    print(table([{"step": i + 1} | {name: values[i] for name, values in losses.items()} for i in range(0, 40, 4)]))

    def distance(one: str, other: str) -> float:
        return max(abs(a - b) / b for a, b in zip(losses[one], losses[other], strict=True))

    allowed = 2 * distance("cpu", "cpu in fp32")  # what bf16 does by itself
    for name in ("zero1", "zero3"):
        found = distance(name, "cpu")
        print(f"{name}: losses of 40 steps within {found:.1e} of the CPU's; allowed {allowed:.1e}")
        assert found <= allowed, f"{name} leaves the CPU's losses by {found:.1e}, of {allowed:.1e}"


def losses_of(parent: Path, name: str, zero: int) -> list[float]:
    """Of 40 steps, the second half in a process of its own that goes on from the first one's checkpoint."""
    from megakrause.demo import CONFIG

    folder = parent / name
    for steps in (20, 40):
        settings = [f"output={folder}", f"train.steps={steps}", f"parallel.zero={zero}"]
        settings += [f"train.precision={'fp32' if 'fp32' in name else 'bf16'}"]
        settings += ["optim.schedule=constant", "checkpoint.every=20", "train.eval_every=0"]
        environment = {"OMP_NUM_THREADS": "4"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if name.startswith("cpu") else {}
        call(sys.executable, "-m", "megakrause", "train", str(CONFIG), *settings, **environment)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def compile_choices(arguments: argparse.Namespace) -> None:
    """Compiles what `tune` times; one core compiles one kernel."""
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        failed = [x for x in pool.map(_compile, choices_of_tiles(), chunksize=4) if x]
    print("\n".join(failed))


def tune(arguments: argparse.Namespace) -> None:
    """Each kernel alone, with other sizes of tiles beside the ones in use; what to change in krause_launch.py, if
    anything."""
    lines: list[dict[str, Any]] = []
    for _, group in groupby(choices_of_tiles(), key=lambda choice: choice[:4]):
        lines.append(best_of(list(group)))
        print(json.dumps(lines[-1]), flush=True)
        (arguments.output / "tiles.json").write_text(json.dumps(lines, indent=1))


class Choice(NamedTuple):
    kernel: str
    d: int
    window: int
    docs: bool
    tiles: Tiles | None


def choices_of_tiles() -> list[Choice]:
    # rows, columns, warps, stages, registers of a thread
    select = [
        (64, 64, 4, 2, 255),
        (64, 64, 4, 2, 168),
        (64, 128, 4, 2, 255),
        (32, 128, 4, 2, 255),
        (16, 128, 4, 2, 255),
        (32, 32, 1, 2, 255),
        (16, 16, 1, 2, 255),
    ]
    others = {
        "attend": [(64, 64, 4, 2, 255), (64, 64, 4, 2, 128), (64, 32, 4, 3, 168), (64, 32, 4, 3, 128)],
        "grad_queries": [(64, 64, 4, 2, 255), (64, 32, 4, 3, 255), (64, 32, 4, 3, 168), (64, 32, 4, 3, 128),
                         (64, 32, 4, 2, 128)],
        "grad_keys": [(64, 64, 4, 2, 255), (32, 64, 4, 2, 255), (32, 64, 4, 2, 168), (32, 64, 4, 3, 168),
                      (16, 64, 4, 2, 168), (16, 64, 4, 2, 128), (32, 32, 4, 2, 255)],
    }  # fmt: skip
    found = []
    for d, window, docs in ((64, 16, False), (64, 32, False), (64, 64, False), (64, 128, False), (64, 128, True),
                            (128, 128, False), (64, 256, False), (128, 256, False), (64, 512, False),
                            (64, 1024, False)):  # fmt: skip
        for rows, columns, warps, stages, registers in select:
            held = max(window, columns)
            if min(64, window) <= columns <= max(64, window) and rows * held <= 128 * 32 * warps:
                tiles = Tiles(rows, columns, warps, stages, held // columns, registers)
                found.append(Choice("select", d, window, docs, tiles))
        for kernel, shapes in others.items() if window == 128 else ():
            found += [Choice(kernel, d, window, docs, Tiles(*shape, registers=r)) for *shape, r in shapes]
    return found


def launcher(choice: Choice, length: int, batch: int) -> Callable[[], None]:
    """Runs one kernel, with these tiles or those in use."""
    kernel, d, window, docs, tiles = choice
    heads, dtype = (16, "bfloat16") if torch.cuda.is_available() else (2, "float32")
    setting = Setting(window, window // 2, batch=batch, heads=heads, head_dim=d, dtype=dtype)
    q, k, v, log_sigma = make_inputs(setting, length, exact=False)
    position = torch.arange(length, dtype=torch.int32, device=q.device)
    doc_start = (position - position % 700).expand(batch, length).contiguous() if docs else None
    top_k = None if kernel == "attend" else window // 2
    launch = Launch.of(q, k, window=window, grid=None, top_k=top_k, docs=docs, dropout=0.0, seed=0)
    out, lse, separator, squares = krause_forward.forward(launch, q, k, v, log_sigma, doc_start)
    shared = q, k, v, squares, log_sigma, doc_start
    delta, row_sums = torch.zeros_like(lse), torch.empty_like(lse)
    grads = [torch.empty_like(q) for _ in range(2)]
    if kernel == "select":
        run, default, last = krause_forward.select_and_attend, launch.select_tiles(), (out, lse, separator, top_k)
    elif kernel == "attend":
        run, default, last = krause_forward.attend, launch.attend_tiles(), (out, lse, separator)
    elif kernel == "grad_queries":
        last = out, lse, separator, q, grads[0], delta, row_sums
        run, default = krause_backward.grad_queries, launch.grad_queries_tiles()
    else:
        run, default, last = krause_backward.grad_keys, launch.grad_keys_tiles(), (lse, separator, q, delta, *grads)
    start = launch.by_keys if kernel == "grad_keys" else launch.by_rows
    return partial(start, run, tiles or default, *shared, *last)


def _compile(choice: Choice) -> str:
    try:
        launcher(choice, length=4 * choice.window, batch=1)()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return ""
    except Exception as error:  # too much shared memory, or a failure of the compiler: no choice
        return f"{choice}: {type(error).__name__} {str(error)[:80]}"


def best_of(choices: list[Choice], length: int = 8192, batch: int = 4) -> dict[str, Any]:
    """Milliseconds of one kernel with each choice of its tiles, taking turns; the ones in use come first."""
    first = choices[0]
    possible = [first._replace(tiles=None), *(choice for choice in choices if not _compile(choice))]
    runs = {str(tuple(x.tiles or ["in use"])): launcher(x, length, batch) for x in possible}
    seconds = take_turns(runs, rounds=5, replayed=True)
    ms = {name: round(statistics.median(times) * 1e3, 4) for name, times in seconds.items()}
    settings = {"kernel": first.kernel, "d": first.d, "W": first.window, "documents": first.docs}
    return settings | {"best": min(ms, key=lambda name: ms[name]), "ms": ms}


def sanitize(arguments: argparse.Namespace) -> None:
    if shutil.which("compute-sanitizer") is None:
        raise RuntimeError("compute-sanitizer is not on the PATH")
    for tool in ("memcheck", "racecheck"):
        call("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kernels": check_kernels,
    "training": train,
    "sanitizer": sanitize,
    "compile": compile_choices,
    "repeats": check_repeats,
    "tiles": tune,
    "attention": time_attention,
    "decoding": time_decoding,
}
UNTIMED = ("kernels", "training", "sanitizer", "compile")

if __name__ == "__main__":
    sys.exit(main())
