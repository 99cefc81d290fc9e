"""Reading against files written by safetensors; writing read back by safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridge.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter, resolve_model
from bridge.layouts import region_of
from bridge.plan import TensorInfo
from configs.errors import BasculeError, ConfigError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 4, generator=generator),
        "b": torch.randn(3, generator=generator).to(torch.bfloat16),
        "c": torch.randn(2, 7, generator=generator).to(torch.float16),
    }


def infos() -> list[TensorInfo]:
    return [TensorInfo(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors().items()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_text("old weights")
    return directory


def test_regions_are_read_from_a_single_file(source: Path) -> None:
    save_file(tensors(), source / "model.safetensors")
    with CheckpointReader(source) as reader:
        assert list(reader.tensors.values()) == infos()
        assert torch.equal(reader.read("a", ((1, 3), (2, 4))), tensors()["a"][1:3, 2:4])
        assert torch.equal(reader.read("b", ((0, 3),)), tensors()["b"])


def test_an_index_leads_to_several_files(source: Path) -> None:
    save_file({"a": tensors()["a"]}, source / "one.safetensors")
    save_file({"b": tensors()["b"]}, source / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with CheckpointReader(source) as reader:
        assert torch.equal(reader.read("b", ((1, 3),)), tensors()["b"][1:])


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"a": "../one.safetensors"}, "outside the directory"),
        ({"missing": "one.safetensors"}, "one.safetensors: .*missing"),
    ],
)
def test_a_wrong_index_is_an_error_that_names_the_file(
    source: Path, index: dict[str, str], words: str
) -> None:
    save_file({"a": tensors()["a"]}, source / "one.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=words):
        CheckpointReader(source)


def test_files_that_are_not_safetensors_are_named(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors does not exist"):
        CheckpointReader(source)
    (source / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors: "):
        CheckpointReader(source)
    save_file({"i": torch.zeros(2, dtype=torch.int64)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="i has type I64"):
        CheckpointReader(source)


def write(target: Path, source: Path, max_shard_size: int) -> None:
    """Two writers, as two ranks would: one has the upper part of `a` and all of `b`, the other the rest."""
    first, second = (CheckpointWriter(target, infos(), max_shard_size) for _ in range(2))
    values = tensors()
    first.prepare()
    first.write([("a", ((0, 2), (0, 4)), values["a"][:2]), ("b", ((0, 3),), values["b"])])
    second.write(
        [
            ("a", ((2, 5), (0, 1)), values["a"][2:, :1]),
            ("a", ((2, 5), (1, 4)), values["a"][2:, 1:]),
            ("c", region_of((2, 7)), values["c"]),
        ]
    )
    first.finish(source)


@pytest.mark.parametrize(("max_shard_size", "files"), [(1 << 20, 1), (90, 2)])
def test_what_two_ranks_write_is_what_safetensors_reads(
    tmp_path: Path, source: Path, max_shard_size: int, files: int
) -> None:
    target = tmp_path / "out"
    write(target, source, max_shard_size)
    paths = sorted(target.glob("*.safetensors"))
    assert len(paths) == files
    read = {name: value for path in paths for name, value in load_file(path).items()}
    assert read.keys() == tensors().keys()
    for name, value in tensors().items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    if files > 1:
        weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
        for name, file in weight_map.items():
            with safe_open(target / file, framework="pt") as handle:
                assert name in handle.keys()  # noqa: SIM118


def test_the_files_around_the_weights_come_along_and_the_type_is_said(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    write(target, source, 1 << 20)
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "pytorch_model.bin").exists()
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama", "dtype": "float32"}
    assert not target.with_name("out.partial").exists()


def test_an_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    write(target, source, 1 << 20)
    before = (target / "model.safetensors").read_bytes()
    writer = CheckpointWriter(target, infos())
    writer.prepare()
    writer.write([("b", ((0, 3),), torch.zeros(3))])
    assert (target / "model.safetensors").read_bytes() == before
    write(target, source, 1 << 20)
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        resolve_model(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BasculeError, match="some/model is not a directory, and the hub does not give it"):
        resolve_model("some/model")
