"""Who notices that a process of an engine has ended. One child stands for the core, its child for a worker."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from actors.engine_processes import EngineProcesses

SPAWN = multiprocessing.get_context("spawn")


def core(sender: object) -> None:
    """Start a worker, tell its id, and never ask after it."""
    worker = SPAWN.Process(target=time.sleep, args=(60,))
    worker.start()
    sender.send(worker.pid)  # type: ignore[attr-defined]
    time.sleep(60)


@pytest.fixture
def started() -> Iterator[tuple[BaseProcess, int]]:
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=core, args=(sender,))
    process.start()
    worker = receiver.recv()
    yield process, worker
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def eventually(processes: EngineProcesses) -> str | None:
    end = time.monotonic() + 5
    while processes.lost() is None and time.monotonic() < end:
        time.sleep(0.01)
    return processes.lost()


def test_a_worker_that_nobody_has_waited_for_is_lost_and_then_its_core(
    started: tuple[BaseProcess, int],
) -> None:
    process, worker = started
    assert process.pid is not None
    processes = EngineProcesses([worker])
    assert processes.pids == (process.pid, worker)
    assert processes.lost() is None
    os.kill(worker, signal.SIGKILL)
    assert eventually(processes) == f"vLLM's worker 0, process {worker}, ended"
    process.kill()
    process.join()
    assert processes.lost() == f"vLLM's core process {process.pid} ended with exit code -9"


def test_a_single_worker_lives_in_the_core(started: tuple[BaseProcess, int]) -> None:
    process, _ = started
    assert process.pid is not None
    processes = EngineProcesses([process.pid])
    assert processes.pids == (process.pid,)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert processes.lost() == f"vLLM's core process {process.pid} ended with exit code -15"
