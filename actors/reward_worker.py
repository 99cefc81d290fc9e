"""Rewards on Ray: workers that run them in child processes, and the group of workers as one judge."""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.deadline import ActorLostError, DeadlineExceededError, get, get_all
from actors.events import Event, unheard
from actors.reward_swap import post_answer, take_request, write_rewards
from actors.spans import SpanLog, Taken, traced
from actors.worker_group import end_workers, place_of
from algorithms.data import Group, Prompt, Rollout, Scored, Verdict
from algorithms.rewards.child import Loaded
from algorithms.rewards.loading import RewardSource, read_sources
from algorithms.rewards.process import MARGIN_S, RewardRunner, Verdicts
from algorithms.rewards.settling import Settler
from configs.errors import BasculeError
from configs.rewards import RewardWorkersConfig
from configs.schema import RunConfig

CPUS_PER_REWARD_WORKER = 0.1
# Completions that were heard of and that no group has come for; a run that gives groups up has some.
_MAX_EARLY = 10_000

Key = tuple[str, bytes]


class RewardWorker:
    """Ray actor around a RewardRunner. Its methods are async, so that it answers while functions run."""

    def __init__(self, sources: Sequence[RewardSource], start_timeout_s: float) -> None:
        self.spans = SpanLog()
        self._start_timeout_s = start_timeout_s
        self._runner = RewardRunner(sources, start_timeout_s=start_timeout_s)
        self._next: RewardRunner | None = None
        self._early: OrderedDict[Key, list[Future[Verdicts]] | None] = OrderedDict()

    async def start(self) -> tuple[Loaded, ...]:
        """Load the rewards. Raises ConfigError."""
        return await asyncio.to_thread(self._runner.start)

    async def hear(self, prompt: Prompt, rollout: Rollout, index: int) -> None:
        """Begin with completion `index` while its group is still sampled: with what is called per completion."""
        key = _key(prompt, rollout)
        if key in self._early:
            return
        group = Group(prompt=prompt, rollouts=(rollout,))
        self._remember(key, self._runner.submit(group, (0,), self._per_completion(), index))

    async def take_spans(self) -> Taken:
        """What it has done since the last call."""
        return self.spans.take()

    @traced("score", prompt=lambda group: group.prompt.id)
    async def score(self, group: Group) -> dict[str, tuple[Verdict, ...]]:
        """What each reward says of each completion, by reward."""
        everything = range(len(group.rollouts))
        early = self._per_completion()
        whole = [number for number in range(len(self._runner.loaded)) if number not in early]
        # Of each reward: a future, the completions it is about, and their places in what it gives.
        jobs: dict[int, list[tuple[Future[Verdicts], Mapping[int, int]]]] = {
            number: [] for number in (*early, *whole)
        }
        fresh: list[int] = []
        for index, rollout in enumerate(group.rollouts):
            key = _key(group.prompt, rollout)
            heard = self._early.get(key)
            # Remembered as done, for the engine's message may come after the group.
            self._remember(key, None)
            if heard is None:
                fresh.append(index)
                continue
            for number, future in zip(early, heard, strict=True):
                jobs[number].append((future, {index: 0}))
        for numbers, indices in ((early, fresh), (whole, everything)):
            if numbers and indices:
                futures = self._runner.submit(group, indices, numbers)
                for number, future in zip(numbers, futures, strict=True):
                    jobs[number].append((future, {index: index for index in indices}))
        return {
            loaded.name: await self._gathered(jobs[number], everything)
            for number, loaded in enumerate(self._runner.loaded)
        }

    @staticmethod
    async def _gathered(
        jobs: Sequence[tuple[Future[Verdicts], Mapping[int, int]]], indices: Sequence[int]
    ) -> tuple[Verdict, ...]:
        found: dict[int, Verdict] = {}
        for future, places in jobs:
            verdicts = await asyncio.wrap_future(future)
            found |= {index: verdicts[place] for index, place in places.items()}
        return tuple(found[index] for index in indices)

    async def finished(self) -> int:
        """How many calls it has made: a worker that gets on makes more."""
        return self._runner.finished

    async def load(self, sources: Sequence[RewardSource]) -> tuple[Loaded, ...]:
        """Load other rewards beside those in use. Raises ConfigError, and nothing has changed then."""
        await self.drop()
        following = RewardRunner(sources, start_timeout_s=self._start_timeout_s)
        try:
            loaded = await asyncio.to_thread(following.start)
        except BasculeError:
            following.close()
            raise
        self._next = following
        return loaded

    async def swap(self) -> None:
        """Use what was loaded from now on. Nothing may be under way that is still waited for."""
        assert self._next is not None, "loaded before"
        old, self._runner, self._next = self._runner, self._next, None
        self._early.clear()
        await asyncio.to_thread(old.close)

    async def drop(self) -> None:
        """Forget what was loaded and not used."""
        if self._next is not None:
            following, self._next = self._next, None
            await asyncio.to_thread(following.close)

    async def close(self) -> None:
        """End the child processes."""
        await self.drop()
        await asyncio.to_thread(self._runner.close)

    def _per_completion(self) -> list[int]:
        loaded = self._runner.loaded
        return [number for number, each in enumerate(loaded) if each.signature.style == "sample"]

    def _remember(self, key: Key, futures: list[Future[Verdicts]] | None) -> None:
        self._early[key] = futures
        self._early.move_to_end(key)
        while len(self._early) > _MAX_EARLY:
            self._early.popitem(last=False)


