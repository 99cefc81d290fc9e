"""Which completions are shown, and in which order. assets/written.js does the same in a written file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from actors.viewer.rollouts import Entry, GroupEntry, RolloutIndex
from configs.errors import ConfigError

Sort = Literal["newest", "oldest", "highest", "lowest", "spread", "longest", "shortest"]
PAGE = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A filter and an order; empty strings and None leave everything in.

    `function` is the reward function that `low`, `high` and the order are about, the reward itself when empty.
    """

    split: str = ""
    first_step: float | None = None
    last_step: float | None = None
    function: str = ""
    low: float | None = None
    high: float | None = None
    finish: str = ""
    text: str = ""
    recorded: bool = False
    sort: Sort = "newest"

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "Query":
        """From the parameters of a request. Raises ConfigError naming the one that is wrong."""
        text = parameters.get("sort", "newest")
        sort = next((each for each in get_args(Sort) if each == text), None)
        if sort is None:
            raise ConfigError(f"sort: {text!r} is none of {', '.join(get_args(Sort))}")
        return cls(
            split=parameters.get("split", ""),
            first_step=_number(parameters, "first_step"),
            last_step=_number(parameters, "last_step"),
            function=parameters.get("function", ""),
            low=_number(parameters, "low"),
            high=_number(parameters, "high"),
            finish=parameters.get("finish", ""),
            text=parameters.get("text", ""),
            recorded=parameters.get("recorded", "") == "true",
            sort=sort,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """A group, and those of its completions that were asked for."""

    group: GroupEntry
    entries: tuple[Entry, ...]


def select(index: RolloutIndex, query: Query) -> list[Match]:
    """Groups with a completion that was asked for, in the order that was asked for."""
    having = index.containing(query.text) if query.text else None
    found: list[Match] = []
    for group in index.groups:
        if query.split and group.split != query.split:
            continue
        if not _within(group.step, query.first_step, query.last_step):
            continue
        entries = tuple(
            entry
            for entry in group.entries
            if (having is None or entry.number in having)
            and (not query.finish or entry.finish == query.finish)
            and _has_value(entry, query)
            and (not query.recorded or index.is_recorded(group, entry))
        )
        if entries:
            found.append(Match(group=group, entries=entries))
    if query.sort == "oldest":
        return found
    # Ties stay in the order of steps, the newest first.
    found.sort(key=lambda match: (-match.group.step, match.group.position))
    if query.sort != "newest":
        found.sort(key=lambda match: _rank(match, query))
    return found


def summaries(index: RolloutIndex, matches: Sequence[Match], query: Query) -> list[dict[str, Any]]:
    """What a list shows of each."""
    prompts = index.prompts([match.group for match in matches])
    return [
        {
            "key": match.group.key,
            "step": match.group.step,
            "split": match.group.split,
            "prompt_id": match.group.prompt_id,
            "prompt": prompt,
            "values": [entry.value(query.function) for entry in match.group.entries],
            "matching": [entry.index for entry in match.entries],
            "mean": _mean(_values(match, query)),
            "tokens": _mean([entry.tokens for entry in match.entries]),
            "recorded": any(index.is_recorded(match.group, entry) for entry in match.entries),
        }
        for match, prompt in zip(matches, prompts, strict=True)
    ]


def _number(parameters: Mapping[str, str], name: str) -> float | None:
    text = parameters.get(name, "")
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and math.isnan(value):
        raise ConfigError(f"{name}: {text!r} is not a number")
    return value


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _has_value(entry: Entry, query: Query) -> bool:
    """Without a function and a range, completions without a reward are asked for as well."""
    if not query.function and query.low is None and query.high is None:
        return True
    value = entry.value(query.function)
    return value is not None and _within(value, query.low, query.high)


def _values(match: Match, query: Query) -> list[float]:
    values = [entry.value(query.function) for entry in match.entries]
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rank(match: Match, query: Query) -> float:
    """A number to sort by, the lowest first; groups without any value are last."""
    values, lengths = _values(match, query), [entry.tokens for entry in match.entries]
    if query.sort == "longest":
        return -max(lengths)
    if query.sort == "shortest":
        return min(lengths)
    mean = _mean(values)
    if mean is None:
        return math.inf
    match query.sort:
        case "highest":
            return -mean
        case "lowest":
            return mean
        case _:
            return -sum((value - mean) ** 2 for value in values) / len(values)
