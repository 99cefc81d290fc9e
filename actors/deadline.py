"""Every wait of the driver for an actor goes through here, so that none is without end."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from configs.errors import BasculeError


class DeadlineExceededError(BasculeError, TimeoutError):
    """A wait ended without an answer. Names the phase, who was late, and the seconds."""


class ActorLostError(BasculeError):
    """An actor died or could not start. Names the phase and the actor."""


def get_all(refs: Sequence[Any], owners: Sequence[str], *, timeout_s: float, phase: str) -> list[Any]:
    """Results of all `refs`, in order. The first failure is raised at once, without waiting for the rest.

    Raises DeadlineExceededError naming the late owners, ActorLostError naming a dead one, or the
    BasculeError that an actor raised.
    """
    deadline = time.monotonic() + timeout_s
    pending = dict(zip(refs, owners, strict=True))
    results: dict[Any, Any] = {}
    while pending:
        left = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
        if not ready:
            late = ", ".join(pending.values())
            raise DeadlineExceededError(f"{phase}: no answer within {timeout_s:.0f} s from {late}")
        results[ready[0]] = _result(ready[0], pending.pop(ready[0]), phase)
    return [results[ref] for ref in refs]


def get(ref: Any, owner: str, *, timeout_s: float, phase: str) -> Any:
    """Result of one `ref`; raises like get_all."""
    return get_all([ref], [owner], timeout_s=timeout_s, phase=phase)[0]


def wait_any(refs: Sequence[Any], owners: Sequence[str], *, timeout_s: float, phase: str) -> Any:
    """The first of `refs` to be ready (not its result). Raises DeadlineExceededError."""
    ready, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s)
    if not ready:
        raise DeadlineExceededError(f"{phase}: no answer within {timeout_s:.0f} s from {', '.join(owners)}")
    return ready[0]


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
    except RayActorError as error:
        raise ActorLostError(f"{phase}: {owner} is gone: {error}") from error
