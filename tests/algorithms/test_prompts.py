"""The prompt stream, against permutations written down by numpy and against its own contract."""

import numpy as np
import pytest

from algorithms.prompts import PromptStream
from configs.errors import BasculeError


def test_epochs_are_numpys_permutations_of_seed_and_epoch() -> None:
    stream = PromptStream(list("abcdefg"), seed=5, shuffle=True)
    expected = [
        "abcdefg"[index] for epoch in range(3) for index in np.random.default_rng((5, epoch)).permutation(7)
    ]
    drawn = [item for size in (3, 9, 1, 8) for item in stream.take(size)]
    assert drawn == expected


def test_no_repeat_within_an_epoch_and_orders_differ() -> None:
    stream = PromptStream(range(20), seed=0, shuffle=True)
    epochs = [stream.take(20) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert PromptStream(range(20), seed=1, shuffle=True).take(20) != epochs[0]


def test_without_shuffle_the_order_is_the_files() -> None:
    assert PromptStream("abc", seed=0, shuffle=False).take(7) == list("abcabca")


@pytest.mark.parametrize("before", [0, 3, 7, 12])
def test_restored_stream_goes_on_with_the_same_items(before: int) -> None:
    first = PromptStream(range(7), seed=3, shuffle=True)
    first.take(before)
    state = first.state()
    assert state == {"epoch": before // 7, "offset": before % 7}
    second = PromptStream(range(7), seed=3, shuffle=True)
    second.restore(state)
    assert second.take(10) == first.take(10)


def test_errors() -> None:
    with pytest.raises(BasculeError, match="nothing to draw from"):
        PromptStream([], seed=0, shuffle=True)
    with pytest.raises(BasculeError, match=r"item 5 of an epoch, but the dataset has 5 rows"):
        PromptStream(range(5), seed=0, shuffle=True).restore({"epoch": 0, "offset": 5})
