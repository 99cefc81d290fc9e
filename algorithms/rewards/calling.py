"""One call of a reward: its arguments by name, and what it gave as verdicts."""

import contextlib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from algorithms.data import Group, Span, Verdict
from algorithms.rewards.loading import Reward, error_line
from configs.errors import BasculeError


class RewardError(BasculeError):
    """A reward raised, hung, or gave no number. Names the reward, the sample and what happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of one reward, of the completions `indices` of a group; per completion that is one.

    `first` is added to them in messages: the group may be a part of the prompt's.
    """

    reward: str
    prompt: str
    indices: tuple[int, ...]
    timeout_s: float
    first: int = 0

    def __str__(self) -> str:
        place = f", completion {self.indices[0] + self.first}" if len(self.indices) == 1 else ""
        return f"reward {self.reward}: prompt {self.prompt}{place}"

    def too_late(self) -> str:
        """Message for a call that did not end in time."""
        return (
            f"{self}: no answer within {self.timeout_s:g} s; make the function faster or raise its timeout_s"
        )


def calls_of(reward: Reward, group: Group, indices: Sequence[int], first: int = 0) -> list[Call]:
    """The calls that give the reward of these completions; a batch or a group is one call of all of them."""
    parts = [(index,) for index in indices] if reward.signature.style == "sample" else [tuple(indices)]
    timeout_s = reward.config.timeout_s
    common = {"reward": reward.name, "prompt": group.prompt.id}
    return [Call(**common, indices=part, timeout_s=timeout_s, first=first) for part in parts]


class Prepared:
    """A call that is ready to be made: `function(**arguments)`, and then `verdicts` of what it gave."""

    def __init__(self, reward: Reward, group: Group, call: Call) -> None:
        """Raises RewardError when a column is missing that the function asks for."""
        self._reward, self._call = reward, call
        # What a function logs, by name: values for all completions, or one for each.
        self._logged: dict[str, Sequence[object]] = {}
        match reward.signature.style:
            case "sample":
                offered = _of_sample(group, call.indices[0])
            case "batch":
                offered = self._of_batch(group)
            case "group":
                offered = {**group.prompt.columns, "group": group}
            case "turn" | "episode":
                raise AssertionError("styles of environments")
        self.arguments = _chosen(offered, reward, call)

    def verdicts(self, result: object, seconds: float) -> list[Verdict]:
        """One for each completion of the call. Raises RewardError for what is no reward."""
        call, count = self._call, len(self._call.indices)
        if self._reward.signature.style == "sample":
            return [replace(read_verdict(result, str(call)), seconds=seconds)]
        if isinstance(result, np.ndarray) or hasattr(result, "tolist"):
            # Tensors as well, without knowing of them.
            result = cast(Any, result).tolist()
        values = _sequence(result)
        if values is None:
            raise RewardError(f"{call}: gave {shown(result)}; it is called with lists and has to give a list")
        if len(values) != count:
            raise RewardError(f"{call}: gave {len(values)} values for {count} completions")
        found: list[Verdict] = []
        for place, (index, value) in enumerate(zip(call.indices, values, strict=True)):
            verdict = read_verdict(value, f"reward {call.reward}: prompt {call.prompt}, completion {index}")
            found.append(replace(self._with_logged(verdict, place), seconds=seconds))
        return found

    def _of_batch(self, group: Group) -> dict[str, Any]:
        prompt, rollouts = group.prompt, [group.rollouts[index] for index in self._call.indices]
        count, columns = len(rollouts), prompt.columns
        texts: list[Any] = [rollout.text for rollout in rollouts]
        messages = [dict(message) for message in prompt.messages]
        replies = [[dict(turn) for turn in rollout.conversation] for rollout in rollouts]
        talks = _is_conversation(columns)
        tokens = [rollout.tokens.tolist() for rollout in rollouts]
        # ms-swift's classes find the reply at the end of `messages`.
        histories = [messages + reply if self._reward.of_class else messages for reply in replies]
        return {
            **{name: [value] * count for name, value in columns.items()},
            "completions": replies if takes_messages(self._reward, columns) else texts,
            "turns": replies,
            "prompts": [messages if talks else prompt.text] * count,
            "messages": histories,
            "completion_ids": tokens,
            "response_token_ids": tokens,
            "finish_reason": [rollout.finish for rollout in rollouts],
            "is_truncated": [rollout.finish == "length" for rollout in rollouts],
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }

    def _log_extra(self, column: str, values: Sequence[object]) -> None:
        if len(values) != len(self._call.indices):
            raise ValueError(f"log_extra({column!r}): {len(values)} values for {len(self._call.indices)}")
        self._logged[column] = values

    def _log_metric(self, name: str, value: float) -> None:
        self._logged[name] = [float(value)] * len(self._call.indices)

    def _with_logged(self, verdict: Verdict, place: int) -> Verdict:
        parts, notes = dict(verdict.parts), dict(verdict.notes)
        for name, values in self._logged.items():
            number = _number(values[place])
            if number is None or math.isnan(number):
                notes[name] = str(values[place])
            else:
                parts[name] = number
        return replace(verdict, parts=parts, notes=notes)


