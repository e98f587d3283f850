import json
import os
import re
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakrause.data import formats, shards
from megakrause.data import writer as writer_module
from megakrause.data.check import adopt_corpus, verify_corpus
from megakrause.data.layout import HEADER, MAGIC, TokenizerInfo
from megakrause.data.mixed import MixedWindows
from megakrause.data.mixture import Mixture, Share
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.data.writer import CorpusWriter
from megakrause.errors import UserError
from tests.data.conftest import EOS, WriteCorpus, write_documents

pytestmark = pytest.mark.faults

DOCUMENTS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [1], [14, 15, 1]]
STREAM = [token for document in DOCUMENTS for token in document]
STARTS = [0, 4, 6, 12, 13]


def write_foreign(
    prefix: Path, lengths: list[int], documents: list[int], tokens: np.ndarray, modes: bytes = b""
) -> str:
    """A corpus as Megatron's builder leaves it, packed field by field."""
    code = {"uint16": 8, "int32": 4, "int64": 5, "float32": 7}[tokens.dtype.name]
    offsets = [sum(lengths[:i]) * tokens.itemsize for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    index += struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(documents)}q", *lengths, *offsets, *documents) + modes
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return str(prefix)


def document_starts(corpus: Corpus) -> list[int]:
    """The first token of every document, from the blocks."""
    first, found = 0, []
    for shard in corpus.shards:
        for block, ((_, start), (_, end)) in enumerate(pairwise(shard.cuts)):
            bounds = shard.documents(block)
            assert bounds.dtype == np.int64 and (bounds[0], bounds[-1]) == (start, end)
            found += (bounds[:-1] + first).tolist()
        first += shard.num_tokens
    assert sum(corpus.block_tokens) == corpus.num_tokens
    return found


def flip(path: str | Path, position: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[position] ^= 0x10
    Path(path).write_bytes(content)


def cut(path: str | Path, size: int) -> None:
    os.truncate(path, size)


# Writing and reading


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1 << 30, 1), (16, 3), (2, 5)])
def test_what_was_written_is_read(write_corpus: WriteCorpus, shard_bytes: int, shards: int) -> None:
    prefix = write_corpus(DOCUMENTS, shard_bytes=shard_bytes)
    corpus = Corpus.open(prefix)
    assert (corpus.num_tokens, corpus.num_documents, corpus.num_bytes) == (16, 5, 50)
    assert document_starts(corpus) == STARTS
    assert corpus.read(0, 16).tolist() == STREAM and corpus.read(0, 16).dtype == np.uint16
    names = sorted(path.name for path in Path(prefix).parent.iterdir())
    expected = ["corpus"] if shards == 1 else [f"corpus-{number:05d}" for number in range(shards)]
    assert names == sorted([name + kind for name in expected for kind in (".bin", ".idx")] + ["corpus.manifest.json"])


@given(
    documents=st.lists(st.lists(st.integers(0, 999), max_size=9), min_size=1, max_size=20).filter(any),
    shard_bytes=st.integers(1, 60),
    data=st.data(),
)
def test_any_part_of_any_corpus(tmp_path_factory: pytest.TempPathFactory, documents, shard_bytes, data) -> None:
    prefix = write_documents(tmp_path_factory.mktemp("corpus") / "c", documents, shard_bytes=shard_bytes)
    stream = [token for document in documents for token in document]
    corpus = Corpus.open(prefix)
    assert corpus.read(0, len(stream)).tolist() == stream
    assert document_starts(corpus) == [sum(map(len, documents[:i])) for i in range(len(documents))]
    start = data.draw(st.integers(0, len(stream)))
    length = data.draw(st.integers(0, len(stream) - start))
    assert corpus.read(start, length).tolist() == stream[start : start + length]
    assert verify_corpus(prefix)["tokens"] == len(stream)


def test_reading_outside_is_refused(write_corpus: WriteCorpus) -> None:
    corpus = Corpus.open(write_corpus(DOCUMENTS, shard_bytes=16))
    for start, length in ((-1, 2), (15, 2), (17, 0), (3, -1)):
        with pytest.raises(IndexError):
            corpus.read(start, length)
    assert corpus.read(16, 0).tolist() == []


