"""rollouts.jsonl: a row for each completion, from which its group can be made again and scored once more."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from algorithms.content_text import without_files
from algorithms.data import Group, Prompt, Rollout, Scored, Verdict, float_row, int_row, jsonable
from configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredGroup:
    """Completions of a prompt as a run recorded them, without their log-probabilities."""

    step: int
    split: str
    group: Group
    rewards: tuple[float | None, ...]
    """The whole reward of each completion."""
    parts: Mapping[str, tuple[float | None, ...]]
    """What each reward said, by its name."""


def stored_row(step: int, split: str, scored: Scored, index: int) -> dict[str, Any]:
    """The row of completion `index`. Columns that JSON does not have are written as text, and of
    pictures that are in the row only how large they are."""
    prompt, rollout = scored.group.prompt, scored.group.rollouts[index]
    messages = [without_files(message) for message in prompt.messages]
    # A conversation is in the row anyway.
    columns = {name: value for name, value in prompt.columns.items() if name != "messages"}
    reward = float(scored.rewards[index])
    verdicts = {name: said[index] for name, said in scored.verdicts.items()}
    row: dict[str, Any] = {
        "step": step,
        "split": split,
        "prompt_id": prompt.id,
        "index": index,
        "messages": messages,
        "completion": rollout.text,
        "finish": rollout.finish,
        "tokens": rollout.tokens.size,
        "token_ids": rollout.tokens.tolist(),
        "reward": None if math.isnan(reward) else reward,
        "rewards": {name: values[index] for name, values in scored.parts.items()},
        "reward_sources": {name: digest[:12] for name, digest in scored.sources.items()},
        "weight_versions": rollout.versions,
        "columns": jsonable(without_files(columns)),
    }
    if rollout.turns:
        row |= {"turns": [dict(turn) for turn in rollout.turns], "loss_mask": rollout.loss_mask.tolist()}
    return row | {name: values for name, values in _said(verdicts).items() if values}


def _said(verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, Any]]:
    """By reward: further numbers and texts it gave, why it failed, and the seconds it took."""
    return {
        "reward_parts": {name: dict(each.parts) for name, each in verdicts.items() if each.parts},
        "reward_notes": {name: dict(each.notes) for name, each in verdicts.items() if each.notes},
        "reward_errors": {name: each.error for name, each in verdicts.items() if each.error is not None},
        "reward_seconds": {name: round(each.seconds, 6) for name, each in verdicts.items()},
    }


def read_rollouts(path: Path) -> Iterator[StoredGroup]:
    """The groups of a rollouts.jsonl, in its order.

    A last line that is not yet whole is left out. Raises ConfigError naming the line that is no row, or a file
    of a version that did not write columns and tokens.
    """
    rows: list[dict[str, Any]] = []
    for row in _rows(path):
        if rows and not _is_of_group(row, rows):
            yield _group_of(rows)
            rows = []
        rows.append(row)
    if rows:
        yield _group_of(rows)


def _is_of_group(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    same = all(row[name] == rows[0][name] for name in ("step", "split", "prompt_id"))
    # A prompt may be drawn twice in a step; each time its completions are numbered from 0.
    return same and row["index"] == len(rows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                yield _row(line, f"{path} line {number}")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: is no JSON: {error}") from None
    needed = (
        "step",
        "split",
        "prompt_id",
        "index",
        "messages",
        "completion",
        "finish",
        "token_ids",
        "columns",
    )
    missing = [name for name in needed if not isinstance(row, dict) or name not in row]
    if missing:
        raise ConfigError(
            f"{place}: has no {', '.join(missing)}; rollouts of runs before rewards could be tried again lack them"
        )
    return cast(dict[str, Any], row)


def _group_of(rows: Sequence[Mapping[str, Any]]) -> StoredGroup:
    first = rows[0]
    columns: dict[str, Any] = dict(first["columns"])
    if "prompt" not in columns and "instruction" not in columns:
        columns["messages"] = first["messages"]
    prompt = Prompt(
        id=first["prompt_id"], tokens=int_row([]), messages=tuple(first["messages"]), columns=columns
    )
    names = dict.fromkeys(name for row in rows for name in row.get("rewards", {}))
    return StoredGroup(
        step=first["step"],
        split=first["split"],
        group=Group(prompt=prompt, rollouts=tuple(map(_rollout_of, rows))),
        rewards=tuple(row.get("reward") for row in rows),
        parts={name: tuple(row.get("rewards", {}).get(name) for row in rows) for name in names},
    )


def _rollout_of(row: Mapping[str, Any]) -> Rollout:
    tokens = int_row(row["token_ids"])
    oldest, newest = row.get("weight_versions", (0, 0))
    return Rollout(
        tokens=tokens,
        logprobs=float_row(np.zeros(tokens.size)),
        text=row["completion"],
        finish=row["finish"],
        loss_mask=int_row(row.get("loss_mask", np.ones(tokens.size))),
        versions=(oldest, newest),
        turns=tuple(row.get("turns", ())),
    )
