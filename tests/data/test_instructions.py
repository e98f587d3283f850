"""Instructions: what is learnt is the responses, however samples are packed, cut and stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import tokenizers
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers, trainers

from megakrause.cli import main
from megakrause.data.instructions import Instructions
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PAIR = Instructions(("inputs", "targets"))
CHAT = Instructions(("messages",))
SAMPLES = [
    {"inputs": f"question {i} {'more ' * (i % 7)}: ", "targets": f"answer {i} {'yes ' * (i % 5)}"} for i in range(50)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Hugging Face folder with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator([json.dumps(SAMPLES)], trainer)
    fast.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def write_lines(path: Path, samples: list[Any]) -> str:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return str(path)


def parts(corpus: Corpus, document: int, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """(learnt, text) of a document."""
    shard, bounds = corpus.documents_of(0)
    start, end = bounds[document : document + 2]
    tokens = shard.tokens.array(shard.dtype, start * shard.dtype.itemsize, end - start)
    changes = np.flatnonzero(np.diff(tokens < 0)) + 1
    return [(bool(p[0] >= 0), decode(np.maximum(p, ~p), tokenizer)) for p in np.split(tokens, changes)]


def decode(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """With special tokens."""
    fast = tokenizers.Tokenizer.from_buffer(tokenizer.files["tokenizer.json"])
    return str(fast.decode(ids.tolist(), skip_special_tokens=False))


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "dataset"])
@pytest.mark.parametrize("workers", [1, 2])
def test_pairs(form: str, workers: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / f"samples.{form}"
    match form:
        case "jsonl":
            write_lines(source, SAMPLES)
        case "jsonl.gz":
            import gzip

            source.write_bytes(gzip.compress("".join(json.dumps(s) + "\n" for s in SAMPLES).encode()))
        case "parquet":
            parquet.write_table(arrow.Table.from_pylist([s | {"other": 1} for s in SAMPLES]), source)
        case "dataset":
            from datasets import Dataset

            Dataset.from_list(SAMPLES).save_to_disk(str(source))
    name = f"hf:{source}" if form == "dataset" else str(source)
    summary = tokenize_corpus([name], tokenizer, tmp_path / "out", instructions=PAIR, workers=workers)
    assert summary.documents == 50 and summary.rejected == summary.filtered == summary.cut == 0
    corpus = Corpus.open(tmp_path / "out", tokenizer)
    for i, sample in enumerate(SAMPLES):
        assert parts(corpus, i, tokenizer) == [(False, sample["inputs"]), (True, sample["targets"] + "<|endoftext|>")]
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("seq_len", [7, 64, 1000])
def test_every_response_token_is_learnt_once_an_epoch_and_nothing_else(
    packing: Any, seq_len: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenize_corpus([write_lines(tmp_path / "s.jsonl", SAMPLES)], tokenizer, tmp_path / "out", instructions=PAIR)
    corpus = Corpus.open(tmp_path / "out", tokenizer)
    windows = TokenWindows(corpus, seq_len, eos=tokenizer.eos, mask_documents=True, seed=1, packing=packing)
    batch = windows.batch(np.arange(len(windows)))
    learnt = sorted(batch.targets[batch.loss_mask].tolist())
    expected = []
    for sample in SAMPLES:
        prompt, response = tokenizer.encode(sample["inputs"]), tokenizer.encode(sample["targets"])
        seen = max(0, seq_len - len(prompt))  # what is cut off is not learnt without its prompt
        expected.append([*response, tokenizer.eos][:seen])
    assert seq_len < 64 or sum(map(len, expected)) == 300
    assert learnt == sorted(token for tokens in expected for token in tokens)
    assert batch.tokens.min() >= 0 and batch.targets.min() >= 0
    # Prompts are read: each follows what came before it in its document.
    if seq_len == 1000:
        assert batch.doc_start is not None
        for row in range(len(batch.tokens)):
            for start in batch.doc_start[row].unique().tolist():
                inside = batch.doc_start[row] == start
                text = tokenizer.decode(batch.targets[row][inside].tolist())
                if batch.loss_mask[row][inside].any():
                    assert text in [s["inputs"] + s["targets"] for s in SAMPLES]


def test_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "left out"},
    ]
    source = write_lines(tmp_path / "chat.jsonl", [{"messages": messages}])
    tokenize_corpus([source], tokenizer, tmp_path / "out", instructions=CHAT)
    found = parts(Corpus.open(tmp_path / "out", tokenizer), 0, tokenizer)
    assert found == [
        (False, "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHow many?<|end|>\n<|start|>assistant\n"),
        (True, "Three.<|end|>\n"),
        (False, "<|start|>user\nAnd now?<|end|>\n<|start|>assistant\n"),
        (True, "Four.<|end|>\n<|endoftext|>"),
    ]
    ids = Corpus.open(tmp_path / "out", tokenizer).read(0, 1)
    assert ~int(ids[0]) == 1  # <|start|>, one token


def test_long_samples_are_cut_counted_and_left_out_when_no_response_is_left(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long_prompt = {"inputs": "question " * 100, "targets": "answer"}
    long_response = {"inputs": "question ", "targets": "answer " * 100}
    source = write_lines(tmp_path / "s.jsonl", [long_prompt, long_response, SAMPLES[0]])
    options = Instructions(("inputs", "targets"), max_tokens=40)
    summary = tokenize_corpus([source], tokenizer, tmp_path / "out", instructions=options)
    assert (summary.documents, summary.filtered, summary.cut) == (2, 1, 2)
    (_, prompt), (_, response) = parts(Corpus.open(tmp_path / "out", tokenizer), 0, tokenizer)
    assert prompt == "question " and long_response["targets"].startswith(response) and len(response) > 40


def test_what_is_no_sample_is_listed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = [
        ({"inputs": "a", "targets": 5}, "the response is no string but int"),
        ({"inputs": None, "targets": "b"}, "the prompt is no string but NoneType"),
        ({"inputs": "a", "targets": ""}, "the response is empty"),
        ({"inputs": "a"}, "no object with a field 'targets' but 'inputs'"),
    ]
    source = write_lines(tmp_path / "s.jsonl", [SAMPLES[0], *(sample for sample, _ in bad), SAMPLES[1]])
    summary = tokenize_corpus([source], tokenizer, tmp_path / "out", instructions=PAIR)
    assert summary.documents == 2 and summary.rejected == len(bad) and summary.quarantine is not None
    rows = [json.loads(line) for line in summary.quarantine.read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rows] == [(i + 2, reason) for i, (_, reason) in enumerate(bad)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "a conversation is a list of messages"),
        ([{"role": "user", "content": "x"}], "no message is of the assistant"),
        ([{"role": "assistant"}], "the chat template does not take it"),
        ([{"role": "user", "content": "x<|end|>"}, {"role": "assistant", "content": "y"}], "the special token <|end|>"),
    ],
)
def test_what_is_no_conversation_is_listed(tokenizer: Tokenizer, tmp_path: Path, messages: Any, reason: str) -> None:
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    template = TEMPLATE.replace("m['content']", "m['content'] + ''")
    config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"chat_template": template}
    files = tokenizer.files | {"tokenizer_config.json": json.dumps(config).encode()}
    source = write_lines(tmp_path / "s.jsonl", [{"messages": messages}, {"messages": good}])
    summary = tokenize_corpus([source], Tokenizer(files, "here"), tmp_path / "out", instructions=CHAT)
    assert summary.rejected == 1 and summary.quarantine is not None
    assert reason in summary.quarantine.read_text()


REASONING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"chat_template": template}
    return Tokenizer(tokenizer.files | {"tokenizer_config.json": json.dumps(config).encode()}, "here")


def test_a_template_that_changes_what_came_before_makes_a_document_of_every_answer(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As Qwen3's, which drops earlier reasoning."""
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    source = write_lines(tmp_path / "s.jsonl", [{"messages": messages}])
    tokenize_corpus([source], with_template(tokenizer, REASONING), tmp_path / "out", instructions=CHAT)
    corpus = Corpus.open(tmp_path / "out", tokenizer)
    assert corpus.num_documents == 2
    first = "<|start|>user\na<|end|>\n<|start|>assistant\n"
    assert parts(corpus, 0, tokenizer) == [(False, first), (True, "<think></think>b<|end|>\n<|endoftext|>")]
    second = first + "b<|end|>\n<|start|>user\nc<|end|>\n<|start|>assistant\n"
    assert parts(corpus, 1, tokenizer) == [(False, second), (True, "<think></think>d<|end|>\n<|endoftext|>")]


