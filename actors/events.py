"""What happens in a run besides its steps: one line of events.jsonl each."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from configs.errors import naming


class Event(Protocol):
    """Who is told of an event."""

    def __call__(self, step: int | None, kind: str, text: str, **details: object) -> None:
        """`kind` is a word to sort by, `text` is for a person. A step of None is the one under way."""
        ...


def unheard(step: int | None, kind: str, text: str, **details: object) -> None:
    """For parts that nobody listens to."""


class EventLog:
    """events.jsonl. Opened for every line: there are few, and some come after the run's other files are closed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> None:
        """Replace what an earlier run left."""
        self._path.write_text("")

    def write(self, step: int, kind: str, text: str, **details: object) -> None:
        """Add a line with the time in UTC."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"time": now, "step": step, "kind": kind, "text": text, **details}
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
