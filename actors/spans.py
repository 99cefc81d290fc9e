"""What a process did when: spans on the clock of its host, which the driver takes from time to time."""

import functools
import heapq
import inspect
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# Of a process whose spans nobody takes.
_MOST = 10_000

# The lane of the span that is open in this thread or task, so that what happens within it is drawn within it.
_LANE: ContextVar[int | None] = ContextVar("lane", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something that was done, from `start_us` (microseconds of Unix time) on for `duration_us`.

    Spans of one lane are beside or within each other; those of different lanes may overlap.
    """

    name: str
    start_us: int
    duration_us: int
    lane: int
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a process has done since it was last asked."""

    host: str
    pid: int
    spans: tuple[Span, ...]


class SpanLog:
    """Spans of one process, the newest of them where nobody takes them. For any threads and tasks."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=_MOST)
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._lanes = 0

    @contextmanager
    def __call__(self, name: str, **details: Any) -> Generator[None]:
        """The body of a `with` statement as a span, in the lane of the one around it or in one of its own."""
        outer = _LANE.get()
        lane = self._take_lane() if outer is None else outer
        token = _LANE.set(lane)
        start_us, began = time.time_ns() // 1000, time.perf_counter()
        try:
            yield
        finally:
            # Not from the clock, which may be set meanwhile.
            duration_us = int((time.perf_counter() - began) * 1e6)
            span = Span(name=name, start_us=start_us, duration_us=duration_us, lane=lane, details=details)
            self._spans.append(span)
            _LANE.reset(token)
            if outer is None:
                with self._lock:
                    heapq.heappush(self._free, lane)

    def past(self, name: str, seconds: float, lane: int) -> None:
        """A span of this lane, for which nobody else asks, that ends now."""
        duration_us = int(seconds * 1e6)
        start_us = time.time_ns() // 1000 - duration_us
        self._spans.append(Span(name=name, start_us=start_us, duration_us=duration_us, lane=lane))

    def take(self) -> Taken:
        """The spans that have ended since the last call."""
        spans: list[Span] = []
        while self._spans:
            spans.append(self._spans.popleft())
        return Taken(host=socket.gethostname(), pid=os.getpid(), spans=tuple(spans))

    def _take_lane(self) -> int:
        with self._lock:
            if self._free:
                return heapq.heappop(self._free)
            self._lanes += 1
            return self._lanes - 1


def traced(name: str, **told: Callable[..., Any]) -> Callable[[Any], Any]:
    """A decorator for methods of what has a SpanLog as `spans`: each call is a span.

    `told` are its details, each from the arguments of the call (without self).
    """

    def decorate(method: Any) -> Any:
        def span(owner: Any, arguments: tuple[Any, ...]) -> Any:
            return owner.spans(name, **{key: get(*arguments) for key, get in told.items()})

        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def waiting(self: Any, *arguments: Any, **named: Any) -> Any:
                with span(self, arguments):
                    return await method(self, *arguments, **named)

            return waiting

        @functools.wraps(method)
        def calling(self: Any, *arguments: Any, **named: Any) -> Any:
            with span(self, arguments):
                return method(self, *arguments, **named)

        return calling

    return decorate
