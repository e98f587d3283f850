import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megakrause.data import sentencepiece_tokenizer
from megakrause.data import tokenizer as module
from megakrause.data.sentencepiece_tokenizer import SPACE
from megakrause.data.sources import read_texts
from megakrause.data.tokenizer import EOS_PIECE, Tokenizer, train_tokenizer
from megakrause.errors import UserError

AWKWARD = [
    "",
    " ",
    "    leading and trailing    ",
    "tabs\tand\t\ttabs",
    "\r\nCRLF\r\n\r\n",
    "NUL \0 and \x7f and \x80",
    SPACE,
    f"a{SPACE}b {SPACE} c{SPACE}{SPACE}",
    "\u2585\u2584",
    unicodedata.normalize("NFC", "é Å ﬁ"),
    unicodedata.normalize("NFD", "é Å"),
    "\ufeffBOM \ufffd \u2028\u3000\xa0",
    "中文 😀👩‍👩‍👧 \U0010ffff",
    f"{EOS_PIECE} <unk> <0x41> </s>",
    "def f(x):\n        return x  # two\n\n\n\n",
]
texts = st.lists(
    st.sampled_from([*AWKWARD, "self", "return ", "\n    ", "  ", "x = 10\n"]) | st.text(max_size=8), max_size=12
).map("".join)


def whole(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    """The same model, without our cutting into words."""
    return sentencepiece.SentencePieceProcessor(model_file=tokenizer.path)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
@settings(max_examples=300)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(texts)
@settings(max_examples=300)
def test_cutting_into_words_changes_no_id(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace(SPACE, "")  # which SentencePiece itself takes for a space
    assert tokenizer.encode(text) == whole(tokenizer).encode(text)


def test_cutting_into_slices_changes_no_id(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(module.__file__).read_text() * 3
    expected = whole(tokenizer).encode(text.replace(SPACE, ""))
    for size in (1, 7, 1000):
        monkeypatch.setattr(sentencepiece_tokenizer, "SLICE", size)
        assert tokenizer.encode(text.replace(SPACE, "")) == expected
    monkeypatch.setattr(sentencepiece_tokenizer, "CACHED_WORDS", 3)
    assert tokenizer.encode(text.replace(SPACE, "")) == expected


def test_the_space_symbol_is_its_three_bytes(tokenizer: Tokenizer) -> None:
    pieces = [whole(tokenizer).id_to_piece(i) for i in tokenizer.encode(f"a{SPACE}")]
    assert pieces == ["a", "<0xE2>", "<0x96>", "<0x81>"]


def test_encode_array(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_array("def main():")
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode("def main():")


def test_separator_and_broken_characters_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert tokenizer.decode([tokenizer.eos, *tokenizer.encode("ab"), tokenizer.eos]) == "ab"
    assert tokenizer.decode(ids[: len(ids) - 1]) in ("\ufffd", "")


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a \ud800 b")


def test_identity(tokenizer: Tokenizer) -> None:
    assert tokenizer.fingerprint == xxhash.xxh3_128_hexdigest(Path(tokenizer.path).read_bytes())
    assert tokenizer.vocab_size == 600
    assert whole(tokenizer).id_to_piece(tokenizer.eos) == EOS_PIECE
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.encode("x y")) == (tokenizer.fingerprint, tokenizer.encode("x y"))


def test_bad_files_are_named_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Path(tokenizer.path).read_bytes()
    for name, content in {"empty": b"", "noise": b"no model" * 99, "cut": model[: len(model) // 2]}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^[^\n]*{name} is not a SentencePiece model$"):
            Tokenizer.load(path)
    with pytest.raises(UserError, match=r"^cannot read tokenizer [^\n]*missing: No such file or directory$"):
        Tokenizer.load(tmp_path / "missing")


def test_foreign_models_give_their_own_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One that adds a prefix, normalises and has no byte pieces."""
    text = Path(os.__file__).read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(tmp_path / "foreign"), vocab_size=500, minloglevel=2
    )
    foreign = Tokenizer.load(tmp_path / "foreign.model")
    for sample in (*AWKWARD, text):
        assert foreign.encode(sample) == whole(foreign).encode(sample)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_quiet(kind, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = [Path(module.__file__).read_text(), "tab\tand \u2585 and \0"] * 20
    first = train_tokenizer(iter(text), 500, tmp_path / "a.model", kind=kind)
    second = train_tokenizer(text, 500, tmp_path / "folder" / "b.model", kind=kind)
    assert first.fingerprint == second.fingerprint
    assert [first.decode(first.encode(sample)) for sample in AWKWARD] == AWKWARD
    assert "LOG(" not in (err := capfd.readouterr().err) and "trainer" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "folder"]


def test_a_sample_is_taken_evenly_and_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pieces = [f"{number:04d}" for number in range(1000)]
    assert module._sample(pieces, 1000) == pieces[::4]
    assert "1 piece in 4 is used" in capfd.readouterr().err
    assert module._sample(pieces, 4000) == pieces
    assert capfd.readouterr().err == ""


def test_training_that_cannot_be_done_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 500, tmp_path / "a.model")
    with pytest.raises(UserError, match=r"100 pieces on this text: Vocabulary size is smaller[^\n]*$"):
        train_tokenizer(["some text"] * 9, 100, tmp_path / "a.model")
    with pytest.raises(UserError, match=r"5000 pieces on this text: Vocabulary size too high[^\n]*$"):
        train_tokenizer(["some text"] * 9, 5000, tmp_path / "a.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compression_of_source_code(tmp_path: Path) -> None:
    texts = list(read_texts([os.path.dirname(os.__file__)], suffixes=[".py"], exclude=["site-packages"]))
    tokenizer = train_tokenizer(texts, 4096, tmp_path / "code.model")
    num_bytes = sum(len(text.encode()) for text in texts)
    ids = [tokenizer.encode_array(text) for text in texts]
    assert num_bytes / sum(map(len, ids)) >= 3.3
    assert all(tokenizer.decode(some) == text for some, text in zip(ids[::7], texts[::7], strict=True))
