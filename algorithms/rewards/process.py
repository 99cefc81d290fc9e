"""Rewards in child processes, which can be ended: what hangs or dies in one takes nothing else along."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from algorithms.data import Group, Verdict
from algorithms.rewards.calling import Call, RewardError
from algorithms.rewards.child import BEAT_S, Beat, Began, Done, Loaded, Task, failed, serve
from algorithms.rewards.loading import RewardSource
from configs.errors import BasculeError

# For a message on a machine that is busy with other things.
MARGIN_S = 60.0
# Not multiprocessing's spawn: that would import the parent's main module, and so Ray, once more in the child.
CHILD = (
    "import sys; from multiprocessing.connection import Connection; "
    f"from {__name__} import run_child; run_child(Connection(int(sys.argv[1])))"
)
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")
Verdicts = Mapping[int, Verdict]
"""By number of the completion."""


def run_child(connection: Connection) -> None:
    """What a child does: serve, and end with its parent."""
    end_with_parent()
    serve(connection)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, whatever this process is doing then. Linux only.

    A reward function that holds the interpreter cannot notice by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)


class RewardChild:
    """A child process that has loaded some rewards, and the pipe to it; it is started anew when it has ended."""

    def __init__(
        self,
        sources: Sequence[RewardSource],
        *,
        start_timeout_s: float,
        for_async: bool = False,
        program: str = CHILD,
    ) -> None:
        """`program` is Python that serves the pipe whose number it is given: first (sources, for_async) comes."""
        self._sources, self._start_timeout_s, self._for_async = tuple(sources), start_timeout_s, for_async
        self._program = program
        self.loaded: tuple[Loaded, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Start it unless it runs. Raises the ConfigError of a reward that does not load, or RewardError."""
        if self._process is not None and self._process.poll() is None:
            return
        self.end()
        ours, theirs = Pipe()
        self._connection = ours
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", self._program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        theirs.close()
        names = ", ".join(f"{source.noun} {source.name}" for source in self._sources)
        self.send((self._sources, self._for_async))
        self.loaded = self.receive(self._start_timeout_s, f"{names}: while being loaded")

    def send(self, value: object) -> None:
        """Give it something to do. Of a child that is gone `receive` tells."""
        assert self._connection is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            self._connection.send(value)

    def receive(self, timeout_s: float, what: str) -> Any:
        """Its next message. Raises RewardError, and ends it, when none comes in time or it has ended itself."""
        assert self._connection is not None
        assert self._process is not None
        try:
            answered = self._connection.poll(timeout_s)
            message = self._connection.recv() if answered else None
        except (EOFError, ConnectionResetError, OSError):
            code = self._process.wait()
            self.end()
            raise RewardError(
                f"{what}: the process ended with exit code {code} (negative: killed by that signal, 9 is "
                "often a lack of memory)"
            ) from None
        if not answered:
            self.end()
            raise RewardTimeoutError(f"{what}: no answer within {timeout_s:g} s")
        if isinstance(message, BasculeError):
            raise message
        return message

    def kill(self) -> None:
        """Kill it, and with it what it started; whoever waits for it hears that it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it, and forget it."""
        self.kill()
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class RewardTimeoutError(RewardError):
    """A child gave no answer in time."""


