"""Rewards that compare text: with an answer, or with a pattern."""

import re

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def exact_match(completion: str, answer: object) -> float:
    """1 if the completion is the answer, white space around both aside, else 0."""
    return float(completion.strip() == str(answer).strip())


def regex(
    completion: str, pattern: str, *, compare: bool = False, ignore_case: bool = False, answer: object = None
) -> float:
    """1 if the regular expression `pattern` is found in the completion, else 0.

    With `compare` its last match has to be the answer: its first group if it has one, else all of it, white
    space around both aside. Raises ValueError for `compare` without an answer.
    """
    if compare and answer is None:
        raise ValueError("regex with `compare` needs a column `answer`")
    flags = re.IGNORECASE if ignore_case else 0
    if not compare:
        return float(re.search(pattern, completion, flags) is not None)
    matches = list(re.finditer(pattern, completion, flags))
    if not matches:
        return 0.0
    last = matches[-1]
    found = last[1] if last.re.groups else last[0]
    mine, wanted = (found or "").strip(), str(answer).strip()
    return float(mine.casefold() == wanted.casefold() if ignore_case else mine == wanted)


def format_match(completion: str, pattern: str) -> float:
    """1 if the regular expression `pattern` matches the whole completion, else 0."""
    return float(re.fullmatch(pattern, completion) is not None)


def think_format(completion: str, *, open_in_prompt: bool = False) -> float:
    """1 for one <think>...</think> at the start with something after it, both not blank; else 0.

    With `open_in_prompt` the chat template has written `<think>` already, and it is left out here.
    """
    text = f"<think>{completion}" if open_in_prompt else completion
    match = _THOUGHT.fullmatch(text)
    if match is None or not match[1].strip() or not match[2].strip():
        return 0.0
    return float(text.count("<think>") == 1 and text.count("</think>") == 1)
