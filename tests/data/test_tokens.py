from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakrause.batch import TokenBatch
from megakrause.data.shards import Corpus
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from tests.data.conftest import EOS, WriteCorpus, write_documents

Row = list[tuple[int, int, bool, int]]  # input, target, learnt, first position seen; of each position


def reference(documents: list[list[int]], seq_len: int, window: int, mask_documents: bool) -> Row:
    """The definition, position by position, from the documents themselves."""
    stream = [token for document in documents for token in document]
    opens = []  # of each token, the index of the token from which its document is seen
    unannounced = set()  # targets that nothing announces
    for document in documents:
        start = len(opens)
        first = start
        if document and start and stream[start - 1] == EOS:
            first = opens[start - 1] = start - 1
        elif document and start:
            unannounced.add(start)
        opens += [first] * len(document)
    row: Row = []
    for position in range(seq_len):
        here = window * seq_len + position
        if here + 1 >= len(stream):
            row.append((stream[here] if here < len(stream) else EOS, EOS, False, -1))
        elif mask_documents:
            row.append(
                (stream[here], stream[here + 1], here + 1 not in unannounced, max(0, opens[here] - window * seq_len))
            )
        else:
            row.append((stream[here], stream[here + 1], True, 0))
    return row


def rows(batch: TokenBatch) -> list[Row]:
    doc_start = torch.zeros_like(batch.tokens) if batch.doc_start is None else batch.doc_start
    fields = (batch.tokens, batch.targets, batch.loss_mask, doc_start)
    return [list(zip(*row, strict=True)) for row in zip(*(field.tolist() for field in fields), strict=True)]


def agrees(actual: Row, expected: Row) -> bool:
    """What a padded position sees is left open."""
    return all(a[:3] == e[:3] and e[3] in (a[3], -1) for a, e in zip(actual, expected, strict=True))


token = st.sampled_from([EOS, 2, 3, 4, 5])
any_documents = st.lists(st.lists(token, max_size=7), min_size=1, max_size=15)
ended_documents = st.lists(st.lists(token, max_size=6).map(lambda tokens: [*tokens, EOS]), min_size=2, max_size=15)


@given(
    documents=(any_documents | ended_documents).filter(lambda documents: sum(map(len, documents)) > 1),
    seq_len=st.integers(1, 12),
    shard_bytes=st.sampled_from([1, 10, 1000]),
    mask_documents=st.booleans(),
    data=st.data(),
)
def test_windows_are_what_the_definition_says(
    tmp_path_factory: pytest.TempPathFactory, documents, seq_len, shard_bytes, mask_documents, data
) -> None:
    prefix = write_documents(tmp_path_factory.mktemp("corpus") / "c", documents, shard_bytes=shard_bytes)
    windows = TokenWindows(Corpus.open(prefix), seq_len, eos=EOS, mask_documents=mask_documents)
    expected = [reference(documents, seq_len, window, mask_documents) for window in range(len(windows))]
    indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=8))
    actual = rows(windows.batch(indices))
    for row, index in zip(actual, indices, strict=True):
        assert agrees(row, expected[index]), (row, expected[index])


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 2000])
def test_every_token_but_the_first_is_a_target_once(write_corpus: WriteCorpus, size, seq_len, mask_documents) -> None:
    stream = [*range(size - 1), EOS]  # every id once, so that a target tells where it stands
    windows = TokenWindows(Corpus.open(write_corpus([stream])), seq_len, eos=EOS, mask_documents=mask_documents)
    batch = windows.batch(range(len(windows)))
    assert Counter(batch.targets[batch.loss_mask].tolist()) == Counter(stream[1:])
    assert batch.tokens[batch.loss_mask].tolist() == stream[:-1]
    assert (batch.targets[~batch.loss_mask] == EOS).all()


def test_shapes_and_types(write_corpus: WriteCorpus) -> None:
    windows = TokenWindows(Corpus.open(write_corpus([[2, 3, 4, EOS]] * 10)), 8, eos=EOS, mask_documents=True)
    batch = windows.batch(np.array([0, 2, 4]))
    fields = (batch.tokens, batch.targets, batch.loss_mask, batch.doc_start)
    assert [field.dtype for field in fields] == [torch.int64, torch.int64, torch.bool, torch.int32]
    assert all(field.shape == (3, 8) and field.is_contiguous() for field in fields)


def test_a_separator_opens_the_document_after_it(write_corpus: WriteCorpus) -> None:
    """Worked by hand: inputs 2 3 1 4 | 5 1 6 7 | 8 9 1 1, documents [2 3 1] [4 5 1] [6] [7 8 9 1] [1 ...]."""
    documents = [[2, 3, EOS], [4, 5, EOS], [6], [7, 8, 9, EOS], [EOS]]
    windows = TokenWindows(Corpus.open(write_corpus(documents)), 4, eos=EOS, mask_documents=True)
    batch = windows.batch([0, 1, 2])
    assert batch.tokens.tolist() == [[2, 3, EOS, 4], [5, EOS, 6, 7], [8, 9, EOS, EOS]]
    assert batch.targets.tolist() == [[3, EOS, 4, 5], [EOS, 6, 7, 8], [9, EOS, EOS, EOS]]
    assert batch.doc_start.tolist() == [[0, 0, 2, 2], [0, 1, 1, 3], [0, 0, 2, 2]]
    assert batch.loss_mask.tolist() == [[True] * 4, [True, True, False, True], [True, True, True, False]]


def test_windows_beyond_the_end_are_padding(write_corpus: WriteCorpus) -> None:
    windows = TokenWindows(Corpus.open(write_corpus([[2, 3, EOS]] * 3)), 4, eos=EOS, mask_documents=True)
    batch = windows.batch([2, 50])
    assert len(windows) == 2
    assert not batch.loss_mask.any() and (batch.targets == EOS).all()
    assert (batch.doc_start >= 0).all() and (batch.doc_start <= torch.arange(4)).all()


def test_one_token_is_too_few(write_corpus: WriteCorpus) -> None:
    with pytest.raises(UserError, match="1 token; at least 2 are needed"):
        TokenWindows(Corpus.open(write_corpus([[EOS]])), 4, eos=EOS, mask_documents=True)


def test_wide_ids(tmp_path: Path) -> None:
    corpus = Corpus.open(write_documents(tmp_path / "c", [[100_000, 70_000, EOS]], vocab_size=200_000))
    assert TokenWindows(corpus, 2, eos=EOS, mask_documents=True).batch([0]).tokens.tolist() == [[100_000, 70_000]]
