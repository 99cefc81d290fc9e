"""Every wait of the driver for an actor goes through here, so that none is without end."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from bridge.transport.errors import TransportError
from configs.errors import BasculeError

_AFTER_FAILURE_S = 5.0
_TELL_S = 2.0
_GONE = (RayActorError, OutOfMemoryError, ActorUnschedulableError, NodeDiedError, ActorPlacementGroupRemoved)


class Observer(Protocol):
    """Who is told of a wait that goes on."""

    def __call__(self, phase: str, owners: Sequence[str], seconds: float) -> None:
        """For `seconds` now `phase` has waited for these."""
        ...


def _nobody(phase: str, owners: Sequence[str], seconds: float) -> None:
    pass


# Of a thread's context, so that the driver's own waits are told and not those of threads beside it.
_OBSERVER: ContextVar[Observer] = ContextVar("observer", default=_nobody)


@contextmanager
def observed(observer: Observer) -> Generator[None]:
    """Tell `observer` every few seconds of the waits of this thread, while the body runs."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def tell(phase: str, owners: Sequence[str], seconds: float) -> None:
    """For waits that are made of several: they go on."""
    _OBSERVER.get()(phase, owners, seconds)


class DeadlineExceededError(BasculeError, TimeoutError):
    """A wait ended without an answer. Names the phase, who was late, and the seconds."""


class ActorLostError(BasculeError):
    """An actor died or could not start. Names the phase and the actor."""


def get_all(
    refs: Sequence[Any],
    owners: Sequence[str],
    *,
    timeout_s: float,
    phase: str,
    look: Callable[[Sequence[str]], None] | None = None,
    look_s: float = 1.0,
) -> list[Any]:
    """Results of all `refs`, in order. A failure is raised without waiting for the rest to finish.

    Raises DeadlineExceededError naming the late owners, ActorLostError naming a dead one, or the
    BasculeError that an actor raised. The death of one actor makes its peers fail, often before Ray knows
    of the death, so the others get a few seconds to say more after the first failure. Meanwhile `look` is called
    every `look_s` seconds with the owners that are awaited; it may raise.
    """
    deadline = time.monotonic() + timeout_s
    pending = dict(zip(refs, owners, strict=True))
    results: dict[Any, Any] = {}
    while pending:
        left = max(0.0, deadline - time.monotonic())
        wait_s = min(left, _TELL_S if look is None else min(look_s, _TELL_S))
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=wait_s)
        if look is not None:
            look(list(pending.values()))
        if not ready and time.monotonic() < deadline:
            _OBSERVER.get()(phase, list(pending.values()), timeout_s - left + wait_s)
            continue
        if not ready:
            late = ", ".join(pending.values())
            raise DeadlineExceededError(f"{phase}: no answer within {timeout_s:.0f} s from {late}")
        try:
            results[ready[0]] = _result(ready[0], pending.pop(ready[0]), phase)
        except BasculeError as error:
            raise _cause(error, pending, phase) from error.__cause__
    return [results[ref] for ref in refs]


def _cause(first: BasculeError, pending: dict[Any, str], phase: str) -> BasculeError:
    """The error that says most: a death, then what a component says of itself, then a broken connection."""
    errors = [first]
    end = time.monotonic() + _AFTER_FAILURE_S
    while pending and not isinstance(errors[-1], ActorLostError):
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            break
        try:
            _result(ready[0], pending.pop(ready[0]), phase)
        except BasculeError as error:
            errors.append(error)
    return max(errors, key=_weight)


def _weight(error: BasculeError) -> int:
    if isinstance(error, ActorLostError):
        return 2
    # A bare BasculeError wraps foreign code, which here is mostly a collective whose peer is gone.
    return 0 if isinstance(error, TransportError) or type(error) is BasculeError else 1


def get(ref: Any, owner: str, *, timeout_s: float, phase: str) -> Any:
    """Result of one `ref`; raises like get_all."""
    return get_all([ref], [owner], timeout_s=timeout_s, phase=phase)[0]


def _result(ref: Any, owner: str, phase: str) -> Any:
    try:
        return ray.get(ref, timeout=60)
    except GetTimeoutError as error:
        raise DeadlineExceededError(f"{phase}: the result of {owner} could not be fetched") from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, BasculeError):
            raise cause from None
        raise BasculeError(f"{phase}: {owner} failed with {cause!r}\n{error}") from error
    except _GONE as error:
        raise ActorLostError(f"{phase}: {owner} is gone: {error}") from error
    except RayError as error:
        raise BasculeError(f"{phase}: {owner}: {error}") from error
