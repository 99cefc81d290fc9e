"""Calling reward functions on groups, and the loop of the child process in which they run."""

import asyncio
import contextlib
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np

from algorithms.data import Group, Scored, float_row
from algorithms.rewards.loading import Reward, RewardSource, build_reward, error_line
from configs.errors import BasculeError

# An async function ends its own late calls; the process around it only has to notice a blocked event loop.
ASYNC_MARGIN_S = 5.0


class RewardError(BasculeError):
    """A reward function raised, hung, or gave no number. Names the function, the sample and what happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call that is about to start: of one completion, or of all (`index` None) for an async function."""

    reward: str
    prompt: str
    index: int | None
    timeout_s: float

    def __str__(self) -> str:
        place = "" if self.index is None else f", completion {self.index}"
        return f"reward {self.reward}: prompt {self.prompt}{place}"


def score_group(
    rewards: Sequence[Reward],
    group: Group,
    *,
    runner: asyncio.Runner | None = None,
    on_call: Callable[[Call], object] | None = None,
) -> Scored:
    """`group` with the weighted sum of the rewards that apply, and each function's values.

    Async functions run on `runner`, one completion beside the other; a runner that is kept lets them keep
    their clients. `on_call` hears of each call before it starts. Nothing here ends a synchronous function
    that hangs. Raises RewardError.
    """
    parts: dict[str, tuple[float | None, ...]] = {}
    manager = asyncio.Runner() if runner is None else contextlib.nullcontext(runner)
    with manager as active:
        for reward in rewards:
            assert reward.name not in parts, "names of rewards are distinct, see read_sources"
            parts[reward.name] = tuple(_score_reward(reward, group, active, on_call))
    return Scored(
        group=group, rewards=float_row(_weighted_sums(rewards, parts, len(group.rollouts))), parts=parts
    )


def serve(connection: Connection) -> None:
    """Run in a child process: load the sources that come first, then answer groups until the pipe closes.

    Sends None once loaded, before each call a Call, and for each group (rewards, parts); in place of an
    answer, the BasculeError.
    """
    try:
        sources: Sequence[RewardSource] = connection.recv()
        rewards = [build_reward(source) for source in sources]
    except BasculeError as error:
        connection.send(error)
        return
    connection.send(None)
    with asyncio.Runner() as runner, contextlib.suppress(EOFError):
        while True:
            group: Group = connection.recv()
            try:
                scored = score_group(rewards, group, runner=runner, on_call=connection.send)
            except RewardError as error:
                connection.send(error)
            else:
                connection.send((scored.rewards, scored.parts))


def _weighted_sums(
    rewards: Sequence[Reward], parts: Mapping[str, Sequence[float | None]], size: int
) -> list[float]:
    sums: list[float] = []
    for index in range(size):
        values = [(reward.weight, parts[reward.name][index]) for reward in rewards]
        known = [weight * value for weight, value in values if value is not None]
        sums.append(math.fsum(known) if known else math.nan)
    return sums


def _score_reward(
    reward: Reward, group: Group, runner: asyncio.Runner, on_call: Callable[[Call], object] | None
) -> list[float | None]:
    calls = [
        Call(reward=reward.name, prompt=group.prompt.id, index=index, timeout_s=reward.config.timeout_s)
        for index in range(len(group.rollouts))
    ]
    arguments = [_arguments(reward, group, call) for call in calls]
    if inspect.iscoroutinefunction(reward.function):
        if on_call is not None:
            limit = reward.config.timeout_s + ASYNC_MARGIN_S
            on_call(Call(reward=reward.name, prompt=group.prompt.id, index=None, timeout_s=limit))
        results = runner.run(_await_all(reward, calls, arguments))
        return [_check_value(value, call) for value, call in zip(results, calls, strict=True)]
    values: list[float | None] = []
    for call, given in zip(calls, arguments, strict=True):
        if on_call is not None:
            on_call(call)
        values.append(_check_value(_call(reward, call, given, runner), call))
    return values


def _call(reward: Reward, call: Call, given: Mapping[str, Any], runner: asyncio.Runner) -> object:
    try:
        result = reward.function(**given)
        if inspect.isawaitable(result):
            return runner.run(_await(cast(Awaitable[object], result)))
        return result
    except (Exception, SystemExit) as error:
        raise _failure(reward, call, error) from error


async def _await(awaitable: Awaitable[object]) -> object:
    return await awaitable


async def _await_all(
    reward: Reward, calls: Sequence[Call], arguments: Sequence[Mapping[str, Any]]
) -> list[object]:
    async def one(call: Call, given: Mapping[str, Any]) -> object:
        limit = asyncio.timeout(call.timeout_s)
        try:
            async with limit:
                return await cast(Awaitable[object], reward.function(**given))
        except (Exception, SystemExit) as error:
            if limit.expired():
                raise RewardError(late(call)) from error
            raise _failure(reward, call, error) from error

    # All calls end before the first failure is raised, so none lingers on a runner that is kept.
    results = await asyncio.gather(*map(one, calls, arguments), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def late(call: Call) -> str:
    """Message for a call that did not end in time."""
    return f"{call}: no answer within {call.timeout_s:g} s; make the function faster or raise its timeout_s"


def _failure(reward: Reward, call: Call, error: BaseException) -> RewardError:
    return RewardError(f"{call}: {type(error).__name__}: {error} ({error_line(error, reward.path)})")


def _arguments(reward: Reward, group: Group, call: Call) -> dict[str, Any]:
    assert call.index is not None
    prompt, rollout = group.prompt, group.rollouts[call.index]
    columns = prompt.columns
    available: dict[str, Any] = {
        **columns,
        "completion": rollout.text,
        "prompt": columns["prompt"] if "prompt" in columns else prompt.messages[-1]["content"],
        "messages": [dict(message) for message in prompt.messages],
        "tokens": rollout.tokens,
        "finish": rollout.finish,
    }
    fixed = reward.config.kwargs
    for name in reward.needs:
        if name not in available:
            raise RewardError(f"{call}: the function asks for {name!r}, which this row of the dataset lacks")
    wanted = {*reward.needs, *reward.takes, *(columns if reward.takes_all else ())}
    return {name: value for name, value in available.items() if name in wanted} | fixed


def _check_value(value: Any, call: Call) -> float | None:
    if value is None:
        return None
    number = math.nan
    if isinstance(value, numbers.Real) or type(value) is np.bool_:
        with contextlib.suppress(OverflowError):
            number = float(cast(float, value))
    if not math.isfinite(number):
        shown = repr(cast(object, value))
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise RewardError(f"{call}: gave {shown}; a reward is a finite number, a bool, or None")
    return number