class PlainProcess:
    """Plain functions in a child: one call at a time, each ended at its deadline."""

    def __init__(self, sources: Sequence[RewardSource], *, start_timeout_s: float) -> None:
        self._child = RewardChild(sources, start_timeout_s=start_timeout_s)
        self._tasks = 0
        self.finished = 0
        """Calls that have begun."""

    def start(self) -> tuple[Loaded, ...]:
        """Start the child; says what it loaded. Raises ConfigError."""
        self._child.start()
        return self._child.loaded

    def do(self, reward: int, group: Group, indices: Sequence[int], first: int = 0) -> Verdicts:
        """Verdicts of these completions by reward number `reward`."""
        found: dict[int, Verdict] = {}
        while left := tuple(index for index in indices if index not in found):
            self._child.start()
            self._tasks += 1
            self._child.send(Task(number=self._tasks, reward=reward, group=group, indices=left, first=first))
            found |= self._answers(left, group)
        return found

    def _answers(self, indices: Sequence[int], group: Group) -> dict[int, Verdict]:
        """What comes, up to the end of the task or of the child."""
        found: dict[int, Verdict] = {}
        while len(found) < len(indices):
            began = self._child.receive(MARGIN_S, f"rewards of prompt {group.prompt.id}")
            assert isinstance(began, Began), "a call is announced first"
            call, start = began.call, time.monotonic()
            self.finished += 1
            try:
                done = self._child.receive(call.timeout_s, str(call))
            except RewardTimeoutError:
                return found | _failed(call, call.too_late(), time.monotonic() - start, timed_out=True)
            except RewardError as error:
                return found | _failed(call, str(error), time.monotonic() - start)
            found |= dict(zip(call.indices, done.verdicts, strict=True))
        return found

    def close(self) -> None:
        """End the child."""
        self._child.end()


def _failed(call: Call, error: str, seconds: float, *, timed_out: bool = False) -> dict[int, Verdict]:
    return dict(zip(call.indices, failed(call, error, seconds, timed_out=timed_out), strict=True))


class _Waiting:
    """A task that an async child has."""

    def __init__(self, group: Group, indices: Sequence[int]) -> None:
        self.group, self.indices = group, tuple(indices)
        self.found: dict[int, Verdict] = {}
        self.future: Future[Verdicts] = Future()


class AsyncReader(Generic[T]):
    """What an async child was given and has yet to answer, by number, and the thread that reads its answers."""

    def __init__(
        self,
        child: RewardChild,
        *,
        what: str,
        blocked_s: float,
        take: Callable[[Any], None],
        give_up: Callable[[T, str, bool], None],
    ) -> None:
        """`what` is what the child does, for messages. `take` is given each message but beats, with `lock` free.

        `give_up` is given what was waiting when the child was lost, why, and whether because its event loop stood
        still for `blocked_s`.
        """
        self._child, self._what, self._blocked_s = child, what, BEAT_S + blocked_s
        self._take, self._give_up = take, give_up
        self.lock = threading.Lock()
        self.waiting: dict[int, T] = {}
        self._reader: threading.Thread | None = None

    def send(self, number: int, waiting: T, message: object) -> None:
        """Give the child, which is started when it has ended, a message that is answered.

        Raises BasculeError when it does not start; nothing waits then.
        """
        with self.lock:
            self._child.start()
            self.waiting[number] = waiting
            self._child.send(message)
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, daemon=True)
                self._reader.start()

    def close(self) -> None:
        """End the child; what it was doing is given up."""
        self._child.kill()
        reader = self._reader
        if reader is not None:
            reader.join()
        self._child.end()

    def _read(self) -> None:
        while True:
            try:
                message = self._child.receive(self._blocked_s, self._what)
            except BasculeError as error:
                self._lose(error)
                return
            if not isinstance(message, Beat):
                self._take(message)

    def _lose(self, error: BasculeError) -> None:
        """What was under way has failed; what comes next starts another child."""
        blocked = isinstance(error, RewardTimeoutError)
        why = (
            f"the event loop stood still for {self._blocked_s:g} s: {self._what} must not block it"
            if blocked
            else str(error)
        )
        with self.lock:
            lost, self.waiting, self._reader = list(self.waiting.values()), {}, None
        for each in lost:
            self._give_up(each, why, blocked)


