"""Training on several corpora: what a resumed run may change of its mix, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakrause.checkpoint.read import find_checkpoint
from megakrause.cli import main
from megakrause.config.file import load_config
from megakrause.data.open import train_samples
from megakrause.data.tokenizer import Tokenizer
from tests.training.runs import losses, train
from tests.training.test_watch import start


@pytest.fixture
def mix(config: Path) -> Path:
    """The config with both corpora to train on; the second may be used twice."""
    text, folder = config.read_text(), load_config(config).data.train.rpartition("/")[0]
    tables = (
        f'train = [\n{{ path = "{folder}/train", weight = [[0, 0.75], [4, 0.5]] }},\n'
        f'{{ path = "{folder}/valid", weight = 0.25, epochs = 20 }},\n]'
    )
    config.write_text(text.replace(f'train = "{folder}/train"', tables))
    return config


def test_a_mix_is_trained_resumed_and_lengthened(mix: Path, tmp_path: Path) -> None:
    printed = train(mix, f"output={tmp_path}/whole")
    assert "data:  70.8% from" in printed and "data:  29.2% from" in printed  # 12 and 4, then 5 and 3 of 24
    train(mix, f"output={tmp_path}/parts", "train.steps=3", "optim.schedule=constant")
    train(mix, f"output={tmp_path}/parts", "optim.schedule=constant")
    train(mix, f"output={tmp_path}/constant", "optim.schedule=constant")
    assert losses(tmp_path / "parts") == losses(tmp_path / "constant")


def test_what_was_trained_on_stays_and_what_comes_may_change(
    mix: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(mix, "train.steps=3")
    text = mix.read_text()
    mix.write_text(text.replace("[0, 0.75]", "[0, 0.5]"))
    assert main(["train", str(mix)]) == 1
    error = capfd.readouterr().err
    assert "was trained on 0.75 " in error and "now data.train says 0.667 " in error and "/train" in error
    mix.write_text(text.replace("[4, 0.5]", "[4, 0.1], [5, 0.9]"))
    assert main(["train", str(mix)]) == 0
    for key, value in (("data.packing", "best_fit"), ("data.shuffle_blocks", 3)):
        assert main(["train", str(mix), f"{key}={value}", "train.steps=9"]) == 1
        assert f"was trained with {key} = " in capfd.readouterr().err


def test_more_epochs_than_allowed_are_refused(mix: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mix.write_text(mix.read_text().replace("weight = [[0, 0.75], [4, 0.5]]", "epochs = 0.5"))
    assert main(["train", str(mix), "train.steps=100000"]) == 1
    line = capfd.readouterr().err.strip()
    assert line.startswith("error: train.steps = 100000 of train.global_batch = 4 need 400000 sequences, the epochs")
    steps = int(line.partition(", which is train.steps = ")[2].partition(";")[0])
    assert main(["train", str(mix), f"train.steps={steps + 1}"]) == 1
    assert f"which is train.steps = {steps};" in capfd.readouterr().err


def test_a_corpus_listed_twice_is_refused(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prefix = load_config(config).data.train
    assert main(["train", str(config), f"data.train=1 {prefix} 2 {prefix}.bin"]) == 1
    assert "data.train lists one source twice, as" in capfd.readouterr().err


def test_the_sequences_of_a_step_are_shown(mix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(mix), "--step", "2", "--count", "3"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("--- step 2, sequence ") == 3 and "data: the mix changes at steps 5" in printed
    config = load_config(mix)
    assert main(["data", "show", str(config.data.valid), "--tokenizer", config.data.tokenizer, "--count", "2"]) == 0
    shown = capfd.readouterr().out
    text = (Path(str(config.data.valid)).parent / "2-0.txt").read_text()
    assert "--- document 0, " in shown and text[:500] in shown
    assert main(["data", "show", str(config.data.valid)]) == 1
    assert "need --tokenizer" in capfd.readouterr().err
    assert main(["data", "show", str(config.data.valid), "--tokenizer", config.data.tokenizer, "--document", "6"]) == 1
    assert "has 6 documents; --document 6 is none of them" in capfd.readouterr().err


def test_another_global_batch_keeps_the_order_the_limits_and_the_curriculum(
    mix: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The weights change at step 4: of samples 4 * 2 after two steps of 2, and then of two more of 8."""
    train(mix, "train.global_batch=2", "train.steps=2")
    train(mix, "train.global_batch=8", "train.steps=8")
    state = find_checkpoint(tmp_path / "run").state
    assert state["batches"] == [[0, 0, 2], [2, 4, 8]] and state["position"] == 2 * 2 + 6 * 8
    assert [segment["start"] for segment in state["train_data"]] == [0, 2 * 2 + 2 * 8]
    # Epochs are counted in what was used, not in steps of today's size.
    config = load_config(mix)
    windows = train_samples(config, Tokenizer.load(config.data.tokenizer)).sources[1]
    allowed = 20 * len(windows)  # type: ignore[arg-type]
    mix.write_text(mix.read_text().replace("[4, 0.5]", "[4, 0.5], [8, 0.0]"))
    left = allowed - describe_given(tmp_path / "run")
    assert main(["train", str(mix), "train.global_batch=1", f"train.steps={8 + left + 1}"]) == 1
    assert f"which is train.steps = {8 + left};" in capfd.readouterr().err


def describe_given(output: Path) -> int:
    """How many sequences the second source has given."""
    first, second = find_checkpoint(output).state["train_data"]
    assert list(first["mix"].values()) == [3, 1] and list(second["mix"].values()) == [2, 1]
    count = 20 // 4 + sum(1 for n in range(32) if n % 3 == 1)  # 20 samples of 3 1, 32 of 2 1
    return count


def test_ranks_that_read_different_data_are_refused(mix: Path, tmp_path: Path) -> None:
    prelude = """
if os.environ["RANK"] == "1":
    from megakrause.data.shards import Corpus
    Corpus.fingerprint = property(lambda self: "0" * 32 if self.prefix.endswith("valid") else self.manifest.fingerprint)
"""
    launcher = start(mix, tmp_path / "run", prelude=prelude)
    _, said = launcher.communicate(timeout=200)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert launcher.returncode != 0 and len(errors) == 1, said
    assert "valid is not the same on rank 1 as on rank 0; copy it again" in errors[0]
