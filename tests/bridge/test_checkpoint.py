"""Reading whole checkpoints, against files written by safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bridge import checkpoint
from bridge.checkpoint import CheckpointError, CheckpointReader, check_files, resolve_model
from bridge.layouts import Region, region_numel, region_of, region_shape, slices
from bridge.model_bridge import WeightError
from bridge.plan import TensorInfo
from bridge.rules import RuleError
from configs.errors import BasculeError, ConfigError, WriteError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 4, generator=generator),
        "b": torch.randn(3, generator=generator).to(torch.bfloat16),
        "c": torch.randn(2, 7, 3, generator=generator).to(torch.float16),
        "d": torch.randn(3, generator=generator, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }


def write_index(directory: Path, weight_map: Mapping[str, object]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def split_in_two(directory: Path) -> dict[str, str]:
    """Two files without an index; returns the weight_map that fits."""
    values = tensors()
    save_file({name: values[name] for name in ("a", "c", "empty")}, directory / "two.safetensors")
    save_file({name: values[name] for name in ("b", "d", "scalar")}, directory / "one.safetensors")
    files = dict.fromkeys(("a", "c", "empty"), "two.safetensors")
    return files | dict.fromkeys(("b", "d", "scalar"), "one.safetensors")


def test_a_single_file_is_read_whole_and_in_part(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensors == {
            name: TensorInfo(name=name, dtype=value.dtype, shape=tuple(value.shape))
            for name, value in tensors().items()
        }
        assert not reader.others
        assert not reader.quantized
        for name, value in tensors().items():
            assert torch.equal(reader.read(name, region_of(tuple(value.shape))), value)
        assert reader.bytes_read == reader.nbytes == sum(value.nbytes for value in tensors().values())


REGIONS: list[tuple[str, Region]] = [
    ("a", ((1, 3), (0, 4))),
    ("a", ((1, 3), (2, 4))),
    ("a", ((2, 2), (0, 4))),
    ("c", ((1, 2), (2, 5), (0, 3))),
    ("c", ((0, 2), (2, 5), (0, 3))),
    ("c", ((0, 2), (0, 7), (1, 2))),
    ("scalar", ()),
    ("empty", ((0, 0), (1, 3))),
]


@pytest.mark.parametrize(("name", "region"), REGIONS)
@pytest.mark.parametrize("kind", ["same", "other type", "strided", "parameter"])
@pytest.mark.parametrize("chunk", [checkpoint.CHUNK_BYTES, 12])
def test_any_region_goes_into_any_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, region: Region, kind: str, chunk: int
) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    save_file(tensors(), tmp_path / "model.safetensors")
    expected = tensors()[name][slices(region)]
    shape = region_shape(region)
    out = torch.full(shape, -1.0, dtype=torch.float64 if kind == "other type" else expected.dtype)
    if kind == "strided":
        out = torch.full((*shape, 2), -1.0, dtype=expected.dtype)[..., 0]
    if kind == "parameter":
        out = torch.nn.Parameter(out)
    with CheckpointReader(tmp_path) as reader:
        reader.read_into(name, region, out)
        assert torch.equal(out.detach(), expected.to(out.dtype))
        # Only what the region has is read.
        assert reader.bytes_read == region_numel(region) * expected.element_size()


def test_a_contiguous_region_is_one_read_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    calls: list[tuple[int, int]] = []
    preadv = os.preadv

    def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((len(buffers[0]), offset))
        return preadv(descriptor, buffers, offset)

    with CheckpointReader(tmp_path) as reader:
        monkeypatch.setattr(os, "preadv", spy)
        out = torch.zeros(5, 4)
        reader.read_into("a", ((1, 3), (0, 4)), out[1:3])
        assert torch.equal(out[1:3], tensors()["a"][1:3])
        assert not out[[0, 3, 4]].any()
        file, position = reader.position("a")
        assert file == "model.safetensors"
        assert calls == [(2 * 4 * 4, position + 4 * 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 64, 65])
def test_what_is_not_finite_is_noted_wherever_it_is(tmp_path: Path, dtype: torch.dtype, size: int) -> None:
    # Also where large values are beside it, and where there are none but it.
    plain = {scale: torch.linspace(-scale, scale, size).to(dtype) for scale in (1.5, 1000.0)}
    values = {f"{scale}": value for scale, value in plain.items()}
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for scale, value in plain.items():
            for place in {0, size // 2, size - 1}:
                values[f"{bad} {scale} {place}"] = torch.where(
                    torch.arange(size) == place, bad, value.double()
                )
    values = {name: value.to(dtype) for name, value in values.items()}
    save_file(values, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for name in values:
            reader.read(name, ((0, size),))
        assert reader.not_finite == {name for name, value in values.items() if not value.isfinite().all()}
        assert len(reader.not_finite) == len(values) - 2


def test_an_index_leads_to_files_that_are_read_in_order(tmp_path: Path) -> None:
    write_index(tmp_path, split_in_two(tmp_path))
    with CheckpointReader(tmp_path) as reader:
        for name, value in tensors().items():
            assert torch.equal(reader.read(name, region_of(tuple(value.shape))), value)
        positions = [reader.position(name) for name in reader.tensors]
        assert positions == sorted(positions)
        assert {file for file, _ in positions} == {"one.safetensors", "two.safetensors"}


def test_tensors_that_are_no_weights_are_apart_and_can_be_read(tmp_path: Path) -> None:
    ids = torch.arange(5)
    save_file({"position_ids": ids, "weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert list(reader.tensors) == ["weight"]
        assert list(reader.others) == ["position_ids"]
        assert torch.equal(reader.read("position_ids", ((1, 4),)), ids[1:4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors: the file does not exist"),
        ({"a": "../two.safetensors"}, "a is said to be in '../two.safetensors', outside the directory"),
        ({"a": "/two.safetensors"}, "a is said to be in '/two.safetensors', outside the directory"),
        ({"a": ".."}, "a is said to be in '..', outside"),
        ({"a": ""}, "a is said to be in '', outside"),
        ({"a": 3}, "a is said to be in 3, which is no file name"),
        ({"a": "x\0y"}, "which is no file name"),
        ({"more": "one.safetensors"}, "one.safetensors: does not have more, which model.safetensors.index"),
        ({"a": "one.safetensors"}, "two.safetensors: has a, which .* places in one.safetensors"),
    ],
)
def test_a_wrong_index_is_an_error_that_names_file_and_tensor(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    write_index(directory, split_in_two(directory) | change)
    with pytest.raises(CheckpointError, match=words):
        CheckpointReader(directory)


def test_tensors_that_the_index_forgets_or_that_are_twice_are_named(tmp_path: Path) -> None:
    weight_map = split_in_two(tmp_path)
    save_file({"b": tensors()["b"], "x": tensors()["a"]}, tmp_path / "three.safetensors")
    write_index(tmp_path, weight_map | {"x": "three.safetensors"})
    with pytest.raises(CheckpointError, match=r"three.safetensors: has b, .* places in one.safetensors"):
        CheckpointReader(tmp_path)
    del weight_map["scalar"]
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"one.safetensors: has scalar, .* does not list"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": ["a"]}', "has no weight_map"),
        (b'{"weight_map": {"a": "1", "a": "2"}}', "not JSON: key 'a' is there twice"),
    ],
)
def test_an_index_that_is_none_is_named(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=f"model.safetensors.index.json: {words}"):
        CheckpointReader(tmp_path)


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    weight_map = split_in_two(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(b"short")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    changes = {"x": "../y", "more": "two.safetensors", "l": "loop.safetensors", "g": "gone.safetensors"}
    write_index(tmp_path, weight_map | changes)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for words in (
        "one.safetensors: trunc",
        "loop.safetensors: Too many",
        "gone.saf",
        "'../y'",
        "not have more",
    ):
        assert any(words in line for line in lines), words


def test_files_are_checked_however_their_tensors_are_quantized(tmp_path: Path) -> None:
    write_index(tmp_path, split_in_two(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    before = open_files()
    check_files(tmp_path)
    assert open_files() == before
    with pytest.raises(CheckpointError, match="quantized with awq"):
        CheckpointReader(tmp_path)
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"two\.safetensors: truncated"):
        check_files(tmp_path)
    assert open_files() == before


def test_what_cannot_be_read_is_wrong_input_and_what_cannot_be_written_is_not() -> None:
    assert all(issubclass(kind, ConfigError) for kind in (CheckpointError, RuleError, WeightError))
    assert not issubclass(WriteError, ConfigError)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_are_closed_after_use_and_after_an_error(tmp_path: Path) -> None:
    before = open_files()
    write_index(tmp_path, split_in_two(tmp_path))
    with CheckpointReader(tmp_path):
        assert open_files() == before + 2
    write_index(tmp_path, split_in_two(tmp_path) | {"x": "gone.safetensors"})
    with pytest.raises(CheckpointError):
        CheckpointReader(tmp_path)
    assert open_files() == before


def test_a_hub_snapshot_of_symlinks_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(tensors(), blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    with CheckpointReader(snapshot) as reader:
        assert torch.equal(reader.read("b", ((0, 3),)), tensors()["b"])


def test_a_directory_without_one_clear_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no safetensors files, neither model.safetensors nor"):
        CheckpointReader(tmp_path)
    split_in_two(tmp_path)
    with pytest.raises(CheckpointError, match=r"has one.safetensors, two.safetensors but neither"):
        CheckpointReader(tmp_path)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        resolve_model(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BasculeError, match="some/model is not a directory, and the hub does not give it"):
        resolve_model("some/model")
