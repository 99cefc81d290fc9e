"""An index of rollouts.jsonl and tokens.jsonl: memory has what is filtered and sorted by, texts stay in files."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.viewer.lines import JsonLines, Line, parse, read_at
from algorithms.content_text import text_of

_SNIPPET = 200
_SEARCHES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One completion, without its texts. `number` counts all completions of the run."""

    number: int
    offset: int
    length: int
    index: int
    finish: str
    tokens: int
    reward: float | None
    parts: Mapping[str, float | None]

    def value(self, function: str) -> float | None:
        """The value of a reward function, None where it has none; the reward for no function."""
        return self.parts.get(function) if function else self.reward


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEntry:
    """The completions of one prompt; `position` counts the groups of the run, `key` names it."""

    position: int
    key: str
    step: int
    split: str
    prompt_id: str
    entries: list[Entry] = field(default_factory=list[Entry])


class RolloutIndex:
    """All completions of a run, in groups, in the order of the file."""

    def __init__(self, directory: Path) -> None:
        self._lines = JsonLines(directory / "rollouts.jsonl")
        self._token_lines = JsonLines(directory / "tokens.jsonl")
        self._records: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
        self._by_key: dict[str, GroupEntry] = {}
        self._in_step: dict[tuple[int, str], int] = {}
        self._searches: dict[str, tuple[int, set[int]]] = {}
        self.groups: list[GroupEntry] = []
        self.entries: list[Entry] = []
        self.functions: dict[str, None] = {}
        self.finishes: dict[str, None] = {}
        self.splits: dict[str, None] = {}
        self.token_steps: dict[int, None] = {}

    @property
    def files(self) -> tuple[JsonLines, JsonLines]:
        """What is read."""
        return self._lines, self._token_lines

    def refresh(self) -> None:
        """Take in what was added to the files."""
        # Tokens are written after the completions that they belong to.
        for line in self._token_lines.new():
            row = line.row
            key = (row["step"], str(row.get("prompt_id")), int(row.get("index", 0)))
            self._records.setdefault(key, []).append((line.offset, line.length))
            self.token_steps[row["step"]] = None
        for line in self._lines.new():
            self._add(line)

    def _add(self, line: Line) -> None:
        row = line.row
        step, split, prompt_id = row["step"], str(row.get("split", "train")), str(row.get("prompt_id", ""))
        group = self.groups[-1] if self.groups else None
        # Rows without an index were written before there was one.
        is_new = group is None or (group.step, group.split, group.prompt_id) != (step, split, prompt_id)
        if group is None or is_new or row.get("index") == 0:
            number = self._in_step.get((step, split), 0)
            self._in_step[step, split] = number + 1
            group = GroupEntry(
                position=len(self.groups),
                key=f"{split}-{step}-{number}",
                step=step,
                split=sys.intern(split),
                prompt_id=prompt_id,
            )
            self.groups.append(group)
            self._by_key[group.key] = group
        parts = {sys.intern(name): value for name, value in (row.get("rewards") or {}).items()}
        finish = sys.intern(str(row.get("finish", "")))
        entry = Entry(
            number=len(self.entries),
            offset=line.offset,
            length=line.length,
            index=len(group.entries),
            finish=finish,
            tokens=int(row.get("tokens", 0)),
            reward=row.get("reward"),
            parts=parts,
        )
        self.entries.append(entry)
        group.entries.append(entry)
        self.functions |= dict.fromkeys(parts)
        self.finishes[finish] = None
        self.splits[group.split] = None

    def is_recorded(self, group: GroupEntry, entry: Entry) -> bool:
        """Whether the tokens of a completion were written."""
        return group.split == "train" and (group.step, group.prompt_id, entry.index) in self._records

    def containing(self, text: str) -> set[int]:
        """Numbers of the completions that contain the text, or whose prompt does, in small or capital letters."""
        text = text.lower()
        done, found = self._searches.pop(text, (0, set[int]()))
        found |= set(self._search(text, done))
        self._searches[text] = len(self.entries), found
        if len(self._searches) > _SEARCHES:
            del self._searches[next(iter(self._searches))]
        return found

    def _search(self, text: str, first: int) -> Iterator[int]:
        if first == len(self.entries):
            return
        # Whether a line may contain it is seen without parsing, as long as it has no letters that JSON escapes.
        needle = json.dumps(text)[1:-1].encode() if text.isascii() else b""
        with self._lines.path.open("rb") as file:
            for entry in self.entries[first:]:
                file.seek(entry.offset)
                line = file.read(entry.length)
                if needle in line.lower() and _contains(parse(line) or {}, text):
                    yield entry.number

    def prompts(self, groups: Sequence[GroupEntry]) -> list[str]:
        """The beginning of each group's last message."""
        places = [(group.entries[0].offset, group.entries[0].length) for group in groups]
        found: list[str] = []
        for row in read_at(self._lines.path, places) if places else []:
            messages = row.get("messages") or [{}]
            found.append(text_of(messages[-1].get("content", ""))[:_SNIPPET])
        return found

    def detail(self, key: str) -> dict[str, Any] | None:
        """A group with its texts, and what was recorded of their tokens; None when there is none of this key."""
        group = self._by_key.get(key)
        if group is None:
            return None
        rows = read_at(self._lines.path, [(entry.offset, entry.length) for entry in group.entries])
        return {
            "key": group.key,
            "step": group.step,
            "split": group.split,
            "prompt_id": group.prompt_id,
            "messages": [
                {"role": str(message.get("role", "")), "content": text_of(message.get("content", ""))}
                for message in rows[0].get("messages") or []
            ],
            "completions": [
                {
                    "index": entry.index,
                    "completion": str(row.get("completion", "")),
                    "finish": entry.finish,
                    "tokens": entry.tokens,
                    "reward": entry.reward,
                    "rewards": entry.parts,
                    "weight_versions": row.get("weight_versions"),
                    "record": self._record(group, entry, row),
                }
                for entry, row in zip(group.entries, rows, strict=True)
            ],
        }

    def _record(
        self, group: GroupEntry, entry: Entry, completion: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        if not self.is_recorded(group, entry):
            return None
        places = self._records[group.step, group.prompt_id, entry.index]
        records = read_at(self._token_lines.path, places)
        # A prompt may come twice in a step: whose tokens these are is told by their number and text.
        text = str(completion.get("completion", "")).strip()
        same = [each for each in records if len(each["tokens"]) == entry.tokens]
        of_text = [each for each in same if text in "".join(each["tokens"])]
        record = (of_text or same or records)[0]
        names = ("advantage", "tokens", "logprobs", "trainer_logprobs", "updated_logprobs")
        return {name: record.get(name) for name in names}


def _contains(row: Mapping[str, Any], text: str) -> bool:
    texts = [
        row.get("completion", ""),
        *(message.get("content", "") for message in row.get("messages") or []),
    ]
    return any(text in str(each).lower() for each in texts)