def _key(prompt: Prompt, rollout: Rollout) -> Key:
    return prompt.id, rollout.tokens.tobytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    worker: int
    group: Group
    deadline: float
    limit_s: float
    finished: int


class RewardGroup:
    """Workers that score groups as they come in; SwappableRewards makes a judge of them."""

    def __init__(
        self,
        workers: Sequence[Any],
        sources: Sequence[RewardSource],
        loaded: Sequence[Loaded],
        settings: RewardWorkersConfig,
        environment_weight: float | None = None,
        make: Callable[[int, Sequence[RewardSource]], Any] | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        """`loaded` is what the workers say of the sources; `make` gives another one in place of a lost one.

        With an `environment_weight` what the environment gave is one of the rewards; see Settler.
        """
        self.workers = list(workers)
        self._make, self._start_timeout_s = make, start_timeout_s
        self._recoveries = 0
        self._event: Event = unheard
        self._environment_weight = environment_weight
        self.sources: tuple[RewardSource, ...] = ()
        self._settings = settings
        self._use(sources, loaded)

    def tell(self, event: Event) -> None:
        """Tell of workers that were replaced."""
        self._event = event

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask each worker for its spans (actors.trace)."""
        return {f"reward worker {index}": each.take_spans.remote for index, each in enumerate(self.workers)}

    def worker_for(self, prompt: Prompt) -> Any:
        """The actor that scores the completions of a prompt, and should hear of each as soon as it is there."""
        return self.workers[place_of(prompt, len(self.workers))]

    def score(self, groups: Iterable[Group]) -> Iterator[Scored]:
        """Each group with its rewards, in the order they finish; workers score while `groups` is waited for.

        A worker that is lost, or does not answer at all, is replaced, and its groups are scored once more. Raises
        RewardError for what Settler does not let pass, and ActorLostError or DeadlineExceededError when workers
        are lost more often than `reward_workers.max_recoveries` times.
        """
        pending: dict[Any, _Pending] = {}
        for group in groups:
            ref, task = self._send(group)
            pending[ref] = task
            yield from self._finished(pending, wait=False)
        while pending:
            yield from self._finished(pending, wait=True)

    def reload(self, sources: Sequence[RewardSource], timeout_s: float) -> tuple[Loaded, ...]:
        """Use other rewards from now on; all workers have loaded them before any uses them.

        Raises ConfigError for one that does not load; the old ones stay in use then.
        """
        owners = [f"reward worker {index}" for index in range(len(self.workers))]
        loading = [worker.load.remote(sources) for worker in self.workers]
        try:
            loaded = get_all(loading, owners, timeout_s=timeout_s + MARGIN_S, phase="load rewards")
        except BasculeError:
            for worker in self.workers:
                worker.drop.remote()
            raise
        swapping = [worker.swap.remote() for worker in self.workers]
        get_all(swapping, owners, timeout_s=MARGIN_S, phase="swap rewards")
        self._use(sources, loaded[0])
        return loaded[0]

    def close(self) -> None:
        """End the workers and their child processes."""
        end_workers(self.workers, "reward worker")

    def _use(self, sources: Sequence[RewardSource], loaded: Sequence[Loaded]) -> None:
        self.sources = tuple(sources)
        hashes = {each.name: each.sha256 for each in loaded if each.sha256 is not None}
        configs = {each.name: each.config for each in sources}
        self._settler = Settler(configs, self._settings, hashes, self._environment_weight)

    def _send(self, group: Group) -> tuple[Any, _Pending]:
        worker = place_of(group.prompt, len(self.workers))
        limit_s = MARGIN_S + sum(source.config.timeout_s for source in self.sources) * len(group.rollouts)
        task = _Pending(
            worker=worker, group=group, deadline=time.monotonic() + limit_s, limit_s=limit_s, finished=-1
        )
        return self.workers[worker].score.remote(group), task

    def _finished(self, pending: dict[Any, _Pending], *, wait: bool) -> Iterator[Scored]:
        first_deadline = min(task.deadline for task in pending.values())
        left_s = max(0.0, first_deadline - time.monotonic())
        count, timeout_s = (1, left_s) if wait else (len(pending), 0.0)
        ready, _ = ray.wait(list(pending), num_returns=count, timeout=timeout_s)
        if not ready and left_s == 0.0:
            self._look_after(pending)
        for ref in ready:
            task = pending.get(ref)
            if (
                task is None
            ):  # It was sent to another worker when an earlier one of these turned out to be lost.
                continue
            owner = f"reward worker {task.worker}"
            try:
                said: Mapping[str, Sequence[Verdict]] = get(ref, owner, timeout_s=MARGIN_S, phase="score")
            except ActorLostError as error:
                self._replace(task.worker, pending, error)
                continue
            del pending[ref]
            yield self._settler.settle(task.group, said)

    def _replace(self, worker: int, pending: dict[Any, _Pending], why: BasculeError) -> None:
        """Another worker in place of this one, which gets its groups. Raises `why` when that is not allowed."""
        ray.kill(self.workers[worker])
        if self._make is None or self._recoveries >= self._settings.max_recoveries:
            raise why
        self._recoveries += 1
        start, owner = time.monotonic(), f"reward worker {worker}"
        self.workers[worker] = self._make(worker, self.sources)
        limit_s = self._start_timeout_s + MARGIN_S
        get(self.workers[worker].start.remote(), owner, timeout_s=limit_s, phase="start after a loss")
        first_line = str(why).partition("\n")[0]
        self._event(
            None, "restart", f"{owner} was started again in {time.monotonic() - start:.1f} s: {first_line}"
        )
        for ref in [ref for ref, task in pending.items() if task.worker == worker]:
            again, task = self._send(pending.pop(ref).group)
            pending[again] = task

    def _look_after(self, pending: dict[Any, _Pending]) -> None:
        """Give a late group more time while its worker gets on with calls, those of other groups maybe."""
        ref, task = min(pending.items(), key=lambda each: each[1].deadline)
        owner = f"reward worker {task.worker}"
        with contextlib.suppress(DeadlineExceededError, ActorLostError):
            finished = get(
                self.workers[task.worker].finished.remote(), owner, timeout_s=MARGIN_S, phase="score"
            )
            if finished > task.finished:
                pending[ref] = _Pending(
                    worker=task.worker,
                    group=task.group,
                    deadline=time.monotonic() + task.limit_s,
                    limit_s=task.limit_s,
                    finished=finished,
                )
                return
        names = ", ".join(source.name for source in self.sources)
        late = DeadlineExceededError(
            f"score: {owner} gave no answer for prompt {task.group.prompt.id} within the timeouts of its "
            f"functions ({names}), although it ends late ones itself; its machine may be gone"
        )
        self._replace(task.worker, pending, late)


def create_reward_group(
    config: RunConfig, placement_group: PlacementGroup | None = None, bundle_indices: Sequence[int] = ()
) -> RewardGroup:
    """Workers with the rewards of `config` loaded: one in each bundle, or without bundles where there is room.

    Raises ConfigError for a reward that cannot be loaded, DeadlineExceededError, ActorLostError.
    """
    sources = read_sources(config.rewards)
    count, timeout_s = config.reward_workers.num_workers, config.cluster.start_timeout_s
    remote: Any = ray.remote(RewardWorker)

    def make(index: int, sources: Sequence[RewardSource]) -> Any:
        strategy: Any = "DEFAULT"
        if placement_group is not None:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=placement_group, placement_group_bundle_index=bundle_indices[index]
            )
        # All groups of a step at one time, and what engines say meanwhile: they are waits, not threads.
        options = {"num_cpus": CPUS_PER_REWARD_WORKER, "max_restarts": 0, "max_concurrency": 10_000}
        return remote.options(**options, scheduling_strategy=strategy).remote(sources, timeout_s)

    workers = [make(index, sources) for index in range(count)]
    owners = [f"reward worker {index}" for index in range(count)]
    started = [worker.start.remote() for worker in workers]
    # A worker whose functions take too long to load says so itself, and by name.
    loaded = get_all(started, owners, timeout_s=timeout_s + MARGIN_S, phase="load rewards")
    environment, settings = config.environment, config.reward_workers
    weight = None if environment.function is None else environment.weight
    return RewardGroup(workers, sources, loaded[0], settings, weight, make, timeout_s)


class SwappableRewards:
    """A RewardGroup as a judge (algorithms.roles.Judge), whose rewards `bascule reward reload` replaces between
    two steps."""

    def __init__(self, group: RewardGroup, directory: Path, event: Event, timeout_s: float) -> None:
        self._group, self._directory = group, directory
        group.tell(event)
        self._event, self._timeout_s = event, timeout_s
        self.replaced: tuple[RewardSource, ...] | None = None
        """The rewards in use, when they are not those of the config."""

    def restore(self, sources: Sequence[RewardSource]) -> None:
        """Use rewards that were replaced before the run was cut off. Raises ConfigError when they do not load."""
        self._group.reload(sources, self._timeout_s)
        self.replaced = tuple(sources)
        write_rewards(self._directory, [source.config for source in sources])

    def score(self, groups: Iterable[Group]) -> Iterator[Scored]:
        """See RewardGroup."""
        return self._group.score(groups)

    def begin(self, step: int) -> None:
        """Use other rewards from this step on, if some were asked for; those that do not load change nothing."""
        request = take_request(self._directory)
        if request is None:
            return
        number, sources = request
        try:
            loaded = self._group.reload(sources, self._timeout_s)
        except BasculeError as error:
            post_answer(self._directory, number, step=step, error=str(error))
            self._event(step, "reward", f"other rewards were refused: {error}", refused=True)
            return
        post_answer(self._directory, number, step=step, error=None)
        self.replaced = sources
        names = ", ".join(source.name for source in sources)
        self._event(
            step,
            "reward",
            f"rewards are now {names}",
            rewards={each.name: source.config.spelled for each, source in zip(loaded, sources, strict=True)},
            sources={each.name: each.sha256 for each in loaded},
        )
