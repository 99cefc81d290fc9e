"""The second half of a save: a thread waits for what the trainer ranks write, and makes a state of it."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from actors.resume_state import Manifest, write_manifest
from actors.trainer import TrainerGroup
from bridge.partial_directory import partial_of, put_in_place
from configs.errors import BasculeError

_LOOK_S = 0.1
_GIVE_UP_S = 5.0


class StateWriting:
    """One state on its way to the disk, while steps go on."""

    def __init__(
        self,
        trainers: TrainerGroup,
        final: Path,
        manifest: Manifest,
        blocked_s: float,
        then: Callable[[float], None],
    ) -> None:
        """The ranks are writing already. `then` is called with the seconds of the whole save."""
        self.step = manifest.progress.step
        self._trainers, self._final, self._manifest = trainers, final, manifest
        self._blocked_s, self._then = blocked_s, then
        self._over = threading.Event()
        self._error: BasculeError | None = None
        self._thread = threading.Thread(target=self._run, name="write-state", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> BasculeError | None:
        """Wait for the end; returns why there is no state, if there is none."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.give_up()
            return BasculeError(f"{self._final}: not written within {timeout_s:.0f} s")
        return self._error

    def give_up(self) -> None:
        """Ask nobody any more: a call after the run has left Ray would start a new one."""
        self._over.set()
        self._thread.join(_GIVE_UP_S)

    def _run(self) -> None:
        partial = partial_of(self._final)
        try:
            found = self._trainers.written_state()
            while found is None:
                if self._over.wait(_LOOK_S):
                    return
                found = self._trainers.written_state()
            written, writing_s = found
            start = time.monotonic()
            self._trainers.finish_state(partial, self.step, written)
            write_manifest(partial, self._manifest)
            put_in_place(self._final)
            # Not since the beginning: ranks that train answer late.
            self._then(self._blocked_s + writing_s + time.monotonic() - start)
        except (BasculeError, OSError) as error:
            if self._over.is_set():
                # Somebody else may write there by now.
                return
            # It is of no use, and what it takes may be what the disk lacks.
            shutil.rmtree(partial, ignore_errors=True)
            self._error = (
                error if isinstance(error, BasculeError) else BasculeError(f"{self._final}: {error}")
            )
