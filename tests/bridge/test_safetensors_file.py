"""The header reader against the safetensors library, by hand and by thousands of damaged files."""

import json
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge import safetensors_file
from bridge.checkpoint import CheckpointReader
from bridge.layouts import Region, region_numel, region_of, slices
from bridge.safetensors_file import DTYPES, CheckpointError, SafetensorsFile, as_bytes, boxes, runs

FILE = "model.safetensors"


def packed(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(value: torch.Tensor) -> bytes:
    return bytes(as_bytes(value)) if value.numel() else b""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated: 0 bytes"),
        ((1 << 62).to_bytes(8, "little"), "more than 100000000"),
        ((50).to_bytes(8, "little") + b"{}", "truncated: a header of 50 bytes in a file of 10"),
        (packed(b"\xff\xfe"), "not JSON"),
        (packed(b"{"), "not JSON"),
        (packed(b"[" * 100_000), "not JSON"),
        (packed(b'{"\\ud800": {}}'), "not JSON: .*surrogates"),
        (packed(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}'), "a: has .*data_offsets"),
        (packed(b"[]"), "not a JSON object"),
        (packed(b'{"a": {}, "a": {}}'), "key 'a' is there twice"),
        (packed({"__metadata__": {"format": 1}, "a": entry()}), "__metadata__ does not map"),
        (packed({"a": [1]}), "a: its entry is not"),
        (packed({"a": {"dtype": "F32", "shape": [2]}}), "a: its entry is not"),
        (packed({"a": entry("F31")}), "a: has type F31"),
        (packed({"a": entry(shape=[-2])}), r"a: has shape \[-2\]"),
        (packed({"a": entry(shape=[2.0])}), r"a: has shape \[2.0\]"),
        (packed({"a": entry(shape=[True, 2])}), r"a: has shape \[True, 2\]"),
        (packed({"a": entry(shape=2)}), "a: has shape 2"),
        (packed({"a": entry(shape=[1 << 40, 1 << 40])}), "a: has shape .* no memory holds"),
        (packed({"a": entry(shape=[0, 1 << 63], offsets=[0, 0])}, b""), "a: has shape .* no memory holds"),
        (packed({"a": entry(offsets=[0, 8, 8])}), "a: has .*data_offsets"),
        (packed({"a": entry(offsets=[0, 4])}), r"a: has data_offsets \[0, 4\], but F32 .* takes 8 bytes"),
        (packed({"a": entry(offsets=[8, 0])}), "a: has data_offsets"),
        (
            packed({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
            "b: its data overlaps with a's by 4",
        ),
        (packed({"a": entry(), "b": entry(offsets=[0, 8])}), "overlaps with .*'s by 8"),
        (packed({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "b: 4 bytes before its data"),
        (packed({"a": entry(offsets=[4, 12])}, bytes(12)), "a: 4 bytes before its data"),
        (packed({"a": entry()}, bytes(7)), "truncated: a ends at byte"),
        (packed({"a": entry()}, bytes(9)), "1 bytes after a belong to no tensor"),
        (packed({}), "8 bytes after the header belong to no tensor"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_file_and_tensor(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_everything_wrong_in_a_header_is_listed(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(packed({"a": entry("X"), "b": entry(shape=[-1]), "c": entry(offsets=[0, 4])}))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    lines = str(caught.value).splitlines()
    assert [name in line for name, line in zip("abc", lines, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "the file does not exist"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("gone"), "a symlink to gone, which does not exist"),
        (lambda path: path.mkdir(), "not a regular file"),
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE}: .*{words}"):
        SafetensorsFile(tmp_path / FILE)


def test_all_types_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, (48,), dtype=torch.uint8, generator=generator)
    saved = {name: noise.clone().view(dtype).reshape(2, -1) for name, dtype in DTYPES.items()}
    saved |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "cut": torch.zeros(3, 0, 2)}
    save_file(saved, tmp_path / FILE)
    opened = SafetensorsFile(tmp_path / FILE)
    assert opened.tensors.keys() == saved.keys()
    for name, value in load_file(tmp_path / FILE).items():
        info = opened.tensors[name].info
        assert (info.dtype, info.shape) == (value.dtype, tuple(value.shape))
        out = bytearray(info.nbytes)
        assert opened.read(name, region_of(info.shape), memoryview(out)) == info.nbytes
        assert bytes(out) == raw(value)
    opened.close()


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / FILE)
    opened = SafetensorsFile(tmp_path / FILE)
    with (tmp_path / FILE).open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(CheckpointError, match="has shrunk"):
        opened.read("a", ((0, 100),), memoryview(bytearray(400)))
    opened.close()


def test_columns_of_a_file_that_shrinks_are_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2000, 4)}, tmp_path / FILE)
    opened = SafetensorsFile(tmp_path / FILE)
    os.truncate(tmp_path / FILE, 5000)
    with pytest.raises(CheckpointError, match=f"{FILE}: ends before byte .*; it has shrunk"):
        opened.read("a", ((0, 2000), (1, 3)), memoryview(bytearray(2000 * 8)))
    opened.close()


@pytest.mark.parametrize("short", [64 << 10, 0])
@pytest.mark.parametrize("window", [8 << 20, 9000, 1])
def test_any_columns_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, short: int
) -> None:
    """As one call for each run, and through mappings: smaller than a row, of some rows, of all of them."""
    monkeypatch.setattr(safetensors_file, "_WINDOW_BYTES", window)
    monkeypatch.setattr(safetensors_file, "_SHORT_RUN", short)
    monkeypatch.setattr(safetensors_file, "_ALIGNMENT", mmap.ALLOCATIONGRANULARITY)
    chance = random.Random(0)
    shapes = [(400, 30), (3, 70, 20), (2, 3, 40, 10)]
    saved = {
        f"{dtype}{shape}": torch.randn(shape).to(dtype)
        for shape in shapes
        for dtype in (torch.bfloat16, torch.float32)
    }
    save_file(saved, tmp_path / FILE)
    opened = SafetensorsFile(tmp_path / FILE)
    for name, value in [*saved.items()] * 10:
        region = random_region(tuple(value.shape), chance)
        part = value[slices(region)].contiguous()
        out = bytearray(part.nbytes)
        assert opened.read(name, region, memoryview(out)) == part.nbytes
        assert bytes(out) == raw(part)
    opened.close()


def random_region(shape: tuple[int, ...], chance: random.Random) -> Region:
    sides = [sorted(chance.choices(range(size + 1), k=2)) for size in shape]
    return tuple(
        (0, size) if chance.random() < 0.4 else (a, b) for (a, b), size in zip(sides, shape, strict=True)
    )


def test_runs_are_the_bytes_that_indexing_gives() -> None:
    chance = random.Random(0)
    for _ in range(500):
        shape = tuple(chance.randrange(5) for _ in range(chance.randrange(5)))
        region = random_region(shape, chance)
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
        offsets, size = runs(region, shape, 2)
        data = raw(whole)
        assert b"".join(data[at : at + size] for at in offsets) == raw(whole[slices(region)].contiguous())
        # Never more runs than there are rows of the last dimension.
        assert len(offsets) <= max(1, region_numel(region[:-1]))


def test_boxes_tile_a_region_in_order() -> None:
    chance = random.Random(1)
    for _ in range(300):
        shape = tuple(chance.randrange(6) for _ in range(chance.randrange(4)))
        region = random_region(shape, chance)
        limit = chance.randrange(1, 30)
        parts = list(boxes(region, limit))
        assert all(region_numel(part) <= limit for part in parts)
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        joined = torch.cat([whole[slices(part)].reshape(-1) for part in parts])
        assert torch.equal(joined, whole[slices(region)].reshape(-1))


# --- Fuzz: a damaged checkpoint is refused, or read as the library reads it ---

ALPHABET = b'{}[],:"0123456789-.eE \\ndtypeshF3216B_\x00\xff\xc3u'


def mutate(text: bytes, chance: random.Random) -> bytes:
    """One to three edits: a byte changed, dropped, added or doubled, a number changed, or the end cut off."""
    found = bytearray(text)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(found)) if found else 0
        match chance.randrange(6):
            case 0:
                found[at : at + 1] = bytes([chance.choice(ALPHABET)])
            case 1:
                del found[at : at + chance.randint(1, 4)]
            case 2:
                found[at:at] = bytes([chance.choice(ALPHABET)])
            case 3:
                stop = at + chance.randint(1, 40)
                found[at:at] = found[at:stop]
            case 4:
                digits = [i for i, byte in enumerate(found) if chr(byte).isdigit()]
                if digits:
                    found[chance.choice(digits)] = ord(chance.choice("0123456789"))
            case _:
                other = chance.randrange(len(found)) if found else 0
                found[at : at + 5], found[other : other + 5] = found[other : other + 5], found[at : at + 5]
    return bytes(found)


def check(directory: Path, files: list[Path]) -> bool:
    """Whether the checkpoint is accepted; then every tensor is what the library reads."""
    try:
        reader = CheckpointReader(directory)
    except CheckpointError:
        return False
    with reader:
        expected = {name: value for path in files for name, value in load_file(path).items()}
        infos = {**reader.tensors, **reader.others}
        assert infos.keys() == expected.keys()
        for name, value in expected.items():
            read = reader.read(name, region_of(infos[name].shape))
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            assert raw(read) == raw(value)
    return True


def fuzz_tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.arange(4, dtype=torch.bfloat16),
        "é": torch.arange(4, dtype=torch.int32),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(7.0, dtype=torch.float16),
    }