class AsyncProcess:
    """Async functions in a child: many calls at one time on its event loop, which has to keep turning."""

    def __init__(
        self, sources: Sequence[RewardSource], *, start_timeout_s: float, blocked_s: float = 30.0
    ) -> None:
        """The child is ended when its event loop stands still for `blocked_s`."""
        self._child = RewardChild(sources, start_timeout_s=start_timeout_s, for_async=True)
        self._reader = AsyncReader[_Waiting](
            self._child,
            what="async rewards",
            blocked_s=blocked_s,
            take=self._take,
            give_up=self._give_up,
        )
        self._count = 0
        self.finished = 0
        """Calls that have ended."""

    def start(self) -> None:
        """Start the child. Raises ConfigError."""
        self._child.start()

    def submit(self, reward: int, group: Group, indices: Sequence[int], first: int = 0) -> Future[Verdicts]:
        """Verdicts of these completions by reward number `reward`, when they are there."""
        waiting, places = _Waiting(group, indices), tuple(indices)
        with self._reader.lock:
            self._count += 1
            number = self._count
        task = Task(number=number, reward=reward, group=group, indices=places, first=first)
        self._reader.send(number, waiting, task)
        return waiting.future

    def _take(self, done: Done) -> None:
        with self._reader.lock:
            self.finished += 1
            waiting = self._reader.waiting.get(done.task)
            if waiting is None:  # It was given up with a child that had just been replaced.
                return
            waiting.found |= dict(zip(done.call.indices, done.verdicts, strict=True))
            if len(waiting.found) < len(waiting.indices):
                return
            del self._reader.waiting[done.task]
        waiting.future.set_result(waiting.found)

    @staticmethod
    def _give_up(waiting: _Waiting, error: str, timed_out: bool) -> None:
        why = f"rewards of prompt {waiting.group.prompt.id}: {error}"
        missing = [index for index in waiting.indices if index not in waiting.found]
        late = {index: Verdict(error=why, timed_out=timed_out) for index in missing}
        waiting.future.set_result(waiting.found | late)

    def close(self) -> None:
        """End the child."""
        self._reader.close()


class RewardRunner:
    """The rewards of a run in two children at most: one for plain functions, one for async ones."""

    def __init__(self, sources: Sequence[RewardSource], *, start_timeout_s: float) -> None:
        self._plain = PlainProcess(sources, start_timeout_s=start_timeout_s)
        self._async = AsyncProcess(sources, start_timeout_s=start_timeout_s)
        self.loaded: tuple[Loaded, ...] = ()
        # A thread of its own: what it waits for ends by itself, at the deadline of each call.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def start(self) -> tuple[Loaded, ...]:
        """Load all rewards; says what they are. Raises ConfigError for one that does not load."""
        self.loaded = self._plain.start()
        later = [each.signature.is_async for each in self.loaded]
        if any(later):
            self._async.start()
        if all(later):
            self._plain.close()
        return self.loaded

    def submit(
        self, group: Group, indices: Sequence[int], rewards: Sequence[int], first: int = 0
    ) -> list[Future[Verdicts]]:
        """Verdicts of these completions by each of the rewards, given by their numbers, when they are there.

        `first` is added to the completions' numbers in messages.
        """
        assert self.loaded or not rewards, "started before"
        return [
            self._async.submit(reward, group, indices, first)
            if self.loaded[reward].signature.is_async
            else self._thread.submit(self._plain.do, reward, group, indices, first)
            for reward in rewards
        ]

    @property
    def finished(self) -> int:
        """How many calls have begun or ended: it grows while the children get on."""
        return self._plain.finished + self._async.finished

    def judge(self, group: Group) -> dict[str, tuple[Verdict, ...]]:
        """What every reward says of every completion."""
        indices = range(len(group.rollouts))
        futures = self.submit(group, indices, range(len(self.loaded)))
        found = [future.result() for future in futures]
        return {
            each.name: tuple(verdicts[index] for index in indices)
            for each, verdicts in zip(self.loaded, found, strict=True)
        }

    def close(self) -> None:
        """End the children; what they were doing fails."""
        self._plain.close()
        self._async.close()
        self._thread.shutdown(cancel_futures=True)
