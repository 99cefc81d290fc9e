"""Hugging Face checkpoints out: every rank writes its own ranges of preallocated safetensors files."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bridge.checkpoint import INDEX, SINGLE, CheckpointReader
from bridge.layouts import Region, region_shape, relative, slices
from bridge.partial_directory import (
    NOTES,
    check_replaceable,
    make_partial,
    naming,
    partial_of,
    put_in_place,
)
from bridge.plan import TensorInfo, main_dtype
from bridge.safetensors_file import CHUNK_BYTES, DTYPE_NAMES, CheckpointError, as_bytes, boxes, runs
from bridge.side_files import adapt_config, copy_side_files
from configs.errors import WriteError

_KEY_FILE = f"{NOTES}contents"
_JOURNAL = f"{NOTES}written."


class CheckpointWriter:
    """Writes a checkpoint from many ranks into a partial directory, which `finish` renames into place.

    One rank calls `prepare`. Then every rank calls `write` with its regions, and `close`. Then one calls `finish`,
    which replaces `directory` (see bridge.partial_directory). Needs a file system that the ranks share.

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
        file: str = SINGLE,
    ) -> None:
        """All ranks give the same arguments but for `rank`: `tensors` in their order fix every byte's place.

        `file` is what it is called when one file holds them all.

        `key` says which values are written and by whom (source, step, layout). An interrupted save is continued
        only by one of the same key, so that no checkpoint mixes two states of a model.
        """
        # A symlink is followed, so that the rename replaces the directory it leads to.
        self._directory = Path(os.path.realpath(directory))
        self._partial = partial_of(self._directory)
        self._files = _split(tensors, max_shard_size, file)
        self._headers = {file: _header(infos) for file, infos in self._files.items()}
        self._places = {info.name: (file, info) for file, infos in self._files.items() for info in infos}
        self._descriptors: dict[str, int] = {}
        self._rank = rank
        self._key = key

    def prepare(self) -> None:
        """Create the files at their final size, headers written, or keep those of a save that is continued.

        Raises WriteError, and leaves nothing, when the disk does not hold them, and ConfigError when there is
        something that may not be replaced.
        """
        check_replaceable(self._directory)
        if self._is_continued():
            return
        make_partial(self._directory)
        try:
            for file in self._files:
                self._create(file)
            with naming(self._partial):
                if len(self._files) > 1:
                    self._write_index()
                if self._key is not None:
                    # Last: without it nothing is continued.
                    (self._partial / _KEY_FILE).write_bytes(self._key.encode())
        except WriteError:
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
            with naming(self._partial / file, name):
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
        with naming(self._journal), self._journal.open("a") as stream:
            stream.write(lines)

    @property
    def keeps_journal(self) -> bool:
        """Whether commits are noted, so that an interrupted save can be continued."""
        return self._key is not None

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors that this rank has not committed."""
        if self._key is None:
            return list(names)
        written = _committed(self._journal)
        return [name for name in names if json.dumps(name) not in written]

    def close(self) -> None:
        """What this rank wrote goes to disk, and its files are closed. May be called again."""
        self._sync()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def finish(self, source: Path | None, *, dequantized: bool = False, publish: bool = True) -> None:
        """Add config, tokenizer and templates from `source`, then rename the whole into place.

        The config's dtype becomes that of most bytes; of a `dequantized` source it loses the quantization.
        Without `publish` the renaming is left to the caller, and until then the save can still be continued.
        """
        self.close()
        with naming(self._directory):
            if source is not None:
                copy_side_files(source, self._partial)
                written = main_dtype(info for _, info in self._places.values())
                adapt_config(self._partial / "config.json", written, quantized=not dequantized)
            if publish:
                put_in_place(self._directory)

    @property
    def _journal(self) -> Path:
        return self._partial / f"{_JOURNAL}{self._rank}"

    def _is_continued(self) -> bool:
        """Whether the partial directory is that of an interrupted save of the same key, as it was prepared."""
        if self._key is None or not _has_key(self._partial, self._key):
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
        with naming(path), path.open("wb") as stream:
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
            with naming(self._partial / file):
                os.fdatasync(descriptor)


def progress(directory: Path, key: str, ranks: int) -> tuple[int, int] | None:
    """How many tensors an interrupted save has written, and how many it has in all.

    None when there is none of this `key`. A tensor counts when all the `ranks` have committed it.
    """
    partial = partial_of(Path(os.path.realpath(directory)))
    if not _has_key(partial, key):
        return None
    try:
        with CheckpointReader(partial) as reader:
            names = [*reader.tensors, *reader.others]
    except CheckpointError:
        # It was interrupted while it was prepared, and is not continued.
        return None
    journals = [_committed(partial / f"{_JOURNAL}{rank}") for rank in range(ranks)]
    return sum(all(json.dumps(name) in journal for journal in journals) for name in names), len(names)


def _has_key(partial: Path, key: str) -> bool:
    file = partial / _KEY_FILE
    return file.is_file() and file.read_bytes() == key.encode()


def _committed(journal: Path) -> set[str]:
    """The names in a journal, as JSON. A line that was cut off names nothing, so its tensor is written again."""
    if not journal.exists():
        return set()
    with naming(journal):
        return set(journal.read_text().splitlines())


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _split(tensors: Sequence[TensorInfo], max_shard_size: int, single: str) -> dict[str, list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {single: groups[0]}
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
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": (offset, stop),
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {info.name: len(header) + entries[info.name]["data_offsets"][0] for info in tensors}
    return header, starts
