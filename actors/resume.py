"""Writes states of a run that goes on, and puts a run that was cut off into the newest of them."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from actors.console import Console
from actors.ending import EndedEarlyError, Ending
from actors.metrics import RunRecorder
from actors.resume_ahead import read_ahead, write_ahead
from actors.resume_config import changes, is_same_layout
from actors.resume_schedule import Schedule, to_keep
from actors.resume_state import (
    FOLDER,
    Manifest,
    State,
    check_files,
    config_of,
    config_sha256,
    find_state,
    forget,
    name_of,
    read_state,
    states,
    step_of,
)
from actors.resume_writing import StateWriting
from actors.trainer import TrainerGroup
from algorithms.progress import Ahead, Begun, Progress
from algorithms.prompts import OtherDataError, PromptStream, Stream
from bridge.partial_directory import make_partial, partial_of
from configs.errors import ConfigError, WriteError
from configs.schema import RunConfig

Rewards = Sequence[Mapping[str, Any]] | None


def look_for_state(config: RunConfig, directory: Path, console: Console) -> State | None:
    """The state that the run goes on from, or None; says which, and what changed in the config since.

    Raises ConfigError when it may not go on under this config, BasculeError when its records are lost.
    """
    state = find_state(config, directory)
    if state is None:
        return None
    lines = changes(state.manifest.config, config_of(config), state.step)
    check_files(directory, state.manifest.files)
    console.line(f"{directory} holds a run that was cut off: it goes on after step {state.step}")
    for line in lines:
        console.line(f"changed since: {line}")
    return state


def forget_auto(config: RunConfig, directory: Path) -> None:
    """Remove the states of a run that has finished, unless somebody asked for some."""
    settings = config.checkpoint
    if settings.resume_steps == "auto" and not settings.resume_keep_every and not settings.resume_keep_best:
        forget(directory, lambda steps: set())


def rewards_of(state: State | None, config: RunConfig) -> Rewards:
    """Rewards that `bascule reward reload` had put in place of the config's, which are used again; not when the
    config has others than it had then: those are a person's newer word."""
    if state is None or state.manifest.config["rewards"] != config_of(config)["rewards"]:
        return None
    return state.manifest.rewards


