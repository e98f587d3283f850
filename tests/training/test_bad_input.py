"""Whatever is wrong ends in one clear line and a non-zero exit, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megakrause.cli import main
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.tokenizer import train_tokenizer
from tests import disks
from tests.disks import needs_root
from tests.training.conftest import write_texts
from tests.training.runs import rows, start, start_script, state, train, wait_for

pytestmark = pytest.mark.faults


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs `megakrause train`, which must fail with one line; returns it."""
    capsys.readouterr()
    assert main(["train", *map(str, arguments)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train=/nowhere/corpus", "/nowhere/corpus"),
        ("data.valid=/nowhere/corpus", "/nowhere/corpus"),
        ("data.tokenizer=/nowhere/tokenizer.model", "/nowhere/tokenizer.model"),
        ("train.stepz=3", "'train.stepz'; did you mean 'train.steps'"),
        ("model.window=0", "model.window = 0 is not allowed: input should be greater than 0"),
        ("model.top_k=0", "model.top_k = 0 is not allowed: input should be greater than 0"),
        ("model.vocab_size=100", "model.vocab_size = 100 is less than the tokenizer's"),
        ("train.micro_batch=3", "train.micro_batch = 3"),
        ("train.init_from=/nowhere", "/nowhere"),
        ("train", "'train' is not an override"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert said in refuse(capsys, config, override)
    assert not (tmp_path / "run").exists()


def test_sequence_longer_than_learned_positions(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refuse(capsys, config, "model.positions=learned", "model.max_positions=47")
    assert "train.seq_len = 48" in line and "model.max_positions = 47" in line


def test_empty_corpus(config: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = bytearray((corpus / "train.idx").read_bytes()[:34])
    index[18:34] = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "empty.idx").write_bytes(index + (0).to_bytes(8, "little"))
    (tmp_path / "empty.bin").write_bytes(b"")
    assert "empty" in refuse(capsys, config, f"data.train={tmp_path}/empty")


def test_shards_of_another_tokenizer(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path, 40, seed=3)
    other = train_tokenizer((Path(p).read_text() for p in texts), 310, tmp_path / "other.model")
    tokenize_corpus(texts, other, tmp_path / "other")
    line = refuse(capsys, config, f"data.train={tmp_path}/other")
    assert "tokenizer" in line and str(tmp_path / "other") in line


def test_checkpoint_of_another_model_or_order_is_not_resumed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config)]) == 0
    before = state(tmp_path / "run")
    for override, said in [
        ("model.width=64", "model.width = 32, now it is 64"),
        ("train.seq_len=24", "train.seq_len = 48, now it is 24"),
        ("train.seed=7", "train.seed = 0, now it is 7"),
        ("data.mask_documents=false", "data.mask_documents = True, now it is False"),
    ]:
        assert said in refuse(capsys, config, "train.steps=8", override)
    line = refuse(
        capsys,
        config,
        "model.width=64",
        "model.head_dim=8",
        f"train.init_from={tmp_path}/run",
        f"output={tmp_path}/other",
    )
    assert "another model" in line and "(320, 32)" in line and "(320, 64)" in line
    assert "needs an empty output" in refuse(capsys, config, "checkpoint.resume=false")
    after = state(tmp_path / "run")
    assert all(after[key].equal(before[key]) for key in before)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["parallel.tp=3"],
            "parallel.tp = 3 cannot share model.heads = 4 and model.kv_heads = 2; use one of [1, 2, 4]",
        ),
        (["parallel.cp=5"], "train.seq_len = 48 cannot be shared by parallel.cp = 5"),
        (["parallel.cp=3", "model.attention=softmax"], "parallel.cp = 3 cannot share the 4 heads"),
        (["parallel.pp=3"], "model.layers = 2 are too few for parallel.pp = 3 stages; use at most 2"),
        (["parallel.pp=2", "parallel.zero=2"], "parallel.zero = 2 with parallel.pp = 2"),
        (["parallel.pp=2", "parallel.stages=[2, 1]"], "parallel.stages = [2, 1] have 3 layers in all"),
        (["parallel.stages=[1, 1]"], "parallel.stages = [1, 1] must list at least one layer for each of 1 stages"),
        (["parallel.sequence_parallel=true"], "set tp > 1"),
        (["parallel.offload=true"], "use parallel.zero = 1 to 3"),
        (
            ["parallel.offload=true", "parallel.zero=1", "parallel.pp=2", "train.precision=bf16"]
            + ["model.tie_embeddings=true"],
            "gives wrong gradients in DeepSpeed; set one of them otherwise",
        ),
        (["parallel.tp=2"], "1 processes are no multiple of parallel.pp x cp x tp = 1 x 1 x 2; start a multiple of 2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert said in refuse(capsys, config, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("processes", "overrides", "said"),
    [
        (2, ["parallel.tp=4"], "2 processes are no multiple of parallel.pp x cp x tp = 1 x 1 x 4"),
        (2, ["train.global_batch=3"], "train.global_batch = 3 cannot be shared by 2 data-parallel ranks"),
        (2, ["parallel.tp=RANK+1"], "start all with the same config"),
        (2, ["optim.lr=0.RANK1"], "optim.lr = 0.11 on rank 1 and 0.01 on rank 0; start all with the same config"),
    ],
)
def test_every_rank_refuses_with_one_line(
    config: Path, tmp_path: Path, processes: int, overrides: list[str], said: str
) -> None:
    """RANK stands for the rank that sees the override."""
    script = f"""
import os, re, sys
from megakrause.cli import main
rank = os.environ["RANK"]
overrides = [o.replace("RANK+1", str(int(rank) + 1)).replace("RANK", rank) for o in {overrides!r}]
sys.exit(main(["train", {str(config)!r}, *overrides]))
"""
    (tmp_path / "script.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and lines and all(said in line for line in lines), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", "900k") as folder:
        yield folder


