"""The processes of one vLLM engine, as its actor sees them."""

import multiprocessing
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

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

    def drop_names_of_shared_memory(self) -> None:
        """Unlink what the processes share once all have opened it: the memory then ends with the last of them.

        Python's resource tracker would do it at the end, but Ray kills it together with a killed actor, and the
        queues of several workers would stay in /dev/shm for ever.
        """
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                _, slash, name = line.partition("/dev/shm/psm_")
                if slash and not name.endswith("(deleted)"):
                    Path(slash + name).unlink(missing_ok=True)

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
