"""The files around the weights of a checkpoint directory: config, tokenizer, templates, code."""

from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".distcp", "index.json")
# What a Megatron checkpoint directory has besides.
_MEGATRON = (".metadata", "bascule.json", "latest_checkpointed_iteration.txt", "metadata.json")


def side_files(directory: Path) -> list[Path]:
    """Those files of a directory, in order of their names; no weights, and nothing of Megatron's."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _MEGATRON
    ]
