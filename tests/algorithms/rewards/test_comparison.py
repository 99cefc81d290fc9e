"""Comparisons of rewards on stored rollouts against numbers by hand."""

import math
import statistics

import pytest

from algorithms.data import Verdict
from algorithms.rewards.comparison import compare
from algorithms.stored_rollouts import StoredGroup
from tests.algorithms.rewards.groups import group

NEW = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [None, 0.5, 0.5]]
OLD = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.5, 0.5, 0.0]]


def stored(name: str) -> StoredGroup:
    return StoredGroup(
        step=2, split="train", group=group("a", "b", "c", name=name), rewards=(0.0,) * 3, parts={}
    )


def verdicts(values: list[float | None]) -> list[Verdict]:
    return [Verdict(value=value, seconds=index) for index, value in enumerate(values)]


GROUPS = [stored(name) for name in ("p0", "p1", "p2")]


def test_two_rewards() -> None:
    found = compare(GROUPS, [verdicts(row) for row in NEW], OLD)
    assert found.old is not None
    known = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert (found.new.count, found.new.none, found.new.errors, found.new.distinct) == (9, 1, 0, 3)
    assert found.new.mean == pytest.approx(statistics.fmean(known))
    assert found.new.std == pytest.approx(statistics.pstdev(known))
    assert (found.new.quantiles[0], found.new.quantiles[2], found.new.quantiles[4]) == (0.0, 0.75, 1.0)
    assert sum(count for _, _, count in found.new.bins) == 8
    where = [(case.prompt_id, case.index) for case in found.disagreements]
    assert where == [("p2", 0), ("p0", 2), ("p1", 0), ("p2", 2)]
    assert (found.signal.groups, found.signal.new, found.signal.old) == (3, 1, 3)
    assert (found.signal.gained, found.signal.lost) == ((), ("step 2, p1", "step 2, p2"))
    pairs = [(n, o) for new, old in zip(NEW, OLD, strict=True) for n, o in zip(new, old, strict=True)]
    both = [(n, o) for n, o in pairs if n is not None]
    assert found.correlation == pytest.approx(statistics.correlation(*zip(*both, strict=True)))
    assert [case.seconds for case in found.slowest[:4]] == [2, 2, 2, 1]


def test_one_reward_and_its_failures() -> None:
    found = compare(GROUPS[:1], [[Verdict(value=1.0), Verdict(error="it broke"), Verdict()]], None)
    assert (found.old, found.new.none, found.new.errors) == (None, 1, 1)
    assert [case.error for case in found.failed] == ["it broke"]
    assert found.signal.new == 0
    assert math.isnan(found.correlation)


def test_nothing_that_is_a_number() -> None:
    found = compare(GROUPS[:1], [[Verdict()] * 3], [(None, None, None)])
    assert math.isnan(found.new.mean)
    assert (found.new.quantiles, found.new.bins, found.disagreements) == ((), (), [])
