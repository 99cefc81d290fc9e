"""How a Megatron shard is cut out of Hugging Face tensors. Pure arithmetic on shapes.

A layout answers one question: which region of which HF tensor is which region of this rank's parameter?
Loading, saving, syncing and checking all follow from the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
"""[start, stop) in every dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Position in the tensor-parallel group, and the attention shape that QKV needs."""

    rank: int
    size: int
    num_query_groups: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """`hf_region` of the rule's HF tensor number `source` is `local_region` of the parameter."""

    source: int
    hf_region: Region
    local_region: Region


class Layout(Protocol):
    """One way of cutting."""

    @property
    def parallel_dim(self) -> int | None:
        """Dimension Megatron splits over tensor-parallel ranks; None when every rank has a copy."""
        ...

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """Cuts of this shard, given the full shapes of the rule's HF tensors."""
        ...


def region_of(shape: Shape) -> Region:
    """The region that is the whole tensor."""
    return tuple((0, size) for size in shape)


def region_shape(region: Region) -> Shape:
    """Sizes of a region."""
    return tuple(stop - start for start, stop in region)


def region_numel(region: Region) -> int:
    """Number of elements in a region."""
    return math.prod(region_shape(region))


def slices(region: Region) -> tuple[slice, ...]:
    """The region as an index."""
    return tuple(slice(start, stop) for start, stop in region)


def _rows(shape: Shape, start: int, stop: int) -> Region:
    return ((start, stop), *region_of(shape[1:]))


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank has the whole tensor: norms, biases of row-parallel layers, routers."""

    parallel_dim = None

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """The whole tensor."""
        whole = region_of(shapes[0])
        return (Cut(source=0, hf_region=whole, local_region=whole),)


@dataclass(frozen=True, slots=True)
class Row:
    """Equal column ranges: Megatron's row-parallel layers split the input features."""

    parallel_dim = 1

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """One column range."""
        rows, columns = shapes[0]
        width = columns // shard.size
        return (
            Cut(
                source=0,
                hf_region=((0, rows), (shard.rank * width, (shard.rank + 1) * width)),
                local_region=((0, rows), (0, width)),
            ),
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Equal row ranges of the vocabulary after padding it to a multiple of the group; padding has no cut."""

    parallel_dim = 0

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """One row range, shorter on a rank that also holds padding; none on one that holds only that."""
        vocabulary = shapes[0][0]
        rows = padded_vocabulary(vocabulary, shard.size) // shard.size
        start, stop = shard.rank * rows, min((shard.rank + 1) * rows, vocabulary)
        if start >= stop:
            return ()
        return (
            Cut(
                source=0,
                hf_region=_rows(shapes[0], start, stop),
                local_region=_rows(shapes[0], 0, stop - start),
            ),
        )


@dataclass(frozen=True, slots=True)
class GateUp:
    """Gate and up projections, [gate rows of this rank; up rows of this rank]."""

    parallel_dim = 0

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """A row range of gate and the same one of up."""
        rows = shapes[0][0] // shard.size
        return tuple(
            Cut(
                source=source,
                hf_region=_rows(shapes[source], shard.rank * rows, (shard.rank + 1) * rows),
                local_region=_rows(shapes[source], source * rows, (source + 1) * rows),
            )
            for source in (0, 1)
        )


@dataclass(frozen=True, slots=True)
class QKV:
    """Attention inputs, per query group: its query heads, its key head, its value head.

    Needs num_query_groups divisible by the tensor-parallel size.
    """

    parallel_dim = 0

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """For each group of this rank a row range of q, one of k and one of v."""
        groups = shard.num_query_groups // shard.size
        heights = (shapes[0][0] // shard.num_query_groups, shard.head_dim, shard.head_dim)
        found: list[Cut] = []
        offset = 0
        for group in range(shard.rank * groups, (shard.rank + 1) * groups):
            for source, height in enumerate(heights):
                found.append(
                    Cut(
                        source=source,
                        hf_region=_rows(shapes[source], group * height, (group + 1) * height),
                        local_region=_rows(shapes[source], offset, offset + height),
                    )
                )
                offset += height
        return tuple(found)


def padded_vocabulary(vocabulary: int, tensor_parallel_size: int) -> int:
    """The least multiple of the tensor-parallel size that holds the vocabulary."""
    return -(-vocabulary // tensor_parallel_size) * tensor_parallel_size
