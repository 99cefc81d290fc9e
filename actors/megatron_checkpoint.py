"""Megatron's own checkpoints (torch_dist): every rank writes and reads its part, under any layout.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from actors.checkpoint_files import (
    find_iteration,
    iteration_name,
    write_latest,
)
from actors.megatron_background import PlannedSave, plan_save
from actors.megatron_checkpoint_fit import clear_new_padding, mismatches
from actors.megatron_lora import detached
from actors.megatron_unpickling import UntrustedPickleError, data_only, read_metadata
from bridge.partial_directory import make_partial, partial_of, put_in_place
from configs.errors import BasculeError, ConfigError, WriteError

T = TypeVar("T")

_CONTENT = {
    # The only form of Megatron 0.16 whose optimizer state loads under another layout; its default raises.
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class MegatronCheckpointError(ConfigError):
    """A torch_dist checkpoint cannot be read, or does not fit the model. Names the directory, and the keys."""


class Saved(Protocol):
    """The part of this rank's model that a checkpoint is of."""

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """What is saved, as Megatron's sharded state; `metadata` are Megatron's settings of the checkpoint."""
        ...

    def fill(self, loaded: Mapping[str, Any]) -> None:
        """Put into the model what was loaded; it has the form of `state`."""
        ...


def save_torch_dist(
    chunks: Sequence[MegatronModule],
    directory: Path,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    iteration: int,
    write_beside: Callable[[], None] = lambda: None,
) -> Path:
    """Write `directory`/iter_NNNNNNN and make it the latest; every rank must call it. Returns that directory.

    `chunks` are the bare models of this rank, one for each virtual stage; their adapters are left out.
    `directory` is on a file system that the ranks share. The iteration appears under its name only when all
    ranks have written it, and replaces an older one of the same number. Before that rank 0 calls
    `write_beside`, which puts into `directory` what belongs to a checkpoint besides its iterations. Raises
    WriteError on every rank, naming the directory; the unfinished part is then removed.
    """
    return save_state(
        Models(chunks),
        directory,
        optimizer=optimizer,
        scheduler=scheduler,
        iteration=iteration,
        write_beside=write_beside,
    )


def save_state(
    part: Saved,
    directory: Path,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    iteration: int,
    write_beside: Callable[[], None] = lambda: None,
) -> Path:
    """As save_torch_dist, for any part of a model."""
    final = directory / iteration_name(iteration)
    partial = partial_of(final)
    _on_rank_0(f"{partial} cannot be created", lambda: make_partial(final))
    state = _state(part, _CONTENT, optimizer, is_loading=False)
    state |= {"checkpoint_version": 3.0, "iteration": iteration}
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    try:
        _together(
            f"{partial}: the checkpoint could not be written",
            lambda: dist_checkpointing.save(state, str(partial), content_metadata=dict(_CONTENT)),
            WriteError,
        )
        _on_rank_0(f"{directory}: the files beside the checkpoint could not be written", write_beside)
    except WriteError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _on_rank_0(f"{final} cannot be renamed into place", lambda: _publish(final, iteration))
    return final


def plan_torch_dist(
    part: Saved, directory: Path, *, optimizer: Any = None, iteration: int
) -> tuple[PlannedSave, Path]:
    """Copy what save_state would write as `directory`/iter_NNNNNNN, to be written later; every rank must call it.

    Returns that directory as well, which exists then and is no checkpoint before rank 0 has finished it. Raises
    WriteError on every rank.
    """
    folder = directory / iteration_name(iteration)
    _on_rank_0(f"{folder} cannot be created", lambda: folder.mkdir(parents=True))
    state = _state(part, _CONTENT, optimizer, is_loading=False)
    state |= {"checkpoint_version": 3.0, "iteration": iteration}
    planned = _together(
        f"{folder}: the state could not be copied",
        lambda: plan_save(state, folder, dict(_CONTENT)),
        WriteError,
    )
    return planned, folder


def load_torch_dist(
    chunks: Sequence[MegatronModule],
    directory: Path,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    ignored: Sequence[str] = (),
) -> int:
    """Fill this rank's models from a checkpoint of any layout; every rank must call it. Returns the iteration.

    `directory` is as save_torch_dist got it, or one iteration's. Without `optimizer` its state in the
    checkpoint is left alone. Keys of the checkpoint that begin with one of `ignored` need no place in the
    model. Rows that pad the vocabulary beyond the checkpoint's become zero. Raises ConfigError when it is no
    checkpoint, and MegatronCheckpointError, on every rank and before a parameter changes, listing by name
    every missing, unexpected and mis-shaped tensor and every truncated file. Adapters are left as they are.
    """
    return load_state(Models(chunks), directory, optimizer=optimizer, scheduler=scheduler, ignored=ignored)


