"""Hugging Face checkpoints in: an index, safetensors files, and reads of any region of their tensors."""

import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from bridge.adapter_config import ADAPTER_CONFIG
from bridge.layouts import Region, region_shape, relative, slices
from bridge.plan import TensorInfo
from bridge.quantized import Quantized, find_quantized, weight_block_size
from bridge.safetensors_file import (
    CHUNK_BYTES,
    CheckpointError,
    SafetensorsFile,
    as_bytes,
    boxes,
    parse_json,
)
from configs.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# By the size of a type, in every value of eight bytes: set in what is 2 or more, infinite or NaN.
_HIGHEST_EXPONENT_BIT = {2: 0x4000_4000_4000_4000, 4: 0x4000_0000_4000_0000, 8: 0x4000_0000_0000_0000}
# What fits a processor's own cache.
_STEP_BYTES = 1 << 20
# Dequantizing takes about ten times the memory of its result.
_QUANTIZED_CHUNK = CHUNK_BYTES // 10


def resolve_model(model: str, option: str = "model.model") -> Path:
    """The directory of a model: itself, or the hub's snapshot where the hub can be reached.

    Raises ConfigError naming the `option` that the model came from.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / ADAPTER_CONFIG).is_file()
            hint = "; it is an adapter: give its model here, and it as --adapters" if adapter else ""
            raise ConfigError(f"{option}: {path} has no config.json{hint}")
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


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum is not finite when an element is not, and is twenty times faster than a mask; it may also overflow.
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _below_two(data: memoryview, itemsize: int) -> bool:
    """Whether all these floats are known to be: weights mostly are, and finding that out is faster than a sum."""
    if len(data) % 8:
        return False
    return not int(np.bitwise_or.reduce(np.frombuffer(data, np.uint64))) & _HIGHEST_EXPONENT_BIT[itemsize]


class CheckpointReader:
    """The tensors of a checkpoint directory, each file opened once. Use as a context manager.

    With an index it reads the files that the index names, else `model.safetensors`. Quantized tensors are
    presented as the BF16 tensors that they stand for, without their scales (see bridge.quantized).
    """

    def __init__(self, directory: Path, file: str | None = None) -> None:
        """Reads the index and the headers; with a name, only those of this file.

        Raises CheckpointError listing all that is wrong with them.
        """
        self.directory = directory
        self.bytes_read = 0
        """Bytes of tensors read so far."""
        self.not_finite: set[str] = set()
        """Names of tensors with NaN or infinities among the values that were read."""
        self._lock = threading.Lock()
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._files, problems = _open_files(directory, file)
            self._file_of = {name: file for file, opened in self._files.items() for name in opened.tensors}
            self._quantized, wrong = self._find_quantized(directory)
            _raise_any(directory, [*problems, *wrong])
        except BaseException:
            self.close()
            raise
        presented = {quantized.parts[0]: quantized.info for quantized in self._quantized.values()}
        hidden = {quantized.parts[1] for quantized in self._quantized.values()}
        infos = [presented.get(name, self._stored(name)) for name in self._file_of if name not in hidden]
        self.tensors: Mapping[str, TensorInfo] = {
            info.name: info for info in infos if info.dtype in _WEIGHT_DTYPES
        }
        """The weights, in the order of files and of data in them."""
        self.others: Mapping[str, TensorInfo] = {
            info.name: info for info in infos if info.dtype not in _WEIGHT_DTYPES
        }
        """Tensors of other types than floats of 16 bits and more; `read` gives them as they are."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors as they are stored."""
        return sum(
            stored.info.nbytes for opened in self._files.values() for stored in opened.tensors.values()
        )

    @property
    def quantized(self) -> bool:
        """Whether a tensor is presented in another type than it is stored in."""
        return bool(self._quantized)

    def position(self, name: str) -> tuple[str, int]:
        """File of a tensor and where its data begins there; reads in this order go forward on the disk."""
        stored_name = self._quantized[name].parts[0] if name in self._quantized else name
        file = self._file_of[stored_name]
        return file, self._files[file].tensors[stored_name].offset

    def read(self, name: str, region: Region) -> torch.Tensor:
        """One region of a tensor, in the type that `tensors` tells, on CPU."""
        info = self.tensors[name] if name in self.tensors else self.others[name]
        out = torch.empty(region_shape(region), dtype=info.dtype)
        self.read_into(name, region, out)
        return out

    def read_into(self, name: str, region: Region, out: torch.Tensor) -> None:
        """Fill `out`, of the region's shape and any type, strides and device.

        A contiguous CPU tensor of the stored type is filled by the system itself; any other by way of a buffer of
        at most CHUNK_BYTES.
        """
        assert out.shape == region_shape(region), (name, region, out.shape)
        if name in self._quantized:
            out = out.detach()
            quantized = self._quantized[name]
            for box in quantized.boxes(region, _QUANTIZED_CHUNK // quantized.info.dtype.itemsize):
                values = quantized.dequantize(self._read_stored, box)
                if not all_finite(values):
                    self.not_finite.add(name)
                out[slices(relative(box, region))].copy_(values)
            return
        dtype = self._stored(name).dtype
        if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
            self._fill(name, region, out)
            return
        out = out.detach()
        for box in boxes(region, CHUNK_BYTES // dtype.itemsize):
            out[slices(relative(box, region))].copy_(self._read_stored(name, box))

    def close(self) -> None:
        """Close the files."""
        for opened in self._files.values():
            opened.close()
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stored(self, name: str) -> TensorInfo:
        return self._files[self._file_of[name]].tensors[name].info

    def _read_stored(self, name: str, region: Region) -> torch.Tensor:
        out = torch.empty(region_shape(region), dtype=self._stored(name).dtype)
        self._fill(name, region, out)
        return out

    def _fill(self, name: str, region: Region, out: torch.Tensor) -> None:
        data, itemsize, finite = as_bytes(out), out.itemsize, True
        for start, stop in self._files[self._file_of[name]].steps(name, region, data, _STEP_BYTES):
            # Now, while the processor still has them at hand: later it takes as long as reading them again.
            if out.dtype in _WEIGHT_DTYPES and not _below_two(data[start:stop], itemsize):
                finite = finite and all_finite(out.view(-1)[start // itemsize : stop // itemsize])
        with self._lock:
            self.bytes_read += len(data)
            if not finite:
                self.not_finite.add(name)

    def _find_quantized(self, directory: Path) -> tuple[dict[str, Quantized], list[str]]:
        """Quantized tensors, and what is wrong with some."""
        try:
            block = weight_block_size(directory)
        except CheckpointError as error:
            return {}, [str(error)]
        found, wrong = find_quantized({name: self._stored(name) for name in self._file_of}, block)
        return found, [f"{directory / self._file_of[name]}: {problem}" for name, problem in wrong.items()]


def check_files(directory: Path) -> None:
    """Raises CheckpointError listing all that is wrong with the index and the headers of the files.

    Unlike a CheckpointReader it does not ask what the tensors are, or how they are quantized.
    """
    files, problems = _open_files(directory)
    for opened in files.values():
        opened.close()
    _raise_any(directory, problems)


def _open_files(directory: Path, file: str | None = None) -> tuple[dict[str, SafetensorsFile], list[str]]:
    """What can be opened, and what is wrong with the rest."""
    index = directory / INDEX
    # A broken symlink is an index all the same, and an error when it is read.
    indexed = file is None and os.path.lexists(index)
    listed, problems = (
        _read_index(index) if indexed else ({file or _single(directory): set[str]()}, list[str]())
    )
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(listed):
        try:
            files[name] = SafetensorsFile(directory / name)
        except CheckpointError as error:
            problems.append(str(error))
    if indexed:
        problems += _differences(index, listed, files)
    return files, problems


def _raise_any(directory: Path, problems: Sequence[str]) -> None:
    if problems:
        lines = [f"{directory} cannot be read as a checkpoint:", *problems]
        raise CheckpointError("\n  ".join(lines))


def _single(directory: Path) -> str:
    """The file of a checkpoint without an index."""
    if not os.path.lexists(directory / SINGLE):
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        have = f"{', '.join(others)} but" if others else "no safetensors files,"
        raise CheckpointError(f"{directory} has {have} neither {SINGLE} nor {INDEX}; it needs one of the two")
    return SINGLE


def _read_index(path: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Files and the names of the tensors in each, and what is wrong with the rest."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    weight_map = parse_json(path, text).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: has no weight_map from tensors to files")
    listed: dict[str, set[str]] = {}
    problems: list[str] = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\0" in file:
            problems.append(f"{path}: {name} is said to be in {file!r}, which is no file name")
        elif file in ("", "..") or Path(file).name != file:
            problems.append(f"{path}: {name} is said to be in {file!r}, outside the directory")
        else:
            listed.setdefault(file, set()).add(name)
    return listed, problems


def _differences(
    index: Path, listed: Mapping[str, set[str]], files: Mapping[str, SafetensorsFile]
) -> Sequence[str]:
    """Where the index and the headers of the files disagree. A file that could not be opened is left out."""
    problems: list[str] = []
    home = {name: file for file, names in listed.items() for name in names}
    for file, opened in files.items():
        path = index.parent / file
        missing = sorted(listed[file] - opened.tensors.keys())
        if missing:
            problems.append(f"{path}: does not have {', '.join(missing)}, which {index.name} places there")
        for name in opened.tensors:
            if name not in home:
                problems.append(f"{path}: has {name}, which {index.name} does not list")
            elif home[name] != file:
                problems.append(f"{path}: has {name}, which {index.name} places in {home[name]}")
    return problems
