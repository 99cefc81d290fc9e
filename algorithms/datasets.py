"""The rows of a run: of several datasets, a number of rows of each, some of them held out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from algorithms.dataset_files import read_file
from algorithms.generated import EVAL_SEED_DISTANCE, GENERATED, generate
from algorithms.rows import Row, check_row, content_of, question_of
from configs.data import DataConfig
from configs.errors import ConfigError

Split = Literal["train", "eval"]
EVAL_DRAWS_PER_ROW = 4
_SAMPLED = re.compile(r"(.+)#(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One name of data.dataset: what it says, its position, the dataset, and how many rows to draw of it."""

    text: str
    number: int
    name: str
    rows: int | None

    @property
    def is_generated(self) -> bool:
        """Whether rows are made up instead of read."""
        return self.name.startswith(GENERATED)


def sources_of(names: Sequence[str]) -> list[Source]:
    """What `NAME` or `NAME#500` stand for. Raises ConfigError for `#0`."""
    sources: list[Source] = []
    for number, text in enumerate(names):
        match = _SAMPLED.fullmatch(text)
        rows = None if match is None else int(match[2])
        if rows == 0:
            raise ConfigError(f"data.dataset: {text} draws no rows; leave it out, or give a number above 0")
        sources.append(Source(text=text, number=number, name=text if match is None else match[1], rows=rows))
    return sources


def read_rows(data: DataConfig, split: Split, seed: int = 42) -> list[Row]:
    """Rows of a split, one dataset after the other, numbered from 1 in each (in JSONL: its lines).

    Rows to evaluate on come from `data.eval_dataset`, else with `data.split_dataset_ratio` from the rows that
    are then not trained on, else a generated dataset makes others, with another seed than `seed` and none of
    its training questions, and a file has none. `NAME#n` draws without replacement, and in whole passes where
    there are fewer rows. The same arguments give the same rows. Raises ConfigError for a dataset that is
    missing, malformed or empty.
    """
    if data.split_dataset_ratio:
        return read_splits(data, seed)[0 if split == "train" else 1]
    sources = sources_of(data.dataset)
    if split == "train":
        return [
            row for source in sources for row in _draw(_all_rows(source, "train", data, seed), source, seed)
        ]
    if data.eval_dataset:
        return _evaluation_rows(sources_of(data.eval_dataset), data, seed)
    return _evaluation_rows([source for source in sources if source.is_generated], data, seed)


def read_splits(data: DataConfig, seed: int = 42) -> tuple[list[Row], list[Row]]:
    """The rows of both splits, as read_rows has them; datasets that are split themselves are read once."""
    if not data.split_dataset_ratio:
        return read_rows(data, "train", seed), read_rows(data, "eval", seed)
    pairs = [_split(source, data, seed) for source in sources_of(data.dataset)]
    return [row for kept, _ in pairs for row in kept], [row for _, held in pairs for row in held]


def stream_rows(data: DataConfig, seed: int = 42) -> Iterator[Row]:
    """Rows to train on, read as they are asked for: one of each dataset in turns, as long as it has any.

    Numbers are those of read_rows. Raises ConfigError as it does, for a malformed row when it is that row's
    turn, and for `NAME#n`.
    """
    sources = sources_of(data.dataset)
    for source in sources:
        if source.rows is not None:
            raise ConfigError(
                f"data.dataset: {source.text} draws among all rows of a dataset, which data.streaming does not "
                f"read; give {source.name}"
            )
    turns = zip_longest(*(_read_some(source, data, seed) for source in sources))
    return (row for turn in turns for row in turn if row is not None)


def _read_some(source: Source, data: DataConfig, seed: int) -> Iterator[Row]:
    rows = _read(source, "train", data, seed)
    first = next(rows, None)
    if first is None:
        raise _empty(source)
    yield first
    yield from rows


