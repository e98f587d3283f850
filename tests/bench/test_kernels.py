"""The Triton kernels compile for GPUs that are not here, and hold in registers what they should.

Compilation is another process's work: in this one the kernels are interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megakrause.bench import kernels
from megakrause.bench.kernels import compile_all
from megakrause.errors import UserError

RECORD = Path(kernels.__file__).parent / "records/kernels.md"


def compile_kernels(folder: Path, *options: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    report = folder / "kernels.json"
    command = [sys.executable, "-m", "megakrause", "bench", "kernels", "--json", str(report), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())["rows"]


def assert_no_spills(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= (163 if row["sm"] == 80 else 227) * 1024  # what a block can have there
        head_dim = int(row["case"].split(" d ")[1].split()[0])
        narrow = not any(f"W {window}" in row["case"] for window in (256, 512, 1024))
        if narrow and head_dim <= 64:
            assert (row["stack"], row["spills"]) == (0, 0), row


@pytest.mark.slow
def test_one_configuration_of_each_kernel(tmp_path: Path) -> None:
    rows = compile_kernels(tmp_path)
    kernels = {"attend", "decode", "grad_keys", "grad_queries", "half_squares", "select_and_attend"}
    assert {(row["kernel"], row["sm"]) for row in rows} == {(k, sm) for k in kernels for sm in (80, 90, 100)}
    assert_no_spills(rows)
    for row in rows:
        if row["kernel"] in ("attend", "grad_keys", "grad_queries"):  # the tensor cores of each generation
            assert row["product"] == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[row["sm"]]


def test_no_length_and_no_seed_makes_another_kernel() -> None:
    script = """
from megakrause.bench.kernels import Case
for case in (Case(), Case(select=False, docs=True, dropout=0.1)):
    for launch in case.launches(90):
        integers = {n for n, x in zip(launch.kernel.arg_names, launch.arguments, strict=False) if isinstance(x, int)}
        assert integers and integers <= set(launch.kernel.do_not_specialize), (launch.kernel, integers)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some 420 kernels
def test_every_configuration(tmp_path: Path) -> None:
    table = tmp_path / "kernels.md"
    rows = compile_kernels(tmp_path, "--all", "--markdown", str(table))
    assert_no_spills(rows)
    assert sum(line.startswith("| select_and_attend") for line in table.read_text().splitlines()) > 100


def test_the_record_is_of_what_is_launched_now() -> None:
    script = """
import json
from megakrause.bench.kernels import SHIPPED, describe, different
print(json.dumps([describe(*item) for item in different(SHIPPED, [80, 90, 100])]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = [tuple(map(str, row.values())) for row in json.loads(done.stdout)]
    lines = RECORD.read_text().split("All:")[1].splitlines()
    recorded = [tuple(line.strip("| ").split(" | "))[:6] for line in lines if line.startswith("| ")]
    assert sorted(recorded[1:]) == sorted(launched), "write it anew: megakrause bench kernels --all --markdown"


def test_interpreted_kernels_are_not_compiled() -> None:
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        compile_all([], [90])
