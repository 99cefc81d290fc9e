"""A trainer rank's part in a weight sync."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from actors.bridge_host import BridgeHost, Meeting, Transport
from actors.spans import SpanLog
from bridge.plan import Plan
from bridge.sender import Sender
from bridge.sync_plan import cut_plan
from bridge.sync_protocol import SyncOrder, decode_units, encode_units
from bridge.transport.base import Group
from bridge.transport.loopback import LoopbackEnd, loopback


class SyncRank:
    """Sends what one rank owns; in rank 0 it may host the bridge as well."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        plan: Plan,
        bucket_bytes: int,
        rank: int,
        transport: Transport,
        spans: SpanLog,
        *,
        fixed: Collection[str] = (),
        by_content: bool = False,
    ) -> None:
        """A sync that is not full leaves out the `fixed` units, or `by_content` all that was sent as it is."""
        self._spans = spans
        self._plan = cut_plan(plan, bucket_bytes, fixed)
        self._fixed, self._by_content = fixed, by_content
        # Hashed where engines hash: on the GPU if that is where they receive.
        device = torch.device("cuda" if transport == "cupy_nccl" else "cpu")
        self._sender = Sender(parameters, plan, self._plan, rank, device)
        self._bridge: Group | LoopbackEnd
        self._host: BridgeHost

    def join(self, meeting: Meeting, rank_in_group: int) -> None:
        """Join the group of the bridge."""
        self._bridge = meeting.join(rank_in_group)

    def host(self, keep: bool) -> None:
        """Make the bridge part of this process."""
        self._host = BridgeHost(self._plan, keep, self._spans)

    def call_host(self, method: str, *arguments: Any) -> Any:
        """Call the bridge in this process, while nothing is sent."""
        return getattr(self._host, method)(*arguments)

    def connect_host(self, trainers: Meeting, engines: Meeting) -> None:
        """Let the bridge in this process join both groups, and join it."""
        there, here = loopback(trainers.timeout_s)
        self._host.connect(trainers, engines, there)
        self._bridge = here

    def send(self, order: SyncOrder) -> None:
        """Send one message for each bucket of which this rank owns a part that is due."""
        units = self._plan.units if order.full else self._agree()
        due = set(self._plan.buckets_of(units))
        for number in self._sender.buckets:
            if number in due:
                message = self._sender.pack(number, with_hashes=order.hashes(number))
                self._bridge.send(message.cpu(), 0)

    def send_hosting(self, order: SyncOrder) -> dict[str, float]:
        """The same, while the bridge in this process forwards it; returns what the bridge has to say."""
        with ThreadPoolExecutor(1) as pool:
            forwarding = pool.submit(self._host.forward, order)
            try:
                self.send(order)
            except BaseException:
                self._host.close()
                # What the bridge says is nearer to the cause.
                forwarding.result()
                raise
            return forwarding.result()

    def _agree(self) -> tuple[str, ...]:
        """Units that changed on any rank."""
        all_units = self._plan.units
        ours = self._sender.changed_units() if self._by_content else {*all_units} - {*self._fixed}
        self._bridge.send(encode_units(all_units, ours), 0)
        marks = torch.empty(len(all_units), dtype=torch.uint8)
        self._bridge.recv(marks, 0)
        return decode_units(marks, all_units)
