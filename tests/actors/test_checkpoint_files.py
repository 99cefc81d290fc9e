"""The small files of a Megatron checkpoint directory: found, and read strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint_files import (
    LATEST,
    METADATA,
    SOURCE_INDEX,
    SourceTensor,
    checkpoint_root,
    find_iteration,
    iteration_name,
    read_source_index,
    write_latest,
    write_source_index,
)
from actors.model_source import write_beside
from bridge.model_bridge import ModelBridge
from configs.errors import ConfigError
from tests.bridge import family_models

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


def test_the_source_index_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_source_index(tmp_path) is None
    write_source_index(tmp_path, TENSORS)
    assert read_source_index(tmp_path) == TENSORS
    assert [path.name for path in tmp_path.iterdir()] == [SOURCE_INDEX]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_beside_a_checkpoint_stand_the_types_that_it_has(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """The source is a quantized config's model in float16 with a router's float32 bias, which stays what it is."""
    config = family_models.CONFIGS["deepseek_v3"]
    family_models.save(family_models.build(config), config, tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.float16)
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    said = json.loads((tmp_path / "source" / "config.json").read_text())
    said = {"dtype": "float16", "model_type": "deepseek_v3", **said, "quantization_config": {"bits": 8}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(said))
    target = tmp_path / "target"
    target.mkdir()
    write_beside(target, ModelBridge(tmp_path / "source"), torch_dtype=dtype, mtp=True)
    listed = {each.name: each for each in read_source_index(target) or ()}
    assert {name: each.shape for name, each in listed.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    written = {None: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    for name, each in listed.items():
        assert each.dtype == ("F32" if name.endswith("e_score_correction_bias") else written)
    after = json.loads((target / "config.json").read_text())
    del said["quantization_config"]
    assert after == said | {"dtype": str(dtype or torch.float16).removeprefix("torch.")}


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
