"""Reward functions as a user writes them: plain Python, no import from the project.

bascule grpo --config configs/grpo-tiny.yaml --rewards.0.function examples/my_rewards.py:accuracy
"""


def accuracy(completion: str, answer: str) -> float:
    """1 for the right answer, 0 for any other."""
    return float(completion.strip() == answer)


def brief(finish: str, tokens: list[int]) -> float | None:
    """The shorter the better; says nothing about a completion that was cut."""
    return None if finish == "length" else 1 / len(tokens)
