"""Spans, and the file that Perfetto reads."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

from actors.metrics import RunRecorder
from actors.spans import Span, SpanLog, Taken, traced
from actors.trace import OLDER, TRACE, TraceFile
from tests.actors.consoles import Console


class Worker:
    def __init__(self) -> None:
        self.spans = SpanLog()

    @traced("work", number=lambda number: number)
    async def work(self, number: int) -> int:
        with self.spans("part"):
            await asyncio.sleep(0.02)
        return number


def taken(*names: str) -> Taken:
    spans = tuple(Span(name=name, start_us=10, duration_us=5, lane=0) for name in names)
    return Taken(host="here", pid=7, spans=spans)


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def names(path: Path) -> list[str]:
    return [event["name"] for event in load(path) if event["ph"] == "X"]


def test_what_overlaps_has_a_lane_of_its_own_and_what_is_within_does_not() -> None:
    worker = Worker()

    async def both() -> list[int]:
        found = await asyncio.gather(worker.work(1), worker.work(2))
        return [*found, await worker.work(3)]

    before = time.time_ns() // 1000
    assert asyncio.run(both()) == [1, 2, 3]
    spans = worker.spans.take().spans
    works = {span.details["number"]: span for span in spans if span.name == "work"}
    assert [works[number].lane for number in (1, 2)] == [0, 1]
    # A lane is used again.
    assert works[3].lane in (0, 1)
    assert works[1].start_us < works[2].start_us + works[2].duration_us
    assert all(span.duration_us >= 19_000 and span.start_us >= before for span in works.values())
    for lane in (0, 1):
        inner, outer = (
            next(span for span in spans if (span.name, span.lane) == (name, lane))
            for name in ("part", "work")
        )
        assert outer.start_us <= inner.start_us
        assert inner.start_us + inner.duration_us <= outer.start_us + outer.duration_us
    assert worker.spans.take().spans == ()


def test_threads_have_lanes_of_their_own() -> None:
    spans = SpanLog()

    def inside() -> None:
        with spans("thread"):
            pass

    with spans("main"):
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
    assert {span.name: span.lane for span in spans.take().spans} == {"main": 0, "thread": 1}


def test_the_file_is_whole_after_every_write_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    file = TraceFile(tmp_path)
    file.begin()
    file.write("driver", taken())
    assert not (tmp_path / TRACE).exists()
    file.write("driver", taken("one"))
    file.write("engine 1", taken("two"))
    events = load(tmp_path / TRACE)
    assert [event["name"] for event in events if event["ph"] == "X"] == ["one", "two"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "driver (here, pid 7)", "engine 1 (here, pid 7)",
    }  # fmt: skip
    first, second = (event["pid"] for event in events if event["name"] == "process_name")
    content = (tmp_path / TRACE).read_text()
    # Killed in the middle of a line.
    (tmp_path / TRACE).write_text(content[: content.rindex('"two"') + 3])
    again = TraceFile(tmp_path)
    again.go_on()
    assert names(tmp_path / TRACE) == ["one"]
    again.write("engine 1", taken("three"))
    assert names(tmp_path / TRACE) == ["one", "three"]
    # The same process is the same track.
    assert {event["pid"] for event in load(tmp_path / TRACE)} == {first, second}


def test_a_long_run_keeps_the_newest_steps_and_those_before(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, 10, Console(), trace_steps=2) as recorder:
        for step in range(1, 6):
            with recorder.phase("train"):
                pass
            recorder.step(step, {"loss": 1.0, "tokens_per_second": 1.0, "time/step": 0.01})
    assert [name for name in names(tmp_path / OLDER) if name != "train"] == ["step 3", "step 4"]
    assert names(tmp_path / TRACE) == ["train", "step 5"]
    assert all(event["args"] for event in load(tmp_path / TRACE) if event["ph"] == "M")


def test_one_that_fails_is_told_no_more_and_the_run_goes_on(tmp_path: Path) -> None:
    console = Console()
    with RunRecorder(tmp_path, 10, console, trace_steps=2) as recorder:
        (tmp_path / TRACE).mkdir()
        for step in (1, 2):
            recorder.step(step, {"loss": 1.0, "tokens_per_second": 1.0, "time/step": 0.01})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (warning,) = [line for line in console.lines if line.startswith("warning")]
    assert "trace failed and gets nothing more" in warning
