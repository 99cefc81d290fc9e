"""What the bridge does: takes the messages of trainer ranks bucket by bucket and passes them to all workers.

It knows sizes and places, not tensors. While a bucket is broadcast the next one is received and the workers load
the one before.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import xxhash

from bridge.safetensors_file import as_bytes
from bridge.sync_plan import HASH_BYTES, SyncPlan
from bridge.sync_protocol import (
    SyncOrder,
    decode_report,
    decode_units,
    empty_report,
    encode_header,
    encode_units,
)
from bridge.transport.base import Group, naming
from bridge.transport.errors import TransportError
from configs.errors import BasculeError

_SLOTS = 2


class NoCopyError(BasculeError):
    """There is no complete version in the bridge's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestEntry:
    """What a tensor of a version was, as its owners hashed it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: int | None
    """Hash of the hashes of its parts; None where this version did not hash them."""


class Relay:
    """Holds two buckets, or with `keep` the last complete version, in host memory."""

    def __init__(
        self,
        plan: SyncPlan,
        *,
        keep: bool,
        pinned: bool = False,
        around: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        """`pinned` memory (CUDA only, untested) lets GPUs copy to and from it directly. Whatever it does for a
        while is done inside of what `around` gives for it, in words."""
        self._around = around
        self._plan = plan
        self._units = plan.units
        self._keep = keep
        sizes = [bucket.nbytes for bucket in plan.buckets] if keep else [plan.largest_bucket] * _SLOTS
        self._memory = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        self._hashes: dict[int, list[torch.Tensor]] = {}
        self._kept: SyncOrder | None = None
        self.doing = ""
        """What is on its way to engines, in words; empty while a bucket is waited for, and between syncs."""
        self.received = 0
        """Buckets of this version that have come from trainers."""

    @property
    def kept_version(self) -> int | None:
        """The version that `replay` would send, if there is a complete one."""
        return None if self._kept is None else self._kept.version

    def forward(
        self, trainers: Group, engines: Group, order: SyncOrder, ranks: Sequence[int], workers: Sequence[str]
    ) -> dict[str, float]:
        """Move one version from trainers to engines. Returns bytes, counts and seconds as `sync/...`.

        `ranks` are the ranks in the group of trainers by trainer rank; `workers` what to call ranks 1, 2, ... of
        the engines' group. Raises TransportError naming version, bucket and peer.
        """
        start = time.monotonic()
        self._kept, self.received = None, 0
        units = self._units if order.full else self._changed_units(trainers, ranks)
        numbers = self._plan.buckets_of(units)
        self._announce(engines, order, units)
        waiting = broadcasting = 0.0
        digest = xxhash.xxh3_64()
        before = time.monotonic()
        for number, buffer in self._received(trainers, numbers, ranks, order):
            waiting += time.monotonic() - before
            before = time.monotonic()
            self._broadcast(engines, order, number, buffer)
            broadcasting += time.monotonic() - before
            before = time.monotonic()
            self._note_hashes(number, buffer, order, digest)
        before = time.monotonic()
        copied = self._check_reports(engines, order, digest.intdigest(), workers)
        if self._keep:
            self._kept = order
        return {
            "sync/bytes": float(sum(self._plan.buckets[number].nbytes for number in numbers)),
            "sync/buckets": float(len(numbers)),
            "sync/collectives": float(len(numbers) + 1),
            "sync/units_sent": float(len(units)),
            "sync/tensors_copied": float(copied),
            "sync/receive_wait_seconds": waiting,
            "sync/broadcast_seconds": broadcasting,
            "sync/report_wait_seconds": time.monotonic() - before,
            "sync/bridge_seconds": time.monotonic() - start,
        }

    def replay(self, engines: Group, workers: Sequence[str]) -> int:
        """Send the kept version to a group of engines; returns it. Trainers have no part in it.

        Raises NoCopyError when there is no complete version, TransportError as `forward` does.
        """
        if self._kept is None:
            raise NoCopyError("the bridge keeps no complete version of the weights (bridge.offload_bridge)")
        order = self._kept
        self._announce(engines, order, self._units)
        digest = xxhash.xxh3_64()
        for number, buffer in enumerate(self._memory):
            self._broadcast(engines, order, number, buffer)
            self._note_hashes(number, buffer, order, digest)
        self._check_reports(engines, order, digest.intdigest(), workers)
        return order.version

    def manifest(self) -> list[ManifestEntry]:
        """Every tensor with the hash of the content that was last sent."""
        parts: dict[str, list[bytes] | None] = {info.name: [] for info in self._plan.tensors}
        for number, bucket in enumerate(self._plan.buckets):
            for place, message in enumerate(bucket.messages):
                told = self._hashes[number][place] if number in self._hashes else None
                for position, part in enumerate(message.parts):
                    found = parts[part.info.name]
                    if told is None or found is None:
                        parts[part.info.name] = None
                        continue
                    found.append(told[HASH_BYTES * position : HASH_BYTES * (position + 1)].numpy().tobytes())
        return [
            ManifestEntry(
                name=info.name,
                dtype=str(info.dtype).removeprefix("torch."),
                shape=info.shape,
                content=None if (found := parts[info.name]) is None else _combined(found),
            )
            for info in self._plan.tensors
        ]

    @contextmanager
    def _told(self, doing: str) -> Generator[None]:
        self.doing = doing
        try:
            with self._around(doing):
                yield
        finally:
            self.doing = ""

    def _announce(self, engines: Group, order: SyncOrder, units: Sequence[str]) -> None:
        with naming(f"weights of version {order.version}, header"), self._told("sends the header"):
            engines.broadcast(encode_header(order, self._units, units), 0)

    def _broadcast(self, engines: Group, order: SyncOrder, number: int, buffer: torch.Tensor) -> None:
        with naming(self._where(order, number)), self._told(f"sends bucket {number}"):
            engines.broadcast(buffer, 0)

    def _changed_units(self, trainers: Group, ranks: Sequence[int]) -> tuple[str, ...]:
        """Ask every rank which units changed, tell all of them the union."""
        marks = [torch.empty(len(self._units), dtype=torch.uint8) for _ in ranks]
        trainers.recv_each(list(zip(marks, ranks, strict=True)))
        units = decode_units(torch.stack(marks).amax(0), self._units)
        for rank in ranks:
            trainers.send(encode_units(self._units, units), rank)
        return units

    def _received(
        self, trainers: Group, numbers: Sequence[int], ranks: Sequence[int], order: SyncOrder
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Each bucket once it is there, valid until the next but one; the next is received meanwhile."""
        pool = ThreadPoolExecutor(1)
        coming: list[Future[torch.Tensor]] = []
        try:
            for place, number in enumerate(numbers):
                memory = self._memory[number if self._keep else place % _SLOTS]
                coming.append(pool.submit(self._receive, memory, trainers, number, ranks, order))
                if place:
                    yield numbers[place - 1], coming[place - 1].result()
            if numbers:
                yield numbers[-1], coming[-1].result()
        finally:
            # After a failure nobody waits for a rank that may never send.
            pool.shutdown(wait=False, cancel_futures=True)

    def _receive(
        self, memory: torch.Tensor, trainers: Group, number: int, ranks: Sequence[int], order: SyncOrder
    ) -> torch.Tensor:
        bucket = self._plan.buckets[number]
        buffer = memory[: bucket.nbytes]
        with naming(self._where(order, number)), self._around(f"receives bucket {number}"):
            trainers.recv_each([(buffer[m.start : m.stop], ranks[m.rank]) for m in bucket.messages])
        self.received += 1
        return buffer

    def _note_hashes(
        self, number: int, buffer: torch.Tensor, order: SyncOrder, digest: xxhash.xxh3_64
    ) -> None:
        if not order.hashes(number):
            self._hashes.pop(number, None)
            return
        told = [buffer[m.hashes_at : m.stop].clone() for m in self._plan.buckets[number].messages]
        for hashes in told:
            digest.update(as_bytes(hashes))
        self._hashes[number] = told

    def _check_reports(self, engines: Group, order: SyncOrder, digest: int, workers: Sequence[str]) -> int:
        """Every worker says what it received; that must be what the trainers sent.

        Returns the number of tensors that went without vLLM's loaders, in the worker with the fewest.
        """
        copied: list[int] = []
        for rank, worker in enumerate(workers, 1):
            data = empty_report()
            where = f"weights of version {order.version}, report of {worker}"
            with naming(where), self._told(f"waits for the report of {worker}"):
                engines.recv(data, rank)
            report = decode_report(data)
            if (report.version, report.digest) != (order.version, digest):
                raise TransportError(
                    f"weights of version {order.version}: {worker} reports version {report.version} with content "
                    f"{report.digest:016x}; sent was {digest:016x}"
                )
            copied.append(report.copied)
        return min(copied, default=0)

    def _where(self, order: SyncOrder, number: int) -> str:
        return f"weights of version {order.version}, bucket {number} of {len(self._plan.buckets)}"


def _combined(hashes: Sequence[bytes]) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(hashes))
