"""The command in a process in which a fault is waiting: at the first moment of a phase it hits one of the actors.

`python -m tests.actors.fault_driver KIND PHASE HOW ARGUMENTS...` is `bascule ARGUMENTS...`. Not a test.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

TITLES = {
    "trainer": "ray::TrainerRank",
    "engine": "ray::Engine",
    "bridge": "ray::BridgeHost",
    "reward": "ray::RewardWorker",
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# Of each phase: what begins it, and at which call, so that it is never the first step's.
PHASES = {
    "generate": ("actors.engine_group", "EngineGroup", "generate", 3),
    "score": ("actors.reward_worker", "RewardGroup", "score", 3),
    "train": ("actors.trainer", "TrainerGroup", "step", 2),
    "sync": ("actors.bridge", "WeightBridge", "sync", 2),
    "save": ("actors.trainer", "TrainerGroup", "begin_state", 2),
    "evaluate": ("actors.metrics", "RunRecorder", "step", 2),
}


def hit(kind: str, how: str) -> None:
    """Do it, once there is such a process."""
    number = SIGNALS[how]
    if kind == "driver":
        if how == "stop":
            # Nobody is left to let it go on.
            os.system(f"(sleep 5; kill -CONT {os.getpid()}) &")
        os.kill(os.getpid(), number)
        return
    while True:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_ours(entry, TITLES[kind]):
                os.kill(int(entry.name), number)
                print(f"fault: {how} {kind} pid {entry.name}", file=sys.stderr, flush=True)  # noqa: T201
                return
        time.sleep(0.05)


def _is_ours(entry: Path, title: str) -> bool:
    mark = os.environ["BASCULE_TEST_RUN"].encode()
    try:
        return (entry / "cmdline").read_bytes().startswith(title.encode()) and mark in (
            entry / "environ"
        ).read_bytes()
    except OSError:
        return False


def arm(kind: str, phase: str, how: str) -> None:
    """Hit when the phase begins."""

    def strike() -> None:
        threading.Thread(target=hit, args=(kind, how), daemon=True).start()

    if phase == "start":
        strike()
        return
    module, owner, method, number = PHASES[phase]
    target: Any = getattr(__import__(module, fromlist=[owner]), owner)
    setattr(target, method, _counted(getattr(target, method), number, strike))


def _counted(call: Callable[..., Any], number: int, strike: Callable[[], None]) -> Callable[..., Any]:
    calls: list[int] = []

    @wraps(call)
    def counted(*arguments: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            strike()
        return call(*arguments, **others)

    return counted


if __name__ == "__main__":
    from actors.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    arm(*sys.argv[1:4])
    sys.exit(main(sys.argv[4:]))
