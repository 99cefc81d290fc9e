"""Rows of the datasets of a run, against the files' own text and reasoning-gym called directly."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from algorithms.datasets import read_rows
from configs.data import DataConfig
from configs.errors import ConfigError

TALK = [{"role": "user", "content": "what is two plus three ?"}]


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_rows_keep_every_column_and_the_line_number(tmp_path: Path) -> None:
    first, second = {"prompt": "two", "answer": "2"}, {"messages": TALK, "level": 3}
    path = write(tmp_path, first, "", second)
    rows = read_rows(DataConfig(dataset=(path,)), "train")
    assert [(row.id, row.place, row.columns) for row in rows] == [
        ("train-1", f"{path}:1", first),
        ("train-3", f"{path}:3", second),
    ]


def test_eval_rows(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": str(index)} for index in range(5)])
    assert read_rows(DataConfig(dataset=(path,)), "eval") == []
    rows = read_rows(DataConfig(dataset=("none",), eval_dataset=(path,), eval_size=2), "eval")
    assert [row.id for row in rows] == ["eval-1", "eval-2"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["{}", "x"],
            ":1: a row has `messages`, `prompt` or `instruction`; this one has neither of them (it has: )",
        ),
        (['{"prompt": "a"}', "{x"], ":2: not valid JSON: Expecting property name"),
        (
            ['{"prompt": "a", "messages": []}'],
            ":1: a row has `messages`, `prompt` or `instruction`; this one has both of the first two",
        ),
        (['{"prompt": ["a"]}'], ":1: `prompt` is a string, or a list of {"),
        (['{"prompt": "a", "completion": 5}'], ":1: `completion` is a string, or a list of {"),
        (['{"instruction": "a", "input": 5}'], ":1: `input` is a string"),
        (['{"instruction": "a", "history": [["b", "c"]]}'], ":1: `history` is not read; put all turns"),
        (['{"messages": [{"role": "user"}]}'], ":1: `messages` is a list of"),
        (["[1]"], ":1: a row is a JSON object"),
        (["", ""], ": there are no rows in it"),
    ],
)
def test_files_that_are_no_dataset(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(ConfigError) as caught:
        read_rows(DataConfig(dataset=(path,)), "train")
    assert str(caught.value).startswith(f"{path}{message}")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: this dataset cannot be read: No such file"):
        read_rows(DataConfig(dataset=(str(tmp_path / "none.jsonl"),)), "train")


def test_generated_rows_are_reasoning_gyms_entries() -> None:
    data = DataConfig(
        dataset=("reasoning_gym:chain_sum",), dataset_size=4, dataset_kwargs={"max_terms": 3, "min_digits": 2}
    )
    expected = list(reasoning_gym.create_dataset("chain_sum", size=4, seed=9, max_terms=3, min_digits=2))
    rows = read_rows(data, "train", seed=9)
    assert [row.columns["prompt"] for row in rows] == [entry["question"] for entry in expected]
    for row, entry in zip(rows, expected, strict=True):
        assert {key: row.columns[key] for key in entry} == entry
        assert row.columns["dataset_kwargs"] == {"max_terms": 3, "min_digits": 2}
    assert rows == read_rows(data, "train", seed=9)


def test_generated_eval_rows_have_no_training_question() -> None:
    # One-digit sums of two terms: 1000 draws cover most of the 200 questions there are.
    name = "reasoning_gym:chain_sum"
    small: dict[str, str | int | float | bool] = {"max_terms": 2, "max_digits": 1}
    data = DataConfig(
        dataset=(name,), eval_dataset=(name,), dataset_size=200, eval_size=10, dataset_kwargs={**small}
    )
    train = {row.columns["question"] for row in read_rows(data, "train")}
    held_out = [row.columns["question"] for row in read_rows(data, "eval")]
    assert read_rows(data.model_copy(update={"eval_dataset": ()}), "eval") == read_rows(data, "eval")
    assert len(held_out) == len(set(held_out)) == 10
    assert train.isdisjoint(held_out)
    crowded = data.model_copy(update={"dataset_size": 5000})
    with pytest.raises(
        ConfigError, match="every question that reasoning_gym:chain_sum made is in the training"
    ):
        read_rows(crowded, "eval")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("chain_sums", {}, "reasoning-gym has no task 'chain_sums'; did you mean chain_sum"),
        (
            "chain_sum",
            {"max_term": 3},
            r"dataset_kwargs.max_term: chain_sum takes no such argument.*max_terms",
        ),
        ("chain_sum", {"seed": 3}, r"dataset_kwargs.seed: .*come from `seed`"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "chain_sum refuses .*max_terms"),
    ],
)
def test_generated_datasets_that_cannot_be(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rows(DataConfig(dataset=(f"reasoning_gym:{name}",), dataset_kwargs=kwargs), "train")


def numbered(folder: Path, size: int, name: str) -> str:
    return write(folder, *[{"prompt": f"{name} {index}"} for index in range(size)], name=f"{name}.jsonl")


def asked(data: DataConfig, split: Any = "train", seed: int = 42) -> list[str]:
    return [row.columns["prompt"] for row in read_rows(data, split, seed)]


def test_rows_of_several_datasets_and_a_number_of_each(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, 6, "a"), numbered(tmp_path, 4, "b")
    data = DataConfig.model_validate({"dataset": f"{a}#4,{b}#11, reasoning_gym:chain_sum#3"})
    found = asked(data)
    first, second, made = found[:4], found[4:15], found[15:]
    assert len(set(first)) == 4
    assert set(first) < {f"a {index}" for index in range(6)}
    # Twice all four, and three of them a third time.
    assert sorted(Counter(second).values()) == [2, 3, 3, 3]
    assert made == [entry["question"] for entry in reasoning_gym.create_dataset("chain_sum", size=3, seed=42)]
    assert found == asked(data)
    assert found != asked(data, seed=43)
    ids = [row.id for row in read_rows(data, "train")]
    assert len(set(ids)) == len(ids) == 18
    with pytest.raises(ConfigError, match=r"data\.dataset: .*a\.jsonl#0 draws no rows"):
        asked(DataConfig(dataset=(f"{a}#0",)))


@pytest.mark.parametrize("rows", ["", "#10", "#50"])
def test_held_out_rows_are_not_trained_on_and_both_are_the_same_every_time(tmp_path: Path, rows: str) -> None:
    a, b = numbered(tmp_path, 20, "a"), numbered(tmp_path, 5, "b")
    data = DataConfig(dataset=(a + rows, b), split_dataset_ratio=0.2)
    train, held_out = asked(data), asked(data, "eval")
    assert set(train).isdisjoint(held_out)
    assert len(set(held_out)) == len(held_out)
    assert [text[0] for text in held_out] == ["a"] * {"": 4, "#10": 2, "#50": 4}[rows] + ["b"]
    assert len(train) == {"": 16, "#10": 8, "#50": 46}[rows] + 4
    if rows != "#10":
        assert set(train) | set(held_out) == {f"a {i}" for i in range(20)} | {f"b {i}" for i in range(5)}
    assert (train, held_out) == (asked(data), asked(data, "eval"))
    assert held_out != asked(data, "eval", seed=1)
    assert all(row.id.startswith("eval-") for row in read_rows(data, "eval"))


def test_a_row_that_is_there_twice_is_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": str(index // 2)} for index in range(40)])
    data = DataConfig(dataset=(path,), split_dataset_ratio=0.25)
    train, held_out = asked(data), asked(data, "eval")
    assert (len(train), len(held_out)) == (30, 10)
    assert set(train).isdisjoint(held_out)
    same = write(tmp_path, {"prompt": "x"}, {"prompt": "x"}, name="same.jsonl")
    with pytest.raises(ConfigError, match=r"split_dataset_ratio: 2 rows of .*, 1 of them different, do not"):
        asked(DataConfig(dataset=(same,), split_dataset_ratio=0.5))


def test_rows_to_evaluate_on_are_of_every_dataset(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, 9, "a"), numbered(tmp_path, 2, "b")
    data = DataConfig(dataset=("none",), eval_dataset=(a, b), eval_size=5)
    assert asked(data, "eval") == ["a 0", "b 0", "a 1", "b 1", "a 2"]
