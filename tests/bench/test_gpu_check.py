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


def test_tiles_are_tried_and_the_ones_in_use_come_back() -> None:
    before = gpu_check.Launch.grad_keys_tiles
    choices = gpu_check.tilings(16, 16)["grad_keys_tiles"][:2]
    result = gpu_check.best_of("grad_keys_tiles", choices, d=16, window=16, length=48, batch=1)
    assert set(result["ms"]) == {"in use", *(str(tuple(tiles)) for tiles in choices)}
    assert gpu_check.Launch.grad_keys_tiles is before


def test_every_part_has_its_files() -> None:
    for name in gpu_check.TESTS:
        assert (gpu_check.ROOT / "tests/ops" / name).exists()
    compile(gpu_check.SMALL, "small", "exec")
