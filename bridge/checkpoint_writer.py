"""Hugging Face checkpoints out: every rank writes its own ranges of preallocated safetensors files."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bridge.checkpoint import INDEX, SINGLE
from bridge.layouts import Region, region_shape, relative, slices
from bridge.plan import TensorInfo
from bridge.safetensors_file import CHUNK_BYTES, DTYPES, CheckpointError, as_bytes, boxes, parse_json, runs
from bridge.side_files import side_files

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KEY_FILE = "contents"
_JOURNAL = "written."


class CheckpointWriter:
    """Writes a checkpoint from many ranks into `directory`.partial, which `finish` renames into place.

    One rank calls `prepare`. Then every rank calls `write` with its regions, and `close`. Then one calls `finish`,
    which replaces `directory`. Needs a file system that the ranks share.

    A save with a `key` can be continued when it was interrupted: `commit` notes what a rank is done with,
    `pending` says what is left. Without one `commit` does nothing and everything is always pending.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[TensorInfo],
        max_shard_size: int = 5 << 30,
        *,
        rank: int = 0,
        key: str | None = None,
    ) -> None:
        """All ranks give the same arguments but for `rank`: `tensors` in their order fix every byte's place.

        `key` says which values are written and by whom (source, step, layout). An interrupted save is continued
        only by one of the same key, so that no checkpoint mixes two states of a model.
        """
        # A symlink is followed, so that the rename replaces the directory it leads to.
        self._directory = Path(os.path.realpath(directory))
        self._partial = self._directory.with_name(self._directory.name + ".partial")
        self._files = _split(tensors, max_shard_size)
        self._headers = {file: _header(infos) for file, infos in self._files.items()}
        self._places = {info.name: (file, info) for file, infos in self._files.items() for info in infos}
        self._descriptors: dict[str, int] = {}
        self._rank = rank
        self._key = key

    def prepare(self) -> None:
        """Create the files at their final size, headers written, or keep those of a save that is continued.

        Raises CheckpointError, and leaves nothing, when the disk does not hold them.
        """
        if self._can_continue():
            return
        with _naming(self._partial):
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        try:
            for file in self._files:
                self._create(file)
            with _naming(self._partial):
                if len(self._files) > 1:
                    self._write_index()
                if self._key is not None:
                    # Last: without it nothing is continued.
                    (self._partial / _KEY_FILE).write_bytes(self._key.encode())
        except CheckpointError:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def write(self, name: str, region: Region, value: torch.Tensor) -> None:
        """Put a value of the region's shape, on any device, into the file, cast to the tensor's type."""
        assert tuple(value.shape) == region_shape(region), (name, region, value.shape)
        file, info = self._places[name]
        start = self._headers[file][1][name]
        value = value.detach()
        for box in boxes(region, CHUNK_BYTES // info.dtype.itemsize):
            part = value[slices(relative(box, region))].to("cpu", info.dtype).contiguous()
            offsets, size = runs(box, info.shape, info.dtype.itemsize)
            if not offsets:
                continue
            data = as_bytes(part)
            with _naming(self._partial / file, name):
                descriptor = self._descriptor(file)
                for number, offset in enumerate(offsets):
                    _write_all(descriptor, data[number * size : (number + 1) * size], start + offset)

    def commit(self, names: Iterable[str]) -> None:
        """Note that this rank has written its part of the tensors; first everything it wrote goes to disk.

        Waiting for the disk takes its time: commit once for hundreds of megabytes.
        """
        if self._key is None:
            return
        self._sync()
        lines = "".join(f"{json.dumps(name)}\n" for name in names)
        with _naming(self._journal), self._journal.open("a") as stream:
            stream.write(lines)

    @property
    def can_continue(self) -> bool:
        """Whether commits are noted, so that an interrupted save can be continued."""
        return self._key is not None

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors that this rank has not committed."""
        if self._key is None or not self._journal.exists():
            return list(names)
        with _naming(self._journal):
            # A line that was cut off names nothing, and its tensor is written again.
            written = set(self._journal.read_text().splitlines())
        return [name for name in names if json.dumps(name) not in written]

    def close(self) -> None:
        """What this rank wrote goes to disk, and its files are closed. May be called again."""
        self._sync()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def finish(self, source: Path | None, dequantized: bool = False) -> None:
        """Add config, tokenizer and templates from `source`, then rename the whole into place.

        The config's dtype becomes that of most bytes; of a `dequantized` source it loses the quantization.
        """
        self.close()
        with _naming(self._directory):
            if source is not None:
                for path in side_files(source):
                    shutil.copyfile(path, self._partial / path.name)
                _adapt_config(self._partial / "config.json", self._main_dtype(), dequantized)
            for path in [self._partial / _KEY_FILE, *self._partial.glob(f"{_JOURNAL}*")]:
                path.unlink(missing_ok=True)
            for path in [*self._partial.iterdir(), self._partial]:
                _sync_path(path)
            self._put_in_place()

    @property
    def _journal(self) -> Path:
        return self._partial / f"{_JOURNAL}{self._rank}"

    def _put_in_place(self) -> None:
        old = self._directory.with_name(self._directory.name + ".old")
        if self._directory.exists():
            # Only now: after an interruption between the renames `old` is the one whole checkpoint.
            shutil.rmtree(old, ignore_errors=True)
            self._directory.rename(old)
        self._partial.rename(self._directory)
        _sync_path(self._directory.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _can_continue(self) -> bool:
        key = self._partial / _KEY_FILE
        if self._key is None or not key.is_file() or key.read_bytes() != self._key.encode():
            return False
        return all(self._is_prepared(file) for file in self._files)

    def _is_prepared(self, file: str) -> bool:
        path, header = self._partial / file, self._headers[file][0]
        if not path.is_file() or path.stat().st_size != self._size(file):
            return False
        with path.open("rb") as stream:
            return stream.read(len(header)) == header

    def _size(self, file: str) -> int:
        return len(self._headers[file][0]) + sum(info.nbytes for info in self._files[file])

    def _create(self, file: str) -> None:
        path = self._partial / file
        with _naming(path), path.open("wb") as stream:
            stream.write(self._headers[file][0])
            stream.flush()
            # Reserved now, so that a full disk is an error here and not in the middle of the save.
            os.posix_fallocate(stream.fileno(), 0, self._size(file))

    def _write_index(self) -> None:
        total = sum(info.nbytes for _, info in self._places.values())
        weight_map = {name: file for name, (file, _) in self._places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._partial / file, os.O_WRONLY | os.O_CLOEXEC)
        return self._descriptors[file]

    def _sync(self) -> None:
        for file, descriptor in self._descriptors.items():
            with _naming(self._partial / file):
                os.fdatasync(descriptor)

    def _main_dtype(self) -> torch.dtype:
        nbytes: Counter[torch.dtype] = Counter()
        for _, info in self._places.values():
            nbytes[info.dtype] += info.nbytes
        return nbytes.most_common(1)[0][0]


@contextmanager
def _naming(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turns errors of the operating system into CheckpointError that names the file and the tensor."""
    try:
        yield
    except OSError as error:
        what = f"{path}: {tensor}" if tensor else str(path)
        raise CheckpointError(f"{what}: cannot be written: {error}") from error


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(tensors: Sequence[TensorInfo], max_shard_size: int) -> dict[str, list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _header(tensors: Sequence[TensorInfo]) -> tuple[bytes, Mapping[str, int]]:
    """The bytes before the data, and where in the file each tensor starts."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Larger types first keeps every tensor aligned to its own type.
    for info in sorted(tensors, key=lambda info: -info.dtype.itemsize):
        stop = offset + info.nbytes
        entries[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": (offset, stop),
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {info.name: len(header) + entries[info.name]["data_offsets"][0] for info in tensors}
    return header, starts


def _adapt_config(path: Path, dtype: torch.dtype, dequantized: bool) -> None:
    """Leaves the file alone, byte for byte, where it already says what is true."""
    config = parse_json(path, path.read_bytes())
    before = dict(config)
    name = str(dtype).removeprefix("torch.")
    if config.get("dtype", config.get("torch_dtype")) != name:
        config.pop("torch_dtype", None)
        config["dtype"] = name
    if dequantized:
        config.pop("quantization_config", None)
    if config != before:
        path.write_text(json.dumps(config, indent=2) + "\n")
