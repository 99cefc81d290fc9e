"""How long each phase of a step took."""

import time
from collections.abc import Generator
from contextlib import contextmanager


class Clock:
    """`with clock("generate"): ...` adds the seconds spent to that phase."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Time the body of a `with` statement."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        """Seconds by phase as `time/PHASE`, and since the clock was made as `time/step`."""
        return {f"time/{phase}": seconds for phase, seconds in self._phases.items()} | {
            "time/step": time.monotonic() - self._start
        }
