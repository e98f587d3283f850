"""Folders as transformers saves them give the ids that transformers gives, without it."""

from __future__ import annotations

import argparse
import inspect
import json
import pickle
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megakrause import generate
from megakrause.cli import main
from megakrause.data.prepare import tokenize_corpus
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.errors import UserError

TEXTS = [
    inspect.getsource(argparse)[:20000],
    "The quick brown fox jumps over the lazy dog. <b>/</b>\n" * 20,
    "é Å ﬁ 中文 ünder 12345 ",
]
SAMPLES = [
    "",
    " ",
    "a",
    "  two  spaces \t\r\n\n x",
    "def f(x):\n        return x  # two\n\n\n",
    "I'll don't WE'VE 3.14159 1234567",
    "é Å ﬁ e\u0301 中文 😀👩‍👩‍👧 \U0010ffff \u3000\xa0\u200d\ufeff",
    "\0 \x7f \u2581a\u2581 \u2585",
    "[UNK <s <|end",
    *TEXTS,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def trained(fast: FastTokenizer, trainer: Any) -> FastTokenizer:
    fast.train_from_iterator(TEXTS, trainer)
    return fast


def gpt2() -> FastTokenizer:
    """Byte-level BPE; a long text has been cut and filled up with it, as its file remembers."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trained(fast, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet))
    fast.enable_truncation(8)
    fast.enable_padding(length=16)
    return fast


def byte_bpe(pattern: str, special: list[str], front: str | None = None) -> FastTokenizer:
    """As Llama 3 and Qwen: a pattern cuts text into words, special tokens come last, of which one may be put in front;
    and runs of spaces are added tokens that are not special."""
    fast = FastTokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    trained(fast, trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast.add_special_tokens(special)
    fast.add_tokens([AddedToken("        ", normalized=False)])
    if front is not None:
        ids = [(front, fast.token_to_id(front))]
        fast.post_processor = processors.TemplateProcessing(f"{front} $A", f"{front} $A $B", ids)
    return fast


def llama2() -> FastTokenizer:
    """BPE with byte fallback over SentencePiece's spaces, a space in front of every text."""
    space, letters = "\u2581", sorted({letter for text in TEXTS[:2] for letter in text if letter.isascii()})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), space, *letters]
    merges = []
    for left, right in [
        (space, "t"),
        ("h", "e"),
        (space + "t", "he"),
        (space, space),
        ("r", "e"),
        ("re", "t"),
        (".", "\n"),
    ]:
        merges.append((left, right))
        pieces.append(left + right)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return fast


def wordpiece() -> FastTokenizer:
    fast = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return trained(fast, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))


