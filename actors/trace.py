"""trace.json: what every process of a run did when, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Source of the format: "Trace Event Format" of Chrome's trace viewer, the JSON array of complete events (`X`) and
metadata (`M`), one to a line.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray

from actors import deadline
from actors.sinks import Sink
from actors.spans import SpanLog, Taken
from configs.errors import BasculeError

TRACE, OLDER = "trace.json", "trace-older.json"
DRIVER = "driver"
_END = "\n]\n"
_LAST_S = 2.0
# The driver's lane of steps, which are written a moment after they end, so that phases are not within them.
_STEPS = 1000

Tracks = Callable[[], Mapping[str, Callable[[], Any]]]
"""The processes that there are now: by name what asks one for its spans, and gives Ray's reference."""


class TraceFile:
    """A JSON array that is complete after every write; after a crash at most its last lines are not."""

    def __init__(self, directory: Path) -> None:
        self._path, self._older = directory / TRACE, directory / OLDER
        self._named: set[tuple[str, str, int]] = set()

    def begin(self) -> None:
        """Forget what is there."""
        self._older.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        self._named.clear()

    def go_on(self) -> None:
        """Keep the complete lines of what an earlier process has left."""
        if not self._path.is_file():
            return
        kept = list(_complete(self._path.read_text(errors="replace").splitlines()))
        self._path.write_text("[\n" + ",\n".join(kept) + _END if kept else "")

    def turn(self) -> None:
        """Begin a new file; this one becomes the older one."""
        if self._path.is_file():
            self._path.replace(self._older)
        self._named.clear()

    def write(self, name: str, taken: Taken) -> None:
        """Add the spans of the process that is called `name`."""
        if not taken.spans:
            return
        events = [event for event in _events(name, taken) if self._is_new(name, taken, event)]
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        with self._path.open("a+b") as file:
            size = file.tell()
        with self._path.open("r+b") as file:
            # Over the end, so that there is one again.
            if size:
                file.seek(size - len(_END))
            file.write((f",\n{lines}{_END}" if size else f"[\n{lines}{_END}").encode())

    def _is_new(self, name: str, taken: Taken, event: Mapping[str, Any]) -> bool:
        """Names of processes and lanes are written once."""
        if event["ph"] != "M":
            return True
        key = (f"{event['name']} {name}", f"{taken.host} {taken.pid}", event.get("tid", 0))
        if key in self._named:
            return False
        self._named.add(key)
        return True


class Trace(Sink):
    """Collects spans after every step, without waiting for anyone, and writes those of the last steps."""

    name = "trace"

    def __init__(self, directory: Path, steps: int) -> None:
        """trace.json is begun anew after `steps` steps, and the one before is kept; 0 writes none."""
        self.spans = SpanLog()
        self._file = TraceFile(directory)
        self._steps = steps
        self._in_file = 0
        self._tracks: list[Tracks] = []
        self._asked: dict[str, Any] = {}

    def watch(self, tracks: Tracks) -> None:
        """Ask these, too, from now on. Their spans of before are taken as well."""
        self._tracks.append(tracks)

    def open(self, step: int | None) -> None:
        """A file of its own for a new run; one that goes on adds to what is there."""
        if step is None:
            self._file.begin()
        else:
            self._file.go_on()

    def row(self, row: Mapping[str, float]) -> None:
        """A step is done."""
        if "time/step" not in row or not self._steps:
            return
        self.spans.past(f"step {row['step']:.0f}", row["time/step"], _STEPS)
        if self._in_file == self._steps:
            self._file.turn()
            self._in_file = 0
        self._in_file += 1
        self._collect(0.0)

    def close(self, outcome: str) -> None:
        """What there is to the end, from those that answer within seconds."""
        if self._steps:
            self._collect(0.0)
            self._collect(_LAST_S, ask=False)

    def _collect(self, timeout_s: float, *, ask: bool = True) -> None:
        """Write what has been answered; ask those who have no question to answer."""
        self._file.write(DRIVER, self.spans.take())
        if not self._tracks or not ray.is_initialized():
            return
        refs = {ref: name for name, ref in self._asked.items()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        for ref in ready:
            del self._asked[refs[ref]]
            try:
                taken = deadline.get(ref, refs[ref], timeout_s=_LAST_S, phase="spans")
                self._file.write(refs[ref], taken)
            except BasculeError:
                # It is gone, with its spans; another one may have its name.
                continue
        if ask:
            living = {name: call for tracks in self._tracks for name, call in tracks().items()}
            self._asked = {name: ref for name, ref in self._asked.items() if name in living}
            for name, call in living.items():
                if name not in self._asked:
                    self._asked[name] = call()


def _events(name: str, taken: Taken) -> Iterable[dict[str, Any]]:
    process = _process_id(name)
    label = f"{name} ({taken.host}, pid {taken.pid})"
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": label}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    for lane in sorted({span.lane for span in taken.spans}):
        args = {"name": "steps" if lane == _STEPS else f"{name} {lane}"}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": lane, "args": args}
    category = name.rstrip(" 0123456789")
    for span in taken.spans:
        yield {
            "ph": "X",
            "name": span.name,
            "cat": category,
            "pid": process,
            "tid": span.lane,
            "ts": span.start_us,
            "dur": span.duration_us,
            "args": dict(span.details),
        }


_KINDS = (DRIVER, "bridge", "trainer rank", "engine", "reward worker", "teacher engine")


def _process_id(name: str) -> int:
    """A number for a process of a run, in the order in which they are to be seen; the same after a resume."""
    kind, _, number = name.rpartition(" ")
    if not number.isdigit():
        kind, number = name, "0"
    place = _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
    return 1 + place * 100_000 + int(number)


def _complete(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        text = line.rstrip(",")
        try:
            event = json.loads(text)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield text