def test_a_template_with_a_date_gives_the_same_every_day(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    source = write_lines(tmp_path / "s.jsonl", [{"messages": good}])
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    tokenize_corpus([source], with_template(tokenizer, dated + TEMPLATE), tmp_path / "out", instructions=CHAT)
    (_, prompt), _ = parts(Corpus.open(tmp_path / "out", tokenizer), 0, tokenizer)
    assert prompt.startswith("26 Jul 2024<|start|>user")
    today = with_template(tokenizer, "{{ strftime_now('%d') }}" + TEMPLATE)
    with pytest.raises(UserError, match="writes today's date"):
        tokenize_corpus([source], today, tmp_path / "out", instructions=CHAT)


def test_what_cannot_be_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="a.txt is text: instructions are records"):
        tokenize_corpus([str(tmp_path / "a.txt")], tokenizer, tmp_path / "out", instructions=PAIR)
    source = write_lines(tmp_path / "s.jsonl", SAMPLES)
    config = {"eos_token": "<|endoftext|>"}
    plain = Tokenizer(tokenizer.files | {"tokenizer_config.json": json.dumps(config).encode()}, "here")
    with pytest.raises(UserError, match="tokenizer here has no chat template"):
        tokenize_corpus([source], plain, tmp_path / "out", instructions=CHAT)


