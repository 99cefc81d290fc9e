"""The small files of a Megatron checkpoint directory: found, copied, replaced, and read strictly."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint_files import (
    LATEST,
    METADATA,
    SOURCE_INDEX,
    SourceTensor,
    checkpoint_root,
    copy_side_files,
    drop_quantization,
    find_iteration,
    iteration_name,
    read_source_index,
    replace_directory,
    write_latest,
    write_source_index,
)
from configs.errors import ConfigError

TENSORS = [
    SourceTensor(name="model.norm.weight", dtype="F32", shape=(8,)),
    SourceTensor(name="a scalar", dtype="BF16", shape=()),
]


def make_checkpoint(directory: Path, name: str = "iter_0000012") -> Path:
    (directory / name).mkdir(parents=True)
    (directory / name / METADATA).write_text("{}")
    return directory / name


def test_the_latest_iteration_is_found_from_either_directory(tmp_path: Path) -> None:
    inner = make_checkpoint(tmp_path)
    write_latest(tmp_path, 12)
    assert (tmp_path / LATEST).read_text() == "12\n"
    assert iteration_name(12) == inner.name
    for given in (tmp_path, inner):
        assert find_iteration(given) == inner
        assert checkpoint_root(given) == tmp_path
    (tmp_path / LATEST).write_text("release\n")
    with pytest.raises(
        ConfigError, match=r"release is not a torch_dist checkpoint: it has no metadata\.json"
    ):
        find_iteration(tmp_path)
    assert find_iteration(tmp_path / "iter_0000012") == inner
    inner.rename(tmp_path / "release")
    assert find_iteration(tmp_path) == tmp_path / "release"


def test_a_checkpoint_without_megatron_lms_directory_is_its_own_root(tmp_path: Path) -> None:
    inner = make_checkpoint(tmp_path, "plain")
    assert find_iteration(inner) == inner
    assert checkpoint_root(inner) == inner


@pytest.mark.parametrize("text", ["", "twelve", "../up", "-3", "1 2"])
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LATEST).write_text(text)
    with pytest.raises(ConfigError, match="should hold an iteration number or `release`"):
        find_iteration(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a Megatron checkpoint"):
        find_iteration(tmp_path)
    with pytest.raises(ConfigError, match="there is no such directory"):
        find_iteration(tmp_path / "none")


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    make_checkpoint(source)
    kept = ("chat_template.jinja", "config.json", "generation_config.json", "modeling.py", "tokenizer.json")
    left = ("model.safetensors", "model.safetensors.index.json", "old.bin", LATEST, SOURCE_INDEX, "a.distcp")
    for name in (*kept, *left):
        (source / name).write_text(name)
    assert copy_side_files(source, target) == sorted(kept)
    assert sorted(path.name for path in target.iterdir()) == sorted(kept)
    assert (target / "config.json").read_text() == "config.json"


def test_a_config_loses_its_quantization_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}'
    )
    drop_quantization(path)
    assert json.loads(path.read_text()) == {"model_type": "llama", "dtype": "bfloat16"}
    path.write_text('{"model_type":   "llama"}')
    drop_quantization(path)
    assert path.read_text() == '{"model_type":   "llama"}'


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("new.partial", "new", "new.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_directory(tmp_path / "new.partial", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["new.partial"]


def test_the_source_index_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_source_index(tmp_path) is None
    write_source_index(tmp_path, TENSORS)
    assert read_source_index(tmp_path) == TENSORS
    assert [path.name for path in tmp_path.iterdir()] == [SOURCE_INDEX]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ([], "not of format 1"),
        ({"format": 2, "tensors": {}}, "not of format 1"),
        ({"format": 1}, "`tensors` should be a mapping"),
        ({"format": 1, "tensors": {}}, "`tensors` should be a mapping"),
        ({"format": 1, "tensors": {"w": 3}}, "w should have dtype and shape"),
        ({"format": 1, "tensors": {"w": {"dtype": "F32"}}}, "w should have dtype and shape"),
        ({"format": 1, "tensors": {"w": {"dtype": "F32", "shape": [], "x": 1}}}, "and nothing else"),
        ({"format": 1, "tensors": {"w": {"dtype": "F33", "shape": []}}}, "w has dtype 'F33'; it is one of"),
        ({"format": 1, "tensors": {"w": {"dtype": ["F32"], "shape": []}}}, "w has dtype"),
        ({"format": 1, "tensors": {"w": {"dtype": "F32", "shape": [-1]}}}, "w has shape"),
        ({"format": 1, "tensors": {"w": {"dtype": "F32", "shape": [True]}}}, "w has shape"),
        ({"format": 1, "tensors": {"w": {"dtype": "F32", "shape": "8"}}}, "w has shape"),
    ],
)
def test_a_wrong_source_index_names_file_and_tensor(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / SOURCE_INDEX
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_source_index(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
