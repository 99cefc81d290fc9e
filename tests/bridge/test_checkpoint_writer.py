"""Writing, read back by safetensors."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridge import checkpoint_writer
from bridge.checkpoint import resolve_model
from bridge.checkpoint_writer import CheckpointWriter, progress
from bridge.layouts import region_of
from bridge.partial_directory import partial_of, put_in_place
from bridge.plan import TensorInfo
from configs.errors import ConfigError, WriteError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 4, generator=generator),
        "b": torch.randn(3, generator=generator).to(torch.bfloat16),
        "c": torch.randn(2, 7, generator=generator).to(torch.float16),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
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
    save_file({"old": torch.zeros(1)}, directory / "model.safetensors")
    return directory


def write_whole(writer: CheckpointWriter, name: str) -> None:
    value = tensors()[name]
    writer.write(name, region_of(tuple(value.shape)), value)


def save(target: Path, source: Path, max_shard_size: int = 1 << 20) -> None:
    """Two writers, as two ranks would: one has the upper part of `a` and all of `b`, the other the rest."""
    first, second = (CheckpointWriter(target, infos(), max_shard_size, rank=rank) for rank in (0, 1))
    values = tensors()
    first.prepare()
    first.write("a", ((0, 2), (0, 4)), values["a"][:2])
    write_whole(first, "b")
    write_whole(first, "empty")
    second.write("a", ((2, 5), (0, 1)), values["a"][2:, :1])
    second.write("a", ((2, 5), (1, 4)), values["a"][2:, 1:])
    write_whole(second, "c")
    write_whole(second, "scalar")
    second.close()
    first.finish(source)


def check(target: Path) -> None:
    read = {name: t for path in target.glob("*.safetensors") for name, t in load_file(path).items()}
    assert read.keys() == tensors().keys()
    for name, value in tensors().items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


@pytest.mark.parametrize(("max_shard_size", "files"), [(1 << 20, 1), (90, 2), (1, 5)])
def test_what_two_ranks_write_is_what_safetensors_reads(
    tmp_path: Path, source: Path, max_shard_size: int, files: int
) -> None:
    target = tmp_path / "out"
    save(target, source, max_shard_size)
    check(target)
    paths = sorted(path.name for path in target.glob("*.safetensors"))
    index = target / "model.safetensors.index.json"
    if files == 1:
        assert paths == ["model.safetensors"]
        assert not index.exists()
        return
    assert paths == [f"model-{n:05d}-of-{files:05d}.safetensors" for n in range(1, files + 1)]
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    assert list(content["weight_map"]) == sorted(tensors())
    for name, file in content["weight_map"].items():
        with safe_open(target / file, framework="pt") as handle:
            assert name in handle.keys()  # noqa: SIM118


@pytest.mark.parametrize("chunk", [checkpoint_writer.CHUNK_BYTES, 12])
def test_values_of_any_type_and_stride_are_cast(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(checkpoint_writer, "CHUNK_BYTES", chunk)
    value = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    writer = CheckpointWriter(tmp_path / "out", [TensorInfo(name="a", dtype=torch.bfloat16, shape=(4, 6))])
    writer.prepare()
    writer.write("a", ((0, 4), (2, 6)), torch.nn.Parameter(value.T[:, 2:]))
    writer.write("a", ((0, 4), (0, 2)), value.T[:, :2])
    writer.finish(source)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], value.T.to(torch.bfloat16))


def test_the_files_around_the_weights_come_along(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    save(target, source)
    names = sorted(path.name for path in target.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    # The config said the type already, so it is the very same file.
    assert (target / "config.json").read_text() == (source / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    ("dequantized", "expected"),
    [
        (False, {"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}),
        (True, {"model_type": "llama", "dtype": "bfloat16"}),
    ],
)
def test_the_config_says_what_was_written(
    tmp_path: Path, source: Path, dequantized: bool, expected: dict[str, Any]
) -> None:
    config = {"torch_dtype": "float32", "model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    small, large = (
        TensorInfo(name=str(size), dtype=dtype, shape=(size,))
        for size, dtype in ((2, torch.float32), (100, torch.bfloat16))
    )
    writer = CheckpointWriter(tmp_path / "out", [small, large])
    writer.prepare()
    writer.finish(source, dequantized=dequantized)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def test_an_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    save(target, source)
    before = (target / "model.safetensors").read_bytes()
    (target / "stale.txt").write_text("of the old one")
    writer = CheckpointWriter(target, infos())
    writer.prepare()
    writer.write("b", ((0, 3),), torch.zeros(3))
    writer.close()
    assert (target / "model.safetensors").read_bytes() == before
    save(target, source)
    assert not (target / "stale.txt").exists()
    check(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_parents_are_made_and_symlinks_followed(tmp_path: Path, source: Path) -> None:
    save(tmp_path / "not" / "yet" / "there", source)
    check(tmp_path / "not" / "yet" / "there")
    (tmp_path / "link").symlink_to("elsewhere")
    save(tmp_path / "link", source)
    save(tmp_path / "link", source)
    assert (tmp_path / "link").is_symlink()
    check(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link", "not", "source"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="out is neither empty nor a checkpoint"):
        CheckpointWriter(tmp_path / "out", infos()).prepare()
    # Not even to go on with a save that began when there was nothing.
    key = "step 7"
    interrupted(tmp_path / "other", key)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="other is neither empty nor a checkpoint"):
        CheckpointWriter(tmp_path / "other", infos(), rank=1, key=key).prepare()
    assert progress(tmp_path / "other", key, 1) == (0, 5)


def test_a_checkpoint_can_be_saved_over_its_source(source: Path) -> None:
    save(source, source)
    check(source)
    assert (source / "tokenizer.json").read_text() == "{}"


def test_a_full_disk_is_an_error_at_the_start_that_leaves_nothing(tmp_path: Path, source: Path) -> None:
    """The limit on the size of files stands for the disk's: the system refuses the space in the same call."""
    target = tmp_path / "out"
    save(target, source)
    large = CheckpointWriter(target, [TensorInfo(name="large", dtype=torch.float32, shape=(1 << 20,))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            WriteError, match=r"out.bascule-partial/model.safetensors: cannot be written: .*File too"
        ):
            large.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    check(target)


def test_a_disk_that_fails_in_the_middle_names_file_and_tensor(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(target, infos())
    writer.prepare()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match=r"model.safetensors: b: cannot be written: .*No space left"):
        write_whole(writer, "b")
    writer.close()
    assert not target.exists()
    with pytest.raises(WriteError, match=r"parent: cannot be written|Not a directory"):
        CheckpointWriter(source / "config.json" / "out", infos()).prepare()


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from bridge.checkpoint_writer import CheckpointWriter
from bridge.plan import TensorInfo
from configs.errors import WriteError

SIZE = 1 << 16
infos = [TensorInfo(name=name, dtype=torch.float32, shape=(SIZE,)) for name in "abc"]
writer = CheckpointWriter(Path(sys.argv[1]), infos, key="step 7")
writer.prepare()
# In the middle of the second tensor.
resource.setrlimit(resource.RLIMIT_FSIZE, (6 * SIZE, 6 * SIZE))
try:
    for name in "abc":
        writer.write(name, ((0, SIZE),), torch.ones(SIZE))
        writer.commit([name])
    writer.finish(Path(sys.argv[2]))
except WriteError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_is_full_in_the_middle_leaves_nothing_that_looks_complete(
    tmp_path: Path, source: Path
) -> None:
    """The system itself refuses to write, half-way through a tensor; in a process of its own, for it stays so."""
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out"), str(source)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    assert "out.bascule-partial/model.safetensors: b: cannot be written: [Errno 27] File too" in child.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bascule-partial", "source"]
    with pytest.raises(ConfigError, match=r"has no config.json"):
        resolve_model(str(tmp_path / "out.bascule-partial"))
    assert progress(tmp_path / "out", "step 7", 1) == (1, 3)


