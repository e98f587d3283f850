"""`make gpu-check`: everything worth knowing of this project on a CUDA GPU, in one go of about ten minutes.

Each part runs whatever becomes of the others; results are written as they come, to gpu-report/ or the folder given.
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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakrause import krause_attention
from megakrause.bench.attention import Setting, forward_backward, make_inputs
from megakrause.bench.attention import run as bench_attention
from megakrause.bench.decode import run as bench_decode
from megakrause.bench.measure import machine, take_turns
from megakrause.ops.krause_launch import Launch, Tiles
from megakrause.table import table

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_krause_triton.py", "test_krause_operators.py", "test_krause_decode.py", "test_golden.py")
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
    parser.add_argument("--only", nargs="+", help="parts to run: " + ", ".join(PARTS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here; `make test` checks the kernels without one", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"{date.today()}: {machine()}, triton {triton.__version__}, CUDA {torch.version.cuda}", flush=True)
    results = {}
    for name, part in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        print(f"\n== {name}", flush=True)
        began = time.time()
        log = arguments.output / f"{name}.txt"
        with open(log, "w") as file, contextlib.redirect_stdout(Tee(sys.stdout, file)):
            print(f"{date.today()}: {machine()}, triton {triton.__version__}")
            try:
                part(arguments.output)
                results[name] = "ok"
            except Exception as error:  # the other parts go on
                traceback.print_exc(file=sys.stdout)
                results[name] = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        results[name] += f" ({time.time() - began:.0f} s)"
        (arguments.output / "summary.json").write_text(json.dumps(results, indent=1))
    print("\n" + "\n".join(f"{name}: {result}" for name, result in results.items()))
    return int(not all(result.startswith("ok") for result in results.values()))


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


def check_kernels(output: Path) -> None:
    tests = [str(ROOT / "tests/ops" / name) for name in TESTS]
    options = ["-q", "--maxfail=30", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling, on one core each
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    call(sys.executable, "-m", "pytest", *tests, *options, MEGAKRAUSE_TEST_GPU="1")


def check_repeats(output: Path) -> None:
    """Two runs of a large case are equal, bit for bit."""
    setting = Setting(batch=2, heads=8, dtype="bfloat16")
    inputs = make_inputs(setting, 4096, exact=False)

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        return krause_attention(*leaves, window=128, top_k=64)

    first, second = (forward_backward(attend, inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), "two runs differ"
    print("output and all gradients of two runs are equal bit for bit")


def time_attention(output: Path) -> None:
    rows: list[dict[str, Any]] = []
    for d, window, top_k in ((64, 128, 64), (64, 256, 128), (128, 128, 64)):
        setting = Setting(window, top_k, batch=4, heads=16, head_dim=d, dtype="bfloat16")
        name = f"attention-d{d}-w{window}"
        found = bench_attention(setting, [8192], output / f"{name}.json", None)
        rows += found if (d, window) == (64, 128) else []
    setting = Setting(heads=16, dtype="bfloat16")
    lengths = [2**n for n in range(10, 18)]
    sweep = bench_attention(setting, lengths, output / "attention.json", output / "attention.png")
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


def time_decoding(output: Path) -> None:
    bench_decode([100, 10000, 100000], 16, output / "decode.json")


def train(output: Path) -> None:
    """The demo's configuration in bf16, ZeRO 1 and 3, with a resume half-way, against the same on the CPU."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RuntimeError("deepspeed is not installed")
    from megakrause.config import load_config
    from megakrause.demo import CONFIG, prepare, sources

    os.chdir(ROOT)
    config = load_config(CONFIG)
    data = Path(config.data.tokenizer).parent
    if not (data / "valid.manifest.json").exists():
        prepare(data, {"train": list(sources(held_out=False)), "valid": list(sources(held_out=True))}, config)
    losses: dict[str, list[float]] = {}
    for name, zero, hidden in (("cpu", 1, True), ("zero1", 1, False), ("zero3", 3, False)):
        folder = output.resolve() / "training" / name
        shutil.rmtree(folder, ignore_errors=True)
        for steps in (20, 40):
            settings = [f"output={folder}", f"train.steps={steps}", "train.precision=bf16", f"parallel.zero={zero}"]
            settings += ["optim.schedule=constant", "checkpoint.every=20", "train.eval_every=0"]
            environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if hidden else {}
            call(sys.executable, "-m", "megakrause", "train", str(CONFIG), *settings, **environment)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    rows = [{"step": i + 1} | {name: values[i] for name, values in losses.items()} for i in range(0, 40, 4)]
    print(table(rows))
    for name in ("zero1", "zero3"):
        worst = max(abs(a - b) / b for a, b in zip(losses[name], losses["cpu"], strict=True))
        print(f"{name}: losses of 40 steps within {worst:.1e} of the CPU's")
        assert worst < 2**-7, f"{name} leaves the CPU's losses by {worst:.1e}"


