"""Whether an engine lives and gets on, as its actor sees it."""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from actors.engine_processes import EngineProcesses
from bridge.progress import EngineProgress, ProgressBoard

# How often the processes are looked at.
LOOK_S = 1.0
# A question to the core waits for the step that it is in, and costs less than a millisecond.
_ASK_S = 5.0


class EngineWatch:
    """Looks after vLLM's processes, also while nothing is asked of them.

    A core that hangs is one that does not answer: it takes questions between two steps. While it is at a part of
    a weight sync it takes none; then its workers' progress shows whether it gets on (actors.sync_watch).
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` is how long the core may be silent."""
        self.processes = EngineProcesses(())
        self._timeout_s = timeout_s
        self._llm: Any = None
        self._call = ""
        self._board: ProgressBoard | None = None
        self._asked: asyncio.Task[Any] | None = None
        self._heard = 0.0

    async def begin(self, llm: Any) -> None:
        """Find the processes of an AsyncLLM that has started."""
        self._llm = llm
        self.processes = EngineProcesses(await llm.collective_rpc("process_id"))
        self.processes.drop_names_of_shared_memory()

    async def what_is_wrong(self) -> str:
        """Return once a process has ended, within about a second, or the core is silent: which, and how."""
        self._heard = time.monotonic()
        while (reason := self.lost() or self._silent()) is None:
            await asyncio.sleep(min(LOOK_S, self._timeout_s / 8))
        return reason

    def lost(self) -> str | None:
        """Which process has ended, or that vLLM gave up; None while all is well."""
        lost = self.processes.lost()
        if lost is None and self._llm.errored:
            lost = "vLLM has failed"
        return lost

    @contextmanager
    def syncing(self, call: str) -> Generator[None]:
        """The core is busy with a part of a weight sync, in words."""
        self._call = call
        try:
            yield
        finally:
            self._call = ""
            self._heard = time.monotonic()

    def new_board(self, workers: int) -> str:
        """Where workers write down how far they are in a sync; the path for them."""
        if self._board is not None:
            self._board.close()
        self._board = ProgressBoard(workers)
        return self._board.path

    def progress(self) -> EngineProgress:
        """How far the engine is in a sync."""
        workers = () if self._board is None else self._board.read()
        return EngineProgress(call=self._call, workers=workers)

    def _silent(self) -> str | None:
        now = time.monotonic()
        if self._asked is not None and self._asked.done():
            # What went wrong shows in what it was asked for, or in its process.
            self._asked.exception()
            self._asked, self._heard = None, now
        if self._call:
            return None
        if self._asked is None and now - self._heard > min(_ASK_S, self._timeout_s / 4):
            self._asked = asyncio.create_task(self._llm.collective_rpc("process_id"))
        if now - self._heard > self._timeout_s:
            return (
                f"vLLM's core process {self.processes.pids[0]} has not answered for {self._timeout_s:.0f} s"
            )
        return None
