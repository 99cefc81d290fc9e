"""Reward functions as a user writes them: plain Python, no import from the project.

bascule grpo --config configs/grpo-tiny.yaml --rewards.0.function examples/my_rewards.py:accuracy
"""

import asyncio
from typing import Any


def accuracy(completion: str, answer: str) -> float:
    """1 for the right answer, 0 for any other."""
    return float(completion.strip() == answer)


def brief(finish: str, tokens: list[int]) -> float | None:
    """The shorter the better; says nothing about a completion that was cut."""
    return None if finish == "length" else 1 / len(tokens)


def graded(completion: str, answer: str) -> dict[str, Any]:
    """A score with its parts, which are recorded, and a note to read beside the completion."""
    digits = completion.strip().isdigit()
    right = completion.strip() == answer
    return {
        "score": float(right) + 0.1 * digits,
        "right": right,
        "digits": digits,
        "note": f"wanted {answer}",
    }


def first_token(tokens: list[int]) -> dict[str, Any]:
    """No reward for the completion, but credit for its first token alone: -0.1 unless it is token 5."""
    return {"score": None, "spans": [(0, 1, 0.0 if tokens[0] == 5 else -0.1)]}


def longest(completions: list[str], **columns: Any) -> list[float]:
    """A batch, as in TRL and ms-swift: the completions of a prompt in a list, every column in a list."""
    most = max(map(len, completions))
    return [float(len(completion) == most) for completion in completions]


def novelty(group: Any) -> list[float]:
    """A group: 1 for a text that no other completion of the prompt has."""
    texts = [rollout.text for rollout in group.rollouts]
    return [float(texts.count(text) == 1) for text in texts]


async def judged(completion: str, answer: str) -> float:
    """Async: many run beside each other. Here a client of a judge would be awaited."""
    await asyncio.sleep(0.01)
    return float(answer in completion)
