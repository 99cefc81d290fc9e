"""The engine of test_engine_pool: in a file of its own, since its processes import little with it. Not a test."""

import asyncio
import os
import signal
import time
from pathlib import Path

from algorithms.data import Group, Prompt, SamplingSettings
from configs.errors import BasculeError


class Engine:
    """Answers with its process id in place of rollouts, after a second when more than 12 tokens are asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    async def start(self) -> int:
        while (self._folder / "starts-slowly").exists():
            await asyncio.sleep(0.05)
        if (self._folder / "cannot-start").exists():
            raise BasculeError("no weights")
        return os.getpid()

    async def watch(self) -> None:
        while not (self._folder / f"core-dead-{os.getpid()}").exists():
            await asyncio.sleep(0.05)
        raise BasculeError("its core is gone")

    async def progress(self) -> None:
        """A sign of life."""

    async def generate(self, one: Prompt, sampling: SamplingSettings, *others: object) -> Group:
        if one.id == "p14":
            await asyncio.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if one.id == "p13":
            raise BasculeError("a prompt that no engine takes")
        deadline = time.monotonic() + (1.0 if sampling.max_tokens > 12 else 0.0)
        while time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            if (self._folder / f"core-dead-{os.getpid()}").exists():
                raise BasculeError("vLLM failed: EngineDeadError")
        return Group(prompt=one, rollouts=(os.getpid(),))  # pyright: ignore[reportArgumentType]

    async def score(self, tokens: list[int], vision: None = None) -> list[float]:
        await asyncio.sleep(0.5)
        return [float(token) for token in tokens[1:]]
