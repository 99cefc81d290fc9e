"""Built-in rewards against hand-written cases and reasoning-gym's own scores."""

import pytest
import reasoning_gym as gym

from algorithms.rewards.builtin import exact_match, format_match, last_number, reasoning_gym


def test_exact_match() -> None:
    assert [exact_match(" 5\n", "5"), exact_match("5.", "5"), exact_match("5", 5)] == [1.0, 0.0, 1.0]


def test_format_match_is_of_the_whole_completion() -> None:
    pattern = r"(?s)<think>.*</think>\d+"
    assert [format_match(text, pattern) for text in ("<think>a\nb</think>5", "<think></think>5 ")] == [
        1.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 + 2 = 3.", "3"),
        ("so -4", "-4"),
        ("1,234.5 it is", "1234.5"),
        ("+7", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [("chain_sum", {}), ("countdown", {}), ("decimal_arithmetic", {"max_num_decimal_places": 3})],
)
def test_reasoning_gym_scores_as_the_task_does(task: str, kwargs: dict[str, int]) -> None:
    dataset = gym.create_dataset(task, size=3, seed=1, **kwargs)
    for entry in dataset:
        for text in (entry["answer"], "12", f"it is {entry['answer']}", ""):
            mine = reasoning_gym(text, **entry, dataset_kwargs=kwargs)
            assert mine == dataset.score_answer(text, entry)


def test_reasoning_gym_with_the_last_number() -> None:
    (entry,) = gym.create_dataset("chain_sum", size=1, seed=1)
    text = f"First 12, so the answer is {entry['answer']}."
    assert reasoning_gym(text, **entry, dataset_kwargs={}, extract="last_number") == 1.0
    assert reasoning_gym("no idea", **entry, dataset_kwargs={}, extract="last_number") == 0.0
    with pytest.raises(ValueError, match="extract is 'first'"):
        reasoning_gym(text, **entry, dataset_kwargs={}, extract="first")  # type: ignore[arg-type]
