"""Reward functions on Ray: each worker runs them in a child process, which it can end when one hangs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.deadline import DeadlineExceededError, get, get_all
from actors.env import end_with_parent
from algorithms.data import Group, Scored, float_row
from algorithms.rewards.loading import RewardSource, read_sources
from algorithms.rewards.scoring import Call, RewardError, late, serve
from configs.errors import BasculeError
from configs.schema import RunConfig

CPUS_PER_REWARD_WORKER = 0.1
# Beyond what the functions may take: the transfer of a group, and a process that waits for a busy machine.
MARGIN_S = 60.0
# Not multiprocessing's spawn: that would import Ray's worker script, and so Ray, once more in the child.
CHILD = (
    "import sys; from multiprocessing.connection import Connection; "
    f"from {end_with_parent.__module__} import {end_with_parent.__name__}; {end_with_parent.__name__}(); "
    f"from {serve.__module__} import {serve.__name__}; {serve.__name__}(Connection(int(sys.argv[1])))"
)


class RewardProcess:
    """The reward functions in a child process; it is started when needed and ended when a call is late.

    A thread could not be ended, and a regular expression or a C extension that hangs holds the
    interpreter, so the process that waits has to be another one than the process that calls.
    """

    def __init__(self, sources: Sequence[RewardSource], *, start_timeout_s: float) -> None:
        self._sources, self._start_timeout_s = tuple(sources), start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Start the child and load the functions there. Raises the ConfigError of a function that fails."""
        ours, theirs = Pipe()
        self._connection = ours
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        theirs.close()
        names = ", ".join(source.name for source in self._sources)
        self._send(self._sources)
        self._receive(f"rewards {names}: while being loaded", self._start_timeout_s)

    def score(self, group: Group) -> Scored:
        """`group` with its rewards. Raises RewardError naming the function and the sample."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        self._send(group)
        call: Call | None = None
        while True:
            if call is None:
                message = self._receive(f"rewards of prompt {group.prompt.id}", MARGIN_S)
            else:
                message = self._receive(str(call), call.timeout_s, late(call))
            if not isinstance(message, Call):
                rewards, parts = message
                return Scored(group=group, rewards=float_row(rewards), parts=parts)
            call = message

    def close(self) -> None:
        """End the child, and with it what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, value: object) -> None:
        assert self._connection is not None
        # A child that is gone is told by what is, or is not, received next.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(value)

    def _receive(self, what: str, timeout_s: float, too_late: str | None = None) -> Any:
        assert self._connection is not None
        assert self._process is not None
        try:
            answered = self._connection.poll(timeout_s)
            message = self._connection.recv() if answered else None
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            self.close()
            raise RewardError(
                f"{what}: the process ended with exit code {code} (negative: killed by that signal, 9 is "
                "often a lack of memory)"
            ) from None
        if not answered:
            self.close()
            raise RewardError(too_late or f"{what}: no answer within {timeout_s:g} s")
        if isinstance(message, BasculeError):
            raise message
        return message


class RewardWorker:
    """Ray actor around a RewardProcess."""

    def __init__(self, sources: Sequence[RewardSource], start_timeout_s: float) -> None:
        self._process = RewardProcess(sources, start_timeout_s=start_timeout_s)

    def start(self) -> None:
        """Load the functions. Raises ConfigError."""
        self._process.start()

    def score(self, group: Group) -> Scored:
        """`group` with its rewards. Raises RewardError."""
        return self._process.score(group)

    def close(self) -> None:
        """End the child process."""
        self._process.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    worker: int
    prompt: str
    deadline: float


class RewardGroup:
    """Workers that score groups as they come in (algorithms.roles.Judge)."""

    def __init__(self, workers: Sequence[Any], sources: Sequence[RewardSource]) -> None:
        self._workers = tuple(workers)
        self.sources = tuple(sources)
        self._busy_until = [0.0 for _ in workers]

    def score(self, groups: Iterable[Group]) -> Iterator[Scored]:
        """Each group with its rewards, in the order they finish; workers score while `groups` is waited for.

        Raises RewardError from the first function that fails, or DeadlineExceededError when a worker does
        not answer at all.
        """
        pending: dict[Any, _Pending] = {}
        for group in groups:
            ref, task = self._send(group)
            pending[ref] = task
            yield from self._finished(pending, wait=False)
        while pending:
            yield from self._finished(pending, wait=True)

    def close(self) -> None:
        """End the workers and their child processes."""
        for worker in self._workers:
            # Without the call a child would stay until it notices that the pipe is closed.
            with contextlib.suppress(BasculeError):
                get(worker.close.remote(), "reward worker", timeout_s=5, phase="close")
            ray.kill(worker)

    def _send(self, group: Group) -> tuple[Any, _Pending]:
        worker = min(range(len(self._workers)), key=self._busy_until.__getitem__)
        limit_s = sum(source.config.timeout_s for source in self.sources) * len(group.rollouts)
        start = max(time.monotonic(), self._busy_until[worker])
        deadline = start + limit_s + MARGIN_S
        self._busy_until[worker] = start + limit_s
        ref = self._workers[worker].score.remote(group)
        return ref, _Pending(worker=worker, prompt=group.prompt.id, deadline=deadline)

    def _finished(self, pending: dict[Any, _Pending], *, wait: bool) -> Iterator[Scored]:
        first_deadline = min(task.deadline for task in pending.values())
        left_s = max(0.0, first_deadline - time.monotonic())
        count, timeout_s = (1, left_s) if wait else (len(pending), 0.0)
        ready, _ = ray.wait(list(pending), num_returns=count, timeout=timeout_s)
        if not ready and left_s == 0.0:
            raise self._late(pending)
        for ref in ready:
            task = pending.pop(ref)
            if not any(other.worker == task.worker for other in pending.values()):
                self._busy_until[task.worker] = 0.0
            yield get(ref, f"reward worker {task.worker}", timeout_s=MARGIN_S, phase="score")

    def _late(self, pending: Mapping[Any, _Pending]) -> DeadlineExceededError:
        task = min(pending.values(), key=lambda each: each.deadline)
        ray.kill(self._workers[task.worker])
        names = ", ".join(source.name for source in self.sources)
        return DeadlineExceededError(
            f"score: reward worker {task.worker} gave no answer for prompt {task.prompt} within the timeouts "
            f"of its functions ({names}), although it ends late ones itself; its machine may be gone"
        )


def create_reward_group(
    config: RunConfig,
    placement_group: PlacementGroup | None = None,
    bundle_index: int = -1,
    num_workers: int = 1,
) -> RewardGroup:
    """Workers with the functions of `config.rewards` loaded, in a bundle of `placement_group` if given.

    Raises ConfigError for a function that cannot be loaded, DeadlineExceededError, ActorLostError.
    """
    sources = read_sources(config.rewards)
    strategy: Any = "DEFAULT"
    if placement_group is not None:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=placement_group, placement_group_bundle_index=bundle_index
        )
    remote: Any = ray.remote(RewardWorker)
    actor = remote.options(num_cpus=CPUS_PER_REWARD_WORKER, max_restarts=0, scheduling_strategy=strategy)
    timeout_s = config.cluster.start_timeout_s
    workers = [actor.remote(sources, timeout_s) for _ in range(num_workers)]
    owners = [f"reward worker {index}" for index in range(num_workers)]
    started = [worker.start.remote() for worker in workers]
    # A worker whose functions take too long to load says so itself, and by name.
    get_all(started, owners, timeout_s=timeout_s + MARGIN_S, phase="load rewards")
    return RewardGroup(workers, sources)
