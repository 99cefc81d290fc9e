"""An environment in a child process, which can be ended: what hangs or dies in it is one failed reply."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection

from algorithms.environments.calling import Reply, Step, too_late
from algorithms.environments.child import End, Message, Replied, serve
from algorithms.rewards.child import BEAT_S, Loaded
from algorithms.rewards.loading import RewardSource
from algorithms.rewards.process import MARGIN_S, RewardChild, RewardTimeoutError, end_with_parent
from configs.errors import BasculeError

PROGRAM = (
    "import sys; from multiprocessing.connection import Connection; "
    f"from {__name__} import run_child; run_child(Connection(int(sys.argv[1])))"
)


def run_child(connection: Connection) -> None:
    """What a child does: serve, and end with its parent."""
    end_with_parent()
    serve(connection)


class EnvironmentRunner:
    """One environment in one child. Of a plain one a call at a time, of an async one many.

    A child that has ended is started anew, and the objects of its episodes are made again from their turns.
    """

    def __init__(self, source: RewardSource, *, start_timeout_s: float, blocked_s: float = 30.0) -> None:
        """A child with an async environment is ended when its event loop stands still for `blocked_s`."""
        self._source = source
        self._child = RewardChild([source], start_timeout_s=start_timeout_s, program=PROGRAM)
        self._blocked_s = BEAT_S + blocked_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Step, Future[Reply]]] = {}
        self._count = 0
        self._reader: threading.Thread | None = None

    def start(self) -> Loaded:
        """Load the environment; says what it is. Raises ConfigError when it does not load."""
        self._child.start()
        return self._child.loaded[0]

    def submit(self, step: Step) -> Future[Reply]:
        """The reply to a step, when it is there; failures are in it."""
        assert self._child.loaded, "started before"
        with self._lock:
            self._count += 1
            step = replace(step, number=self._count)
        if self._child.loaded[0].signature.is_async:
            return self._submit_async(step)
        return self._thread.submit(self._do, step)

    def end(self, episode: str) -> None:
        """The episode is over; its object can go."""
        if self._child.loaded[0].signature.is_async:
            with self._lock:
                self._child.send(End(episode=episode))
        else:
            self._thread.submit(self._child.send, End(episode=episode))

    def close(self) -> None:
        """End the child; what it was doing fails."""
        self._child.kill()
        reader = self._reader
        if reader is not None:
            reader.join()
        self._thread.shutdown(cancel_futures=True)
        self._child.end()

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
        with self._lock:
            self._waiting[step.number] = step, future
            try:
                self._child.start()
            except BasculeError as error:
                del self._waiting[step.number]
                future.set_result(Reply(error=f"{step.title(self._source.name)}: {error}"))
                return future
            self._child.send(step)
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, daemon=True)
                self._reader.start()
        return future

    def _read(self) -> None:
        while True:
            try:
                message: Message = self._child.receive(self._blocked_s, "its process")
            except RewardTimeoutError:
                self._give_up(
                    f"its event loop stood still for {self._blocked_s:g} s: an async environment must not block it"
                )
                return
            except BasculeError as error:
                self._give_up(str(error))
                return
            if isinstance(message, Replied):
                with self._lock:
                    waiting = self._waiting.pop(message.number, None)
                # One that is missing was given up with a child that had just been replaced.
                if waiting is not None:
                    waiting[1].set_result(message.reply)

    def _give_up(self, error: str) -> None:
        """What was under way has failed; the next step starts another child."""
        with self._lock:
            lost, self._waiting, self._reader = list(self._waiting.values()), {}, None
        for step, future in lost:
            future.set_result(Reply(error=f"{step.title(self._source.name)}: {error}"))
