"""A task that a tiny model can learn on a laptop: subtract the smallest digit of a number from the largest.

`range 52937` is answered by `7`, which is 9 - 2. There are two thousand ways to choose five digits, so a warm-up
on sixty examples leaves much to find out, while a right answer still turns up often enough to be rewarded.
"""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import comb

from configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question and its only right answer, as text."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Problems of three files; the digits of a problem of `held_out` occur in no other, in whatever order.

    `warm_up` and `train` have distinct prompts each, and may share some.
    """

    warm_up: tuple[Problem, ...]
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def make_splits(
    *, seed: int, warm_up: int = 60, train: int = 6400, held_out: int = 300, digits: int = 5
) -> Splits:
    """Splits of the given sizes, the same for the same arguments.

    Raises ConfigError when there are not that many problems with so many digits.
    """
    # Held-out choices of digits must be few among all, or too little is left to draw from.
    if 2 * held_out > comb(digits + 9, 9) or 4 * max(warm_up, train) > 10**digits:
        raise ConfigError(
            f"digits: {digits} gives too few problems for {held_out} held-out and {max(warm_up, train)} others; "
            "take more digits or fewer problems"
        )
    # Separate generators, so that the size of one split does not change another.
    evaluation = _draw(held_out, digits, f"{seed} held out")
    taken = {_operands(problem) for problem in evaluation}
    return Splits(
        warm_up=_draw(warm_up, digits, f"{seed} warm up", taken),
        train=_draw(train, digits, f"{seed} train", taken),
        held_out=evaluation,
    )


def closeness(completion: str, answer: str) -> float:
    """1 for the digit `answer`, a ninth less for each step away from it; 0 for what is not a single digit.

    A reward between 0 and 1 that tells nearly right from wrong; white space around the completion is ignored.
    """
    text = completion.strip()
    if len(text) != 1 or text not in "0123456789":
        return 0.0
    return 1 - abs(int(text) - int(answer)) / 9


def _draw(count: int, digits: int, seed: str, excluded: Collection[str] = ()) -> tuple[Problem, ...]:
    found: dict[str, Problem] = {}
    for problem in _problems(digits, seed):
        if len(found) == count:
            break
        if _operands(problem) not in excluded:
            found.setdefault(problem.prompt, problem)
    return tuple(found.values())


def _operands(problem: Problem) -> str:
    # The answer does not depend on their order, so a reordered problem is the same one.
    return "".join(sorted(problem.prompt.removeprefix("range ")))


def _problems(digits: int, seed: str) -> Iterator[Problem]:
    generator = random.Random(seed)
    while True:
        number = f"{generator.randrange(10**digits):0{digits}d}"
        yield Problem(prompt=f"range {number}", answer=str(int(max(number)) - int(min(number))))