@needs_root
def test_full_disk_keeps_the_checkpoint_that_is_there(
    config: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "run"
    assert main(["train", str(config), f"output={output}", "log.tensorboard=false"]) == 0
    before = state(output)
    line = refuse(capsys, config, f"output={output}", "log.tensorboard=false", "train.steps=12")
    assert "No space left on device" in line and str(output) in line
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-6"]
    after = state(output)
    assert all(after[key].equal(before[key]) for key in before)


@needs_root
def test_read_only_output(config: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = refuse(capsys, config, f"output={small_disk}/run")
    assert str(small_disk) in line and "Read-only file system" in line


def test_output_below_a_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refuse(capsys, config, f"output={tmp_path}/file/run")


def test_no_usable_checkpoint_is_no_fresh_start(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config)]) == 0
    weights = tmp_path / "run" / "checkpoints" / "step-6" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    line = refuse(capsys, config, "train.steps=8")
    assert "none of the 1 checkpoints" in line and "does not match its checksum" in line and weights.name in line


def test_checkpoints_that_are_not_where_they_were_are_no_fresh_start(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run = ["train", str(config), "train.steps=6", "checkpoint.every=2", f"checkpoint.folder={elsewhere}"]
    assert main(run) == 0
    before = [path.read_bytes() for path in (output / "config.toml", output / "metrics.jsonl")]
    line = refuse(capsys, config, "train.steps=8", "checkpoint.every=2")
    assert f"{output} is of a run with checkpoints in {elsewhere}: give it the same checkpoint.folder" in line
    elsewhere.rename(tmp_path / "unmounted")
    line = refuse(capsys, config, "train.steps=8", "checkpoint.every=2", f"checkpoint.folder={elsewhere}")
    assert f"came to step 6 and saved every 2, and no checkpoint is in {elsewhere}" in line
    assert before == [path.read_bytes() for path in (output / "config.toml", output / "metrics.jsonl")]


def test_two_runs_cannot_share_a_folder_of_checkpoints(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the one's output, whichever of them comes first."""
    place = f"checkpoint.folder={tmp_path}/run/checkpoints"
    for first, second in ([], [f"output={tmp_path}/b", place]), ([f"output={tmp_path}/c", place], []):
        running = start(config, "train.steps=100000", "train.seed=7", *first)
        wait_for(running, tmp_path / ("c" if first else "run") / "metrics.jsonl")
        assert f"another run, process {running.pid} on " in refuse(capsys, config, "train.seed=7", *second)
        running.kill()
        running.wait()


def test_two_runs_cannot_share_an_output(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(config, "train.steps=100000")
    wait_for(first, tmp_path / "run" / "metrics.jsonl")
    line = refuse(capsys, config)
    assert f"another run, process {first.pid} on " in line and f" is writing to {tmp_path}/run" in line
    first.kill()
    first.wait()
    assert main(["train", str(config)]) == 0


@pytest.mark.slow
def test_a_run_that_began_while_another_ended_does_not_go_on_from_an_older_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    """It has chosen its checkpoint when the other saves a newer one and lets go of the folder."""
    prelude = f"""
from megakrause.training.loop import Trainer
real = Trainer._open_data
def slow(self, *arguments):
    open({str(tmp_path / "chosen")!r}, "w").close()
    while not os.path.exists({str(tmp_path / "go on")!r}):
        time.sleep(0.01)
    return real(self, *arguments)
Trainer._open_data = slow
"""
    schedule = "optim.schedule=constant"
    assert main(["train", str(config), schedule, "train.steps=3"]) == 0
    late = start_script(config, schedule, "train.steps=9", prelude=prelude)
    wait_for(late, tmp_path / "chosen")
    assert main(["train", str(config), schedule, "train.steps=6"]) == 0
    (tmp_path / "go on").touch()
    printed, _ = late.communicate(timeout=60)
    assert late.returncode == 1
    assert f"error: another run has just saved step 6 in {tmp_path}/run/checkpoints; start again to go on" in printed
    assert "resuming from" in train(config, schedule, "train.steps=9")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 10))


def test_tokens_outside_the_vocabulary_of_a_corpus_without_manifest(
    config: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.idx").write_bytes((corpus / "train.idx").read_bytes())
    tokens = np.fromfile(corpus / "train.bin", np.uint16)
    tokens[100] = 320
    tokens.tofile(tmp_path / "foreign.bin")
    line = refuse(capsys, config, f"data.train={tmp_path}/foreign", "train.steps=1000")
    assert "token 320, number 100, is outside the vocabulary of 320" in line and f"{tmp_path}/foreign" in line


def test_a_finished_run_keeps_the_config_it_was_trained_with(config: Path, tmp_path: Path) -> None:
    assert main(["train", str(config)]) == 0
    before = (tmp_path / "run" / "config.toml").read_text()
    assert main(["train", str(config), "optim.lr=0.5"]) == 0
    assert (tmp_path / "run" / "config.toml").read_text() == before


def test_verify_names_what_is_damaged_and_fails(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "checkpoint.every=3"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    weights = tmp_path / "run" / "checkpoints" / "step-6" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "step-3" in said.out and f"{weights} does not match its checksum" in said.err
    assert main(["generate", str(tmp_path / "run"), "--max-new-tokens", "1"]) == 0
    assert "passed over step-6" in capsys.readouterr().err
