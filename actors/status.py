"""`bascule status RUN`: how a run is, from its files, and from the Ray that it uses while it goes."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)

from actors.resume_state import FOLDER, RESULT, states
from actors.run_lock import Holder, read_holder
from actors.stacks import Process, actors_of, look_at
from actors.status_file import Status, read_status
from configs.errors import ConfigError

_SHOWN_EVENTS = 5
_STATES = {"stopped": "stopped by a signal", "zombie": "has ended", "disk-sleep": "waits for a device"}


def describe_run(directory: Path, *, live: bool, stacks: bool) -> Iterator[str]:
    """Lines for a person. With `live` the processes are looked at through Ray, with `stacks` in detail.

    Raises ConfigError when no run has been there.
    """
    held = read_holder(directory)
    if held is None and not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory} holds no run; give the output_dir of one")
    holder, is_held = held or (None, False)
    result = _json(directory / RESULT)
    status = read_status(directory)
    yield f"{directory}: {_what(result, holder, is_held)}"
    yield from _progress(directory, status, is_held)
    yield from _saved(directory)
    yield from _events(directory)
    if is_held and live and holder is not None and holder.address and holder.job:
        if holder.wants_token:
            # Of itself Ray shows it only where it finds the cluster without an address.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        yield from _live(holder.address, holder.job, stacks=stacks)


def _what(result: Mapping[str, Any] | None, holder: Holder | None, is_held: bool) -> str:
    """Running, finished, interrupted or dead."""
    if is_held and holder is not None:
        return f"running, {holder.describe()}"
    if result is not None and result.get("finished", True):
        return "finished"
    if result is not None:
        return f"interrupted, {result['why']}"
    who = "" if holder is None else f" ({holder.describe()})"
    return f"dead: its process{who} has ended without a result; started again it goes on"


def _progress(directory: Path, status: Status | None, is_held: bool) -> Iterator[str]:
    row = _last(directory / "metrics.jsonl")
    shown = ("reward", "loss", "eval/accuracy", "eval/loss", "eval/divergence")
    numbers = "".join(f"  {name} {row[name]:.4g}" for name in shown if isinstance(row.get(name), float))
    if row:
        age = time.time() - (directory / "metrics.jsonl").stat().st_mtime
        yield f"last record: step {row['step']}, {_ago(age)}{numbers}"
    else:
        yield "last record: none, no step is done"
    if status is None:
        return
    yield f"weights: version {status.version}; started again: {status.restarts} times"
    if is_held and status.phase:
        late = ", ".join(status.waiting_for)
        waited = status.waited_s + time.time() - status.time
        yield f"waiting: {status.phase}, for {late}, since {waited:.0f} s"


def _saved(directory: Path) -> Iterator[str]:
    found = states(directory)
    if found:
        age = time.time() - found[-1].stat().st_mtime
        names = ", ".join(path.name for path in found)
        yield f"states in {FOLDER}/: {names}; the newest is from {_ago(age)}"
    else:
        yield "states: none to go on from"
    last = directory / "last"
    if last.is_symlink():
        yield f"checkpoint: {last.readlink()}, {_ago(time.time() - last.lstat().st_mtime)}"


def _events(directory: Path) -> Iterator[str]:
    path = directory / "events.jsonl"
    if path.is_file():
        for line in path.read_text().splitlines()[-_SHOWN_EVENTS:]:
            row = json.loads(line)
            yield f"event: {row['time']} step {row['step']} {row['kind']}: {row['text']}"


def _live(address: str, job: str, *, stacks: bool) -> Iterator[str]:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        yield f"Ray at {address} does not answer: {error}"
        return
    try:
        actors = actors_of(job)
        for actor in actors:
            if actor.state not in ("ALIVE", "DEAD"):
                yield f"actor: {actor.kind} {actor.state} on node {actor.node[:8]}"
        yield f"actors: {sum(each.state == 'DEAD' for each in actors)} have ended, {len(actors)} in all"
        for node, processes in look_at(actors).items():
            if isinstance(processes, str):
                yield f"node {node[:8]}: {processes}"
                continue
            for process in processes:
                yield f"process: {_line(process)} on node {node[:8]}"
                if stacks:
                    yield from (f"    {line}" for line in process.stack.splitlines())
    finally:
        ray.shutdown()


def _line(process: Process) -> str:
    state = _STATES.get(process.state, process.state or "is gone")
    return f"{process.name} pid {process.pid}, {state}, {process.memory_mb:.0f} MB"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"


def _last(path: Path) -> Mapping[str, Any]:
    # Its last line may be half written.
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
