"""Which checkpoints stay: the newest, those of every so many steps, and never none that is good."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megakrause.checkpoint.place import Place
from megakrause.checkpoint.read import newest_checkpoint
from megakrause.checkpoint.write import Retention
from megakrause.errors import UserError
from tests.checkpoint.states import Home, damage, folders, is_whole, save

STEPS = st.sets(st.integers(0, 60), max_size=12)


@given(last=st.integers(1, 6), every=st.integers(0, 12), newest=st.integers(0, 60), others=STEPS)
@example(last=1, every=0, newest=0, others=set())
@example(last=1, every=1, newest=5, others={0, 1, 2, 3, 4})
def test_the_newest_and_the_multiples_stay(last: int, every: int, newest: int, others: set[int]) -> None:
    """Of steps later than the newest, which do not verify, none goes, and none takes the place of another."""
    steps = sorted(others | {newest}, reverse=True)
    outdated = Retention(last, every).outdated(newest, steps)
    kept = [step for step in steps if step not in outdated]
    assert set(outdated) <= set(steps) and len(set(outdated)) == len(outdated)
    assert newest in kept
    assert [step for step in steps if step > newest] == [step for step in kept if step > newest]
    up_to = [step for step in steps if step <= newest]
    assert set(up_to[:last]) <= set(kept)
    for step in up_to[last:]:
        assert (step in kept) == bool(every and step % every == 0)


class Run:
    """What training does to its checkpoints, and what disks do."""

    def __init__(self, home: Home, last: int, every: int):
        self.home, self.last, self.every = home, last, every
        self.step = 0
        self.good: set[int] = set()
        self.damaged: set[int] = set()  # as far as the run knows

    def save(self, distance: int) -> None:
        self.step += distance
        before = set(self.home.place().steps())
        save(self.home.name, self.step, last=self.last, every=self.every, damaged=self.damaged)
        there = set(self.home.place().steps())
        gone, old_damage = before - there, set(self.damaged)
        self.damaged.discard(self.step)  # written anew
        assert self.step in there and all(step < self.step for step in gone)
        assert not any(self.every and step % self.every == 0 for step in gone - old_damage)
        sound = [step for step in before - old_damage if step < self.step]
        assert len([step for step in there - self.damaged if step <= self.step]) >= min(self.last, len(sound) + 1)
        self.good = (self.good | {self.step}) & there
        self.check()

    def crash(self, damaged: int) -> None:
        """Some of the newest turn out to be damaged; the run goes on from the newest that is good, if there is one."""
        for step in sorted(self.good, reverse=True)[: min(damaged, len(self.good) - 1)]:
            damage(self.home.root / f"step-{step}" / "state.json")
            self.good.discard(step)
        self.home.place().clean()
        self.check()

    def check(self) -> None:
        if not self.good:
            return
        checkpoint, passed_over = newest_checkpoint(self.home.place())
        self.damaged.update(passed_over)
        assert is_whole(checkpoint, max(self.good))
        self.step = max(self.good)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 7)),
        st.tuples(st.just("save"), st.just(5)),
        st.tuples(st.just("crash"), st.integers(0, 3)),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=25)
@given(last=st.integers(1, 3), every=st.integers(0, 6), scheme=st.sampled_from(["", "file://"]), events=EVENTS)
def test_a_run_can_always_go_on(last: int, every: int, scheme: str, events: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Home(Path(folder) / "checkpoints", scheme), last, every)
        for event, number in events:
            if event == "save":
                run.save(number)
            else:
                run.crash(number)


@pytest.mark.slow
@settings(max_examples=400)
@given(last=st.integers(1, 3), every=st.integers(0, 6), scheme=st.sampled_from(["", "file://"]), events=EVENTS)
def test_a_run_can_always_go_on_whatever_happens(
    last: int, every: int, scheme: str, events: list[tuple[str, int]]
) -> None:
    test_a_run_can_always_go_on.hypothesis.inner_test(last, every, scheme, events)  # type: ignore[attr-defined]


@settings(max_examples=15)
@given(last=st.integers(1, 4), every=st.integers(0, 5), steps=st.sets(st.integers(1, 20), min_size=1, max_size=8))
def test_what_is_there_after_steps_in_order(last: int, every: int, steps: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for step in sorted(steps):
            save(Path(folder), step, last=last, every=every)
        expected = set(sorted(steps)[-last:]) | {step for step in steps if every and step % every == 0}
        assert set(Place.of(folder).steps()) == expected
        assert set(folders(Path(folder))) == {f"step-{step}" for step in expected}


def test_damaged_ones_do_not_count_among_the_newest(home: Home) -> None:
    """Once training has passed the steps that it had passed over, they push no good one out."""
    for step in (10, 20, 30):
        save(home.name, step, last=9)
    for step in (20, 30):
        damage(home.root / f"step-{step}" / "state.json")
    save(home.name, 15, last=2, damaged=[20, 30])  # from step 10 on
    save(home.name, 35, last=2, damaged=[20, 30])
    assert folders(home.root) == ["step-15", "step-35"]
    checkpoint, _ = newest_checkpoint(home.place())
    assert is_whole(checkpoint, 35)
    damage(home.root / "step-35" / "state.json")  # which is why one keeps two
    checkpoint, _ = newest_checkpoint(home.place())
    assert is_whole(checkpoint, 15)


def test_only_the_newest_are_kept(home: Home) -> None:
    for step in (8, 9, 10, 11):
        save(home.name, step, last=3)
    assert folders(home.root) == ["step-10", "step-11", "step-9"]
    save(home.name, 12, last=1)
    assert folders(home.root) == ["step-12"]


def test_a_damaged_newer_one_does_not_push_good_ones_out(home: Home) -> None:
    """A run that passed over step 9 and went on from step 1 saves step 2, which is all that it can go on from."""
    save(home.name, 9)
    damage(home.root / "step-9" / "state.json")
    save(home.name, 2, last=1, damaged=[9])
    checkpoint, passed_over = newest_checkpoint(home.place())
    assert is_whole(checkpoint, 2)
    assert list(passed_over) == [9]
    assert "step-1" not in folders(home.root)


def test_when_none_is_good_nothing_is_removed(home: Home) -> None:
    damage(home.root / "step-1" / "state.json")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        newest_checkpoint(home.place())
    home.place().clean()
    assert folders(home.root) == ["step-1"]
