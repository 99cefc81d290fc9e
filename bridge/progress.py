"""How far everyone has got in a sync, and who is late when nothing moves any more.

Workers write it into memory that they share with their engine's actor, which costs no message and can be read
while vLLM's core is busy, or does not run.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_SLOT = struct.Struct("=dqqqq")
_BEAT_S = 0.5


class Stage(IntEnum):
    """What a worker is doing; the bucket that it is about comes with it."""

    NOT_BEGUN = 0
    JOINING = 1
    JOINED = 2
    WAITING = 3
    LOADING = 4
    REPORTING = 5
    DONE = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerProgress:
    """What a worker last wrote, and how long ago its process was last seen to run."""

    stage: Stage
    version: int
    bucket: int
    received: int
    """Buckets that have arrived."""
    silent_s: float

    def __str__(self) -> str:
        return _WORDS[self.stage].format(self=self)


_WORDS = {
    Stage.NOT_BEGUN: "has not begun to join",
    Stage.JOINING: "joins the group",
    Stage.JOINED: "has joined the group",
    Stage.WAITING: "waits for bucket {self.bucket}",
    Stage.LOADING: "checks and loads bucket {self.bucket}",
    Stage.REPORTING: "checks that all came and reports",
    Stage.DONE: "has loaded all of version {self.version}",
}


class ProgressBoard:
    """A place for each worker of an engine; made by its actor. It has no name in any file system."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._file = os.memfd_create("bascule-progress")
        os.ftruncate(self._file, _SLOT.size * workers)
        self._memory = mmap.mmap(self._file, 0)

    @property
    def path(self) -> str:
        """Where other processes of this machine open it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def read(self) -> tuple[WorkerProgress, ...]:
        """What each worker last wrote."""
        now = time.monotonic()
        found: list[WorkerProgress] = []
        for worker in range(self._workers):
            beat, stage, version, bucket, received = _SLOT.unpack_from(self._memory, worker * _SLOT.size)
            found.append(
                WorkerProgress(
                    stage=Stage(stage),
                    version=version,
                    bucket=bucket,
                    received=received,
                    silent_s=now - beat if beat else 0.0,
                )
            )
        return tuple(found)

    def close(self) -> None:
        """Free it, once the last worker has closed its part."""
        self._memory.close()
        os.close(self._file)


class ProgressNote:
    """A worker's place on the board. A thread shows that the process runs, whatever the worker does."""

    def __init__(self, path: str | None, worker: int) -> None:
        """Without a `path` nobody reads it."""
        if path is None:
            self._memory = mmap.mmap(-1, _SLOT.size)
            self._at = 0
        else:
            with Path(path).open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)
            self._at = worker * _SLOT.size
        self._state = (Stage.NOT_BEGUN, 0, 0)
        self._received = 0
        self._closed = threading.Event()
        if path is not None:
            threading.Thread(target=self._beat, name="sync-progress", daemon=True).start()

    def at(self, stage: Stage, version: int = 0, bucket: int = 0) -> None:
        """Say what the worker does now."""
        if version != self._state[1]:
            self._received = 0
        self._state = (stage, version, bucket)
        self._write()

    def arrived(self) -> None:
        """Another bucket is there."""
        self._received += 1
        self._write()

    def close(self) -> None:
        """Write no more."""
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S):
            self._write()

    def _write(self) -> None:
        # Two threads may write at once: what they write differs by one step at most.
        _SLOT.pack_into(self._memory, self._at, time.monotonic(), *self._state, self._received)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineProgress:
    """What an engine's actor asked of vLLM's core (empty: nothing of a sync), and how far its workers are."""

    call: str
    workers: tuple[WorkerProgress, ...]

    def __str__(self) -> str:
        if not self.workers:
            return "has not begun to join"
        if len(self.workers) == 1:
            return str(self.workers[0])
        return ", ".join(f"worker {number} {worker}" for number, worker in enumerate(self.workers))


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeProgress:
    """What the bridge is doing; empty where that is nothing."""

    doing: str
    """Towards engines: `sends bucket 3`."""
    awaits: str
    """The trainer rank from which it receives."""
    received: int
    """Buckets of this version that have arrived."""

    def __str__(self) -> str:
        received = f"has received {self.received} buckets"
        if self.awaits:
            received += f" and waits for {self.awaits}"
        return f"{self.doing}, {received}" if self.doing else received


@dataclass(frozen=True, kw_only=True, slots=True)
class Late:
    """Somebody on whom the others wait, and what is known of it."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


Said = Mapping[str, tuple[float, BridgeProgress | EngineProgress | None]]
"""By name: seconds since it last answered, and what it said; None when it never has."""


def who_is_late(said: Said, pending: Sequence[str], silent_s: float) -> tuple[Late, ...]:
    """Who holds up a sync in which nothing moves. `pending` have not finished what they were asked for.

    First those that do not run (`silent_s` without a sign), then those that have something to do and do not get on
    with it, then those that the bridge waits for; if all of them only wait, those of whom nothing is known.
    """
    asked = {name: answer for name, answer in said.items() if name in pending}
    for look in (_does_not_run, _is_busy, _is_awaited):
        late = tuple(
            Late(name=who, why=why)
            for name, (age, answer) in asked.items()
            for who, why in look(name, age, answer, silent_s)
        )
        if late:
            return late
    for name, (_, answer) in asked.items():
        if isinstance(answer, BridgeProgress) and answer.doing.startswith("sends"):
            return (Late(name=name, why=f"{answer.doing}, which engines wait for and do not get"),)
    unknown = [name for name in pending if name not in said] or list(pending)
    return tuple(Late(name=name, why="has not finished") for name in unknown)


_Found = list[tuple[str, str]]
_Answer = BridgeProgress | EngineProgress | None


def _does_not_run(name: str, age: float, answer: _Answer, silent_s: float) -> _Found:
    if age > silent_s:
        return [(name, f"its process has not answered for {age:.0f} s{_last(answer)}")]
    if not isinstance(answer, EngineProgress):
        return []
    stopped = [
        f"worker {number} has not run for {worker.silent_s:.0f} s; it {worker}"
        for number, worker in enumerate(answer.workers)
        if worker.silent_s > silent_s
    ]
    return [(name, "; ".join(stopped))] if stopped else []


def _is_busy(name: str, age: float, answer: _Answer, silent_s: float) -> _Found:
    if not isinstance(answer, EngineProgress):
        return []
    busy = [
        f"worker {number} {worker}"
        for number, worker in enumerate(answer.workers)
        if worker.stage in (Stage.LOADING, Stage.REPORTING)
    ]
    if busy:
        return [(name, "; ".join(busy))]
    stages = {worker.stage for worker in answer.workers}
    joins = answer.call == "join"
    # Workers that only wait for others are in these.
    waiting = {Stage.JOINING, Stage.JOINED} if joins else {Stage.WAITING}
    if answer.call and not stages & waiting:
        return [(name, f"vLLM's core is at its {answer.call}{_last(answer)}")]
    return []


def _is_awaited(name: str, age: float, answer: _Answer, silent_s: float) -> _Found:
    if isinstance(answer, BridgeProgress) and answer.awaits and not answer.doing:
        return [(answer.awaits, f"the bridge waits for its part of the bucket after {answer.received}")]
    return []


def _last(answer: _Answer) -> str:
    return "" if answer is None else f"; last: {answer}"
