"""What engines were asked for in one call: requests that wait, those that run, and groups nobody has taken yet."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from actors.engine_pool import Member
from algorithms.data import Group, Prompt, Rollout, SamplingSettings, float_row, int_row

_LOSSES = 2
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
        self.suspects: deque[Request] = deque()
        """Those that were with an engine that was lost."""

    @property
    def is_over(self) -> bool:
        """Whether every group has been taken."""
        return not (self.waiting or self.suspects or self.running or self.done)


class Suspicions:
    """Which requests were with engines that were lost: one that was twice has ended them.

    After a first loss each of those an engine had is given to engines again, never two of them to one at a time,
    so that a second loss has one culprit.
    """

    def __init__(self) -> None:
        self._losses: Counter[tuple[str, int | None]] = Counter()

    def again(self, request: Request) -> bool:
        """An engine was lost with it: whether it may be tried once more."""
        self._losses[_key(request)] += 1
        return self._losses[_key(request)] < _LOSSES

    def holds(self, request: Request) -> bool:
        """Whether it was with an engine that was lost."""
        return _key(request) in self._losses

    def cleared(self, request: Request) -> None:
        """An engine has answered it, and lives."""
        self._losses.pop(_key(request), None)


def given_up(request: Request, version: int) -> Group:
    """What stands in place of the answer to a request that ends engines: aborted, without a token."""
    prompt, sampling = request
    empty = Rollout(
        tokens=int_row([]),
        logprobs=float_row([]),
        text="",
        finish="abort",
        loss_mask=int_row([]),
        versions=(version, version),
    )
    return Group(prompt=prompt, rollouts=(empty,) * sampling.n)


def _key(request: Request) -> tuple[str, int | None]:
    return request[0].id, request[1].seed


class Requests:
    """Requests that wait: those put back first, then the caller's, drawn one ahead."""

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
