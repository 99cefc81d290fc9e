"""Writes states of a run that goes on, and puts a run that was cut off into the newest of them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.metrics import Console, RunRecorder
from actors.resume_config import changes, is_same_layout
from actors.resume_state import (
    FOLDER,
    KEPT,
    Manifest,
    State,
    check_files,
    config_of,
    config_sha256,
    find_state,
    forget,
    items_sha256,
    name_of,
    write_manifest,
)
from actors.trainer import TrainerGroup
from algorithms.progress import Progress
from algorithms.prompts import PromptStream
from bridge.partial_directory import make_partial, partial_of, put_in_place
from configs.errors import BasculeError, ConfigError
from configs.schema import RunConfig


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
    if state.manifest.swapped:
        console.line(
            "warning: rewards had been replaced by `bascule reward reload`; "
            "the run goes on with those of its config"
        )
    return state


class StateKeeper:
    """Keeps the last states of a run (algorithms.progress.Keeper)."""

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        trainers: TrainerGroup,
        recorder: RunRecorder,
        streams: Mapping[str, PromptStream[Any] | None],
        state: State | None,
    ) -> None:
        """Put trainers, streams and links into `state`, when there is one. Raises BasculeError."""
        self._config, self._directory = config, directory
        self._trainers, self._recorder = trainers, recorder
        self._streams = {name: stream for name, stream in streams.items() if stream is not None}
        # Of a long data set it takes a while, and it never changes.
        digests = config.checkpoint.resume_steps or state is not None
        self._digests = {
            name: items_sha256(stream.items) for name, stream in self._streams.items() if digests
        }
        self.start = Progress()
        if state is not None:
            self._restore(state)

    def keep(self, progress: Progress) -> None:
        """Write a state, if one is due; older ones are removed only when it is complete. Raises BasculeError."""
        if not self._config.keeps_state_at(progress.step):
            return
        final = self._directory / FOLDER / name_of(progress.step)
        partial = partial_of(final)
        make_partial(final)
        try:
            self._trainers.save_state(partial, progress.step)
            write_manifest(partial, self._manifest(progress))
            put_in_place(final)
        except BasculeError:
            # It is of no use, and what it takes may be what the disk lacks.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        forget(self._directory, after=progress.step, keep=KEPT)

    def _manifest(self, progress: Progress) -> Manifest:
        config = config_of(self._config)
        return Manifest(
            progress=progress,
            config=config,
            config_sha256=config_sha256(config),
            streams={
                name: {**stream.state(), "sha256": self._digests[name]}
                for name, stream in self._streams.items()
            },
            files=self._recorder.sizes(),
            links=self._trainers.links.state(),
            swapped=self._recorder.swapped,
        )

    def _restore(self, state: State) -> None:
        manifest = state.manifest
        for name, stream in self._streams.items():
            saved = manifest.streams[name]
            if saved["sha256"] != self._digests[name]:
                raise ConfigError(
                    f"data: the {name} are not those that {state.directory} was saved with; put the data back, or "
                    "begin anew with --resume never --exist_ok"
                )
            stream.restore(saved)
        same = is_same_layout(manifest.config, config_of(self._config))
        self._trainers.load_state(state.directory, same_layout=same)
        self._trainers.links.restore(manifest.links)
        self.start = manifest.progress
