"""One safetensors file: a strict reading of its header, and reads straight into memory.

The format: eight bytes (little-endian) that give the length of a JSON header, the header, then the data, where
`data_offsets` count from the end of the header. The reader is our own because the library keeps its file
mapped and copies slices, and accepts repeated names.
"""

import errno
import json
import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.layouts import Region, Shape, region_numel, region_of, region_shape
from bridge.plan import TensorInfo
from configs.errors import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The format's names of types."""
CHUNK_BYTES = 16 << 20
"""Most bytes that are held beside a tensor while it is read or written with a conversion."""

# Runs shorter than this are copied out of the page cache: a call for each would take longer than its bytes.
_SHORT_RUN = 64 << 10
_WINDOW_BYTES = 8 << 20
# What the system maps in one piece where it can.
_ALIGNMENT = 2 << 20
# Linux's number, which the mmap module does not have.
_MADV_POPULATE_READ = 22
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_BYTES = 1 << 63


class CheckpointError(ConfigError):
    """A checkpoint cannot be read. Names the file and the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as it is in a file, and where in the file its data begins, in bytes."""

    info: TensorInfo
    offset: int


class SafetensorsFile:
    """An open file: `tensors` from its header, in the order of their data. The caller closes it."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError naming the file and listing all that is wrong with its header."""
        self._path = path
        self._descriptor = _open(path)
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str, region: Region, out: memoryview) -> int:
        """Fill `out` with the region's bytes; returns how many they are."""
        return sum(stop - start for start, stop in self.steps(name, region, out, len(out)))

    def steps(self, name: str, region: Region, out: memoryview, step_bytes: int) -> Iterator[tuple[int, int]]:
        """The same, giving [start, stop) of `out` as soon as it is filled: few enough bytes to be looked at again
        while the processor has them at hand.
        """
        stored = self.tensors[name]
        offsets, size = runs(region, stored.info.shape, stored.info.dtype.itemsize)
        if len(offsets) > 1 and size < _SHORT_RUN:
            yield from self._copy_windows(stored, region, out)
            return
        for number, offset in enumerate(offsets):
            for at in range(0, size, step_bytes):
                start, stop = number * size + at, number * size + min(at + step_bytes, size)
                self._fill(out[start:stop], stored.offset + offset + at)
                yield start, stop

    def close(self) -> None:
        """Close the file; it cannot be read afterwards."""
        os.close(self._descriptor)

    def _copy_windows(
        self, stored: StoredTensor, region: Region, out: memoryview
    ) -> Iterator[tuple[int, int]]:
        """A region of many short runs, through mappings of a few megabytes each."""
        shape, itemsize = stored.info.shape, stored.info.dtype.itemsize
        # So many elements of the region that what lies between them fits the window, too.
        most = _WINDOW_BYTES // itemsize * region_numel(region[1:]) // math.prod(shape[1:])
        start = 0
        for box in boxes(region, max(1, most)):
            stop = start + region_numel(box) * itemsize
            self._copy_window(stored, box, out[start:stop])
            yield start, stop
            start = stop

    def _copy_window(self, stored: StoredTensor, box: Region, out: memoryview) -> None:
        shape, itemsize = stored.info.shape, stored.info.dtype.itemsize
        strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
        first = stored.offset + sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
        last = stored.offset + sum(
            (stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True)
        )
        window, start = self._map(first, last + itemsize)
        *rows, columns = region_shape(box)
        sides = (*rows, columns * itemsize)
        values = np.ndarray(sides, np.uint8, window, start, (*strides[:-1], 1))
        np.copyto(np.frombuffer(out, np.uint8).reshape(sides), values)

    def _map(self, start: int, stop: int) -> tuple[mmap.mmap, int]:
        """The bytes of the file in memory, read in, and where in the mapping they begin."""
        begin = start // _ALIGNMENT * _ALIGNMENT
        try:
            window = mmap.mmap(
                self._descriptor, stop - begin, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=begin
            )
        except ValueError as error:
            raise CheckpointError(
                f"{self._path}: ends before byte {stop}; it has shrunk since it was opened"
            ) from error
        try:
            window.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            # Before 5.14 Linux did not have it; the copy then reads what is not there yet.
            if error.errno != errno.EINVAL:
                raise CheckpointError(
                    f"{self._path}: {error.strerror} between bytes {begin} and {stop}"
                ) from error
        return window, start - begin

    def _fill(self, out: memoryview, offset: int) -> None:
        while out:
            try:
                count = os.preadv(self._descriptor, [out], offset)
            except OSError as error:
                raise CheckpointError(f"{self._path}: {error.strerror} at byte {offset}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self._path}: ends at byte {offset}; it has shrunk since it was opened"
                )
            out, offset = out[count:], offset + count

    def _read_header(self) -> Mapping[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        if size < 8:
            raise CheckpointError(f"{self._path}: truncated: {size} bytes hold no safetensors header")
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{self._path}: not safetensors: a header of {length} bytes, more than {_MAX_HEADER}"
            )
        if 8 + length > size:
            raise CheckpointError(f"{self._path}: truncated: a header of {length} bytes in a file of {size}")
        text = bytearray(length)
        self._fill(memoryview(text), 8)
        return _tensors(self._path, parse_json(self._path, bytes(text)), 8 + length, size)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises CheckpointError naming the file."""
    # JSON tells -0 from 0, and the format wants non-negative integers: a float is refused as no integer.
    integer = _integer if b"-0" in text else None
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_int=integer)
        if b"\\u" in text:
            # Half a surrogate pair is no name; this raises a ValueError.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def runs(region: Region, shape: Shape, itemsize: int) -> tuple[Sequence[int], int]:
    """Where a region's contiguous runs begin within its tensor, in row-major order, and their size: in bytes."""
    assert len(region) == len(shape), (region, shape)
    if region[1:] == region_of(shape[1:]):
        # Rows, or everything: what is asked for most.
        row = math.prod(shape[1:]) * itemsize
        start, stop = region[0] if region else (0, 1)
        assert 0 <= start <= stop <= (shape[0] if region else 1), (region, shape)
        return ((start * row,), (stop - start) * row) if row and start < stop else ((), 0)
    assert all(0 <= a <= b <= size for (a, b), size in zip(region, shape, strict=True)), (region, shape)
    if region_numel(region) == 0:
        return (), 0
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    partial = [dim for dim, side in enumerate(region) if side != (0, shape[dim])]
    inner = partial[-1] if partial else 0
    size = math.prod(region_shape(region)[inner:]) * itemsize
    first = sum(start * stride for (start, _), stride in zip(region[inner:], strides[inner:], strict=True))
    leading = [
        range(start * stride, stop * stride, stride)
        for (start, stop), stride in zip(region[:inner], strides[:inner], strict=True)
    ]
    return [first + sum(starts) for starts in product(*leading)], size


