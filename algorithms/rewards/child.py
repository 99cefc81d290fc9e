"""The loop of the child process in which rewards run; process.py is its other end."""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

from algorithms.data import Group, Verdict
from algorithms.rewards.calling import Call, Prepared, RewardError, calls_of, failure
from algorithms.rewards.loading import Reward, build_reward, preload
from algorithms.rewards.signature import Signature
from configs.errors import BasculeError

# How often a child with async functions says that its event loop turns.
BEAT_S = 1.0


class LateError(Exception):
    """A call did not end in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Give these completions of a group their rewards. `reward` is a place in the list of sources, `first` as in
    Call."""

    number: int
    reward: int
    group: Group
    indices: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Began:
    """A call is about to start; its time counts from here."""

    task: int
    call: Call


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A call has ended: verdicts of its completions, in the order of its indices."""

    task: int
    call: Call
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """The event loop turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A reward as the child found it."""

    name: str
    signature: Signature
    sha256: str | None


def serve(connection: Connection) -> None:
    """Load what comes first, (sources, whether to run the async ones), then do tasks until the pipe closes.

    Answers a tuple of Loaded, or the BasculeError of a source that does not load. Plain functions are called one
    after the other, async ones all on one event loop.
    """
    try:
        sources, for_async = connection.recv()
        rewards = [build_reward(source) for source in sources]
        for reward in rewards:
            if reward.signature.is_async is for_async:
                preload(reward)
    except BasculeError as error:
        connection.send(error)
        return
    connection.send(
        tuple(Loaded(name=each.name, signature=each.signature, sha256=each.sha256) for each in rewards)
    )
    with contextlib.suppress(EOFError):
        if for_async:
            asyncio.run(_serve_async(connection, rewards))
        else:
            while True:
                _do(connection.recv(), rewards, connection)


def _do(task: Task, rewards: Sequence[Reward], connection: Connection) -> None:
    reward = rewards[task.reward]
    for call in calls_of(reward, task.group, task.indices, task.first):
        connection.send(Began(task=task.number, call=call))
        verdicts = call_now(reward, task.group, call)
        connection.send(Done(task=task.number, call=call, verdicts=tuple(verdicts)))


def call_now(reward: Reward, group: Group, call: Call) -> list[Verdict]:
    """Call a plain function; what it raises is in the verdicts. Nothing here ends one that hangs."""
    began = time.monotonic()
    try:
        prepared = Prepared(reward, group, call)
        result = reward.function(**prepared.arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(waited(result))
        return prepared.verdicts(result, time.monotonic() - began)
    except RewardError as error:
        return failed(call, str(error), time.monotonic() - began)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- the user's code, isolated here
        return failed(call, failure(reward, call, error), time.monotonic() - began)


async def waited(result: Awaitable[object]) -> object:
    """The result of anything that can be awaited, as a coroutine."""
    return await result


def failed(call: Call, error: str, seconds: float, *, timed_out: bool = False) -> list[Verdict]:
    """The same verdict for every completion of a call that failed."""
    return [Verdict(error=error, timed_out=timed_out, seconds=seconds) for _ in call.indices]


async def _serve_async(connection: Connection, rewards: Sequence[Reward]) -> None:
    limits = [asyncio.Semaphore(reward.config.max_concurrency) for reward in rewards]

    async def one(task: Task, call: Call) -> None:
        reward = rewards[task.reward]
        async with limits[task.reward]:
            verdicts = await call_async(reward, task.group, call)
        connection.send(Done(task=task.number, call=call, verdicts=tuple(verdicts)))

    def begin(task: Task) -> list[Coroutine[Any, Any, None]]:
        calls = calls_of(rewards[task.reward], task.group, task.indices, task.first)
        return [one(task, call) for call in calls]

    await serve_on_loop(connection, begin)


async def serve_on_loop(
    connection: Connection, begin: Callable[[Any], Iterable[Coroutine[Any, Any, None]]]
) -> None:
    """Run what `begin` makes of each message, all side by side, and say that the loop turns; until EOFError."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    async def beat() -> None:
        while True:
            connection.send(Beat())
            await asyncio.sleep(BEAT_S)

    beating = loop.create_task(beat())
    try:
        while True:
            # The thread waits for what comes next, while the loop goes on with what it has.
            for coroutine in begin(await asyncio.to_thread(connection.recv)):
                doing = loop.create_task(coroutine)
                running.add(doing)
                doing.add_done_callback(running.discard)
    finally:
        beating.cancel()


async def awaited_within(result: Awaitable[object], timeout_s: float) -> object:
    """The result. Raises LateError when it takes longer; one that does not let itself be cancelled is left."""
    waiting = asyncio.ensure_future(waited(result))
    done, _ = await asyncio.wait({waiting}, timeout=timeout_s)
    if not done:
        waiting.cancel()
        raise LateError
    return waiting.result()


async def call_async(reward: Reward, group: Group, call: Call) -> list[Verdict]:
    """Await an async function for as long as it may take."""
    began = time.monotonic()
    try:
        prepared = Prepared(reward, group, call)
        asked = cast(Awaitable[object], reward.function(**prepared.arguments))
        result = await awaited_within(asked, call.timeout_s)
        return prepared.verdicts(result, time.monotonic() - began)
    except LateError:
        return failed(call, call.too_late(), time.monotonic() - began, timed_out=True)
    except RewardError as error:
        return failed(call, str(error), time.monotonic() - began)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- the user's code, isolated here
        return failed(call, failure(reward, call, error), time.monotonic() - began)
