"""The processes of one vLLM engine, as its actor sees them."""

import multiprocessing
from collections.abc import Iterable
from multiprocessing.process import BaseProcess

import psutil


class EngineProcesses:
    """vLLM's core, which is a child of the actor, and its workers, which are children of the core."""

    def __init__(self, worker_pids: Iterable[int]) -> None:
        """Find the core among the children of this process. A single worker lives inside the core."""
        self._cores: list[BaseProcess] = list(multiprocessing.active_children())
        cores = {core.pid for core in self._cores}
        self._workers = [psutil.Process(pid) for pid in worker_pids if pid not in cores]

    @property
    def pids(self) -> tuple[int, ...]:
        """The core's first, then those of the workers by rank."""
        cores = [core.pid for core in self._cores if core.pid is not None]
        return (*cores, *(worker.pid for worker in self._workers))

    def lost(self) -> str | None:
        """Which process has ended, and how where that is known; None while all live."""
        for core in self._cores:
            if not core.is_alive():
                return f"vLLM's core process {core.pid} ended with exit code {core.exitcode}"
        for rank, worker in enumerate(self._workers):
            # It is the core's child: only the core can learn its exit code.
            if not _lives(worker):
                return f"vLLM's worker {rank}, process {worker.pid}, ended"
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
