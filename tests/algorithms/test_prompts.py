"""The prompt stream, against permutations written down by numpy and against its own contract."""

from collections.abc import Iterable

import numpy as np
import pytest

from algorithms.data import Prompt, int_row
from algorithms.prompts import PromptStream
from configs.errors import BasculeError


def stream_of(names: Iterable[object], *, seed: int = 0, shuffle: bool = True) -> PromptStream[Prompt]:
    items = [Prompt(id=str(name), tokens=int_row([1]), messages=(), columns={}) for name in names]
    return PromptStream(items, seed=seed, shuffle=shuffle)


def draw(stream: PromptStream[Prompt], n: int) -> list[str]:
    return [item.id for item in stream.take(n)]


def test_epochs_are_numpys_permutations_of_seed_and_epoch() -> None:
    stream = stream_of("abcdefg", seed=5)
    expected = [
        "abcdefg"[index] for epoch in range(3) for index in np.random.default_rng((5, epoch)).permutation(7)
    ]
    assert [item for size in (3, 9, 1, 8) for item in draw(stream, size)] == expected


def test_no_repeat_within_an_epoch_and_orders_differ() -> None:
    stream = stream_of(range(20))
    epochs = [draw(stream, 20) for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(n) for n in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert draw(stream_of(range(20), seed=1), 20) != epochs[0]


def test_without_shuffle_the_order_is_the_files() -> None:
    assert draw(stream_of("abc", shuffle=False), 7) == list("abcabca")


@pytest.mark.parametrize("before", [0, 3, 7, 12])
def test_restored_stream_goes_on_with_the_same_items(before: int) -> None:
    first = stream_of(range(7), seed=3)
    first.take(before)
    state = first.state()
    assert state == {"epoch": before // 7, "offset": before % 7}
    second = stream_of(range(7), seed=3)
    second.restore(state)
    assert draw(second, 10) == draw(first, 10)


def test_errors() -> None:
    with pytest.raises(BasculeError, match="nothing to draw from"):
        stream_of([])
    with pytest.raises(BasculeError, match=r"item 5 of an epoch, but the dataset has 5 rows"):
        stream_of(range(5)).restore({"epoch": 0, "offset": 5})