def test_files_are_megatrons_byte_for_byte(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    ours = write_corpus(DOCUMENTS)
    theirs = write_foreign(tmp_path / "theirs", [4, 2, 6, 1, 3], [0, 1, 2, 3, 4, 5], np.array(STREAM, np.uint16))
    for kind in (".bin", ".idx"):
        assert Path(ours + kind).read_bytes() == Path(theirs + kind).read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_token_size_follows_the_vocabulary(write_corpus: WriteCorpus, vocab_size: int, dtype: type) -> None:
    corpus = Corpus.open(write_corpus([[vocab_size - 1, 0]], vocab_size=vocab_size))
    assert corpus.dtype == dtype and corpus.read(0, 2).tolist() == [vocab_size - 1, 0]


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    for token in (-1, 1000, 70000):
        with pytest.raises(ValueError, match="in a vocabulary of 1000"):
            write_documents(tmp_path / "corpus", [[1, token]])
    assert not list(tmp_path.iterdir())


def test_corpora_of_other_software_open(tmp_path: Path) -> None:
    """Documents of several sequences and of none, other integer types, the extra field of multimodal corpora."""
    tokens = np.arange(10, dtype=np.int64)
    prefix = write_foreign(tmp_path / "foreign", [3, 0, 4, 3], [0, 0, 2, 4, 4], tokens, modes=b"\0" * 4)
    corpus = Corpus.open(prefix)
    assert corpus.read(2, 8).tolist() == list(range(2, 10))
    assert document_starts(corpus) == [0, 0, 3, 10]
    assert corpus.num_bytes is None and corpus.manifest is None
    assert verify_corpus(prefix) == {
        "corpus": prefix, "files": 2, "bytes": 80 + 34 + 12 * 4 + 8 * 5 + 4, "tokens": 10, "documents": 4,
        "vocab_size": None, "classes": None, "hashed": False,
    }  # fmt: skip
    before = corpus.fingerprint
    write_foreign(tmp_path / "foreign", [3, 0, 4, 2], [0, 0, 2, 4, 4], tokens[:9])
    assert Corpus.open(prefix).fingerprint != before


def test_fingerprint_stands_for_the_content(write_corpus: WriteCorpus) -> None:
    first, same = (Corpus.open(write_corpus(DOCUMENTS, name=name)).fingerprint for name in ("a", "b"))
    other = Corpus.open(write_corpus([[5, 6, 7, 2], *DOCUMENTS[1:]], name="c")).fingerprint
    assert first == same != other
    assert len(first) == 32


# Writing that does not come to its end


def test_an_exception_leaves_what_was_there(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus(DOCUMENTS, shard_bytes=16)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    info = TokenizerInfo(fingerprint="0", vocab_size=1000, eos=1)
    with pytest.raises(RuntimeError), CorpusWriter(prefix, info, shard_bytes=4) as writer:
        writer.add(np.arange(20), np.full(10, 2), 0)
        raise RuntimeError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match="would be empty"), CorpusWriter(prefix, info):
        pass
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_corpus_leaves_nothing_of_the_old(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    write_corpus(DOCUMENTS, shard_bytes=2)
    prefix = write_corpus([[7, 1]])
    assert Corpus.open(prefix).read(0, 2).tolist() == [7, 1]
    assert len(list(tmp_path.iterdir())) == 3
    write_corpus(DOCUMENTS, shard_bytes=2)
    assert Corpus.open(prefix).num_tokens == 16
    assert len(list(tmp_path.iterdir())) == 11


def test_one_writer_at_a_time(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    info = TokenizerInfo(fingerprint="0", vocab_size=1000, eos=1)
    with CorpusWriter(tmp_path / "corpus", info) as writer:
        writer.add(np.array([5, 1]), np.array([2]), 1)
        with pytest.raises(UserError, match="another process is writing"):
            write_corpus(DOCUMENTS)
    assert Corpus.open(tmp_path / "corpus").num_tokens == 2


@pytest.mark.parametrize("shard_bytes", [16, 1 << 30])
@pytest.mark.parametrize("old", [None, 16, 1 << 30])
def test_death_at_any_moment_of_publishing(tmp_path_factory, monkeypatch, shard_bytes, old) -> None:
    """Whatever call was the last, what opens is the whole old corpus or the whole new one."""

    class Death(BaseException):
        pass

    new = [[20, 21, 1], *DOCUMENTS[1:], [22, 1]]
    outcomes = set()
    for moment in range(100):
        folder = tmp_path_factory.mktemp("death")
        if old:
            write_documents(folder / "c", DOCUMENTS, shard_bytes=old)
        calls = iter(range(moment))

        def mortal(function, calls=calls):
            def call(*args, **options):
                if next(calls, None) is None:
                    raise Death
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(CorpusWriter, "_discard", lambda self: None)  # the dead do not tidy up
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                write_documents(folder / "c", new, shard_bytes=shard_bytes)
                died = False
            except Death:
                died = True
        try:
            tokens = Corpus.open(folder / "c").read(0, 16).tolist()
            assert tokens == (STREAM if tokens[0] == 5 else [t for document in new for t in document][:16])
            assert verify_corpus(folder / "c")["hashed"]
            outcomes.add("old" if tokens[0] == 5 else "new")
        except UserError as error:
            assert "is unfinished" in str(error) or "there is no corpus" in str(error)
            outcomes.add("none")
        write_documents(folder / "c", new, shard_bytes=shard_bytes)
        assert verify_corpus(folder / "c")["documents"] == 6
        assert not list(folder.glob("*.tmp"))
        if not died:
            break
    assert outcomes == ({"old", "none", "new"} if old else {"none", "new"})


# Faults


def refused(prefix: str | Path, tokenizer: Tokenizer | None = None) -> str:
    """The one line with which opening is refused."""
    with pytest.raises(UserError) as caught:
        Corpus.open(prefix, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def found(prefix: str | Path, tokenizer: Tokenizer | None = None) -> str:
    with pytest.raises(UserError) as caught:
        verify_corpus(prefix, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_corpus(tmp_path: Path) -> None:
    assert "there is no corpus at" in refused(tmp_path / "nothing")
    assert "there is no corpus at" in refused(tmp_path / "no" / "folder")
    (tmp_path / "x.bin").write_bytes(bytes(6))
    for name in ("x", "x.bin"):
        assert "x.idx is not: raw tokens without an index? name it .u16 or .u32" in refused(tmp_path / name)
    for name in ("text/", "*.rst"):
        assert "folders of it: prepare it with data_prep/tokenize_text.py" in refused(f"{tmp_path}/{name}")
    assert "several corpora are 'WEIGHT PREFIX" in refused("code data/b")
    assert "several" not in refused(tmp_path / "text")


def test_a_corpus_of_another_tokenizer_is_told_of(tmp_path: Path, tokenizer: Tokenizer, capfd) -> None:
    """Which only a manifest says for certain."""
    tokens = np.array(STREAM, np.uint16)
    prefix = write_foreign(tmp_path / "f", [4, 2, 6, 1, 3], [0, 1, 2, 3, 4, 5], tokens)
    other = write_foreign(tmp_path / "o", [4, 2, 6, 1, 3], [0, 1, 2, 3, 4, 5], np.where(tokens == EOS, 2, tokens))
    (tmp_path / "r.u16").write_bytes(np.array(STREAM, np.uint16).tobytes())
    (tmp_path / "s.u16").write_bytes(bytes(20))
    unhashed = " has no manifest: not verified; megakrause data adopt gives it one"
    ends = f"warning: no document of {other} ends with the tokenizer's separator 1; was it made with another tokenizer?"
    first = f"warning: the first 10 tokens of {tmp_path}/s.u16 have not the tokenizer's separator 1; was it made with"
    assert Corpus.open(prefix, tokenizer).notes(EOS) == [prefix + unhashed]
    assert Corpus.open(other, tokenizer).notes(EOS) == [other + unhashed, ends]
    assert Corpus.open(tmp_path / "r.u16", tokenizer).notes(EOS) == []
    assert [note.partition(" another")[0] for note in Corpus.open(tmp_path / "s.u16", tokenizer).notes(EOS)] == [first]
    windows = TokenWindows(Corpus.open(other, tokenizer), 4, eos=EOS, mask_documents=True)
    mixed = MixedWindows([windows], Mixture([Share(((0, 1.0),))]), True)
    assert [line.removeprefix("data: ") for line in mixed.describe(0, 1)][1:] == [other + unhashed, ends]
    capfd.readouterr()
    for name, said in ((prefix, None), (other, ends), (tmp_path / "r.u16", None), (tmp_path / "s.u16", first)):
        verify_corpus(name, tokenizer)
        warnings = [line for line in re.split("[\r\n]", capfd.readouterr().err) if "warning" in line]
        assert len(warnings) == (said is not None) and all(line.startswith(str(said)) for line in warnings)
    long = write_foreign(tmp_path / "l", [1] * 200, [*range(201)], np.array([3] * 150 + [1] * 50, np.uint16))
    assert "separator 1, of the first 100; was" in Corpus.open(long, tokenizer).notes(EOS)[1]
    adopt_corpus(other, tokenizer)
    assert Corpus.open(other, tokenizer).notes(EOS) == []


def test_a_corpus_elsewhere_is_not_adopted(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^s3://b/x is a URL: adopt it [^\n]* then upload x.manifest.json$"):
        adopt_corpus("s3://b/x", tokenizer)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("kind", [".bin", ".idx"])
def test_files_cut_short(write_corpus: WriteCorpus, kind: str, with_manifest: bool) -> None:
    prefix = write_corpus(DOCUMENTS)
    if not with_manifest:
        os.unlink(prefix + ".manifest.json")
    size = os.path.getsize(prefix + kind)
    for kept in range(size - 1, -1, -1):
        cut(prefix + kind, kept)
        assert prefix + kind in (message := refused(prefix)) and str(kept) in message or kept < 9
    os.unlink(prefix + kind)
    assert "No such file" in refused(prefix) or "no corpus" in refused(prefix)


def test_headers_that_are_none(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus(DOCUMENTS)
    for field, fault in ((0, "begins with"), (9, "version 17"), (17, "dtype code 24"), (18, "says"), (26, "says")):
        flip(prefix + ".idx", field)
        assert fault in refused(prefix)
        flip(prefix + ".idx", field)
    assert Corpus.open(prefix).num_tokens == 16


def test_empty_corpora(tmp_path: Path) -> None:
    for lengths, documents in (([], [0]), ([0, 0], [0, 1, 2])):
        assert "is empty" in refused(write_foreign(tmp_path / "e", lengths, documents, np.empty(0, np.uint16)))


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    assert "dtype code 7" in refused(write_foreign(tmp_path / "f", [2], [0, 1], np.ones(2, np.float32)))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": 2}', "\0"])
def test_manifests_that_are_none(write_corpus: WriteCorpus, content: str) -> None:
    prefix = write_corpus(DOCUMENTS)
    Path(prefix + ".manifest.json").write_text(content)
    assert "is no corpus manifest" in refused(prefix)


def test_manifests_that_lie(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus(DOCUMENTS)
    path = Path(prefix + ".manifest.json")
    truth = json.loads(path.read_text())
    path.write_text(json.dumps({**truth, "tokens": 17}))
    assert "its manifest says otherwise" in refused(prefix)
    for names in (["../x.bin", "../x.idx"], ["x.bin"], ["x.idx", "x.bin"], ["a.bin", "b.idx"]):
        path.write_text(json.dumps({**truth, "files": [{**truth["files"][0], "name": name} for name in names]}))
        assert "not pairs of .bin and .idx" in refused(prefix)


def test_another_tokenizer(tmp_path: Path, tokenizer: Tokenizer, write_corpus: WriteCorpus) -> None:
    message = refused(write_corpus(DOCUMENTS), tokenizer)
    assert all(
        word in message for word in ("0" * 32, "1000 pieces", tokenizer.path, tokenizer.fingerprint, "600 pieces")
    )
    assert found(tmp_path / "corpus", tokenizer) == message
    with CorpusWriter(tmp_path / "right", TokenizerInfo.of(tokenizer)) as writer:
        writer.add(np.array([5, 1]), np.array([2]), 1)
    assert Corpus.open(tmp_path / "right", tokenizer).num_tokens == 2


def test_every_flipped_byte_is_found(write_corpus: WriteCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK", 8)
    prefix = write_corpus(DOCUMENTS)
    for kind in (".bin", ".idx"):
        for position in range(os.path.getsize(prefix + kind)):
            flip(prefix + kind, position)
            message = found(prefix)
            assert prefix in message
            if kind == ".bin":
                start = position // 8 * 8
                assert f"{prefix}.bin: block {position // 8}, bytes {start} to {start + 8}, is damaged" in message
            flip(prefix + kind, position)
    assert verify_corpus(prefix)["hashed"]


def test_swapped_shards_are_found(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus([[5, 6, 1], [7, 8, 1]], shard_bytes=6)
    for kind in (".bin", ".idx"):
        first, second = f"{prefix}-00000{kind}", f"{prefix}-00001{kind}"
        os.rename(first, prefix + ".x")
        os.rename(second, first)
        os.rename(prefix + ".x", second)
    assert f"{prefix}-00000.bin: block 0, bytes 0 to 6, is damaged" in found(prefix)
    other = write_corpus(DOCUMENTS, name="other", shard_bytes=16)
    os.replace(f"{other}-00001.bin", f"{other}-00000.bin")
    assert "the manifest says" in refused(other)


def test_one_shard_alone_is_verified(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus(DOCUMENTS, shard_bytes=16)
    flip(f"{prefix}-00001.bin", 3)
    for name in (f"{prefix}-00000", f"{prefix}-00000.bin", f"{prefix}-00002.idx"):
        assert verify_corpus(name)["hashed"] and verify_corpus(name)["files"] == 2
    assert "corpus-00001.bin: block 0" in found(f"{prefix}-00001.bin")
    assert "corpus-00001.bin: block 0" in found(f"{prefix}.manifest.json")
    assert "no corpus" in found(f"{prefix}-00003")


def test_damage_in_corpora_without_hashes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What the index and the vocabulary can tell."""
    tokens = np.array([5, 6, 7, 600, 8], np.int32)
    prefix = write_foreign(tmp_path / "f", [2, 3], [0, 1, 2], tokens)
    assert verify_corpus(prefix)["tokens"] == 5
    assert "f.bin: token 600 at byte 12 is outside the vocabulary of 600" in found(prefix, tokenizer)
    write_foreign(tmp_path / "f", [2, 3], [0, 1, 2], -tokens)
    assert "f.bin: token -5 at byte 0" in found(prefix)
    write_foreign(tmp_path / "f", [2, 3, 1], [0, 2, 1, 3], np.arange(6, dtype=np.int32))
    assert "f.idx: document 2 begins at sequence 1, out of order" in found(prefix)
    write_foreign(tmp_path / "f", [2, 3], [1, 1, 2], np.arange(5, dtype=np.int32))
    assert "f.idx: its documents are of sequences 1 to 2, there are sequences 0 to 2" in found(prefix)
    write_foreign(tmp_path / "f", [2, 1, 2], [0, 3], np.arange(5, dtype=np.int32))
    flip(prefix + ".idx", HEADER.size)
    assert "f.idx: sequence 1 has 1 tokens at byte 8, where the lengths before it put it at byte 72" in found(prefix)


@pytest.mark.slow
def test_a_huge_corpus_opens_at_once(tmp_path: Path) -> None:
    """10 billion tokens in 10 million documents, in a sparse file."""
    documents, length = 10_000_000, 1000
    with (tmp_path / "huge.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for field in (
            np.full(documents, length, np.int32),
            np.arange(documents, dtype=np.int64) * (2 * length),
            np.arange(documents + 1),
        ):
            file.write(field.data)
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(2 * documents * length)
    process = psutil.Process()

    def private_memory() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared  # mapped files are shared

    before, cpu = private_memory(), sum(process.cpu_times()[:2])
    corpus = Corpus.open(tmp_path / "huge")
    assert corpus.documents_of(152)[1][-2] == (documents - 1) * length
    assert corpus.read(9_999_999_000, 1000).sum() == 0
    assert sum(process.cpu_times()[:2]) - cpu < 2  # seconds, whatever else the machine does
    assert private_memory() - before < 200e6


# While it is read


def read_all(corpus: Corpus) -> list[int]:
    return corpus.read(0, corpus.num_tokens).tolist()


@pytest.mark.parametrize("kind", [".bin", ".idx"])
def test_a_flipped_byte_is_never_handed_out(write_corpus: WriteCorpus, kind: str) -> None:
    prefix = write_corpus(DOCUMENTS)
    flip(prefix + kind, os.path.getsize(prefix + kind) - 12)  # the .idx is still one, of other documents
    with pytest.raises(UserError, match=rf"corpus{kind}: block 0, bytes 0 to \d+, is damaged: its hash is not"):
        read_all(Corpus.open(prefix)) if kind == ".bin" else Corpus.open(prefix).documents_of(0)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_files_that_change_while_they_are_read(write_corpus: WriteCorpus, with_manifest: bool) -> None:
    prefix = write_corpus(DOCUMENTS)
    if not with_manifest:
        os.unlink(prefix + ".manifest.json")
    content = Path(prefix + ".bin").read_bytes()
    corpus = Corpus.open(prefix)
    read_all(corpus)
    cut(prefix + ".bin", 4)
    with pytest.raises(UserError, match=r"corpus.bin was changed while it is in use"):
        read_all(corpus)
    os.rename(prefix + ".bin", prefix + ".away")
    with pytest.raises(UserError, match=r"corpus.bin is gone while it is in use: No such file"):
        read_all(corpus)
    Path(prefix + ".bin").write_bytes(content)
    assert read_all(Corpus.open(prefix)) == STREAM


def test_few_files_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_documents(tmp_path / "c", [[i, 1] for i in range(200)], shard_bytes=4)
    corpus, process = Corpus.open(prefix), psutil.Process()
    monkeypatch.setattr(shards, "MAPPED", 16)
    before = process.num_fds()
    assert read_all(corpus) == [token for i in range(200) for token in (i, 1)]
    for block in range(200):
        corpus.documents_of(block)
    assert process.num_fds() - before < 40
    flip(f"{prefix}-00000.bin", 0)  # which was released
    with pytest.raises(UserError, match="00000.bin was changed while it is in use"):
        read_all(corpus)


# Blocks


def test_blocks_of_many_and_of_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six at a time; the second six have 24 tokens, so that they are halved, the third 73, in four parts, one empty."""
    monkeypatch.setattr(formats, "BLOCK_DOCUMENTS", 6)
    monkeypatch.setattr(formats, "BLOCK_TOKENS", 20)
    lengths = [1] * 9 + [7] * 6 + [50, 1, 1]
    bounds, tokens = list(range(len(lengths) + 1)), np.arange(sum(lengths), dtype=np.int32)
    corpus = Corpus.open(write_foreign(tmp_path / "f", lengths, bounds, tokens))
    assert corpus.shards[0].cuts == [(0, 0), (6, 6), (11, 23), (12, 30), (15, 51), (16, 101), (18, 103)]
    assert document_starts(corpus) == [sum(lengths[:i]) for i in range(len(lengths))]


def test_blocks_of_a_manifest_are_not_taken_on_trust(
    write_corpus: WriteCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BLOCK_DOCUMENTS", 2)
    prefix = write_corpus(DOCUMENTS)
    path = Path(prefix + ".manifest.json")
    truth = json.loads(path.read_text())
    before = Corpus.open(prefix).fingerprint
    assert truth["blocks"] == [[[0, 0], [2, 6], [4, 13], [5, 16]]]
    for blocks in ([[0, 0], [2, 6], [4, 13]], [[2, 6], [5, 16]], [[0, 0], [4, 13], [2, 6], [5, 16]]):
        path.write_text(json.dumps({**truth, "blocks": [blocks]}))
        assert "has wrong blocks" in refused(prefix)
    path.write_text(json.dumps({**truth, "blocks": [[[0, 0], [3, 12], [5, 16]]]}))
    assert Corpus.open(prefix).fingerprint != before
    assert "has other blocks than its documents" in found(prefix)


def test_foreign_corpora_of_one_size_are_not_the_same(tmp_path: Path) -> None:
    for name, token in (("a.u16", 7), ("b.u16", 8)):
        (tmp_path / name).write_bytes(np.full(50_000, token, np.uint16).tobytes())
    first, second = (Corpus.open(tmp_path / name).fingerprint for name in ("a.u16", "b.u16"))
    assert first != second


def test_an_index_that_leaves_tokens_out(tmp_path: Path) -> None:
    tokens = np.arange(5, dtype=np.int32)
    assert "its documents are of sequences 1 to 2" in refused(write_foreign(tmp_path / "f", [2, 3], [1, 2], tokens))
    assert "its documents are of sequences 2 to 2" in refused(write_foreign(tmp_path / "f", [2, 3], [2], tokens))


# Other software's


def test_datatroves_files(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("00000_x.ds", "00001_x.ds"):
        (folder / name).write_bytes(np.array(STREAM, np.uint16).tobytes())
        (folder / f"{name}.index").write_bytes(np.array([4, 6, 12, 13, 16], np.uint64).tobytes())
        (folder / f"{name}.metadata").write_text("gpt2|2\n16\n16 T")
    corpus = Corpus.open(folder)
    assert read_all(corpus) == STREAM * 2 and corpus.num_documents == 10
    assert document_starts(corpus) == STARTS + [start + 16 for start in STARTS]
    one = folder / "00001_x.ds"
    assert read_all(Corpus.open(one)) == STREAM and verify_corpus(one)["tokens"] == 16
    one.write_bytes(np.array(STREAM, np.uint32).tobytes())
    assert "holds uint32 tokens, the shards before it uint16" in refused(folder)
    cut(one, 31)
    assert "00001_x.ds has 31 bytes" in refused(folder) and "says 16 tokens" in refused(folder)


def test_files_of_nothing_but_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.eos == 1
    (tmp_path / "a.u16").write_bytes(np.array(STREAM, np.uint16).tobytes())
    (tmp_path / "b.npy").write_bytes(np.array(STREAM, np.uint32).tobytes())
    np.save(tmp_path / "c.npy", np.array(STREAM, np.int64))
    for name, dtype in (("a.u16", None), ("b.npy", "uint32"), ("c.npy", None)):
        corpus = Corpus.open(tmp_path / name, tokenizer, dtype)
        assert read_all(corpus) == STREAM and document_starts(corpus) == STARTS and corpus.num_documents is None
        assert verify_corpus(tmp_path / name, tokenizer, dtype)["tokens"] == 16
        assert document_starts(Corpus.open(tmp_path / name, None, dtype)) == [0]
    assert 'give dtype = "uint16" or "uint32"' in refused(tmp_path / "b.npy")
    cut(tmp_path / "a.u16", 31)
    assert "31 bytes of tokens are not a multiple of 2 bytes: truncated?" in refused(tmp_path / "a.u16")
    np.save(tmp_path / "c.npy", np.ones((2, 2)))
    assert "an array of shape (2, 2)" in refused(tmp_path / "c.npy")


def test_a_foreign_corpus_is_given_hashes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write_foreign(tmp_path / "f", [4, 2, 10], [0, 1, 2, 3], np.array(STREAM, np.uint16))
    before = {kind: Path(prefix + kind).read_bytes() for kind in (".bin", ".idx")}
    manifest = adopt_corpus(prefix, tokenizer)
    assert {kind: Path(prefix + kind).read_bytes() for kind in (".bin", ".idx")} == before
    assert (manifest.tokens, manifest.documents, manifest.text_bytes) == (16, 3, None)
    corpus = Corpus.open(prefix, tokenizer)
    assert corpus.manifest == manifest and corpus.bytes_per_token is None and read_all(corpus) == STREAM
    assert verify_corpus(prefix)["hashed"]
    with pytest.raises(UserError, match="is there already"):
        adopt_corpus(prefix, tokenizer)
    flip(prefix + ".bin", 5)
    assert "is damaged" in found(prefix)
    wrong = write_foreign(tmp_path / "g", [2], [0, 1], np.array([5, 700], np.uint16))
    with pytest.raises(UserError, match="token 700 at byte 2 is outside the vocabulary of 600"):
        adopt_corpus(wrong, tokenizer)
    assert not Path(wrong + ".manifest.json").exists()
