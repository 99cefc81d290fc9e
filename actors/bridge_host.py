"""The end of both groups: what runs in the bridge actor, or inside trainer rank 0."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import ray
import torch

from actors.spans import SpanLog, Taken, traced
from bridge.progress import BridgeProgress
from bridge.relay import ManifestEntry, Relay
from bridge.sync_plan import SyncPlan
from bridge.sync_protocol import SyncOrder
from bridge.transport import nccl
from bridge.transport.base import Group
from bridge.transport.gloo import connect, free_port
from bridge.transport.loopback import HostedGroup, LoopbackEnd
from bridge.transport.nccl_device import CudaDevice

Transport = Literal["gloo", "cupy_nccl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where a group meets, and who is in it; rank 0 is the bridge."""

    host: str
    port: int
    peers: tuple[str, ...]
    """What to call the ranks in messages."""
    timeout_s: float
    """Longest wait of any one operation."""
    transport: Transport = "gloo"
    """`cupy_nccl` has never been run on a GPU by this project."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.peers)

    def join(self, rank: int) -> Group:
        """Join as `rank`; returns when all are there. Raises TransportError."""
        if self.transport == "cupy_nccl":
            device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
            where = self.host, self.port, rank, self.world_size, self.timeout_s, self.peers
            return nccl.connect(*where, device=device)
        return connect(self.host, self.port, rank, self.world_size, self.timeout_s, self.peers)


class BridgeHost:
    """Relays weights between the trainers' group and the engines', as rank 0 of both."""

    def __init__(self, plan: SyncPlan, keep: bool, spans: SpanLog | None = None) -> None:
        """`keep` holds the last complete version in memory. `spans` are those of the process, if it has some."""
        self.spans = spans or SpanLog()
        self._relay = Relay(plan, keep=keep, pinned=torch.cuda.is_available(), around=self.spans)
        self._trainers: Group
        self._engines: Group
        self._ranks: tuple[int, ...]
        self._workers: tuple[str, ...]
        self._is_joining = False
        self._awaited: Group | None = None

    def address(self) -> tuple[str, int, int]:
        """This node's address and two different ports free on it a moment ago."""
        host = ray.util.get_node_ip_address()
        first = second = free_port(host)
        while second == first:
            second = free_port(host)
        return host, first, second

    def connect(self, trainers: Meeting | None, engines: Meeting, local: LoopbackEnd | None = None) -> None:
        """Join the engines' group, and the trainers' one unless it stays; returns when all ranks are there.

        `local` leads to the trainer rank that hosts this bridge.
        """
        self._is_joining = True
        with ThreadPoolExecutor(1) as pool:
            joining = None if trainers is None else pool.submit(self._join_trainers, trainers, local)
            self._engines = engines.join(0)
            self._workers = engines.peers[1:]
            if joining is not None:
                joining.result()
        self._awaited, self._is_joining = self._trainers, False

    def take_spans(self) -> Taken:
        """What it has done since the last call."""
        return self.spans.take()

    def process_id(self) -> int:
        """The process in which it runs."""
        return os.getpid()

    def progress(self) -> BridgeProgress:
        """What it is doing. May be called while it does."""
        return BridgeProgress(
            doing="joins its groups" if self._is_joining else self._relay.doing,
            awaits="" if self._awaited is None else self._awaited.waits_for,
            received=self._relay.received,
        )

    @traced("forward", version=lambda order: order.version)
    def forward(self, order: SyncOrder) -> dict[str, float]:
        """Move one version from trainers to engines; see Relay.forward. After an error both groups are closed."""
        try:
            return self._relay.forward(self._trainers, self._engines, order, self._ranks, self._workers)
        except BaseException:
            self.close()
            raise

    @traced("replay")
    def replay(self) -> int:
        """Send the kept version to the engines of the last `connect`; returns it."""
        return self._relay.replay(self._engines, self._workers)

    def manifest(self) -> list[ManifestEntry]:
        """Every tensor with the hash of the content that was last sent."""
        return self._relay.manifest()

    def kept_version(self) -> int | None:
        """The version that `replay` would send."""
        return self._relay.kept_version

    def close(self) -> None:
        """Leave both groups, so that everyone in them fails at once."""
        self._trainers.close()
        self._engines.close()

    def _join_trainers(self, meeting: Meeting, local: LoopbackEnd | None) -> None:
        if local is None:
            self._trainers = meeting.join(0)
            self._ranks = tuple(range(1, meeting.world_size))
            return
        others = meeting.join(0) if meeting.world_size > 1 else None
        self._trainers = HostedGroup(local, others)
        self._ranks = tuple(range(meeting.world_size))
