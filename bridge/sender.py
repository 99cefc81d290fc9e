"""A trainer rank's end of a sync: its parameters as messages of bytes and hashes."""

from collections import deque
from collections.abc import Iterator, Mapping

import torch

from bridge.fingerprint import fingerprint, signed
from bridge.layouts import region_shape, slices
from bridge.merged import LastKept
from bridge.plan import Plan
from bridge.sync_plan import Message, SyncPlan, sources, unit_of


class Sender:
    """Packs what one rank owns. Holds one message at a time, in memory that is used again."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        plan: Plan,
        sync_plan: SyncPlan,
        rank: int,
        device: torch.device | None = None,
    ) -> None:
        """`parameters` by global name, as they are trained: they are read anew for each message.

        Messages are made and hashed on `device`, by default in host memory.
        """
        self._parameters = parameters
        self._messages: dict[int, Message] = {}
        for number, bucket in enumerate(sync_plan.buckets):
            message = bucket.of_rank(rank)
            if message is not None:
                self._messages[number] = message
        self._cuts = {number: sources(plan, message) for number, message in self._messages.items()}
        largest = max((message.nbytes for message in self._messages.values()), default=0)
        self._buffer = torch.empty(largest, dtype=torch.uint8, device=device)
        self._delivered: dict[int, tuple[int, ...]] = {}

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of the buckets that this rank owns a part of."""
        return tuple(self._messages)

    def pack(self, number: int, *, with_hashes: bool = True) -> torch.Tensor:
        """This rank's message of a bucket, valid until the next call.

        Without hashes zeros are in their place.
        """
        message = self._messages[number]
        buffer = self._buffer[: message.nbytes]
        hashes = buffer[message.hashes_at - message.start :].view(torch.int64)
        if with_hashes:
            self._delivered[number] = tuple(fingerprint(content) for content in self._filled(number))
            hashes.copy_(torch.tensor([signed(value) for value in self._delivered[number]]))
        else:
            deque(self._filled(number), maxlen=0)
            hashes.zero_()
        return buffer

    def changed_units(self) -> set[str]:
        """Units of which a part of this rank has another content than when it was last packed with hashes.

        The content is hashed, so it costs a pass over the rank's parameters.
        """
        changed: set[str] = set()
        for number, message in self._messages.items():
            hashes = [fingerprint(content) for content in self._filled(number)]
            before = self._delivered.get(number)
            changed |= {
                unit_of(part.info.name)
                for position, part in enumerate(message.parts)
                if before is None or before[position] != hashes[position]
            }
        return changed

    def _filled(self, number: int) -> Iterator[torch.Tensor]:
        """Put part after part into its place; each is given at once, so that it is hashed while caches hold it."""
        message = self._messages[number]
        buffer, parameters = self._buffer[: message.nbytes], LastKept(self._parameters)
        for part, (piece, box) in zip(message.parts, self._cuts[number], strict=True):
            value = piece.get(parameters[piece.parameter])[slices(box)]
            start = part.start - message.start
            content = buffer[start : start + part.nbytes]
            content.view(part.info.dtype).view(region_shape(part.region)).copy_(value)
            yield content