def test_short_writes_are_continued(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    save(tmp_path / "out", source)
    check(tmp_path / "out")


# --- An interrupted save ---


def interrupted(target: Path, key: str | None, max_shard_size: int = 1 << 20) -> CheckpointWriter:
    """A save of which `a` and `b` are done when it ends."""
    writer = CheckpointWriter(target, infos(), max_shard_size, rank=1, key=key)
    writer.prepare()
    for name in ("a", "b"):
        write_whole(writer, name)
    writer.commit(["a", "b"])
    write_whole(writer, "c")
    writer.close()
    return CheckpointWriter(target, infos(), max_shard_size, rank=1, key=key)


def test_an_interrupted_save_is_continued_where_it_was(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    again = interrupted(target, "step 7")
    assert [progress(target, key, 2) for key in ("step 7", "step 8")] == [(0, 5), None]
    again.prepare()
    assert again.pending(tensors()) == ["c", "empty", "scalar"]
    # Each rank has its own part to write, and its own journal.
    assert CheckpointWriter(target, infos(), 1 << 20, rank=0, key="step 7").pending(["a"]) == ["a"]
    for name in again.pending(tensors()):
        write_whole(again, name)
    again.commit(["c"])
    other = CheckpointWriter(target, infos(), 1 << 20, rank=0, key="step 7")
    other.commit(["b", "c"])
    assert progress(target, "step 7", 2) == (2, 5)
    other.close()
    again.finish(source, publish=False)
    assert not target.exists()
    assert progress(target, "step 7", 2) == (2, 5)
    put_in_place(target)
    assert progress(target, "step 7", 2) is None
    check(target)
    names = sorted(path.name for path in target.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("first", "second", "max_shard_size"),
    [
        ("step 7", "step 8", 1 << 20),
        ("step 7", "step 7", 90),
        (None, None, 1 << 20),
        ("step 7", None, 1 << 20),
    ],
    ids=["another state", "other files", "no key", "key lost"],
)
def test_only_the_same_save_is_continued(
    tmp_path: Path, first: str | None, second: str | None, max_shard_size: int
) -> None:
    target = tmp_path / "out"
    interrupted(target, first)
    writer = CheckpointWriter(target, infos(), max_shard_size, rank=1, key=second)
    writer.prepare()
    assert writer.pending(tensors()) == list(tensors())
    read = {
        name: value
        for path in partial_of(target).glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    assert not any(value.any() for value in read.values())


def test_an_interrupted_start_or_a_torn_journal_is_no_trap(tmp_path: Path, source: Path) -> None:
    target, partial = tmp_path / "out", partial_of(tmp_path / "out")
    writer = interrupted(target, "step 7")
    with (partial / ".bascule-written.1").open("a") as stream:
        stream.write('"sca')
    writer.prepare()
    assert writer.pending(tensors()) == ["c", "empty", "scalar"]
    with (partial / "model.safetensors").open("r+b") as stream:
        stream.truncate(50)
    assert progress(target, "step 7", 2) is None
    writer.prepare()
    assert writer.pending(tensors()) == list(tensors())
    for name in tensors():
        write_whole(writer, name)
    writer.finish(source)
    check(target)
