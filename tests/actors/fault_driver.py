"""The command in a process that hits its own actors, one fault after the other. Not a test.

`python -m tests.actors.fault_driver PLAN ARGUMENTS...` is `bascule ARGUMENTS...`. PLAN is a JSON file: `cells`,
each a kind of actor, a phase and a fault, and `log`, which gets a line for each fault, event, step and sync.
"""

import contextlib
import hashlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# What begins each phase, in the driver. When trainers start, engines do already, and the others come after them.
PHASES = {
    "start": ("actors.trainer", "TrainerGroup", "_start"),
    "generate": ("algorithms.rollouts", "Rollouts", "generate"),
    "score": ("actors.reward_worker", "RewardGroup", "_send"),
    "train": ("actors.trainer", "TrainerGroup", "step"),
    "sync": ("actors.bridge", "WeightBridge", "sync"),
    "save": ("actors.trainer", "TrainerGroup", "begin_state"),
    "evaluate": ("algorithms.grpo", "", "evaluate"),
}
# Where the actor's class is used, and which of its methods works in a phase: the others cannot raise in it.
CLASSES = {
    "trainer": ("actors.trainer", "TrainerRank"),
    "engine": ("actors.engine_start", "Engine"),
    "bridge": ("actors.bridge_home", "BridgeHost"),
    "reward": ("actors.reward_worker", "RewardWorker"),
}
METHODS = {
    "trainer": {"start": "start", "train": "step", "sync": "sync", "save": "begin_state"},
    "engine": {"start": "start", "generate": "generate", "sync": "receive", "evaluate": "generate"},
    "bridge": {"start": "connect", "sync": "forward"},
    "reward": {"start": "start", "score": "score", "evaluate": "score"},
}
# A fault of one step may be noticed in the next one only.
_GAP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Who is hit, when and how; not before this step."""

    kind: str
    phase: str
    how: str
    step: int = 0


class Faults:
    """Hits with the next cell when its phase begins, two steps after the one before."""

    def __init__(self, cells: Sequence[Cell], log: Path) -> None:
        self._cells = list(cells)
        self.log = log
        self._lock = threading.Lock()
        self._step: int | None = None
        self._struck: int | None = None

    def tell(self, **line: Any) -> None:
        """Append a line to the log."""
        with self._lock, self.log.open("a") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")

    def begins(self, step: int) -> None:
        self._step = step

    def phase(self, phase: str, is_over: Callable[[], bool] = lambda: False) -> None:
        """A phase begins: strike, if it is the next cell's."""
        if not self._cells or self._cells[0].phase != phase:
            return
        cell, step = self._cells[0], self._step
        # Ranks that are started again in a step are no start of the run.
        if (phase == "start") != (step is None):
            return
        if step is not None and (step < cell.step or step < (self._struck or step - _GAP) + _GAP):
            return
        self._cells.pop(0)
        self._struck = step
        self.tell(fault=[cell.kind, cell.phase, cell.how], step=step)
        self._strike(cell, is_over)

    def arms(self) -> None:
        """Before the command: who is to raise at the start may start before what begins that phase."""
        first = self._cells[0] if self._cells else None
        if first and first.kind != "driver" and (first.phase, first.how) == ("start", "raise"):
            self.phase("start")

    def flag(self, kind: str, method: str) -> Path:
        """While it exists, this method of this kind of actor raises."""
        return self.log.with_name(f"raise-{kind}-{method}")

    def _strike(self, cell: Cell, is_over: Callable[[], bool]) -> None:
        if cell.how == "raise":
            if cell.kind == "driver":
                raise RuntimeError("an injected fault of the driver")
            self.flag(cell.kind, METHODS[cell.kind][cell.phase]).write_text("")
        elif cell.kind == "driver":
            if cell.how == "stop":
                # Nobody is left to let it go on.
                os.system(f"(sleep 5; kill -CONT {os.getpid()}) &")
            os.kill(os.getpid(), SIGNALS[cell.how])
        else:
            threading.Thread(target=self._hit, args=(cell, is_over), daemon=True).start()

    def _hit(self, cell: Cell, is_over: Callable[[], bool]) -> None:
        while True:
            found = _processes(TITLES[cell.kind])
            if found:
                # The last one, so that with a rank 0 that is well there is somebody who waits for it.
                os.kill(found[-1], SIGNALS[cell.how])
                self.tell(hit=found[-1], inside=not is_over())
                return
            time.sleep(0.02)


def _processes(title: str) -> list[int]:
    """Processes of this run whose title begins so."""
    mark, found = os.environ["BASCULE_TEST_RUN"].encode(), list[int]()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and (entry / "cmdline").read_bytes().startswith(title.encode())
                and mark in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
    return sorted(found)