def failure(reward: Reward, call: Call, error: BaseException) -> str:
    """What to say of a call that raised: the exception and the line of the user's file."""
    return f"{call}: {type(error).__name__}: {error} ({error_line(error, reward.path)})"


def takes_messages(reward: Reward, columns: Mapping[str, Any]) -> bool:
    """Whether a batch function is given its completions as lists of one message, and not as texts."""
    if reward.config.completions_as != "auto":
        return reward.config.completions_as == "messages"
    if reward.of_class:
        return False
    annotations: dict[str, Any] = getattr(reward.function, "__annotations__", {})
    if "completions" in annotations:
        # A text when the file has `from __future__ import annotations`.
        return "dict" in str(annotations["completions"]).lower()
    return _is_conversation(columns)


def read_verdict(value: object, place: str) -> Verdict:
    """What one completion was given: a number, None, or a mapping with `score` and more.

    Of a mapping `spans` are (start, end, value) of sampled tokens, numbers are parts and texts are notes. Raises
    RewardError naming `place` for anything else, NaN and infinity included.
    """
    if not isinstance(value, Mapping):
        return Verdict(value=_check_number(value, place))
    given = cast(Mapping[object, object], value)
    entries = {str(name): each for name, each in given.items()}
    if "score" not in entries:
        raise RewardError(f"{place}: gave {shown(entries)}; a dict has to have `score`, a number or None")
    score = _check_number(entries.pop("score"), place)
    spans = tuple(_spans(entries.pop("spans", ()), place))
    notes = {name: each for name, each in entries.items() if isinstance(each, str)}
    parts = {
        name: _check_number(each, f"{place}, {name}") for name, each in entries.items() if name not in notes
    }
    return Verdict(value=score, parts=parts, notes=notes, spans=spans)


def _spans(value: object, place: str) -> list[Span]:
    what = "`spans` is a list of (start, end, value), token numbers and a number"
    entries = _sequence(value)
    if entries is None:
        raise RewardError(f"{place}: gave spans {shown(value)}; {what}")
    found: list[Span] = []
    for each in entries:
        entry = _sequence(each) or ()
        if len(entry) != 3 or not all(isinstance(edge, numbers.Integral) for edge in entry[:2]):
            raise RewardError(f"{place}: gave the span {shown(each)}; {what}")
        number = _check_number(entry[2], f"{place}, span {entry[0]} to {entry[1]}")
        if number is not None:
            found.append(Span(start=int(entry[0]), end=int(entry[1]), value=number))
    return found


def _sequence(value: object) -> Sequence[Any] | None:
    return cast(Sequence[Any], value) if isinstance(value, list | tuple) else None


def _of_sample(group: Group, index: int) -> dict[str, Any]:
    prompt, rollout = group.prompt, group.rollouts[index]
    columns = prompt.columns
    return {
        **columns,
        "completion": rollout.text,
        "turns": [dict(turn) for turn in rollout.conversation],
        "prompt": prompt.text,
        "messages": [dict(message) for message in prompt.messages],
        "tokens": rollout.tokens,
        "finish": rollout.finish,
    }


def _chosen(offered: Mapping[str, Any], reward: Reward, call: Call) -> dict[str, Any]:
    """What the function asks for by name; with `**kwargs` the columns too, of a batch all, as in TRL."""
    signature = reward.signature
    for name in signature.needs:
        if name not in offered:
            raise RewardError(f"{call}: the function asks for {name!r}, which this row of the dataset lacks")
    wanted = {*signature.needs, *signature.takes}
    if signature.takes_all:
        of_call = () if signature.style == "batch" else signature.arguments
        wanted |= {name for name in offered if name not in of_call}
    return {name: value for name, value in offered.items() if name in wanted} | dict(reward.kwargs)


def _is_conversation(columns: Mapping[str, Any]) -> bool:
    """TRL's rule: whether the prompt is a list of messages and not a text."""
    return columns.get("messages") is not None or not isinstance(columns.get("prompt", ""), str)


def _number(value: object) -> float | None:
    """The value as a float, NaN for what is not finite; None for what is no number."""
    if not isinstance(value, numbers.Real) and type(value) is not np.bool_:
        return None
    with contextlib.suppress(OverflowError):
        number = float(cast(float, value))
        return number if math.isfinite(number) else math.nan
    return math.nan


def _check_number(value: object, place: str) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or math.isnan(number):
        raise RewardError(f"{place}: gave {shown(value)}; a reward is a finite number, a bool, or None")
    return number


def shown(value: object) -> str:
    """The value as code, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
