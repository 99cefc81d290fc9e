"""Which engines are up: notices the loss of one within seconds and starts another in its place."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from actors import deadline
from actors.events import Event, unheard
from configs.errors import BasculeError

LOG = logging.getLogger(__name__)

_LOOK_S = 1.0
# It looks at least this often whether it is over.
_CLOSE_S = 10.0
State = Literal["up", "starting", "new", "failed"]


class EngineLostError(BasculeError):
    """No engine is left, or engines are lost more often than is allowed. Names the engine and the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One engine actor. The one that replaces it has the same number and the next incarnation."""

    index: int
    incarnation: int
    actor: Any
    kind: str = "engine"

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"{self.kind} {self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    member: Member
    state: State
    why: str = ""


class EnginePool:
    """The engines of a run by number. Without `make` a lost engine is not replaced.

    `up` engines sample; a `new` one runs but has yet to get weights, after which `admit` makes it `up`. A thread
    watches all of them, so that a loss is noticed and a replacement on its way while the run does other things.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        make: Callable[[int], Any] | None = None,
        *,
        start_timeout_s: float = 600.0,
        max_recoveries: int = 0,
        heartbeat_timeout_s: float = 120.0,
        event: Event = unheard,
        kind: str = "engine",
    ) -> None:
        """`kind` is what an engine is called before its number.

        An actor that answers nothing for `heartbeat_timeout_s` is lost as one that has ended is.
        """
        self._make = make
        self._start_timeout_s = start_timeout_s
        self._left = max_recoveries
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._event = event
        self._lock = threading.Condition()
        self._slots = [
            _Slot(member=Member(index=index, incarnation=0, actor=actor, kind=kind), state="up")
            for index, actor in enumerate(actors)
        ]
        self._watched: dict[Any, Member] = {}
        self._asked: dict[Member, tuple[Any, float]] = {}
        self._closed = threading.Event()
        self._watching: threading.Thread | None = None
        self._replacing: list[threading.Thread] = []
        # Actors that are to take the place of lost ones, and are not members yet.
        self._coming: dict[int, Any] = {}
        self.recoveries = 0

    def __len__(self) -> int:
        return len(self._slots)

    def members(self, *states: State) -> tuple[Member, ...]:
        """Engines in one of these states, by number."""
        with self._lock:
            return tuple(slot.member for slot in self._slots if slot.state in states)

    def watch(self) -> None:
        """Notice losses from now on. The engines have to be started."""
        for member in self.members("up"):
            self._watched[member.actor.watch.remote()] = member
        self._watching = threading.Thread(target=self._look, name="watch-engines", daemon=True)
        self._watching.start()

    def admit(self, member: Member) -> None:
        """A new engine has its weights."""
        with self._lock:
            slot = self._slots[member.index]
            if slot.member == member and slot.state == "new":
                self._slots[member.index] = replace(slot, state="up")
                LOG.warning("%s is back", member.name)

    def lost(self, member: Member, error: BasculeError) -> None:
        """The engine is of no use any more: end it, and start another one in the background.

        Does nothing when that has happened already.
        """
        why = _first_line(error)
        with self._lock:
            slot = self._slots[member.index]
            if slot.member != member or slot.state not in ("up", "new"):
                return
            can_replace = self._make is not None and self._left > 0
            self._left -= 1
            state: State = "starting" if can_replace else "failed"
            self._slots[member.index] = replace(slot, state=state, why=why)
            self._lock.notify_all()
        following = "starting another" if can_replace else "it is not replaced"
        LOG.warning("%s is lost: %s; %s", member.name, why, following)
        self._event(None, "restart", f"{member.name} is lost: {why}; {following}", engine=member.index)
        if can_replace:
            name = f"replace-{member.index}"
            thread = threading.Thread(target=self._replace, args=(member,), name=name, daemon=True)
            self._replacing.append(thread)
            thread.start()

    def noticed(self, member: Member, timeout_s: float) -> bool:
        """Whether the engine is known to be lost within this time: its error may come before its death is seen."""
        end = time.monotonic() + timeout_s
        with self._lock:
            while self._slots[member.index].member == member:
                if self._slots[member.index].state in ("starting", "failed"):
                    return True
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._lock.wait(left)
        return True

    def wait_for_one(self, timeout_s: float) -> None:
        """Return once some engine is up or new. Raises EngineLostError when none will be."""
        end = time.monotonic() + timeout_s
        with self._lock:
            while not any(slot.state in ("up", "new") for slot in self._slots):
                left = end - time.monotonic()
                if left <= 0 or all(slot.state == "failed" for slot in self._slots):
                    causes = "; ".join(f"{slot.member.name}: {slot.why}" for slot in self._slots)
                    raise EngineLostError(f"no engine is left: {causes}")
                self._lock.wait(left)

    def close(self) -> None:
        """Stop watching, and give up engines that are on their way. Call it before leaving Ray, which a late call
        would start again, or end the process for."""
        self._closed.set()
        if self._watching is not None:
            self._watching.join(_CLOSE_S)
        with self._lock:
            coming = list(self._coming.values())
        for actor in coming:
            ray.kill(actor)
        for thread in self._replacing:
            thread.join(_CLOSE_S)

    def _look(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                refs = list(self._watched)
            if not refs:
                self._closed.wait(_LOOK_S)
                continue
            self._listen()
            try:
                ready, _ = ray.wait(refs, num_returns=1, timeout=_LOOK_S)
            except SystemExit:
                # What Ray says to those who still wait when it ends.
                return
            for ref in ready:
                with self._lock:
                    member = self._watched.pop(ref)
                if not self._closed.is_set():
                    try:
                        deadline.get(ref, member.name, timeout_s=_LOOK_S, phase="watch")
                    except BasculeError as error:
                        self.lost(member, error)

    def _listen(self) -> None:
        """Ask each actor for a sign of life, one question at a time; one that stops running answers none."""
        now = time.monotonic()
        members = self.members("up", "new")
        self._asked = {member: asked for member, asked in self._asked.items() if member in members}
        for member in members:
            ref, since = self._asked.get(member, (None, now))
            if ref is None or ray.wait([ref], timeout=0)[0]:
                self._asked[member] = member.actor.progress.remote(), now
            elif now - since > self._heartbeat_timeout_s:
                seconds = f"{self._heartbeat_timeout_s:.0f} s"
                error = deadline.DeadlineExceededError(
                    f"{member.name}: its process has not answered for {seconds}"
                )
                self.lost(member, error)

    def _replace(self, member: Member) -> None:
        assert self._make is not None
        start = time.monotonic()
        try:
            ray.kill(member.actor)
            with self._lock:
                # Either `close` sees the actor, or there is none.
                if self._closed.is_set():
                    return
                actor = self._coming[member.index] = self._make(member.index)
            deadline.get(
                actor.start.remote(), member.name, timeout_s=self._start_timeout_s, phase="start after a loss"
            )
        except (RayError, BasculeError) as error:
            if self._closed.is_set():
                return
            with self._lock:
                slot = self._slots[member.index]
                why = f"{slot.why}; then {_first_line(error)}"
                self._slots[member.index] = replace(slot, state="failed", why=why)
                self._lock.notify_all()
            LOG.warning("%s could not be replaced: %s", member.name, error)
            return
        following = replace(member, incarnation=member.incarnation + 1, actor=actor)
        watching = actor.watch.remote()
        with self._lock:
            del self._coming[member.index]
            self._slots[member.index] = _Slot(member=following, state="new")
            self._watched[watching] = following
            self.recoveries += 1
            self._lock.notify_all()
        seconds = time.monotonic() - start
        LOG.warning("%s was started again in %.1f s", member.name, seconds)
        text = f"{member.name} was started again in {seconds:.1f} s"
        self._event(None, "restart", text, engine=member.index, seconds=seconds)


def _first_line(error: Exception) -> str:
    """What Ray says of a death goes on for a page."""
    return str(error).partition("\n")[0]
