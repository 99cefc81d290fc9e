"""Files of every form, against rows written down here; arrow files as Hugging Face's datasets lays them out."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from algorithms.dataset_files import read_file
from configs.errors import ConfigError

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]}
ROWS: list[dict[str, Any]] = [{"prompt": f"é{index}", "level": index} for index in range(2500)]


def save_to_disk(folder: Path, *parts: list[dict[str, Any]]) -> Path:
    """As Dataset.save_to_disk: streams of arrow batches, and a list of their names."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_form_has_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet, row_group_size=700)
    paths = {
        ":{}": write(tmp_path / "rows.jsonl", lines),
        " row {}": write(tmp_path / "rows.json", json.dumps(ROWS, indent=1)),
        "  row {}": parquet,
        "   row {}": save_to_disk(tmp_path / "saved", ROWS[:1200], ROWS[1200:]),
        " :{}": write(tmp_path / "lines.json", "\n" + lines),
    }
    for place, path in paths.items():
        found = list(read_file(path))
        assert [row for _, _, row in found] == ROWS
        first = 2 if path.name == "lines.json" else 1
        assert [number for number, _, _ in found] == list(range(first, 2500 + first))
        assert found[7][1] == f"{path}{place.lstrip() if ':' in place else ' row {}'}".format(7 + first)


def test_messages_of_arrow_have_no_fields_of_other_messages(tmp_path: Path) -> None:
    row = {**TALK, "prompt": None, "answer": None}
    ((_, _, found),) = read_file(save_to_disk(tmp_path / "saved", [row]))
    assert found == row


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '[{"prompt": "a"},\n {"prompt": }]',
            ": not valid JSON: Expecting value at line 2, column 13",
        ),
        ("a.json", '[{"prompt": "a"}, 5]', " row 2: a row is a JSON object"),
        ("a.json", '{\n"prompt": "a"}', ":1: not valid JSON"),
        ("a.jsonl", "[1]", ":1: a row is a JSON object"),
        ("a.parquet", "no", ": this dataset cannot be read: "),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError) as caught:
        list(read_file(path))
    assert str(caught.value).startswith(f"{path}{message}")


def test_directories_and_bytes_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory without state\.json, so Dataset\.save_to_disk"):
        list(read_file(tmp_path))
    saved = save_to_disk(tmp_path / "saved", ROWS[:3])
    next(saved.glob("*.arrow")).write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"data-00000-of-00001\.arrow: this dataset cannot be read"):
        list(read_file(saved))
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    with pytest.raises(
        ConfigError, match=f"holds several splits; give one of them: {tmp_path}/train, {tmp_path}/te"
    ):
        list(read_file(tmp_path))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "a"}\n\xff\n')
    with pytest.raises(ConfigError, match=r"bytes\.jsonl: this dataset cannot be read: .*utf-8"):
        list(read_file(tmp_path / "bytes.jsonl"))
    with pytest.raises(ConfigError, match=r"none\.parquet: this dataset cannot be read: .*No such file"):
        list(read_file(tmp_path / "none.parquet"))
