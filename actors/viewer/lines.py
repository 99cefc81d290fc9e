"""A JSONL file that somebody else still writes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Enough of a file's first line to tell it from the one that replaces it.
_HEAD = 256
# json.loads would make a decoder for every line.
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One row, and where it is in its file: `length` bytes from `offset`."""

    offset: int
    length: int
    row: Mapping[str, Any]


class JsonLines:
    """The complete lines of a file, each read once. A file that is not there (yet) has none.

    `unreadable` counts complete lines that hold no object with a `step`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0
        self._offset = 0
        self._head = b""

    def is_replaced(self) -> bool:
        """Whether the lines that were read are no longer what the file begins with."""
        if not self._offset:
            return False
        try:
            with self.path.open("rb") as file:
                head = file.read(len(self._head))
                return head != self._head or file.seek(0, 2) < self._offset
        except FileNotFoundError:
            return True

    def new(self) -> Iterator[Line]:
        """Lines that were not there the last time; a last one without its end is left for the next time."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                if not self._offset:
                    self._head = line[:_HEAD]
                offset, self._offset = self._offset, self._offset + len(line)
                row = parse(line)
                if row is None:
                    self.unreadable += 1
                else:
                    yield Line(offset=offset, length=len(line), row=row)


def read_at(path: Path, places: list[tuple[int, int]]) -> list[Mapping[str, Any]]:
    """The rows at these offsets, with these lengths. Lines of JsonLines are rows."""
    rows: list[Mapping[str, Any]] = []
    with path.open("rb") as file:
        for offset, length in places:
            file.seek(offset)
            row = parse(file.read(length))
            rows.append({} if row is None else row)
    return rows


def parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line, if it is one that has a step; NaN and infinity, which JSON does not have, are None."""
    try:
        row = _DECODER.decode(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
