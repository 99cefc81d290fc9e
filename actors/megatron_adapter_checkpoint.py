"""torch_dist checkpoints of what LoRA trains: adapters and modules_to_save, without the frozen base model.

A and B are stored under their global names and as whole as PEFT has them, so they load under any layout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from actors.megatron_checkpoint import load_state, save_state
from actors.megatron_lora import Adapters, adapters_of, detached
from bridge.lora import Part
from bridge.megatron import EMBEDDING

_KEY = "adapter"


def save_adapter(
    chunks: Sequence[MegatronModule],
    directory: Path,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    iteration: int,
    write_beside: Callable[[], None] = lambda: None,
) -> Path:
    """As save_torch_dist, but only of the parameters that are trained: adapters and modules_to_save."""
    return save_state(
        Trained(chunks),
        directory,
        optimizer=optimizer,
        scheduler=scheduler,
        iteration=iteration,
        write_beside=write_beside,
    )


def load_adapter(
    chunks: Sequence[MegatronModule], directory: Path, *, optimizer: Any = None, scheduler: Any = None
) -> int:
    """Fill adapters and modules_to_save from what save_adapter wrote under any layout; the iteration.

    The adapters must be attached already. Raises like load_torch_dist.
    """
    return load_state(Trained(chunks), directory, optimizer=optimizer, scheduler=scheduler)


class Trained:
    """Adapters, and the base parameters that require a gradient, of this rank's chunks."""

    def __init__(self, chunks: Sequence[MegatronModule]) -> None:
        self._chunks = chunks

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Sharded tensors whose data are the parameters themselves, as Megatron's optimizer looks them up."""
        found = {
            tensor.key: tensor
            for adapters in adapters_of(self._chunks)
            for tensor in _sharded_adapters(adapters)
        }
        # Of an empty one every rank would have to have a copy.
        return {**({_KEY: found} if found else {}), **self._base(metadata)}

    def _base(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """What Megatron gives for modules_to_save, by chunk."""
        states: dict[str, Any] = {}
        for number, chunk in enumerate(self._chunks):
            with detached(self._chunks):
                if not any(parameter.requires_grad for parameter in chunk.parameters()):
                    continue
                state = chunk.sharded_state_dict(metadata=metadata)
            states[f"model{number}"] = {name: value for name, value in state.items() if _is_trained(value)}
        return states

    @torch.no_grad()
    def fill(self, loaded: Mapping[str, Any]) -> None:
        """Copy what was loaded into the parameters."""
        for adapters in adapters_of(self._chunks):
            for name, parameter, _, _ in _factors(adapters):
                parameter.copy_(loaded[_KEY][name])
        for number, chunk in enumerate(self._chunks):
            if f"model{number}" in loaded:
                # The rest is frozen, and not in the checkpoint.
                chunk.load_state_dict(loaded[f"model{number}"], strict=False)


def _is_trained(value: Any) -> bool:
    if not isinstance(value, ShardedTensor | ShardedTensorFactory):
        return False
    return isinstance(value.data, torch.nn.Parameter) and value.data.requires_grad


def _factors(adapters: Adapters) -> Iterator[tuple[str, torch.nn.Parameter, Part, Literal["A", "B"]]]:
    """A and B of every part by global name, without those that have no elements here."""
    for part, adapter in zip(adapters.target.parts, adapters.adapters(), strict=True):
        if adapter.A.numel():
            yield adapters.target.parameter(part, "A"), adapter.A, part, "A"
        if adapter.B.numel():
            yield adapters.target.parameter(part, "B"), adapter.B, part, "B"


def _sharded_adapters(adapters: Adapters) -> Iterator[ShardedTensor]:
    for name, parameter, part, factor in _factors(adapters):
        whole, offset = _geometry(adapters, part, factor)
        yield ShardedTensor(
            key=name,
            data=parameter,
            dtype=parameter.dtype,
            local_shape=tuple(parameter.shape),
            global_shape=whole,
            global_offset=offset,
            # Ranks may have different numbers of rows.
            axis_fragmentations=None,
            replica_id=_replica(adapters, factor),
            # Columns that pad the vocabulary depend on the layout.
            allow_shape_mismatch=factor == "A" and adapters.target.weight == EMBEDDING,
        )


def _geometry(
    adapters: Adapters, part: Part, factor: Literal["A", "B"]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shape of the whole A or B, and where in it this rank's part is."""
    if factor == "B":
        return (part.out_features, part.rank), (part.rows[0].hf, 0)
    if adapters.target.weight == EMBEDDING:
        place, size = adapters.group.rank(), adapters.group.size()
        return (part.rank, part.local_in * size), (0, part.local_in * place)
    return (part.rank, part.in_features), (0, part.columns[0])


def _replica(adapters: Adapters, factor: Literal["A", "B"]) -> tuple[int, int, int]:
    """Zeros on the one rank that writes its part."""
    # Declared as if there might be no groups.
    data: Any = (
        parallel_state.get_expert_data_parallel_rank()
        if adapters.is_expert
        else parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )
    return 0, 0 if adapters.is_split(factor) else adapters.group.rank(), data
