"""Who owns which slice of which Hugging Face tensor: computed once per model and layout, then followed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from bridge.layouts import Region, Shape, region_numel, region_of
from bridge.rules import RuleError


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Name, type and full shape of an HF tensor."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A region of an HF tensor and where it lives: rank, global name of the parameter, region there."""

    tensor: str
    region: Region
    rank: int
    parameter: str
    local_region: Region
    copy: bool = False
    """A tied copy: it is loaded, but the original speaks for it afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors that travel together; `offsets` are where each begins, in bytes."""

    tensors: tuple[TensorInfo, ...]
    offsets: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All HF tensors in layer order, and the owners of each. Every element has exactly one owner."""

    tensors: tuple[TensorInfo, ...]
    pieces: Mapping[str, tuple[Piece, ...]]

    def buckets(self, bucket_bytes: int) -> tuple[Bucket, ...]:
        """The tensors in order, in buckets of at most `bucket_bytes`; a larger tensor has its own."""
        groups: list[list[TensorInfo]] = []
        size = 0
        for tensor in self.tensors:
            if not groups or size + tensor.nbytes > bucket_bytes:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size = _aligned(size + tensor.nbytes)
        return tuple(_bucket(group) for group in groups)

    def owned(self, bucket: Bucket, rank: int) -> tuple[Piece, ...]:
        """The rank's pieces of a bucket, in the order in which it sends them in one message."""
        return tuple(
            piece for tensor in bucket.tensors for piece in self.pieces[tensor.name] if piece.rank == rank
        )

    def owners(self, bucket: Bucket) -> tuple[int, ...]:
        """Ranks that own a piece of the bucket."""
        return tuple(sorted({piece.rank for tensor in bucket.tensors for piece in self.pieces[tensor.name]}))


def build_plan(tensors: Sequence[TensorInfo], claims: Iterable[Piece]) -> Plan:
    """Give every region to one of the ranks that hold it, evening out bytes over data-parallel replicas.

    Raises RuleError naming tensors that the claims do not cover exactly once.
    """
    candidates: dict[str, dict[Region, list[Piece]]] = {tensor.name: {} for tensor in tensors}
    for claim in claims:
        if not claim.copy:
            candidates[claim.tensor].setdefault(claim.region, []).append(claim)
    load: dict[int, int] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for tensor in tensors:
        chosen: list[Piece] = []
        for region, holders in sorted(candidates[tensor.name].items()):
            piece = min(holders, key=lambda holder: (load.get(holder.rank, 0), holder.rank))
            load[piece.rank] = load.get(piece.rank, 0) + region_numel(region)
            chosen.append(piece)
        pieces[tensor.name] = tuple(chosen)
    holes = [tensor.name for tensor in tensors if not _covers(tensor.shape, pieces[tensor.name])]
    if holes:
        raise RuleError(f"no rank, or more than one, holds part of these tensors: {', '.join(holes)}")
    return Plan(tensors=tuple(tensors), pieces=pieces)


def _covers(shape: Shape, pieces: Sequence[Piece]) -> bool:
    """Whether the pieces, split along at most one dimension, cover the tensor without gap or overlap."""
    whole = region_of(shape)
    regions = sorted(piece.region for piece in pieces)
    if regions == [whole]:
        return True
    split = {dim for region in regions for dim, side in enumerate(region) if side != whole[dim]}
    if len(split) != 1:
        return False
    (dim,) = split
    edges = [region[dim] for region in regions]
    joints = pairwise(edges)
    return (
        edges[0][0] == 0 and edges[-1][1] == shape[dim] and all(left[1] == right[0] for left, right in joints)
    )


def _aligned(offset: int) -> int:
    """Offsets are multiples of eight, so that a view of any type is legal."""
    return -(-offset // 8) * 8


def _bucket(tensors: Sequence[TensorInfo]) -> Bucket:
    offsets: list[int] = []
    size = 0
    for tensor in tensors:
        offsets.append(size)
        size = _aligned(size + tensor.nbytes)
    return Bucket(tensors=tuple(tensors), offsets=tuple(offsets), nbytes=size)