def load_state(
    part: Saved,
    directory: Path,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    ignored: Sequence[str] = (),
) -> int:
    """As load_torch_dist, for any part of a model."""
    folder = find_iteration(directory)
    metadata, content = _read_metadata(folder)
    rates = _rates(optimizer)
    state = _state(part, content, optimizer, is_loading=True)
    _raise_together(mismatches(folder, metadata, state, ignored, with_optimizer=optimizer is not None))
    clear_new_padding(state, metadata)
    loaded = cast(
        dict[str, Any],
        _together(
            f"{folder}: the checkpoint could not be read",
            lambda: _load(state, folder),
        ),
    )
    _together(
        f"{folder}: the checkpoint could not be loaded",
        lambda: _apply(part, loaded, content, optimizer, scheduler, rates),
    )
    return int(loaded.get("iteration", 0))


def holds(directory: Path, prefix: str) -> bool:
    """Whether the checkpoint has keys that begin with `prefix`; every rank must call it. Raises like a load."""
    metadata, _ = _read_metadata(find_iteration(directory))
    return any(key.startswith(prefix) for key in metadata.state_dict_metadata)


class Models:
    """Whole models, without their adapters, under Megatron-LM's names."""

    def __init__(self, chunks: Sequence[MegatronModule]) -> None:
        self._chunks = chunks
        single = len(chunks) == 1
        self._keys = ["model"] if single else [f"model{number}" for number in range(len(chunks))]

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        with detached(self._chunks):
            return {
                key: chunk.sharded_state_dict(metadata=metadata)
                for key, chunk in zip(self._keys, self._chunks, strict=True)
            }

    def fill(self, loaded: Mapping[str, Any]) -> None:
        with detached(self._chunks):
            for key, chunk in zip(self._keys, self._chunks, strict=True):
                chunk.load_state_dict(loaded[key])


