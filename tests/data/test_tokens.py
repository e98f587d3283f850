from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakrause.batch import TokenBatch
from megakrause.data import formats
from megakrause.data.mixed import MixedWindows, describe_past
from megakrause.data.mixture import Mixture, Share
from megakrause.data.packing import Packing
from megakrause.data.shards import Corpus
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from tests.data.conftest import EOS, WriteCorpus, write_documents

Position = tuple[int, int, bool, int]  # input, target, learnt, first position seen
PADDING = (EOS, EOS, False)


def reference(blocks: list[list[list[int]]], seq_len: int) -> list[list[Position]]:
    """Every window in the corpus's own order, position by position, from the documents of each block."""
    windows = []
    for documents in blocks:
        stream = [(document, i) for document in documents for i in range(len(document))]
        for first in range(0, len(stream), seq_len):
            row: list[Position] = []
            for position in range(seq_len):
                if first + position >= len(stream):
                    row.append((*PADDING, position))
                    continue
                document, i = stream[first + position]
                row.append((document[i - 1] if i else EOS, document[i], True, max(0, position - i)))
            windows.append(row)
    return windows


def rows(batch: TokenBatch) -> list[list[Position]]:
    doc_start = torch.zeros_like(batch.tokens) if batch.doc_start is None else batch.doc_start
    fields = (batch.tokens, batch.targets, batch.loss_mask, doc_start)
    return [list(zip(*row, strict=True)) for row in zip(*(field.tolist() for field in fields), strict=True)]


def blocks_of(corpus: Corpus, documents: list[list[int]]) -> list[list[list[int]]]:
    """The documents of each block, by how many each shard has of them."""
    result, start = [], 0
    for shard in corpus.shards:
        numbers = [document for document, _ in shard.cuts]
        result += [documents[start + a : start + b] for a, b in zip(numbers, numbers[1:], strict=False)]
        start += numbers[-1]
    return result


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_DOCUMENTS", 4)
    monkeypatch.setattr(formats, "BLOCK_TOKENS", 20)


@given(
    documents=st.lists(st.lists(st.sampled_from([EOS, 2, 3, 4, 5]), max_size=30), min_size=1, max_size=20).filter(any),
    seq_len=st.integers(1, 12),
    shard_bytes=st.sampled_from([1, 30, 1000]),
    mask_documents=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_windows_are_what_the_definition_says(
    tmp_path_factory: pytest.TempPathFactory, documents, seq_len, shard_bytes, mask_documents, data
) -> None:
    prefix = write_documents(tmp_path_factory.mktemp("corpus") / "c", documents, shard_bytes=shard_bytes)
    corpus = Corpus.open(prefix)
    windows = TokenWindows(corpus, seq_len, eos=EOS, mask_documents=mask_documents)
    expected = reference(blocks_of(corpus, documents), seq_len)
    assert len(windows) == len(expected)
    indices = data.draw(st.lists(st.integers(-1, len(windows) - 1), min_size=1, max_size=8))
    for row, index in zip(rows(windows.batch(indices)), indices, strict=True):
        goal = expected[index] if index >= 0 else [(*PADDING, position) for position in range(seq_len)]
        assert row == (goal if mask_documents else [(*position[:3], 0) for position in goal])


def check_rows(batch: TokenBatch, documents: list[list[int]]) -> list[int]:
    """Every row against the documents, whose tokens but separators are all different; the targets, as they come."""
    origin = {token: (d, i) for d, document in enumerate(documents) for i, token in enumerate(document[:-1])}
    found = []
    for row in rows(batch):
        begin, document, offset = -1, -1, -1
        for position, (token, target, learnt, first) in enumerate(row):
            if not learnt:
                assert (token, target, first) == (EOS, EOS, position)
                continue
            found.append(target)
            if first == position:  # a part of a document begins
                begin = position
                if target in origin:
                    document, offset = origin[target]
                else:  # only a separator, the document of which the token before it tells
                    document, last = origin.get(token, (-1, -1))
                    offset = last + 1
            else:
                offset += 1
            assert first == begin
            assert target == (documents[document][offset] if document >= 0 else EOS)
            assert token == (documents[document][offset - 1] if offset > 0 else EOS)
    return found


@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=25),
    seq_len=st.integers(1, 20),
    packing=st.sampled_from(["concat", "best_fit"]),
    group=st.integers(1, 4),
)
@settings(deadline=None)
def test_every_token_is_a_target_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq_len: int, packing: Packing, group: int
) -> None:
    ends = np.cumsum(sizes)
    documents = [[*range(int(end) - size + 2, int(end) + 2), EOS] for size, end in zip(sizes, ends, strict=True)]
    prefix = write_documents(tmp_path_factory.mktemp("corpus") / "c", documents, shard_bytes=80)
    corpus = Corpus.open(prefix)
    windows = TokenWindows(corpus, seq_len, eos=EOS, mask_documents=True, seed=5, packing=packing, group=group)
    every = Counter(token for document in documents for token in document)
    epochs = [windows.batch(np.arange(len(windows)) + epoch * len(windows)) for epoch in range(3)]
    for batch in epochs:
        assert Counter(check_rows(batch, documents)) == every
        assert sum((~batch.loss_mask).sum(1)) < seq_len * len(corpus.block_tokens)
    if len(windows) > 10:
        assert not torch.equal(epochs[0].targets, epochs[1].targets)


