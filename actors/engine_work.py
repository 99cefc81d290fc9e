"""What engines were asked for in one call: jobs that wait, those that run, and answers nobody has taken yet."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from actors.engine_pool import Member


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one engine is asked for: `begin` asks its actor, and gives Ray's reference of the answer.

    `size` is how many sequences the engine works on for it, `number` its place among the caller's jobs.
    """

    name: str
    size: int
    begin: Callable[[Any], Any]
    number: int = 0


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
        self.running: dict[Any, Running] = {}
        self.done: deque[tuple[Job, Any]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether every answer has been taken."""
        return not (self.waiting or self.running or self.done)


class Jobs:
    """Jobs that wait: those of lost engines first, then the caller's, drawn one ahead."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._source = iter(jobs)
        self._next: deque[Job] = deque()
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

    def again(self, job: Job) -> None:
        """Put a job back that was not done."""
        self._next.appendleft(job)

    def _draw(self) -> None:
        following = next(self._source, None)
        if following is not None:
            self._next.append(following)
