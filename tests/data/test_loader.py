import threading
import time
from itertools import islice

import pytest
import torch

from megakrause.batch import TokenBatch
from megakrause.data.loader import eval_batches, num_eval_batches, train_batches
from megakrause.data.shards import Corpus
from megakrause.data.tokens import TokenWindows
from tests.data.conftest import EOS, WriteCorpus

SEQ_LEN = 5


@pytest.fixture
def windows(write_corpus: WriteCorpus) -> TokenWindows:
    """23 windows, the last one short."""
    stream = [2 + i for i in range(23 * SEQ_LEN - 14)]
    documents = [[*stream[i : i + 9], EOS] for i in range(0, len(stream) * 9 // 10, 9)]
    corpus = Corpus.open(write_corpus(documents, shard_bytes=64))
    return TokenWindows(corpus, SEQ_LEN, eos=EOS, mask_documents=True, seed=3)


def fields(batch: TokenBatch) -> tuple[torch.Tensor, ...]:
    return batch.tokens, batch.targets, batch.loss_mask, batch.doc_start


def equal(first: TokenBatch, second: TokenBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(fields(first), fields(second), strict=True))


def joined(batches: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(*(torch.cat(parts) for parts in zip(*map(fields, batches), strict=True)))


def steps(
    windows: TokenWindows, count: int, *, ranks: int = 1, start: int = 0, prefetch: int = 0, global_batch: int = 12
):
    """The first global batches, put together from all ranks, with the state after each."""
    iterators = [
        train_batches(windows, global_batch=global_batch, rank=rank, ranks=ranks, start=start, prefetch=prefetch)
        for rank in range(ranks)
    ]
    result = []
    for together in islice(zip(*iterators, strict=True), count):
        assert len({state for _, state in together}) == 1
        assert {len(batch.tokens) for batch, _ in together} == {global_batch // ranks}
        result.append((joined([batch for batch, _ in together]), together[0][1]))
    for iterator in iterators:
        iterator.close()
    return result


def same(first, second) -> bool:
    return all(equal(a, b) and i == j for (a, i), (b, j) in zip(first, second, strict=True))


def test_batches_follow_the_order(windows: TokenWindows) -> None:
    [(first, state), (second, _)] = steps(windows, 2)
    assert state == 12
    assert equal(first, windows.batch(range(12))) and equal(second, windows.batch(range(12, 24)))


@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_do_not_depend_on_ranks_or_prefetch(windows: TokenWindows, ranks: int, prefetch: int) -> None:
    assert same(steps(windows, 6), steps(windows, 6, ranks=ranks, prefetch=prefetch))


@pytest.mark.parametrize("done", [1, 2, 5])
def test_resuming_goes_on_where_it_stopped(windows: TokenWindows, done: int) -> None:
    whole = steps(windows, 8)
    state = whole[done - 1][1]
    assert same(whole[done:], steps(windows, 8 - done, start=state, ranks=3, prefetch=2))


def test_another_global_batch_keeps_the_order_of_samples(windows: TokenWindows) -> None:
    small, large = steps(windows, 12, global_batch=4), steps(windows, 4, global_batch=12)
    assert equal(joined([batch for batch, _ in small]), joined([batch for batch, _ in large]))


def test_an_epoch_has_every_target_once(windows: TokenWindows) -> None:
    epoch = joined([batch for batch, _ in steps(windows, len(windows), global_batch=1)])
    targets = epoch.targets[epoch.loss_mask].sort().values
    expected = windows.corpus.read(0, windows.corpus.num_tokens)
    assert targets.tolist() == sorted(expected.tolist())


def test_ranks_must_share_evenly(windows: TokenWindows) -> None:
    with pytest.raises(ValueError, match="global batch of 12 cannot be shared by 5 ranks"):
        train_batches(windows, global_batch=12, rank=0, ranks=5, start=0, prefetch=0)


class Failing:
    """Windows of which the third batch cannot be read."""

    def __init__(self, windows: TokenWindows) -> None:
        self.windows = windows
        self.batches = 0

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices) -> TokenBatch:
        self.batches += 1
        if self.batches == 3:
            raise OSError("disk gone")
        return self.windows.batch(indices)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("prefetch", [0, 1, 8])
def test_what_fails_while_reading_is_raised_here(windows: TokenWindows, prefetch: int) -> None:
    options = {"global_batch": 4, "rank": 0, "ranks": 1, "start": 0}
    batches = train_batches(Failing(windows), prefetch=prefetch, **options)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert not prefetch_threads()


def test_reading_ahead_is_bounded_and_ends_when_closed(windows: TokenWindows) -> None:
    counting = Failing(windows)
    counting.batches = 10
    batches = train_batches(counting, global_batch=4, rank=0, ranks=1, start=0, prefetch=3)
    next(batches)
    deadline = time.monotonic() + 5
    while counting.batches < 15 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert counting.batches == 15  # one handed out, three waiting, one in the thread's hand
    assert len(prefetch_threads()) == 1
    batches.close()
    assert not prefetch_threads()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_evaluation_sees_every_window_once(windows: TokenWindows, ranks: int, batch: int) -> None:
    per_rank = [list(eval_batches(windows, batch=batch, rank=rank, ranks=ranks, limit=0)) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    everything = [one for batches in per_rank for one in batches]
    assert all(one.tokens.shape == (batch, SEQ_LEN) for one in everything)
    together = joined(everything)
    expected = windows.batch(range(len(windows)))
    assert together.loss_mask.sum() == expected.loss_mask.sum()
    real = together.loss_mask.any(dim=1)
    assert sorted(together.tokens[real].tolist()) == sorted(expected.tokens.tolist())


@pytest.mark.parametrize(("ranks", "batch"), [(1, 4), (2, 4), (2, 1), (4, 2)])
def test_evaluation_can_be_limited_to_the_same_sequences_for_every_layout(
    windows: TokenWindows, ranks: int, batch: int
) -> None:
    limit = 5
    per_rank = [list(eval_batches(windows, batch=batch, rank=r, ranks=ranks, limit=limit)) for r in range(ranks)]
    assert {len(batches) for batches in per_rank} == {num_eval_batches(windows, batch=batch, ranks=ranks, limit=limit)}
    rows = [
        row
        for batches in zip(*per_rank, strict=True)
        for b in batches
        for row in range(batch)
        if b.loss_mask[row].any()
    ]
    assert len(rows) == limit
    targets = sum(int(b.loss_mask.sum()) for batches in per_rank for b in batches)
    assert targets == int(windows.batch(range(limit)).loss_mask.sum())


def test_evaluation_limited_beyond_the_corpus_takes_all_of_it(windows: TokenWindows) -> None:
    batches = eval_batches(windows, batch=4, rank=0, ranks=1, limit=10**6)
    assert sum(int(b.loss_mask.sum()) for b in batches) == int(windows.batch(range(len(windows))).loss_mask.sum())
