"""Writing a torch_dist checkpoint while training goes on: Megatron plans it, a thread writes a copy.

Megatron 0.16.1 has an asynchronous save of its own, which forks a process and finishes with collectives. Both
are of no use in an actor whose one thread trains: here a thread of the rank writes, and rank 0 is given by the
driver what all of them wrote. The plan, the files and their content are Megatron's.
"""

import pickle
import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.storage import WriteResult

from configs.errors import WriteError


class PlannedSave:
    """One rank's part of a checkpoint, copied to host memory."""

    def __init__(self, writer: FileSystemWriterAsync, metadata: Any) -> None:
        """`metadata` is that of the whole checkpoint, which only rank 0 has."""
        self._writer = writer
        self._metadata = metadata
        # dist_checkpointing.save adds its own end to it, which is made of collectives and never called.
        self.finalize_fns: list[Callable[[], None]] = []
        self._buckets = [
            (path, key, (parts, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors]))
            for path, key, (parts, tensors) in writer.write_buckets or ()
        ]
        # It holds on to the live tensors.
        writer.write_buckets = None

    def write(self) -> list[WriteResult]:
        """Write this rank's files and wait for the disk. Raises WriteError."""
        written: list[WriteResult] = []
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        for bucket in self._buckets:
            # Of this process, where Megatron has those of multiprocessing.
            results: Any = queue.Queue()
            counts: Any = queue.Queue()
            counts.put(0)
            FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, counts, use_fsync=True)
            _, found = results.get_nowait()
            if isinstance(found, Exception):
                raise WriteError(f"{bucket[0]}: cannot be written: {found}") from found
            written += found
        self._buckets = []
        return written

    def finish(self, written: Sequence[list[WriteResult]], folder: Path) -> None:
        """On rank 0: make the files of all ranks a checkpoint."""
        self._writer.finish(self._metadata, list(written))
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Planning(TorchDistSaveShardedStrategy):
    """Plans as Megatron does, and leaves writing and finishing to PlannedSave."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return PlannedSave(writer, save_state_dict_ret[1])


def plan_save(state: dict[str, Any], folder: Path, content: dict[str, Any]) -> PlannedSave:
    """Plan a checkpoint of Megatron's sharded state in `folder`, and copy it; every rank must call it."""
    strategy = _Planning("torch_dist", 1)
    planned: Any = dist_checkpointing.save(
        state, str(folder), strategy, async_sharded_save=True, content_metadata=content
    )
    return planned


class BackgroundSave:
    """A thread that writes planned checkpoints, and a small file of the rank's own."""

    def __init__(self, planned: Sequence[tuple[PlannedSave, Path]], own: dict[str, Any], path: Path) -> None:
        """`planned` are checkpoints with their folders."""
        self._planned = planned
        self._own, self._path = own, path
        self._done: tuple[bytes, float] | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._write, name="save-state", daemon=True)
        self._thread.start()

    def written(self) -> tuple[bytes, float] | None:
        """What this rank wrote, once it is on disk, for `finish`, and the seconds; None while it writes. Raises
        WriteError.

        Pickled, so that the driver can pass it on without importing Megatron.
        """
        if self._error is not None:
            error = self._error
            raise (
                error if isinstance(error, WriteError) else WriteError(f"{self._path}: {error!r}")
            ) from error
        return self._done

    def finish(self, written: Sequence[bytes]) -> None:
        """On rank 0, with what every rank wrote, in their order."""
        by_rank: list[list[list[WriteResult]]] = [pickle.loads(each) for each in written]
        for (planned, folder), results in zip(self._planned, zip(*by_rank, strict=True), strict=True):
            planned.finish(results, folder)

    def _write(self) -> None:
        start = time.monotonic()
        try:
            results = [planned.write() for planned, _ in self._planned]
            torch.save(self._own, self._path)
            self._done = pickle.dumps(results), time.monotonic() - start
        # Whatever it is, somebody has to hear of it: `written` raises it.
        except BaseException as error:  # noqa: BLE001
            self._error = error