def tune(output: Path) -> None:
    """Other sizes of tiles than the ones in use, timed; what to change in krause_launch.py, if anything."""
    lines = []
    for d, window in ((64, 128), (128, 128), (64, 256), (64, 512)):
        for which, choices in tilings(d, window).items():
            lines += [best_of(which, choices, d, window, length=8192, batch=4)]
            print(json.dumps(lines[-1]), flush=True)
    (output / "tiles.json").write_text(json.dumps(lines, indent=1))


def tilings(d: int, window: int) -> dict[str, list[Tiles]]:
    def select(rows: int, columns: int, warps: int) -> Tiles:
        return Tiles(rows, columns, warps, 2, triton.cdiv(window, columns))

    return {
        "select_tiles": [select(*x) for x in ((64, 64, 4), (64, 64, 8), (32, 64, 4), (32, 128, 4), (16, 128, 4),
                                              (16, 128, 8), (64, 128, 8))],
        "attend_tiles": [Tiles(*x) for x in ((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2))],
        "grad_queries_tiles": [Tiles(*x) for x in ((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 2),
                                                   (128, 32, 8, 2))],
        "grad_keys_tiles": [Tiles(*x) for x in ((32, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2), (32, 128, 8, 2),
                                                (64, 64, 8, 2), (32, 64, 4, 3))],
    }  # fmt: skip


def best_of(which: str, choices: list[Tiles], d: int, window: int, length: int, batch: int) -> dict[str, Any]:
    """Milliseconds of forward and backward with each choice of one kernel's tiles, the one in use first."""
    top_k = None if which == "attend_tiles" else window // 2
    setting = Setting(window, top_k or window, batch=batch, heads=16, head_dim=d, dtype="bfloat16")
    if not torch.cuda.is_available():
        setting = replace(setting, heads=2, dtype="float32")
    inputs = make_inputs(setting, length, exact=False)

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        return krause_attention(*leaves, window=window, top_k=top_k, backend="triton")

    seconds = {}
    for tiles in [None, *choices]:
        try:
            with chosen(which, tiles):
                times = take_turns({"": lambda: forward_backward(attend, inputs)}, rounds=7)[""]
            seconds["in use" if tiles is None else str(tuple(tiles))] = min(times) * 1e3
        except Exception as error:  # too much shared memory, or a failure of the compiler: no choice
            print(f"{which} {tiles}: {type(error).__name__}")
    return {"tiles": which, "d": d, "window": window} | {"best": min(seconds, key=lambda n: seconds[n]), "ms": seconds}


@contextlib.contextmanager
def chosen(which: str, tiles: Tiles | None) -> Iterator[None]:
    kept: Callable[[Launch], Tiles] = getattr(Launch, which)
    if tiles is not None:
        setattr(Launch, which, lambda self: tiles)
    try:
        yield
    finally:
        setattr(Launch, which, kept)


def sanitize(output: Path) -> None:
    if shutil.which("compute-sanitizer") is None:
        raise RuntimeError("compute-sanitizer is not on the PATH")
    for tool in ("memcheck", "racecheck"):
        call("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL)


PARTS: dict[str, Callable[[Path], None]] = {
    "kernels": check_kernels,
    "repeats": check_repeats,
    "attention": time_attention,
    "decoding": time_decoding,
    "training": train,
    "tiles": tune,
    "sanitizer": sanitize,
}

if __name__ == "__main__":
    sys.exit(main())
