"""The loop of the child process in which an environment runs; process.py is its other end."""

import asyncio
import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

from algorithms.environments.calling import (
    EnvironmentFailedError,
    Reply,
    Step,
    arguments_of,
    failure,
    make_object,
    read_reply,
    too_late,
)
from algorithms.environments.loading import Environment, build_environment
from algorithms.rewards.child import LateError, Loaded, awaited_within, serve_on_loop, waited
from configs.errors import BasculeError

# Objects of episodes whose end nobody has told: a lost engine leaves some.
_MAX_EPISODES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Began:
    """A call for the step with this number is about to start; its time counts from here."""

    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Replied:
    """The step with this number has its reply."""

    number: int
    reply: Reply


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The episode is over: forget its object."""

    episode: str


def serve(connection: Connection) -> None:
    """Load what comes first, ((source,), False), then reply to steps until the pipe closes.

    Answers ((Loaded,)), or the BasculeError of a source that does not load. A plain function, or `step`, is called
    for one step after the other, an async one for all on one event loop.
    """
    try:
        (source,), _ = connection.recv()
        environment = build_environment(source)
    except BasculeError as error:
        connection.send(error)
        return
    signature = environment.signature
    connection.send((Loaded(name=environment.name, signature=signature, sha256=environment.sha256),))
    episodes = Episodes(environment)
    with contextlib.suppress(EOFError):
        if signature.is_async:
            asyncio.run(_serve_async(connection, episodes))
        else:
            while True:
                asked: Step | End = connection.recv()
                if isinstance(asked, End):
                    episodes.forget(asked.episode)
                else:
                    reply = reply_now(episodes, asked, lambda number: connection.send(Began(number=number)))
                    connection.send(Replied(number=asked.number, reply=reply))


class Episodes:
    """The calls that a step takes, and the objects of the episodes of a class."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self._objects: OrderedDict[str, object] = OrderedDict()

    def calls(self, step: Step) -> list[tuple[Step, Callable[..., object]]]:
        """One, or of a class in a process that has not seen the earlier turns of the episode those before it."""
        environment = self.environment
        if environment.made is None:
            return [(step, environment.function)]
        known = step.episode in self._objects
        if not known:
            self._objects[step.episode] = make_object(environment, step)
        while len(self._objects) > _MAX_EPISODES:
            self._objects.popitem(last=False)
        thing = self._objects[step.episode]

        def call(**arguments: Any) -> object:
            return environment.function(thing, **arguments)

        return [(each, call) for each in ([step] if known else step.replayed())]

    def title(self, step: Step) -> str:
        """What to call a step in messages."""
        return step.title(self.environment.name)

    def failed(self, step: Step, error: BaseException) -> Reply:
        """The reply to a step at which this was raised."""
        title, timeout_s = self.title(step), self.environment.source.config.timeout_s
        if isinstance(error, LateError):
            return Reply(error=too_late(title, timeout_s))
        if isinstance(error, EnvironmentFailedError):
            return Reply(error=str(error))
        return Reply(error=failure(self.environment, title, error))

    def after(self, step: Step, reply: Reply) -> Reply:
        """The reply; an episode that is over with it is forgotten."""
        if reply.done or reply.error is not None:
            self.forget(step.episode)
        return reply

    def forget(self, episode: str) -> None:
        """The episode is over, or its object is not to be trusted any more."""
        self._objects.pop(episode, None)


def reply_now(episodes: Episodes, step: Step, began: Callable[[int], None]) -> Reply:
    """Call a plain environment; what it raises is in the reply. Nothing here ends a call that hangs."""
    environment, title = episodes.environment, episodes.title(step)
    reply = Reply(done=True)
    try:
        began(step.number)
        for each, call in episodes.calls(step):
            began(step.number)
            result = call(**arguments_of(environment, each))
            if inspect.isawaitable(result):
                result = asyncio.run(waited(result))
            reply = read_reply(result, title)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- the user's code, isolated here
        reply = episodes.failed(step, error)
    return episodes.after(step, reply)


async def reply_async(episodes: Episodes, step: Step) -> Reply:
    """Await an async environment for as long as each call may take."""
    environment, title = episodes.environment, episodes.title(step)
    timeout_s = environment.source.config.timeout_s
    reply = Reply(done=True)
    try:
        for each, call in episodes.calls(step):
            asked = cast(Awaitable[object], call(**arguments_of(environment, each)))
            reply = read_reply(await awaited_within(asked, timeout_s), title)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- the user's code, isolated here
        reply = episodes.failed(step, error)
    return episodes.after(step, reply)


async def _serve_async(connection: Connection, episodes: Episodes) -> None:
    limit = asyncio.Semaphore(episodes.environment.source.config.max_concurrency)

    async def one(step: Step) -> None:
        async with limit:
            reply = await reply_async(episodes, step)
        connection.send(Replied(number=step.number, reply=reply))

    def begin(asked: Step | End) -> list[Coroutine[Any, Any, None]]:
        if isinstance(asked, End):
            episodes.forget(asked.episode)
            return []
        return [one(asked)]

    await serve_on_loop(connection, begin)