def test_a_template_cannot_run_code(tokenizer: Tokenizer, tmp_path: Path) -> None:
    attack = "{{ messages.__class__.__base__.__subclasses__() }}"
    config = {"eos_token": "<|endoftext|>", "chat_template": attack}
    hostile = Tokenizer(tokenizer.files | {"tokenizer_config.json": json.dumps(config).encode()}, "here")
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    source = write_lines(tmp_path / "s.jsonl", [{"messages": good}] * 3)
    with pytest.raises(UserError, match="no document has any text"):
        tokenize_corpus([source], hostile, tmp_path / "out", instructions=CHAT)
    assert "unsafe" in (tmp_path / "out.quarantine.jsonl").read_text()


def test_the_command_and_what_shows_it(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    source = write_lines(tmp_path / "s.jsonl", SAMPLES)
    command = [sys.executable, "data_prep/tokenize_text.py", "--input", source, "--prompt-field", "inputs"]
    command += ["--tokenizer", str(folder), "--output", str(tmp_path / "out"), "--max-tokens", "12"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert "samples were longer than 12 tokens and were cut there" in done.stdout
    assert main(["data", "show", str(tmp_path / "out"), "--tokenizer", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "[prompt] question 0 : \n" in printed and "[response] answer 0 " in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tokens", "20"], "--max-tokens is of instructions: give --prompt-field or --messages-field, too"),
        (["--response-field", "targets"], "--response-field is of instructions"),
        (["--prompt-field", "inputs", "--min-chars", "3"], "are not of instructions"),
    ],
)
def test_options_that_do_not_belong_together(tmp_path: Path, options: list[str], said: str) -> None:
    command = [sys.executable, "data_prep/tokenize_text.py", "--input", "a", "--tokenizer", "b", "--output", "c"]
    done = subprocess.run([*command, *options], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr


def test_other_corpora_have_the_fingerprints_that_they_had(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("question 1")
    tokenize_corpus([str(tmp_path / "a.txt")], tokenizer, tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out", tokenizer)
    assert corpus.manifest is not None and not corpus.manifest.prompts and corpus.dtype == np.uint16
    before = corpus.fingerprint
    path = tmp_path / "out.manifest.json"
    old = json.loads(path.read_text())
    del old["prompts"]  # as it was written before there were any
    path.write_text(json.dumps(old))
    assert Corpus.open(tmp_path / "out", tokenizer).fingerprint == before
