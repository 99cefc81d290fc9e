"""One row of a dataset: which columns it may have, and what they say as messages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from algorithms.data import Message
from configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: `id` (`train-7`), `place` for messages (file and line), and its columns as they were read."""

    id: str
    place: str
    columns: Mapping[str, Any]

    def has(self, column: str) -> bool:
        """Whether the column is there and not null, as parquet has it for a column of other rows."""
        return self.columns.get(column) is not None


def check_row(row: Row) -> None:
    """Raises ConfigError naming the row unless it has one kind of prompt, and that is well-formed."""
    kinds = [name for name in ("prompt", "messages") if row.has(name)] or (
        ["instruction"] if row.has("instruction") else []
    )
    if len(kinds) != 1:
        number, names = "both" if kinds else "neither", ", ".join(row.columns)
        raise ConfigError(
            f"{row.place}: a row has `messages`, `prompt` or `instruction`; this one has {number} "
            f"{'of the first two' if kinds else 'of them'} (it has: {names})"
        )
    if kinds == ["instruction"]:
        _check_alpaca(row)
    prompt, completion = row.columns[kinds[0]], row.columns.get("completion")
    turns = '{"role": ..., "content": ...}, both strings, with one at least that is'
    if kinds == ["messages"] and not _is_conversation(prompt, of_user=True):
        raise ConfigError(f"{row.place}: `messages` is a list of {turns} not the assistant's")
    if not isinstance(prompt, str) and not _is_conversation(prompt, of_user=True):
        raise ConfigError(f"{row.place}: `prompt` is a string, or a list of {turns} not the assistant's")
    if not isinstance(completion, str | None) and not _is_conversation(completion, of_user=False):
        raise ConfigError(f"{row.place}: `completion` is a string, or a list of {turns} the assistant's")


def prompt_messages(row: Row, system_prompt: str | None = None) -> list[Message]:
    """The row's `messages`, or what its prompt or instruction says, with a system message where one is given."""
    columns = row.columns
    if row.has("messages"):
        messages: list[Message] = list(columns["messages"])
    elif row.has("prompt") and not isinstance(columns["prompt"], str):
        messages = list(columns["prompt"])
    else:
        messages = [{"role": "user", "content": prompt_text(row)}]
        if not row.has("prompt") and columns.get("system"):
            messages.insert(0, {"role": "system", "content": columns["system"]})
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def answer_messages(row: Row) -> list[Message]:
    """What comes after the prompt, in columns of its own; empty where `messages` say it all, or there is none."""
    answer = row.columns.get("completion")
    if answer is None and not row.has("prompt") and not row.has("messages"):
        answer = row.columns.get("output")
    if answer is None:
        return []
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)


def is_text(row: Row) -> bool:
    """Whether the prompt is a string, which a model without a chat template can go on from."""
    return not row.has("messages") and isinstance(row.columns.get("prompt", ""), str | None)


def prompt_text(row: Row) -> str:
    """The prompt of a row that is_text: alpaca's input is on a line of its own below the instruction."""
    if row.has("prompt"):
        return row.columns["prompt"]
    instruction, more = row.columns["instruction"], row.columns.get("input")
    return f"{instruction}\n{more}" if more else instruction


def question_of(row: Row) -> str:
    """What the user says last."""
    return next(turn["content"] for turn in reversed(prompt_messages(row)) if turn["role"] != "assistant")


def content_of(row: Row) -> str:
    """All its columns as one text, the same for rows of the same content."""
    # Parquet has types that JSON does not.
    return json.dumps(row.columns, sort_keys=True, default=str)


def _check_alpaca(row: Row) -> None:
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(row.columns.get(name), str | None):
            raise ConfigError(f"{row.place}: `{name}` is a string")
    if row.columns.get("history"):
        raise ConfigError(f"{row.place}: `history` is not read; put all turns under `messages`")


def _is_conversation(value: Any, *, of_user: bool) -> bool:
    """Whether it is a list of messages, with one of the user's (or a tool's), or one of the assistant's."""
    turns: list[Any] = cast(list[Any], value) if isinstance(value, list) else []
    roles: list[str] = []
    for turn in turns:
        fields = cast(dict[str, Any], turn) if isinstance(turn, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            return False
        roles.append(fields["role"])
    return any(role not in ("assistant", "system") if of_user else role == "assistant" for role in roles)
