"""What engines were asked for in one call: requests that wait, those that run, and groups nobody has taken yet."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from actors.engine_pool import Member
from algorithms.data import Group, Prompt, SamplingSettings

Request = tuple[Prompt, SamplingSettings]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A request and the engine that works on it."""

    member: Member
    request: Request

    @property
    def owner(self) -> str:
        """What to call it in messages."""
        return f"{self.member.name} (prompt {self.request[0].id})"


class Work:
    """The requests of one call and what became of them; `running` is by Ray's reference of the answer."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self.waiting = Requests(requests)
        self.running: dict[Any, Running] = {}
        self.done: deque[Group] = deque()

    @property
    def is_over(self) -> bool:
        """Whether every group has been taken."""
        return not (self.waiting or self.running or self.done)


class Requests:
    """Requests that wait: those of lost engines first, then the caller's, drawn one ahead."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._source = iter(requests)
        self._next: deque[Request] = deque()
        self._draw()

    def __bool__(self) -> bool:
        return bool(self._next)

    @property
    def first(self) -> Request:
        """The one that is next."""
        return self._next[0]

    def pop(self) -> Request:
        """Take it."""
        request = self._next.popleft()
        if not self._next:
            self._draw()
        return request

    def again(self, request: Request) -> None:
        """Put a request back that was not answered."""
        self._next.appendleft(request)

    def _draw(self) -> None:
        following = next(self._source, None)
        if following is not None:
            self._next.append(following)
