"""The synthetic task, against sorting by hand and by counting."""

import pytest

from algorithms.arithmetic import digits_in_place, make_splits
from configs.errors import ConfigError


def test_answers_are_the_digits_in_ascending_order() -> None:
    splits = make_splits(seed=3, warm_up=20, train=200, held_out=50)
    for problem in (*splits.warm_up, *splits.train, *splits.held_out):
        word, number = problem.prompt.split(" ")
        assert word == "sort"
        assert len(number) == 5
        assert problem.answer == "".join(digit * number.count(digit) for digit in "0123456789")


def test_sizes_are_as_asked_and_prompts_distinct() -> None:
    splits = make_splits(seed=1, warm_up=30, train=500, held_out=100)
    for part, size in ((splits.warm_up, 30), (splits.train, 500), (splits.held_out, 100)):
        assert len({problem.prompt for problem in part}) == len(part) == size


def test_held_out_answers_occur_nowhere_else() -> None:
    splits = make_splits(seed=1)
    held_out = {problem.answer for problem in splits.held_out}
    assert held_out.isdisjoint(problem.answer for problem in (*splits.warm_up, *splits.train))


def test_same_seed_same_problems_and_another_seed_others() -> None:
    assert make_splits(seed=5, train=100) == make_splits(seed=5, train=100)
    assert make_splits(seed=5, train=100) != make_splits(seed=6, train=100)


def test_size_of_one_split_leaves_the_others_alone() -> None:
    small, large = make_splits(seed=2, train=100), make_splits(seed=2, train=400)
    assert small.held_out == large.held_out
    assert small.warm_up == large.warm_up
    assert small.train == large.train[:100]


def test_too_few_digits_are_refused() -> None:
    with pytest.raises(ConfigError, match="digits: 2"):
        make_splits(seed=1, digits=2)


@pytest.mark.parametrize(
    ("completion", "answer", "share"),
    [
        ("01358", "01358", 1.0),
        (" 01358\n", "01358", 1.0),
        ("01385", "01358", 0.6),
        ("0135", "01358", 0.8),
        ("0135801358", "01358", 0.5),
        ("", "01358", 0.0),
    ],
)
def test_digits_in_place_counts_positions_of_the_longer_text(
    completion: str, answer: str, share: float
) -> None:
    assert digits_in_place(completion, answer) == pytest.approx(share)
