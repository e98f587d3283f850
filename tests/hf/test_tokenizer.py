"""Exported tokenizers give the ids of the project's own, and the text back."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megakrause.data.tokenizer import Tokenizer, train_tokenizer
from megakrause.errors import UserError
from megakrause.hf.tokenizer import write_tokenizer

ALPHABETS = [
    "ab", " a", "-= ", "  \n\t", "\r\n ", " (),:\n\tif", "\u2581 a", "\0a ", "<0x41>", "<|endoftext|> ", "<unk>",
    "aé中😀\U0010ffff ", "e\u0301\u200d\ufeff ﬁ①\u3000\u00a0", "etaoin shrdlu",
]  # fmt: skip


def sources() -> list[str]:
    """Texts of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    texts = []
    for path in files:
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            continue
    return texts


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def text() -> str:
        length = rng.randint(0, 60)
        if rng.random() < 0.1:
            codes = (rng.randrange(0x110000) for _ in range(length))
            return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        return "".join(rng.choices(rng.choice(ALPHABETS), k=length))

    return [text() for _ in range(count)]


def converted(path: Path, folder: Path) -> PreTrainedTokenizerFast:
    folder.mkdir()
    write_tokenizer(Tokenizer.load(path), folder, 4096)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    root = tmp_path_factory.mktemp("tokenizer")
    ours = train_tokenizer(sources()[::40], 1500, root / "tokenizer.model")
    return ours, converted(root / "tokenizer.model", root / "hf")


def check(ours: Tokenizer, theirs: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert ids == [ours.eos, *ours.encode(text)], text
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_random_texts(pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    check(*pair, random_texts(5000))


def test_the_standard_library(pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    texts = [text for text in sources() if len(text) < 20000][:300]
    assert len(texts) == 300
    check(*pair, texts)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [700, 8000])
def test_all_of_the_standard_library(tmp_path: Path, vocab_size: int) -> None:
    texts = sources()
    ours = train_tokenizer(texts[::5], vocab_size, tmp_path / "tokenizer.model")
    theirs = converted(tmp_path / "tokenizer.model", tmp_path / "hf")
    check(ours, theirs, texts)
    check(ours, theirs, random_texts(50000))


def test_repetitive_vocabularies(tmp_path: Path) -> None:
    """Pieces such as `abab`, which come about in several ways."""
    rng = random.Random(0)
    for trial in range(20):
        alphabet = rng.choice(["ab", " a", " ab", "-= ", "  a\n"])
        words = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(20)]
        texts = ["".join(rng.choices(words, k=20)) for _ in range(50)]
        try:
            ours = train_tokenizer(texts, 280 + trial, tmp_path / "tokenizer.model")
        except UserError:  # fewer pieces can be made of these
            continue
        theirs = converted(tmp_path / "tokenizer.model", tmp_path / str(trial))
        check(ours, theirs, ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(1000)])


def test_unigram_chooses_among_equally_likely(tmp_path: Path) -> None:
    ours = train_tokenizer(sources()[:10], 600, tmp_path / "tokenizer.model", kind="unigram")
    theirs = converted(tmp_path / "tokenizer.model", tmp_path / "hf")
    texts = random_texts(2000) + sources()[:20]
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert sorted(ids) == sorted([ours.eos, *ours.encode(text)]), text
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_special_pieces(pair: tuple[Tokenizer, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    ours, theirs = pair
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eos
    assert theirs.pad_token_id == theirs.unk_token_id != ours.eos
    assert theirs.convert_ids_to_tokens(ours.eos) == "<|endoftext|>"
    assert theirs("a", add_special_tokens=False)["input_ids"] == ours.encode("a")
    batch = theirs(["a", "a longer text"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0, 0] == theirs.pad_token_id and batch["attention_mask"][0, 0] == 0
    assert theirs.model_max_length == 4096

    text = "<|endoftext|> <unk> is text"
    theirs.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == [ours.eos, *ours.encode(text)]
    as_special = theirs(text, split_special_tokens=False)["input_ids"]
    assert as_special[:2] == [ours.eos, ours.eos]
    theirs(text, split_special_tokens=True)


def test_no_custom_code(pair: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    folder = Path(pair[1].name_or_path)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in config


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"add_dummy_prefix": True}, "it normalises text"),
        ({"user_defined_symbols": ["<sep>"]}, "it has user-defined or unused pieces"),
        ({"model_type": "char"}, "it is neither BPE nor unigram"),
    ],
)
def test_others_are_refused(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    with open(tmp_path / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sources()[0].splitlines()),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            **options | change,
        )
    with pytest.raises(UserError, match=problem):
        write_tokenizer(Tokenizer.load(tmp_path / "tokenizer.model"), tmp_path, 4096)


def byte_level(folder: Path, config: dict[str, object]) -> Path:
    """A folder with a tokenizer that puts three bytes together."""
    vocab = {byte: i for i, byte in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])}
    fast = FastTokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>", "<|pad|>"])
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>", "lstrip": false}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({"pad_token": "<|pad|>"}, {"pad_token_id": 259}),
        ({"pad_token": "<|no piece|>"}, {}),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}),
        ({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}, {}),
    ],
)
def test_hugging_face_folders_are_written_as_they_are(
    config: dict[str, object], special: dict[str, int], tmp_path: Path
) -> None:
    """But what would make transformers take another tokenizer than that of tokenizer.json."""
    source, out = byte_level(tmp_path / "source", config), tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(Tokenizer.load(source), out, 99) == {"bos_token_id": 258, "eos_token_id": 258} | special
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names[:2])
    ours, theirs = Tokenizer.load(source), AutoTokenizer.from_pretrained(out)
    for text in random_texts(200):
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode(text) and theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.model_max_length, theirs.eos_token_id, theirs.chat_template) == (99, ours.eos, "{{ messages }}")
    assert Tokenizer.load(out).fingerprint == ours.fingerprint


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = byte_level(tmp_path / "source", {})
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [0])
    with pytest.raises(UserError, match="transformers does not give the ids of tokenizer .*source; nothing"):
        write_tokenizer(Tokenizer.load(source), tmp_path, 99)
