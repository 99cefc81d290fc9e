"""Who is late when nothing moves, and that a process that was stopped shows."""

import signal
import subprocess
import sys
import time

import pytest

from bridge.progress import (
    BridgeProgress,
    EngineProgress,
    ProgressBoard,
    Stage,
    WorkerProgress,
    who_is_late,
)

WRITER = """
import sys, time
from bridge.progress import ProgressNote, Stage
note = ProgressNote(sys.argv[1], 1)
note.at(Stage.JOINED)
note.at(Stage.LOADING, 7, 3)
note.arrived()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_worker_that_stops_running_shows_on_the_board() -> None:
    board = ProgressBoard(2)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, board.path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    first, second = board.read()
    assert first.stage is Stage.NOT_BEGUN
    assert (second.stage, second.version, second.bucket, second.received) == (Stage.LOADING, 7, 3, 1)
    time.sleep(1.2)
    # It does nothing, and yet it runs.
    assert board.read()[1].silent_s < 1
    writer.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    assert board.read()[1].silent_s > 1
    assert board.read()[1].stage is Stage.LOADING
    writer.kill()
    writer.communicate()
    board.close()


def worker(stage: Stage, bucket: int = 4, silent_s: float = 0.3) -> WorkerProgress:
    return WorkerProgress(stage=stage, version=7, bucket=bucket, received=bucket, silent_s=silent_s)


def engine(*workers: WorkerProgress, call: str = "update") -> EngineProgress:
    return EngineProgress(call=call, workers=workers)


def bridge(doing: str = "", awaits: str = "") -> BridgeProgress:
    return BridgeProgress(doing=doing, awaits=awaits, received=6)


WAITS = engine(worker(Stage.WAITING))
SENDS = bridge("sends bucket 4")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param(
            {"bridge": (0.1, SENDS), "engine 0": (0.2, WAITS), "engine 1": (9.0, WAITS)},
            ["engine 1 (its process has not answered for 9 s; last: waits for bucket 4)"],
            id="an actor that does not answer",
        ),
        pytest.param(
            {"bridge": (9.0, None), "engine 0": (0.2, WAITS)},
            ["bridge (its process has not answered for 9 s)"],
            id="a bridge that never answered",
        ),
        pytest.param(
            {
                "bridge": (0.1, SENDS),
                "engine 0": (0.1, WAITS),
                "engine 1": (0.1, engine(worker(Stage.WAITING), worker(Stage.WAITING, silent_s=8.0))),
            },
            ["engine 1 (worker 1 has not run for 8 s; it waits for bucket 4)"],
            id="a worker whose process was stopped",
        ),
        pytest.param(
            {
                "bridge": (0.1, SENDS),
                "engine 0": (0.1, engine(worker(Stage.LOADING, 2))),
                "engine 1": (0.1, WAITS),
            },
            ["engine 0 (worker 0 checks and loads bucket 2)"],
            id="a worker that is stuck in its work",
        ),
        pytest.param(
            {
                "bridge": (0.1, bridge("waits for the report of engine 1")),
                "engine 0": (0.1, engine(worker(Stage.DONE), call="")),
                "engine 1": (0.1, engine(worker(Stage.JOINED), call="begin of the update")),
            },
            ["engine 1 (vLLM's core is at its begin of the update; last: has joined the group)"],
            id="a core that does not begin",
        ),
        pytest.param(
            {"bridge": (0.1, bridge(awaits="trainer rank 3")), "engine 0": (0.1, WAITS)},
            ["trainer rank 3 (the bridge waits for its part of the bucket after 6)"],
            id="a trainer that does not send",
        ),
        pytest.param(
            {
                "bridge": (0.1, bridge("joins its groups")),
                "engine 0": (0.1, engine(worker(Stage.JOINED), call="join")),
            },
            ["trainer rank 3 (has not finished)"],
            id="a trainer that does not join",
        ),
        pytest.param(
            {"bridge": (0.1, SENDS), "engine 0": (0.1, WAITS)},
            ["bridge (sends bucket 4, which engines wait for and do not get)"],
            id="a network that is gone",
        ),
    ],
)
def test_the_one_on_whom_the_others_wait_is_named(said: dict, expected: list[str]) -> None:
    pending = [*said, "trainer rank 3"]
    assert [str(late) for late in who_is_late(said, pending, 5.0)] == expected


def test_who_has_finished_is_not_late() -> None:
    said = {
        "bridge": (0.1, SENDS),
        "engine 0": (9.0, WAITS),
        "engine 1": (0.1, engine(worker(Stage.LOADING))),
    }
    (late,) = who_is_late(said, ["bridge", "engine 1"], 5.0)
    assert late.name == "engine 1"
