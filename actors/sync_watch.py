"""Notices a sync in which nothing moves any more, and says on whom it waits."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from bridge.progress import BridgeProgress, EngineProgress, Late, who_is_late
from configs.errors import BasculeError


class StalledError(BasculeError):
    """Nothing has moved in a sync for bridge.stall_timeout_s. Names the phase, who is late and where all are."""

    late: tuple[str, ...] = ()
    """Names of those who are late."""


class SyncWatch:
    """Asks bridge and engines how far they are while they work, without ever waiting for an answer."""

    def __init__(self, phase: str, questions: Mapping[str, Callable[[], Any]], timeout_s: float) -> None:
        """`questions` start a call of each one's `progress`, by its name."""
        self._phase = phase
        self._questions = questions
        self._timeout_s = timeout_s
        self._moved = time.monotonic()
        self._asked: dict[str, Any] = {}
        self._heard: dict[str, float] = dict.fromkeys(questions, self._moved)
        self._said: dict[str, BridgeProgress | EngineProgress] = {}
        self._state: Any = None

    @property
    def look_s(self) -> float:
        """How often to look."""
        return min(1.0, self._timeout_s / 10)

    def look(self, pending: Sequence[str]) -> None:
        """Raises StalledError when neither `pending` nor anyone's progress has changed for too long."""
        for name in self._questions:
            self._listen(name)
        now = time.monotonic()
        state = tuple(pending), {name: _without_time(said) for name, said in self._said.items()}
        if state != self._state:
            self._state, self._moved = state, now
        if now - self._moved <= self._timeout_s:
            return
        said = {name: (now - heard, self._said.get(name)) for name, heard in self._heard.items()}
        late = who_is_late(said, pending, self._timeout_s / 2)
        raise _stalled(f"{self._phase}: nothing has moved for {now - self._moved:.0f} s", late, self._said)

    def _listen(self, name: str) -> None:
        ref = self._asked.get(name)
        if ref is not None:
            if not ray.wait([ref], timeout=0)[0]:
                return
            try:
                self._said[name], self._heard[name] = ray.get(ref), time.monotonic()
            except RayError:
                # Its death shows in what it was asked to do.
                return
        self._asked[name] = self._questions[name]()


def _without_time(said: BridgeProgress | EngineProgress) -> Any:
    if isinstance(said, BridgeProgress):
        return said
    return said.call, [(one.stage, one.version, one.bucket, one.received) for one in said.workers]


def _stalled(
    what: str, late: Sequence[Late], said: Mapping[str, BridgeProgress | EngineProgress]
) -> StalledError:
    names = [one.name for one in late]
    others = "; ".join(f"{name}: {progress}" for name, progress in said.items() if name not in names)
    error = StalledError(f"{what}; late: {', '.join(map(str, late))}{f'; {others}' if others else ''}")
    error.late = tuple(names)
    return error
