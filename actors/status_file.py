"""status.json: how far a run is and what it waits for, for `bascule status`."""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from algorithms.progress import Progress

STATUS = "status.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What the driver last said."""

    time: float
    """Unix time."""
    step: int = 0
    """The last one that is done."""
    version: int = 0
    """Of the weights."""
    restarts: int = 0
    """Of trainers, engines, bridge and reward workers."""
    phase: str = ""
    """Of the wait that has gone on for a while; empty when there is none."""
    waiting_for: tuple[str, ...] = ()
    """Who is late in it."""
    waited_s: float = 0.0


class StatusFile:
    """Writes it; a reader sees the old or the new one, never a part. For the main thread."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS
        self._status = Status(time=time.time())
        self._restarts = 0

    def step_done(self, progress: Progress) -> None:
        """The loop has done a step, and waits for nobody."""
        self._write(
            Status(time=time.time(), step=progress.step, version=progress.version, restarts=self._restarts)
        )

    def waiting(self, phase: str, owners: Sequence[str], seconds: float) -> None:
        """A wait goes on (actors.deadline.Observer)."""
        self._write(
            Status(
                time=time.time(),
                step=self._status.step,
                version=self._status.version,
                restarts=self._restarts,
                phase=phase,
                waiting_for=tuple(owners),
                waited_s=round(seconds, 1),
            )
        )

    def restarted(self) -> None:
        """Something was started again."""
        self._restarts += 1

    def _write(self, status: Status) -> None:
        self._status = status
        partial = self._path.with_name(f"{STATUS}.partial")
        # A run that can write nothing else says so itself.
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(asdict(status)) + "\n")
            partial.replace(self._path)


def read_status(directory: Path) -> Status | None:
    """What the driver last said, None when it has said nothing."""
    try:
        content = json.loads((directory / STATUS).read_text())
        return Status(**{**content, "waiting_for": tuple(content["waiting_for"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