def test_shapes_and_types(write_corpus: WriteCorpus) -> None:
    windows = TokenWindows(Corpus.open(write_corpus([[2, 3, 4, EOS]] * 10)), 8, eos=EOS, mask_documents=True)
    batch = windows.batch(np.array([0, 2, 4]))
    fields = (batch.tokens, batch.targets, batch.loss_mask, batch.doc_start)
    assert [field.dtype for field in fields] == [torch.int64, torch.int64, torch.bool, torch.int32]
    assert all(field.shape == (3, 8) and field.is_contiguous() for field in fields)


def test_a_separator_opens_every_document(write_corpus: WriteCorpus) -> None:
    """Worked by hand, one block: documents [2 3 1] [4 5 1] [6] [7 8 9 1]."""
    windows = TokenWindows(
        Corpus.open(write_corpus([[2, 3, EOS], [4, 5, EOS], [6], [7, 8, 9, EOS]])), 4, eos=EOS, mask_documents=True
    )
    batch = windows.batch([0, 1, 2])
    assert batch.tokens.tolist() == [[EOS, 2, 3, EOS], [4, 5, EOS, EOS], [7, 8, 9, EOS]]
    assert batch.targets.tolist() == [[2, 3, EOS, 4], [5, EOS, 6, 7], [8, 9, EOS, EOS]]
    assert batch.doc_start.tolist() == [[0, 0, 0, 3], [0, 0, 2, 3], [0, 0, 0, 3]]
    assert batch.loss_mask.tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]


def test_wide_ids(tmp_path: Path) -> None:
    corpus = Corpus.open(write_documents(tmp_path / "c", [[100_000, 70_000, EOS]], vocab_size=200_000))
    windows = TokenWindows(corpus, 2, eos=EOS, mask_documents=True)
    assert windows.batch([0, 1]).targets.tolist() == [[100_000, 70_000], [EOS, EOS]]


def test_tokens_outside_the_vocabulary_are_never_trained_on(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus([[2, 3, 4, EOS], [5, 600, 7, EOS]])
    Path(prefix + ".manifest.json").unlink()
    corpus = Corpus.open(prefix)
    corpus.vocab_size = 600
    windows = TokenWindows(corpus, 4, eos=EOS, mask_documents=True)
    assert windows.batch([0]).targets.tolist() == [[2, 3, 4, EOS]]
    with pytest.raises(UserError, match=r"corpus.bin: token 600, number 5, is outside the vocabulary of 600"):
        windows.batch([0, 1])


def test_a_mix_has_every_sample_of_every_source_in_its_order(write_corpus: WriteCorpus) -> None:
    corpora = [Corpus.open(write_corpus([[n * 100 + i, EOS] for i in range(30)], name=str(n))) for n in (1, 2)]
    sources = [TokenWindows(c, 3, eos=EOS, mask_documents=True, seed=9) for c in corpora]
    mixed = MixedWindows(sources, Mixture([Share(((0, 3.0),)), Share(((0, 1.0),))]), True)
    batch = mixed.batch(np.arange(80))
    owner, inside = mixed.mixture.locate(np.arange(80))
    assert np.bincount(owner).tolist() == [60, 20]
    for number, source in enumerate(sources):
        expected = source.batch(inside[owner == number])
        for name in ("tokens", "targets", "loss_mask", "doc_start"):
            assert torch.equal(getattr(batch, name)[owner == number], getattr(expected, name))
    assert mixed.past(40) == [{"start": 0, "mix": {corpora[0].fingerprint: 3, corpora[1].fingerprint: 1}}]
    assert [line.split(" from ")[0] for line in mixed.describe(0, 80)] == ["data:  75.0%", "data:  25.0%"]


def test_a_source_is_added_after_some_steps(write_corpus: WriteCorpus) -> None:
    corpora = [Corpus.open(write_corpus([[n * 100 + i, EOS] for i in range(30)], name=str(n))) for n in (1, 2)]
    sources = [TokenWindows(c, 3, eos=EOS, mask_documents=True, seed=9) for c in corpora]
    before = MixedWindows(sources[:1], Mixture([Share(((0, 1.0),))]), True)
    after = MixedWindows(sources, Mixture([Share(((0, 1.0),)), Share(((0, 0.0), (12, 0.3)))]), True)
    assert after.past(12) == before.past(12) != after.past(13)


def test_contents_of_one_name_are_told_apart() -> None:
    names = {"3fa2c1" + 26 * "0": "a", "4fa2c1" + 26 * "0": "a", 32 * "5": "b"}
    first, second, other = names
    past = [{"start": 0, "mix": {first: 3, other: 1}}]
    assert describe_past(past, names) == "0.75 a (content 3fa2c1..) + 0.25 b from sequence 0 on"
    assert describe_past([{"start": 0, "mix": {second: 1}}], names) == "1 a (content 4fa2c1..) from sequence 0 on"
    assert describe_past(past, {first: "a", other: "b"}) == "0.75 a + 0.25 b from sequence 0 on"
