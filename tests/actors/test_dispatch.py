"""Which engine takes the next prompt."""

import pytest

from actors.dispatch import Room
from configs.errors import ConfigError


def test_the_engine_with_most_room_takes_the_next() -> None:
    room = Room(num_engines=3, capacity=8)
    assert [room.take(4), room.take(2), room.take(3), room.take(1)] == [0, 1, 2, 1]
    assert room.in_flight == (4, 3, 3)


def test_nobody_takes_what_does_not_fit_until_room_is_given_back() -> None:
    room = Room(num_engines=2, capacity=8)
    assert [room.take(8), room.take(5)] == [0, 1]
    assert room.take(4) is None
    assert room.in_flight == (8, 5)
    assert room.take(3) == 1
    room.give_back(0, 8)
    assert room.take(4) == 0
    assert room.in_flight == (4, 8)


def test_a_fast_engine_gets_more() -> None:
    """Engine 1 finishes at once, engine 0 never: all but the first prompt go to engine 1."""
    room = Room(num_engines=2, capacity=4)
    taken = [room.take(4)]
    for _ in range(5):
        engine = room.take(4)
        taken.append(engine)
        room.give_back(1, 4)
    assert taken == [0, 1, 1, 1, 1, 1]


def test_a_group_larger_than_an_engine_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"rollout.max_num_seqs: 9 completions .* 8"):
        Room(num_engines=2, capacity=8).take(9)
