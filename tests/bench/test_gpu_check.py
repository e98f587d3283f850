"""What of the GPU check can run without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import gpu_check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SCRIPT = Path(gpu_check.__file__)


def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "there is no CUDA GPU here; `make test` checks the kernels without one"


def test_targets_stand_beside_what_was_measured() -> None:
    times = {"krause ms": 2.0, "flex ms": 1.6, "sdpa ms": 30.0, "published ms": None}
    rows = [{"T": 8192, "forward": times, "forward + backward": times}]
    lines = gpu_check.compare_with_targets(rows)
    measured = {(line["target"], line["kind"], line["T"]): (line["measured"], line["reached"]) for line in lines}
    assert measured["time / flex", "forward", 8192] == (1.25, "yes")
    assert measured["time / flex", "forward + backward", 8192] == (1.25, "no")
    assert measured["speed-up over sdpa", "forward + backward", 8192] == (15.0, "yes")
    assert measured["speed-up over published", "forward", 1024] == (None, "-")


@pytest.mark.slow
def test_tiles_are_timed_beside_the_ones_in_use() -> None:
    for kernel in ("select", "attend", "grad_queries", "grad_keys"):
        good = gpu_check.Tiles(16, 16, tiles=1 if kernel == "select" else None)
        impossible = gpu_check.Tiles(7, 16)  # rows are a power of two
        choices = [gpu_check.Choice(kernel, 16, 16, True, tiles) for tiles in (good, impossible)]
        result = gpu_check.best_of(choices, length=48, batch=1)
        assert list(result["ms"]) == [str(("in use",)), str(tuple(good))]


def test_tiles_that_are_tried_hold_a_window() -> None:
    choices = gpu_check.choices_of_tiles()
    assert len(choices) == len(set(choices))
    for kernel, _, window, _, tiles in choices:
        if kernel == "select":
            assert tiles.rows <= tiles.columns and tiles.columns * tiles.tiles >= window


def test_every_part_has_its_files() -> None:
    for name in gpu_check.TESTS:
        assert (gpu_check.ROOT / "tests/ops" / name).exists()
    compile(gpu_check.SMALL, "small", "exec")
