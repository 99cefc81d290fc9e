"""How a plan is cut into the buckets that travel to engines, and the form in which engines are told.

A bucket is one message from each rank that owns part of it, laid side by side:

    | rank 0: parts | their hashes | rank 2: parts | their hashes | ...

so what a rank sends goes straight into its place, nobody on the way has to know about tensors, and the hash of a
part that is made where it comes from is checked where it arrives. A part is a box of an HF tensor that one rank
owns; a tensor of several owners, or larger than a bucket, has several, perhaps in several buckets.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bridge.layouts import Region, intersect, region_numel, region_of, relative
from bridge.plan import Piece, Plan, TensorInfo, covers
from bridge.safetensors_file import boxes
from configs.errors import BasculeError

HASH_BYTES = 8
_UNIT = re.compile(r"(.*?\.\d+\.[^.]+)\.")


class SyncPlanError(BasculeError):
    """A plan that came from elsewhere contradicts itself. Names the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A box of an HF tensor as one run of bytes; `start` is where it begins in its bucket."""

    info: TensorInfo
    region: Region
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return region_numel(self.region) * self.info.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What one rank contributes to a bucket: its parts, then a hash of eight bytes for each."""

    rank: int
    start: int
    parts: tuple[Part, ...]

    @property
    def hashes_at(self) -> int:
        """Where in the bucket the hashes begin."""
        last = self.parts[-1]
        return _aligned(last.start + last.nbytes)

    @property
    def stop(self) -> int:
        """Where in the bucket the message ends."""
        return self.hashes_at + HASH_BYTES * len(self.parts)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncBucket:
    """The messages of a bucket, by rank."""

    messages: tuple[Message, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes, with hashes."""
        return self.messages[-1].stop

    @property
    def parts(self) -> Iterator[Part]:
        """All parts in the order of their bytes."""
        return (part for message in self.messages for part in message.parts)

    def of_rank(self, rank: int) -> Message | None:
        """The rank's message, if it owns a part."""
        return next((message for message in self.messages if message.rank == rank), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncPlan:
    """Everything that a sync moves, known to trainers, bridge and engines before the first one."""

    tensors: tuple[TensorInfo, ...]
    buckets: tuple[SyncBucket, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a whole sync."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def largest_bucket(self) -> int:
        """Bytes of the largest bucket."""
        return max(bucket.nbytes for bucket in self.buckets)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of all units in order; see unit_of."""
        return tuple(dict.fromkeys(unit_of(info.name) for info in self.tensors))

    def buckets_of(self, units: Iterable[str]) -> tuple[int, ...]:
        """Numbers of the buckets with a part of these units."""
        wanted = set(units)
        return tuple(
            number
            for number, bucket in enumerate(self.buckets)
            if any(unit_of(part.info.name) in wanted for part in bucket.parts)
        )


@cache
def unit_of(name: str) -> str:
    """The module whose tensors are loaded together, because an engine fuses some of them into one parameter.

    `model.layers.3.self_attn.q_proj.weight` is of `model.layers.3.self_attn`: vLLM takes one of q, k and v, or
    some of the experts, and leaves the rest of the fused parameter as it happens to be.
    """
    found = _UNIT.match(name)
    return found[1] if found else name.rpartition(".")[0]


def changing_units(plan: Plan, rank: int, fixed: Collection[str]) -> frozenset[str]:
    """Units of which this rank has a part that is made from a parameter other than the `fixed` ones."""
    return frozenset(
        unit_of(info.name)
        for info in plan.tensors
        if any(piece.rank == rank and piece.parameter not in fixed for piece in plan.pieces[info.name])
    )


def cut_plan(plan: Plan, bucket_bytes: int, apart: Collection[str] = ()) -> SyncPlan:
    """The plan in buckets with at most `bucket_bytes` of tensors each (hashes and alignment come on top).

    Units stay together where they fit; a tensor that does not fit is cut into boxes. The units `apart` come last,
    and share no bucket with others.
    """
    order = {unit: number for number, unit in enumerate(dict.fromkeys(unit_of(i.name) for i in plan.tensors))}
    tensors = sorted(plan.tensors, key=lambda info: (unit_of(info.name) in apart, order[unit_of(info.name)]))
    buckets: list[list[tuple[int, TensorInfo, Region]]] = []
    size, is_apart = 0, False
    for info in tensors:
        if is_apart != (unit_of(info.name) in apart):
            size, is_apart = bucket_bytes, True
        for piece in plan.pieces[info.name]:
            for box in boxes(piece.region, max(1, bucket_bytes // info.dtype.itemsize)):
                nbytes = _aligned(region_numel(box) * info.dtype.itemsize)
                if not buckets or size + nbytes > bucket_bytes:
                    buckets.append([])
                    size = 0
                buckets[-1].append((piece.rank, info, box))
                size += nbytes
    return SyncPlan(tensors=tuple(tensors), buckets=tuple(_lay_out(owned) for owned in buckets))


def _lay_out(owned: Sequence[tuple[int, TensorInfo, Region]]) -> SyncBucket:
    by_rank: dict[int, list[tuple[TensorInfo, Region]]] = {}
    for rank, info, box in owned:
        by_rank.setdefault(rank, []).append((info, box))
    messages: list[Message] = []
    at = 0
    for rank in sorted(by_rank):
        start, parts = at, []
        for info, box in by_rank[rank]:
            parts.append(Part(info=info, region=box, start=at))
            at = _aligned(at + parts[-1].nbytes)
        messages.append(Message(rank=rank, start=start, parts=tuple(parts)))
        at = messages[-1].stop
    return SyncBucket(messages=tuple(messages))


def sources(plan: Plan, message: Message) -> tuple[tuple[Piece, Region], ...]:
    """For each part of a message the piece it is cut from, and the part in coordinates of that piece."""
    found: list[tuple[Piece, Region]] = []
    for part in message.parts:
        piece = next(
            piece
            for piece in plan.pieces[part.info.name]
            if piece.rank == message.rank and intersect(piece.region, part.region) == part.region
        )
        found.append((piece, relative(part.region, piece.region)))
    return tuple(found)


def to_wire(plan: SyncPlan) -> dict[str, Any]:
    """The plan as plain lists, numbers and strings, which any serializer carries."""
    numbers = {info.name: number for number, info in enumerate(plan.tensors)}
    return {
        "tensors": [
            [info.name, str(info.dtype).removeprefix("torch."), list(info.shape)] for info in plan.tensors
        ],
        "buckets": [
            [
                [message.rank, [[numbers[part.info.name], part.region] for part in message.parts]]
                for message in bucket.messages
            ]
            for bucket in plan.buckets
        ],
    }


def from_wire(wire: Mapping[str, Any]) -> SyncPlan:
    """What `to_wire` was given.

    Raises SyncPlanError naming a tensor that comes twice, has an unknown type, or whose parts do not make it up.
    """
    tensors = [
        TensorInfo(name=name, dtype=_dtype(name, dtype), shape=tuple(shape))
        for name, dtype, shape in wire["tensors"]
    ]
    parts: dict[str, list[Region]] = {}
    for info in tensors:
        if info.name in parts:
            raise SyncPlanError(f"sync plan: {info.name} comes twice")
        parts[info.name] = []
    buckets: list[SyncBucket] = []
    for messages in wire["buckets"]:
        owned: list[tuple[int, TensorInfo, Region]] = []
        for rank, boxes_of_rank in messages:
            for number, region in boxes_of_rank:
                box = tuple((int(start), int(stop)) for start, stop in region)
                owned.append((rank, tensors[number], box))
                parts[tensors[number].name].append(box)
        buckets.append(_lay_out(owned))
    for info in tensors:
        if not covers(region_of(info.shape), parts[info.name]):
            raise SyncPlanError(f"sync plan: the parts of {info.name} do not make up {list(info.shape)}")
    return SyncPlan(tensors=tuple(tensors), buckets=tuple(buckets))


def _dtype(name: str, dtype_name: str) -> torch.dtype:
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise SyncPlanError(f"sync plan: {name} has the unknown type {dtype_name!r}")
    return dtype


def _aligned(offset: int) -> int:
    """Parts begin at multiples of eight, so that a view of any type is legal."""
    return -(-offset // 8) * 8
