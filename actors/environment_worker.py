"""An environment on Ray: workers that run it in child processes, and the group of them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from actors.deadline import get_all
from actors.placement import Reservation
from actors.worker_group import end_workers, place_of
from algorithms.data import Message, Prompt
from algorithms.environments.calling import Reply, Step
from algorithms.environments.loading import read_environment
from algorithms.environments.process import EnvironmentRunner
from algorithms.rewards.child import Loaded
from algorithms.rewards.loading import RewardSource
from algorithms.rewards.process import MARGIN_S
from configs.schema import RunConfig


class EnvironmentWorker:
    """Ray actor around an EnvironmentRunner. Its methods are async, so that it answers while functions run."""

    def __init__(self, source: RewardSource, start_timeout_s: float) -> None:
        self._runner = EnvironmentRunner(source, start_timeout_s=start_timeout_s)

    async def start(self) -> Loaded:
        """Load the environment. Raises ConfigError."""
        return await asyncio.to_thread(self._runner.start)

    async def step(self, episode: str, prompt: Prompt, turns: tuple[Message, ...]) -> Reply:
        """The reply to the last of the turns; a failure is in it. An episode has to come to one worker."""
        step = Step(number=0, episode=episode, prompt=prompt, turns=turns)
        return await asyncio.wrap_future(self._runner.submit(step))

    async def end(self, episode: str) -> None:
        """The episode is over."""
        self._runner.end(episode)

    async def close(self) -> None:
        """End the child process."""
        await asyncio.to_thread(self._runner.close)


class EnvironmentGroup:
    """The workers of a run's environment."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = tuple(workers)

    def worker_for(self, prompt: Prompt) -> Any:
        """The actor that plays the episodes of a prompt."""
        return self.workers[place_of(prompt, len(self.workers))]

    def close(self) -> None:
        """End the workers and their child processes."""
        end_workers(self.workers, "environment worker")


def create_environment(config: RunConfig, reservation: Reservation) -> EnvironmentGroup:
    """The workers, each in its bundle, with the environment of `config` loaded.

    Raises ConfigError when it does not load, DeadlineExceededError, ActorLostError.
    """
    source, timeout_s = read_environment(config.environment), config.cluster.start_timeout_s
    remote: Any = ray.remote(EnvironmentWorker)
    count = config.environment.num_processes
    # All episodes of a step at one time: they are waits, not threads.
    workers = [
        remote.options(**reservation.options("environment", index), max_concurrency=10_000).remote(
            source, timeout_s
        )
        for index in range(count)
    ]
    owners = [f"environment worker {index}" for index in range(count)]
    started = [worker.start.remote() for worker in workers]
    # A worker whose environment takes too long to load says so itself, and by name.
    get_all(started, owners, timeout_s=timeout_s + MARGIN_S, phase="load the environment")
    return EnvironmentGroup(workers)
