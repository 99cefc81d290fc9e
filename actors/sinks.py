"""Who is told of a run's numbers besides its own files. None of them can break a run."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from configs.errors import BasculeError

TRACKERS = "trackers.json"
"""What those outside of the run directory call the run."""


class Sink(Protocol):
    """Told of a run's numbers, from the main thread; of events from any. What a class lacks does nothing."""

    name: str
    """For messages."""

    def open(self, step: int | None) -> None:
        """The records begin; with a `step` they go on after it."""

    def go_back(self, step: int | None) -> None:
        """Forget what came after `step`, or everything."""

    def row(self, row: Mapping[str, float]) -> None:
        """A row of metrics.jsonl: with `step`, and NaN where it has null."""

    def event(self, kind: str) -> None:
        """There is another line in events.jsonl."""

    def phase(self, phase: str, *, begins: bool) -> None:
        """A phase of the loop begins or ends."""

    def waiting(self, phase: str, owners: Sequence[str], seconds: float) -> None:
        """A wait goes on (actors.deadline.Observer)."""

    def close(self, outcome: str) -> None:
        """The run has `ended`, `failed` or been `interrupted`. Further events may come."""


class Sinks:
    """Several of them. One that fails is told nothing more, and the run goes on."""

    def __init__(self, sinks: Sequence[Sink], warn: Callable[[str], None]) -> None:
        self._sinks = list(sinks)
        self._warn = warn

    def tell(self, call: Callable[[Sink], None]) -> None:
        """Call all of them. Raises only what is a BasculeError: then someone asked for what cannot be."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except BasculeError:
                raise
            except Exception as error:  # noqa: BLE001
                # Foreign code, and networks: a run is worth more than a picture of it.
                self._sinks.remove(sink)
                self._warn(f"warning: {sink.name} failed and gets nothing more: {error!r}")


class TensorBoard(Sink):
    """The curves, in `tensorboard/`."""

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "tensorboard"

    def open(self, step: int | None) -> None:
        """Begin a file of events, in place of all others or, with a `step`, of what they have after it."""
        # Seconds of imports, while nothing waits yet.
        from torch.utils.tensorboard import SummaryWriter

        if step is None:
            shutil.rmtree(self._directory, ignore_errors=True)
        purge_step = None if step is None else step + 1
        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)

    def go_back(self, step: int | None) -> None:
        """As `open`."""
        self._writer.close()
        self.open(step)

    def row(self, row: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()

    def close(self, outcome: str) -> None:
        """End the file."""
        self._writer.close()
