"""Where the bridge lives: in an actor of its own, or in trainer rank 0. Both are driven in the same way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ray

from actors import deadline
from actors.bridge_host import BridgeHost, Meeting
from actors.placement import Reservation
from actors.trainer import TrainerGroup
from bridge.sync_plan import SyncPlan
from bridge.sync_protocol import SyncOrder

Started = tuple[list[Any], list[str]]
"""Refs of a call, and whose they are."""


class BridgeHome(Protocol):
    """What a sync needs of bridge and trainers together."""

    def start(self) -> None:
        """Make a bridge, in place of one that is lost."""
        ...

    def join(self, engines: Meeting, trainer_port: int | None) -> Started:
        """Let the bridge join the engines' group and, with the trainers, one at this port; None keeps theirs."""
        ...

    def address(self) -> tuple[str, int, int]:
        """The bridge's node and two different ports free on it."""
        ...

    def forward(self, order: SyncOrder) -> Started:
        """Let trainers send and the bridge pass on; the first ref holds what the bridge says."""
        ...

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask the bridge for its spans (actors.trace); none where they are a trainer rank's."""
        ...

    def call(self, method: str) -> Any:
        """Result of a method of the bridge that moves nothing between trainers and bridge."""
        ...

    def replay(self) -> Started:
        """Let the bridge send the version that it keeps."""
        ...

    def questions(self) -> Mapping[str, Callable[[], Any]]:
        """How to ask the bridge how far it is, by its name; none where it cannot answer meanwhile."""
        ...


class _Home:
    """What both have in common."""

    def __init__(
        self, plan: SyncPlan, trainers: TrainerGroup, keep: bool, start_timeout_s: float, timeout_s: float
    ) -> None:
        self._plan = plan
        self._trainers = trainers
        self._keep = keep
        self._start_timeout_s = start_timeout_s
        self._timeout_s = timeout_s

    def _meeting(self, host: str, port: int, names: Sequence[str]) -> Meeting:
        return Meeting(host=host, port=port, peers=("bridge", *names), timeout_s=self._timeout_s)


class DedicatedBridge(_Home):
    """An actor in a bundle of its own."""

    def __init__(self, reservation: Reservation, stall_timeout_s: float, *common: Any) -> None:
        """`common` are the arguments of _Home. A bridge that is up answers within `stall_timeout_s`."""
        super().__init__(*common)
        self._options = reservation.options("bridge", 0)
        self._actor: Any = None
        self._stall_timeout_s = stall_timeout_s
        self._is_up = False
        self.start()

    def start(self) -> None:
        """Make a bridge, in place of one that is lost."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._is_up = False
        # Its progress is asked for while it works.
        kind: Any = ray.remote(concurrency_groups={"watch": 1})  # pyright: ignore[reportCallIssue]
        self._actor = kind(BridgeHost).options(**self._options).remote(self._plan, self._keep)

    def address(self) -> tuple[str, int, int]:
        """The bridge's node and two different ports free on it."""
        return self._get(self._actor.address.remote(), "address of the bridge")

    def join(self, engines: Meeting, trainer_port: int | None) -> Started:
        """Let the bridge join the engines' group and, with the trainers, one at this port."""
        if trainer_port is None:
            return [self._actor.connect.remote(None, engines)], ["bridge"]
        names = self._trainers.names
        meeting = self._meeting(engines.host, trainer_port, names)
        joining = self._trainers.sync("join", [(meeting, rank + 1) for rank in range(self._trainers.size)])
        return [self._actor.connect.remote(meeting, engines), *joining], ["bridge", *names]

    def forward(self, order: SyncOrder) -> Started:
        """Let trainers send and the bridge pass on; the first ref holds what the bridge says."""
        sending = self._trainers.sync("send", [(order,)] * self._trainers.size)
        return [self._actor.forward.remote(order), *sending], ["bridge", *self._trainers.names]

    def replay(self) -> Started:
        """Let the bridge send the version that it keeps."""
        return [self._actor.replay.remote()], ["bridge"]

    def questions(self) -> Mapping[str, Callable[[], Any]]:
        """How to ask the bridge how far it is."""
        return {"bridge": self._actor.progress.options(concurrency_group="watch").remote}

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask the bridge for its spans."""
        return {"bridge": self._actor.take_spans.options(concurrency_group="watch").remote}

    def call(self, method: str) -> Any:
        """Result of a method of the bridge."""
        return self._get(getattr(self._actor, method).remote(), f"bridge: {method}")

    def _get(self, ref: Any, phase: str) -> Any:
        timeout_s = self._stall_timeout_s if self._is_up else self._start_timeout_s
        answer = deadline.get(ref, "bridge", timeout_s=timeout_s, phase=phase)
        self._is_up = True
        return answer


class HostedBridge(_Home):
    """Part of trainer rank 0, which needs no further device."""

    def __init__(self, *common: Any) -> None:
        """`common` are the arguments of _Home."""
        super().__init__(*common)
        self._owner = f"bridge in {self._trainers.names[0]}"
        self.start()

    def start(self) -> None:
        """Make a bridge, in place of an earlier one."""
        self._get(self._first.sync.remote("host", self._keep), "start of the bridge")

    def address(self) -> tuple[str, int, int]:
        """The bridge's node and two different ports free on it."""
        return self._get(self._first.sync.remote("call_host", "address"), "address of the bridge")

    def join(self, engines: Meeting, trainer_port: int | None) -> Started:
        """Let the bridge join the engines' group and, with the trainers, one at this port."""
        if trainer_port is None:
            return [self._first.sync.remote("call_host", "connect", None, engines)], [self._owner]
        names = self._trainers.names[1:]
        meeting = self._meeting(engines.host, trainer_port, names)
        joining = self._trainers.sync("join", [(meeting, rank) for rank in range(1, self._trainers.size)], 1)
        return [self._first.sync.remote("connect_host", meeting, engines), *joining], [self._owner, *names]

    def forward(self, order: SyncOrder) -> Started:
        """Let trainers send and the bridge pass on; the first ref holds what the bridge says."""
        sending = self._trainers.sync("send", [(order,)] * (self._trainers.size - 1), 1)
        hosting = self._first.sync.remote("send_hosting", order)
        return [hosting, *sending], [self._owner, *self._trainers.names[1:]]

    def replay(self) -> Started:
        """Let the bridge send the version that it keeps."""
        return [self._first.sync.remote("call_host", "replay")], [self._owner]

    def questions(self) -> Mapping[str, Callable[[], Any]]:
        """A trainer rank does one thing at a time: engines tell what they wait for."""
        return {}

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """They are those of trainer rank 0."""
        return {}

    def call(self, method: str) -> Any:
        """Result of a method of the bridge."""
        return self._get(self._first.sync.remote("call_host", method), f"bridge: {method}")

    @property
    def _first(self) -> Any:
        # Another one after the ranks were started again.
        return self._trainers.ranks[0]

    def _get(self, ref: Any, phase: str) -> Any:
        return deadline.get(ref, self._owner, timeout_s=self._start_timeout_s, phase=phase)
