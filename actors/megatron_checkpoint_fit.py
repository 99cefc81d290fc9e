"""Whether a torch_dist checkpoint fits the models of all ranks, before anything of it is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_STATE = ("optimizer.", "chained_")
"""Beginnings of the keys that hold optimizer state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """What a rank would load: by key the global shape, and the keys whose padding may differ.

    Padded are the rows, of an embedding's A the columns.
    """

    shapes: Mapping[str, tuple[int, ...]]
    padded: frozenset[str]


def _sharded(state: Any) -> Iterator[ShardedTensor]:
    match state:
        case ShardedTensor():
            yield state
        case dict():
            for value in state.values():
                yield from _sharded(value)
        case list():
            for value in state:
                yield from _sharded(value)
        case dist_checkpointing.mapping.ShardedTensorFactory():
            yield from _sharded(state.build())
        case _:
            return


def _wanted(state: Mapping[str, Any]) -> _Wanted:
    tensors = list(_sharded(dict(state)))
    return _Wanted(
        shapes={tensor.key: tuple(tensor.global_shape) for tensor in tensors},
        padded=frozenset(tensor.key for tensor in tensors if tensor.allow_shape_mismatch),
    )


def _stored_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def mismatches(
    folder: Path,
    metadata: Metadata,
    state: Mapping[str, Any],
    ignored: Sequence[str],
    *,
    with_optimizer: bool,
) -> str | None:
    """Everything that keeps the checkpoint from being loaded into the models of all ranks, or None."""
    stored = _stored_shapes(metadata)
    wanted = _wanted(state)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, wanted)
    shapes = {key: shape for each in everyone for key, shape in each.shapes.items()}
    padded = {key for each in everyone for key in each.padded}
    skipped = (*ignored, *(() if with_optimizer else _STATE))
    if with_optimizer and not any(key.startswith(_STATE) for key in stored):
        return f"{folder} has no optimizer state; load it without, or save with it"
    lines = [f"missing: {key} {list(shape)}" for key, shape in shapes.items() if key not in stored]
    lines += [
        f"unexpected: {key} {list(shape)}"
        for key, shape in stored.items()
        if key not in shapes and not key.startswith(skipped)
    ]
    lines += [
        f"{key} is {list(stored[key])} in the checkpoint, {list(shape)} in the model"
        for key, shape in shapes.items()
        if key in stored and not _fits(stored[key], shape, key in padded)
    ]
    if lines:
        return f"{folder} does not fit the model:\n  " + "\n  ".join(sorted(lines))
    return _truncated(folder, metadata)


def _fits(stored: tuple[int, ...], shape: tuple[int, ...], padded: bool) -> bool:
    return stored == shape or (
        padded and len(stored) == len(shape) and (stored[1:] == shape[1:] or stored[:-1] == shape[:-1])
    )


def _truncated(folder: Path, metadata: Metadata) -> str | None:
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    lines: list[str] = []
    for file, end in sorted(ends.items()):
        path = folder / file
        if not path.is_file():
            lines.append(f"{path} is missing")
        elif path.stat().st_size < end:
            lines.append(f"{path} is truncated: {path.stat().st_size} bytes of {end}")
    return "\n".join(lines) or None


@torch.no_grad()
def clear_new_padding(state: Mapping[str, Any], metadata: Metadata) -> None:
    """Zeros for the part of a padded vocabulary that the checkpoint does not have."""
    # Megatron leaves rows that the checkpoint does not have as they are: here that is unwritten memory.
    stored = _stored_shapes(metadata)
    for tensor in _sharded(dict(state)):
        if (
            tensor.data is not None
            and tensor.allow_shape_mismatch
            and stored[tensor.key] != tuple(tensor.global_shape)
        ):
            tensor.data.zero_()
