"""Hugging Face checkpoints: safetensors in, by slice; safetensors out, every rank writing its own ranges."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from bridge.layouts import Region, slices
from bridge.plan import TensorInfo
from configs.errors import BasculeError, ConfigError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", "index.json")


class CheckpointError(BasculeError):
    """A checkpoint cannot be read or written. Names the file and the tensor."""


def resolve_model(model: str, option: str = "model.model") -> Path:
    """The directory of a model: itself, or the hub's snapshot where the hub can be reached.

    Raises ConfigError naming the `option` that the model came from.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{option}: {path} has no config.json")
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ConfigError(f"{option}: no directory {model}")
    return _from_hub(model, option)


def _from_hub(model: str, option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{option}: {model} is not a directory, and the hub does not give it: {error}"
        ) from error


class CheckpointReader:
    """The tensors of a checkpoint directory; reads slices, opens each file once. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        """Reads names, types and shapes from the headers. Raises CheckpointError naming the file."""
        self._directory = directory
        self._handles: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, str] = {}
        for file, names in self._contents().items():
            handle = self._open(file)
            for name in names if names is not None else handle.keys():
                self._add(file, name, handle)

    def read(self, name: str, region: Region) -> torch.Tensor:
        """One region of a tensor, in the file's type."""
        return self._handles[self._files[name]].get_slice(name)[slices(region)]

    def _contents(self) -> dict[str, list[str] | None]:
        index = self._directory / _INDEX
        if not index.is_file():
            return {_SINGLE: None}
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files: {error!r}") from error
        files: dict[str, list[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise CheckpointError(f"{index}: {name} is said to be in {file}, outside the directory")
            names = files.setdefault(file, [])
            if names is not None:
                names.append(name)
        return files

    def _open(self, file: str) -> Any:
        path = self._directory / file
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; the directory needs {_SINGLE} or {_INDEX}")
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._handles[file] = handle
        return handle

    def _add(self, file: str, name: str, handle: Any) -> None:
        path = self._directory / file
        try:
            header = handle.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if header.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has type {header.get_dtype()}; supported: {', '.join(DTYPES)}"
            )
        dtype = DTYPES[header.get_dtype()]
        self.tensors[name] = TensorInfo(name=name, dtype=dtype, shape=tuple(header.get_shape()))
        self._files[name] = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()


class CheckpointWriter:
    """Writes a checkpoint from many ranks into `directory`.partial, which `finish` renames into place.

    One rank calls `prepare`; then every rank calls `write` with its regions; then one calls `finish`. Needs a
    file system that the ranks share; mapped writes from several hosts at once (NFS) are untested.
    """

    def __init__(self, directory: Path, tensors: Sequence[TensorInfo], max_shard_size: int = 5 << 30) -> None:
        """All ranks must give the same `tensors` in the same order: it fixes every byte's place."""
        self._directory = directory
        self._partial = directory.with_name(directory.name + ".partial")
        self._files = _split(tensors, max_shard_size)
        self._headers = {file: _header(infos) for file, infos in self._files.items()}
        self._places = {info.name: (file, info) for file, infos in self._files.items() for info in infos}

    def prepare(self) -> None:
        """Create the files at their final size, headers written."""
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        for file, infos in self._files.items():
            header, size = self._headers[file][0], sum(info.nbytes for info in infos)
            with (self._partial / file).open("wb") as stream:
                stream.write(header)
                # Reserved now, so that a full disk is an error here and not a crash of a mapped write.
                os.posix_fallocate(stream.fileno(), 0, len(header) + size)
        if len(self._files) > 1:
            self._write_index()

    def write(self, regions: Iterable[tuple[str, Region, torch.Tensor]]) -> None:
        """Put values (any device, cast to the tensor's type) into regions of tensors."""
        maps: dict[str, torch.Tensor] = {}
        for name, region, value in regions:
            file, info = self._places[name]
            if file not in maps:
                path = self._partial / file
                maps[file] = torch.from_file(
                    str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8
                )
            start = self._headers[file][1][name]
            view = maps[file][start : start + info.nbytes].view(info.dtype).view(info.shape)
            view[slices(region)].copy_(value)

    def finish(self, source: Path) -> None:
        """Add config, tokenizer and templates from `source`, then rename the whole into place."""
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
                shutil.copyfile(path, self._partial / path.name)
        _set_dtype(self._partial / "config.json", next(iter(self._places.values()))[1].dtype)
        old = self._directory.with_name(self._directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self._directory.exists():
            self._directory.rename(old)
        self._partial.rename(self._directory)
        shutil.rmtree(old, ignore_errors=True)

    def _write_index(self) -> None:
        total = sum(info.nbytes for _, info in self._places.values())
        weight_map = {name: file for name, (file, _) in self._places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._partial / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _split(tensors: Sequence[TensorInfo], max_shard_size: int) -> dict[str, list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(info.nbytes for info in groups[-1]) + tensor.nbytes > max_shard_size:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
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
        stop = offset + math.prod(info.shape) * info.dtype.itemsize
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


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