def test_no_damaged_header_is_read_wrongly(tmp_path: Path) -> None:
    path = tmp_path / FILE
    save_file(fuzz_tensors(), path, metadata={"format": "pt"})
    whole = path.read_bytes()
    stop = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(2)
    accepted = 0
    for number in range(3000):
        header, data = whole[8:stop], whole[stop:]
        path.unlink()  # a file that is written anew costs ext4 a flush, a new one none
        if number % 10 == 0:
            path.write_bytes(mutate(whole, chance))
        elif number % 10 == 1:
            path.write_bytes(whole[: chance.randrange(len(whole))])
        else:
            path.write_bytes(packed(mutate(header, chance), data))
        accepted += check(tmp_path, [path])
    # Renamed tensors, moved spaces and the like remain valid: the comparison above has work to do.
    assert 50 < accepted < 2500


def test_no_damaged_index_is_read_wrongly(tmp_path: Path) -> None:
    values = fuzz_tensors()
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file({name: values[name] for name in ("a.weight", "b")}, files[0])
    save_file({name: values[name] for name in ("é", "empty", "scalar")}, files[1])
    weight_map = {"a.weight": files[0].name, "b": files[0].name}
    weight_map |= dict.fromkeys(("é", "empty", "scalar"), files[1].name)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}, ensure_ascii=False).encode()
    index = tmp_path / "model.safetensors.index.json"
    chance = random.Random(3)
    accepted = 0
    for _ in range(1500):
        index.unlink(missing_ok=True)
        index.write_bytes(mutate(text, chance))
        accepted += check(tmp_path, files)
    assert 20 < accepted < 1000
