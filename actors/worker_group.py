"""What groups of workers around child processes have in common."""

import contextlib
import zlib
from collections.abc import Sequence
from typing import Any

import ray

from actors.deadline import get
from algorithms.data import Prompt
from configs.errors import BasculeError


def place_of(prompt: Prompt, num_workers: int) -> int:
    """Which worker is for a prompt: always the same, so that it knows what came before."""
    return zlib.crc32(prompt.id.encode()) % num_workers


def end_workers(workers: Sequence[Any], owner: str) -> None:
    """End the workers and their child processes; `owner` is what to call one in messages."""
    for worker in workers:
        # Without the call a child would stay until it notices that the pipe is closed.
        with contextlib.suppress(BasculeError):
            get(worker.close.remote(), owner, timeout_s=5, phase="close")
        ray.kill(worker)
