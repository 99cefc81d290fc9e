"""Rewards for how long a completion is, and how often it repeats itself."""

import math
from collections.abc import Sequence, Sized
from typing import Literal

from algorithms.rewards.builtin.matching import exact_match
from algorithms.rewards.builtin.mathematics import math_boxed, numeric

Unit = Literal["tokens", "words", "characters"]


def length(
    completion: str,
    tokens: Sized,
    *,
    minimum: int = 0,
    maximum: int = 0,
    target: int = 0,
    margin: int = 0,
    unit: Unit = "tokens",
) -> float:
    """1 for a length from `minimum` to `maximum` (0: no upper end), falling to 0 over `margin` beside them.

    With `target` it is max(0, 1 - |length - target| / target) instead. Tokens include the end token. Raises
    ValueError for settings that exclude each other.
    """
    if target and (minimum or maximum or margin):
        raise ValueError("length takes `target`, or `minimum`, `maximum` and `margin`")
    if maximum and maximum < minimum:
        raise ValueError(f"length: `maximum` {maximum} is below `minimum` {minimum}")
    size = _size(completion, tokens, unit)
    if target:
        return max(0.0, 1.0 - abs(size - target) / target)
    outside = max(minimum - size, size - maximum if maximum else 0, 0)
    return max(0.0, 1.0 - outside / margin) if outside and margin else float(not outside)


def soft_overlong(tokens: Sized, *, max_length: int, cache: int) -> float:
    """DAPO's punishment of long completions (arXiv 2503.14476, equation 13), by tokens.

    0 up to max_length - cache, from there falling linearly to -1 at `max_length`, and -1 beyond. Raises
    ValueError for a cache outside of [0, max_length].
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"soft_overlong: `cache` {cache} is not in [0, max_length = {max_length}]")
    over = len(tokens) - (max_length - cache)
    if over <= 0:
        return 0.0
    return -min(1.0, over / cache) if cache else -1.0


def repetition(
    completion: str,
    tokens: Sequence[int],
    *,
    n: int = 3,
    max_penalty: float = -1.0,
    unit: Literal["words", "tokens"] = "words",
) -> float:
    """Penalty for repeated n-grams: (1 - different n-grams / all n-grams) * max_penalty.

    From arXiv 2502.03373, appendix C.2. As in open-r1 and ms-swift over words, which are lower-cased and split at
    white space, or as in TRL over tokens; 0 for fewer than n of them. Raises ValueError for a positive
    `max_penalty` or n below 1.
    """
    if max_penalty > 0 or n < 1:
        raise ValueError(
            f"repetition: `max_penalty` is {max_penalty}, `n` is {n}; it is at most 0, n at least 1"
        )
    units = _known(unit, ("words", "tokens")) == "words"
    row: Sequence[object] = completion.lower().split() if units else [int(token) for token in tokens]
    count = len(row) - n + 1
    if count < 1:
        return 0.0
    different = len({tuple(row[start : start + n]) for start in range(count)})
    return (1 - different / count) * max_penalty


def cosine(
    completion: str,
    answer: object,
    tokens: Sized,
    *,
    max_length: int,
    correct: Literal["math", "exact", "numeric"] = "math",
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> float | None:
    """The cosine-scaled length reward of arXiv 2502.03373, appendix C.1, by tokens.

    end + (start - end) (1 + cos(pi min(1, length / max_length))) / 2, where a correct completion starts at
    `max_value_correct` and ends at `min_value_correct`, and a wrong one starts at `min_value_wrong` and ends at
    `max_value_wrong`. `correct` says whether math_boxed, exact_match or numeric decides. None where that one
    says None. Raises ValueError for another word.
    """
    judges = {"math": math_boxed, "exact": exact_match, "numeric": numeric}
    is_correct = judges[_known(correct, tuple(judges))](completion, answer)
    if is_correct is None:
        return None
    progress = min(1.0, len(tokens) / max_length)
    start, end = (max_value_correct, min_value_correct) if is_correct else (min_value_wrong, max_value_wrong)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def _size(completion: str, tokens: Sized, unit: Unit) -> int:
    if _known(unit, ("tokens", "words", "characters")) == "tokens":
        return len(tokens)
    return len(completion.split() if unit == "words" else completion)


def _known(value: str, values: Sequence[str]) -> str:
    if value not in values:
        raise ValueError(f"{value!r} is none of {', '.join(values)}")
    return value
