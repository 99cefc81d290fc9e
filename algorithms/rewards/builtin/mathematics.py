"""Rewards for answers that are numbers or formulas."""

import functools
import importlib
import logging
import math
import re
from typing import Any

# A sign that follows a digit, a letter or a bracket is an operator.
_QUANTITY = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?\$?(?P<top>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?!\d))?(?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?\s?(?P<percent>\\?%)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+(?:\.\d+)?)\s*\}\s*\{\s*(\d+(?:\.\d+)?)\s*\}")
# Longer ones cost sympy seconds, and are no answers.
_LONGEST_FORMULA = 1000


def numeric(completion: str, answer: object, *, rel_tol: float = 1e-6, abs_tol: float = 1e-9) -> float | None:
    """1 if the completion's number is the answer's within either tolerance, else 0.

    The number is the last one in the last \\boxed{}, else the first after the last `####`, else the last of all.
    `1,234.5`, `-3`, `2e5`, `3/4`, \\frac{3}{4}, `$5` and `50%` are numbers; a percentage is both 0.5 and 50, so
    that it does not matter which of the two sides has the sign. None if the answer has no number.
    """
    wanted = _numbers(str(answer))
    if not wanted:
        return None
    close = (
        math.isclose(mine, each, rel_tol=rel_tol, abs_tol=abs_tol)
        for mine in _numbers(completion)
        for each in wanted
    )
    return float(any(close))


def math_boxed(completion: str, answer: object) -> float | None:
    """1 if the formula in the last \\boxed{} equals the answer as math-verify sees it, else 0.

    The answer is LaTeX or plain text, boxed or not, dollars around it or not; where it has a `####`, what is
    after that. None if nothing can be read from the answer.
    """
    text = str(answer).rpartition("####")[2]
    boxed_answer = last_boxed(text)
    wanted = _parse(boxed_answer if boxed_answer is not None else text.strip().strip("$").strip())
    if not wanted:
        return None
    mine = last_boxed(completion)
    if mine is None:
        return 0.0
    found = _parse(mine)
    return float(bool(found) and bool(_math_verify().verify(wanted, found, timeout_seconds=None)))


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{} or \\fbox{} with matching brackets holds, or None."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)][-20:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[start : start + brace.start()]
    return None


def _numbers(text: str) -> tuple[float, ...]:
    """What the number that counts in `text` may be: none, one, or two readings of a percentage."""
    boxed = last_boxed(text)
    part = boxed if boxed is not None else text
    first = boxed is None and "####" in part
    part = part.rpartition("####")[2].replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    part = _FRACTION.sub(r"\1/\2", part)
    found = list(_QUANTITY.finditer(part))
    return _values(found[0 if first else -1]) if found else ()


def _values(found: re.Match[str]) -> tuple[float, ...]:
    value = float(found["top"].replace(",", ""))
    if found["power"]:
        value = float(f"{value}e{int(found['power'])}") if math.isfinite(value) else value
    if found["bottom"]:
        below = float(found["bottom"])
        value = value / below if below else math.nan
    if found["sign"] in ("-", "\u2212"):
        value = -value
    if not math.isfinite(value):
        return ()
    return (value / 100, value) if found["percent"] else (value,)


def _parse(formula: str) -> list[Any]:
    if len(formula) > _LONGEST_FORMULA:
        return []
    library = _math_verify()
    targets = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]
    # Without its own timeouts, which take SIGALRM: calls that hang are ended from outside.
    return library.parse(f"\\boxed{{{formula}}}", targets, parsing_timeout=None)


@functools.lru_cache(maxsize=1)
def _math_verify() -> Any:
    # It warns of every process that turns its timeouts off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return importlib.import_module("math_verify")
