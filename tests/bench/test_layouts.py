"""The benchmark of layouts: all learn alike, and what went over the wire is what was planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_is_sent_in_each_layout_is_what_is_planned(tmp_path: Path) -> None:
    out = tmp_path / "layouts.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launcher, "-m", "megakrause", "bench", "training", "--layouts", "--json", str(out)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["layout"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 8
    # Where gloo sends what a ring would: not reduce-scatter, which it makes of a whole sum; and where both ranks send
    # alike. The rest is headers, and small sums such as the number of tokens.
    for layout in ("pp 1 dp 2 cp 1 tp 1 zero 0", "pp 1 dp 2 cp 1 tp 1 zero 1", "pp 1 dp 1 cp 1 tp 2 zero 0"):
        row = rows[layout]
        assert row["planned MiB"] <= row["wire MiB"] <= 1.05 * row["planned MiB"], row
    assert 0 < rows["pp 1 dp 1 cp 2 tp 1 zero 0"]["cp MiB"] < rows["pp 1 dp 1 cp 1 tp 2 zero 0"]["tp MiB"] / 10
