"""The reward of reasoning-gym's tasks."""

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def reasoning_gym(
    completion: str,
    *,
    question: str,
    answer: str,
    metadata: Mapping[str, Any],
    dataset_kwargs: Mapping[str, Any],
    extract: Literal["none", "last_number"] = "none",
) -> float:
    """Score in [0, 1] of the reasoning-gym task that made the row, by its own rules.

    With `extract: last_number` the last number in the completion is scored in place of all of it.
    """
    if extract not in ("none", "last_number"):
        raise ValueError(f"extract is {extract!r}; it is one of none, last_number")
    text = completion.strip() if extract == "none" else last_number(completion)
    entry = {"question": question, "answer": answer, "metadata": metadata}
    score = _scorer(metadata["source_dataset"], tuple(sorted(dataset_kwargs.items())))
    return float(score(text, entry))


def last_number(text: str) -> str | None:
    """The last number in `text`, without commas, or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "").removeprefix("+") if numbers else None


# Some tasks read word lists when they are made, which takes longer than scoring.
@functools.lru_cache(maxsize=16)
def _scorer(task: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., float]:
    factory: Any = importlib.import_module("reasoning_gym.factory")
    return factory.create_dataset(task, **dict(options)).score_answer