def _state(part: Saved, content: Mapping[str, Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**content, "dp_cp_group": group}
    state = part.state(metadata)
    if optimizer is not None:
        with _whole_buckets(optimizer, content):
            state["optimizer"] = optimizer.sharded_state_dict(
                dict(state), is_loading=is_loading, metadata=metadata
            )
    return state


def _is_fully_reshardable(content: Mapping[str, Any]) -> bool:
    key = "distrib_optim_sharding_type"
    return content.get(key) == _CONTENT[key]


@contextmanager
def _whole_buckets(optimizer: Any, content: Mapping[str, Any]) -> Generator[None]:
    """Let Megatron count the padding at the end of each gradient bucket while it lays out optimizer state.

    Megatron 0.16.1 joins the buckets without their padding, but looks every parameter up at its place with the
    padding: after a padded bucket that is not the last, all parameters get the state and the weights of
    others. It happens with tied embeddings under pipeline parallelism (they have a bucket of their own) and
    with several buckets. Needed until numel_unpadded and param_index_map agree (Megatron's issue 504).
    """
    parts = optimizer.chained_optimizers if _is_fully_reshardable(content) else ()
    buffers = [buffer for part in parts if isinstance(part, DistributedOptimizer) for buffer in part.buffers]
    counted: list[Any] = [*buffers, *(bucket for buffer in buffers for bucket in buffer.buckets)]
    before = [each.numel_unpadded for each in counted]
    try:
        for buffer in buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
        yield
    finally:
        for each, count in zip(counted, before, strict=True):
            each.numel_unpadded = count


def _read_metadata(folder: Path) -> tuple[Metadata, dict[str, Any]]:
    """What the checkpoint says it holds, and under which settings of Megatron it was made."""

    def read() -> tuple[Metadata, dict[str, Any]]:
        # Before Megatron reads the same file without asking.
        metadata = read_metadata(folder)
        with data_only():
            content = dist_checkpointing.load_content_metadata(str(folder)) or _CONTENT
        return metadata, dict(content)

    return _together(f"{folder}: .metadata, metadata.json or common.pt is missing or damaged", read)


def _load(state: dict[str, Any], folder: Path) -> Any:
    with data_only():
        return dist_checkpointing.load(state, str(folder))


def _apply(
    part: Saved,
    loaded: Mapping[str, Any],
    content: Mapping[str, Any],
    optimizer: Any,
    scheduler: Any,
    rates: Sequence[Mapping[str, Any]],
) -> None:
    part.fill(loaded)
    if optimizer is not None:
        state = loaded["optimizer"]
        fully = _is_fully_reshardable(content)
        optimizer.load_state_dict(_regrouped(optimizer, state) if fully else state)
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group.update(own)
    if scheduler is not None:
        # Megatron adds the loaded number of steps to the present one.
        scheduler.num_steps = 0
        scheduler.load_state_dict(loaded["opt_param_scheduler"])


def _rates(optimizer: Any) -> list[dict[str, Any]]:
    """What parameter groups have of a learning rate of their own, to be kept while state is loaded.

    Megatron 0.16.1 takes groups that differ in nothing else for the same one, already as it prepares to load:
    parts of a model with rates of their own would go on with each other's. Needed until
    param_group_identifier_keys of its optimizers tell them apart.
    """
    keys = ("max_lr", "min_lr", "default_config")
    return (
        [] if optimizer is None else [{key: group[key] for key in keys} for group in optimizer.param_groups]
    )


def _regrouped(optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Loaded optimizer state in the form that this rank's optimizer takes.

    Megatron 0.16.1 has one optimizer, or with expert parallelism a second one for experts, and saves the
    settings of parameter groups in that form. The tensors come in the present form, the settings in the saved.
    """
    parts = optimizer.chained_optimizers
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        return loaded
    forms = [loaded, *(value for key, value in loaded.items() if isinstance(key, int))]
    saved = [group for form in forms if "optimizer" in form for group in form["optimizer"]["param_groups"]]
    states: list[dict[Any, Any]] = []
    for number, part in enumerate(parts):
        own = loaded if len(parts) == 1 else loaded[number]
        groups = [_saved_group(group, saved) for group in part.optimizer.param_groups]
        states.append(
            {
                "optimizer": {"param_groups": groups},
                # A pipeline stage may train nothing, and a checkpoint does not hold empty dictionaries.
                "param_state": own.get("param_state", {}),
                "param_state_sharding_type": _CONTENT["distrib_optim_sharding_type"],
            }
        )
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _saved_group(group: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved settings of a parameter group, from one of other parameters where experts had no group."""
    wanted = {key: group[key] for key in ("wd_mult", "lr_mult", "is_decoupled_lr")}
    alike = [each for each in saved if all(each[key] == value for key, value in wanted.items())]
    same = [each for each in alike if each["is_expert_parallel"] == group["is_expert_parallel"]]
    if not alike:
        raise MegatronCheckpointError(f"optimizer state: no saved parameter group has {wanted}")
    return {**(same or alike)[0], "is_expert_parallel": group["is_expert_parallel"]}


def _publish(final: Path, iteration: int) -> None:
    put_in_place(final)
    write_latest(final.parent, iteration)


def _on_rank_0(message: str, action: Callable[[], None]) -> None:
    """Run `action` on rank 0, which writes; no rank goes on before it is done, and all learn of its failure."""
    _together(message, action if dist.get_rank() == 0 else lambda: None, WriteError)


def _together(message: str, action: Callable[[], T], kind: type[BasculeError] = MegatronCheckpointError) -> T:
    """Run `action` on every rank. Raises an error of `kind` on all of them when it fails on one."""
    try:
        result = action()
    # Megatron and the unpickler raise anything; a rank that just left would keep the others waiting.
    except (Exception, CheckpointException) as error:
        said = _said(error)
        _raise_together(said and f"{message}: {said}", kind)
        raise
    _raise_together(None, kind)
    return result


def _said(error: BaseException) -> str:
    if isinstance(error, UntrustedPickleError):
        return str(error)
    if not isinstance(error, CheckpointException):
        return repr(error)
    # No Exception, and by itself a page of traces. One rank's names all that failed, those of the others nothing.
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())


def _raise_together(problem: str | None, kind: type[BasculeError] = MegatronCheckpointError) -> None:
    """Raises an error of `kind` on every rank when any of them has a problem."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = list(dict.fromkeys(text for text in problems if text))
    if found:
        raise kind("\n".join(found))
