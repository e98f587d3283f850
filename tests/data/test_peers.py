"""Corpora both ways between us and the software that others prepare them with: its own classes, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakrause.data.check import verify_corpus
from megakrause.data.shards import Corpus
from tests.data.conftest import WriteCorpus

pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs
RNG = np.random.default_rng(8)
DOCUMENTS = [[*RNG.integers(2, 900, RNG.integers(0, 50)).tolist(), 1] for _ in range(40)]
STREAM = [token for document in DOCUMENTS for token in document]


@pytest.fixture(scope="module")
def megatron() -> Any:
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture(scope="module")
def datatrove() -> Any:
    from datatrove.pipeline.tokens import megatron_tokenizer, tokenizer

    return tokenizer.TokenizedFile, megatron_tokenizer.MegatronTokenizedFile


def documents(corpus: Corpus) -> list[list[int]]:
    found = []
    for block in range(len(corpus.block_tokens)):
        shard, bounds = corpus.documents_of(block)
        tokens = shard.tokens.array(shard.dtype, 0, shard.num_tokens).tolist()
        found += [tokens[start:end] for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    return found


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_megatron_reads_ours(write_corpus: WriteCorpus, megatron: Any, vocab_size: int) -> None:
    prefix = write_corpus(DOCUMENTS, vocab_size=vocab_size, shard_bytes=400)
    found = []
    for shard in Corpus.open(prefix).shards:
        theirs = megatron.IndexedDataset(shard.tokens.path.removesuffix(".bin"))
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        found += [theirs[i].tolist() for i in range(len(theirs))]
    assert found == DOCUMENTS


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("sentences", [1, 3])
def test_we_read_megatrons(tmp_path: Path, megatron: Any, dtype: type, sentences: int) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/c.bin", dtype=dtype)
    for document in DOCUMENTS:
        for part in np.array_split(np.array(document), sentences):
            builder.add_item(torch.from_numpy(part))
        builder.end_document()
    builder.finalize(f"{tmp_path}/c.idx")
    corpus = Corpus.open(tmp_path / "c")
    assert documents(corpus) == DOCUMENTS and corpus.dtype == dtype
    assert verify_corpus(tmp_path / "c")["tokens"] == len(STREAM)


def test_the_same_documents_are_the_same_bytes(tmp_path: Path, write_corpus: WriteCorpus, megatron: Any) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{tmp_path}/theirs.idx")
    ours = write_corpus(DOCUMENTS)
    for kind in (".bin", ".idx"):
        assert Path(ours + kind).read_bytes() == (tmp_path / f"theirs{kind}").read_bytes()


@pytest.mark.parametrize("token_size", [2, 4])
def test_we_read_datatroves(tmp_path: Path, datatrove: Any, token_size: int) -> None:
    plain, megatron_like = datatrove
    ds = plain(str(tmp_path), "c.ds", token_size=token_size)
    pair = megatron_like(str(tmp_path), "c", token_size=token_size)
    for document in DOCUMENTS:
        ds.write(document, None)
        pair.write(document)
    ds.close()
    pair.close()
    for name in ("c.ds", "c"):
        corpus = Corpus.open(tmp_path / name)
        assert documents(corpus) == DOCUMENTS and corpus.dtype.itemsize == token_size, name
        assert verify_corpus(tmp_path / name)["documents"] == len(DOCUMENTS)


def test_datatrove_reads_ours(tmp_path: Path, write_corpus: WriteCorpus, datatrove: Any) -> None:
    """Its reader of .ds needs only the tokens' file, which is our .bin."""
    from datatrove.utils.dataset import DatatroveFileDataset

    prefix = write_corpus(DOCUMENTS)
    theirs = DatatroveFileDataset(f"{prefix}.bin", seq_len=9, token_size=2)
    rows = [theirs[i]["input_ids"].tolist() for i in range(len(theirs))]
    assert rows == [STREAM[i : i + 10] for i in range(0, len(STREAM) - 9, 10)]
