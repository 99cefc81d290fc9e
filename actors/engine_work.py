"""What engines were asked for in one call: jobs that wait, those that run, and answers nobody has taken yet."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import length_hint
from typing import Any

from actors.engine_pool import Member
from algorithms.data import Group, Prompt, Rollout, SamplingSettings, float_row, int_row

_LOSSES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one engine is asked for: `begin` asks its actor, and gives Ray's reference of the answer."""

    name: str
    """What to call it in messages."""
    size: int
    """How many sequences the engine works on for it."""
    begin: Callable[[Any], Any]
    key: tuple[str, int | None]
    """What makes it the same job, should it be asked for again."""
    without: Callable[[], Any] | None = None
    """Gives an answer in place of an engine's, where it may be left out."""
    number: int = 0
    """Its place among the caller's jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A job and the engine that works on it."""

    member: Member
    job: Job

    @property
    def owner(self) -> str:
        """What to call it in messages."""
        return f"{self.member.name} ({self.job.name})"


class Work:
    """The jobs of one call and what became of them; `running` is by Ray's reference of the answer."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.waiting = Jobs(jobs)
        self._total = length_hint(jobs)
        self.running: dict[Any, Running] = {}
        self.done: deque[tuple[Job, Any]] = deque()
        self.suspects: deque[Job] = deque()
        """Those that were with an engine that was lost."""

    @property
    def num_waiting(self) -> int:
        """Jobs that no engine has had room for. Where a caller does not tell how many there are, only the next."""
        drawn_since = max(self._total - self.waiting.drawn, 0)
        return drawn_since + bool(self.waiting) + len(self.suspects)

    @property
    def is_over(self) -> bool:
        """Whether every answer has been taken."""
        return not (self.waiting or self.suspects or self.running or self.done)


class Suspicions:
    """Which jobs were with engines that were lost: one that was twice has ended them.

    After a first loss each of those an engine had is given to engines again, never two of them to one at a time,
    so that a second loss has one culprit.
    """

    def __init__(self) -> None:
        self._losses: Counter[tuple[str, int | None]] = Counter()

    def again(self, job: Job) -> bool:
        """An engine was lost with it: whether it may be tried once more."""
        self._losses[job.key] += 1
        return self._losses[job.key] < _LOSSES

    def holds(self, job: Job) -> bool:
        """Whether it was with an engine that was lost."""
        return job.key in self._losses

    def cleared(self, job: Job) -> None:
        """An engine has done it, and lives."""
        self._losses.pop(job.key, None)


def given_up(prompt: Prompt, sampling: SamplingSettings, version: int) -> Group:
    """What stands in place of the completions of a prompt that ends engines: aborted, without a token."""
    empty = Rollout(
        tokens=int_row([]),
        logprobs=float_row([]),
        text="",
        finish="abort",
        loss_mask=int_row([]),
        versions=(version, version),
    )
    return Group(prompt=prompt, rollouts=(empty,) * sampling.n)


class Jobs:
    """Jobs that wait, drawn one ahead."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._source = iter(jobs)
        self._next: deque[Job] = deque()
        self.drawn = 0
        """How many have come, the next one included."""
        self._draw()

    def __bool__(self) -> bool:
        return bool(self._next)

    @property
    def first(self) -> Job:
        """The one that is next."""
        return self._next[0]

    def pop(self) -> Job:
        """Take it."""
        job = self._next.popleft()
        if not self._next:
            self._draw()
        return job

    def _draw(self) -> None:
        following = next(self._source, None)
        if following is not None:
            self._next.append(following)
            self.drawn += 1
