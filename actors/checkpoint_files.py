"""The files of a Megatron checkpoint directory beside the tensors; no Megatron here.

DIR/latest_checkpointed_iteration.txt names DIR/iter_0000001/, which dist_checkpointing wrote; that is the form
of Megatron-LM. Beside it lie the Hugging Face directory's small files and bascule.json, what its tensors were.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.safetensors_file import DTYPES
from bridge.side_files import LATEST, METADATA, SOURCE_INDEX
from configs.errors import ConfigError

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTensor:
    """One tensor of the Hugging Face checkpoint that a Megatron checkpoint stands for."""

    name: str
    dtype: str
    """As safetensors names it: F32, BF16 and so on."""
    shape: tuple[int, ...]


def iteration_name(iteration: int) -> str:
    """Megatron-LM's name of an iteration's directory."""
    return f"iter_{iteration:07d}"


def find_iteration(directory: Path) -> Path:
    """The directory that holds metadata.json: `directory` itself, or the iteration it calls the latest.

    Raises ConfigError naming what is missing.
    """
    if (directory / METADATA).is_file():
        return directory
    tracker = directory / LATEST
    if not tracker.is_file():
        raise ConfigError(
            f"{directory} is not a Megatron checkpoint: it has neither {LATEST} nor {METADATA}"
            + ("" if directory.is_dir() else "; there is no such directory")
        )
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise ConfigError(f"{tracker}: holds {text[:40]!r}; it should hold an iteration number or `release`")
    found = directory / (text if text == "release" else iteration_name(int(text)))
    if not (found / METADATA).is_file():
        raise ConfigError(
            f"{found} is not a torch_dist checkpoint: it has no {METADATA}, though {tracker} names it"
        )
    return found


def checkpoint_root(directory: Path) -> Path:
    """Where the Hugging Face files and bascule.json are, given DIR or one of its iterations."""
    is_iteration = (directory / METADATA).is_file() and (directory.parent / LATEST).is_file()
    return directory.parent if is_iteration and not (directory / "config.json").is_file() else directory


def write_latest(directory: Path, iteration: int) -> None:
    """Make `iteration` the one that is loaded, in one step."""
    partial = directory / f"{LATEST}.partial"
    partial.write_text(f"{iteration}\n")
    partial.replace(directory / LATEST)


def write_source_index(directory: Path, tensors: Sequence[SourceTensor]) -> None:
    """Write bascule.json, so that an export back to Hugging Face has the same names and types."""
    rows = {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in tensors}
    partial = directory / f"{SOURCE_INDEX}.partial"
    partial.write_text(json.dumps({"format": _FORMAT, "tensors": rows}, indent=1) + "\n")
    partial.replace(directory / SOURCE_INDEX)


def read_source_index(directory: Path) -> list[SourceTensor] | None:
    """The tensors that bascule.json lists, in its order; None when there is no such file.

    Raises ConfigError naming the file and the tensor.
    """
    path = directory / SOURCE_INDEX
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"{path}: not of format {_FORMAT}; remove it to export with the family's own names")
    rows = content.get("tensors")
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{path}: `tensors` should be a mapping with an entry for each tensor")
    return [_source_tensor(path, name, row) for name, row in rows.items()]


def _source_tensor(path: Path, name: str, row: Any) -> SourceTensor:
    if not isinstance(row, Mapping) or set(row) != {"dtype", "shape"}:
        raise ConfigError(f"{path}: {name} should have dtype and shape, and nothing else")
    dtype, shape = row["dtype"], row["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"{path}: {name} has dtype {dtype!r}; it is one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ConfigError(f"{path}: {name} has shape {shape!r}; wanted a list of sizes")
    return SourceTensor(name=name, dtype=dtype, shape=tuple(shape))