class StateKeeper:
    """Keeps states of a run, and ends it early when it is told to (algorithms.progress.Keeper).

    A context manager around the loop: it waits for what is still being written, and saves what a step that was
    broken off had begun with.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        trainers: TrainerGroup,
        recorder: RunRecorder,
        streams: Mapping[str, Stream[Any] | None],
        state: State | None,
        ending: Ending,
        rewards: Callable[[], Rewards] = lambda: None,
    ) -> None:
        """Put trainers, streams and links into `state`, when there is one. `rewards` tells those in use where
        they are not the config's. Raises BasculeError."""
        self._config, self.directory, self._ending = config, directory, ending
        self._trainers, self._recorder, self._rewards = trainers, recorder, rewards
        self._streams = {name: stream for name, stream in streams.items() if stream is not None}
        self._as_json = config_of(config)
        self._schedule = Schedule(config.checkpoint)
        self._writing: StateWriting | None = None
        self.start = Progress()
        self.begun: Sequence[Begun] = ()
        if state is not None:
            self._restore(state)
        self._remember(self.start)

    def keep(self, progress: Progress, ahead: Ahead | None = None) -> None:
        """Begin to write a state, if one is due. A save that fails is reported and hurts no older one.

        Raises EndedEarlyError when the run is to end here.
        """
        self._remember(progress)
        self._recorder.status.step_done(progress)
        if progress.step == self._config.max_steps:
            return
        self._ending.step_done()
        is_best = self._trainers.links.best_step() == progress.step
        if self._ending.reason is not None or self._schedule.is_due(progress.step, is_best=is_best):
            self._save(tuple if ahead is None else ahead.settle)
        if self._ending.reason is not None:
            self._end()

    def go_back(self) -> State | None:
        """The trainers were started anew: put everything into the newest state, or where the run began."""
        found = states(self.directory)
        state = read_state(found[-1]) if found else None
        if state is None:
            self.start, self.begun = Progress(), ()
            for stream in self._streams.values():
                stream.restore({"epoch": 0, "offset": 0})
        else:
            self._restore(state)
        self._remember(self.start)
        return state

    @property
    def done(self) -> int:
        """The last step that was done."""
        return self._manifest.progress.step

    def __enter__(self) -> Self:
        self._ending.loop_begins()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        broken_off = isinstance(error, KeyboardInterrupt) and self._ending.reason is not None
        if self._ending.at_once:
            if self._writing is not None:
                self._writing.give_up()
            return
        self._ending.loop_ends()
        # Of what was sampled ahead the step that was broken off has taken its part.
        is_whole = self._trainers.changes == self._changes and not self._config.grpo.max_lag
        if broken_off and is_whole and self.done > max(self.start.step, self._newest()):
            self._save(tuple)
        self.settle()
        if broken_off:
            self._end()

    def _end(self) -> None:
        self._ending.loop_ends()
        self.settle()
        assert self._ending.reason is not None, "it is why the run ends"
        newest = self._newest()
        raise EndedEarlyError(self._ending.reason, self.done, newest if newest >= 0 else None)

    def _newest(self) -> int:
        found = states(self.directory)
        return step_of(found[-1]) if found else -1

    def _remember(self, progress: Progress) -> None:
        """What a state of this moment would say."""
        config = self._as_json
        self._changes = self._trainers.changes
        self._manifest = Manifest(
            progress=progress,
            config=config,
            config_sha256=config_sha256(config),
            streams={
                name: {**stream.state(), "sha256": stream.digest()} for name, stream in self._streams.items()
            },
            files=self._recorder.sizes(),
            links=self._trainers.links.state(),
            swapped=self._recorder.swapped,
            rewards=self._rewards(),
        )

    def _save(self, settle: Callable[[], Sequence[Begun]]) -> None:
        """Copy the state and begin to write it; returns when steps may go on."""
        self.settle()
        start, manifest = time.monotonic(), self._manifest
        final = self.directory / FOLDER / name_of(manifest.progress.step)
        with self._ending.shielded(), self._recorder.phase("save"):
            try:
                make_partial(final)
                write_ahead(partial_of(final), settle())
                self._recorder.sync()
                self._trainers.begin_state(partial_of(final), manifest.progress.step)
            except (WriteError, ConfigError) as error:
                shutil.rmtree(partial_of(final), ignore_errors=True)
                self._report(manifest.progress.step, error)
                return
        blocked = time.monotonic() - start
        self._schedule.began(blocked)
        self._writing = StateWriting(
            self._trainers, final, replace(manifest, files=self._recorder.sizes()), blocked, self._written
        )

    def _written(self, seconds: float) -> None:
        self._schedule.ended(seconds)
        self._ending.saved(seconds)
        scores = self._trainers.links.scores
        forget(self.directory, lambda steps: to_keep(steps, self._config.checkpoint, scores))

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for what is being written, if something is; as long as for a phase of a step, by default."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        with self._ending.shielded():
            error = writing.wait(timeout_s or self._config.cluster.step_timeout_s)
        if error is not None:
            self._report(writing.step, error)

    def _report(self, step: int, error: Exception) -> None:
        # What Ray says of a rank's error goes on for a page.
        why = str(error).partition("\n")[0]
        text = f"the state of step {step} could not be saved, older ones are as they were: {why}"
        self._recorder.line(f"warning: {text}")
        self._recorder.event(step, "save", text)

    def _restore(self, state: State) -> None:
        manifest = state.manifest
        for name, stream in self._streams.items():
            if not _put_back(stream, manifest.streams[name]):
                raise ConfigError(
                    f"data: the {name} are not those that {state.directory} was saved with; put the data back, or "
                    "begin anew with --resume never --exist_ok"
                )
        same = is_same_layout(manifest.config, self._as_json)
        self._trainers.load_state(state.directory, same_layout=same)
        self._trainers.links.restore(manifest.links)
        self.start = manifest.progress
        prompts = self._streams.get("prompts")
        is_ahead = isinstance(prompts, PromptStream)
        self.begun = read_ahead(state.directory, prompts.items) if is_ahead else ()


def _put_back(stream: Stream[Any], saved: Mapping[str, Any]) -> bool:
    """Put the stream where it was when it was saved; whether its data are still the same."""
    try:
        stream.restore(saved)
    except OtherDataError:
        return False
    return stream.digest() == saved["sha256"]
