"""What trace.json says, for tests of runs that wrote one."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Begins are of the clock of the host, lengths of another one.
_TOLERANCE_US = 2_000


@dataclass(frozen=True)
class Drawn:
    """A span as the viewer draws it, in microseconds."""

    name: str
    lane: int
    begin: int
    end: int

    def overlaps(self, other: "Drawn") -> bool:
        return self.begin < other.end and other.begin < self.end


def read_trace(path: Path) -> dict[str, list[Drawn]]:
    """Spans by process, as `engine 0`, each lane of which is nested as the viewer needs it."""
    events = json.loads(path.read_text())
    names = {
        event["pid"]: event["args"]["name"].partition(" (")[0]
        for event in events
        if event["name"] == "process_name"
    }
    found: dict[str, list[Drawn]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            end = event["ts"] + event["dur"]
            drawn = Drawn(name=event["name"], lane=event["tid"], begin=event["ts"], end=end)
            found[names[event["pid"]]].append(drawn)
    for name, spans in found.items():
        for lane in {span.lane for span in spans}:
            _check_nested(name, [span for span in spans if span.lane == lane])
    return dict(found)


def _check_nested(process: str, spans: list[Drawn]) -> None:
    around: list[Drawn] = []
    for span in sorted(spans, key=lambda each: (each.begin, -each.end)):
        while around and around[-1].end <= span.begin + _TOLERANCE_US:
            around.pop()
        assert not around or span.end <= around[-1].end + _TOLERANCE_US, (process, around[-1], span)
        around.append(span)
