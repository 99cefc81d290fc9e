"""How long each phase of a step took."""

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Around = Callable[[str], AbstractContextManager[None]]
"""What is told of a phase by name: it is entered and left with it."""


class Clock:
    """`with clock("generate"): ...` adds the seconds spent to that phase."""

    def __init__(self, around: Around = lambda _: nullcontext()) -> None:
        self._start = time.monotonic()
        self._around = around
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Time the body of a `with` statement."""
        start = time.monotonic()
        try:
            with self._around(phase):
                yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        """Seconds by phase as `time/PHASE`, and since the clock was made as `time/step`."""
        return {f"time/{phase}": seconds for phase, seconds in self._phases.items()} | {
            "time/step": time.monotonic() - self._start
        }
