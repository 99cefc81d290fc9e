"""What the processes of a run are doing: their stacks and memory, taken on every node.

Ray knows where its actors run; a task on each node asks py-spy there, which also sees what is stopped or hangs
in a call outside of Python, and reads /proc.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors as actor_table
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import deadline
from actors.status_file import STATUS
from configs.errors import BasculeError

_DUMP_S = 10.0
_NODE_S = 45.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process of the run, as its node sees it."""

    name: str
    pid: int
    state: str
    """Of /proc: R runs, S sleeps, T is stopped, D waits for a device; empty when it is gone."""
    memory_mb: float
    stack: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """One actor of this driver, as Ray sees it."""

    kind: str
    state: str
    """ALIVE, DEAD, PENDING_CREATION ..."""
    node: str
    pid: int


def own_actors(kind: str) -> list[Actor]:
    """The actors of this driver of one kind that live, as far as Ray knows: one that is stopped does."""
    found = actors_of(ray.get_runtime_context().get_job_id())
    return [actor for actor in found if actor.kind == kind and actor.state == "ALIVE"]


def actors_of(job: str) -> list[Actor]:
    """The actors of a Ray job, the earliest first."""
    table: Mapping[str, Mapping[str, Any]] = actor_table()
    rows = sorted((row for row in table.values() if row["JobID"] == job), key=lambda row: row["StartTime"])
    return [
        Actor(
            kind=row["ActorClassName"].rpartition(".")[2],
            state=row["State"],
            node=row["Address"]["NodeID"],
            pid=row["Pid"],
        )
        for row in rows
    ]


def look_at(actors: Sequence[Actor], timeout_s: float = _NODE_S) -> dict[str, list[Process] | str]:
    """The processes of the live ones by node, with those they started, or why a node says nothing."""
    living = [actor for actor in actors if actor.state == "ALIVE"]
    task: Any = ray.remote(_look)
    asked: dict[str, Any] = {}
    for node in dict.fromkeys(actor.node for actor in living):
        pids = {actor.pid: actor.kind for actor in living if actor.node == node}
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[node] = task.options(num_cpus=0, scheduling_strategy=affinity, max_retries=0).remote(pids)
    found: dict[str, list[Process] | str] = {}
    for node, ref in asked.items():
        try:
            found[node] = deadline.get(
                ref, f"node {node[:8]}", timeout_s=timeout_s, phase="look at processes"
            )
        except BasculeError as error:
            found[node] = str(error)
    return found


def end_processes(actors: Sequence[Actor]) -> None:
    """Send SIGKILL to what is left of actors that Ray has been told to kill, on their nodes."""
    task: Any = ray.remote(_kill)
    for node in dict.fromkeys(actor.node for actor in actors):
        here = [(actor.pid, f"ray::{actor.kind}") for actor in actors if actor.node == node]
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        ref = task.options(num_cpus=0, scheduling_strategy=affinity, max_retries=0).remote(here)
        # A node that is gone has no processes.
        with contextlib.suppress(BasculeError):
            deadline.get(ref, f"node {node[:8]}", timeout_s=_NODE_S, phase="end of processes")


def _kill(processes: Sequence[tuple[int, str]]) -> None:
    for pid, title in processes:
        with contextlib.suppress(OSError):
            # Its number may be another one's by now.
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                os.kill(pid, signal.SIGKILL)


def write_bundle(run: Path, why: BaseException) -> Path | None:
    """Write into the run directory what can be told of a run that hangs; returns where, None if that fails too.

    Stacks and memory of all processes of its actors, by node; what Ray says of the actors and of resources that
    are free; what the driver waited for; the last metrics and events.
    """
    folder = run / f"hang-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S')}"
    try:
        folder.mkdir()
        (folder / "why.txt").write_text(f"{why}\n")
        (folder / "resources.json").write_text(json.dumps(ray.available_resources(), indent=1) + "\n")
        for name in ("metrics.jsonl", "events.jsonl", STATUS):
            if (run / name).is_file():
                (folder / name).write_text("".join((run / name).read_text().splitlines(keepends=True)[-20:]))
        actors = actors_of(ray.get_runtime_context().get_job_id())
        (folder / "actors.json").write_text(json.dumps([asdict(each) for each in actors], indent=1) + "\n")
        for node, processes in look_at(actors).items():
            (folder / f"stacks-{node[:8]}.txt").write_text(
                processes if isinstance(processes, str) else "\n".join(map(_describe, processes))
            )
    except (OSError, BasculeError, RayError):
        # The run ends with an error already, which must not be replaced by one about this.
        return folder if folder.is_dir() else None
    return folder


def describe_bundle(folder: Path | None) -> str:
    """For the console."""
    return "what hangs could not be looked at" if folder is None else f"what hangs is described in {folder}"


def _describe(process: Process) -> str:
    head = f"== {process.name}, pid {process.pid}, state {process.state}, {process.memory_mb:.0f} MB"
    return f"{head}\n{process.stack}"


def _look(pids: Mapping[int, str]) -> list[Process]:
    """These processes of this node and all that they started."""
    import psutil

    found: list[Process] = []
    for pid, name in pids.items():
        try:
            process = psutil.Process(pid)
            family = [(name, process)]
            family += [(f"{name}: {child.name()}", child) for child in process.children(recursive=True)]
        except psutil.Error:
            found.append(Process(name=name, pid=pid, state="", memory_mb=0.0, stack="it is gone"))
            continue
        for title, each in family:
            try:
                memory, state = each.memory_info().rss / (1 << 20), each.status()
            except psutil.Error:
                continue
            stack = _dump(each.pid)
            found.append(Process(name=title, pid=each.pid, state=state, memory_mb=memory, stack=stack))
    return found


def _dump(pid: int) -> str:
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.is_file() else shutil.which("py-spy")
    if program is None:
        return "py-spy is not installed on this node"
    try:
        # Without pausing it: a process that is stopped could not be let go.
        words = [program, "dump", "--nonblocking", "--pid", str(pid)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_DUMP_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    return done.stdout if done.returncode == 0 else f"py-spy: {done.stderr.strip()}"
