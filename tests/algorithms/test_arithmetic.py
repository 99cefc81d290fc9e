"""The synthetic task, against subtraction of every pair of digits."""

import pytest

from algorithms.arithmetic import closeness, make_splits
from configs.errors import ConfigError


def test_answers_are_the_largest_difference_of_two_digits() -> None:
    splits = make_splits(seed=3, warm_up=20, train=200, held_out=50)
    for problem in (*splits.warm_up, *splits.train, *splits.held_out):
        word, number = problem.prompt.split(" ")
        assert word == "range"
        assert len(number) == 5
        digits = [int(digit) for digit in number]
        assert problem.answer == str(max(left - right for left in digits for right in digits))


def test_sizes_are_as_asked_and_prompts_distinct() -> None:
    splits = make_splits(seed=1, warm_up=30, train=500, held_out=100)
    for part, size in ((splits.warm_up, 30), (splits.train, 500), (splits.held_out, 100)):
        assert len({problem.prompt for problem in part}) == len(part) == size


def test_held_out_digits_occur_nowhere_else_in_any_order() -> None:
    splits = make_splits(seed=1)
    held_out = {tuple(sorted(problem.prompt)) for problem in splits.held_out}
    others = (*splits.warm_up, *splits.train)
    assert held_out.isdisjoint(tuple(sorted(problem.prompt)) for problem in others)


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
    ("completion", "answer", "reward"),
    [
        ("7", "7", 1.0),
        (" 7\n", "7", 1.0),
        ("4", "7", 2 / 3),
        ("9", "0", 0.0),
        ("07", "7", 0.0),
        ("-7", "7", 0.0),
        ("²", "2", 0.0),
        ("\u0667", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_closeness_falls_with_the_distance_and_is_zero_for_anything_but_a_digit(
    completion: str, answer: str, reward: float
) -> None:
    assert closeness(completion, answer) == pytest.approx(reward)
