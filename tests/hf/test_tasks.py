"""Tasks of lm-evaluation-harness: the same scores as by its own command on the exported folder."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megakrause.cli import main
from tests.training.conftest import CONFIG
from tests.training.runs import train

TASK = """
task: which_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run, exported: a dual model; tasks: one task on a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "config.toml").write_text(CONFIG.format(data=corpus, folder=folder))
    train(folder / "config.toml", "model.attention=dual", "train.steps=20")
    assert main(["convert", "to-hf", str(folder / "run"), str(folder / "exported")]) == 0
    rng, words = random.Random(0), ["return", "value", "index", "for", "range", "name", "self"]
    rows = [
        {
            "question": " ".join(rng.choices(words, k=rng.randint(2, 30))),
            "choices": [" " + word for word in rng.sample(words, 3)],
            "answer": rng.randrange(3),
        }
        for _ in range(40)
    ]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "which_word.yaml").write_text(TASK.format(data=folder / "tasks" / "data.jsonl"))
    return folder


def scores(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text())["results"]["which_word"]
    return {key: value for key, value in found.items() if key.startswith("acc")}


def test_scores_are_those_of_the_harness(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--tasks", "which_word", "--task-folder", str(folder / "tasks")]
    assert main(["evaluate", str(folder / "run"), *common, "--json", str(tmp_path / "run.json")]) == 0
    printed = capsys.readouterr().out
    assert "which_word" in printed and "acc_norm" in printed and "40" in printed
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={folder}/exported,trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "which_word", "--include_path", str(folder / "tasks"), "--output_path", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (theirs,) = (tmp_path / "o").rglob("results*.json")
    assert scores(tmp_path / "run.json") == scores(theirs)
    assert 0 < scores(theirs)["acc,none"] < 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no such task", "lm-evaluation-harness has no task no_such_task; `lm_eval ls tasks` lists its own"),
        ("data that cannot be reached", "boolq cannot be run on"),
        ("code that is not ours", "has code of its own, which is not run unless asked for: --trust-remote-code"),
        ("code that config.json names elsewhere", "has code of its own, which is not run unless asked for"),
        ("code that its tokenizer brings", "has code of its own, which is not run unless asked for"),
        ("a file where there is no folder", "there is no folder"),
        ("no checkpoint", "is neither a checkpoint nor the folder of a run with one"),
    ],
)
def test_what_cannot_be_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, said: str
) -> None:
    path, task, options = folder / "exported", "which_word", list[str]()
    match how:
        case "no such task":
            task = "no_such_task"
        case "data that cannot be reached":
            task = "boolq"
        case "code that is not ours":
            path = tmp_path / "changed"
            shutil.copytree(folder / "exported", path)
            code = path / "modeling_megakrause.py"
            code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'canary')!r}, 'w')\n")
        case "code that config.json names elsewhere":
            path = tmp_path / "changed"
            shutil.copytree(folder / "exported", path)
            (path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
            config = json.loads((path / "config.json").read_text())
            config["auto_map"]["AutoConfig"] = "evil.MegakrauseConfig"
            (path / "config.json").write_text(json.dumps(config))
        case "code that its tokenizer brings":
            path = tmp_path / "changed"
            shutil.copytree(folder / "exported", path)
            config = json.loads((path / "tokenizer_config.json").read_text())
            config["auto_map"] = {"AutoTokenizer": ["someone/else--evil.Tokenizer", None]}
            (path / "tokenizer_config.json").write_text(json.dumps(config))
        case "a file where there is no folder":
            options = ["--json", str(tmp_path / "missing" / "scores.json")]
        case "no checkpoint":
            path = tmp_path
    assert main(["evaluate", str(path), "--tasks", task, "--task-folder", str(folder / "tasks"), *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "canary").exists()