def arm(faults: Faults) -> None:
    """Let the parts of the command tell of phases, and make actors that can raise."""
    for name, (module, owner, method) in PHASES.items():
        target: Any = __import__(module, fromlist=["x"])
        target = getattr(target, owner) if owner else target
        setattr(target, method, _phase(faults, name, getattr(target, method)))
    for kind, (module, name) in CLASSES.items():
        target = __import__(module, fromlist=["x"])
        flags = {method: faults.flag(kind, method) for method in METHODS[kind].values()}
        setattr(target, name, _raising(getattr(target, name), flags, faults.log))
    from actors import restart, reward_worker, trainer
    from actors.bridge import WeightBridge
    from actors.metrics import RunRecorder
    from actors.reward_worker import SwappableRewards

    # How long actors that are stopped are given to answer; a run allows more, and these cells are many.
    setattr(reward_worker, "MARGIN_S", 8.0)  # noqa: B010
    setattr(trainer, "_CHECK_S", 6.0)  # noqa: B010
    setattr(restart, "_SETTLE_S", 5.0)  # noqa: B010

    def begin(self: Any, step: int) -> None:
        faults.begins(step)

    def event(self: Any, step: int | None, kind: str, text: str, **details: object) -> None:
        faults.tell(event=kind, text=text)

    def row(self: Any, step: int, metrics: Any) -> None:
        names = ("reward", "loss", "grad_norm")
        faults.tell(step_done=step, **{name: repr(metrics.get(name)) for name in names})

    setattr(SwappableRewards, "begin", _before(SwappableRewards.begin, begin))  # noqa: B010
    setattr(RunRecorder, "event", _before(RunRecorder.event, event))  # noqa: B010
    setattr(RunRecorder, "step", _before(RunRecorder.step, row))  # noqa: B010
    setattr(WeightBridge, "sync", _hashed(faults, WeightBridge.sync))  # noqa: B010


def _before(call: Callable[..., Any], first: Callable[..., None]) -> Callable[..., Any]:
    @wraps(call)
    def both(*arguments: Any, **others: Any) -> Any:
        first(*arguments, **others)
        return call(*arguments, **others)

    return both


def _hashed(faults: Faults, sync: Callable[..., Any]) -> Callable[..., Any]:
    """A sync that tells the hash of all that was sent."""

    @wraps(sync)
    def hashed(self: Any, version: int) -> Any:
        from configs.errors import BasculeError

        metrics = sync(self, version)
        # Whoever knows it may have been hit meanwhile.
        with contextlib.suppress(BasculeError):
            found = hashlib.sha256(repr(self.manifest()).encode()).hexdigest()
            faults.tell(version=version, sha256=found)
        return metrics

    return hashed


def _phase(faults: Faults, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def phase(*arguments: Any, **others: Any) -> Any:
        over = threading.Event()
        try:
            faults.phase(name, over.is_set)
            return call(*arguments, **others)
        finally:
            # What is hooked of scoring is the moment at which a worker is sent its first group.
            if name != "score":
                over.set()

    return phase


def _raising(base: type, flags: dict[str, Path], log: Path) -> type:
    """The class with methods that raise while their flag is there, which the first call takes away."""

    def checked(call: Callable[..., Any], flag: str) -> Callable[..., Any]:
        def check() -> None:
            # Sent to actors by value, so it brings what it needs.
            import json
            import time
            from pathlib import Path

            try:
                Path(flag).unlink()
            except FileNotFoundError:
                return
            with Path(str(log)).open("a") as file:
                file.write(json.dumps({"time": time.time(), "raised": Path(flag).name}) + "\n")
            raise RuntimeError("an injected fault")

        if inspect.iscoroutinefunction(call):

            @wraps(call)
            async def later(*arguments: Any, **others: Any) -> Any:
                check()
                return await call(*arguments, **others)

            return later

        @wraps(call)
        def now(*arguments: Any, **others: Any) -> Any:
            check()
            return call(*arguments, **others)

        return now

    methods = {name: checked(getattr(base, name), str(flag)) for name, flag in flags.items()}
    for method in methods.values():
        # Else it is sent by its name, under which the actor finds the one that never raises.
        method.__module__ = "__main__"
    return type(base.__name__, (base,), {**methods, "__module__": "__main__", "__doc__": base.__doc__})


def main(plan: Path, words: Sequence[str]) -> int:
    from actors.cli import main as command

    signal.signal(signal.SIGINT, signal.default_int_handler)
    content = json.loads(plan.read_text())
    faults = Faults([Cell(**cell) for cell in content["cells"]], Path(content["log"]))
    arm(faults)
    faults.arms()
    # Nobody reads the pipes meanwhile.
    for stream in (sys.stdout, sys.stderr):
        with Path(content["log"]).with_suffix(f".{stream.name[4:-1]}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    return command(list(words))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
