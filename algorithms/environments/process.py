"""An environment in a child process, which can be ended: what hangs or dies in it is one failed reply."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection

from algorithms.environments.calling import Reply, Step, too_late
from algorithms.environments.child import End, Replied, serve
from algorithms.rewards.child import Loaded
from algorithms.rewards.loading import RewardSource
from algorithms.rewards.process import (
    MARGIN_S,
    AsyncReader,
    RewardChild,
    RewardTimeoutError,
    end_with_parent,
)
from configs.errors import BasculeError

PROGRAM = (
    "import sys; from multiprocessing.connection import Connection; "
    f"from {__name__} import run_child; run_child(Connection(int(sys.argv[1])))"
)


def run_child(connection: Connection) -> None:
    """What a child does: serve, and end with its parent."""
    end_with_parent()
    serve(connection)


Waiting = tuple[Step, Future[Reply]]


class EnvironmentRunner:
    """One environment in one child. Of a plain one a call at a time, of an async one many.

    A child that has ended is started anew, and the objects of its episodes are made again from their turns.
    """

    def __init__(self, source: RewardSource, *, start_timeout_s: float, blocked_s: float = 30.0) -> None:
        """A child with an async environment is ended when its event loop stands still for `blocked_s`."""
        self._source = source
        self._child = RewardChild([source], start_timeout_s=start_timeout_s, program=PROGRAM)
        self._reader = AsyncReader[Waiting](
            self._child,
            what="an async environment",
            blocked_s=blocked_s,
            take=self._take,
            give_up=self._give_up,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")
        self._count = 0

    def start(self) -> Loaded:
        """Load the environment; says what it is. Raises ConfigError when it does not load."""
        self._child.start()
        return self._child.loaded[0]

    def submit(self, step: Step) -> Future[Reply]:
        """The reply to a step, when it is there; failures are in it."""
        assert self._child.loaded, "started before"
        with self._reader.lock:
            self._count += 1
            step = replace(step, number=self._count)
        if self._child.loaded[0].signature.is_async:
            return self._submit_async(step)
        return self._thread.submit(self._do, step)

    def end(self, episode: str) -> None:
        """The episode is over; its object can go."""
        if self._child.loaded[0].signature.is_async:
            with self._reader.lock:
                self._child.send(End(episode=episode))
        else:
            self._thread.submit(self._child.send, End(episode=episode))

    def close(self) -> None:
        """End the child; what it was doing fails."""
        self._child.kill()
        self._thread.shutdown(cancel_futures=True)
        self._reader.close()

    def _do(self, step: Step) -> Reply:
        title, timeout_s = step.title(self._source.name), self._source.config.timeout_s
        try:
            self._child.start()
            self._child.send(step)
            wait_s = MARGIN_S
            while not isinstance(message := self._child.receive(wait_s, title), Replied):
                wait_s = timeout_s
        except RewardTimeoutError:
            return Reply(error=too_late(title, timeout_s))
        except BasculeError as error:
            return Reply(error=str(error))
        return message.reply

    def _submit_async(self, step: Step) -> Future[Reply]:
        future: Future[Reply] = Future()
        try:
            self._reader.send(step.number, (step, future), step)
        except BasculeError as error:
            self._give_up((step, future), str(error), False)
        return future

    def _take(self, message: Replied) -> None:
        with self._reader.lock:
            waiting = self._reader.waiting.pop(message.number, None)
        # One that is missing was given up with a child that had just been replaced.
        if waiting is not None:
            waiting[1].set_result(message.reply)

    def _give_up(self, waiting: Waiting, error: str, timed_out: bool) -> None:
        step, future = waiting
        future.set_result(Reply(error=f"{step.title(self._source.name)}: {error}"))
