"""A trainer rank's part of a state to resume from: weights, optimizer, schedule, random numbers. No Ray here.

Weights and optimizer are torch_dist checkpoints, so they load under another layout as well. What is random only
goes on as it was under the same one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from actors.checkpoint_files import write_latest
from actors.megatron_adapter_checkpoint import Trained
from actors.megatron_background import BackgroundSave
from actors.megatron_checkpoint import Models, Saved, load_state, load_torch_dist, plan_torch_dist
from actors.megatron_model import FrozenModel, MegatronModel
from configs.errors import naming


def save_rank(
    model: MegatronModel,
    directory: Path,
    *,
    step: int,
    rank: int,
    with_adapters: bool,
    moved_reference: FrozenModel | None,
) -> BackgroundSave:
    """Copy this rank's part and begin to write it into `directory`; every rank must call it. Raises WriteError.

    `moved_reference` is a reference that follows the policy.
    """
    optimizer_steps = model.scheduler.num_steps
    # Before its first step an optimizer has no state that Megatron could save.
    optimizer = model.optimizer if optimizer_steps else None
    planned = [
        plan_torch_dist(
            _trained(model.chunks, with_adapters), directory / "policy", optimizer=optimizer, iteration=step
        )
    ]
    if moved_reference is not None:
        reference = Models(moved_reference.chunks)
        planned.append(plan_torch_dist(reference, directory / "reference", iteration=step))
    own = {
        "optimizer_steps": optimizer_steps,
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "tracker": _tracker().get_states(),
    }
    return BackgroundSave(planned, own, _own(directory, rank))


def finish_state(saving: BackgroundSave, directory: Path, step: int, written: Sequence[bytes]) -> None:
    """On rank 0: make what all ranks wrote into `directory` checkpoints that load. Raises WriteError."""
    with naming(directory):
        saving.finish(written)
        for folder in (directory / "policy", directory / "reference"):
            if folder.is_dir():
                write_latest(folder, step)


def _trained(chunks: Sequence[MegatronModule], with_adapters: bool) -> Saved:
    """What a step changes: with adapters only these, for the rest is in the files that the run began with."""
    return Trained(chunks) if with_adapters else Models(chunks)


def load_rank(
    model: MegatronModel,
    directory: Path,
    *,
    rank: int,
    with_adapters: bool,
    moved_reference: FrozenModel | None,
    same_layout: bool,
) -> None:
    """Put this rank into the state that save_rank wrote; every rank must call it. Raises like load_torch_dist.

    The schedule is the one of this run, after as many steps. Without `same_layout` random numbers begin anew.
    """
    own = torch.load(_own(directory, rank if same_layout else 0), weights_only=True)
    optimizer_steps = int(own["optimizer_steps"])
    optimizer = model.optimizer if optimizer_steps else None
    load_state(_trained(model.chunks, with_adapters), directory / "policy", optimizer=optimizer)
    # Not from the checkpoint: Megatron refuses a schedule of another length.
    model.scheduler.num_steps = 0
    model.scheduler.step(increment=optimizer_steps)
    if moved_reference is not None:
        load_torch_dist(moved_reference.chunks, directory / "reference")
    if same_layout:
        _tracker().set_states(own["tracker"])
        if own["device"] is not None:
            torch.cuda.set_rng_state(own["device"])
        torch.set_rng_state(own["torch"])


def _tracker() -> Any:
    # Declared as optional; there is one since the group was joined.
    return get_cuda_rng_tracker()


def _own(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.pt"
