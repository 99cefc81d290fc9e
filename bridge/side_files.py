"""The files around the weights of a checkpoint directory: config, tokenizer, templates, code."""

import json
import shutil
from pathlib import Path

import torch

from bridge.safetensors_file import parse_json
from configs.errors import WriteError

LATEST = "latest_checkpointed_iteration.txt"
METADATA = "metadata.json"
SOURCE_INDEX = "bascule.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".distcp", "index.json")
# What a Megatron checkpoint directory has besides.
_MEGATRON = (".metadata", SOURCE_INDEX, LATEST, METADATA)


def side_files(directory: Path) -> list[Path]:
    """Those files of a directory, in order of their names; no weights, and nothing of Megatron's."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _MEGATRON
    ]


def copy_side_files(source: Path, directory: Path) -> list[str]:
    """Copy everything but weights (config, tokenizer, templates, code) into `directory`; returns the names.

    Raises WriteError naming the file that cannot be copied.
    """
    paths = side_files(source)
    for path in paths:
        try:
            shutil.copyfile(path, directory / path.name)
        except OSError as error:
            raise WriteError(f"{path}: cannot be copied to {directory}: {error.strerror}") from error
    return [path.name for path in paths]


def adapt_config(path: Path, dtype: torch.dtype | None, *, quantized: bool) -> None:
    """Let a config.json say what the tensors are: their main `dtype`, where given, and whether still `quantized`.

    Where that is what it says already it stays as it is, byte for byte.
    """
    config = parse_json(path, path.read_bytes())
    before = dict(config)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and config.get("dtype", config.get("torch_dtype")) != name:
        config.pop("torch_dtype", None)
        config["dtype"] = name
    if not quantized:
        config.pop("quantization_config", None)
    if config != before:
        path.write_text(json.dumps(config, indent=2) + "\n")