def boxes(region: Region, max_numel: int) -> Iterator[Region]:
    """The region in row-major order as boxes of at most `max_numel` elements (which is positive)."""
    numel = region_numel(region)
    if numel <= max_numel:
        yield region
        return
    dim = next(dim for dim, (start, stop) in enumerate(region) if stop - start > 1)
    start, stop = region[dim]
    step = max(1, max_numel * (stop - start) // numel)
    for at in range(start, stop, step):
        yield from boxes((*region[:dim], (at, min(at + step, stop)), *region[dim + 1 :]), max_numel)


def as_bytes(t: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    # numpy does not know all types. Its own views take a quarter of the time of torch's.
    return t.detach().view(_INTEGERS[t.itemsize]).numpy().reshape(-1).view(np.uint8).data


def _open(path: Path) -> int:
    try:
        # A named pipe would block the open, so the kind of file is asked first.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        what = f"a symlink to {path.readlink()}, which" if path.is_symlink() else "the file"
        raise CheckpointError(f"{path}: {what} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {counts.most_common(1)[0][0]!r} is there twice")
    return found


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _tensors(path: Path, header: dict[str, Any], start: int, size: int) -> Mapping[str, StoredTensor]:
    """The header's tensors by place, where `start` is the end of the header and `size` that of the file."""
    problems: list[str] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ does not map strings to strings")
    found: list[StoredTensor] = []
    for name, entry in header.items():
        problem = _problem(entry)
        if problem:
            problems.append(f"{name}: {problem}")
        else:
            info = TensorInfo(name=name, dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))
            found.append(StoredTensor(info=info, offset=start + entry["data_offsets"][0]))
    found.sort(key=lambda stored: (stored.offset, stored.info.nbytes))
    if not problems:
        problems = _gaps(found, start, size)
    if problems:
        raise CheckpointError("\n  ".join(f"{path}: {problem}" for problem in problems))
    return {stored.info.name: stored for stored in found}


def _problem(entry: Any) -> str | None:
    """What is wrong with a tensor's entry in the header, by itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "its entry is not an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has type {dtype}; known: {', '.join(DTYPES)}"
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return f"has shape {shape} and data_offsets {offsets}; both are non-negative integers, the latter two"
    itemsize = DTYPES[dtype].itemsize
    nbytes = math.prod(shape) * itemsize
    # Strides are computed even where a dimension of size zero leaves no elements.
    if (nbytes or math.prod(max(side, 1) for side in shape) * itemsize) >= _MAX_BYTES:
        return f"has shape {shape}, which no memory holds"
    if offsets[1] - offsets[0] != nbytes:
        return f"has data_offsets {offsets}, but {dtype} of shape {shape} takes {nbytes} bytes"
    return None


def _are_sizes(value: Any) -> bool:
    # A bool is an int to isinstance, and no size.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _gaps(found: Sequence[StoredTensor], start: int, size: int) -> list[str]:
    """Where the tensors, by place, overlap or leave bytes out between the header and the file's end."""
    problems: list[str] = []
    expected, before = start, "the header"
    for stored in found:
        name = stored.info.name
        if stored.offset < expected:
            problems.append(f"{name}: its data overlaps with {before}'s by {expected - stored.offset} bytes")
        if stored.offset > expected:
            problems.append(f"{name}: {stored.offset - expected} bytes before its data belong to no tensor")
        stop = stored.offset + stored.info.nbytes
        if stop > expected:
            expected, before = stop, name
    if expected > size:
        problems.append(f"truncated: {before} ends at byte {expected}, the file has {size}")
    elif expected < size:
        problems.append(f"{size - expected} bytes after {before} belong to no tensor")
    return problems
