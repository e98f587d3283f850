import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakrause.data.mixture import FINEST, Mixture, Share, schedule, whole_weights

weight = st.floats(0.001, 1) | st.integers(1, 100).map(float) | st.sampled_from([0.1, 0.25, 0.7, 1e-3, 3.0])


def counts(mixture: Mixture, samples: int, sources: int) -> np.ndarray:
    """How many samples each source has given after each sample, [samples, sources]."""
    source, inside = mixture.locate(np.arange(samples))
    given = np.cumsum(np.eye(sources, dtype=int)[source], axis=0)
    # A source gives its samples in order, none twice and none left out.
    assert (inside == given[np.arange(samples), source] - 1).all()
    return given


@given(st.lists(weight, min_size=1, max_size=9), st.integers(1, 3000))
@settings(max_examples=25, deadline=None)
def test_every_source_is_within_one_sample_of_its_share_at_every_sample(weights: list[float], samples: int) -> None:
    given = counts(Mixture([Share(((0, w),)) for w in weights]), samples, len(weights))
    share = np.arange(1, samples + 1)[:, None] * (np.array(weights) / sum(weights))
    assert abs(given - share).max() < 1


def test_decimal_weights_are_exact_and_others_nearly() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([3, 0, 1.5]) == (2, 0, 1)
    assert sum(whole_weights([0.1234567891, 1 / 3, 1e-9])) == FINEST and min(whole_weights([1.0, 1e-9])) == 1
    assert whole_weights([1234567, 7654321])[0] == round(1234567 / (1234567 + 7654321) * FINEST)


def test_a_round_is_even() -> None:
    turns, ranks = schedule((3, 1))
    assert turns.tolist() == [0, 0, 1, 0] and ranks.tolist() == [0, 1, 0, 2]
    assert schedule((0, 2))[0].tolist() == [1, 1]


@given(
    st.lists(st.tuples(weight, st.none() | st.integers(1, 200)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 4), st.just(0.0) | weight), max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_limits_and_changes_of_weights(sources: list, changes: list) -> None:
    """Against the definition, segment by segment."""
    schedules = [{0: w} for w, _ in sources]
    for start, source, w in changes:
        schedules[source % len(sources)][start] = w
    shares = [Share(tuple(sorted(s.items())), limit) for s, (_, limit) in zip(schedules, sources, strict=True)]
    mixture = Mixture(shares)
    samples = 900 if mixture.size is None else min(mixture.size, 900)
    given = np.vstack([np.zeros(len(shares), int), counts(mixture, samples, len(shares))])
    for share, column in zip(shares, given.T, strict=True):
        assert share.limit is None or column[-1] <= share.limit
    starts = [segment.start for segment in mixture.segments] + [10**9]
    for segment, end in zip(mixture.segments, starts[1:], strict=True):
        if segment.start > samples:
            break
        before = given[segment.start]
        assert tuple(before) == segment.given
        open_ = [s.limit is None or n < s.limit for s, n in zip(shares, before, strict=True)]
        weights = np.array([s.weight(segment.start) * o for s, o in zip(shares, open_, strict=True)])
        for sample in range(segment.start, min(end, samples) + 1):
            ideal = before + (sample - segment.start) * weights / weights.sum()
            assert abs(given[sample] - ideal).max() < 1
    if mixture.size is not None:
        assert all(s.limit == n or not s.weight(mixture.size) for s, n in zip(shares, given[-1], strict=True)) or (
            mixture.size > samples
        )


def test_lengthening_and_what_is_asked_beside_it_change_nothing() -> None:
    mixture = Mixture([Share(((0, 0.5), (100, 0.1))), Share(((0, 0.5),), limit=70)])
    whole = mixture.locate(np.arange(1000))
    for sample in (0, 99, 100, 101, 500, 999):
        assert [int(x[0]) for x in mixture.locate(np.array([sample]))] == [int(x[sample]) for x in whole]


def test_the_past_is_what_decided_it() -> None:
    early = Mixture([Share(((0, 1.0),)), Share(((0, 1.0),))])
    late = Mixture([Share(((0, 1.0), (50, 3.0))), Share(((0, 1.0),))])
    assert early.past(50) == late.past(50) and early.past(51) != late.past(51)


def test_when_all_may_give_no_more_there_is_an_end() -> None:
    assert Mixture([Share(((0, 3.0),), limit=7), Share(((0, 1.0),), limit=5)]).size == 12
    assert Mixture([Share(((0, 1.0), (4, 0.0)))]).size == 4
    with pytest.raises(ValueError, match="no source has a weight"):
        Mixture([Share(((0, 0.0),))])
