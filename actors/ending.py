"""Ends of a run before its last step: a signal, a wall-clock limit, a node that drains.

A run that is told to end finishes its step, if the time it has allows, saves a state and ends. When the time is
nearly over, an alarm ends whatever it waits for; SIGINT has no such time, and a second one ends the run at once.
"""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Literal, Self

from actors.console import Console
from configs.errors import BasculeError
from configs.schema import RunConfig

TEMPORARY = 75
"""Exit code when a node drains: EX_TEMPFAIL, so that what started the run tries again."""
_GRACE_S = 30.0
_JOB_GRACE_S = 3.0
_JOB_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
# Set by Ray in the driver of a submitted job.
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# What leaving Ray and the processes take, and a save of which nothing is known yet.
_LEAVE_S = 2.0
_SAVE_S = 2.0
# Less than that is not left for the step, however long a save takes.
_SHARE = 0.3
_HEADROOM = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why a run ends early."""

    text: str
    exit_code: int
    until: float | None
    """By time.monotonic, when every process has to be gone; None when nobody counts."""


class EndedEarlyError(BasculeError):
    """A run ended before its last step because it was told to. Says what a new start does."""

    def __init__(self, reason: Reason, step: int, saved: int | None) -> None:
        """`saved` is the step of the newest state, None when there is none."""
        following = (
            "there is no state yet" if saved is None else f"started again it goes on after step {saved}"
        )
        super().__init__(f"{reason.text}: ended after step {step}; {following}")
        self.exit_code, self.step, self.saved = reason.exit_code, step, saved


class Ending:
    """Watches for reasons to end. A context manager, whose handlers are for the main thread's signals."""

    def __init__(self, config: RunConfig, console: Console, started: float) -> None:
        """`started` is when the command began, by time.monotonic."""
        self._console = console
        self._grace_s = config.cluster.grace_s or _grace_of(dict(os.environ))
        limit = config.time_limit
        self._limit = None if limit is None else started + limit
        self.reason: Reason | None = None
        self.at_once = False
        """Nothing is to be saved: a person has asked twice."""
        self._phase: Literal["start", "loop", "leaving"] = "start"
        self._shields = 0
        self._is_overdue = False
        self._save_s = _SAVE_S
        self._longest_s = 0.0
        self._step_began = time.monotonic()
        self._before: dict[int, object] = {}

    def request(self, reason: Reason) -> None:
        """End the run, unless it is told so already. For any thread."""
        if self.reason is None:
            self.reason = reason
            text = f"{reason.text}: the step that goes on is finished and saved, as far as time allows"
            # Not from a signal's handler, which may have interrupted somebody who was writing there.
            threading.Thread(target=self._console.line, args=(text,), name="say-why", daemon=True).start()
            self._arm()

    def loop_begins(self) -> None:
        """From now on there is something to finish and to save."""
        self._phase = "loop"
        self._step_began = time.monotonic()

    def loop_ends(self) -> None:
        """From now on what goes on is the end itself: no alarm interrupts it."""
        self._phase = "leaving"
        signal.setitimer(signal.ITIMER_REAL, 0)

    def step_done(self) -> None:
        """A step is over; decides whether another one fits into the time limit."""
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._step_began)
        self._step_began = now
        if self._limit is not None and now + _HEADROOM * self._longest_s + self._reserve_s() > self._limit:
            self.request(_out_of_time(self._limit))

    def saved(self, seconds: float) -> None:
        """How long a whole save takes, which has to be left."""
        self._save_s = seconds
        self._arm()

    @contextmanager
    def shielded(self) -> Generator[None]:
        """No alarm interrupts the body: a save that is under way is finished."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            if self._is_overdue:
                self._arm()

    def install(self) -> None:
        """Put the handlers in place, again where others have replaced them (ray.init does)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in (
            (signal.SIGINT, self._interrupt),
            (signal.SIGTERM, self._terminate),
            (signal.SIGALRM, self._alarm),
        ):
            before = signal.signal(number, handler)
            self._before.setdefault(number, before)

    def __enter__(self) -> Self:
        self.install()
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None or self._phase != "loop":
            self.at_once = True
            raise KeyboardInterrupt
        self.request(
            Reason(text="interrupted (once more ends it at once)", exit_code=128 + number, until=None)
        )

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        until = time.monotonic() + self._grace_s
        self.request(Reason(text="SIGTERM", exit_code=128 + number, until=until))
        if self._phase == "start":
            raise KeyboardInterrupt

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        """There is just time left to save and to leave."""
        if self.reason is None and self._limit is not None:
            self.reason = _out_of_time(self._limit)
        self._is_overdue = self._shields > 0
        if not self._is_overdue and self._phase != "leaving":
            raise KeyboardInterrupt

    def _arm(self) -> None:
        until = self._limit if self.reason is None else self.reason.until
        if until is not None and self._phase != "leaving":
            left = until - self._reserve_s() - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))

    def _reserve_s(self) -> float:
        """Seconds that are kept for the end."""
        whole = self._grace_s if self.reason is not None else float("inf")
        return min(_HEADROOM * self._save_s + _LEAVE_S, (1 - _SHARE) * whole)


def _out_of_time(limit: float) -> Reason:
    return Reason(text="time_limit", exit_code=0, until=limit)


def _grace_of(environment: dict[str, str]) -> float:
    given = environment.get(_JOB_GRACE)
    if given is not None:
        return float(given)
    return _JOB_GRACE_S if _IN_JOB in environment else _GRACE_S