def _evaluation_rows(sources: Sequence[Source], data: DataConfig, seed: int) -> list[Row]:
    found = [
        _generate_held_out(source, data, seed)
        if source.is_generated
        else _draw(_all_rows(source, "eval", data, seed), source, seed)
        for source in sources
    ]
    # In turns, so that each is among the first ones.
    mixed = [row for turn in zip_longest(*found) for row in turn if row is not None]
    return mixed[: data.eval_size]


def _all_rows(source: Source, split: Split, data: DataConfig, seed: int) -> list[Row]:
    rows = list(_read(source, split, data, seed))
    if not rows:
        raise _empty(source)
    return rows


def _empty(source: Source) -> ConfigError:
    return ConfigError(f"{source.name}: there are no rows in it")


def _read(source: Source, split: Split, data: DataConfig, seed: int) -> Iterator[Row]:
    if source.is_generated:
        size = source.rows or data.dataset_size
        if split == "eval":
            size = data.eval_size * EVAL_DRAWS_PER_ROW
        entries = generate(source.name.removeprefix(GENERATED), size, data.dataset_kwargs, seed)
        found = ((number, f"{source.name} row {number}", entry) for number, entry in enumerate(entries, 1))
    else:
        found = read_file(Path(source.name))
    which = f"{split}-{source.number}" if source.number else split
    for number, place, columns in found:
        row = Row(id=f"{which}-{number}", place=place, columns=columns)
        check_row(row)
        yield row


def _draw(rows: list[Row], source: Source, seed: int, held_out: int = 0) -> list[Row]:
    """As many as the source asks for, less `held_out`: some rows once, or all several times and some once more."""
    if source.rows is None or source.is_generated:
        return rows
    passes, rest = divmod(max(1, source.rows - held_out), len(rows))
    # An id tells which prompt a line of rollouts.jsonl is of, so a row that comes again gets another.
    drawn = [row if again == 0 else _again(row, again) for again in range(passes) for row in rows]
    picked = _order(len(rows), (seed, source.number))[:rest]
    return [*drawn, *(_again(rows[index], passes) for index in sorted(picked))]


def _again(row: Row, number: int) -> Row:
    return replace(row, id=f"{row.id}+{number}") if number else row


def _split(source: Source, data: DataConfig, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out. Rows of the same content are on the same side."""
    rows = _all_rows(source, "train", data, seed)
    same: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        same.setdefault(content_of(row), []).append(index)
    size = len(rows) if source.rows is None else source.rows
    wanted = max(1, round(min(size, len(rows)) * data.split_dataset_ratio))
    held: set[int] = set()
    contents = list(same.values())
    for index in _order(len(contents), (seed, source.number, 1)):
        if len(held) + len(contents[index]) <= wanted:
            held.update(contents[index])
    kept = [row for index, row in enumerate(rows) if index not in held]
    if not held or not kept:
        raise ConfigError(
            f"data.split_dataset_ratio: {len(rows)} rows of {source.name}, {len(same)} of them different, do not "
            f"split into {wanted} and the rest; give data.eval_dataset instead"
        )
    return _draw(kept, source, seed, len(held)), [
        replace(row, id=row.id.replace("train", "eval", 1)) for index, row in enumerate(rows) if index in held
    ]


def _order(size: int, seed: tuple[int, ...]) -> list[int]:
    return np.random.default_rng(seed).permutation(size).tolist()


def _generate_held_out(source: Source, data: DataConfig, seed: int) -> list[Row]:
    known: set[str] = set()
    for other in sources_of(data.dataset):
        if other.is_generated:
            known.update(question_of(row) for row in _read(other, "train", data, seed))
    size = min(source.rows or data.eval_size, data.eval_size)
    held_out: list[Row] = []
    for row in _read(source, "eval", data, seed + EVAL_SEED_DISTANCE):
        question = question_of(row)
        if question not in known:
            known.add(question)
            held_out.append(row)
        if len(held_out) == size:
            break
    if not held_out:
        raise ConfigError(
            f"data.eval_dataset: every question that {source.name} made is in the training set; lower "
            "data.dataset_size or widen data.dataset_kwargs"
        )
    return held_out
