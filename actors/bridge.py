"""One weight sync: trainers, bridge and engines together, and what is done when one of them is lost."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors import deadline
from actors.bridge_home import BridgeHome, DedicatedBridge, HostedBridge
from actors.bridge_host import Meeting
from actors.engine_group import EngineGroup
from actors.engine_pool import EngineLostError, Member
from actors.events import Event, unheard
from actors.placement import Reservation
from actors.sync_watch import StalledError, SyncWatch
from actors.trainer import TrainerGroup
from algorithms.data import Vision
from bridge.relay import ManifestEntry
from bridge.sync_plan import cut_plan, to_wire
from bridge.sync_protocol import SyncOrder
from configs.errors import BasculeError
from configs.schema import RunConfig

LOG = logging.getLogger(__name__)

# An answer to this takes an actor milliseconds.
_CHECK_S = 15.0
# The watch of an engine sees within this time that its core has died.
_NOTICE_S = 3.0


class WeightBridge:
    """Trainers, bridge and engines as one weight sync; implements the WeightSync protocol.

    Groups are made anew, on new ports, whenever the engines in them change or a sync has failed.
    """

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        trainers: TrainerGroup,
        engines: EngineGroup,
        *,
        version: int | None = 0,
        probe: Sequence[int] = (),
        vision: Vision | None = None,
        event: Event = unheard,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """Give everyone the plan and connect the groups, within cluster.start_timeout_s.

        `version` is the one that engines start with; None when their weights are of no use. `probe` are the
        tokens that bridge.check_logprobs_every scores, `vision` is what they show. `event` is told when a sync has
        to be made again.
        `adapter` is the content of an adapter_config.json when the trainers' plan is that of an adapter.
        """
        self._settings = config.bridge
        self._start_timeout_s = config.cluster.start_timeout_s
        self._timeout_s = config.cluster.step_timeout_s
        self._collective_s = config.cluster.collective_timeout_s
        self._trainers = trainers
        self._engines = engines
        self._bucket_bytes = int(self._settings.bucket_size_mb * (1 << 20))
        plan = cut_plan(trainers.plan, self._bucket_bytes, trainers.fixed_units)
        self._wire: Mapping[str, Any] = to_wire(plan)
        trainers.follow(self._bucket_bytes, by_content=self._settings.skip_unchanged)
        common = (plan, trainers, self._settings.offload_bridge, self._start_timeout_s, self._collective_s)
        self._home: BridgeHome = (
            DedicatedBridge(reservation, self._settings.stall_timeout_s, *common)
            if self._settings.placement == "dedicated"
            else HostedBridge(*common)
        )
        self._leaves_out = self._settings.skip_unchanged or bool(trainers.fixed_units)
        self._version = version
        self._probe = tuple(probe), vision
        self._event = event
        self._adapter = adapter
        self._sent = False
        self._left = self._settings.max_recoveries
        self._joined: tuple[Member, ...] = ()
        self._trainers_joined = False
        self._must_be_full = True
        engines.welcome_with(self._welcome)
        self._connect(engines.pool.members("up"))

    def sync(self, version: int) -> Mapping[str, float]:
        """Pause, move the weights, resume. Returns bytes, counts and seconds as `sync/...`.

        Engines or a bridge that are lost on the way are replaced, at most bridge.max_recoveries times in a run,
        and everything is sent again. Raises what the first failing part raised; engines that did not get a
        full set stay paused.
        """
        start = time.monotonic()
        while True:
            self._engines.pool.wait_for_one(self._start_timeout_s)
            members = self._engines.pool.members("up", "new")
            try:
                metrics = self._sync_once(version, members)
            except BasculeError as error:
                self._recover(error, members)
                continue
            self._version, self._sent = version, True
            metrics |= {"sync/version": float(version), "sync/seconds": time.monotonic() - start}
            every = self._settings.check_logprobs_every
            return metrics | (self._compare() if every and version % every == 0 else {})

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask the bridge for its spans (actors.trace)."""
        return self._home.tracks()

    def trainers_restarted(self) -> None:
        """All ranks are other processes: the next sync connects them anew, and sends everything.

        The bridge is made anew as well, for it may wait for ranks that are no more.
        """
        self._joined, self._trainers_joined, self._must_be_full = (), False, True
        self._trainers.follow(self._bucket_bytes, by_content=self._settings.skip_unchanged)
        self._home.start()

    def manifest(self) -> list[ManifestEntry]:
        """Every tensor of the last sync with the hash of its content."""
        return self._home.call("manifest")

    def _compare(self) -> dict[str, float]:
        """How far trainer and engines are apart on the probe: weights that are right leave only rounding."""
        expected = self._trainers.score(*self._probe)
        found = self._engines.score(*self._probe)
        differences = [abs(one - other) for row in found for one, other in zip(row, expected, strict=True)]
        return {
            "sync/logprob_difference_mean": sum(differences) / len(differences),
            "sync/logprob_difference_max": max(differences),
        }

    def _sync_once(self, version: int, members: Sequence[Member]) -> dict[str, float]:
        if self._joined != tuple(members):
            self._connect(members)
        before = time.monotonic()
        in_flight = self._engines.pause(members, self._settings.pause_mode)
        pausing = time.monotonic() - before
        full = self._must_be_full or not self._leaves_out
        order = SyncOrder(version=version, full=full, hash_every=self._settings.hash_every)
        results = self._move(self._home.forward(order), members, version)
        before = time.monotonic()
        self._engines.resume(members)
        for member in members:
            self._engines.pool.admit(member)
        self._must_be_full = False
        return {
            **results[0],
            "sync/in_flight": float(in_flight),
            "sync/engines": float(len(members)),
            "sync/recoveries": float(self._engines.pool.recoveries),
            "sync/pause_seconds": pausing,
            "sync/resume_seconds": time.monotonic() - before,
        }

    def _welcome(self, member: Member) -> None:
        """Give the current version to an engine that was started again, in a group of its own."""
        if self._version is not None and not self._sent:
            # It has loaded the very weights that the others have.
            self._engines.pool.admit(member)
            return
        if self._version is None:
            raise EngineLostError(f"{member.name} was lost before the first weights were sent")
        try:
            self._restore(member, self._version)
        except BasculeError as error:
            self._recover(error, [member])

    def _restore(self, member: Member, version: int) -> None:
        start = time.monotonic()
        # Asked through the bridge; when that is gone, this is where it shows.
        kept = self._home.call("kept_version") == version
        self._connect([member], with_trainers=not kept and not self._trainers_joined)
        self._engines.pause([member])
        order = SyncOrder(version=version, hash_every=self._settings.hash_every)
        self._move(self._home.replay() if kept else self._home.forward(order), [member], version)
        self._engines.resume([member])
        self._engines.pool.admit(member)
        source = "the bridge's memory" if kept else "the trainers"
        LOG.warning(
            "%s has version %d from %s after %.1f s", member.name, version, source, time.monotonic() - start
        )

    def _move(
        self, sending: tuple[list[Any], list[str]], members: Sequence[Member], version: int
    ) -> list[Any]:
        refs, owners = sending
        receiving = self._engines.receive(members, version)
        phase = f"sync of weight version {version}"
        return self._watched([*refs, *receiving], owners, members, phase, self._timeout_s)

    def _watched(
        self,
        refs: Sequence[Any],
        owners: Sequence[str],
        members: Sequence[Member],
        phase: str,
        timeout_s: float,
    ) -> list[Any]:
        """Results of what bridge, trainers and then engines do. Raises StalledError when they do not get on."""
        questions = {member.name: member.actor.progress.remote for member in members}
        watch = SyncWatch(phase, {**self._home.questions(), **questions}, self._settings.stall_timeout_s)
        return deadline.get_all(
            refs,
            [*owners, *(member.name for member in members)],
            timeout_s=timeout_s,
            phase=phase,
            look=watch.look,
            look_s=watch.look_s,
        )

    def _connect(self, members: Sequence[Member], *, with_trainers: bool = True) -> None:
        self._joined = ()
        host, port, trainer_port = self._home.address()
        meeting = Meeting(
            host=host,
            port=port,
            peers=("bridge", *self._engines.worker_names(members)),
            timeout_s=self._collective_s,
            transport=self._settings.transport,
        )
        joining = self._engines.meet(members, meeting, self._wire, self._leaves_out, self._adapter)
        refs, owners = self._home.join(meeting, trainer_port if with_trainers else None)
        phase = "connection of trainers, bridge and engines"
        self._watched([*refs, *joining], owners, members, phase, self._start_timeout_s)
        self._trainers_joined = True
        self._joined = tuple(members)

    def _recover(self, error: BasculeError, members: Sequence[Member]) -> None:
        """Find out who is lost and get replacements on their way. Raises `error` when that is no use."""
        self._left -= 1
        if self._left < 0:
            raise error
        LOG.warning("weights: %s; sending again", error)
        self._event(None, "restart", f"weights are sent again: {str(error).partition(chr(10))[0]}")
        self._joined, self._trainers_joined, self._must_be_full = (), False, True
        late = error.late if isinstance(error, StalledError) else ()
        for member in members:
            if member.name in late:
                self._engines.pool.lost(member, error)
        if late and not {"bridge", *(member.name for member in members)} & {*late}:
            # Trainers cannot be replaced.
            raise error
        # Ends whatever still waits in the old groups.
        self._home.start()
        try:
            # One that was joining the lost group waits twice: for its meeting point, then for its members.
            self._trainers.check(2 * self._collective_s + _CHECK_S)
        except BasculeError as lost:
            raise lost from error
        self._find_lost(members)

    def _find_lost(self, members: Sequence[Member]) -> None:
        """Engines that do not answer, and those whose core is noticed to be gone, are replaced."""
        for member in members:
            try:
                deadline.get(member.actor.info.remote(), member.name, timeout_s=_CHECK_S, phase="check")
            except BasculeError as lost:
                self._engines.pool.lost(member, lost)
        end = time.monotonic() + _NOTICE_S
        for member in members:
            self._engines.pool.noticed(member, max(0.0, end - time.monotonic()))
