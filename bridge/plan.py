"""Who owns which slice of which Hugging Face tensor: computed once per model and layout, then followed."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bridge.layouts import Fold, Region, Shape, region_numel, region_of, region_shape, slices
from bridge.rules import RuleError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights are trained and written in, by the names that configs use."""


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


def main_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The type of most bytes: what config.json calls the checkpoint's."""
    nbytes: Counter[torch.dtype] = Counter()
    for info in tensors:
        nbytes[info.dtype] += info.nbytes
    return nbytes.most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A region of an HF tensor and where it lives: rank, global name of the parameter, region there."""

    tensor: str
    region: Region
    rank: int
    parameter: str
    local_region: Region
    fold: Fold | None = None
    copy: bool = False
    """A tied copy: it is loaded, but the original speaks for it afterwards."""

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """The piece's values in the shape of its HF region; a view of the parameter where that is possible."""
        box = parameter.detach()[slices(self.local_region)]
        if self.fold is not None:
            box = box.view(self.fold.split).permute(self.fold.order)
        return box.reshape(region_shape(self.region))

    def put(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Write `value`, in the shape of the HF region, into the parameter."""
        box = self.target(parameter)
        box.copy_(value.reshape(box.shape))

    def target(self, parameter: torch.Tensor) -> torch.Tensor:
        """A view of the parameter whose elements, in row-major order, are those of the HF region."""
        box = parameter.detach()
        # Most pieces are whole parameters, and an index takes its time.
        if region_shape(self.local_region) != box.shape:
            box = box[slices(self.local_region)]
        return box if self.fold is None else box.view(self.fold.split).permute(self.fold.order)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors that are saved together."""

    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


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
            size += tensor.nbytes
        return tuple(Bucket(tensors=tuple(group)) for group in groups)


def build_plan(
    tensors: Sequence[TensorInfo], claims: Iterable[Piece], copies: Mapping[str, str] | None = None
) -> Plan:
    """Give every region to one of the ranks that hold it, evening out bytes over data-parallel replicas.

    `copies` are tensors that repeat another one, by name; the owners of that one own them too. Raises
    RuleError naming tensors that the claims do not cover exactly once.
    """
    copies = copies or {}
    candidates: dict[str, dict[Region, list[Piece]]] = {tensor.name: {} for tensor in tensors}
    for claim in claims:
        if not claim.copy:
            candidates[claim.tensor].setdefault(claim.region, []).append(claim)
    load: dict[int, int] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for tensor in tensors:
        chosen: list[Piece] = []
        for region, holders in sorted(candidates[copies.get(tensor.name, tensor.name)].items()):
            piece = min(holders, key=lambda holder: (load.get(holder.rank, 0), holder.rank))
            load[piece.rank] = load.get(piece.rank, 0) + region_numel(region)
            chosen.append(replace(piece, tensor=tensor.name) if tensor.name in copies else piece)
        pieces[tensor.name] = tuple(chosen)
    holes = [
        tensor.name
        for tensor in tensors
        if not covers(region_of(tensor.shape), [piece.region for piece in pieces[tensor.name]])
    ]
    if holes:
        raise RuleError(f"no rank, or more than one, holds part of these tensors: {', '.join(holes)}")
    return Plan(tensors=tuple(tensors), pieces=pieces)


def covers(whole: Region, regions: Sequence[Region]) -> bool:
    """Whether the regions fill `whole` without gap or overlap.

    They must be a grid in some order of the dimensions, as the cuts of any parallel layout are.
    """
    if not whole:
        return len(regions) == 1
    for dim, (edge, end) in enumerate(whole):
        parts: dict[tuple[int, int], list[Region]] = {}
        for region in regions:
            parts.setdefault(region[dim], []).append(_without(region, dim))
        for start, stop in sorted(parts):
            if start != edge:
                break
            edge = stop  # noqa: PLW2901
        else:
            rest = _without(whole, dim)
            if edge == end and all(covers(rest, part) for part in parts.values()):
                return True
    return False


def _without(region: Region, dim: int) -> Region:
    return region[:dim] + region[dim + 1 :]