def unigram() -> FastTokenizer:
    """As T5: the separator is a piece of the model, and NFKC makes it of other characters."""
    fast = FastTokenizer(models.Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    return trained(fast, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"))


KINDS: dict[str, tuple[Callable[[], FastTokenizer], dict[str, str]]] = {
    "gpt2": (gpt2, {"eos_token": "<|endoftext|>"}),
    "llama3": (
        lambda: byte_bpe(LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "qwen": (
        lambda: byte_bpe(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "llama2": (llama2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "wordpiece": (wordpiece, {"eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}),
    "unigram": (unigram, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
}
BYTES: dict[str, Callable[[str], str]] = {  # those with a piece for every byte -> what they change of a text
    "gpt2": lambda text: text,
    "llama3": lambda text: unicodedata.normalize("NFC", text),
    "qwen": lambda text: unicodedata.normalize("NFC", text),
    "llama2": lambda text: text.replace("\u2581", " "),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("saved")

    def saved(kind: str) -> Path:
        make, tokens = KINDS[kind]
        if not (root / kind).exists():
            PreTrainedTokenizerFast(tokenizer_object=make(), **tokens).save_pretrained(root / kind)
        return root / kind

    return saved


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved("llama3"), tmp_path / "llama3"))


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    words = [
        "the ",
        " the",
        "return",
        "\n",
        "  ",
        "        ",
        "é",
        "e\u0301",
        "中",
        "😀",
        "'ll",
        "123",
        "<",
        "a",
        "\u2581",
    ]
    return ["".join(rng.choices(words, k=rng.randint(0, 20))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, saved: Callable[[str], Path]) -> None:
    ours, theirs = Tokenizer.load(saved(kind)), AutoTokenizer.from_pretrained(saved(kind))
    texts = SAMPLES + random_texts(500)
    for text, expected in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        ids = ours.encode_array(text)
        assert ids.dtype == np.int32 and ids.tolist() == ours.encode(text) == expected, text
        assert ours.decode(ids) == theirs.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if kind in BYTES:
            assert ours.decode(ids) == BYTES[kind](text)
    assert ours.vocab_size == len(theirs)
    assert ours.eos == theirs.eos_token_id
    assert ours.decode([ours.eos, *ours.encode("the fox"), ours.eos]) == "the fox"


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_like_a_special_token_is_text(kind: str, saved: Callable[[str], Path]) -> None:
    ours, theirs = Tokenizer.load(saved(kind)), AutoTokenizer.from_pretrained(saved(kind))
    special = KINDS[kind][1]["eos_token"]
    for text in (special, f"the{special}", f"{special}{special} fox {special}", f"a <s>{special}", "a＜／s＞b"):
        ids = ours.encode(text)
        assert ours.eos not in ids, text
        if kind == "unigram":
            assert ours.decode(ids).replace(" ", "") == text.replace(" ", "").replace("＜／s＞", "</s>")
        else:
            assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if kind in BYTES:
            assert ours.decode(ids) == text


def test_a_separator_that_is_not_marked_special(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ours = Tokenizer.load(folder)
    text = "x<|end_of_text|>é<|end_of_text|>"
    assert ours.eos not in ours.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.decode([ours.eos, *ours.encode("y"), ours.eos]) == "y"


def test_the_separator_is_found_wherever_it_is_named(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {name: folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")}
    ids = {name: folder / name for name in ("generation_config.json", "config.json")}
    end, eot = (Tokenizer.load(folder)._codec._fast.token_to_id(t) for t in ("<|end_of_text|>", "<|eot_id|>"))
    del config["eos_token"]

    def found(**content: dict[str, Any]) -> int:
        for path in (*tokens.values(), *ids.values()):
            path.unlink(missing_ok=True)
        for name, value in content.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        return Tokenizer.load(folder).eos

    as_object = {"eos_token": {"content": "<|eot_id|>", "lstrip": False, "normalized": False, "special": True}}
    assert found(tokenizer_config=as_object | config) == eot
    assert found(special_tokens_map=as_object) == eot
    assert found(special_tokens_map=as_object, tokenizer_config=config | {"eos_token": None}) == eot
    assert found(special_tokens_map=as_object, tokenizer_config={"eos_token": "<|end_of_text|>"}) == end
    assert found(generation_config={"eos_token_id": [eot, end]}, config={"eos_token_id": end}) == eot
    assert found(generation_config={}, config={"eos_token_id": end}, tokenizer_config=config) == end
    assert found(special_tokens_map={"eos_token": "<|end_of_text|>"}, config={"eos_token_id": eot}) == end
    with pytest.raises(UserError, match=r'llama3 has no [^\n]*; name it as "eos_token" in its tokenizer_config.json$'):
        found(tokenizer_config=config, config={"eos_token_id": None}, generation_config={"eos_token_id": []})
    with pytest.raises(
        UserError, match=r"eos_token of its tokenizer_config.json is '</s>', which tokenizer.json lacks"
    ):
        found(tokenizer_config={"eos_token": "</s>"})


def test_bad_folders_are_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            Tokenizer.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    message = "has neither tokenizer.json nor tokenizer.model; a folder needs one of them"
    assert refused(tmp_path / "empty") == f"tokenizer {tmp_path / 'empty'} {message}"
    assert refused(tmp_path / "no") == f"cannot read tokenizer {tmp_path / 'no'}: No such file or directory"
    good = (folder / "tokenizer.json").read_bytes()
    for content in (b"", b"{}", b"[]", b"no JSON", good[:2000], b"\xff" + good):
        (folder / "tokenizer.json").write_bytes(content)
        assert refused(folder).startswith(f"{folder / 'tokenizer.json'} is not a Hugging Face tokenizer: ")
    (folder / "tokenizer.json").write_bytes(good)
    for content, reason in ((b"{", "is not JSON"), (b"[]", "holds a JSON list"), (b"\xff", "is not JSON")):
        (folder / "tokenizer_config.json").write_bytes(content)
        assert refused(folder).startswith(f"{folder / 'tokenizer_config.json'} {reason}")


def test_lone_surrogate_is_refused(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        Tokenizer.load(saved("gpt2")).encode("a \ud800 b")


def test_the_fingerprint_is_of_what_determines_ids(folder: Path, tmp_path: Path) -> None:
    path, first = folder / "tokenizer.json", Tokenizer.load(folder)
    content = json.loads(path.read_text())

    def changed(**change: Any) -> str:
        path.write_text(json.dumps(content | change))
        return Tokenizer.load(folder).fingerprint

    assert len(first.fingerprint) == 32
    assert changed(post_processor=None, truncation=None) == first.fingerprint
    merges = content["model"]["merges"]
    swapped = content["model"] | {"merges": [merges[1], merges[0], *merges[2:]]}
    others = {changed(model=swapped), changed(normalizer=None), changed(added_tokens=content["added_tokens"][:-1])}
    assert len(others | {first.fingerprint}) == 4
    changed()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert Tokenizer.load(folder).fingerprint not in others | {first.fingerprint}
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>", "chat_template": "x"}')
    folder.rename(tmp_path / "elsewhere")
    moved = Tokenizer.load(tmp_path / "elsewhere")
    assert (moved.fingerprint, moved.path) == (first.fingerprint, str(tmp_path / "elsewhere"))
    assert Tokenizer.load(tmp_path / "elsewhere" / "tokenizer.json").path == moved.path


@pytest.mark.parametrize("kind", KINDS)
def test_it_pickles_and_its_files_are_all_of_it(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    first = Tokenizer.load(saved(kind))
    for name, content in first.files.items():
        (tmp_path / name).write_bytes(content)
    for copy in (pickle.loads(pickle.dumps(first)), Tokenizer.load(tmp_path)):
        assert (copy.fingerprint, copy.vocab_size, copy.eos) == (first.fingerprint, first.vocab_size, first.eos)
        assert [copy.encode(text) for text in SAMPLES] == [first.encode(text) for text in SAMPLES]
    assert copy.files == first.files


def test_holes_in_the_ids_count(tmp_path: Path) -> None:
    FastTokenizer(models.WordLevel({"a": 0, "</s>": 9}, "a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    found = Tokenizer.load(tmp_path)
    assert (found.vocab_size, found.eos, found.encode("a")) == (10, 9, [0])


def test_a_folder_with_a_sentencepiece_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.model")
    found = Tokenizer.load(tmp_path)
    assert found.fingerprint == tokenizer.fingerprint and found.encode("a b") == tokenizer.encode("a b")
    assert found.path == str(tmp_path / "tokenizer.model") and list(found.files) == ["tokenizer.model"]


def test_transformers_is_not_imported() -> None:
    script = "import sys, megakrause.data.tokenizer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


CONFIG = """
output = "{folder}/run"
[model]
layers = 2
width = 32
heads = 4
kv_heads = 2
mlp_width = 64
window = 12
top_k = 6
[data]
train = "{folder}/train"
valid = "{folder}/valid"
tokenizer = "{tokenizer}"
[optim]
lr = 1e-2
eps = 1e-3
[train]
steps = 2
global_batch = 2
seq_len = 32
"""


@pytest.mark.parametrize("kind", ["llama3", "llama2", "wordpiece"])
def test_from_text_to_an_export(
    kind: str,
    saved: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prepared by two processes, trained, evaluated, continued, exported; the folder is gone after training."""
    folder = Path(shutil.copytree(saved(kind), tmp_path / "tokenizer"))
    tokenizer = Tokenizer.load(folder)
    special = KINDS[kind][1]["eos_token"]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"the quick {special} fox\n" * 60)
        tokenize_corpus([str(tmp_path / f"{name}.txt")], tokenizer, tmp_path / name, workers=2)
        corpus = Corpus.open(tmp_path / name, tokenizer)
        assert (corpus.read(0, corpus.num_tokens) == tokenizer.eos).sum() == 1
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path, tokenizer=folder))
    assert main(["train", str(config)]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    assert {path.name for path in checkpoint.iterdir()} >= set(tokenizer.files)
    assert main(["train", str(config), "train.steps=3"]) == 0
    shutil.rmtree(folder)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "run"), "--prompt", "the fox", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the fox")
    both = tokenizer.encode("the fox quick dog")
    monkeypatch.setattr(generate, "generate_tokens", lambda *_, **__: iter(both[len(tokenizer.encode("the fox")) :]))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "the fox"]) == 0
    assert capsys.readouterr().out == "the fox quick dog\n"
    out = tmp_path / "out"
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(out)]) == 0
    theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert theirs.eos_token_id == tokenizer.eos and Tokenizer.load(out).fingerprint == tokenizer.fingerprint
    for text in SAMPLES:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
