"""Rows of dataset files: JSONL, JSON, parquet, and what `Dataset.save_to_disk` of Hugging Face has written."""

import importlib
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from configs.errors import ConfigError

FORMS = "JSONL, JSON, parquet, or a directory of Dataset.save_to_disk"
_MESSAGES = ("messages", "prompt", "completion")
_BATCH_ROWS = 1000


def read_file(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Every row, one after the other: its number from 1 (its line, in JSONL), its place for messages, its columns.

    What the path ends in says how it is read; JSONL is what has no other ending. Nothing is held in memory but
    the rows around the one that is read, and a whole `.json` list. Raises ConfigError naming file and row.
    """
    if path.is_dir():
        found = _read_saved(path)
    elif path.suffix == ".parquet":
        found = _read_parquet(path)
    elif path.suffix == ".json" and _starts_a_list(path):
        found = _read_list(path)
    else:
        found = ((number, f"{path}:{number}", row) for number, row in _read_lines(path))
    for number, place, row in found:
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: a row is a JSON object with `messages`, `prompt` or `instruction`")
        yield number, place, cast(dict[str, Any], row)


@contextmanager
def _naming(path: Path) -> Generator[None]:
    try:
        yield
    except ConfigError:
        raise
    # pyarrow's own errors are ValueErrors, and so are those of wrong UTF-8.
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(
            f"{path}: this dataset cannot be read: {reason}; give {FORMS}, or reasoning_gym:NAME"
        ) from None


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _naming(path):
        stream = path.open(encoding="utf-8", newline="\n")
    with stream, _naming(path):
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _parse(line, f"{path}:{number}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ConfigError(f"{place}: not valid JSON: {error.msg} at {line}column {error.colno}") from None


def _starts_a_list(path: Path) -> bool:
    """Many a JSONL file is called .json."""
    with _naming(path), path.open(encoding="utf-8") as stream:
        return next((line.lstrip().startswith("[") for line in stream if line.strip()), False)


def _read_list(path: Path) -> Iterator[tuple[int, str, Any]]:
    with _naming(path):
        text = path.read_text(encoding="utf-8")
    rows: list[Any] = _parse(text, str(path))
    for number, row in enumerate(rows, 1):
        yield number, f"{path} row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[int, str, Any]]:
    # Has no types, and takes half a second that most datasets do not need.
    parquet: Any = importlib.import_module("pyarrow.parquet")
    with _naming(path):
        file = parquet.ParquetFile(path)
    with file:
        yield from _rows(path, file.iter_batches(batch_size=_BATCH_ROWS))


def _read_saved(path: Path) -> Iterator[tuple[int, str, Any]]:
    splits, state = path / "dataset_dict.json", path / "state.json"
    with _naming(path):
        if splits.is_file():
            names: list[str] = json.loads(splits.read_text())["splits"]
            choices = ", ".join(str(path / name) for name in names)
            raise ConfigError(f"{path}: holds several splits; give one of them: {choices}")
        if not state.is_file():
            raise ConfigError(
                f"{path}: is a directory without state.json, so Dataset.save_to_disk has not written it; "
                f"give {FORMS}, or reasoning_gym:NAME"
            )
        files: list[dict[str, str]] = json.loads(state.read_text())["_data_files"]
    yield from _rows(path, _batches(path, [path / file["filename"] for file in files]))


def _batches(path: Path, files: Iterable[Path]) -> Iterator[Any]:
    arrow: Any = importlib.import_module("pyarrow")
    for file in files:
        with _naming(file), arrow.memory_map(str(file)) as source:
            yield from arrow.ipc.open_stream(source)


def _rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[int, str, Any]]:
    number = 0
    with _naming(path):
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, f"{path} row {number}", {key: _without_none(key, row[key]) for key in row}


def _without_none(key: str, value: Any) -> Any:
    """Messages without fields that only other messages have: in arrow every one has the fields of all."""
    if key not in _MESSAGES or not isinstance(value, list):
        return value
    return [
        {name: field for name, field in cast(dict[str, Any], turn).items() if field is not None}
        if isinstance(turn, dict)
        else turn
        for turn in cast(list[Any], value)
    ]
